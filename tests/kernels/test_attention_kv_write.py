"""Rotary embedding and cache write against their reference."""

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.attention.kv_write import rope_kv, rope_kv_ref
from asyncllm.kernels.attention.quantize import dequantize_ref
from tests.kernels.harness import (
    DEVICE,
    DTYPES,
    EIGHT_BITS,
    assert_close,
    ints,
    no_sync,
    randn,
    replayed,
)

# tokens, query heads, KV heads, head_dim
SHAPES = [
    (1, 9, 3, 64),
    (5, 4, 4, 80),
    (3, 8, 2, 96),
    (7, 28, 4, 128),
    (2, 8, 1, 256),
    (11, 7, 1, 64),
]


def make_table(num_positions: int, dim: int) -> Tensor:
    angles = torch.arange(num_positions)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float().to(DEVICE)


def make_case(tokens: int, q: int, kv: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """qkv, cos_sin, positions, slots, k_cache, v_cache."""
    slots = torch.randperm(2 * tokens + 1, generator=torch.Generator().manual_seed(tokens))
    positions = [(37 * i) % 101 for i in range(tokens)]
    caches = [randn(2 * tokens + 2, kv, dim, dtype=dtype, seed=i) for i in (1, 2)]
    qkv = randn(tokens, (q + 2 * kv) * dim, dtype=dtype)
    return [qkv, make_table(101, dim), ints(positions), ints(slots[:tokens].tolist()), *caches]


@pytest.mark.parametrize(("tokens", "q", "kv", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_kv(tokens: int, q: int, kv: int, dim: int, dtype: torch.dtype) -> None:
    case = make_case(tokens, q, kv, dim, dtype)
    mirror = [t.clone() for t in case]
    rope_kv_ref(*mirror, q)
    with no_sync():
        rotated = rope_kv(*case, q)
    assert rotated.shape == (tokens, q, dim)
    assert rotated.data_ptr() == case[0].data_ptr()
    assert_close("qkv", mirror[0], case[0])
    assert torch.equal(mirror[0][:, (q + kv) * dim :], case[0][:, (q + kv) * dim :])
    in_cache = case[4][case[3].long()].flatten(1)
    assert torch.equal(in_cache, case[0][:, q * dim : (q + kv) * dim])
    assert_close("k", mirror[4], case[4])
    assert torch.equal(mirror[5], case[5])


@pytest.mark.parametrize(("dim", "part"), [(96, 72), (128, 32), (80, 2), (24, 18)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_of_each_head_is_turned(dim: int, part: int, dtype: torch.dtype) -> None:
    case = make_case(5, 6, 2, dim, dtype)
    case[1] = make_table(101, part)
    case[1] *= 1.25  # longrope and yarn scale it
    mirror, before = [t.clone() for t in case], case[0].clone()
    rope_kv_ref(*mirror, 6)
    with no_sync():
        rope_kv(*case, 6)
    for name, want, got in zip(
        ("qkv", "k"), (mirror[0], mirror[4]), (case[0], case[4]), strict=True
    ):
        assert_close(name, want, got)
    assert torch.equal(mirror[5], case[5])
    heads = slice(0, 8)
    unturned = [t.unflatten(1, (-1, dim))[:, heads, part:] for t in (before, case[0])]
    assert torch.equal(*unturned)
    assert torch.equal(case[4][case[3].long()], case[0].unflatten(1, (-1, dim))[:, 6:8])


@pytest.mark.parametrize(("kind", "group"), EIGHT_BITS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "q", "kv", "dim", "turned"),
    [(5, 9, 3, 64, 64), (3, 8, 2, 96, 96), (4, 6, 2, 128, 96), (7, 28, 4, 128, 128)],
)
def test_in_8_bits(
    tokens: int, q: int, kv: int, dim: int, turned: int, kind: torch.dtype, group: int | None
) -> None:
    case = make_case(tokens, q, kv, dim, torch.float16)
    case[1] = make_table(101, turned)
    for i in (4, 5):
        case[i] = torch.full(case[i].shape, 3, dtype=torch.uint8, device=DEVICE).view(kind)
    shape = (len(case[4]), kv, 2, dim // group if group else 1)
    scales = torch.full(shape, 7.0, dtype=torch.bfloat16, device=DEVICE)
    mirror, mirrored = [t.clone() for t in case], scales.clone()
    rope_kv_ref(*mirror, q, mirrored)
    with no_sync():
        rope_kv(*case, q, scales)
    assert_close("qkv", mirror[0], case[0])
    for part in (0, 1):
        # the kernel's K may differ in its last bit, and with it one of 8 bits
        want, got = (
            dequantize_ref(x, s[:, :, part], torch.float32)
            for x, s in ((mirror[4 + part], mirrored), (case[4 + part], scales))
        )
        most = want.abs().amax(-1, keepdim=True)
        step = most / 127 if kind == torch.int8 else want.abs() / 8 + most / 448 / 2**9
        off = (got - want).abs() / (1.02 * step)
        assert float(off.max()) <= 1
        assert float(off.mean()) <= 0.02
    torch.testing.assert_close(scales, mirrored, rtol=2**-7, atol=0)


def test_only_the_named_slots_change() -> None:
    case = make_case(5, 4, 2, 64, torch.float32)
    before = [case[4].clone(), case[5].clone()]
    rope_kv(*case, 4)
    others = torch.ones(len(before[0]), dtype=torch.bool, device=DEVICE)
    others[case[3].long()] = False
    for old, new in zip(before, case[4:], strict=True):
        assert torch.equal(old[others], new[others])
        assert not torch.equal(old[~others], new[~others])


def test_position_zero_leaves_everything_as_it_was() -> None:
    case = make_case(3, 4, 2, 64, torch.float16)
    case[2].zero_()
    before = case[0].clone()
    rope_kv(*case, 4)
    assert torch.equal(before, case[0])
    assert torch.equal(case[4][case[3].long()], before.unflatten(1, (8, 64))[:, 4:6])


def test_refuses_what_does_not_fit() -> None:
    case = make_case(3, 4, 2, 64, torch.float32)
    with pytest.raises(ValueError, match="qkv"):
        rope_kv(*case, 5)
    with pytest.raises(ValueError, match="dtypes"):
        rope_kv(case[0].half(), *case[1:], 4)
    with pytest.raises(ValueError, match="without scales"):
        rope_kv(*case[:4], case[4].to(torch.int8), case[5].to(torch.int8), 4)
    with pytest.raises(ValueError, match="positions"):
        rope_kv(*case[:2], case[2][:2], *case[3:], 4)
    with pytest.raises(ValueError, match=r"cos_sin .* does not fit head_dim 64"):
        rope_kv(case[0], make_table(101, 66), *case[2:], 4)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    case = make_case(16, 32, 8, 128, torch.bfloat16)
    fresh = randn(*case[0].shape, dtype=torch.bfloat16, seed=9)
    mirror = [fresh.clone(), *(t.clone() for t in case[1:])]
    rope_kv_ref(*mirror, 32)
    replayed(lambda: rope_kv(*case, 32), before=lambda: case[0].copy_(fresh))
    for name, want, got in zip(
        ("qkv", "k", "v"), (mirror[0], *mirror[4:]), (case[0], *case[4:]), strict=True
    ):
        assert_close(name, want, got)
