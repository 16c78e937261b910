"""Causal attention of many new tokens per row over K/V gathered by slot (prefill, mixed steps).

Owns the walk over query blocks; knows neither requests nor layers. The rows' own new K/V must be in
the cache already: prefix and chunk are read alike, through the slot table.

A block holds BLOCK_M (token, query head) pairs of one KV head, so that K and V of a group are read
once. Blocks of all rows form one list, found from the counts inside the kernel; it is walked from
the end, because late blocks of a row have most keys to read.
Source: online softmax over tiles as in FlashAttention-2 (Dao, 2023).
"""

# mypy: allow-incomplete-defs

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the kernel is built: (token, head) pairs and keys of a tile, warps, pipeline depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (padded head_dim, pairs of the longest row: few, some, many) -> configuration. 64 rows of M per
# group of four warps is what Hopper's matrix instruction takes.
_CONFIGS = {
    (64, 16): PrefillConfig(16, 128, 4, 4),
    (64, 64): PrefillConfig(64, 128, 4, 3),
    (64, 128): PrefillConfig(128, 128, 8, 3),
    (128, 16): PrefillConfig(16, 64, 4, 4),
    (128, 64): PrefillConfig(64, 64, 4, 3),
    (128, 128): PrefillConfig(128, 64, 8, 3),
    (256, 16): PrefillConfig(16, 32, 4, 4),
    (256, 64): PrefillConfig(64, 32, 4, 3),
    (256, 128): PrefillConfig(128, 32, 8, 3),
}


@triton.jit
def _attend(
    acc,
    best,
    norm,
    q,
    k_head,
    v_head,
    lane_ptr,
    begin,
    stop,
    kv_len,
    q_position,
    scale_log2,
    SLOT: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    dim = tl.arange(0, DIM_PAD)
    for key in range(begin, stop, BLOCK_N):
        position = key + tl.arange(0, BLOCK_N)
        if MASKED:
            slot = tl.load(lane_ptr + position, mask=position < kv_len, other=0).to(tl.int64)
        else:
            slot = tl.load(lane_ptr + position).to(tl.int64)
        offset = slot[:, None] * SLOT + dim[None, :]
        # unread slots may hold NaN, and 0 * NaN would spoil the sum: they are masked out
        if MASKED:
            live = (position < kv_len)[:, None] & (dim < DIM)[None, :]
            k = tl.load(k_head + offset, mask=live, other=0.0)
            v = tl.load(v_head + offset, mask=live, other=0.0)
        elif DIM == DIM_PAD:
            k = tl.load(k_head + offset)
            v = tl.load(v_head + offset)
        else:
            k = tl.load(k_head + offset, mask=(dim < DIM)[None, :], other=0.0)
            v = tl.load(v_head + offset, mask=(dim < DIM)[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if MASKED:
            score = tl.where(position[None, :] <= q_position[:, None], score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        norm = norm * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        best = new_best
    return acc, best, norm


@triton.jit
def _find_block(cu_counts_ptr, num_rows, index, TOKENS: tl.constexpr, SCAN: tl.constexpr):
    """Row of block ``total - 1 - index``, its number in the row, and whether it exists."""
    total = 0
    for begin in range(0, num_rows, SCAN):
        row = begin + tl.arange(0, SCAN)
        low = tl.load(cu_counts_ptr + row, mask=row < num_rows, other=0)
        high = tl.load(cu_counts_ptr + row + 1, mask=row < num_rows, other=0)
        total += tl.sum(tl.cdiv(high - low, TOKENS), axis=0)
    wanted = total - 1 - index
    found = 0
    first = 0
    passed = 0
    for begin in range(0, num_rows, SCAN):
        row = begin + tl.arange(0, SCAN)
        low = tl.load(cu_counts_ptr + row, mask=row < num_rows, other=0)
        high = tl.load(cu_counts_ptr + row + 1, mask=row < num_rows, other=0)
        blocks = tl.cdiv(high - low, TOKENS)
        ends = passed + tl.cumsum(blocks, axis=0)
        before = (ends <= wanted) & (row < num_rows)
        found += tl.sum(before.to(tl.int32), axis=0)
        first = tl.maximum(first, tl.max(tl.where(before, ends, 0), axis=0))
        passed += tl.sum(blocks, axis=0)
    return found, wanted - first, wanted


# step metadata lies anywhere in a staging buffer: one build for every alignment
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["lanes_ptr", "starts_ptr", "cu_counts_ptr"],
)
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lanes_ptr,
    starts_ptr,
    cu_counts_ptr,
    out_ptr,
    num_rows,
    q_row,
    q_head,
    out_row,
    out_head,
    table_row,
    scale_log2,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0) % KV_HEADS
    row, block, wanted = _find_block(
        cu_counts_ptr, num_rows, tl.program_id(0) // KV_HEADS, TOKENS, SCAN
    )
    pair = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DIM_PAD)
    local = pair // GROUP
    heads = head * GROUP + pair % GROUP
    used = (local < TOKENS)[:, None] & (dim < DIM)[None, :]
    if wanted >= 0:  # else a surplus program: no row needs it
        first_token = tl.load(cu_counts_ptr + row)
        count = tl.load(cu_counts_ptr + row + 1) - first_token
        start = tl.load(starts_ptr + row)
        lane_ptr = table_ptr + tl.load(lanes_ptr + row).to(tl.int64) * table_row
        local += block * TOKENS
        used = used & (local < count)[:, None]
        token = (first_token + local).to(tl.int64)
        q = tl.load(
            q_ptr + token[:, None] * q_row + heads[:, None] * q_head + dim[None, :],
            mask=used,
            other=0.0,
        )
        # [0, full): keys that every query of the block sees; [full, kv_len): up to the diagonal
        position = start + block * TOKENS
        full = (position + 1) // BLOCK_N * BLOCK_N
        kv_len = tl.minimum(position + TOKENS, start + count)
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
        k_head = k_ptr + head * DIM
        v_head = v_ptr + head * DIM
        acc, best, norm = _attend(
            acc, best, norm, q, k_head, v_head, lane_ptr, 0, full, kv_len, start + local,
            scale_log2, KV_HEADS * DIM, DIM, DIM_PAD, BLOCK_N, False,
        )  # fmt: skip
        acc, best, norm = _attend(
            acc, best, norm, q, k_head, v_head, lane_ptr, full, kv_len, kv_len, start + local,
            scale_log2, KV_HEADS * DIM, DIM, DIM_PAD, BLOCK_N, True,
        )  # fmt: skip
        tl.store(
            out_ptr + token[:, None] * out_row + heads[:, None] * out_head + dim[None, :],
            (acc / norm[:, None]).to(out_ptr.dtype.element_ty),
            mask=used,
        )


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    starts: Tensor,
    cu_counts: Tensor,
    max_count: int,
    scale: float,
    out: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Causal attention of each row's new tokens over its prefix and themselves.

    Args:
        q: [num_tokens, num_q_heads, head_dim] of the whole step; may be a view into packed qkv.
        k_cache, v_cache: [num_slots + 1, num_kv_heads, head_dim], contiguous, dtype of q; K/V of
            the new tokens are in it.
        table: [num_lanes, max_len] int32: slot of each position.
        lanes: [num_rows] int32.
        starts: [num_rows] int32, position of each row's first new token.
        cu_counts: [num_rows + 1] int32, not decreasing, from any first token: row i owns tokens
            [cu_counts[i], cu_counts[i + 1]); empty rows pad the batch.
        max_count: about the most new tokens of a row; selects the tile, never the result.
        scale: multiplies q·k.
        out: where to write, like the result; last dimension contiguous. Tokens of no row are left
            as they are, so decode rows of the same step may lie there.
        config: instead of the built-in table (for tuning).

    Returns:
        [num_tokens, num_q_heads, head_dim]; without ``out``, tokens of no row are zero.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``prefill_attention_ref``. Does not synchronise; safe in CUDA graphs.
    """
    _check(q, k_cache, v_cache, table, lanes, starts, cu_counts)
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_q_heads // num_kv_heads
    if out is None:
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or out.stride(2) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit q {tuple(q.shape)}")
    if config is None:
        config = prefill_config(head_dim, group, max_count, q.element_size())
    if num_tokens == 0:
        return out
    # every row leaves at most one block part empty, so this many blocks hold any division of the
    # tokens into rows
    num_rows = lanes.shape[0]
    num_blocks = triton.cdiv(num_tokens, config.block_m // group) + num_rows
    _prefill_kernel[(num_blocks * num_kv_heads,)](
        q,
        k_cache,
        v_cache,
        table,
        lanes,
        starts,
        cu_counts,
        out,
        num_rows,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        table.stride(0),
        scale * math.log2(math.e),
        KV_HEADS=num_kv_heads,
        GROUP=group,
        DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SCAN=128,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def prefill_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    starts: Tensor,
    cu_counts: Tensor,
    scale: float,
) -> Tensor:
    """``prefill_attention`` in plain torch, fp32 throughout, rounded at the end."""
    group = q.shape[1] // k_cache.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for row in range(lanes.shape[0]):
        begin, stop, start = int(cu_counts[row]), int(cu_counts[row + 1]), int(starts[row])
        length = start + stop - begin
        slots = table[lanes[row].long(), :length].long()
        k = k_cache[slots].float().repeat_interleave(group, dim=1)
        v = v_cache[slots].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,nhd->htn", q[begin:stop].float(), k) * scale
        position = torch.arange(length, device=q.device)
        scores.masked_fill_(position[None, :] > position[start:, None], float("-inf"))
        out[begin:stop] = torch.einsum("htn,nhd->thd", scores.softmax(-1), v)
    return out.to(q.dtype)


def prefill_config(head_dim: int, group: int, max_count: int, element_size: int) -> PrefillConfig:
    """The configuration for a shape: that of the table, with small tiles for 4-byte elements."""
    pairs = max_count * group
    size = 16 if pairs <= 16 else 64 if pairs <= 64 else 128
    found = _CONFIGS.get((max(64, triton.next_power_of_2(head_dim)), size))
    if found is None:
        raise ValueError(f"head_dim {head_dim} is over 256")
    if group > 128:
        raise ValueError(f"{group} query heads per KV head: 128 at most")
    if element_size > 2:
        block_m = max(min(found.block_m, 32), triton.next_power_of_2(group))
        return PrefillConfig(block_m, 32, 4, 2)
    return found


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    starts: Tensor,
    cu_counts: Tensor,
) -> None:
    if not q.dtype == k_cache.dtype == v_cache.dtype or table.dtype != torch.int32:
        raise ValueError(f"dtypes: q {q.dtype}, cache {k_cache.dtype}, table {table.dtype}")
    if k_cache.shape != v_cache.shape or k_cache.shape[2] != q.shape[2]:
        raise ValueError(f"caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)} do not fit q")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("caches must be contiguous")
    if q.stride(2) != 1 or table.stride(1) != 1:
        raise ValueError("the last dimensions of q and table must be contiguous")
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide by {k_cache.shape[1]} KV heads")
    num_rows = lanes.shape[0]
    if starts.shape != (num_rows,) or cu_counts.shape != (num_rows + 1,):
        raise ValueError(f"starts and cu_counts do not fit {num_rows} lanes")
    if not torch.int32 == lanes.dtype == starts.dtype == cu_counts.dtype:
        raise ValueError("lanes, starts and cu_counts must be int32")
