"""Describes which bytes of which K/V tensors make up a page; does the copies on the CPU.

Knows bytes of rows; knows neither pages' memory nor heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd

import torch
from torch import Tensor

WORDS = (8, 4, 2, 1)  # bytes that the device copies at once
KINDS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # that the CPU does


@dataclass(frozen=True, slots=True)
class Strip:
    """A range of bytes in each row of a tensor.

    Attributes:
        rows: [num_slots, row_bytes] uint8, contiguous.
        first: the first byte of a row.
        width: how many.
    """

    rows: Tensor
    first: int
    width: int


@dataclass(frozen=True)
class Strips:
    """Strips of several tensors, on one device.

    In a page lie all tokens of the first strip, then of the next.
    """

    strips: tuple[Strip, ...]

    @property
    def width(self) -> int:
        """Bytes per token, over all strips."""
        return sum(strip.width for strip in self.strips)

    @cached_property
    def word(self) -> int:
        """The largest word size that divides all addresses."""
        sizes = [
            size
            for s in self.strips
            for size in (s.rows.data_ptr(), s.rows.shape[1], s.first, s.width)
        ]
        return next(word for word in WORDS if all(size % word == 0 for size in sizes))

    @cached_property
    def table(self) -> Tensor:
        """For :func:`asyncllm.kernels.kv_rows.rows_to_page`, on the device."""
        rows, before = [], 0
        for s in self.strips:
            lengths = s.rows.shape[1], s.first, s.width, before
            rows.append((s.rows.data_ptr(), *(length // self.word for length in lengths)))
            before += s.width
        device = self.strips[0].rows.device if self.strips else None
        return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 5)


def rows_to_page(strips: Strips, slots: Tensor, page: Tensor) -> None:
    """On the CPU: copy the strips of ``slots`` [n] int32 into ``page``, bytes."""
    for rows, where, part in _pieces(strips.strips, slots, page):
        torch.index_select(rows, 0, where, out=part)


def page_to_rows(strips: Strips, slots: Tensor, page: Tensor) -> None:
    """On the CPU: the inverse of :func:`rows_to_page`."""
    for rows, where, part in _pieces(strips.strips, slots, page):
        rows.index_copy_(0, where, part)


def _pieces(
    strips: Sequence[Strip], slots: Tensor, page: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each strip all rows in equal pieces, which pieces are meant, and their part of the page.

    Torch copies whole rows much faster than parts of them, and wide words than bytes.
    """
    found, before, num = [], 0, len(slots)
    for strip in strips:
        num_slots, row = strip.rows.shape
        piece = gcd(row, strip.first, strip.width)
        per_row, per_strip = row // piece, strip.width // piece
        where = slots.long() * per_row + strip.first // piece
        if per_strip > 1:
            where = (where[:, None] + torch.arange(per_strip)).view(-1)
        size = num * strip.width
        part = page[before : before + size]
        places = gcd(piece, strip.rows.data_ptr(), part.data_ptr())
        kind = next(kind for kind in KINDS if places % kind.itemsize == 0)
        pieces = strip.rows.view(num_slots * per_row, piece)
        found.append((pieces.view(kind), where, part.view(num * per_strip, piece).view(kind)))
        before += size
    return found
