"""Logits to tokens without a sort: split reductions, a bracket from a sample, a search by bits.

Owns the order of inversion and what happens to ties; knows neither requests nor seeds.

A row is cut into tiles of 4096 tokens. Everything is told in *depth*: (best logit - logit) /
temperature, at least 0, so that a weight is exp(-depth) and the bits of a depth order like the
depth itself.

1. Per tile: best logit, its token, sum of weights.
2. Rows that truncate: from a fixed sample of about 4096 tokens, two depths that enclose the
   threshold of top_k and top_p with a margin of 4.5 standard errors.
3. Per tile: what is surely kept is added up, the candidates in between are listed.
4. Per row: search the threshold among the candidates, bit by bit. If the bracket turns out wrong
   or has too many candidates (many equal logits), the row is searched as a whole: slower, same
   result. Then the tile that holds the goal, then the token in it.

Sums over candidates are integers, so their order in memory does not matter. No launch depends on
the contents of a row, and a row's token depends neither on other rows nor on their number.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
_DEEPEST = 40.0  # exp(-40) of the best: 2**18 such tokens add 1e-12, less than rounding
_Z = 4.5  # standard errors on each side of the bracket
# A fused product and sum rounds differently on the two lanes that add up a pair, so that a sum over
# a row would not be the same number in all of them; loops that end by it would never meet again.
FUSION = False
_HUGE = tl.constexpr(1e30)  # stands for +inf, which would make differences NaN
_FULL = tl.constexpr(0x7F800000)  # bits of an infinite depth: all finite ones are below


# step metadata lies anywhere in a staging buffer: one build for every alignment
_COLUMNS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr", "out_ptr"]


@triton.jit
def _load(row_ptr, token, VOCAB: tl.constexpr):
    """Logits as fp32; NaN counts as -inf."""
    x = tl.load(row_ptr + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, tl.minimum(x, _HUGE), float("-inf"))


@triton.jit
def _inverse(temperature):
    return 1.0 / tl.maximum(temperature, 1e-6)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr"])
def tiles_kernel(
    logits_ptr,
    temperature_ptr,
    top_ptr,
    best_ptr,
    sum_ptr,
    used_ptr,
    stride,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    SUMS: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1)
    at = row * tl.num_programs(0) + tile
    token = tile * TILE + tl.arange(0, TILE)
    x = _load(logits_ptr + row.to(tl.int64) * stride, token, VOCAB)
    top, best = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(top_ptr + at, top)
    tl.store(best_ptr + at, tile * TILE + best)
    if SUMS:
        scale = 1.0
        if TEMPERED:
            scale = _inverse(tl.load(temperature_ptr + row))
        base = tl.maximum(top, -_HUGE)
        tl.store(sum_ptr + at, tl.sum(tl.exp((x - base) * scale), axis=0))
    if TEMPERED and tile == 0:
        tl.store(used_ptr + row, 0)


@triton.jit
def combine(top_ptr, sum_ptr, row, scale, TILES: tl.constexpr, PAD: tl.constexpr):
    """Best logit of the row (finite), and the weights of its tiles relative to it."""
    tile = tl.arange(0, PAD)
    live = tile < TILES
    tops = tl.load(top_ptr + row * TILES + tile, mask=live, other=float("-inf"))
    best = tl.maximum(tl.max(tops, axis=0), -_HUGE)
    sums = tl.load(sum_ptr + row * TILES + tile, mask=live, other=0.0)
    return best, sums * tl.exp((tl.maximum(tops, -_HUGE) - best) * scale)


@triton.jit
def _limits(top_k_ptr, top_p_ptr, min_p_ptr, row, total, DEEPEST: tl.constexpr):
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
    depth = (best - _load(row_ptr, token, VOCAB)) * scale
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


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _bracket_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, top_ptr, sum_ptr, bracket_ptr,
    stride, VOCAB: tl.constexpr, TILES: tl.constexpr, PAD: tl.constexpr, SAMPLE: tl.constexpr,
    DEEPEST: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """Per row: near and far depth, best logit."""
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        row_ptr = logits_ptr + row.to(tl.int64) * stride
        scale = _inverse(temperature)
        best, sums = combine(top_ptr, sum_ptr, row, scale, TILES, PAD)
        total = tl.sum(sums, axis=0)
        most, mass, floor = _limits(top_k_ptr, top_p_ptr, min_p_ptr, row, total, DEEPEST)
        near = floor
        far = floor
        if (most < VOCAB) | (mass < float("inf")):
            near, far = _bracket(row_ptr, best, scale, total, most, mass, floor, VOCAB, SAMPLE, Z)
        tl.store(bracket_ptr + 3 * row, near)
        tl.store(bracket_ptr + 3 * row + 1, far)
        tl.store(bracket_ptr + 3 * row + 2, best)


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _list_kernel(
    logits_ptr, temperature_ptr, bracket_ptr, mass_ptr, count_ptr, used_ptr, depth_ptr, token_ptr,
    stride, VOCAB: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        near = tl.load(bracket_ptr + 3 * row)
        far = tl.load(bracket_ptr + 3 * row + 1)
        best = tl.load(bracket_ptr + 3 * row + 2)
        token = tile * TILE + tl.arange(0, TILE)
        x = _load(logits_ptr + row.to(tl.int64) * stride, token, VOCAB)
        depth = (best - x) * _inverse(temperature)
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
def _among(bits, token, weight, taken, most, quota, low, high, VOCAB: tl.constexpr):
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
def _whole(
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
    """``_among`` over the whole row, three bits a pass; also the kept weight of every tile."""
    HALF: tl.constexpr = TILE // 2
    index = tl.arange(0, 8)
    while high - low > 1:
        step = tl.cdiv(high - low, 9)
        pivot = tl.minimum(low + step * (index + 1), high)
        counts = tl.zeros((8, HALF), tl.int32)
        masses = tl.zeros((8, HALF), tl.float32)
        for begin in range(0, VOCAB, HALF):
            token = begin + tl.arange(0, HALF)
            depth = (best - _load(row_ptr, token, VOCAB)) * scale
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
        depth = (best - _load(row_ptr, token, VOCAB)) * scale
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
        depth = (best - _load(row_ptr, token, VOCAB)) * scale
        tied = depth.to(tl.int32, bitcast=True) == low
        enough = tied & (tl.cumsum(tied.to(tl.int32), axis=0) >= left)
        cut = tl.min(tl.where(enough, token, VOCAB), axis=0)
    return low, cut, kept


@triton.jit
def _first(sums, weight, index, goal, NONE: tl.constexpr):
    """First index where the running sum passes ``goal``; else, by rounding, the last with weight;
    -1 if none has any."""
    some = weight > 0.0
    hit = tl.min(tl.where(some & (sums > goal), index, NONE), axis=0)
    return tl.where(hit < NONE, hit, tl.max(tl.where(some, index, -1), axis=0))


@triton.jit(do_not_specialize_on_alignment=_COLUMNS)
def _draw_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, top_ptr,
    best_ptr, sum_ptr, mass_ptr, count_ptr, bracket_ptr, used_ptr, depth_ptr, token_ptr,
    out_ptr, stride, VOCAB: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, PAD: tl.constexpr, ROOM: tl.constexpr, DEEPEST: tl.constexpr, TRUNCATES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    result = _best(top_ptr, best_ptr, row, TILES, PAD)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        scale = _inverse(temperature)
        best, kept = combine(top_ptr, sum_ptr, row, scale, TILES, PAD)
        tile_index = tl.arange(0, PAD)
        limit = tl.full((), _FULL, tl.int32)
        cut = tl.full((), VOCAB, tl.int32)
        before = tl.full(
            (), 0.0, tl.float32
        )  # weight in front of the goal's tile that ``kept`` leaves out
        if TRUNCATES:
            total = tl.sum(kept, axis=0)
            most, mass, floor = _limits(top_k_ptr, top_p_ptr, min_p_ptr, row, total, DEEPEST)
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
                limit, cut, kept = _whole(
                    row_ptr, best, scale, most, mass, low, high, VOCAB, TILE, TILES, PAD
                )
            else:
                limit, cut = _among(bits, token, weight, taken, most, quota, low, high, VOCAB)
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
        depth = (best - _load(row_ptr, token, VOCAB)) * scale
        bits = depth.to(tl.int32, bitcast=True)
        stays = (bits < limit) | ((bits == limit) & (token <= cut))
        weight = tl.where(stays, tl.exp(0.0 - depth), 0.0)
        drawn = _first(tl.cumsum(weight, axis=0), weight, token, goal, VOCAB)
        result = tl.where((tile >= 0) & (drawn >= 0), drawn, result)
    tl.store(out_ptr + row, result.to(tl.int64))


@triton.jit
def _best(top_ptr, best_ptr, row, TILES: tl.constexpr, PAD: tl.constexpr):
    """Lowest token among the best of the row."""
    tile = tl.arange(0, PAD)
    tops = tl.load(top_ptr + row * TILES + tile, mask=tile < TILES, other=float("-inf"))
    return tl.load(best_ptr + row * TILES + tl.argmax(tops, axis=0, tie_break_left=True))


@triton.jit(do_not_specialize_on_alignment=["out_ptr"])
def _best_kernel(top_ptr, best_ptr, out_ptr, TILES: tl.constexpr, PAD: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out_ptr + row, _best(top_ptr, best_ptr, row, TILES, PAD).to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    *,
    greedy: bool,
    truncates: bool,
    out: Tensor | None = None,
) -> Tensor:
    """One token per row.

    Temperature, then top_k, top_p and min_p on the tempered distribution, then inversion: the
    first token, **by id**, at which the running sum of kept probabilities passes ``uniform``
    times their total. A token is kept if fewer than top_k tokens and less than top_p of the mass
    lie above it and its probability is at least min_p of the best; of equal logits the lower id
    lies above, so top_k keeps exactly k and top_p no more than it needs. One token is always
    kept. Tokens below exp(-40) of the best probability are dropped where the batch truncates.

    Args:
        logits: [n, vocab_size] float32, float16 or bfloat16; rows may be strided. NaN counts as
            -inf; tokens at -inf are drawn only where a row has nothing else (then token 0).
        temperature: [n] float32; 0: the best token, lowest id among equals.
        top_k: [n] int32, vocab_size for all.
        top_p, min_p: [n] float32, 1 and 0 for all.
        uniform: [n] float32 in (0, 1).
        greedy: all temperatures are 0; the other columns are not read (pass any tensor).
        truncates: some row has a top_k, top_p or min_p that cuts.
        out: [n] int64, where to write.

    Returns:
        [n] int64. The same for a row whatever the other rows are.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``sample_ref``. Two launches, four if ``truncates``. Does not synchronise; safe in
    CUDA graphs.
    """
    n, vocab_size = check_logits(logits)
    device = logits.device
    if out is None:
        out = torch.empty(n, dtype=torch.int64, device=device)
    elif out.shape != (n,) or out.dtype != torch.int64 or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} {out.dtype}: [{n}] int64 expected")
    if not greedy:
        _check_columns(n, temperature, top_k, top_p, min_p, uniform)
    if n == 0:
        return out
    tiles = triton.cdiv(vocab_size, TILE)
    pad = triton.next_power_of_2(tiles)
    top, sums, mass = torch.empty((3, n, tiles), dtype=torch.float32, device=device)
    best, counts = torch.empty((2, n, tiles), dtype=torch.int32, device=device)
    used = torch.empty(n, dtype=torch.int32, device=device)
    stride = logits.stride(0)
    tiles_kernel[(tiles, n)](
        logits, temperature, top, best, sums, used, stride,
        VOCAB=vocab_size, TILE=TILE, SUMS=not greedy, TEMPERED=not greedy, num_warps=8,
    )  # fmt: skip
    if greedy:
        _best_kernel[(n,)](top, best, out, TILES=tiles, PAD=pad, num_warps=1)
        return out
    room = 8192 if vocab_size <= 2**17 else 16384
    shown = n if truncates else 0
    depths = torch.empty((shown, room), dtype=torch.float32, device=device)
    tokens = torch.empty((shown, room), dtype=torch.int32, device=device)
    bracket = torch.empty((shown, 3), dtype=torch.float32, device=device)
    if truncates:
        _bracket_kernel[(n,)](
            logits, temperature, top_k, top_p, min_p, top, sums, bracket, stride,
            VOCAB=vocab_size, TILES=tiles, PAD=pad, SAMPLE=_sample_size(vocab_size),
            DEEPEST=_DEEPEST, Z=_Z, num_warps=8,
        )  # fmt: skip
        _list_kernel[(tiles, n)](
            logits, temperature, bracket, mass, counts, used, depths, tokens, stride,
            VOCAB=vocab_size, TILE=TILE, ROOM=room, num_warps=16,
        )  # fmt: skip
    _draw_kernel[(n,)](
        logits, temperature, top_k, top_p, min_p, uniform, top, best, sums, mass, counts, bracket,
        used, depths, tokens, out, stride,
        VOCAB=vocab_size, TILE=TILE, TILES=tiles, PAD=pad, ROOM=room, DEEPEST=_DEEPEST,
        TRUNCATES=truncates, num_warps=16 if truncates else 8, enable_fp_fusion=FUSION,
    )  # fmt: skip
    return out


def kept_ref(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """What ``sample`` may draw from: [n, vocab_size] bool, and weights relative to the best."""
    depth = _depth(logits, temperature)
    ordered, tokens = depth.sort(dim=-1, stable=True)
    weight = ordered.double().neg().exp()
    above = weight.cumsum(dim=-1) - weight
    keep = torch.arange(logits.shape[1], device=logits.device) < top_k[:, None]
    share = top_p[:, None].double()
    keep &= (above < share * weight.sum(dim=-1, keepdim=True)) | (share >= 1)
    floor = torch.where(min_p > 0, -min_p.clamp_min(1e-30).log(), _DEEPEST).clamp(0, _DEEPEST)
    keep &= ordered <= floor[:, None]
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter(1, tokens, keep), depth.double().neg().exp()


def sample_ref(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """``sample`` in plain torch, with a sort; fp64 sums."""
    best = clean(logits).argmax(dim=-1)
    kept, weight = kept_ref(logits, temperature, top_k, top_p, min_p)
    weight *= kept
    sums = weight.cumsum(dim=-1)
    goal = uniform.double()[:, None] * sums[:, -1:]
    tokens = torch.arange(logits.shape[1], device=logits.device)
    last = torch.where(weight > 0, tokens, -1).amax(dim=-1)
    drawn = torch.searchsorted(sums, goal, right=True)[:, 0].minimum(last)
    return torch.where((temperature == 0) | (last < 0), best, drawn)


def clean(logits: Tensor) -> Tensor:
    """fp32, NaN as -inf, +inf as a large number."""
    x = logits.float()
    return torch.where(x.isnan(), -torch.inf, x).clamp_max(1e30)


def _depth(logits: Tensor, temperature: Tensor) -> Tensor:
    x = clean(logits)
    best = x.amax(dim=-1, keepdim=True).clamp_min(-1e30)
    return (best - x) * (1 / temperature.clamp_min(1e-6))[:, None]


def _sample_size(vocab_size: int) -> int:
    """A power of two near a thirty-second of the vocabulary, not above it where it is large."""
    if vocab_size > 2**17:
        return 8192
    half: int = triton.next_power_of_2(vocab_size // 2 + 1)
    return min(4096, max(16, half))


def check_logits(logits: Tensor) -> tuple[int, int]:
    """Rows and vocabulary; raises ``ValueError`` for what the kernels cannot read."""
    if logits.dim() != 2 or logits.stride(1) != 1 or not logits.shape[1]:
        raise ValueError(f"logits must be [n, vocab_size], rows contiguous: {tuple(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"logits are {logits.dtype}")
    if logits.shape[1] > 2**20:
        raise ValueError(f"vocabulary of {logits.shape[1]} is over {2**20}")
    return logits.shape[0], logits.shape[1]


def _check_columns(
    n: int, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> None:
    wanted = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "uniform"), torch.float32)
    wanted["top_k"] = torch.int32
    for (name, dtype), column in zip(
        wanted.items(), (temperature, top_k, top_p, min_p, uniform), strict=True
    ):
        if column.dtype != dtype or column.shape != (n,) or not column.is_contiguous():
            raise ValueError(f"{name} {tuple(column.shape)} {column.dtype}: [{n}] {dtype} expected")
