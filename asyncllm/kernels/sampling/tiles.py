"""Reduces a row of logits by tiles: best logit, its token and the sum of weights."""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096

# step metadata lies anywhere in a staging buffer: one build for every alignment
COLUMNS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr", "out_ptr"]


@triton.jit
def load_logits(row_ptr, token, VOCAB: tl.constexpr):
    """Logits as fp32; NaN counts as -inf, and 1e30 stands for +inf, which would make differences
    NaN."""
    x = tl.load(row_ptr + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, tl.minimum(x, 1e30), float("-inf"))


@triton.jit
def inverse(temperature):
    return 1.0 / tl.maximum(temperature, 1e-6)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr"])
def tiles_kernel(
    logits_ptr,
    temperature_ptr,
    top_ptr,
    best_ptr,
    sum_ptr,
    used_ptr,
    stride,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    SUMS: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1)
    at = row * tl.num_programs(0) + tile
    token = tile * TILE + tl.arange(0, TILE)
    x = load_logits(logits_ptr + row.to(tl.int64) * stride, token, VOCAB)
    top, best = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(top_ptr + at, top)
    tl.store(best_ptr + at, tile * TILE + best)
    if SUMS:
        scale = 1.0
        if TEMPERED:
            scale = inverse(tl.load(temperature_ptr + row))
        base = tl.maximum(top, -1e30)
        tl.store(sum_ptr + at, tl.sum(tl.exp((x - base) * scale), axis=0))
    if TEMPERED and tile == 0:
        tl.store(used_ptr + row, 0)


@triton.jit
def combine(top_ptr, sum_ptr, row, scale, TILES: tl.constexpr, PAD: tl.constexpr):
    """Best logit of the row (finite), and the weights of its tiles relative to it."""
    tile = tl.arange(0, PAD)
    live = tile < TILES
    tops = tl.load(top_ptr + row * TILES + tile, mask=live, other=float("-inf"))
    best = tl.maximum(tl.max(tops, axis=0), -1e30)
    sums = tl.load(sum_ptr + row * TILES + tile, mask=live, other=0.0)
    return best, sums * tl.exp((tl.maximum(tops, -1e30) - best) * scale)


@triton.jit
def lowest_best(top_ptr, best_ptr, row, TILES: tl.constexpr, PAD: tl.constexpr):
    """Lowest token among the best of the row."""
    tile = tl.arange(0, PAD)
    tops = tl.load(top_ptr + row * TILES + tile, mask=tile < TILES, other=float("-inf"))
    return tl.load(best_ptr + row * TILES + tl.argmax(tops, axis=0, tie_break_left=True))


@triton.jit(do_not_specialize_on_alignment=["out_ptr"])
def best_kernel(top_ptr, best_ptr, out_ptr, TILES: tl.constexpr, PAD: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out_ptr + row, lowest_best(top_ptr, best_ptr, row, TILES, PAD).to(tl.int64))


def clean(logits: Tensor) -> Tensor:
    """fp32, NaN as -inf, +inf as a large number."""
    x = logits.float()
    return torch.where(x.isnan(), -torch.inf, x).clamp_max(1e30)


def check_logits(logits: Tensor) -> tuple[int, int]:
    """Rows and vocabulary; raises ``ValueError`` for what the kernels cannot read."""
    if logits.dim() != 2 or logits.stride(1) != 1 or not logits.shape[1]:
        raise ValueError(f"logits must be [n, vocab_size], rows contiguous: {tuple(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"logits are {logits.dtype}")
    if logits.shape[1] > 2**20:
        raise ValueError(f"vocabulary of {logits.shape[1]} is over {2**20}")
    return logits.shape[0], logits.shape[1]
