"""Draws a token from the kept weights: finds the tile of the target sum, then the token in it."""

# mypy: allow-incomplete-defs

import triton
import triton.language as tl

from asyncllm.kernels.sampling.tiles import COLUMNS, combine, inverse, load_logits, lowest_best
from asyncllm.kernels.sampling.truncate import limits, search_listed, search_row

# A fused product and sum rounds differently on the two lanes that add up a pair, so that a sum over
# a row would not be the same number in all of them; loops that end by it would never meet again.
FUSION = False
_FULL = tl.constexpr(0x7F800000)  # bits of an infinite depth: all finite ones are below


@triton.jit
def _first(sums, weight, index, goal, NONE: tl.constexpr):
    """First index where the running sum passes ``goal``; else, by rounding, the last with weight;
    -1 if none has any."""
    some = weight > 0.0
    hit = tl.min(tl.where(some & (sums > goal), index, NONE), axis=0)
    return tl.where(hit < NONE, hit, tl.max(tl.where(some, index, -1), axis=0))


@triton.jit(do_not_specialize_on_alignment=COLUMNS)
def draw_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniform_ptr,
    top_ptr,
    best_ptr,
    sum_ptr,
    mass_ptr,
    count_ptr,
    bracket_ptr,
    used_ptr,
    depth_ptr,
    token_ptr,
    out_ptr,
    stride,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PAD: tl.constexpr,
    ROOM: tl.constexpr,
    DEEPEST: tl.constexpr,
    TRUNCATES: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    result = lowest_best(top_ptr, best_ptr, row, TILES, PAD)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        scale = inverse(temperature)
        best, kept = combine(top_ptr, sum_ptr, row, scale, TILES, PAD)
        tile_index = tl.arange(0, PAD)
        limit = tl.full((), _FULL, tl.int32)
        cut = tl.full((), VOCAB, tl.int32)
        before = tl.full(
            (), 0.0, tl.float32
        )  # weight in front of the goal's tile that ``kept`` leaves out
        if TRUNCATES:
            total = tl.sum(kept, axis=0)
            most, mass, floor = limits(top_k_ptr, top_p_ptr, min_p_ptr, row, total, DEEPEST)
            live = tile_index < TILES
            kept = tl.load(mass_ptr + row * TILES + tile_index, mask=live, other=0.0)
            counts = tl.load(count_ptr + row * TILES + tile_index, mask=live, other=0)
            taken = tl.sum(counts, axis=0)
            sure = tl.sum(kept, axis=0)
            near = tl.load(bracket_ptr + 3 * row)
            far = tl.load(bracket_ptr + 3 * row + 1)
            used = tl.load(used_ptr + row)

            slot = tl.arange(0, ROOM)
            listed = slot < used
            room = row.to(tl.int64) * ROOM
            depth = tl.load(depth_ptr + room + slot, mask=listed, other=float("inf"))
            token = tl.load(token_ptr + room + slot, mask=listed, other=0)
            bits = depth.to(tl.int32, bitcast=True)
            near_bits = tl.maximum(near, 0.0).to(tl.int32, bitcast=True)
            far_bits = far.to(tl.int32, bitcast=True)
            # integer weights: the candidates' order is not fixed, their sum must be
            bound = tl.minimum(total, used * tl.exp(0.0 - tl.maximum(near, 0.0)))
            unit = 1073741824.0 / tl.maximum(bound, 1e-20)
            weight = (tl.exp(0.0 - depth) * unit).to(tl.int32)
            quota = tl.minimum(tl.maximum((mass - sure) * unit, 1.0), 2147483520.0).to(tl.int32)

            above = (taken >= most) | (sure >= mass)
            everything = (taken + used < most) & (tl.sum(weight, axis=0) < quota)
            # with nothing but a floor, what is surely kept is all there is
            bounded = (most < VOCAB) | (mass < float("inf"))
            low = near_bits
            high = tl.where(everything, far_bits + 2, far_bits + 1)
            low = tl.where(everything, far_bits + 1, low)
            missed = (used > ROOM) | above | (everything & (far < floor))
            if missed & bounded:
                floor_bits = floor.to(tl.int32, bitcast=True)
                low = tl.where(above, 0, tl.where(used > ROOM, near_bits, far_bits))
                high = tl.where(above, near_bits + 1, floor_bits + 2)
                limit, cut, kept = search_row(
                    row_ptr, best, scale, most, mass, low, high, VOCAB, TILE, TILES, PAD
                )
            else:
                limit, cut = search_listed(
                    bits, token, weight, taken, most, quota, low, high, VOCAB
                )
                stays = listed & ((bits < limit) | ((bits == limit) & (token <= cut)))
                weight = tl.where(stays, weight, 0)
                # the tile that holds the goal, by bisection over tiles
                whole = tl.sum(kept, axis=0) + tl.sum(weight, axis=0).to(tl.float32) / unit
                target = tl.load(uniform_ptr + row) * whole
                first = -1
                last = TILES - 1
                while last - first > 1:
                    mid = (first + last) // 2
                    part = tl.sum(tl.where(token < (mid + 1) * TILE, weight, 0), axis=0)
                    held = tl.sum(tl.where(tile_index <= mid, kept, 0.0), axis=0)
                    held += part.to(tl.float32) / unit
                    past = held > target
                    last = tl.where(past, mid, last)
                    first = tl.where(past, first, mid)
                    before = tl.where(past, before, held)
                kept = tl.where(tile_index == last, whole, 0.0)
            # a limit just past the floor means all down to the floor
            cut = tl.where(limit > floor.to(tl.int32, bitcast=True), -1, cut)
        goal = tl.load(uniform_ptr + row) * tl.sum(kept, axis=0)
        tile = _first(tl.cumsum(kept, axis=0), kept, tile_index, goal, PAD)
        goal -= tl.sum(tl.where(tile_index < tile, kept, 0.0), axis=0) + before
        token = tl.maximum(tile, 0) * TILE + tl.arange(0, TILE)
        depth = (best - load_logits(row_ptr, token, VOCAB)) * scale
        bits = depth.to(tl.int32, bitcast=True)
        stays = (bits < limit) | ((bits == limit) & (token <= cut))
        weight = tl.where(stays, tl.exp(0.0 - depth), 0.0)
        drawn = _first(tl.cumsum(weight, axis=0), weight, token, goal, VOCAB)
        result = tl.where((tile >= 0) & (drawn >= 0), drawn, result)
    tl.store(out_ptr + row, result.to(tl.int64))
