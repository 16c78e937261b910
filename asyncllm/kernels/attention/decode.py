"""Attention of one new token per row over K/V gathered by slot (decode).

How the work is divided is `decode_plan.py`'s.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.decode_plan import (
    DecodeConfig,
    DecodePlan,
    first_tile,
    num_tiles,
    plan_decode,
)
from asyncllm.kernels.attention.scores import capped, scales

_HEAD_PAD = 16  # least M of a matrix instruction; the query heads of a KV head are padded to it
_MERGED = 4096  # elements of partial results that are merged at once


@triton.jit
def _merge(
    out_ptr,
    out_head,
    partial_ptr,
    lse_ptr,
    begin_tile,
    lowest,
    highest,
    per_program,
    GROUP: tl.constexpr,
    GROUP_POW: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Merges the pieces of one (row, head), left by programs lowest..highest, into the output."""
    group = tl.arange(0, GROUP_POW)
    dim = tl.arange(0, DIM_PAD)
    best = tl.full([GROUP_POW], float("-inf"), tl.float32)
    norm = tl.zeros([GROUP_POW], tl.float32)
    acc = tl.zeros([GROUP_POW, DIM_PAD], tl.float32)
    inside = (group < GROUP)[None, :, None] & (dim < DIM)[None, None, :]
    for begin in range(lowest, highest + 1, MERGE):
        program = begin + tl.arange(0, MERGE)
        live = program <= highest
        place = 2 * program + (begin_tile > program * per_program).to(tl.int32)
        part = place.to(tl.int64)[:, None] * GROUP + group[None, :]
        # past the first-level cache, which may hold what an earlier layer left there
        lse = tl.load(
            lse_ptr + part,
            mask=live[:, None] & (group < GROUP)[None, :],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        value = tl.load(
            partial_ptr + part[:, :, None] * DIM + dim[None, None, :],
            mask=live[:, None, None] & inside,
            other=0.0,
            cache_modifier=".cg",
        )
        # heads that only pad the group have no weight: zero and one keep them from being NaN
        new_best = tl.where(group < GROUP, tl.maximum(best, tl.max(lse, axis=0)), 0.0)
        weight = tl.exp2(lse - new_best[None, :])
        shrink = tl.exp2(best - new_best)
        norm = norm * shrink + tl.sum(weight, axis=0)
        acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * value, axis=0)
        best = new_best
    norm = tl.where(group < GROUP, norm, 1.0)
    tl.store(
        out_ptr + group[:, None] * out_head + dim[None, :],
        (acc / norm[:, None]).to(out_ptr.dtype.element_ty),
        mask=(group < GROUP)[:, None] & (dim < DIM)[None, :],
    )


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    lane_ptr,
    begin,
    stop,
    length,
    scale_log2,
    cap_log2,
    SLOT: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Keys [begin, stop) of a row, whole tiles: sum of values, best score, sum of weights."""
    token = tl.arange(0, TILE)
    dim = tl.arange(0, DIM_PAD)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    norm = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for tile in range(begin, stop, TILE):
        position = tile + token
        seen = position < length
        if WINDOW:
            seen = seen & (position >= length - WINDOW)
        slot = tl.load(lane_ptr + position, mask=seen, other=0).to(tl.int64)
        offset = slot[:, None] * SLOT + dim[None, :]
        # unread slots may hold NaN, and 0 * NaN would spoil the sum: they are masked out
        if DIM == DIM_PAD:
            live = seen[:, None]
        else:
            live = seen[:, None] & (dim < DIM)[None, :]
        k = tl.load(k_ptr + offset, mask=live, other=0.0)
        v = tl.load(v_ptr + offset, mask=live, other=0.0)
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


@triton.jit(
    do_not_specialize=["num_rows", "num_programs"], do_not_specialize_on_alignment=["lens_ptr"]
)
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lens_ptr,
    meta_ptr,
    first_ptr,
    records_ptr,
    counters_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    num_rows,
    num_programs,
    q_row,
    q_head,
    out_row,
    out_head,
    table_row,
    scale_log2,
    cap_log2,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    GROUP_POW: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    MERGE: tl.constexpr,
):
    program = tl.program_id(0)
    total = tl.load(meta_ptr)
    per_program = tl.load(meta_ptr + 1)
    # of a program without work these are undefined, and unused
    record = tl.load(first_ptr + program)
    row = tl.load(first_ptr + num_programs + program)
    lane = tl.load(first_ptr + 2 * num_programs + program)
    length = tl.load(first_ptr + 3 * num_programs + program)
    start = tl.load(first_ptr + 4 * num_programs + program)
    tile = program * per_program
    stop = tl.minimum(tile + per_program, total)
    dim = tl.arange(0, DIM_PAD)
    group = tl.arange(0, GROUP_PAD)
    group_live = (group < GROUP)[:, None] & (dim < DIM)[None, :]

    while tile < stop:
        tiles = num_tiles(length, TILE, WINDOW)
        head = (tile - start) // tiles
        skipped = (tile - start) - head * tiles
        count = tl.minimum(tiles - skipped, stop - tile)
        heads = head * GROUP + group
        # what comes after this row, read early
        following = record + ((skipped + count == tiles) & (head == KV_HEADS - 1)).to(tl.int32)
        known = following < num_rows
        next_row = tl.load(records_ptr + following, mask=known, other=0)
        next_lane = tl.load(records_ptr + num_rows + following, mask=known, other=0)
        next_length = tl.load(records_ptr + 2 * num_rows + following, mask=known, other=0)
        next_start = tl.load(records_ptr + 3 * num_rows + following, mask=known, other=0)

        q = tl.load(
            q_ptr + row.to(tl.int64) * q_row + heads[:, None] * q_head + dim[None, :],
            mask=group_live,
            other=0.0,
        )
        begin = first_tile(length, TILE, WINDOW) + skipped
        acc, best, norm = _attend(
            q,
            k_ptr + head * DIM,
            v_ptr + head * DIM,
            table_ptr + lane.to(tl.int64) * table_row,
            begin * TILE,
            (begin + count) * TILE,
            length,
            scale_log2,
            cap_log2,
            KV_HEADS * DIM,
            GROUP_PAD,
            DIM,
            DIM_PAD,
            TILE,
            WINDOW,
            CAPPED,
        )
        acc = acc / norm[:, None]
        out_row_ptr = out_ptr + row.to(tl.int64) * out_row
        if count == tiles:
            tl.store(
                out_row_ptr + heads[:, None] * out_head + dim[None, :],
                acc.to(out_ptr.dtype.element_ty),
                mask=group_live,
            )
        else:
            # a program's first piece goes to its even place, a last one that goes on to its odd one
            place = 2 * program + (tile - skipped > program * per_program).to(tl.int32)
            part = (place * GROUP + group).to(tl.int64)
            tl.store(partial_ptr + part[:, None] * DIM + dim[None, :], acc, mask=group_live)
            tl.store(lse_ptr + part, best + tl.log2(norm), mask=group < GROUP)
            begin_tile = tile - skipped
            lowest = begin_tile // per_program
            highest = (begin_tile + tiles - 1) // per_program
            counter = counters_ptr + row.to(tl.int64) * KV_HEADS + head
            tl.debug_barrier()  # all threads have stored before one of them says so
            before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if before == highest - lowest:
                _merge(
                    out_row_ptr + head * GROUP * out_head,
                    out_head,
                    partial_ptr,
                    lse_ptr,
                    begin_tile,
                    lowest,
                    highest,
                    per_program,
                    GROUP,
                    GROUP_POW,
                    DIM,
                    DIM_PAD,
                    MERGE,
                )
                tl.store(counter, 0)  # for the next layer
        tile += count
        record = following
        row = next_row
        lane = next_lane
        length = next_length
        start = next_start

    for empty in range(program, num_rows, num_programs):
        if tl.load(lens_ptr + empty) == 0:
            for head in range(KV_HEADS):
                heads = head * GROUP + group
                tl.store(
                    out_ptr
                    + tl.cast(empty, tl.int64) * out_row
                    + heads[:, None] * out_head
                    + dim[None, :],
                    tl.zeros([GROUP_PAD, DIM_PAD], out_ptr.dtype.element_ty),
                    mask=group_live,
                )


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    lens: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    plan: DecodePlan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One-token attention over K/V in token slots.

    Args:
        q: [num_rows, num_q_heads, head_dim]; may be a view into packed qkv.
        k_cache, v_cache: [num_slots + 1, num_kv_heads, head_dim], contiguous, dtype of q.
        table: [num_lanes, max_len] int32: slot of each position; entries past a row's length are
            never read.
        lanes: [num_rows] int32, lane of each row.
        lens: [num_rows] int32, tokens per row with the current one; 0 marks a padding row.
        scale: multiplies q·k, usually head_dim ** -0.5.
        window: tokens that a row attends to at most, its last ones; None: all. What the table
            says of positions before them is not used.
        softcap: scores become softcap * tanh(score / softcap).
        plan: from ``plan_decode`` for the same lanes, lens and window; None computes it here.
            Layers of a step should share one.
        out: where to write, like the result; last dimension contiguous.

    Returns:
        [num_rows, num_q_heads, head_dim]; padding rows are zero.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``decode_attention_ref``. Does not synchronise; safe in CUDA graphs.
    """
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    _check(q, k_cache, v_cache, table)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or out.stride(2) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit q {tuple(q.shape)}")
    if plan is None:
        plan = plan_decode(lanes, lens, num_q_heads, k_cache, window=window)
    group = num_q_heads // num_kv_heads
    if plan.counters.shape != (num_rows, num_kv_heads) or plan.partial.shape[1:] != (
        group,
        head_dim,
    ):
        raise ValueError(f"the plan is for {plan.counters.shape[0]} rows, q has {num_rows}")
    if plan.window != window:
        raise ValueError(f"the plan is for a window of {plan.window}, not {window}")
    if num_rows == 0:
        return out
    dim_pad = triton.next_power_of_2(head_dim)
    group_pow = triton.next_power_of_2(group)
    scale_log2, cap_log2 = scales(scale, softcap)
    _decode_kernel[(plan.num_programs,)](
        q,
        k_cache,
        v_cache,
        table,
        plan.lens,
        plan.meta,
        plan.first,
        plan.records,
        plan.counters,
        out,
        plan.partial,
        plan.lse,
        num_rows,
        plan.num_programs,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        table.stride(0),
        scale_log2,
        cap_log2,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PAD=max(_HEAD_PAD, group_pow),
        GROUP_POW=group_pow,
        DIM=head_dim,
        DIM_PAD=dim_pad,
        TILE=plan.config.tile,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        MERGE=max(1, _MERGED // (group_pow * dim_pad)),
        num_warps=plan.config.num_warps,
        num_stages=plan.config.num_stages,
        maxnreg=_registers(plan.config),
    )
    return out


def decode_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    lens: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``decode_attention`` in plain torch, fp32 throughout, rounded at the end."""
    group = q.shape[1] // k_cache.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for row in range(q.shape[0]):
        length = int(lens[row])
        first = 0 if window is None else max(length - window, 0)
        slots = table[lanes[row].long(), first:length].long()
        if slots.numel():
            k = k_cache[slots].float().repeat_interleave(group, dim=1)
            v = v_cache[slots].float().repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,nhd->hn", q[row].float(), k) * scale
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            out[row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), v)
    return out.to(q.dtype)


def _registers(config: DecodeConfig) -> int:
    """Registers of a thread that let ``programs_per_sm`` programs be resident: of 65536, in eights.
    Merging would take more, and halve what is in flight for the sake of its few microseconds."""
    return min(255, 65536 // (config.programs_per_sm * config.num_warps * 32) // 8 * 8)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor) -> None:
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
