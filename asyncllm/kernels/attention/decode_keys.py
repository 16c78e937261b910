"""Loops over the keys that one new token attends to, in tiles of slots, with online softmax.

K and V are in the type of q, or in 8 bits: with one scale for a head of a token, which is
multiplied to its score and to its weight, or with one for each 8 channels.
"""

# mypy: allow-incomplete-defs

import triton
import triton.language as tl

from asyncllm.kernels.attention.kv8 import (
    by_power,
    float16_factor,
    from_8_bits,
    kv_halves,
    scales_of,
    spread,
    times,
    widened,
)
from asyncllm.kernels.attention.scores import capped


@triton.jit
def attend(
    q,
    k_ptr,
    v_ptr,
    scales_ptr,
    lane_ptr,
    kv_head,
    begin,
    stop,
    length,
    scale_log2,
    cap_log2,
    KV_HEADS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALES: tl.constexpr,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Keys [begin, stop) of a row, whole tiles, of the query heads q [GROUP_PAD, DIM_PAD]: their
    sums of values, best scores and sums of weights. A single one needs no matrix instructions."""
    if GROUP_PAD == 1:
        acc, best, norm = _attend_one(
            q,
            k_ptr,
            v_ptr,
            scales_ptr,
            lane_ptr,
            kv_head,
            begin,
            stop,
            length,
            scale_log2,
            cap_log2,
            KV_HEADS,
            DIM,
            DIM_PAD,
            TILE,
            WINDOW,
            CAPPED,
            SCALES,
            STAGES,
        )
    elif SCALES > 0:
        acc, best, norm = _attend_pairs(
            q,
            k_ptr,
            v_ptr,
            scales_ptr,
            lane_ptr,
            kv_head,
            begin,
            stop,
            length,
            scale_log2,
            cap_log2,
            KV_HEADS,
            GROUP_PAD,
            DIM,
            DIM_PAD,
            TILE,
            WINDOW,
            CAPPED,
            SCALES,
            KIND,
            ASM,
        )
    else:
        acc, best, norm = _attend_group(
            q,
            k_ptr,
            v_ptr,
            lane_ptr,
            kv_head,
            begin,
            stop,
            length,
            scale_log2,
            cap_log2,
            KV_HEADS,
            GROUP_PAD,
            DIM,
            DIM_PAD,
            TILE,
            WINDOW,
            CAPPED,
        )
    return acc, best, norm


@triton.jit
def _attend_group(
    q,
    k_ptr,
    v_ptr,
    lane_ptr,
    kv_head,
    begin,
    stop,
    length,
    scale_log2,
    cap_log2,
    KV_HEADS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """``attend`` for the query heads of a KV head, by matrix instructions, over K/V as they are."""
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    norm = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for tile in range(begin, stop, TILE):
        seen, slot = _slots(lane_ptr, tile, length, TILE, WINDOW)
        k, v = _load(k_ptr, v_ptr, slot, kv_head, KV_HEADS, DIM, DIM_PAD)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CAPPED:
            score = capped(score, scale_log2, cap_log2)
        else:
            score *= scale_log2
        score = tl.where(seen[None, :], score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        norm = norm * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        best = new_best
    return acc, best, norm


@triton.jit
def _attend_pairs(
    q,
    k_ptr,
    v_ptr,
    scales_ptr,
    lane_ptr,
    kv_head,
    begin,
    stop,
    length,
    scale_log2,
    cap_log2,
    KV_HEADS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALES: tl.constexpr,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
):
    """The same over K/V in 8 bits, read as int16: neighbouring channels go through products of
    their own, even ones and odd ones."""
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    # summed over tokens at the end: one sum across warps instead of one a tile
    norms = tl.zeros([GROUP_PAD, TILE], tl.float32)
    even = tl.zeros([GROUP_PAD, DIM_PAD // 2], tl.float32)
    odd = tl.zeros([GROUP_PAD, DIM_PAD // 2], tl.float32)
    every = tl.full([TILE], True, tl.int1)
    if SCALES == 1 and q.dtype != tl.float32:
        wide = q.to(tl.float32)
        factor, back = float16_factor(tl.max(tl.abs(wide)))
        q = (wide * factor).to(tl.float16)
        scale_log2 *= back
    q_even, q_odd = tl.split(tl.reshape(q, [GROUP_PAD, DIM_PAD // 2, 2]))
    for tile in range(begin, stop, TILE):
        seen, slot = _slots(lane_ptr, tile, length, TILE, WINDOW)
        k, v = _load(k_ptr, v_ptr, slot, kv_head, KV_HEADS, DIM // 2, DIM_PAD // 2)
        k_even, k_odd = kv_halves(k, KIND, ASM, q.dtype)
        v_even, v_odd = kv_halves(v, KIND, ASM, q.dtype)
        k_scale, v_scale = scales_of(scales_ptr, slot, every, kv_head, KV_HEADS, DIM_PAD, SCALES)
        if SCALES > 1:
            k_scale = spread(k_scale, TILE, DIM_PAD // 8, 4)
            v_scale = spread(v_scale, TILE, DIM_PAD // 8, 4)
            k_even, k_odd = times(k_even, k_scale), times(k_odd, k_scale)
            v_even, v_odd = times(v_even, v_scale), times(v_odd, v_scale)
        score = tl.dot(q_even, tl.trans(k_even), input_precision="ieee")
        score = tl.dot(q_odd, tl.trans(k_odd), score, input_precision="ieee")
        if SCALES == 1:
            score *= (k_scale * scale_log2)[None, :]
        else:
            score *= scale_log2
        if CAPPED:
            score = capped(score, 1.0, cap_log2)
        inverse = v_scale
        if SCALES == 1:  # weights with their scales' powers of two, so that none leaves float16
            power, v_scale, inverse = by_power(v_scale)
            score += power[None, :]
        score = tl.where(seen[None, :], score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        if SCALES == 1:
            norms = norms * shrink[:, None] + weight * inverse[None, :]
            weight *= v_scale[None, :]
        else:
            norms = norms * shrink[:, None] + weight
        weight = weight.to(q.dtype)
        even = tl.dot(weight, v_even, even * shrink[:, None], input_precision="ieee")
        odd = tl.dot(weight, v_odd, odd * shrink[:, None], input_precision="ieee")
        best = new_best
    sums = tl.reshape(tl.join(even, odd), [GROUP_PAD, DIM_PAD])
    return sums, best, tl.sum(norms, axis=1)


@triton.jit
def _attend_one(
    q,
    k_ptr,
    v_ptr,
    scales_ptr,
    lane_ptr,
    kv_head,
    begin,
    stop,
    length,
    scale_log2,
    cap_log2,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``attend`` for one query head, without matrix instructions: products in float32, summed up
    for each place of a tile apart, and over all of them at the end."""
    best = tl.full([1], float("-inf"), tl.float32)
    norms = tl.zeros([1, TILE], tl.float32)
    sums = tl.zeros([TILE, DIM_PAD], tl.float32)
    wide = q.to(tl.float32)
    every = tl.full([TILE], True, tl.int1)
    # said here, since only loops with matrix instructions are pipelined unasked
    for tile in tl.range(begin, stop, TILE, num_stages=STAGES):
        seen, slot = _slots(lane_ptr, tile, length, TILE, WINDOW)
        k, v = _load(k_ptr, v_ptr, slot, kv_head, KV_HEADS, DIM, DIM_PAD)
        k_scale = seen
        v_scale = seen
        if SCALES == 1:
            k_scale, v_scale = scales_of(scales_ptr, slot, every, kv_head, KV_HEADS, DIM_PAD, 1)
            k, v = widened(k, q.dtype), widened(v, q.dtype)
        else:
            k, v = from_8_bits(
                k, v, scales_ptr, slot, every, kv_head, KV_HEADS, DIM_PAD, TILE, SCALES, q.dtype
            )
        score = tl.sum(k.to(tl.float32) * wide, axis=1)
        if SCALES == 1:
            score *= k_scale
        if CAPPED:
            score = capped(score, scale_log2, cap_log2)
        else:
            score *= scale_log2
        score = tl.where(seen, score, float("-inf"))[None, :]
        new_best = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - new_best[:, None])
        shrink = tl.exp2(best - new_best)[:, None]
        norms = norms * shrink + weight
        if SCALES == 1:
            weight *= v_scale[None, :]
        sums = sums * shrink + tl.trans(weight) * v.to(tl.float32)
        best = new_best
    return tl.sum(sums, axis=0)[None, :], best, tl.sum(norms, axis=1)


@triton.jit
def _slots(lane_ptr, tile, length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Which of a tile's positions the row sees, and their slots; for the others that of the nearest
    one it sees, so that loads need no masks, and unread slots, which may hold NaN, stay unread."""
    position = tile + tl.arange(0, TILE)
    seen = position < length
    nearest = tl.minimum(position, length - 1)
    if WINDOW:
        seen = seen & (position >= length - WINDOW)
        nearest = tl.maximum(nearest, length - WINDOW)
    return seen, tl.load(lane_ptr + nearest).to(tl.int64)


@triton.jit
def _load(
    k_ptr,
    v_ptr,
    slot,
    kv_head,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """K and V of slots, [.., DIM_PAD]."""
    dim = tl.arange(0, DIM_PAD)
    offset = slot[:, None] * (KV_HEADS * DIM) + dim[None, :]
    if DIM == DIM_PAD:
        k = tl.load(k_ptr + kv_head * DIM + offset)
        v = tl.load(v_ptr + kv_head * DIM + offset)
    else:
        live = (dim < DIM)[None, :]
        k = tl.load(k_ptr + kv_head * DIM + offset, mask=live, other=0.0)
        v = tl.load(v_ptr + kv_head * DIM + offset, mask=live, other=0.0)
    return k, v
