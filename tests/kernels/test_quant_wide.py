"""Products of 16-bit rows with 8-bit weights against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.quant.rows import quantize_rows_ref
from asyncllm.kernels.quant.wide import WideConfig, fits_wide, row_class, wide, wide_ref
from tests.kernels.harness import DEVICE, HALVES, assert_close, no_sync, randn, replayed

KINDS = [(torch.float8_e4m3fn, False), (torch.int8, False), (torch.float8_e4m3fn, True)]
SHAPES = [(1, 96, 256), (3, 70, 80), (9, 200, 528), (40, 130, 128)]  # rows, outputs, inputs


def make_case(
    num_rows: int, n: int, k: int, dtype: torch.dtype, kind: torch.dtype, blocked: bool
) -> dict[str, Any]:
    weight, scales = quantize_rows_ref(randn(n, k, dtype=torch.float32, seed=1), kind)
    if blocked:
        shape = (-(-n // 128), -(-k // 128))
        scales = randn(*shape, dtype=torch.float32, seed=2).abs() / 100
    wider = randn(num_rows, k + 6, dtype=dtype)
    return {"x": wider[:, 2 : k + 2], "weight": weight, "scales": scales}


def empty_out(case: dict[str, Any]) -> Tensor:
    shape = (len(case["x"]), len(case["weight"]))
    return torch.full(shape, float("nan"), dtype=case["x"].dtype, device=DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_wide(
    shape: tuple[int, int, int], kind: torch.dtype, blocked: bool, dtype: torch.dtype
) -> None:
    case = make_case(*shape, dtype, kind, blocked)
    out = empty_out(case)
    with no_sync():
        assert wide(**case, out=out) is out
    assert_close("out", wide_ref(**case), out)


@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
@pytest.mark.parametrize("per_sm", [0, 3, 50])
@pytest.mark.usefixtures("poisoned_empty")
def test_inputs_divided_among_programs(kind: torch.dtype, blocked: bool, per_sm: int) -> None:
    """Twice, since counters must be as before; with a bias, which is added once."""
    case = make_case(5, 70, 5 * 128, torch.float16, kind, blocked)
    bias = randn(70, dtype=torch.float16, seed=7)
    config = WideConfig(16, 32, 128, 4, 2, per_sm)
    made = [wide(**case, bias=bias, out=empty_out(case), config=config) for _ in range(2)]
    assert_close("out", wide_ref(**case, bias=bias), made[0])
    assert torch.equal(*made)


def test_rows_come_out_the_same_beside_others() -> None:
    case = make_case(8, 64, 512, torch.float16, torch.float8_e4m3fn, False)
    whole = wide(**case, out=empty_out(case))
    for row in (0, 5):
        one = {**case, "x": case["x"][row : row + 1]}
        assert torch.equal(wide(**one, out=empty_out(one))[0], whole[row])


def test_classes_of_rows() -> None:
    assert [row_class(n) for n in (1, 8, 9, 16, 17)] == ["8", "8", "16", "16", "many"]


def test_what_it_takes() -> None:
    x = randn(3, 64, dtype=torch.float16)
    assert fits_wide(x)
    assert not fits_wide(x.float())
    assert not fits_wide(x[:, :63])
    assert not fits_wide(x[:, 1:63])


def test_no_rows() -> None:
    case = make_case(0, 8, 128, torch.float16, torch.int8, False)
    assert wide(**case, out=empty_out(case)).shape == (0, 8)


def test_refuses_what_does_not_fit() -> None:
    case = make_case(3, 8, 144, torch.float16, torch.float8_e4m3fn, True)
    for message, wrong in {
        "even rows": {"x": case["x"].float()},
        "weight ": {"weight": case["weight"][:, :100]},
        "weight is": {"weight": case["weight"].float()},
        "scales": {"scales": case["scales"][:, :1]},
        "bias": {"bias": case["x"][0]},
        "out": {"out": case["x"]},
        "blocks": {"config": WideConfig(8, 64, 256, 4, 2)},
    }.items():
        with pytest.raises(ValueError, match=message):
            wide(**{**case, "out": empty_out(case), **wrong})


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 13, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
def test_model_shapes_in_a_cuda_graph(
    num_rows: int, dtype: torch.dtype, kind: torch.dtype, blocked: bool
) -> None:
    for n, k in ((6144, 4096), (4096, 14336), (1536, 1424)):
        case = make_case(num_rows, n, k, dtype, kind, blocked)
        fresh = randn(num_rows, k, dtype=dtype, seed=9)
        out = empty_out(case)
        replayed(
            lambda: wide(**case, out=out),  # noqa: B023
            before=lambda: case["x"].copy_(fresh),  # noqa: B023
        )
        assert_close("out", wide_ref(**case), out)
        first = out.clone()
        assert torch.equal(wide(**case, out=out), first)
