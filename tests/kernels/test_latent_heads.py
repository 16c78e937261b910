"""Products by head against their reference."""

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.latent.heads import heads, heads_ref
from tests.kernels.harness import DEVICE, DTYPES, assert_close, ints, no_sync, randn


def run(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel's result and the reference's, over sevens."""
    shape = (*x.shape[:2], weight.shape[2])
    got, want = (torch.full(shape, 7.0, dtype=x.dtype, device=DEVICE) for _ in range(2))
    with no_sync():
        heads(x, weight, state, got)
    return got, heads_ref(x, weight, state, want)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "k", "n"),
    [(1, 2, 16, 40), (17, 3, 24, 32), (70, 1, 130, 8), (5, 2, 128, 512)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads(num_tokens: int, num_heads: int, k: int, n: int, dtype: torch.dtype) -> None:
    x = randn(num_tokens, num_heads, k + 3, dtype=dtype)[..., 3:]
    weight = randn(num_heads, n, k, dtype=dtype, seed=1)
    state = ints([(1, 9, 0, -1)[i % 4] for i in range(num_tokens)])
    x[state == 0] = float("nan")
    got, want = run(x, weight.transpose(1, 2), state)
    assert_close("out", want, got)
    got, want = run(x, weight.transpose(1, 2).contiguous(), state)
    assert_close("out", want, got)
    assert bool((got[state < 0] == 7.0).all())
    assert not got[state == 0].any()


def test_blocks_without_a_token_that_wants_it() -> None:
    x = torch.full((130, 2, 16), float("nan"), device=DEVICE)
    weight = randn(2, 16, 16, dtype=torch.float32)
    got, _ = run(x, weight, ints([0] * 64 + [-1] * 66))
    assert not got[:64].any()
    assert bool((got[64:] == 7.0).all())


def test_refuses_what_does_not_fit() -> None:
    x, weight = randn(4, 2, 16, dtype=torch.float32), randn(2, 16, 8, dtype=torch.float32)
    out, state = torch.empty(4, 2, 8, device=DEVICE), ints([1] * 4)
    with pytest.raises(ValueError, match="fit"):
        heads(x, weight[:1], state, out)
    with pytest.raises(ValueError, match="state"):
        heads(x, weight, state.long(), out)
    with pytest.raises(ValueError, match="dtypes"):
        heads(x, weight.half(), state, out)
    assert heads(x[:0], weight, state[:0], out[:0]).shape == (0, 2, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 128, 2304])
@pytest.mark.parametrize(("k", "n"), [(128, 512), (512, 128)])
def test_at_full_size(num_tokens: int, k: int, n: int) -> None:
    x = randn(num_tokens, 16, k, dtype=torch.bfloat16)
    weight = randn(16, 256, 512, dtype=torch.bfloat16, seed=1)
    weight = weight[:, :128] if k == 128 else weight[:, 128:].transpose(1, 2)
    got, want = run(x, weight, ints([1] * num_tokens))
    assert_close("out", want, got)
