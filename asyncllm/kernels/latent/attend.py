"""Attention of a few tokens per item over latents gathered by slot: decode, and short chunks.

Absorbed: queries have been multiplied by the up-projection of keys, so that all heads
attend to one row of a token, whose first part is the value as well; it is loaded once. How the work
is divided is decided by `plan.py`.

All (token, head) pairs of a block are rows of its matrix products. An item that lies in several
ranges leaves a partial result in each; a kernel of its own merges them, since the pieces of one row
of 16 heads, 32 KiB each, are too much for the one program that would come last.
"""

# mypy: allow-incomplete-defs

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.scores import padded
from asyncllm.kernels.latent.keys import attend_latents, latent_sizes, latents_of, load_part
from asyncllm.kernels.latent.plan import AttendPlan
from asyncllm.kernels.latent.shared import attend_shared
from asyncllm.kernels.latent.write import check_cache, read_ref


# step metadata lies anywhere in a staging buffer: one build for every alignment
@triton.jit(do_not_specialize=["num_items", "num_ranges"])
def _attend_kernel(
    q_ptr,
    turned_ptr,
    cache_ptr,
    scales_ptr,
    table_ptr,
    meta_ptr,
    first_ptr,
    records_ptr,
    items_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    whole_lse_ptr,
    num_items,
    num_ranges,
    q_row,
    q_head,
    turned_row,
    turned_head,
    out_row,
    out_head,
    table_row,
    scale_log2,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    MANY: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
    ASM: tl.constexpr,
    SHARED: tl.constexpr,
):
    # neighbours share a range, so that all but one find its latents in the L2 cache
    block = tl.program_id(0) % BLOCKS
    program = tl.program_id(0) // BLOCKS
    total = tl.load(meta_ptr)
    per_range = tl.load(meta_ptr + 1)
    # of a range without work these are undefined, and unused
    record = tl.load(first_ptr + program)
    tile = program * per_range
    stop = tl.minimum(tile + per_range, total)
    dim = tl.arange(0, RANK_PAD)
    pair = tl.arange(0, PAIRS)
    head = block * BLOCK_HEADS + pair % BLOCK_HEADS

    while tile < stop:
        item = tl.load(records_ptr + record)
        lane = tl.load(records_ptr + num_items + record)
        length = tl.load(records_ptr + 2 * num_items + record)
        start = tl.load(records_ptr + 3 * num_items + record)
        tiles = tl.cdiv(length, TILE)
        skipped = tile - start
        count = tl.minimum(tiles - skipped, stop - tile)
        if MANY:
            first_token = tl.load(items_ptr + item)
            num_tokens = tl.load(items_ptr + num_items + item)
        else:
            first_token = item
            num_tokens = 1
        query = pair // BLOCK_HEADS
        live = (query < num_tokens) & (head < HEADS)
        # the last position that a pair sees; pairs that only pad see as much as the last
        limit = length - tl.maximum(num_tokens - query, 1)
        at = (first_token + query).to(tl.int64)
        lane_ptr = table_ptr + lane.to(tl.int64) * table_row
        if SHARED:
            lane_ptr += tl.load(records_ptr + 4 * num_items + record)

        q = load_part(q_ptr, at, head, q_row, q_head, live, RANK, RANK_PAD)
        turned = load_part(turned_ptr, at, head, turned_row, turned_head, live, ROPE, ROPE_PAD)
        acc, best, norm = attend_latents(
            q,
            turned,
            cache_ptr,
            scales_ptr,
            lane_ptr,
            skipped * TILE,
            (skipped + count) * TILE,
            length,
            limit,
            scale_log2,
            MANY,
            PAIRS,
            RANK,
            RANK_PAD,
            ROPE,
            ROPE_PAD,
            TILE,
            SCALED,
            ASM,
        )
        if MANY:
            norm = tl.where(norm == 0.0, 1.0, norm)
        acc = acc / norm[:, None]
        inside = live[:, None] & (dim < RANK)[None, :]
        if count == tiles:
            tl.store(
                out_ptr + at[:, None] * out_row + head[:, None] * out_head + dim[None, :],
                acc.to(out_ptr.dtype.element_ty),
                mask=inside,
            )
            if SHARED:  # for what is merged with it
                tl.store(whole_lse_ptr + at * HEADS + head, best + tl.log2(norm), mask=live)
        else:
            # a range's first piece goes to its even place, a last one that goes on to its odd one
            place = 2 * program + (tile - skipped > program * per_range).to(tl.int32)
            piece = (place * BLOCKS + block).to(tl.int64) * PAIRS + pair
            tl.store(partial_ptr + piece[:, None] * RANK + dim[None, :], acc, mask=inside)
            tl.store(lse_ptr + piece, best + tl.log2(norm))
        tile += count
        record += 1


@triton.jit
def _joined(best, norm, acc, lse, value):
    """The sums [GROUP], [GROUP, RANK_PAD] so far with more normed ones, [MERGE, GROUP] and
    [MERGE, GROUP, RANK_PAD]; those that are not there have an lse of minus infinity."""
    new_best = tl.maximum(best, tl.max(lse, axis=0))
    base = tl.where(new_best == float("-inf"), 0.0, new_best)
    weight = tl.exp2(lse - base[None, :])
    shrink = tl.exp2(best - base)
    norm = norm * shrink + tl.sum(weight, axis=0)
    acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * value, axis=0)
    return new_best, norm, acc


@triton.jit(
    do_not_specialize=["num_items", "pieces_row"],
    do_not_specialize_on_alignment=["lens_ptr", "owns_ptr"],
)
def _merge_kernel(
    lens_ptr,
    owns_ptr,
    meta_ptr,
    begins_ptr,
    items_ptr,
    partial_ptr,
    lse_ptr,
    whole_lse_ptr,
    pieces_ptr,
    num_pieces_ptr,
    shared_ptr,
    shared_lse_ptr,
    out_ptr,
    num_items,
    pieces_row,
    out_row,
    out_head,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    MANY: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    MERGE: tl.constexpr,
    SHARED: tl.constexpr,
):
    item = tl.program_id(0)
    block = tl.program_id(1) // (PAIRS // GROUP)
    pair = tl.program_id(1) % (PAIRS // GROUP) * GROUP + tl.arange(0, GROUP)
    length = tl.load(lens_ptr + item)
    per_range = tl.load(meta_ptr + 1)
    start = tl.load(begins_ptr + item)
    num_pieces = 0
    if SHARED:
        length -= tl.load(owns_ptr + item)
        num_pieces = tl.load(num_pieces_ptr + item)
    lowest = start // per_range
    highest = (start + tl.cdiv(length, TILE) - 1) // per_range
    # else it was written at once, by the program that had all of it
    if (length > 0) & ((lowest < highest) | (num_pieces > 0)):
        if MANY:
            first_token = tl.load(items_ptr + item)
            num_tokens = tl.load(items_ptr + num_items + item)
        else:
            first_token = item
            num_tokens = 1
        dim = tl.arange(0, RANK_PAD)
        query = pair // BLOCK_HEADS
        head = block * BLOCK_HEADS + pair % BLOCK_HEADS
        at = (first_token + query).to(tl.int64)
        live = (query < num_tokens) & (head < HEADS)
        out_at = out_ptr + at[:, None] * out_row + head[:, None] * out_head + dim[None, :]
        best = tl.full([GROUP], float("-inf"), tl.float32)
        norm = tl.zeros([GROUP], tl.float32)
        acc = tl.zeros([GROUP, RANK_PAD], tl.float32)
        for begin in range(lowest, tl.where(lowest < highest, highest + 1, lowest), MERGE):
            program = begin + tl.arange(0, MERGE)
            there = program <= highest
            place = 2 * program + (start > program * per_range).to(tl.int32)
            part = (place * BLOCKS + block).to(tl.int64)[:, None] * PAIRS + pair[None, :]
            lse = tl.load(lse_ptr + part, mask=there[:, None], other=float("-inf"))
            # of tokens and heads that only pad, sums have not been written
            value = tl.load(
                partial_ptr + part[:, :, None] * RANK + dim[None, None, :],
                mask=there[:, None, None] & (live[:, None] & (dim < RANK)[None, :])[None, :, :],
                other=0.0,
            )
            best, norm, acc = _joined(best, norm, acc, lse, value)
        if SHARED:
            if lowest == highest:
                best = tl.load(whole_lse_ptr + at * HEADS + head, mask=live, other=float("-inf"))
                acc = tl.load(out_at, mask=live[:, None] & (dim < RANK)[None, :], other=0.0)
                acc = acc.to(tl.float32)
                norm += 1.0
            for begin in range(0, num_pieces, MERGE):
                index = begin + tl.arange(0, MERGE)
                there = index < num_pieces
                row_ptr = pieces_ptr + item.to(tl.int64) * pieces_row
                piece = tl.load(row_ptr + index, mask=there, other=0).to(tl.int64)
                part = piece[:, None] * HEADS + head[None, :]
                seen = there[:, None] & live[None, :]
                lse = tl.load(shared_lse_ptr + part, mask=seen, other=float("-inf"))
                value = tl.load(
                    shared_ptr + part[:, :, None] * RANK + dim[None, None, :],
                    mask=seen[:, :, None] & (dim < RANK)[None, None, :],
                    other=0.0,
                )
                best, norm, acc = _joined(best, norm, acc, lse, value)
        acc = acc / tl.where(live, norm, 1.0)[:, None]
        tl.store(
            out_at,
            acc.to(out_ptr.dtype.element_ty),
            mask=live[:, None] & (dim < RANK)[None, :],
        )


def attend(
    q: Tensor,
    turned: Tensor,
    cache: Tensor,
    table: Tensor,
    scale: float,
    *,
    plan: AttendPlan,
    out: Tensor,
    scales: Tensor | None = None,
) -> Tensor:
    """Attention of the items of a plan over latents in token slots.

    Args:
        q: [num_tokens, num_heads, rank]: queries, multiplied by the up-projection of keys.
        turned: [num_tokens, num_heads, rope_dim]: the rotated part of the queries.
        cache: [num_slots + 1, rank + rope_dim], contiguous: latent, and rotated key; dtype of q, or
            8-bit floats.
        table: [num_lanes, max_len] int32: slot of each position; entries past a row's length are
            never read.
        scale: multiplies q·k; positive.
        plan: from ``plan_attend``. The tokens of an item see the latents up to their own place, the
            last of them all of the item's.
        out: [num_tokens, num_heads, rank]: sums of latents. Tokens of no item are left as they are.
        scales: [num_slots + 1] float32: what multiplies a row of 8-bit floats.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``attend_ref``. Does not synchronise; safe in CUDA graphs.
    """
    _, num_heads, rank = q.shape
    config, num_items = plan.config, plan.lens.shape[0]
    check_cache(q, cache, scales)
    _check(q, turned, cache, table, plan, out)
    if num_items == 0:
        return out
    many = plan.items is not None
    shared = plan.shared
    scale_log2 = scale * math.log2(math.e)
    if shared is not None:
        attend_shared(shared, q, turned, cache, table, plan.lanes, scales, scale_log2)
    _attend_kernel[(plan.num_ranges * plan.blocks,)](
        q,
        turned,
        latents_of(cache),
        scales,
        table,
        plan.meta,
        plan.first,
        plan.records,
        plan.items,
        out,
        plan.partial,
        plan.lse,
        plan.whole_lse,
        num_items,
        plan.num_ranges,
        q.stride(0),
        q.stride(1),
        turned.stride(0),
        turned.stride(1),
        out.stride(0),
        out.stride(1),
        table.stride(0),
        scale_log2,
        HEADS=num_heads,
        BLOCK_HEADS=plan.block_heads,
        BLOCKS=plan.blocks,
        PAIRS=plan.pairs,
        MANY=many,
        TILE=config.tile,
        **latent_sizes(q, turned, scales is not None),
        SHARED=shared is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.registers,
    )
    # many items: mostly there is nothing to merge, and few programs to see that
    group, merge = (16, 1) if many else (1, 16)
    _merge_kernel[(num_items, plan.blocks * plan.pairs // group)](
        plan.lens,
        shared and shared.rows.owns,
        plan.meta,
        plan.begins,
        plan.items,
        plan.partial,
        plan.lse,
        plan.whole_lse,
        shared and shared.pieces,
        shared and shared.num_pieces,
        shared and shared.partial,
        shared and shared.lse,
        out,
        num_items,
        shared.pieces.stride(0) if shared else 0,
        out.stride(0),
        out.stride(1),
        HEADS=num_heads,
        BLOCK_HEADS=plan.block_heads,
        BLOCKS=plan.blocks,
        PAIRS=plan.pairs,
        MANY=many,
        RANK=rank,
        RANK_PAD=padded(rank),
        TILE=config.tile,
        GROUP=group,
        MERGE=merge,
        SHARED=shared is not None,
        num_warps=8 if many else 4,
    )
    return out


def attend_ref(
    q: Tensor,
    turned: Tensor,
    cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    lens: Tensor,
    scale: float,
    items: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """``attend`` in plain torch, fp32 throughout, rounded at the end; tokens of no item are zero.

    Args:
        lanes, lens, items: as given to ``plan_attend``.
    """
    rank, out = q.shape[2], torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    wide = torch.cat([q, turned], dim=2).float()
    for item in range(lens.shape[0]):
        length, first, count = int(lens[item]), item, 1
        if length == 0:
            continue
        if items is not None:
            first, count = int(items[0, item]), int(items[1, item])
        rows = read_ref(cache, scales, table[lanes[item].long(), :length].long())
        scores = torch.einsum("thd,nd->htn", wide[first : first + count], rows) * scale
        position = torch.arange(length, device=q.device)
        hidden = position[None, :] > position[length - count :, None]
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        out[first : first + count] = torch.einsum("htn,nd->thd", weights, rows[:, :rank])
    return out.to(q.dtype)


def _check(
    q: Tensor, turned: Tensor, cache: Tensor, table: Tensor, plan: AttendPlan, out: Tensor
) -> None:
    if not q.dtype == turned.dtype == out.dtype or table.dtype != torch.int32:
        raise ValueError(f"dtypes: q {q.dtype}, turned {turned.dtype}, table {table.dtype}")
    if turned.shape[:2] != q.shape[:2] or out.shape != q.shape:
        raise ValueError(f"q {tuple(q.shape)}, turned {tuple(turned.shape)}, out do not fit")
    if cache.dim() != 2 or cache.shape[1] != q.shape[2] + turned.shape[2]:
        raise ValueError(f"cache {tuple(cache.shape)} does not fit q {tuple(q.shape)}")
    if not cache.is_contiguous():
        raise ValueError("the cache must be contiguous")
    if not 1 == q.stride(2) == turned.stride(2) == out.stride(2) == table.stride(1):
        raise ValueError("the last dimensions of q, turned, out and table must be contiguous")
    if plan.num_heads != q.shape[1] or plan.partial.shape[2] != q.shape[2]:
        raise ValueError(f"the plan is for {plan.num_heads} heads, q has {q.shape[1]}")
    if plan.items is None and plan.lens.shape[0] > q.shape[0]:
        raise ValueError(f"the plan is for {plan.lens.shape[0]} rows, q has {q.shape[0]}")
