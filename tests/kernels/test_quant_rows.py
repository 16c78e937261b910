"""Rows in 8 bits against the reference, alone and behind a norm or an activation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.gated import gated
from asyncllm.kernels.quant import rows
from asyncllm.kernels.quant.rows import (
    gated_rows,
    gated_rows_ref,
    quantize_rows,
    quantize_rows_ref,
    rmsnorm_rows,
    rmsnorm_rows_ref,
)
from asyncllm.kernels.rmsnorm import add_rmsnorm, rmsnorm
from tests.kernels.harness import DEVICE, DTYPES, assert_close, no_sync, randn, replayed

KINDS = [(torch.float8_e4m3fn, False), (torch.int8, False), (torch.float8_e4m3fn, True)]


def assert_same(want: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor], most: int = 0) -> None:
    """Scales up to rounding, values but for ``most`` in a thousand that round to a neighbour."""
    assert_close("scales", want[1].contiguous(), got[1].contiguous(), 1e-6)
    values = [x[0].float() for x in (want, got)]
    assert values[0].shape == values[1].shape
    assert want[0].dtype == got[0].dtype
    away = values[0] != values[1]
    assert int(away.sum()) * 1000 <= most * away.numel()
    assert_close("values", *values, 1e-2 if most else 0.0)  # a neighbour in e4m3 is 6 to 12 % away


@pytest.mark.parametrize("shape", [(1, 64), (3, 1536), (5, 200)], ids=str)
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_rows(shape: tuple[int, int], kind: torch.dtype, blocked: bool, dtype: torch.dtype) -> None:
    x = randn(shape[0], shape[1] + 5, dtype=dtype)[:, : shape[1]]
    x[-1] = 0
    x[0, 0] = 3000  # whoever shares its scale suffers, nobody else
    with no_sync():
        got = quantize_rows(x, kind, blocked=blocked)
    assert_same(quantize_rows_ref(x, kind, blocked=blocked), got)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_behind_a_norm(kind: torch.dtype, blocked: bool, added: bool) -> None:
    x, weight = randn(4, 328, dtype=torch.float16), randn(328, dtype=torch.float16, seed=1)
    residual = randn(4, 328, dtype=torch.float16, seed=2) if added else None
    options: dict[str, Any] = {"residual": residual, "blocked": blocked}
    want = rmsnorm_rows_ref(x, weight, 1e-5, kind, **options)
    total = None if residual is None else residual + x
    assert_same(want, rmsnorm_rows(x, weight, 1e-5, kind, **options), 3)
    if residual is not None:
        assert torch.equal(residual, total)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_behind_an_activation(kind: torch.dtype, blocked: bool, activation: str) -> None:
    x = randn(3, 2 * 200, dtype=torch.float16)
    want = gated_rows_ref(x, activation, kind, blocked=blocked)
    assert_same(want, gated_rows(x, activation, kind, blocked=blocked), 5)


@pytest.mark.parametrize("piece", [128, 2048])
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_in_one_pass_as_in_two(
    kind: torch.dtype, blocked: bool, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where sums have one order; a row of activations by one program or by several."""
    monkeypatch.setattr(rows, "_PIECE", piece)
    x, weight = randn(1, 2 * 200, dtype=torch.float16), randn(400, dtype=torch.float16, seed=1)
    residual = randn(1, 400, dtype=torch.float16, seed=2)
    normed, _ = add_rmsnorm(x, residual.clone(), weight, 1e-5)
    pairs = [
        (gated(x), gated_rows(x, "silu", kind, blocked=blocked)),
        (rmsnorm(x, weight, 1e-5), rmsnorm_rows(x, weight, 1e-5, kind, blocked=blocked)),
        (normed, rmsnorm_rows(x, weight, 1e-5, kind, residual=residual, blocked=blocked)),
    ]
    for plain, (values, scales) in pairs:
        want = quantize_rows(plain, kind, blocked=blocked)
        if DEVICE == "cpu":
            assert torch.equal(scales, want[1])
            assert torch.equal(values.view(torch.uint8), want[0].view(torch.uint8))
        else:
            assert_same(want, (values, scales), 5)


def test_halves_go_to_even_and_large_numbers_fit() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [6e4, -6e4, 1.0, 0.0]], dtype=torch.float16)
    values, scales = quantize_rows(x.to(randn(1, dtype=torch.float32).device), torch.int8)
    assert values.tolist() == [[127, 0, 2, -2], [127, -127, 0, 0]]
    assert scales[0].item() == 1


def test_no_rows() -> None:
    values, scales = quantize_rows(randn(0, 300, dtype=torch.float16), torch.int8)
    assert values.shape == (0, 300)
    assert scales.shape == (0,)


def test_refuses_what_does_not_fit() -> None:
    x = randn(2, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="rows"):
        quantize_rows(x[0], torch.int8)
    with pytest.raises(ValueError, match="uint8"):
        quantize_rows(x, torch.uint8)
    with pytest.raises(ValueError, match="weight"):
        rmsnorm_rows(x, x[0, :3], 1e-5, torch.int8)
    with pytest.raises(ValueError, match="residual"):
        rmsnorm_rows(x, x[0], 1e-5, torch.int8, residual=x.float())
    with pytest.raises(ValueError, match="relu"):
        gated_rows(x, "relu", torch.int8)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
def test_model_shapes_in_a_cuda_graph(kind: torch.dtype, blocked: bool) -> None:
    for num_rows, width in ((1, 4096), (130, 14336)):
        x, fresh = (randn(num_rows, 2 * width, dtype=torch.bfloat16, seed=i) for i in range(2))
        made: list[tuple[Tensor, Tensor]] = []

        def call() -> None:
            made[:] = [  # noqa: B023
                quantize_rows(x[:, :width], kind, blocked=blocked),  # noqa: B023
                gated_rows(x, "silu", kind, blocked=blocked),  # noqa: B023
            ]

        replayed(call, before=lambda: x.copy_(fresh))  # noqa: B023
        assert_same(quantize_rows_ref(fresh[:, :width], kind, blocked=blocked), made[0])
        # where a row's largest is another number in bf16, all of the row may be
        assert_same(gated_rows_ref(fresh, "silu", kind, blocked=blocked), made[1], 20)
