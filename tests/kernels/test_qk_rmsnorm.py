"""RMS norm of heads against its reference."""

import pytest
import torch

from asyncllm.kernels.qk_rmsnorm import qk_rmsnorm, qk_rmsnorm_ref
from tests.kernels.harness import DTYPES, assert_close, no_sync, randn, replayed

EPS = 1e-5


@pytest.mark.parametrize(
    ("tokens", "num_q", "num_k", "dim"),
    [(1, 16, 8, 128), (5, 4, 1, 256), (3, 6, 2, 80), (2, 1, 1, 16)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["same", "float32"])
def test_qk_rmsnorm(
    tokens: int, num_q: int, num_k: int, dim: int, dtype: torch.dtype, wide: bool
) -> None:
    qkv = randn(tokens, (num_q + 2 * num_k) * dim, dtype=dtype)
    want, before = qkv.clone(), qkv.clone()
    q, k = (randn(dim, dtype=torch.float32 if wide else dtype, seed=i) for i in (1, 2))
    qk_rmsnorm_ref(want, q, k, num_q, num_k, EPS)
    with no_sync():
        qk_rmsnorm(qkv, q, k, num_q, num_k, EPS)
    assert_close("normed", want, qkv)
    values = slice((num_q + num_k) * dim, None)
    assert torch.equal(qkv[:, values], before[:, values])
    assert not torch.equal(qkv[:, :dim], before[:, :dim])


def test_rows_may_be_strided() -> None:
    wide = randn(4, 200, dtype=torch.float32)
    before, q, k = wide.clone(), *(randn(16, dtype=torch.float32, seed=i) for i in (1, 2))
    want = before[:, 20:100].clone()
    qk_rmsnorm_ref(want, q, k, 2, 1, EPS)
    qk_rmsnorm(wide[:, 20:100], q, k, 2, 1, EPS)
    assert_close("normed", want, wide[:, 20:100].contiguous())
    assert torch.equal(wide[:, :20], before[:, :20])
    assert torch.equal(wide[:, 68:], before[:, 68:])


def test_refuses_what_does_not_fit() -> None:
    qkv, q = randn(2, 64, dtype=torch.float32), randn(16, dtype=torch.float32)
    with pytest.raises(ValueError, match="weight"):
        qk_rmsnorm(qkv, q, q[:8], 2, 1, EPS)
    with pytest.raises(ValueError, match="weight"):
        qk_rmsnorm(qkv, q, q.half(), 2, 1, EPS)
    with pytest.raises(ValueError, match="5 heads of 16"):
        qk_rmsnorm(qkv, q, q, 4, 1, EPS)
    qk_rmsnorm(qkv[:0], q, q, 2, 1, EPS)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    qkv, fresh = (randn(16, 48 * 128, dtype=torch.bfloat16, seed=i) for i in range(2))
    q, k = (randn(128, dtype=torch.bfloat16, seed=i) for i in (2, 3))
    want = fresh.clone()
    qk_rmsnorm_ref(want, q, k, 32, 8, EPS)
    replayed(lambda: qk_rmsnorm(qkv, q, k, 32, 8, EPS), before=lambda: qkv.copy_(fresh))
    assert_close("normed", want, qkv)
