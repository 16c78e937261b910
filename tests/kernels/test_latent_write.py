"""Latents to their slots, and the rotation, against their reference."""

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.latent.write import read_ref, turn_ref, write, write_ref
from tests.kernels.harness import DEVICE, DTYPES, assert_close, ints, no_sync, randn, replayed
from tests.kernels.latents import make_queries


def make_case(heads: int, rank: int, rope: int, dtype: torch.dtype) -> dict[str, Tensor]:
    tokens, (_, turned) = 5, make_queries(5, heads, 3, rope, dtype)
    angles = randn(40, rope // 2, dtype=torch.float32, seed=5)
    return {
        "raw": randn(tokens, 7 + rank + rope, dtype=dtype, seed=1)[:, 7:],
        "turned": turned,
        "weight": randn(rank, dtype=dtype, seed=2),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
        "positions": ints([3, 39, 0, 7, 7]),
        "slots": ints([2, 0, 8, 5, 9]),
        "cache": torch.full((10, rank + rope), float("nan"), dtype=dtype, device=DEVICE),
    }


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("heads", "rank", "rope"), [(1, 16, 8), (5, 40, 24), (16, 512, 64), (130, 64, 32)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write(heads: int, rank: int, rope: int, dtype: torch.dtype, interleaved: bool) -> None:
    case, want = (make_case(heads, rank, rope, dtype) for _ in range(2))
    raw = case["raw"].clone()
    with no_sync():
        write(**case, eps=1e-6, interleaved=interleaved)
    write_ref(**want, eps=1e-6, interleaved=interleaved)
    there = want["slots"].long()
    assert_close("cache", want["cache"][there], case["cache"][there])
    assert_close("turned", want["turned"], case["turned"])
    assert torch.equal(case["raw"], raw)
    others = torch.ones(10, dtype=torch.bool).index_fill_(0, there.cpu(), False)
    assert bool(case["cache"][others.to(DEVICE)].isnan().all())


@pytest.mark.parametrize(("rank", "rope"), [(40, 24), (512, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eight_bits(rank: int, rope: int, dtype: torch.dtype) -> None:
    case, want = (make_case(5, rank, rope, dtype) for _ in range(2))
    case["raw"][0], want["raw"][0] = 0.0, 0.0  # a scale is never 0
    case["raw"][1, -1], want["raw"][1, -1] = 60000.0, 60000.0
    for some in (case, want):
        some["cache"] = torch.zeros(10, rank + rope, device=DEVICE).to(torch.float8_e4m3fn)
        some["scales"] = torch.zeros(10, device=DEVICE)
    with no_sync():
        write(**case, eps=1e-6, interleaved=True)
    write_ref(**want, eps=1e-6, interleaved=True)
    assert_close("scales", want["scales"], case["scales"], ratio=1e-2)
    slots = torch.arange(10, device=DEVICE)
    rows = read_ref(want["cache"], want["scales"], slots)
    # what lies between two 8-bit numbers may be rounded to either by a norm in another order
    assert_close("rows", rows, read_ref(case["cache"], case["scales"], slots), ratio=1e-2)
    assert bool((case["scales"][case["slots"].long()] > 0).all())


def test_the_two_orders_of_pairs_are_rotations_of_the_same() -> None:
    x, angle = randn(3, 2, 8, dtype=torch.float32), randn(3, 4, dtype=torch.float32, seed=1)
    angles = torch.cat([angle.cos(), angle.sin()], dim=1)
    near = turn_ref(x, angles, interleaved=True)
    far = turn_ref(torch.cat([x[..., ::2], x[..., 1::2]], dim=-1), angles, interleaved=False)
    assert_close("turned", torch.cat([near[..., ::2], near[..., 1::2]], dim=-1), far)
    as_complex = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = as_complex * torch.polar(torch.ones_like(angle), angle)[:, None]
    assert_close("complex", torch.view_as_real(turned).flatten(-2), near)


def test_refuses_what_does_not_fit() -> None:
    case = make_case(2, 16, 8, torch.float32)
    with pytest.raises(ValueError, match="rows of 24"):
        write(**{**case, "raw": case["raw"][:, 1:]}, eps=1e-6, interleaved=True)
    with pytest.raises(ValueError, match="dtypes"):
        write(**{**case, "weight": case["weight"].half()}, eps=1e-6, interleaved=True)
    cut = case["cos_sin"][:, :6].contiguous()
    with pytest.raises(ValueError, match="cos_sin"):
        write(**{**case, "cos_sin": cut}, eps=1e-6, interleaved=True)
    with pytest.raises(ValueError, match="entries"):
        write(**{**case, "slots": case["slots"][:1]}, eps=1e-6, interleaved=True)


@pytest.mark.gpu
def test_in_a_graph() -> None:
    case = make_case(16, 512, 64, torch.bfloat16)
    want = {name: tensor.clone() for name, tensor in case.items()}
    first = case["turned"].clone()
    replayed(
        lambda: write(**case, eps=1e-6, interleaved=True),
        before=lambda: (case["turned"].copy_(first), case["cache"].fill_(0)),
    )
    write_ref(**want, eps=1e-6, interleaved=True)
    there = want["slots"].long()
    assert_close("cache", want["cache"][there], case["cache"][there])
    assert_close("turned", want["turned"], case["turned"])
