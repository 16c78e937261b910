"""Copies parts of the rows of K/V slots, from many tensors, into one page and back.

Knows bytes at addresses; does not know what they mean.
"""

# mypy: allow-incomplete-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _WORDS = 32, 128
_KINDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@triton.jit(do_not_specialize=["num"], do_not_specialize_on_alignment=["slots_ptr", "page_ptr"])
def _copy_kernel(
    table_ptr,
    slots_ptr,
    page_ptr,
    num,
    COLUMNS: tl.constexpr,
    TO_PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
):
    entry = table_ptr + tl.program_id(1) * COLUMNS
    rows_ptr = tl.load(entry).to(page_ptr.dtype)
    row_words, first = tl.load(entry + 1), tl.load(entry + 2)
    width, before = tl.load(entry + 3), tl.load(entry + 4)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < num
    slot = tl.load(slots_ptr + token, mask=live, other=0).to(tl.int64)
    in_rows = rows_ptr + (slot * row_words + first)[:, None]
    in_page = page_ptr + (before * num + token.to(tl.int64) * width)[:, None]
    for begin in range(0, width, WORDS):
        col = begin + tl.arange(0, WORDS)
        mask = live[:, None] & (col < width)[None, :]
        if TO_PAGE:
            tl.store(in_page + col[None, :], tl.load(in_rows + col[None, :], mask=mask), mask=mask)
        else:
            tl.store(in_rows + col[None, :], tl.load(in_page + col[None, :], mask=mask), mask=mask)


def rows_to_page(table: Tensor, word: int, slots: Tensor, page: Tensor) -> None:
    """Copy some bytes of some slots' rows, in many tensors, into a page.

    Args:
        table: [num, 5] int64, a row for each tensor: address of its first row, words of a row, the
            first word that is meant, how many, and how many all tensors before it have.
        word: 8, 4, 2 or 1 bytes, which divides all addresses.
        slots: [n] int32, in range.
        page: uint8, contiguous; [tensor][slot][word] in it. What is behind stays.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``rows_to_page_ref``. One launch. Does not synchronise.
    """
    _copy(table, word, slots, page, to_page=True)


def page_to_rows(table: Tensor, word: int, slots: Tensor, page: Tensor) -> None:
    """The inverse of :func:`rows_to_page`; no slot may come twice.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``page_to_rows_ref``. One launch. Does not synchronise.
    """
    _copy(table, word, slots, page, to_page=False)


def _copy(table: Tensor, word: int, slots: Tensor, page: Tensor, *, to_page: bool) -> None:
    if slots.dim() != 1 or slots.dtype != torch.int32 or not slots.is_contiguous():
        raise ValueError(f"slots {tuple(slots.shape)} {slots.dtype}: [n] int32 expected")
    if page.dim() != 1 or page.dtype != torch.uint8 or not page.is_contiguous():
        raise ValueError(f"page {tuple(page.shape)} {page.dtype}: contiguous bytes expected")
    columns = 5
    if table.dim() != 2 or table.shape[1] != columns or table.dtype != torch.int64:
        raise ValueError(f"table {tuple(table.shape)} {table.dtype}: [num, 5] int64 expected")
    if len(slots) and len(table):
        _copy_kernel[(triton.cdiv(len(slots), _TOKENS), len(table))](
            table,
            slots,
            page[: len(page) // word * word].view(_KINDS[word]),
            len(slots),
            COLUMNS=columns,
            TO_PAGE=to_page,
            TOKENS=_TOKENS,
            WORDS=_WORDS,
            num_warps=4,
        )


def rows_to_page_ref(strips: Sequence[Tensor], slots: Tensor, page: Tensor) -> None:
    """``rows_to_page`` in plain torch; ``strips``: of each tensor the bytes [num_slots, width]."""
    before = 0
    for strip in strips:
        found = strip[slots.long()].reshape(-1)
        page[before : before + len(found)] = found
        before += len(found)


def page_to_rows_ref(strips: Sequence[Tensor], slots: Tensor, page: Tensor) -> None:
    """``page_to_rows`` in plain torch; ``strips`` as in ``rows_to_page_ref``."""
    before = 0
    for strip in strips:
        size = len(slots) * strip.shape[1]
        strip[slots.long()] = page[before : before + size].view(len(slots), strip.shape[1])
        before += size
