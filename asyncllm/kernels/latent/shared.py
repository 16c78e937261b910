"""Attention over latents that several decode rows share: they are read once for all rows.

Owns the division of such work among programs, and its partial results, which ``attend`` merges with
those of the rows' own tokens; knows neither requests nor layers.

The (row, head) pairs of a group are cut into blocks of 64, its tokens into tiles. The tiles of all
blocks of all groups are numbered, and each range of equally many numbers is a program's, or that of
a few programs with some heads each:

    group 0                             group 1
    block 0          block 1            block 0
    |--|--|--|--|--| |--|--|--|--|--|   |--|--| ...
    [ range 0  ][ range 1 ][ range 2  ][ ...

A program's result for a block is a piece: the normalised softmax sums of its pairs, with their
log2. From one piece to the next the block or the range advances, or both, so the sum of their
numbers is a unique index. Pieces follow from the groups alone and are computed where they are
needed, so grids depend on shapes only.
Sources: as for K/V pairs (``attention/shared.py``); ranges as in Stream-K (Osama et al., 2023).
"""

# mypy: allow-incomplete-defs

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.shared import group_of
from asyncllm.kernels.attention.shared_rows import MAX_GROUPS, MEMBERS, SharedRows
from asyncllm.kernels.autotune import num_sms
from asyncllm.kernels.latent.keys import (
    MANY,
    AttendConfig,
    attend_config,
    attend_latents,
    heads_of_block,
    latent_sizes,
    latents_of,
    load_part,
)

MIN_TILES = 1  # of a range


@dataclass(frozen=True, slots=True)
class SharedLatents:
    """A step's groups, how they are divided, and the space for partial results, which all layers
    use, one after another. Device tensors only."""

    config: AttendConfig
    rows: SharedRows
    num_heads: int
    num_ranges: int
    pieces: Tensor  # [num_rows, most of a row] where its partial results are
    num_pieces: Tensor  # [num_rows]
    partial: Tensor  # [pieces * rows of a block, num_heads, rank] float32
    lse: Tensor  # [pieces * rows of a block, num_heads] float32, base 2

    @property
    def block_heads(self) -> int:
        """Heads of a block."""
        return heads_of_block(self.num_heads)

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return MANY // self.block_heads


@triton.jit
def _work(groups_ptr, ROWS: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """Tiles of each group, and its blocks; of one without tokens none."""
    group = tl.arange(0, GROUPS)
    begin = tl.load(groups_ptr + group)
    tiles = tl.cdiv(tl.load(groups_ptr + GROUPS + group) - begin, TILE)
    blocks = tl.cdiv(tl.load(groups_ptr + 3 * GROUPS + group), ROWS)
    return tiles, tl.where(tiles > 0, blocks, 0)


@triton.jit
def find_pieces(
    row_place,
    groups_ptr,
    pieces_ptr,
    num_pieces_ptr,
    num_ranges,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Where the partial results of the groups that a row at ``row_place`` is in will be."""
    group = tl.arange(0, GROUPS)
    tiles, blocks = _work(groups_ptr, ROWS, TILE, GROUPS)
    work = tiles * blocks
    share = tl.maximum(tl.cdiv(tl.sum(work, axis=0), num_ranges), MIN_TILES)
    member = row_place - tl.load(groups_ptr + 2 * GROUPS + group)
    inside = (member >= 0) & (member < tl.load(groups_ptr + 3 * GROUPS + group)) & (row_place >= 0)
    block = tl.maximum(member, 0) // ROWS
    start = tl.cumsum(work, axis=0) - work + block * tiles
    lowest = start // share
    # pieces: ranges that a block has a part in
    splits = tl.where(inside & (tiles > 0), (start + tiles - 1) // share - lowest + 1, 0)
    offset = tl.cumsum(splits, axis=0) - splits
    place = tl.cumsum(blocks, axis=0) - blocks + block + lowest
    for split in range(tl.max(splits, axis=0)):
        at = (place + split) * ROWS + member % ROWS
        tl.store(pieces_ptr + offset + split, at, mask=split < splits)
    tl.store(num_pieces_ptr, tl.sum(splits, axis=0))


@triton.jit(
    do_not_specialize=["num_ranges"],
    do_not_specialize_on_alignment=["groups_ptr", "order_ptr", "lanes_ptr"],
)
def _shared_latents_kernel(
    q_ptr,
    turned_ptr,
    cache_ptr,
    scales_ptr,
    table_ptr,
    lanes_ptr,
    groups_ptr,
    order_ptr,
    partial_ptr,
    lse_ptr,
    num_ranges,
    q_row,
    q_head,
    turned_row,
    turned_head,
    table_row,
    scale_log2,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    TILE: tl.constexpr,
    SCALED: tl.constexpr,
    ASM: tl.constexpr,
    MIN_TILES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    ROWS: tl.constexpr = PAIRS // BLOCK_HEADS
    head_block = tl.program_id(0) % BLOCKS
    program = tl.program_id(0) // BLOCKS
    tiles, blocks = _work(groups_ptr, ROWS, TILE, GROUPS)
    work = tiles * blocks
    total = tl.sum(work, axis=0)
    ends, block_ends = tl.cumsum(work, axis=0), tl.cumsum(blocks, axis=0)
    share = tl.maximum(tl.cdiv(total, num_ranges), MIN_TILES)
    pair = tl.arange(0, PAIRS)
    dim = tl.arange(0, RANK_PAD)
    head = head_block * BLOCK_HEADS + pair % BLOCK_HEADS
    tile = program * share
    stop = tl.minimum(tile + share, total)
    while tile < stop:
        passed, begin, behind, first, members, within = group_of(groups_ptr, ends, tile, GROUPS)
        length = behind - begin
        order = order_ptr + first
        block = within // tl.cdiv(length, TILE)
        skipped = within % tl.cdiv(length, TILE)
        count = tl.minimum(tl.cdiv(length, TILE) - skipped, stop - tile)
        member = block * ROWS + pair // BLOCK_HEADS
        live = (member < members) & (head < HEADS)
        row = tl.load(order + member, mask=live, other=0).to(tl.int64)
        lane = tl.load(lanes_ptr + tl.load(order)).to(tl.int64)
        q = load_part(q_ptr, row, head, q_row, q_head, live, RANK, RANK_PAD)
        turned = load_part(turned_ptr, row, head, turned_row, turned_head, live, ROPE, ROPE_PAD)
        acc, best, norm = attend_latents(
            q,
            turned,
            cache_ptr,
            scales_ptr,
            table_ptr + lane * table_row + begin,
            skipped * TILE,
            (skipped + count) * TILE,
            length,
            tl.zeros_like(pair) + length - 1,  # a query sees them all
            scale_log2,
            False,
            PAIRS,
            RANK,
            RANK_PAD,
            ROPE,
            ROPE_PAD,
            TILE,
            SCALED,
            ASM,
        )
        place = tl.max(tl.where(passed, block_ends, 0), axis=0) + block + program
        piece = (place * ROWS + pair // BLOCK_HEADS).to(tl.int64) * HEADS + head
        tl.store(
            partial_ptr + piece[:, None] * RANK + dim[None, :],
            acc / norm[:, None],
            mask=live[:, None] & (dim < RANK)[None, :],
        )
        tl.store(lse_ptr + piece, best + tl.log2(norm), mask=live)
        tile += count


def ranges_for(config: AttendConfig, num_heads: int, device: torch.device) -> int:
    """Into how many ranges the work of groups is divided."""
    programs = config.programs_per_sm * num_sms(device)
    return max(1, programs // -(-num_heads // MANY))


def shared_blocks(space: Tensor, num_heads: int, rank: int, element: torch.dtype) -> int:
    """How many blocks groups may have for their partial results to fit ``space``, over latents of
    ``element``."""
    config = attend_config(MANY, "shared", element, space.device)
    ranges = ranges_for(config, num_heads, space.device)
    return space.numel() // piece_numbers(num_heads, rank) - ranges


def piece_numbers(num_heads: int, rank: int) -> int:
    """Float32 numbers in the partial results of a piece."""
    return MANY // heads_of_block(num_heads) * num_heads * (rank + 1)


def plan_shared(
    rows: SharedRows,
    num_heads: int,
    rank: int,
    cache: Tensor,
    *,
    config: AttendConfig | None = None,
    num_ranges: int | None = None,
    space: Tensor | None = None,
) -> SharedLatents:
    """How the groups of a step are divided; ``plan_attend`` fills ``pieces``.

    Args:
        num_ranges: instead of the number that fits the device.
        space: float32, where partial results may lie: of as many pieces as there are ranges, and
            one more for each block of the groups. None: makes it, for as many as there can be.
    """
    num_rows, device = rows.order.shape[0], cache.device
    config = config or attend_config(MANY, "shared", cache.dtype, device)
    num_ranges = num_ranges or ranges_for(config, num_heads, device)
    numbers = piece_numbers(num_heads, rank)
    block = MANY // heads_of_block(num_heads)
    if space is None:
        blocks = MEMBERS * num_rows // block + min(MAX_GROUPS, num_rows)
        space = torch.empty((num_ranges + blocks) * numbers, device=device)
    places = space.numel() // numbers * block
    sums = places * num_heads * rank
    return SharedLatents(
        config=config,
        rows=rows,
        num_heads=num_heads,
        num_ranges=num_ranges,
        pieces=torch.empty((num_rows, num_ranges + MAX_GROUPS), dtype=torch.int32, device=device),
        num_pieces=torch.empty(num_rows, dtype=torch.int32, device=device),
        partial=space[:sums].view(places, num_heads, rank),
        lse=space[sums : sums + places * num_heads].view(places, num_heads),
    )


def attend_shared(
    plan: SharedLatents,
    q: Tensor,
    turned: Tensor,
    cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    scales: Tensor | None,
    scale_log2: float,
) -> None:
    """Leaves the groups' partial results in the plan; arguments as ``attend`` has checked them."""
    config, rows = plan.config, plan.rows
    num_heads = q.shape[1]
    blocks = -(-num_heads // plan.block_heads)
    _shared_latents_kernel[(plan.num_ranges * blocks,)](
        q,
        turned,
        latents_of(cache),
        scales,
        table,
        lanes,
        rows.groups,
        rows.order,
        plan.partial,
        plan.lse,
        plan.num_ranges,
        q.stride(0),
        q.stride(1),
        turned.stride(0),
        turned.stride(1),
        table.stride(0),
        scale_log2,
        HEADS=num_heads,
        BLOCK_HEADS=plan.block_heads,
        BLOCKS=blocks,
        PAIRS=MANY,
        TILE=config.tile,
        **latent_sizes(q, turned, scales is not None),
        MIN_TILES=MIN_TILES,
        GROUPS=MAX_GROUPS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.registers,
    )
