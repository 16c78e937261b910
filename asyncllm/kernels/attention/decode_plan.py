"""Divides a decode step's attention among programs, on the device.

Knows lengths, tiles and ranges; knows neither requests nor layers.

All rows' keys are cut into tiles of a fixed number of tokens. Tiles are numbered row by row, and
each program takes an equal, contiguous range of numbers, in one head:

    row 0            row 1   row 2 ...
    |--|--|--|--|--| |--|--| |--|--|--| ...
    [ range 0  ][ range 1 ][ range 2 ] ...       the same for head 0, head 1, head 2 ...

Programs of one range follow one another, so that they run at the same time and find in the cache
what heads share: slot numbers, scales, pages of memory. A head is a KV head with all its query
heads, or one query head.

So one long row among short ones delays nobody, and the division is computed on the device from the
lengths alone: the host launches a grid that depends on shapes only. With a sliding window a row has
only the tiles that its window touches. A (row, head) that lies inside
one program is written at once; one that crosses a border leaves at most two fp32 partial results
per program, which the program that finishes last merges (a counter per (row, head) tells it so).
Sources: work split by ranges as in Stream-K (Osama et al., 2023), merge of partial softmax results
as in Flash-Decoding (Dao et al., 2023).
"""

# mypy: allow-incomplete-defs

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.kv8 import KIND_NAMES
from asyncllm.kernels.attention.shared import (
    SharedConfig,
    SharedPlan,
    divided,
    items_of,
    longest_split,
    plan_shared,
)
from asyncllm.kernels.attention.shared_rows import MAX_GROUPS, SharedRows
from asyncllm.kernels.autotune import num_sms, tuned

_MIN_TILES = 2


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


# padded head_dim -> configuration. Of num_stages two are spent on the slots, whose load comes
# before that of K and V; with 4 the next tile's loads are in flight while one is worked on (39 KB
# of shared memory at head_dim 128: three programs fit), with 5 there are two tiles (72 KB).
_CONFIGS = {
    64: DecodeConfig(128, 4, 4, 3),
    128: DecodeConfig(64, 4, 4, 3),
    256: DecodeConfig(32, 4, 4, 2),
}
# the same over K/V in 8 bits: half the bytes are in flight for each program, so there are more; of
# one warp, since instructions set the time and warps that wait for one another issue none
_EIGHT_BITS = {
    64: DecodeConfig(128, 4, 4, 4),
    128: DecodeConfig(64, 1, 4, 8),
    256: DecodeConfig(32, 4, 4, 3),
}
# the same for one query head a program, which keeps sums for each place of a tile: one warp each,
# since what is summed over a tile would have to wait for others
_LONE = {
    64: DecodeConfig(32, 1, 4, 8),
    128: DecodeConfig(16, 1, 4, 8),
    256: DecodeConfig(8, 1, 4, 8),
}


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The division of one step's decode work, and the space its partial results need.

    Made by ``plan_decode`` once per step, used by every layer, one layer after another (the
    layers share ``partial``, ``lse`` and ``counters``). Device tensors only.
    """

    config: DecodeConfig
    num_ranges: int  # and as many programs for each head
    window: int | None  # tokens that a row attends to at most
    lens: Tensor  # [num_rows] as given
    meta: Tensor  # [2]: all tiles of a head, tiles per range
    first: (
        Tensor  # [6, num_ranges]: record where the range starts: its number, itself, its first tile
    )
    # [4, num_rows]: row, lane, length of each non-empty row, and the first token that it reads
    # itself: those before are in ``shared``, and do not count in the length
    records: Tensor
    counters: Tensor  # [num_rows, num_heads]: pieces done; zero between layers
    partial: Tensor  # [2 * num_ranges * num_heads, group, head_dim] fp32
    lse: Tensor  # [2 * num_ranges * num_heads, group] fp32, base 2
    shared: SharedPlan | None  # what rows read together; None: each reads all that is its own


@triton.jit
def first_tile(length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The first tile of a row of ``length`` that it sees anything of; WINDOW 0 is none."""
    tile = length * 0
    if WINDOW:
        tile = tl.maximum(length - WINDOW, 0) // TILE
    return tile


@triton.jit
def num_tiles(length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Of a row of ``length``, from the first tile that it sees anything of."""
    return tl.cdiv(length, TILE) - first_tile(length, TILE, WINDOW)


# step metadata lies anywhere in a staging buffer: one build for every alignment
@triton.jit(
    do_not_specialize=["num_rows", "num_ranges", "pieces_row", "target"],
    do_not_specialize_on_alignment=[
        *("lanes_ptr", "lens_ptr", "owns_ptr", "places_ptr", "groups_ptr")
    ],
)
def _plan_kernel(
    lanes_ptr,
    lens_ptr,
    meta_ptr,
    first_ptr,
    records_ptr,
    counters_ptr,
    owns_ptr,
    places_ptr,
    groups_ptr,
    pieces_ptr,
    num_pieces_ptr,
    num_rows,
    num_ranges,
    pieces_row,
    target,
    NUM_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0)
    total = 0
    start = 0
    rank = 0
    for begin in range(0, num_rows, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        length = tl.load(lens_ptr + other, mask=other < num_rows, other=0)
        if GROUPS:
            length -= tl.load(owns_ptr + other, mask=other < num_rows, other=0)
        tiles = num_tiles(length, TILE, WINDOW)
        total += tl.sum(tiles, axis=0)
        start += tl.sum(tl.where(other < row, tiles, 0), axis=0)
        rank += tl.sum(((other < row) & (tiles > 0)).to(tl.int32), axis=0)
    share = tl.maximum(tl.cdiv(total, num_ranges), MIN_TILES)
    if row == 0:
        tl.store(meta_ptr, total)
        tl.store(meta_ptr + 1, share)
    head = tl.arange(0, HEADS_PAD)
    tl.store(counters_ptr + row * NUM_HEADS + head, 0, mask=head < NUM_HEADS)
    length = tl.load(lens_ptr + row)
    own = 0
    if GROUPS:
        own = tl.load(owns_ptr + row)
        length -= own
        _find_pieces(
            tl.load(places_ptr + row),
            groups_ptr,
            pieces_ptr + row * pieces_row,
            num_pieces_ptr + row,
            target,
            ROWS,
            BLOCK_N,
            MIN_SPLIT,
            GROUPS,
        )
    if length > 0:
        lane = tl.load(lanes_ptr + row)
        tl.store(records_ptr + rank, row)
        tl.store(records_ptr + num_rows + rank, lane)
        tl.store(records_ptr + 2 * num_rows + rank, length)
        tl.store(records_ptr + 3 * num_rows + rank, own)
        # the ranges that begin in this row
        stop = tl.cdiv(start + num_tiles(length, TILE, WINDOW), share)
        for begin in range(tl.cdiv(start, share), stop, BLOCK):
            index = begin + tl.arange(0, BLOCK)
            zero = tl.zeros_like(index)
            live = index < stop
            tl.store(first_ptr + index, zero + rank, mask=live)
            tl.store(first_ptr + num_ranges + index, zero + row, mask=live)
            tl.store(first_ptr + 2 * num_ranges + index, zero + lane, mask=live)
            tl.store(first_ptr + 3 * num_ranges + index, zero + length, mask=live)
            tl.store(first_ptr + 4 * num_ranges + index, zero + own, mask=live)
            tl.store(first_ptr + 5 * num_ranges + index, zero + start, mask=live)


@triton.jit
def _find_pieces(
    place,
    groups_ptr,
    pieces_ptr,
    num_pieces_ptr,
    target,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Where the partial results of the groups that a row at ``place`` is in will be."""
    most = longest_split(groups_ptr, target, ROWS, BLOCK_N, MIN_SPLIT, GROUPS)
    items = items_of(groups_ptr, most, ROWS, BLOCK_N, GROUPS)
    before = tl.cumsum(items, axis=0) - items
    group = tl.arange(0, GROUPS)
    begin = tl.load(groups_ptr + group)
    stop = tl.load(groups_ptr + GROUPS + group)
    member = place - tl.load(groups_ptr + 2 * GROUPS + group)
    inside = (member >= 0) & (member < tl.load(groups_ptr + 3 * GROUPS + group)) & (place >= 0)
    _, splits = divided(begin, stop, most, BLOCK_N)
    splits = tl.where(inside, splits, 0)
    offset = tl.cumsum(splits, axis=0) - splits
    where = (before + member // ROWS * splits) * ROWS + member % ROWS
    for split in range(tl.max(splits, axis=0)):
        tl.store(pieces_ptr + offset + split, where + split * ROWS, mask=split < splits)
    tl.store(num_pieces_ptr, tl.sum(splits, axis=0))


def plan_decode(
    lanes: Tensor,
    lens: Tensor,
    num_q_heads: int,
    k_cache: Tensor,
    *,
    window: int | None = None,
    grouped: bool = True,
    shared: SharedRows | None = None,
    config: DecodeConfig | None = None,
    shared_config: SharedConfig | None = None,
    num_programs: int | None = None,
) -> DecodePlan:
    """Divide one step's decode attention among programs, on the device.

    Args:
        lanes, lens: [num_rows] int32, as given to ``decode_attention``; read when the plan's
            kernel runs, so a captured plan follows what is in them at each replay.
        num_q_heads: query heads on this device.
        k_cache: [num_slots + 1, num_kv_heads, head_dim] of any layer.
        window: tokens that a row attends to at most, its last ones; None: all.
        grouped: a program attends with all query heads of a KV head; else with one.
        shared: rows with the same first slots, which are read once for all of them; like lens
            read at each replay. Only for grouped ones without a window.
        config, shared_config: instead of the tuned or built-in ones.
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
    if shared is not None and (window is not None or not grouped):
        raise ValueError("rows share slots only where a program has all heads and sees all tokens")
    num_heads = num_kv_heads if grouped else num_q_heads
    if config is None:
        config = decode_config(k_cache, num_rows * num_heads, grouped=grouped)
    if num_programs is None:
        num_programs = config.waves * config.programs_per_sm * num_sms(k_cache.device)
    num_ranges = max(1, num_programs // num_heads)
    num_programs = num_ranges * num_heads
    device, group = lens.device, num_q_heads // num_heads
    plan = DecodePlan(
        config=config,
        num_ranges=num_ranges,
        window=window,
        lens=lens,
        meta=torch.empty(2, dtype=torch.int32, device=device),
        first=torch.empty((6, num_ranges), dtype=torch.int32, device=device),
        records=torch.empty((4, num_rows), dtype=torch.int32, device=device),
        counters=torch.empty((num_rows, num_heads), dtype=torch.int32, device=device),
        partial=torch.empty((2 * num_programs, group, head_dim), device=device),
        lse=torch.empty((2 * num_programs, group), device=device),
        shared=None if shared is None else plan_shared(shared, num_q_heads, k_cache, shared_config),
    )
    if num_rows:
        together = plan.shared
        _plan_kernel[(num_rows,)](
            lanes,
            lens,
            plan.meta,
            plan.first,
            plan.records,
            plan.counters,
            shared and shared.owns,
            shared and shared.places,
            shared and shared.groups,
            together and together.pieces,
            together and together.num_pieces,
            num_rows,
            num_ranges,
            together.pieces.stride(0) if together else 0,
            together.target if together else 1,
            NUM_HEADS=num_heads,
            HEADS_PAD=triton.next_power_of_2(num_heads),
            TILE=config.tile,
            WINDOW=window or 0,
            MIN_TILES=_MIN_TILES,
            BLOCK=256,
            ROWS=together.config.block_m // group if together else 1,
            BLOCK_N=together.config.block_n if together else 1,
            MIN_SPLIT=together.config.min_tiles if together else 1,
            GROUPS=MAX_GROUPS if together else 0,
            num_warps=4,
        )
    return plan


def decode_config(
    k_cache: Tensor, pairs: int, *, grouped: bool = True, split: bool = True
) -> DecodeConfig:
    """The configuration for ``pairs`` (row, head) pairs over such a cache: the device's tuned one,
    for few, some or many pairs, or that of the table; half tiles for 4-byte elements.

    Raises:
        ValueError: head_dim is over 256.
    """
    head_dim, device = k_cache.shape[2], k_cache.device
    dim_pad = max(64, triton.next_power_of_2(head_dim))
    kind = KIND_NAMES.get(k_cache.dtype, "")
    found = ((_EIGHT_BITS if kind else _CONFIGS) if grouped else _LONE).get(dim_pad)
    if found is None:
        raise ValueError(f"head_dim {head_dim} is over 256")
    size = "few" if pairs <= 32 else "some" if pairs <= num_sms(device) else "many"
    way = f"{'' if split else ' whole'}{'' if grouped else ' lone'}"
    if entry := tuned(device, "decode", f"{dim_pad} {size}{kind}{way}"):
        found = DecodeConfig(**entry)
    if k_cache.element_size() <= 2:
        return found
    return replace(found, tile=found.tile // 2, num_stages=2)
