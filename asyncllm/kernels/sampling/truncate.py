"""Finds what top_k, top_p and min_p keep of a row: a sampled bracket, then a search by bits."""

# mypy: allow-incomplete-defs

import triton
import triton.language as tl

from asyncllm.kernels.sampling.tiles import COLUMNS, combine, inverse, load_logits

DEEPEST = 40.0  # exp(-40) of the best: 2**18 such tokens add 1e-12, less than rounding
Z = 4.5  # standard errors on each side of the bracket


@triton.jit
def limits(top_k_ptr, top_p_ptr, min_p_ptr, row, total, DEEPEST: tl.constexpr):
    """A token is kept while fewer than ``most`` tokens and less than ``mass`` lie above it, and
    its depth is at most ``floor``."""
    most = tl.maximum(tl.load(top_k_ptr + row), 1)
    top_p = tl.load(top_p_ptr + row)
    mass = tl.where(top_p < 1.0, tl.maximum(top_p * total, 1e-30), float("inf"))
    min_p = tl.load(min_p_ptr + row)
    floor = tl.where(min_p > 0.0, 0.0 - tl.log(tl.maximum(min_p, 1e-30)), DEEPEST)
    return most, mass, tl.maximum(tl.minimum(floor, DEEPEST), 0.0)


@triton.jit
def _moments(depth, weight, mid):
    """Of the sample: tokens down to depth ``mid``; weight, and square of weight, beyond it."""
    above = depth <= mid
    beyond = tl.where(above, 0.0, weight)
    count = tl.sum(above.to(tl.float32), axis=0)
    return count, tl.sum(beyond, axis=0), tl.sum(beyond * beyond, axis=0)


@triton.jit
def _bracket(
    row_ptr,
    best,
    scale,
    total,
    most,
    mass,
    floor,
    VOCAB: tl.constexpr,
    SAMPLE: tl.constexpr,
    Z: tl.constexpr,
):
    """Two depths, very probably on either side of the threshold, from runs of 16 tokens spread
    evenly over the row. -1 if everything from the best token on may be a candidate."""
    i = tl.arange(0, SAMPLE)
    token = (i // 16 * VOCAB // (SAMPLE // 16)) // 16 * 16 + i % 16
    depth = (best - load_logits(row_ptr, token, VOCAB)) * scale
    weight = tl.exp(-depth)
    size = tl.sum((token < VOCAB).to(tl.float32), axis=0)
    each = VOCAB / size  # tokens that a token of the sample stands for
    spread = tl.maximum(1.0 - 1.0 / each, 0.0)  # sampling without replacement
    tail = (total - mass) / each
    rank = most / each
    by_rank = most < VOCAB
    by_mass = mass < float("inf")
    far_low = 0.0
    far = floor
    near = 0.0
    near_high = floor
    for _ in range(14):
        mid = (far_low + far) * 0.5
        count, rest, square = _moments(depth, weight, mid)
        error = Z * tl.sqrt(tl.maximum(square - rest * rest / size, 0.0) * spread)
        past = (by_rank & (count - Z * tl.sqrt(count) >= rank)) | (by_mass & (rest + error <= tail))
        past = past & (count >= 24.0)  # enough of them to be sure that some hundred lie above
        far_low = tl.where(past, far_low, mid)
        far = tl.where(past, mid, far)

        mid = (near + near_high) * 0.5
        count, rest, square = _moments(depth, weight, mid)
        error = Z * tl.sqrt(tl.maximum(square - rest * rest / size, 0.0) * spread)
        before = (count + Z * tl.sqrt(count) + Z * Z <= rank) | (by_rank == 0)
        before = before & ((rest - error >= tail) | (by_mass == 0))
        near = tl.where(before, mid, near)
        near_high = tl.where(before, near_high, mid)
    count = tl.sum((depth <= near).to(tl.float32), axis=0)
    near = tl.where((count < 24.0) | (near > far), -1.0, near)
    return near, far


@triton.jit(do_not_specialize_on_alignment=COLUMNS)
def bracket_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    top_ptr,
    sum_ptr,
    bracket_ptr,
    stride,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    PAD: tl.constexpr,
    SAMPLE: tl.constexpr,
    DEEPEST: tl.constexpr,
    Z: tl.constexpr,
):
    """Per row: near and far depth, best logit."""
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        row_ptr = logits_ptr + row.to(tl.int64) * stride
        scale = inverse(temperature)
        best, sums = combine(top_ptr, sum_ptr, row, scale, TILES, PAD)
        total = tl.sum(sums, axis=0)
        most, mass, floor = limits(top_k_ptr, top_p_ptr, min_p_ptr, row, total, DEEPEST)
        near = floor
        far = floor
        if (most < VOCAB) | (mass < float("inf")):
            near, far = _bracket(row_ptr, best, scale, total, most, mass, floor, VOCAB, SAMPLE, Z)
        tl.store(bracket_ptr + 3 * row, near)
        tl.store(bracket_ptr + 3 * row + 1, far)
        tl.store(bracket_ptr + 3 * row + 2, best)


@triton.jit(do_not_specialize_on_alignment=COLUMNS)
def list_kernel(
    logits_ptr,
    temperature_ptr,
    bracket_ptr,
    mass_ptr,
    count_ptr,
    used_ptr,
    depth_ptr,
    token_ptr,
    stride,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        near = tl.load(bracket_ptr + 3 * row)
        far = tl.load(bracket_ptr + 3 * row + 1)
        best = tl.load(bracket_ptr + 3 * row + 2)
        token = tile * TILE + tl.arange(0, TILE)
        x = load_logits(logits_ptr + row.to(tl.int64) * stride, token, VOCAB)
        depth = (best - x) * inverse(temperature)
        sure = depth <= near
        chosen = (depth > near) & (depth <= far)
        at = row * tl.num_programs(0) + tile
        tl.store(mass_ptr + at, tl.sum(tl.where(sure, tl.exp(-depth), 0.0), axis=0))
        tl.store(count_ptr + at, tl.sum(sure.to(tl.int32), axis=0))
        num = tl.sum(chosen.to(tl.int32), axis=0)
        if num > 0:
            place = tl.atomic_add(used_ptr + row, num)
            place += tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            fits = chosen & (place < ROOM)
            offset = row.to(tl.int64) * ROOM + place
            tl.store(depth_ptr + offset, depth, mask=fits)
            tl.store(token_ptr + offset, token, mask=fits)


@triton.jit
def search_listed(bits, token, weight, taken, most, quota, low, high, VOCAB: tl.constexpr):
    """Threshold among listed candidates: the greatest depth ``low`` (as bits) such that fewer
    than ``most`` tokens and less than ``quota`` lie strictly above it; and the last token id that
    is kept at exactly this depth."""
    while high - low > 1:
        mid = low + (high - low) // 2
        above = bits < mid
        count = taken + tl.sum(above.to(tl.int32), axis=0)
        held = tl.sum(tl.where(above, weight, 0), axis=0)
        fits = (count < most) & (held < quota)
        low = tl.where(fits, mid, low)
        high = tl.where(fits, high, mid)
    count = taken + tl.sum((bits < low).to(tl.int32), axis=0)
    held = tl.sum(tl.where(bits < low, weight, 0), axis=0)
    tied = bits == low
    one = tl.maximum(tl.max(tl.where(tied, weight, 0), axis=0), 1)
    stay = tl.maximum(tl.minimum(most - count, (quota - held - 1) // one + 1), 1)
    cut = tl.full((), VOCAB, tl.int32)
    if stay < tl.sum(tied.to(tl.int32), axis=0):
        lower = -1
        upper = VOCAB - 1
        while upper - lower > 1:
            mid = (lower + upper) // 2
            enough = tl.sum((tied & (token <= mid)).to(tl.int32), axis=0) >= stay
            upper = tl.where(enough, mid, upper)
            lower = tl.where(enough, lower, mid)
        cut = upper
    return low, cut


@triton.jit
def search_row(
    row_ptr,
    best,
    scale,
    most,
    mass,
    low,
    high,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PAD: tl.constexpr,
):
    """``search_listed`` over the whole row, three bits a pass, and the kept weight of each tile."""
    HALF: tl.constexpr = TILE // 2
    index = tl.arange(0, 8)
    while high - low > 1:
        step = tl.cdiv(high - low, 9)
        pivot = tl.minimum(low + step * (index + 1), high)
        counts = tl.zeros((8, HALF), tl.int32)
        masses = tl.zeros((8, HALF), tl.float32)
        for begin in range(0, VOCAB, HALF):
            token = begin + tl.arange(0, HALF)
            depth = (best - load_logits(row_ptr, token, VOCAB)) * scale
            above = depth.to(tl.int32, bitcast=True)[None, :] < pivot[:, None]
            counts += above.to(tl.int32)
            masses += tl.where(above, tl.exp(-depth)[None, :], 0.0)
        fits = (tl.sum(counts, axis=1) < most) & (tl.sum(masses, axis=1) < mass)
        fits = fits & (pivot < high)
        low = tl.maximum(low, tl.max(tl.where(fits, pivot, low), axis=0))
        high = tl.minimum(high, tl.min(tl.where(fits, high, pivot), axis=0))
    # what lies above, tile by tile, and how many lie at the threshold
    tile_index = tl.arange(0, PAD)
    kept = tl.zeros((PAD,), tl.float32)
    ties = tl.zeros((PAD,), tl.int32)
    count = 0
    for tile in range(TILES):
        token = tile * TILE + tl.arange(0, TILE)
        depth = (best - load_logits(row_ptr, token, VOCAB)) * scale
        bits = depth.to(tl.int32, bitcast=True)
        above = bits < low
        count += tl.sum(above.to(tl.int32), axis=0)
        part = tl.sum(tl.where(above, tl.exp(-depth), 0.0), axis=0)
        kept = tl.where(tile_index == tile, part, kept)
        ties = tl.where(tile_index == tile, tl.sum((bits == low).to(tl.int32), axis=0), ties)
    one = tl.exp(0.0 - low.to(tl.float32, bitcast=True))
    by_mass = tl.ceil((mass - tl.sum(kept, axis=0)) / tl.maximum(one, 1e-30))
    stay = tl.minimum(most - count, tl.minimum(by_mass, 1e9).to(tl.int32))
    stay = tl.maximum(stay, 1)
    end = tl.cumsum(ties, axis=0)
    kept += tl.minimum(tl.maximum(stay - (end - ties), 0), ties).to(tl.float32) * one
    cut = tl.full((), VOCAB, tl.int32)
    if stay < tl.sum(ties, axis=0):
        tile = tl.min(tl.where(end >= stay, tile_index, PAD), axis=0)
        left = stay - tl.sum(tl.where(tile_index < tile, ties, 0), axis=0)
        token = tile * TILE + tl.arange(0, TILE)
        depth = (best - load_logits(row_ptr, token, VOCAB)) * scale
        tied = depth.to(tl.int32, bitcast=True) == low
        enough = tied & (tl.cumsum(tied.to(tl.int32), axis=0) >= left)
        cut = tl.min(tl.where(enough, token, VOCAB), axis=0)
    return low, cut, kept


def sample_size(vocab_size: int) -> int:
    """A power of two near a thirty-second of the vocabulary, not above it where it is large."""
    if vocab_size > 2**17:
        return 8192
    half: int = triton.next_power_of_2(vocab_size // 2 + 1)
    return min(4096, max(16, half))
