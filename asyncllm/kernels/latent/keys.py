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
from torch import Tensor

from asyncllm.kernels.attention.kv8 import by_power, float16_factor, kv_halves
from asyncllm.kernels.attention.scores import padded
from asyncllm.kernels.autotune import capability, is_narrow, tuned

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
    if pairs == MANY:  # whose queries of 512 + 64 take 72 KiB of shared memory
        if is_narrow(device):
            found = replace(found, tile=16, num_stages=2)
        elif capability(device) >= 100:  # there sums lie in it too
            found = replace(found, num_stages=2)
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
    ASM: tl.constexpr,
):
    """Sums [PAIRS, RANK_PAD], not divided yet, the highest score of each pair and its norm.

    Latents are those of positions [begin, stop) of ``lane_ptr``; a pair sees those up to its
    ``limit``, which is before ``length``. SCALED: they are 8-bit floats, read as int16, whose even
    and odd channels have products of their own, as in decode over K/V in 8 bits.
    """
    EACH: tl.constexpr = 2 if SCALED else 1  # numbers in an element of the cache
    token = tl.arange(0, TILE)
    dim = tl.arange(0, RANK_PAD // EACH)
    turn = tl.arange(0, ROPE_PAD // EACH)
    best = tl.full([PAIRS], float("-inf"), tl.float32)
    # summed over tokens at the end: one sum across warps instead of one a tile
    norms = tl.zeros([PAIRS, TILE], tl.float32)
    acc = tl.zeros([PAIRS, RANK_PAD // EACH], tl.float32)
    row_scale = tl.full([PAIRS, 1], scale_log2, tl.float32)
    odd, q_odd, turned_odd = acc, q, turned
    if SCALED:
        if q.dtype != tl.float32:
            most = tl.maximum(
                tl.max(tl.abs(q.to(tl.float32)), axis=1),
                tl.max(tl.abs(turned.to(tl.float32)), axis=1),
            )
            factor, back = float16_factor(most)
            q = (q.to(tl.float32) * factor[:, None]).to(tl.float16)
            turned = (turned.to(tl.float32) * factor[:, None]).to(tl.float16)
            row_scale *= back[:, None]
        q, q_odd = tl.split(tl.reshape(q, [PAIRS, RANK_PAD // 2, 2]))
        turned, turned_odd = tl.split(tl.reshape(turned, [PAIRS, ROPE_PAD // 2, 2]))
    for start in range(begin, stop, TILE):
        position = start + token
        # behind the last one it is read again: loads need no masks, and unread slots stay unread
        slot = tl.load(lane_ptr + tl.minimum(position, length - 1)).to(tl.int64)
        row = cache_ptr + slot * ((RANK + ROPE) // EACH)
        if RANK == RANK_PAD:
            c = tl.load(row[:, None] + dim[None, :])
        else:
            c = tl.load(row[:, None] + dim[None, :], mask=(dim < RANK // EACH)[None, :], other=0)
        if ROPE == ROPE_PAD:
            k = tl.load(row[:, None] + (RANK // EACH + turn)[None, :])
        else:
            inside = (turn < ROPE // EACH)[None, :]
            k = tl.load(row[:, None] + (RANK // EACH + turn)[None, :], mask=inside, other=0)
        c_odd, k_odd, scale, inverse = c, k, slot, slot
        if SCALED:
            scale = tl.load(scales_ptr + slot)
            c, c_odd = kv_halves(c, 2, ASM, q.dtype)
            k, k_odd = kv_halves(k, 2, ASM, q.dtype)
        score = tl.dot(q, tl.trans(c), input_precision="ieee")
        score = tl.dot(turned, tl.trans(k), score, input_precision="ieee")
        if SCALED:
            score = tl.dot(q_odd, tl.trans(c_odd), score, input_precision="ieee")
            score = tl.dot(turned_odd, tl.trans(k_odd), score, input_precision="ieee")
            score *= scale[None, :]
        score *= row_scale
        if SCALED:
            power, scale, inverse = by_power(scale)
            score += power[None, :]
        score = tl.where(position[None, :] <= limit[:, None], score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, axis=1))
        base = new_best
        if MANY:  # a pair may see nothing of this piece
            base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(best - base)
        if SCALED:
            norms = norms * shrink[:, None] + weight * inverse[None, :]
            weight = (weight * scale[None, :]).to(q.dtype)
            odd = tl.dot(weight, c_odd, odd * shrink[:, None], input_precision="ieee")
        else:
            norms = norms * shrink[:, None] + weight
        acc = tl.dot(weight.to(q.dtype), c, acc * shrink[:, None], input_precision="ieee")
        best = new_best
    if SCALED:
        acc = tl.reshape(tl.join(acc, odd), [PAIRS, RANK_PAD])
    return acc, best, tl.sum(norms, axis=1)


def latents_of(cache: Tensor) -> Tensor:
    """A cache as ``attend_latents`` reads it."""
    return cache.view(torch.int16) if cache.element_size() == 1 else cache


def latent_sizes(q: Tensor, turned: Tensor, scaled: bool) -> dict[str, int | bool]:
    """Constants of kernels that call ``attend_latents``."""
    rank, rope_dim = q.shape[2], turned.shape[2]
    return {
        "RANK": rank,
        "RANK_PAD": 2 * padded(rank // 2) if scaled else padded(rank),
        "ROPE": rope_dim,
        "ROPE_PAD": 2 * padded(rope_dim // 2) if scaled else padded(rope_dim),
        "SCALED": scaled,
        "ASM": q.device.type != "cpu" and q.element_size() == 2,  # the interpreter knows none
    }
