"""Computes the log-probability of one token per row, from the per-tile sums of sampling.

Does not know requests.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.sampling.tiles import TILE, check_logits, clean, combine, tiles_kernel


@triton.jit(do_not_specialize_on_alignment=["tokens_ptr", "out_ptr"])
def _log_prob_kernel(
    logits_ptr,
    tokens_ptr,
    top_ptr,
    sum_ptr,
    out_ptr,
    stride,
    TILES: tl.constexpr,
    PAD: tl.constexpr,
):
    row = tl.program_id(0)
    best, sums = combine(top_ptr, sum_ptr, row, 1.0, TILES, PAD)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + token).to(tl.float32)
    tl.store(out_ptr + row, x - best - tl.log(tl.sum(sums, axis=0)))


def log_probs(logits: Tensor, tokens: Tensor, out: Tensor | None = None) -> Tensor:
    """Log-probability of one token per row, log-sum-exp in fp32, nothing of [n, vocab_size] made.

    Args:
        logits: [n, vocab_size] float32, float16 or bfloat16; rows may be strided. NaN adds
            nothing to the sum.
        tokens: [n] int32 or int64, in range.
        out: [n] float32, where to write.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``log_probs_ref``. Does not synchronise; safe in CUDA graphs.
    """
    n, vocab_size = check_logits(logits)
    if tokens.shape != (n,) or tokens.is_floating_point():
        raise ValueError(f"tokens {tuple(tokens.shape)} {tokens.dtype}: [{n}] integers expected")
    if out is None:
        out = torch.empty(n, dtype=torch.float32, device=logits.device)
    elif out.shape != (n,) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} {out.dtype}: [{n}] float32 expected")
    if n == 0:
        return out
    tiles = triton.cdiv(vocab_size, TILE)
    top, sums = torch.empty((2, n, tiles), dtype=torch.float32, device=logits.device)
    best = torch.empty((n, tiles), dtype=torch.int32, device=logits.device)
    tiles_kernel[(tiles, n)](
        logits,
        sums,
        top,
        best,
        sums,
        best,
        logits.stride(0),
        VOCAB=vocab_size,
        TILE=TILE,
        SUMS=True,
        TEMPERED=False,
        num_warps=8,
    )
    _log_prob_kernel[(n,)](
        logits,
        tokens,
        top,
        sums,
        out,
        logits.stride(0),
        TILES=tiles,
        PAD=triton.next_power_of_2(tiles),
        num_warps=1,
    )
    return out


def log_probs_ref(logits: Tensor, tokens: Tensor) -> Tensor:
    """``log_probs`` in plain torch."""
    scores = clean(logits).log_softmax(dim=-1)
    return scores.gather(1, tokens.long()[:, None])[:, 0]
