"""Products with 4-bit weights against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.quant.four_bits import (
    FourBitsConfig,
    best_span,
    four_bits,
    four_bits_ref,
    pack,
    pack_scales,
    row_class,
    widen,
    widen_ref,
)
from tests.kernels.harness import DEVICE, HALVES, assert_close, no_sync, randn, replayed

# rows, outputs, inputs, columns of a group
SHAPES = [
    (1, 96, 512, 128),
    (3, 33, 288, 32),
    (9, 64, 320, 64),
    (70, 40, 192, 192),
    (2, 40, 768, 256),
]


def make_case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, zeros: bool, seed: int = 0
) -> dict[str, Any]:
    num_rows, n, k, group = shape
    generator = torch.Generator().manual_seed(seed)
    nibbles = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 17, (k // group, n), generator=generator).to(dtype).to(DEVICE)
    scales = (randn(k // group, n, dtype=torch.float32, seed=seed + 1) / 16).to(dtype)
    return {
        "x": randn(num_rows, k, dtype=dtype, seed=seed),
        "weight": pack(nibbles.to(DEVICE), group),
        "scales": pack_scales(scales, zero if zeros else None),
    }


def empty_out(case: dict[str, Any]) -> Tensor:
    shape = (len(case["x"]), len(case["weight"]))
    return torch.full(shape, float("nan"), dtype=case["x"].dtype, device=DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_four_bits(shape: tuple[int, int, int, int], zeros: bool, dtype: torch.dtype) -> None:
    case = make_case(shape, dtype, zeros)
    out = empty_out(case)
    with no_sync():
        assert four_bits(**case, out=out) is out
    assert_close("out", four_bits_ref(**case), out)


@pytest.mark.parametrize("per_sm", [0, 3, 50])
@pytest.mark.usefixtures("poisoned_empty")
def test_inputs_divided_among_programs(per_sm: int) -> None:
    """Twice, since counters must be as before; with a bias, which is added once."""
    case = make_case((5, 70, 1024, 128), torch.float16, True)
    bias = randn(70, dtype=torch.float16, seed=7)
    config = FourBitsConfig(16, 32, 4, 2, per_sm)
    made = [four_bits(**case, bias=bias, out=empty_out(case), config=config) for _ in range(2)]
    assert_close("out", four_bits_ref(**case, bias=bias), made[0])
    assert torch.equal(*made)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_widened_in_parts(shape: tuple[int, int, int, int], zeros: bool) -> None:
    case = make_case(shape, torch.float16, zeros)
    args = (case["weight"], case["scales"])
    want = widen_ref(*args, shape[2], torch.float16).half()
    made = torch.full((20, shape[2]), float("nan"), dtype=torch.float16, device=DEVICE)
    assert_close("first", want[:20], widen(*args, 0, made))
    rest = torch.full((shape[1] - 20, shape[2]), float("nan"), dtype=torch.float16, device=DEVICE)
    assert_close("rest", want[20:], widen(*args, 20, rest))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zeros", [False, True])
def test_packed_is_what_it_was(dtype: torch.dtype, zeros: bool) -> None:
    """Column by column, against the two columns of a byte."""
    nibbles = torch.arange(96, dtype=torch.uint8).view(2, 48) * 5
    scales = torch.tensor([[0.5, -3.0]]).to(dtype)
    zero = torch.tensor([[16.0, 3.0]]).to(dtype)
    columns = torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(1).float()
    want = (
        columns - (zero if zeros else torch.full_like(zero, 8)).t().float()
    ) * scales.t().float()
    packed = pack(nibbles, 96), pack_scales(scales, zero if zeros else None)
    assert torch.equal(widen_ref(*packed, 96, dtype), want)


def test_spans() -> None:
    assert best_span(4096, 128) == 64
    assert best_span(4096, 32) == 32
    assert best_span(288, 32) == 32
    assert best_span(11008, 128) == 64
    assert best_span(192, 64) == 32
    with pytest.raises(ValueError, match="groups of 24"):
        best_span(48, 24)


def test_classes_of_rows() -> None:
    assert [row_class(n) for n in (1, 8, 9, 64, 65)] == ["8", "8", "16", "64", "many"]


def test_no_rows() -> None:
    case = make_case((0, 8, 128, 32), torch.float16, False)
    assert four_bits(**case, out=empty_out(case)).shape == (0, 8)


def test_refuses_what_does_not_fit() -> None:
    case = make_case((3, 8, 256, 64), torch.float16, True)
    for message, wrong in {
        "rows": {"x": case["x"][0]},
        "packed": {"weight": case["weight"].int()},
        "words": {"weight": case["weight"][:, :32].contiguous()},
        "scales": {"scales": case["scales"][:3]},
        "not packed": {"scales": case["scales"].float()},
        "16 bits": {"x": case["x"].float()},
        "bias": {"bias": case["x"][0]},
        "out": {"out": case["x"]},
    }.items():
        with pytest.raises(ValueError, match=message):
            four_bits(**{**case, "out": empty_out(case), **wrong})


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 16, 48, 100, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_shapes_in_a_cuda_graph(num_rows: int, dtype: torch.dtype) -> None:
    for n, k, group in ((6144, 4096, 128), (4096, 14336, 128), (1536, 1440, 32)):
        case = make_case((num_rows, n, k, group), dtype, group == 128)
        fresh = randn(num_rows, k, dtype=dtype, seed=9)
        out = empty_out(case)
        replayed(
            lambda: four_bits(**case, out=out),  # noqa: B023
            before=lambda: case["x"].copy_(fresh),  # noqa: B023
        )
        assert_close("out", four_bits_ref(**case), out)
        first = out.clone()
        assert torch.equal(four_bits(**case, out=out), first)
