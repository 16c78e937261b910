"""RMS norm against its reference."""

import pytest
import torch

from asyncllm.kernels.rmsnorm import add_rmsnorm, add_rmsnorm_ref, rmsnorm, rmsnorm_ref
from tests.kernels.harness import DTYPES, assert_close, no_sync, randn, replayed

SHAPES = [(1, 64), (3, 576), (17, 127), (2, 4096), (5, 5120)]
EPS = 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_rmsnorm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype, seed=1)
    with no_sync():
        got = rmsnorm(x, weight, EPS)
    assert_close("normed", rmsnorm_ref(x, weight, EPS), got)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_add_rmsnorm_updates_the_residual_in_place(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    weight = randn(shape[1], dtype=dtype, seed=2)
    want, total = add_rmsnorm_ref(x, residual, weight, EPS)
    with no_sync():
        got, same = add_rmsnorm(x, residual, weight, EPS)
    assert same is residual
    assert torch.equal(total, residual)
    assert_close("normed", want, got)


def test_rows_may_be_strided_and_the_output_may_be_the_input() -> None:
    wide, weight = randn(7, 300, dtype=torch.float32), randn(100, dtype=torch.float32, seed=1)
    x, rest = wide[:, 100:200], wide.clone()
    want = rmsnorm_ref(x, weight, EPS)
    assert rmsnorm(x, weight, EPS, out=x) is x
    assert_close("normed", want, x.contiguous())
    assert torch.equal(wide[:, :100], rest[:, :100])
    assert torch.equal(wide[:, 200:], rest[:, 200:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_weights_are_applied_before_rounding(dtype: torch.dtype) -> None:
    x, residual = (randn(5, 576, dtype=dtype, seed=i) for i in range(2))
    weight = randn(576, dtype=torch.float32, seed=2) * 1e-3 + 1
    want, _ = add_rmsnorm_ref(x, residual, weight, EPS)
    got, _ = add_rmsnorm(x, residual, weight, EPS)
    assert_close("normed", want, got, ratio=1e-6 if dtype == torch.float32 else 2e-4)


def test_no_tokens() -> None:
    x, weight = randn(0, 64, dtype=torch.float32), randn(64, dtype=torch.float32)
    assert rmsnorm(x, weight, EPS).shape == (0, 64)


def test_refuses_what_does_not_fit() -> None:
    x, weight = randn(2, 64, dtype=torch.float32), randn(64, dtype=torch.float32)
    with pytest.raises(ValueError, match="weight"):
        rmsnorm(x, weight[:32], EPS)
    with pytest.raises(ValueError, match="contiguous"):
        rmsnorm(x.T, weight[:2], EPS)
    with pytest.raises(ValueError, match="residual"):
        add_rmsnorm(x, x.half(), weight, EPS)
    with pytest.raises(ValueError, match="out"):
        rmsnorm(x, weight, EPS, out=x.half())


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    x, residual = (randn(16, 4096, dtype=torch.bfloat16, seed=i) for i in range(2))
    weight, out = randn(4096, dtype=torch.bfloat16, seed=2), torch.empty_like(x)
    fresh = randn(16, 4096, dtype=torch.bfloat16, seed=3)
    want, _ = add_rmsnorm_ref(x, fresh, weight, EPS)

    def call() -> None:
        add_rmsnorm(x, residual, weight, EPS, out=out)

    replayed(call, before=lambda: residual.copy_(fresh))
    assert_close("normed", want, out)
