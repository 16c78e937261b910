"""The linear layer for one row against its reference."""

import pytest
import torch

from asyncllm.kernels.linear import LinearConfig, linear, linear_ref
from tests.kernels.harness import DTYPES, assert_close, no_sync, randn, replayed

SHAPES = [(96, 64), (33, 1000), (127, 2048), (64, 4500)]  # out, in


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_linear(shape: tuple[int, int], biased: bool, dtype: torch.dtype) -> None:
    x, weight = randn(1, shape[1], dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    bias = randn(shape[0], dtype=dtype, seed=2) if biased else None
    with no_sync():
        got = linear(x, weight, bias)
    assert_close("out", linear_ref(x, weight, bias), got)


def test_weights_may_be_strided() -> None:
    x, weight = randn(1, 300, dtype=torch.float16), randn(50, 400, dtype=torch.float16, seed=1)
    wide = torch.full((1, 90), 7.0, dtype=torch.float16, device=x.device)
    out = wide[:, 20:70]
    assert linear(x[:, :200], weight[:, 100:300], out=out) is out
    assert_close("out", linear_ref(x[:, :200], weight[:, 100:300]), out.contiguous())
    assert (wide[:, :20] == 7).all()
    assert (wide[:, 70:] == 7).all()


def test_sums_may_stay_float32() -> None:
    x, weight = randn(1, 300, dtype=torch.float16), randn(50, 300, dtype=torch.float16, seed=1)
    out = torch.empty(1, 50, dtype=torch.float32, device=x.device)
    linear(x, weight, out=out)
    assert_close("out", linear_ref(x.float(), weight.float()), out)


def test_other_configurations_give_the_same() -> None:
    x, weight = randn(1, 1024, dtype=torch.float16), randn(80, 1024, dtype=torch.float16, seed=1)
    want = linear_ref(x, weight)
    for config in (LinearConfig(16, 128, 4, 2), LinearConfig(32, 256, 2, 4)):
        assert_close("out", want, linear(x, weight, config=config))


def test_refuses_what_does_not_fit() -> None:
    x, weight = randn(1, 64, dtype=torch.float32), randn(8, 64, dtype=torch.float32)
    with pytest.raises(ValueError, match="one contiguous row"):
        linear(randn(2, 64, dtype=torch.float32), weight)
    with pytest.raises(ValueError, match="weight"):
        linear(x, weight[:, :32])
    with pytest.raises(ValueError, match="weight"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match="bias"):
        linear(x, weight, weight[0])
    with pytest.raises(ValueError, match="out"):
        linear(x, weight, out=x)


@pytest.mark.gpu
def test_model_shapes_in_a_cuda_graph() -> None:
    for n, k in ((6144, 4096), (4096, 14336), (1531, 4099)):
        x, fresh = (randn(1, k, dtype=torch.bfloat16, seed=i) for i in range(2))
        weight = randn(n, k, dtype=torch.bfloat16, seed=2)
        out = torch.empty(1, n, dtype=torch.bfloat16, device=x.device)
        replayed(lambda: linear(x, weight, out=out), before=lambda: x.copy_(fresh))  # noqa: B023
        assert_close("out", linear_ref(fresh, weight), out)
        first = out.clone()
        assert torch.equal(linear(x, weight), first)
