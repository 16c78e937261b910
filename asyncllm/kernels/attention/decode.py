"""Attention of one new token per row over K/V gathered by slot (decode).

`decode_plan.py` decides how the work is divided.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.decode_keys import attend
from asyncllm.kernels.attention.decode_plan import (
    DecodeConfig,
    DecodePlan,
    decode_config,
    first_tile,
    num_tiles,
    plan_decode,
)
from asyncllm.kernels.attention.kv8 import KINDS, num_scales, packed_scales, read_ref
from asyncllm.kernels.attention.scores import padded, to_log2
from asyncllm.kernels.attention.shared import attend_shared
from asyncllm.kernels.attention.shared_rows import SharedRows
from asyncllm.kernels.autotune import launches_early
from asyncllm.kernels.early import launched_early, let_next, waited

_HEAD_PAD = 16  # least M of a matrix instruction; the query heads of a KV head are padded to it
_SHORT = tl.constexpr(4)  # tiles of a program with few keys
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
    share,
    head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_POW: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Merges the pieces of one (row, head), left by ranges lowest..highest, into the output."""
    group = tl.arange(0, GROUP_POW)
    dim = tl.arange(0, DIM_PAD)
    best = tl.full([GROUP_POW], float("-inf"), tl.float32)
    norm = tl.zeros([GROUP_POW], tl.float32)
    acc = tl.zeros([GROUP_POW, DIM_PAD], tl.float32)
    inside = (group < GROUP)[None, :, None] & (dim < DIM)[None, None, :]
    for begin in range(lowest, highest + 1, MERGE):
        index = begin + tl.arange(0, MERGE)
        live = index <= highest
        place = 2 * (index * HEADS + head) + (begin_tile > index * share).to(tl.int32)
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
def _record(ptr, num, index, known, SHARED: tl.constexpr):
    """Row, lane and length of a record, and the first token that the row reads by itself."""
    row = tl.load(ptr + index, mask=known, other=0)
    lane = tl.load(ptr + num + index, mask=known, other=0)
    length = tl.load(ptr + 2 * num + index, mask=known, other=0)
    own = row * 0
    if SHARED:
        own = tl.load(ptr + 3 * num + index, mask=known, other=0)
    return row, lane, length, own


@triton.jit
def _join(
    acc,
    best,
    norm,
    pieces_ptr,
    num_pieces,
    at,
    lse_at,
    inside,
    Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
):
    """Adds what a row reads together with others to the sums over its own keys. A partial result
    has ``Q_HEADS`` heads; the row's would be ``at`` and ``lse_at`` if it were the first."""
    live = tl.arange(0, acc.shape[0]) < GROUP
    # said here, since only loops with matrix instructions are pipelined unasked
    for i in tl.range(0, num_pieces, num_stages=3):
        part = tl.load(pieces_ptr + i).to(tl.int64) * Q_HEADS
        # past the first-level cache, as in _merge
        lse = tl.load(lse_at + part, mask=live, other=float("-inf"), cache_modifier=".cg")
        value = tl.load(at + part * DIM, mask=inside, other=0.0, cache_modifier=".cg")
        new_best = tl.maximum(best, lse)
        weight = tl.exp2(lse - new_best)
        shrink = tl.exp2(best - new_best)
        norm = norm * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * value
        best = new_best
    return acc, best, norm


@triton.jit(
    do_not_specialize=["num_rows", "num_ranges", "pieces_row"],
    do_not_specialize_on_alignment=["lens_ptr"],
)
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    scales_ptr,
    table_ptr,
    lens_ptr,
    meta_ptr,
    first_ptr,
    records_ptr,
    counters_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    pieces_ptr,
    num_pieces_ptr,
    shared_ptr,
    shared_lse_ptr,
    num_rows,
    num_ranges,
    pieces_row,
    q_row,
    q_head,
    out_row,
    out_head,
    table_row,
    scale_log2,
    cap_log2,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    GROUP_POW: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALES: tl.constexpr,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    MERGE: tl.constexpr,
    SHARED: tl.constexpr,
    EARLY: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % HEADS
    index = program // HEADS
    waited(EARLY)
    total, share = tl.load(meta_ptr), tl.load(meta_ptr + 1)
    # of a range without work these are undefined, and unused
    record = tl.load(first_ptr + index)
    row, lane, length, own = _record(first_ptr + num_ranges, num_ranges, index, index >= 0, SHARED)
    start = tl.load(first_ptr + 5 * num_ranges + index)
    tile = index * share
    stop = tl.minimum(tile + share, total)
    let_next(share <= _SHORT, EARLY)  # after many keys, what it asks for would be gone again
    dim, group = tl.arange(0, DIM_PAD), tl.arange(0, GROUP_PAD)
    heads = head * GROUP + group
    group_live = (group < GROUP)[:, None] & (dim < DIM)[None, :]

    while tile < stop:
        tiles, skipped = num_tiles(length, TILE, WINDOW), tile - start
        count = tl.minimum(tiles - skipped, stop - tile)
        # what comes after this row, read early
        record += 1
        next_row, next_lane, next_length, next_own = _record(
            records_ptr, num_rows, record, record < num_rows, SHARED
        )
        q_at = q_ptr + row.to(tl.int64) * q_row + heads[:, None] * q_head + dim[None, :]
        q = tl.load(q_at, mask=group_live, other=0.0)
        begin = first_tile(length, TILE, WINDOW) + skipped
        acc, best, norm = attend(
            q,
            k_ptr,
            v_ptr,
            scales_ptr,
            table_ptr + lane.to(tl.int64) * table_row + own,
            head // (HEADS // KV_HEADS),
            begin * TILE,
            (begin + count) * TILE,
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
            STAGES,
        )
        if SHARED and skipped == 0:
            pieces = pieces_ptr + row.to(tl.int64) * pieces_row
            num = tl.load(num_pieces_ptr + row)
            at, lse_at = shared_ptr + heads[:, None] * DIM + dim[None, :], shared_lse_ptr + heads
            acc, best, norm = _join(
                acc, best, norm, pieces, num, at, lse_at, group_live, HEADS * GROUP, GROUP, DIM
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
            place = 2 * program + (start > index * share).to(tl.int32)
            part = (place * GROUP + group).to(tl.int64)
            tl.store(partial_ptr + part[:, None] * DIM + dim[None, :], acc, mask=group_live)
            tl.store(lse_ptr + part, best + tl.log2(norm), mask=group < GROUP)
            lowest, highest = start // share, (start + tiles - 1) // share
            counter = counters_ptr + row.to(tl.int64) * HEADS + head
            tl.debug_barrier()  # all threads have stored before one of them says so
            before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if before == highest - lowest:
                _merge(
                    out_row_ptr + head * GROUP * out_head,
                    out_head,
                    partial_ptr,
                    lse_ptr,
                    start,
                    lowest,
                    highest,
                    share,
                    head,
                    HEADS,
                    GROUP,
                    GROUP_POW,
                    DIM,
                    DIM_PAD,
                    MERGE,
                )
                tl.store(counter, 0)  # for the next layer
        tile += count
        start += tiles
        row, lane, length, own = next_row, next_lane, next_length, next_own

    for empty in range(index, num_rows, num_ranges):
        if tl.load(lens_ptr + empty) == 0:
            empty_ptr = out_ptr + tl.cast(empty, tl.int64) * out_row
            nothing = tl.zeros([GROUP_PAD, DIM_PAD], out_ptr.dtype.element_ty)
            tl.store(empty_ptr + heads[:, None] * out_head + dim[None, :], nothing, mask=group_live)


@triton.jit(do_not_specialize_on_alignment=["lanes_ptr", "lens_ptr"])
def _whole_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    scales_ptr,
    table_ptr,
    lanes_ptr,
    lens_ptr,
    out_ptr,
    q_row,
    q_head,
    out_row,
    out_head,
    table_row,
    scale_log2,
    cap_log2,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
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
    EARLY: tl.constexpr,
):
    """A program for each row and head, in a single pass."""
    waited(EARLY)
    head = tl.program_id(0) % HEADS
    row = tl.program_id(0) // HEADS
    lane = tl.load(lanes_ptr + row).to(tl.int64)
    length = tl.load(lens_ptr + row)
    dim = tl.arange(0, DIM_PAD)
    group = tl.arange(0, GROUP_PAD)
    heads = head * GROUP + group
    group_live = (group < GROUP)[:, None] & (dim < DIM)[None, :]
    kv_head = head // (HEADS // KV_HEADS)
    q_at = q_ptr + row.to(tl.int64) * q_row + heads[:, None] * q_head + dim[None, :]
    acc, _, norm = attend(
        tl.load(q_at, mask=group_live, other=0.0),
        k_ptr,
        v_ptr,
        scales_ptr,
        table_ptr + lane * table_row,
        kv_head,
        first_tile(length, TILE, WINDOW) * TILE,
        length,
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
        STAGES,
    )
    # a padding row has no keys: its output is zero
    acc = acc / tl.where(length > 0, norm, 1.0)[:, None]
    out_at = out_ptr + row.to(tl.int64) * out_row + heads[:, None] * out_head + dim[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=group_live)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    lens: Tensor,
    scale: float,
    *,
    scales: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    grouped: bool = True,
    split: bool = True,
    shared: SharedRows | None = None,
    plan: DecodePlan | None = None,
    config: DecodeConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One-token attention over K/V in token slots.

    Args:
        q: [num_rows, num_q_heads, head_dim]; may be a view into packed qkv.
        k_cache, v_cache: [num_slots + 1, num_kv_heads, head_dim], contiguous, dtype of q, or int8
            or float8_e4m3fn.
        table: [num_lanes, max_len] int32: slot of each position; entries past a row's length are
            never read.
        lanes: [num_rows] int32, lane of each row.
        lens: [num_rows] int32, tokens per row with the current one; 0 marks a padding row.
        scale: multiplies q·k, usually head_dim ** -0.5.
        scales: of caches in 8 bits, as ``rope_kv`` writes them.
        window: a row attends to at most this many of its last tokens; None: all. What the table
            says of positions before them is not used.
        softcap: scores become softcap * tanh(score / softcap).
        grouped: a program attends with all query heads of a KV head; else with one, and without
            matrix instructions.
        split: a row's keys may be divided among programs; else a program has a whole row, and
            there is no plan.
        shared: rows with the same first slots, which are read once for all of them; the result is
            the same but for rounding.
        plan: from ``plan_decode`` for the same lanes, lens, window, ``grouped`` and ``shared``;
            None computes it here. Layers of a step should share one.
        config: where nothing is split, instead of the tuned or built-in one.
        out: where to write, like the result; last dimension contiguous.

    Returns:
        [num_rows, num_q_heads, head_dim]; padding rows are zero.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``decode_attention_ref``. Does not synchronise; safe in CUDA graphs.
    """
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    per_head = _check(q, k_cache, v_cache, table, scales)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or out.stride(2) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit q {tuple(q.shape)}")
    num_heads = num_kv_heads if grouped else num_q_heads
    group = num_q_heads // num_heads
    if split:
        if plan is None:
            plan = plan_decode(
                lanes, lens, num_q_heads, k_cache, window=window, grouped=grouped, shared=shared
            )
        _check_plan(plan, (num_rows, num_heads, group, head_dim), window)
        config = plan.config
    elif config is None:
        config = decode_config(k_cache, num_rows * num_heads, grouped=grouped, split=False)
    if num_rows == 0:
        return out
    pairs = grouped and per_head > 0  # of 8-bit numbers, whose products have half the elements
    dim_pad = 2 * padded(head_dim // 2) if pairs else padded(head_dim)
    group_pow = triton.next_power_of_2(group)
    scale_log2, cap_log2 = to_log2(scale, softcap)
    early = launches_early(q.device, "decode attention")
    sizes = {
        "HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "GROUP": group,
        "GROUP_PAD": max(_HEAD_PAD, group_pow) if grouped else 1,
        "DIM": head_dim,
        "DIM_PAD": dim_pad,
        "TILE": config.tile,
        "WINDOW": window or 0,
        "CAPPED": softcap is not None,
        "SCALES": per_head,
        "KIND": KINDS.get(k_cache.dtype, 0),
        "ASM": q.device.type != "cpu" and q.element_size() == 2,  # the interpreter knows none
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": _registers(config),
        "EARLY": early,
        **launched_early(early, q),
    }
    strides = (*q.stride()[:2], *out.stride()[:2], table.stride(0))
    together = plan and plan.shared
    if together:
        attend_shared(
            together, q, k_cache, v_cache, table, lanes, scales, per_head, (scale_log2, cap_log2)
        )
    if pairs:
        k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
    caches = (q, k_cache, v_cache, packed_scales(scales), table)
    if plan is None:
        _whole_kernel[(num_rows * num_heads,)](
            *caches, lanes, lens, out, *strides, scale_log2, cap_log2, **sizes
        )
        return out
    _decode_kernel[(plan.num_ranges * num_heads,)](
        *caches,
        plan.lens,
        plan.meta,
        plan.first,
        plan.records,
        plan.counters,
        out,
        plan.partial,
        plan.lse,
        together and together.pieces,
        together and together.num_pieces,
        together and together.partial,
        together and together.lse,
        num_rows,
        plan.num_ranges,
        together.pieces.stride(0) if together else 0,
        *strides,
        scale_log2,
        cap_log2,
        GROUP_POW=group_pow,
        MERGE=max(1, _MERGED // (group_pow * dim_pad)),
        SHARED=together is not None,
        **sizes,
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
    scales: Tensor | None = None,
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
            k, v = (
                x.repeat_interleave(group, dim=1) for x in read_ref(k_cache, v_cache, scales, slots)
            )
            scores = torch.einsum("hd,nhd->hn", q[row].float(), k) * scale
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            out[row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), v)
    return out.to(q.dtype)


def _registers(config: DecodeConfig) -> int:
    """Registers of a thread that let ``programs_per_sm`` programs be resident: of 65536, in eights.
    Merging would take more, and halve what is in flight for the sake of its few microseconds."""
    return min(255, 65536 // (config.programs_per_sm * config.num_warps * 32) // 8 * 8)


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, scales: Tensor | None
) -> int:
    """How many scales a head has; 0: K/V are in the type of q."""
    if k_cache.dtype != v_cache.dtype or table.dtype != torch.int32:
        raise ValueError(f"dtypes: K {k_cache.dtype}, V {v_cache.dtype}, table {table.dtype}")
    if k_cache.shape != v_cache.shape or k_cache.shape[2] != q.shape[2]:
        raise ValueError(f"caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)} do not fit q")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("caches must be contiguous")
    if q.stride(2) != 1 or table.stride(1) != 1:
        raise ValueError("the last dimensions of q and table must be contiguous")
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide by {k_cache.shape[1]} KV heads")
    return num_scales(k_cache, scales, q.dtype)


def _check_plan(plan: DecodePlan, sizes: tuple[int, int, int, int], window: int | None) -> None:
    num_rows, num_heads, group, head_dim = sizes
    if plan.counters.shape != (num_rows, num_heads) or plan.partial.shape[1:] != (group, head_dim):
        raise ValueError(
            f"the plan is for {plan.counters.shape[0]} rows of {plan.counters.shape[1]} heads, "
            f"not {num_rows} of {num_heads}"
        )
    if plan.window != window:
        raise ValueError(f"the plan is for a window of {plan.window}, not {window}")
