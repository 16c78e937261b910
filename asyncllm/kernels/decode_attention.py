"""Attention of one new token per row over K/V gathered by slot (decode).

Owns how the work of a batch is divided among programs; knows neither requests nor layers.

All rows' keys are cut into tiles of a fixed number of tokens. Tiles are numbered row by row, in a
row KV head by KV head, and each program takes an equal, contiguous range of numbers:

    row 0, head 0    row 0, head 1    row 1, head 0 ...
    |--|--|--|--|--| |--|--|--|--|--| |--|--| ...
    [ program 0 ][ program 1 ][ program 2 ] ...

So one long row among short ones delays nobody, and the division is computed on the device from the
lengths alone: the host launches a grid that depends on shapes only. A (row, head) that lies inside
one program is written at once; one that crosses a border leaves at most two fp32 partial results
per program, which the program that finishes last merges (a counter per (row, head) tells it so).
Sources: work split by ranges as in Stream-K (Osama et al., 2023), merge of partial softmax results
as in Flash-Decoding (Dao et al., 2023).
"""

# mypy: allow-incomplete-defs

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.autotune import num_sms, tuned

_MIN_TILES = 2
_HEAD_PAD = 16  # least M of a matrix instruction; the query heads of a KV head are padded to it
_MERGED = 4096  # elements of partial results that are merged at once


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel is built and spread: tile in tokens, programs resident on a multiprocessor,
    and how many such waves are launched. All programs get equal work, so part of a wave would leave
    the device half idle."""

    tile: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    waves: int = 1


# padded head_dim -> configuration. Of num_stages two are spent on the slots, whose load comes before
# that of K and V; with 4 the next tile's loads are in flight while one is worked on (39 KB of shared
# memory at head_dim 128: three programs fit), with 5 there are two tiles (72 KB).
_CONFIGS = {
    64: DecodeConfig(128, 4, 4, 3),
    128: DecodeConfig(64, 4, 4, 3),
    256: DecodeConfig(32, 4, 4, 2),
}


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The division of one step's decode work, and the space its partial results need.

    Made by ``plan_decode`` once per step, used by every layer, one layer after another (the
    layers share ``partial``, ``lse`` and ``counters``). Device tensors only.
    """

    config: DecodeConfig
    num_programs: int
    lens: Tensor  # [num_rows] as given
    meta: Tensor  # [2]: all tiles, tiles per program
    first: Tensor  # [5, num_programs]: record where the program starts: its number, then itself
    records: Tensor  # [4, num_rows]: row, lane, length, first tile of each non-empty row
    counters: Tensor  # [num_rows, num_kv_heads]: pieces done; zero between layers
    partial: Tensor  # [2 * num_programs, group, head_dim] fp32
    lse: Tensor  # [2 * num_programs, group] fp32, base 2


# step metadata lies anywhere in a staging buffer: one build for every alignment
@triton.jit(
    do_not_specialize=["num_rows", "num_programs"],
    do_not_specialize_on_alignment=["lanes_ptr", "lens_ptr"],
)
def _plan_kernel(
    lanes_ptr,
    lens_ptr,
    meta_ptr,
    first_ptr,
    records_ptr,
    counters_ptr,
    num_rows,
    num_programs,
    KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    total = 0
    start = 0
    rank = 0
    for begin in range(0, num_rows, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        tiles = tl.cdiv(tl.load(lens_ptr + other, mask=other < num_rows, other=0), TILE)
        total += tl.sum(tiles, axis=0)
        start += tl.sum(tl.where(other < row, tiles, 0), axis=0)
        rank += tl.sum(((other < row) & (tiles > 0)).to(tl.int32), axis=0)
    total *= KV_HEADS
    start *= KV_HEADS
    per_program = tl.maximum(tl.cdiv(total, num_programs), MIN_TILES)
    if row == 0:
        tl.store(meta_ptr, total)
        tl.store(meta_ptr + 1, per_program)
    head = tl.arange(0, HEADS_PAD)
    tl.store(counters_ptr + row * KV_HEADS + head, 0, mask=head < KV_HEADS)
    length = tl.load(lens_ptr + row)
    if length > 0:
        lane = tl.load(lanes_ptr + row)
        tl.store(records_ptr + rank, row)
        tl.store(records_ptr + num_rows + rank, lane)
        tl.store(records_ptr + 2 * num_rows + rank, length)
        tl.store(records_ptr + 3 * num_rows + rank, start)
        # the programs whose range begins in this row
        stop = tl.cdiv(start + KV_HEADS * tl.cdiv(length, TILE), per_program)
        for begin in range(tl.cdiv(start, per_program), stop, BLOCK):
            program = begin + tl.arange(0, BLOCK)
            zero = tl.zeros_like(program)
            live = program < stop
            tl.store(first_ptr + program, zero + rank, mask=live)
            tl.store(first_ptr + num_programs + program, zero + row, mask=live)
            tl.store(first_ptr + 2 * num_programs + program, zero + lane, mask=live)
            tl.store(first_ptr + 3 * num_programs + program, zero + length, mask=live)
            tl.store(first_ptr + 4 * num_programs + program, zero + start, mask=live)


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
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    GROUP_POW: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
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
    token = tl.arange(0, TILE)
    dim = tl.arange(0, DIM_PAD)
    group = tl.arange(0, GROUP_PAD)
    group_live = (group < GROUP)[:, None] & (dim < DIM)[None, :]

    while tile < stop:
        tiles = tl.cdiv(length, TILE)
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
        best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        norm = tl.zeros([GROUP_PAD], tl.float32)
        acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
        lane_ptr = table_ptr + lane.to(tl.int64) * table_row
        k_head = k_ptr + head * DIM
        v_head = v_ptr + head * DIM
        for begin in range(skipped * TILE, (skipped + count) * TILE, TILE):
            position = begin + token
            seen = position < length
            slot = tl.load(lane_ptr + position, mask=seen, other=0).to(tl.int64)
            offset = slot[:, None] * (KV_HEADS * DIM) + dim[None, :]
            # unread slots may hold NaN, and 0 * NaN would spoil the sum: they are masked out
            if DIM == DIM_PAD:
                live = seen[:, None]
            else:
                live = seen[:, None] & (dim < DIM)[None, :]
            k = tl.load(k_head + offset, mask=live, other=0.0)
            v = tl.load(v_head + offset, mask=live, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            score = tl.where(seen[None, :], score, float("-inf"))
            new_best = tl.maximum(best, tl.max(score, axis=1))
            weight = tl.exp2(score - new_best[:, None])
            shrink = tl.exp2(best - new_best)
            norm = norm * shrink + tl.sum(weight, axis=1)
            acc = acc * shrink[:, None]
            acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
            best = new_best

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
                    out_row_ptr + head * GROUP * out_head, out_head, partial_ptr, lse_ptr,
                    begin_tile, lowest, highest, per_program,
                    GROUP, GROUP_POW, DIM, DIM_PAD, MERGE,
                )  # fmt: skip
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


def plan_decode(
    lanes: Tensor,
    lens: Tensor,
    num_q_heads: int,
    k_cache: Tensor,
    *,
    config: DecodeConfig | None = None,
    num_programs: int | None = None,
) -> DecodePlan:
    """Divide one step's decode attention among programs, on the device.

    Args:
        lanes, lens: [num_rows] int32, as given to ``decode_attention``; read when the plan's
            kernel runs, so a captured plan follows what is in them at each replay.
        num_q_heads: query heads on this device.
        k_cache: [num_slots + 1, num_kv_heads, head_dim] of any layer.
        config: instead of the tuned or built-in one.
        num_programs: instead of the number fitting the device (for tests and tuning).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _, num_kv_heads, head_dim = k_cache.shape
    num_rows = lens.shape[0]
    if lanes.shape != lens.shape or lanes.dtype != torch.int32 or lens.dtype != torch.int32:
        raise ValueError(f"lanes and lens must be [rows] int32, not {lanes.dtype}, {lens.dtype}")
    if num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads} query heads do not divide by {num_kv_heads} KV heads")
    group = num_q_heads // num_kv_heads
    if config is None:
        pairs = num_rows * num_kv_heads
        config = decode_config(head_dim, pairs, k_cache.element_size(), k_cache.device)
    if num_programs is None:
        num_programs = config.waves * config.programs_per_sm * num_sms(k_cache.device)
    device = lens.device
    plan = DecodePlan(
        config=config,
        num_programs=num_programs,
        lens=lens,
        meta=torch.empty(2, dtype=torch.int32, device=device),
        first=torch.empty((5, num_programs), dtype=torch.int32, device=device),
        records=torch.empty((4, num_rows), dtype=torch.int32, device=device),
        counters=torch.empty((num_rows, num_kv_heads), dtype=torch.int32, device=device),
        partial=torch.empty((2 * num_programs, group, head_dim), device=device),
        lse=torch.empty((2 * num_programs, group), device=device),
    )
    if num_rows:
        _plan_kernel[(num_rows,)](
            lanes,
            lens,
            plan.meta,
            plan.first,
            plan.records,
            plan.counters,
            num_rows,
            num_programs,
            KV_HEADS=num_kv_heads,
            HEADS_PAD=triton.next_power_of_2(num_kv_heads),
            TILE=config.tile,
            MIN_TILES=_MIN_TILES,
            BLOCK=256,
            num_warps=4,
        )
    return plan


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    lens: Tensor,
    scale: float,
    *,
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
        plan: from ``plan_decode`` for the same lanes and lens; None computes it here. Layers of a
            step should share one.
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
        plan = plan_decode(lanes, lens, num_q_heads, k_cache)
    group = num_q_heads // num_kv_heads
    if plan.counters.shape != (num_rows, num_kv_heads) or plan.partial.shape[1:] != (
        group,
        head_dim,
    ):
        raise ValueError(f"the plan is for {plan.counters.shape[0]} rows, q has {num_rows}")
    if num_rows == 0:
        return out
    dim_pad = triton.next_power_of_2(head_dim)
    group_pow = triton.next_power_of_2(group)
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
        scale * math.log2(math.e),
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PAD=max(_HEAD_PAD, group_pow),
        GROUP_POW=group_pow,
        DIM=head_dim,
        DIM_PAD=dim_pad,
        TILE=plan.config.tile,
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
) -> Tensor:
    """``decode_attention`` in plain torch, fp32 throughout, rounded at the end."""
    group = q.shape[1] // k_cache.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for row in range(q.shape[0]):
        slots = table[lanes[row].long(), : int(lens[row])].long()
        if slots.numel():
            k = k_cache[slots].float().repeat_interleave(group, dim=1)
            v = v_cache[slots].float().repeat_interleave(group, dim=1)
            weights = torch.einsum("hd,nhd->hn", q[row].float(), k).mul(scale).softmax(-1)
            out[row] = torch.einsum("hn,nhd->hd", weights, v)
    return out.to(q.dtype)


def decode_config(
    head_dim: int, pairs: int, element_size: int, device: torch.device
) -> DecodeConfig:
    """The configuration for a shape with ``pairs`` (row, KV head) pairs: the device's tuned one, for
    few, some or many pairs, or that of the table; half tiles for 4-byte elements.

    Raises:
        ValueError: head_dim is over 256.
    """
    dim_pad = max(64, triton.next_power_of_2(head_dim))
    found = _CONFIGS.get(dim_pad)
    if found is None:
        raise ValueError(f"head_dim {head_dim} is over 256")
    size = "few" if pairs <= 32 else "some" if pairs <= num_sms(device) else "many"
    if entry := tuned(device, "decode", f"{dim_pad} {size}"):
        found = DecodeConfig(**entry)
    if element_size <= 2:
        return found
    return DecodeConfig(found.tile // 2, found.num_warps, 2, found.programs_per_sm, found.waves)


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
