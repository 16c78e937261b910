"""Loops over the keys that a block of queries attends to, in tiles, with online softmax.

K/V gathered by slot may be in 8 bits (SCALES): they are dequantised tile by tile.

Source: online softmax over tiles as in FlashAttention-2 (Dao, 2023).
"""

# mypy: allow-incomplete-defs

import triton
import triton.language as tl

from asyncllm.kernels.attention.kv8 import from_8_bits
from asyncllm.kernels.attention.scores import capped


@triton.jit
def _soften(score, best, norm, scale_log2):
    """Online softmax over one more tile of raw scores: weights, and what old sums shrink by."""
    new_best = tl.maximum(best, tl.max(score, axis=1) * scale_log2)
    weight = tl.exp2(score * scale_log2 - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    return weight, shrink, new_best, norm * shrink + tl.sum(weight, axis=1)


@triton.jit
def _attend_edge(
    acc,
    best,
    norm,
    q,
    k_ptr,
    v_ptr,
    scales_ptr,
    lane_ptr,
    kv_row,
    kv_head,
    first,
    begin,
    stop,
    q_position,
    scale_log2,
    cap_log2,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATHER: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Keys [begin, stop) but those before ``first``; each query sees those up to its position that
    are in its window: few tiles."""
    dim = tl.arange(0, DIM_PAD)
    for key in tl.range(begin, stop, BLOCK_N, num_stages=1):
        position = key + tl.arange(0, BLOCK_N)
        live = position < stop
        if WINDOW:
            live = live & (position >= first)
        place = position
        if GATHER:
            place = tl.load(lane_ptr + position, mask=live, other=0)
        place = place.to(tl.int64)
        offset = place[:, None] * kv_row + dim[None, :]
        # unread slots may hold NaN, and 0 * NaN would spoil the sum: they are masked out
        inside = live[:, None] & (dim < DIM)[None, :]
        k = tl.load(k_ptr + offset, mask=inside, other=0.0)
        v = tl.load(v_ptr + offset, mask=inside, other=0.0)
        k, v = from_8_bits(
            k, v, scales_ptr, place, live, kv_head, KV_HEADS, DIM_PAD, BLOCK_N, SCALES, q.dtype
        )
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CAPPED:
            score = capped(score, scale_log2, cap_log2)
        seen = (position < stop)[None, :] & (position[None, :] <= q_position[:, None])
        if WINDOW:
            # a query may see nothing of the first tile: what it then sums up is weighed with zero
            # when its own key comes, where an infinity would make it NaN
            seen = seen & (position[None, :] > q_position[:, None] - WINDOW)
            score = tl.where(seen, score, -1e30)
        else:
            score = tl.where(seen, score, float("-inf"))
        weight, shrink, best, norm = _soften(score, best, norm, 1.0 if CAPPED else scale_log2)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
    return acc, best, norm


@triton.jit
def _attend_full(
    acc,
    best,
    norm,
    q,
    k_ptr,
    v_ptr,
    scales_ptr,
    lane_ptr,
    kv_row,
    kv_head,
    kv_desc,
    token,
    k_column,
    v_column,
    begin,
    stop,
    scale_log2,
    cap_log2,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOURCE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALES: tl.constexpr,
    STAGES: tl.constexpr,
    SETTLE: tl.constexpr,
):
    """Keys [begin, stop), whole tiles that all queries see: from slots (0), rows of packed qkv (1),
    or such rows by the tensor copy engine (2)."""
    dim = tl.arange(0, DIM_PAD)
    column = tl.arange(0, BLOCK_N)
    for key in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        if SOURCE == 2:
            k = kv_desc.load([token + key, k_column])
            v = kv_desc.load([token + key, v_column])
        else:
            place = key + column
            if SOURCE == 0:
                place = tl.load(lane_ptr + place)
            place = place.to(tl.int64)
            offset = place[:, None] * kv_row + dim[None, :]
            if DIM == DIM_PAD:
                k = tl.load(k_ptr + offset)
                v = tl.load(v_ptr + offset)
            else:
                k = tl.load(k_ptr + offset, mask=(dim < DIM)[None, :], other=0.0)
                v = tl.load(v_ptr + offset, mask=(dim < DIM)[None, :], other=0.0)
            k, v = from_8_bits(
                k,
                v,
                scales_ptr,
                place,
                column < BLOCK_N,
                kv_head,
                KV_HEADS,
                DIM_PAD,
                BLOCK_N,
                SCALES,
                q.dtype,
            )
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CAPPED:
            score = capped(score, scale_log2, cap_log2)
        weight, shrink, best, norm = _soften(score, best, norm, 1.0 if CAPPED else scale_log2)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        if SETTLE:
            # an accumulator that is pending where the loop turns makes ptxas run all matrix
            # instructions of the kernel one by one: this use of it waits
            acc = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
            )
    return acc, best, norm


@triton.jit
def attend(
    acc,
    best,
    norm,
    q,
    k_ptr,
    v_ptr,
    scales_ptr,
    lane_ptr,
    kv_row,
    kv_head,
    kv_desc,
    token,
    k_column,
    v_column,
    first,
    shared,
    full,
    stop,
    q_position,
    scale_log2,
    cap_log2,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOURCE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALES: tl.constexpr,
    STAGES: tl.constexpr,
    SETTLE: tl.constexpr,
):
    """Keys [0, stop) of one source. All queries see [0, full), some those behind it; with a window
    all see [shared, full), some those from ``first`` on and those behind."""
    begin = 0
    late = full
    low = 0
    if WINDOW:
        low = first // BLOCK_N * BLOCK_N
        begin = tl.minimum(tl.cdiv(shared, BLOCK_N) * BLOCK_N, full)
        late = tl.maximum(full, low)
    # those with masks first, the queries' own keys among them: no query is left without a key
    acc, best, norm = _attend_edge(
        acc,
        best,
        norm,
        q,
        k_ptr,
        v_ptr,
        scales_ptr,
        lane_ptr,
        kv_row,
        kv_head,
        first,
        late,
        stop,
        q_position,
        scale_log2,
        cap_log2,
        KV_HEADS,
        DIM,
        DIM_PAD,
        BLOCK_N,
        SOURCE == 0,
        WINDOW,
        CAPPED,
        SCALES,
    )
    if WINDOW:
        acc, best, norm = _attend_edge(
            acc,
            best,
            norm,
            q,
            k_ptr,
            v_ptr,
            scales_ptr,
            lane_ptr,
            kv_row,
            kv_head,
            first,
            low,
            begin,
            q_position,
            scale_log2,
            cap_log2,
            KV_HEADS,
            DIM,
            DIM_PAD,
            BLOCK_N,
            SOURCE == 0,
            WINDOW,
            CAPPED,
            SCALES,
        )
    return _attend_full(
        acc,
        best,
        norm,
        q,
        k_ptr,
        v_ptr,
        scales_ptr,
        lane_ptr,
        kv_row,
        kv_head,
        kv_desc,
        token,
        k_column,
        v_column,
        begin,
        full,
        scale_log2,
        cap_log2,
        KV_HEADS,
        DIM,
        DIM_PAD,
        BLOCK_N,
        SOURCE,
        CAPPED,
        SCALES,
        STAGES,
        SETTLE,
    )
