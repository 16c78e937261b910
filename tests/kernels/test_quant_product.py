"""Products of 8-bit rows with 8-bit weights against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.quant.product import (
    ProductConfig,
    product,
    product_config,
    product_ref,
    row_class,
)
from asyncllm.kernels.quant.rows import quantize_rows_ref
from tests.kernels.harness import DEVICE, assert_close, no_sync, randn, replayed

KINDS = [(torch.float8_e4m3fn, False), (torch.int8, False), (torch.float8_e4m3fn, True)]
# rows, outputs, inputs
SHAPES = [(1, 96, 256), (3, 64, 80), (9, 200, 528), (40, 130, 128), (140, 72, 144)]


def make_case(
    num_rows: int, n: int, k: int, kind: torch.dtype, blocked: bool, seed: int = 0
) -> dict[str, Any]:
    x, x_scales = quantize_rows_ref(
        randn(num_rows, k, dtype=torch.float32, seed=seed), kind, blocked=blocked
    )
    weight, scales = quantize_rows_ref(randn(n, k, dtype=torch.float32, seed=seed + 1), kind)
    if blocked:
        shape = (-(-n // 128), -(-k // 128))
        scales = randn(*shape, dtype=torch.float32, seed=seed + 2).abs() / 100
    return {"x": x, "x_scales": x_scales.contiguous(), "weight": weight, "scales": scales}


def empty_out(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (len(case["x"]), len(case["weight"]))
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_product(shape: tuple[int, int, int], kind: torch.dtype, blocked: bool) -> None:
    case = make_case(*shape, kind, blocked)
    out = empty_out(case)
    with no_sync():
        assert product(**case, out=out) is out
    assert_close("out", product_ref(**case), out, 3e-4 if DEVICE == "cuda" else 2e-5)


@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
@pytest.mark.parametrize("per_sm", [0, 1, 5, 50])
@pytest.mark.usefixtures("poisoned_empty")
def test_inputs_divided_among_programs(kind: torch.dtype, blocked: bool, per_sm: int) -> None:
    """Twice, since counters must be as before; with a bias, which is added once."""
    case = make_case(5, 70, 5 * 128, kind, blocked)
    bias = randn(70, dtype=torch.float16, seed=7)
    config = ProductConfig(8, 32, 128, 4, 2, per_sm)
    made = [product(**case, bias=bias, out=empty_out(case), config=config) for _ in range(2)]
    want = product_ref(**case, bias=bias)
    assert_close("out", want, made[0], 3e-4 if DEVICE == "cuda" else 2e-5)
    assert torch.equal(*made)


@pytest.mark.parametrize("copy", [False, True])
def test_other_configurations_give_the_same(copy: bool) -> None:
    case = make_case(70, 200, 272, torch.float8_e4m3fn, False)
    want = product_ref(**case).half()
    for config in (
        ProductConfig(16, 64, 64, 4, 3, 0, copy),
        ProductConfig(64, 128, 256, 4, 2, 8, copy),
    ):
        wide = torch.full((70, 240), 7.0, dtype=torch.float16, device=DEVICE)
        product(**case, out=wide[:, 20:220], config=config)
        assert_close("out", want, wide[:, 20:220].contiguous())
        assert (wide[:, :20] == 7).all()
        assert (wide[:, 220:] == 7).all()


def test_rows_come_out_the_same_beside_others() -> None:
    case = make_case(8, 64, 512, torch.float8_e4m3fn, False)
    whole = product(**case, out=empty_out(case))
    for row in (0, 5):
        one = case | {name: case[name][row : row + 1] for name in ("x", "x_scales")}
        assert torch.equal(product(**one, out=empty_out(one))[0], whole[row])


def test_classes_of_rows() -> None:
    assert [row_class(n) for n in (1, 8, 9, 128, 129, 257)] == [
        *["8", "8", "16", "128", "256", "many"]
    ]
    cpu = torch.device("cpu")
    assert product_config(8, torch.int8, False, cpu).rows == 8


def test_no_rows() -> None:
    case = make_case(0, 8, 128, torch.int8, False)
    assert product(**case, out=empty_out(case)).shape == (0, 8)


def test_refuses_what_does_not_fit() -> None:
    case = make_case(3, 8, 144, torch.int8, False)
    block = make_case(3, 8, 144, torch.float8_e4m3fn, True)
    for message, wrong in {
        "rows in 8 bits": {**case, "x": case["x"].float()},
        "weight": {**case, "weight": case["weight"][:, :100]},
        "torch.float8": {**case, "weight": block["weight"]},
        "scales ": {**case, "scales": case["scales"][:5]},
        "x_scales": {**case, "x_scales": case["x_scales"].half()},
        "x_scales ": {**block, "x_scales": block["x_scales"].t()},
        "blocks": {**case, "x_scales": block["x_scales"], "scales": block["scales"]},
        "bias": {**case, "bias": case["scales"][:3]},
        "out": {**case, "out": torch.empty(3, 9, device=DEVICE)},
    }.items():
        with pytest.raises(ValueError, match=message):
            product(**{"out": empty_out(case), **wrong})


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 16, 48, 100, 200, 600])
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
def test_model_shapes_in_a_cuda_graph(num_rows: int, kind: torch.dtype, blocked: bool) -> None:
    for n, k in ((6144, 4096), (4096, 14336), (1536, 1424)):
        case = make_case(num_rows, n, k, kind, blocked)
        fresh = make_case(num_rows, n, k, kind, blocked, seed=5)
        out = empty_out(case, torch.bfloat16)

        def renew() -> None:
            for name in ("x", "x_scales"):
                case[name].copy_(fresh[name])  # noqa: B023

        replayed(lambda: product(**case, out=out), before=renew)  # noqa: B023
        want = product_ref(**case).bfloat16()
        assert_close("out", want, out)
        first = out.clone()
        assert torch.equal(product(**case, out=out), first)
