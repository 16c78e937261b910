"""Gated activation against its reference."""

import pytest
import torch

from asyncllm.kernels.gated import gated, gated_ref
from tests.kernels.harness import DTYPES, assert_close, no_sync, randn, replayed


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, interpreting
@pytest.mark.parametrize("shape", [(1, 64), (3, 1536), (17, 127), (5, 1025), (2, 14336)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.usefixtures("poisoned_empty")
def test_gated(shape: tuple[int, int], dtype: torch.dtype, activation: str) -> None:
    x = randn(shape[0], 2 * shape[1], dtype=dtype) * 4
    with no_sync():
        got = gated(x, activation)
    assert_close("product", gated_ref(x, activation), got)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, interpreting
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_large_gates_neither_overflow_nor_turn_into_nan(activation: str) -> None:
    x = torch.tensor([[-3e4, -200.0, 0.0, 200.0, 3e4, 1, 2, 3, 4, 0.5]], dtype=torch.float16)
    x = x.to(randn(1, dtype=torch.float32).device)
    assert_close("product", gated_ref(x, activation), gated(x, activation))


def test_strided_rows_into_a_given_output() -> None:
    wide = randn(5, 300, dtype=torch.float32)
    out = torch.full((5, 60), 7.0, device=wide.device)
    assert_close("product", gated_ref(wide[:, 40:120]), gated(wide[:, 40:120], out=out[:, :40]))
    assert bool((out[:, 40:] == 7.0).all())


def test_refuses_what_does_not_fit() -> None:
    x = randn(2, 64, dtype=torch.float32)
    with pytest.raises(ValueError, match="2 \\* width"):
        gated(x[:, :63])
    with pytest.raises(ValueError, match="out"):
        gated(x, out=x)
    with pytest.raises(ValueError, match="'relu': one of silu, gelu_tanh"):
        gated(x, "relu")


def test_no_tokens() -> None:
    assert gated(randn(0, 64, dtype=torch.float32)).shape == (0, 32)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    x, fresh = (randn(16, 28672, dtype=torch.bfloat16, seed=i) for i in range(2))
    out = torch.empty((16, 14336), dtype=x.dtype, device=x.device)
    replayed(lambda: gated(x, out=out), before=lambda: x.copy_(fresh))
    assert_close("product", gated_ref(fresh), out)
