"""Rows of slots into a page and back, against their references."""

import pytest
import torch
from torch import Tensor

from asyncllm.engine import kv_pages
from asyncllm.engine.kv_pages import RowSlice, SliceSet
from asyncllm.kernels.kv_rows import (
    page_to_rows,
    page_to_rows_ref,
    rows_to_page,
    rows_to_page_ref,
)
from tests.kernels.harness import DEVICE, no_sync

NUM_SLOTS = 67
# bytes of a row, the first one, how many; some tensors for each size of words
TABLES = {
    8: ((512, 0, 512), (512, 128, 256), (24, 8, 8)),
    4: ((512, 0, 512), (512, 128, 256), (16, 4, 4), (4, 0, 4)),
    2: ((66, 2, 64), (512, 256, 256)),
    1: ((35, 5, 7), (1, 0, 1), (300, 0, 299)),
}


def noise(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)


def strips_of(word: int) -> SliceSet:
    rows = [noise(NUM_SLOTS, row, seed=i) for i, (row, _, _) in enumerate(TABLES[word])]
    kinds = zip(rows, TABLES[word], strict=True)
    strips = SliceSet(tuple(RowSlice(x, first, width) for x, (_, first, width) in kinds))
    assert strips.word == word
    return strips


def views(strips: SliceSet) -> list[Tensor]:
    return [s.rows[:, s.first : s.first + s.width] for s in strips.strips]


def slots_of(num: int) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randperm(NUM_SLOTS, generator=generator)[:num].int().to(DEVICE)


@pytest.mark.parametrize("num", [0, 1, 31, 32, 65])
@pytest.mark.parametrize("word", TABLES)
def test_rows_to_page(word: int, num: int) -> None:
    strips, slots = strips_of(word), slots_of(num)
    pages = [noise(num * strips.width + 8, seed=9) for _ in range(3)]
    assert len(strips.table) == len(strips.strips)  # made once, which waits
    with no_sync():
        rows_to_page(strips.table, strips.word, slots, pages[0])
    rows_to_page_ref(views(strips), slots, pages[1])
    assert torch.equal(pages[0], pages[1])
    if DEVICE == "cpu":
        kv_pages.rows_to_page(strips, slots, pages[2])
        assert torch.equal(pages[2], pages[1])


@pytest.mark.parametrize("num", [0, 1, 31, 32, 65])
@pytest.mark.parametrize("word", TABLES)
def test_page_to_rows(word: int, num: int) -> None:
    slots, (got, want, cpu) = slots_of(num), [strips_of(word) for _ in range(3)]
    page = noise(num * got.width, seed=9)
    assert len(got.table) == len(got.strips)
    with no_sync():
        page_to_rows(got.table, got.word, slots, page)
    page_to_rows_ref(views(want), slots, page)
    for a, b in zip(got.strips, want.strips, strict=True):
        assert torch.equal(a.rows, b.rows)
    if DEVICE == "cpu":
        kv_pages.page_to_rows(cpu, slots, page)
        for a, b in zip(cpu.strips, want.strips, strict=True):
            assert torch.equal(a.rows, b.rows)


@pytest.mark.parametrize(
    ("slots", "page"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3000, dtype=torch.uint8)),
        (torch.zeros(3, dtype=torch.int32), torch.zeros(3000, dtype=torch.int8)),
    ],
    ids=["int64 slots", "int8 page"],
)
def test_what_does_not_fit_is_refused(slots: Tensor, page: Tensor) -> None:
    strips = strips_of(4)
    for copy in (rows_to_page, page_to_rows):
        with pytest.raises(ValueError, match="expected"):
            copy(strips.table, 4, slots.to(DEVICE), page.to(DEVICE))
    with pytest.raises(ValueError, match="table"):
        rows_to_page(strips.table[:, :4], 4, slots.int().to(DEVICE), page.byte().to(DEVICE))
