"""Log-probabilities of single tokens against log_softmax."""

import pytest
import torch

from asyncllm.kernels.log_probs import log_probs, log_probs_ref
from tests.kernels.harness import DEVICE, DTYPES, assert_close, no_sync, randn, replayed


@pytest.mark.parametrize("shape", [(1, 33), (3, 4097), (2, 9001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_log_probs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = randn(*shape, dtype=dtype) * 4
    logits[0, 7] = float("-inf")
    tokens = torch.arange(shape[0], device=DEVICE) * 11 + 5
    with no_sync():
        got = log_probs(logits, tokens)
    assert_close("log_probs", log_probs_ref(logits, tokens), got, 1e-5)


def test_no_rows_and_refusals() -> None:
    logits = randn(2, 100, dtype=torch.float32)
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert log_probs(logits[:0], none).shape == (0,)
    with pytest.raises(ValueError, match="tokens"):
        log_probs(logits, none)
    with pytest.raises(ValueError, match="tokens"):
        log_probs(logits, logits[:, 0])
    with pytest.raises(ValueError, match="logits"):
        log_probs(logits.T, none)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    logits, fresh = (randn(9, 128256, dtype=torch.bfloat16, seed=i) for i in range(2))
    tokens = torch.arange(9, device=DEVICE) * 14000
    out = torch.empty(9, dtype=torch.float32, device=DEVICE)
    replayed(lambda: log_probs(logits, tokens, out=out), before=lambda: logits.copy_(fresh))
    assert_close("log_probs", log_probs_ref(fresh, tokens), out, 1e-5)
