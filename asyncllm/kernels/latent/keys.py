"""The loop over latents that a block of (token, head) pairs attends to, in tiles of slots, with
online softmax; and how kernels with it are built, for a device and a number of heads.

A latent is key and value, and is loaded once. Source: online softmax over tiles as in
FlashAttention-2 (Dao, 2023).
"""

# mypy: allow-incomplete-defs

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from asyncllm.kernels.attention.kv8 import widened
from asyncllm.kernels.autotune import tuned

FEW, MANY = 16, 64  # pairs of a block: of one token with few heads, and of everything else


@dataclass(frozen=True, slots=True)
class AttendConfig:
    """How a kernel is built and spread.

    Attributes:
        tile: tokens of a tile.
        programs_per_sm: programs resident on a multiprocessor.
    """

    tile: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    @property
    def registers(self) -> int:
        """Of a thread, so that all programs of a multiprocessor fit: of 65536, in eights."""
        return min(255, 65536 // (self.programs_per_sm * self.num_warps * 32) // 8 * 8)


# by pairs. Of num_stages two are spent on the slots, whose load comes before that of the latents;
# with 5 two tiles of 36 KiB are in flight while one is worked on. 16 queries of 512 + 64 take 144
# registers a thread and their sums 64: with four warps two programs fit on a multiprocessor.
_CONFIGS = {
    f"{FEW}": AttendConfig(32, 4, 5, 2),
    f"{MANY}": AttendConfig(32, 8, 5, 1),
    f"{MANY} shared": AttendConfig(64, 8, 2, 1),
}


def attend_config(
    pairs: int, size: str, element: torch.dtype, device: torch.device
) -> AttendConfig:
    """The configuration for blocks of ``pairs``: the device's tuned one, or that of the table;
    small tiles for 4-byte elements.

    Args:
        size: "few" or "many" items, or prefixes that are "shared".
    """
    found = _CONFIGS.get(f"{pairs} {size}") or _CONFIGS[f"{pairs}"]
    if entry := tuned(device, "latent", f"{pairs} {size}"):
        found = AttendConfig(**entry)
    if element.itemsize > 2:
        found = replace(found, tile=16, num_stages=2, programs_per_sm=1)
    return found


def heads_of_block(num_heads: int) -> int:
    """Heads of a token in a block of ``MANY`` pairs."""
    return min(MANY, 1 << (num_heads - 1).bit_length())


@triton.jit
def load_part(ptr, row, head, row_stride, head_stride, live, DIM: tl.constexpr, PAD: tl.constexpr):
    """A part of the queries of (row, head) pairs, [.., PAD]: zeros behind DIM and where not
    ``live``."""
    dim = tl.arange(0, PAD)
    at = ptr + row[:, None] * row_stride + head[:, None] * head_stride + dim[None, :]
    return tl.load(at, mask=live[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def attend_latents(
    q,
    turned,
    cache_ptr,
    scales_ptr,
    lane_ptr,
    begin,
    stop,
    length,
    limit,
    scale_log2,
    MANY: tl.constexpr,
    PAIRS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Sums [PAIRS, RANK_PAD], not divided yet, the highest score of each pair and its norm.

    Latents are those of positions [begin, stop) of ``lane_ptr``, as far as ``length``; a pair sees
    those up to its ``limit``.
    """
    token = tl.arange(0, TILE)
    dim = tl.arange(0, RANK_PAD)
    turn = tl.arange(0, ROPE_PAD)
    best = tl.full([PAIRS], float("-inf"), tl.float32)
    # summed over tokens at the end: one sum across warps instead of one a tile
    norms = tl.zeros([PAIRS, TILE], tl.float32)
    acc = tl.zeros([PAIRS, RANK_PAD], tl.float32)
    for start in range(begin, stop, TILE):
        position = start + token
        known = position < length
        slot = tl.load(lane_ptr + position, mask=known, other=0).to(tl.int64)
        row = cache_ptr + slot * (RANK + ROPE)
        # unread slots may hold NaN, and 0 * NaN would spoil the sum: they are masked out
        if RANK == RANK_PAD:
            c = tl.load(row[:, None] + dim[None, :], mask=known[:, None], other=0.0)
        else:
            inside = known[:, None] & (dim < RANK)[None, :]
            c = tl.load(row[:, None] + dim[None, :], mask=inside, other=0.0)
        if ROPE == ROPE_PAD:
            k = tl.load(row[:, None] + (RANK + turn)[None, :], mask=known[:, None], other=0.0)
        else:
            inside = known[:, None] & (turn < ROPE)[None, :]
            k = tl.load(row[:, None] + (RANK + turn)[None, :], mask=inside, other=0.0)
        by = tl.full([TILE], 1.0, tl.float32)
        if SCALED:  # 8-bit floats are exact in any of the other types; the scale comes after
            by = tl.load(scales_ptr + slot, mask=known, other=0.0)
            c = widened(c, q.dtype)
            k = widened(k, q.dtype)
        score = tl.dot(q, tl.trans(c), input_precision="ieee")
        score = tl.dot(turned, tl.trans(k), score, input_precision="ieee") * scale_log2
        if SCALED:
            score = score * by[None, :]
        score = tl.where(position[None, :] <= limit[:, None], score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, axis=1))
        base = new_best
        if MANY:  # a pair may see nothing of this piece
            base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(best - base)
        norms = norms * shrink[:, None] + weight
        if SCALED:
            weight = weight * by[None, :]
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(c.dtype), c, acc, input_precision="ieee")
        best = new_best
    return acc, best, tl.sum(norms, axis=1)
