"""Plans a step's attention over latents on the device, from the rows' lengths.

An item is some neighbouring tokens of one row, whose (token, head) pairs one block of the kernel
takes: a decode row, or a few tokens of a chunk. Items' latents are cut into tiles, numbered item by
item, and each range of equally many numbers is a program's, or that of a few programs with some
heads each:

    item 0         item 1                  item 2 ...
    |--|--|--|--|  |--|--|--|--|--|--|--|  |--|--| ...
    [ range 0 ] [ range 1 ] [ range 2 ] ...

So one long row among short ones delays nobody. An item within a range is written at once; one that
crosses a border leaves at most two float32 partial results per range, which a second kernel merges
(Stream-K, Osama et al., 2023; Flash-Decoding, Dao et al., 2023).

Rows of many new tokens are attended to decompressed: see :func:`plan_chunks`.
"""

# mypy: allow-incomplete-defs

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.shared_rows import MAX_GROUPS, SharedRows
from asyncllm.kernels.autotune import num_sms
from asyncllm.kernels.latent.keys import FEW, MANY, AttendConfig, attend_config, heads_of_block
from asyncllm.kernels.latent.shared import MIN_TILES, SharedLatents, find_pieces, plan_shared

_MIN_TILES = 2
EXPAND_TILE = 128  # keys that are decompressed at once


@dataclass(frozen=True, slots=True)
class AttendPlan:
    """The division of a step's items, and the space that their partial results need.

    Made once per step, used by every layer, one layer after another (they share ``partial`` and
    ``lse``). Device tensors only.
    """

    config: AttendConfig
    num_heads: int
    block_heads: int  # of a block, which is as many heads of each token of an item
    pairs: int  # of a block
    num_ranges: int
    lanes: Tensor  # [num_items] as given
    lens: Tensor  # [num_items] latents that an item's last token sees; 0: no item
    items: Tensor | None  # [2, num_items]: first token and tokens; None: item i is token i
    meta: Tensor  # [2]: all tiles, tiles per range
    first: Tensor  # [num_ranges]: record where the range starts
    # [5, num_items]: item, lane, length, first tile of each one that is there, and the first
    # latent that it reads itself: those before are in ``shared``, and do not count in the length
    records: Tensor
    begins: Tensor  # [num_items]: first tile of each
    partial: Tensor  # [2 * num_ranges * blocks, pairs, rank] float32
    lse: Tensor  # [2 * num_ranges * blocks, pairs] float32, base 2
    shared: SharedLatents | None  # what rows read together; None: each reads all that is its own
    whole_lse: Tensor | None  # [num_items, num_heads] of what one range has all of, if ``shared``

    @property
    def blocks(self) -> int:
        """Of heads."""
        return -(-self.num_heads // self.block_heads)


@triton.jit(
    do_not_specialize=["num_items", "num_ranges", "shared_ranges", "pieces_row"],
    do_not_specialize_on_alignment=[
        *("lanes_ptr", "lens_ptr", "owns_ptr", "places_ptr", "groups_ptr")
    ],
)
def _divide_kernel(
    lanes_ptr,
    lens_ptr,
    meta_ptr,
    first_ptr,
    records_ptr,
    begins_ptr,
    owns_ptr,
    places_ptr,
    groups_ptr,
    pieces_ptr,
    num_pieces_ptr,
    num_items,
    num_ranges,
    shared_ranges,
    pieces_row,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SHARED_TILE: tl.constexpr,
    SHARED_LEAST: tl.constexpr,
    GROUPS: tl.constexpr,
):
    item = tl.program_id(0)
    total = 0
    start = 0
    rank = 0
    for begin in range(0, num_items, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        length = tl.load(lens_ptr + other, mask=other < num_items, other=0)
        if GROUPS:
            length -= tl.load(owns_ptr + other, mask=other < num_items, other=0)
        tiles = tl.cdiv(length, TILE)
        total += tl.sum(tiles, axis=0)
        start += tl.sum(tl.where(other < item, tiles, 0), axis=0)
        rank += tl.sum(((other < item) & (tiles > 0)).to(tl.int32), axis=0)
    per_range = tl.maximum(tl.cdiv(total, num_ranges), LEAST)
    if item == 0:
        tl.store(meta_ptr, total)
        tl.store(meta_ptr + 1, per_range)
    tl.store(begins_ptr + item, start)
    length = tl.load(lens_ptr + item)
    own = 0
    if GROUPS:
        own = tl.load(owns_ptr + item)
        length -= own
        find_pieces(
            tl.load(places_ptr + item),
            groups_ptr,
            pieces_ptr + item.to(tl.int64) * pieces_row,
            num_pieces_ptr + item,
            shared_ranges,
            ROWS,
            SHARED_TILE,
            SHARED_LEAST,
            GROUPS,
        )
    if length > 0:
        tl.store(records_ptr + rank, item)
        tl.store(records_ptr + num_items + rank, tl.load(lanes_ptr + item))
        tl.store(records_ptr + 2 * num_items + rank, length)
        tl.store(records_ptr + 3 * num_items + rank, start)
        tl.store(records_ptr + 4 * num_items + rank, own)
        # the ranges that begin in this item
        stop = tl.cdiv(start + tl.cdiv(length, TILE), per_range)
        for begin in range(tl.cdiv(start, per_range), stop, BLOCK):
            program = begin + tl.arange(0, BLOCK)
            tl.store(first_ptr + program, tl.zeros_like(program) + rank, mask=program < stop)


def plan_attend(
    lanes: Tensor,
    lens: Tensor,
    num_heads: int,
    cache: Tensor,
    rank: int,
    *,
    items: Tensor | None = None,
    shared: SharedRows | None = None,
    space: Tensor | None = None,
    config: AttendConfig | None = None,
    num_ranges: int | None = None,
    shared_config: AttendConfig | None = None,
    shared_ranges: int | None = None,
) -> AttendPlan:
    """Divide items among programs, on the device.

    Args:
        lanes, lens: [num_items] int32: lane of each, and the latents that its last token sees; read
            when the plan's kernel runs, so a captured plan follows what is in them at each replay.
        num_heads: query heads on this device.
        cache: of any layer: [num_slots + 1, width].
        rank: of the latents.
        items: [2, num_items] int32: first token and number of tokens of each, at most
            ``item_tokens``; None: item i is token i.
        shared: rows with the same first slots, whose latents are read once for all of them; like
            lens read at each replay. Only for items of one token.
        space: for the partial results of ``shared``, as in ``plan_shared``.
        config, num_ranges, shared_config, shared_ranges: instead of those that fit the device (for
            tests and tuning).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if lanes.shape != lens.shape or lanes.dtype != torch.int32 or lens.dtype != torch.int32:
        raise ValueError(f"lanes and lens must be [items] int32, not {lanes.dtype}, {lens.dtype}")
    if shared is not None and (items is not None or shared.order.shape != lens.shape):
        raise ValueError("rows share latents only where each item is one token of a row")
    few = items is None and num_heads <= FEW
    pairs = FEW if few else MANY
    block_heads = pairs if items is None else heads_of_block(num_heads)
    blocks = triton.cdiv(num_heads, block_heads)
    if config is None:
        size = "few" if lens.shape[0] <= 32 else "many"
        config = attend_config(pairs, size, cache.dtype, cache.device)
    if num_ranges is None:
        num_ranges = max(1, config.programs_per_sm * num_sms(cache.device) // blocks)
    num_items, device = lens.shape[0], lens.device
    parts = 2 * num_ranges * blocks
    together, whole_lse = None, None
    if shared is not None:
        together = plan_shared(
            shared,
            num_heads,
            rank,
            cache,
            config=shared_config,
            num_ranges=shared_ranges,
            space=space,
        )
        whole_lse = torch.empty((num_items, num_heads), device=device)
    plan = AttendPlan(
        config=config,
        num_heads=num_heads,
        block_heads=block_heads,
        pairs=pairs,
        num_ranges=num_ranges,
        lanes=lanes,
        lens=lens,
        items=items,
        meta=torch.empty(2, dtype=torch.int32, device=device),
        first=torch.empty(num_ranges, dtype=torch.int32, device=device),
        records=torch.empty((5, num_items), dtype=torch.int32, device=device),
        begins=torch.empty(num_items, dtype=torch.int32, device=device),
        partial=torch.empty((parts, pairs, rank), device=device),
        lse=torch.empty((parts, pairs), device=device),
        shared=together,
        whole_lse=whole_lse,
    )
    if num_items:
        _divide_kernel[(num_items,)](
            lanes,
            lens,
            plan.meta,
            plan.first,
            plan.records,
            plan.begins,
            shared and shared.owns,
            shared and shared.places,
            shared and shared.groups,
            together and together.pieces,
            together and together.num_pieces,
            num_items,
            num_ranges,
            together.num_ranges if together else 1,
            together.pieces.stride(0) if together else 0,
            TILE=config.tile,
            LEAST=_MIN_TILES,
            BLOCK=256,
            ROWS=together.block_rows if together else 1,
            SHARED_TILE=together.config.tile if together else 1,
            SHARED_LEAST=MIN_TILES,
            GROUPS=MAX_GROUPS if together else 0,
            num_warps=4,
        )
    return plan


def item_tokens(num_heads: int) -> int:
    """Tokens that an item of a chunk may have."""
    return MANY // heads_of_block(num_heads)


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How the chunks of a step are attended to. Device tensors only."""

    state: Tensor  # [num_tokens] 1: of an absorbed row, 0: of no row, -1: of another kind
    bases: Tensor  # [num_rows] where a row's decompressed keys begin; -1: it is absorbed
    tile_ends: Tensor  # [num_rows] tiles of decompressed keys up to and with a row's
    attend: AttendPlan  # of the absorbed rows


@triton.jit(
    do_not_specialize=["num_rows", "num_items", "capacity", "least"],
    do_not_specialize_on_alignment=["lanes_ptr", "starts_ptr", "cu_counts_ptr"],
)
def _chunk_kernel(
    lanes_ptr,
    starts_ptr,
    cu_counts_ptr,
    state_ptr,
    bases_ptr,
    tile_ends_ptr,
    item_lanes_ptr,
    item_lens_ptr,
    items_ptr,
    num_rows,
    num_items,
    capacity,
    least,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    item = 0  # the row's first
    base = 0
    fits = 0
    tile_end = 0
    wanted = 0  # keys of rows so far that want to be decompressed
    for begin in range(0, row + 1, SCAN):
        other = begin + tl.arange(0, SCAN)
        there = other <= row
        low = tl.load(cu_counts_ptr + other, mask=there, other=0)
        count = tl.load(cu_counts_ptr + other + 1, mask=there, other=0) - low
        before = tl.load(starts_ptr + other, mask=there, other=0)
        short = least - count
        wants = (count > 0) & ((short <= 0) | (count * count > 2 * before * short))
        keys = tl.where(wants, before + count, 0)
        ends = wanted + tl.cumsum(keys, axis=0)
        chosen = wants & (ends <= capacity)
        mine = other == row
        item += tl.sum(tl.where(other < row, tl.cdiv(count, TOKENS), 0), axis=0)
        base += tl.sum(tl.where(mine, ends - keys, 0), axis=0)
        fits += tl.sum((mine & chosen).to(tl.int32), axis=0)
        tile_end += tl.sum(tl.where(chosen, tl.cdiv(keys, TILE), 0), axis=0)
        wanted += tl.sum(keys, axis=0)
    tl.store(bases_ptr + row, tl.where(fits > 0, base, -1))
    tl.store(tile_ends_ptr + row, tile_end)

    first = tl.load(cu_counts_ptr + row)
    count = tl.load(cu_counts_ptr + row + 1) - first
    start = tl.load(starts_ptr + row)
    lane = tl.load(lanes_ptr + row)
    for begin in range(0, count, BLOCK):
        local = begin + tl.arange(0, BLOCK)
        value = tl.zeros_like(local) + tl.where(fits > 0, -1, 1)
        tl.store(state_ptr + first + local, value, mask=local < count)
    for begin in range(0, tl.cdiv(count, TOKENS), BLOCK):
        number = begin + tl.arange(0, BLOCK)
        live = number * TOKENS < count
        seen = tl.minimum((number + 1) * TOKENS, count)
        tl.store(item_lanes_ptr + item + number, tl.zeros_like(number) + lane, mask=live)
        length = tl.where(fits > 0, 0, start + seen)
        tl.store(item_lens_ptr + item + number, length, mask=live)
        tl.store(items_ptr + item + number, first + number * TOKENS, mask=live)
        tokens = seen - number * TOKENS
        tl.store(items_ptr + num_items + item + number, tokens, mask=live)
    if row == 0:
        for begin in range(0, first, BLOCK):
            token = begin + tl.arange(0, BLOCK)
            tl.store(state_ptr + token, tl.zeros_like(token) - 1, mask=token < first)


def plan_chunks(
    lanes: Tensor,
    starts: Tensor,
    cu_counts: Tensor,
    num_tokens: int,
    num_heads: int,
    cache: Tensor,
    rank: int,
    *,
    capacity: int,
    least: int,
) -> ChunkPlan:
    """Decide on the device which rows are decompressed, and divide the others.

    A row of ``count`` new tokens behind ``start`` others wants to be decompressed if ``count ** 2 >
    2 * start * (least - count)``: one without a prefix always, one of at least ``least`` tokens
    always. It is if its keys, with those of all earlier rows that want it, are no more than
    ``capacity``; else it is absorbed.

    Args:
        lanes, starts: [num_rows] int32: lane, and position of the first new token.
        cu_counts: [num_rows + 1] int32: row i owns tokens [cu_counts[i], cu_counts[i + 1]).
        num_tokens: of the step.
        num_heads: query heads that are attended to at once.
        cache, rank: as in ``plan_attend``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    num_rows, device = lanes.shape[0], lanes.device
    if starts.shape != (num_rows,) or cu_counts.shape != (num_rows + 1,):
        raise ValueError(f"starts and cu_counts do not fit {num_rows} lanes")
    if not torch.int32 == lanes.dtype == starts.dtype == cu_counts.dtype:
        raise ValueError("lanes, starts and cu_counts must be int32")
    tokens = item_tokens(num_heads)
    # every row leaves at most one item part empty, so this many hold any division into rows
    num_items = num_tokens // tokens + num_rows
    state = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    item_lens = torch.zeros(num_items, dtype=torch.int32, device=device)
    item_lanes, items = (
        torch.empty(shape, dtype=torch.int32, device=device)
        for shape in ((num_items,), (2, num_items))
    )
    bases, tile_ends = (torch.empty(num_rows, dtype=torch.int32, device=device) for _ in range(2))
    if num_rows:
        _chunk_kernel[(num_rows,)](
            lanes,
            starts,
            cu_counts,
            state,
            bases,
            tile_ends,
            item_lanes,
            item_lens,
            items,
            num_rows,
            num_items,
            capacity,
            least,
            TOKENS=tokens,
            TILE=EXPAND_TILE,
            SCAN=128,
            BLOCK=256,
            num_warps=4,
        )
    attend = plan_attend(item_lanes, item_lens, num_heads, cache, rank, items=items)
    return ChunkPlan(state, bases, tile_ends, attend)
