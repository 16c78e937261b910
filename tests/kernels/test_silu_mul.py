"""Gated activation against its reference."""

import pytest
import torch

from asyncllm.kernels.silu_mul import silu_mul, silu_mul_ref
from tests.kernels.harness import DTYPES, assert_close, no_sync, randn, replayed


@pytest.mark.parametrize("shape", [(1, 64), (3, 1536), (17, 127), (5, 1025), (2, 14336)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = randn(shape[0], 2 * shape[1], dtype=dtype) * 4
    with no_sync():
        got = silu_mul(x)
    assert_close("product", silu_mul_ref(x), got)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, interpreting
def test_large_gates_neither_overflow_nor_turn_into_nan() -> None:
    x = torch.tensor([[-3e4, -200.0, 0.0, 200.0, 3e4, 1, 2, 3, 4, 0.5]], dtype=torch.float16)
    x = x.to(randn(1, dtype=torch.float32).device)
    assert torch.equal(silu_mul(x), silu_mul_ref(x))


def test_strided_rows_into_a_given_output() -> None:
    wide = randn(5, 300, dtype=torch.float32)
    out = torch.full((5, 60), 7.0, device=wide.device)
    assert_close("product", silu_mul_ref(wide[:, 40:120]), silu_mul(wide[:, 40:120], out[:, :40]))
    assert bool((out[:, 40:] == 7.0).all())


def test_refuses_what_does_not_fit() -> None:
    x = randn(2, 64, dtype=torch.float32)
    with pytest.raises(ValueError, match="2 \\* width"):
        silu_mul(x[:, :63])
    with pytest.raises(ValueError, match="out"):
        silu_mul(x, out=x)


def test_no_tokens() -> None:
    assert silu_mul(randn(0, 64, dtype=torch.float32)).shape == (0, 32)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    x, fresh = (randn(16, 28672, dtype=torch.bfloat16, seed=i) for i in range(2))
    out = torch.empty((16, 14336), dtype=x.dtype, device=x.device)
    replayed(lambda: silu_mul(x, out), before=lambda: x.copy_(fresh))
    assert_close("product", silu_mul_ref(fresh), out)
