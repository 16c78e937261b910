"""A tile of a split-K product: inputs are divided among programs; the last one adds up the parts.

Owns the buffer of parts, one per stream: products of one stream run one after the other. Parts are
added in their order, whichever program is last.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.autotune import num_sms

_PARTIAL = 2**22  # float32 numbers
_COUNTERS = 2**14
_MOST = 16  # parts


class TileConfig(Protocol):
    """What the configurations of products have in common: rows of x and outputs of a tile; inputs
    are divided until there are ``per_sm`` programs to a multiprocessor (0: never); ``early``:
    programs begin while the kernel before still runs, if it is not 0."""

    @property
    def rows(self) -> int: ...

    @property
    def block_n(self) -> int: ...

    @property
    def per_sm(self) -> int: ...

    @property
    def early(self) -> int: ...


@triton.jit
def gathered(made, partial_ptr, counters_ptr):
    """(The sum of what the programs of a tile made, whether this is the last of them); of those
    before it the sum means nothing. The tile is ``program_id(0)``, the part ``program_id(1)``."""
    parts = tl.num_programs(1)
    ROWS: tl.constexpr = made.shape[0]
    COLUMNS: tl.constexpr = made.shape[1]
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at = partial_ptr + (tl.program_id(0) * parts).to(tl.int64) * (ROWS * COLUMNS) + place
    tl.store(at + tl.program_id(1) * (ROWS * COLUMNS), made)
    counter = counters_ptr + tl.program_id(0)
    tl.debug_barrier()  # all threads have stored before one of them says so
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # so many are on their way at once, as registers allow
    TOGETHER: tl.constexpr = 4 if ROWS * COLUMNS <= 2048 else 2 if ROWS * COLUMNS <= 4096 else 1
    if last:
        for first in tl.range(0, parts, TOGETHER, num_stages=1):
            for more in tl.static_range(TOGETHER):
                part_at = at + (first + more) * (ROWS * COLUMNS)
                # nothing past the last part
                there = place < (parts - first - more) * (ROWS * COLUMNS)
                total += tl.load(part_at, mask=there, other=0.0, cache_modifier=".cg")
        tl.store(counter, 0)  # for the next product
    return total, last


def num_parts(
    tiles: int,
    tile_size: int,
    steps: int,
    per_sm: int,
    device: torch.device,
    *,
    early: bool = False,
) -> int:
    """Into how many parts to divide the inputs: at most ``per_sm`` programs to a multiprocessor, as
    far as the space and the ``steps`` of a tile's inputs go. Of these the number by which the
    multiprocessor with the most steps has the fewest, and of equals the largest, so that more is on
    its way from memory at once. Programs that begin ``early`` go where the kernel before ends
    first: there are as many as can be, lest some multiprocessors have room for more than others."""
    fit = min(_PARTIAL // (tiles * tile_size), steps, _MOST)
    if tiles > _COUNTERS or fit < 2:
        return 1
    sms = num_sms(device)
    most = max(1, min(per_sm * sms // tiles, fit))
    if early:
        return most

    def longest(parts: int) -> int:
        return -(-tiles * parts // sms) * -(-steps // parts)

    return min(range(1, most + 1), key=lambda parts: (longest(parts), -parts))


def row_class_of(configs: Mapping[str, object], num_rows: int) -> str:
    """The class of a number of rows: the first key of ``configs`` that is not below it, or many."""
    return next((key for key in configs if key != "many" and num_rows <= int(key)), "many")


def divided(
    num_rows: int, n: int, steps: int, config: TileConfig, size: str, device: torch.device
) -> tuple[tuple[int, int], Tensor | None, Tensor | None]:
    """The grid of a product with ``n`` outputs, and the ``space`` of its parts; None: there is one.

    Args:
        steps: of a tile's inputs.
        size: the class of ``num_rows``; inputs are divided alike for all of a class.
    """
    tiles, most = triton.cdiv(n, config.block_n), num_rows if size == "many" else int(size)
    tile_size = config.block_n * config.rows
    num_tiles = tiles * triton.cdiv(most, config.rows)
    early = config.early > 0
    parts = num_parts(num_tiles, tile_size, steps, config.per_sm, device, early=early)
    added, counters = space(device) if parts > 1 else (None, None)
    return (tiles * triton.cdiv(num_rows, config.rows), parts), added, counters


def space(device: torch.device) -> tuple[Tensor, Tensor]:
    """Where parts of products on the current stream wait, and the counters of tiles, which are zero
    between products. At start, products of two streams run at the same time: see ``prepare`` in
    ``engine/quant_cuda.py``."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _space_of(device, stream)


@functools.cache
def _space_of(device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    partial = torch.empty(_PARTIAL, dtype=torch.float32, device=device)
    return partial, torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
