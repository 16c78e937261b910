"""Packs K/V of slots into pages of bytes and back, for transfers between servers.

A page is a share of this rank's K/V: of some tokens, in each layer's tensors, the bytes of some
neighbouring heads. It has no gaps, and quantised K/V stay as they are. Owns the memory of pages and
the stream of their copies; knows neither sockets nor whose the slots are.
"""

from __future__ import annotations

import queue
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Protocol

import torch
from torch import Tensor

from asyncllm.core.kv_heads import HeadRange
from asyncllm.models.attention import KvLayout, LayerKv

WORDS = (8, 4, 2, 1)  # bytes that the device copies at once
KINDS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # that the CPU does
STAMP = 16  # bytes at the end of each row of pages; the first eight say what the page holds


@dataclass(frozen=True, slots=True)
class RowSlice:
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
class SliceSet:
    """Strips of several tensors, on one device.

    In a page lie all tokens of the first strip, then of the next.
    """

    strips: tuple[RowSlice, ...]

    @cached_property
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


def rows_to_page(strips: SliceSet, slots: Tensor, page: Tensor) -> None:
    """On the CPU: copy the strips of ``slots`` [n] int32 into ``page``, bytes."""
    for rows, where, part in _pieces(strips.strips, slots, page):
        torch.index_select(rows, 0, where, out=part)


def page_to_rows(strips: SliceSet, slots: Tensor, page: Tensor) -> None:
    """On the CPU: the inverse of :func:`rows_to_page`."""
    for rows, where, part in _pieces(strips.strips, slots, page):
        rows.index_copy_(0, where, part)


def _pieces(
    strips: Sequence[RowSlice], slots: Tensor, page: Tensor
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


class KvBytes:
    """The K/V tensors of a rank as bytes.

    Args:
        kv: of each layer, with one slot space for all.
        layout: that created them.
    """

    def __init__(self, kv: Sequence[LayerKv], layout: KvLayout) -> None:
        self._layers = [
            (layout.heads(spec), [as_bytes(x) for x in tensors])
            for spec, tensors in zip(layout.layers, kv, strict=True)
        ]
        self.device = kv[0][0].device

    @property
    def slot_bytes(self) -> int:
        """Bytes per token."""
        return sum(rows.shape[1] for _, tensors in self._layers for rows in tensors)

    def whole(self) -> SliceSet:
        """All bytes."""
        return self.strips([HeadRange(0, 0, heads) for heads, _ in self._layers], sent=True)

    def strips(self, parts: Sequence[HeadRange | None], *, sent: bool) -> SliceSet:
        """The bytes of some heads.

        Args:
            parts: of each layer; None: nothing of it.
            sent: heads are those that the sender of the part counts; False: its receiver does.
        """
        strips = []
        for part, (heads, tensors) in zip(parts, self._layers, strict=True):
            if part is None:
                continue
            first = part.sent if sent else part.taken
            for rows in tensors:
                size = rows.shape[1] // heads
                strips.append(RowSlice(rows, first * size, part.count * size))
        return SliceSet(tuple(strips))


def as_bytes(x: Tensor) -> Tensor:
    """[num_slots, bytes] of a tensor whose dimension 0 is the slot; the same memory."""
    return (x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)).view(torch.uint8)


class QueuedCopy(Protocol):
    """A queued copy."""

    def wait(self) -> None:
        """Block, without the GIL, until it is done. Raises what the device raised."""


class PageBuffers(Protocol):
    """A number of pages, and copies between them and slots.

    A page's stamp changes before its bytes do. So who reads the bytes of another process's page and
    then the stamp knows whether the bytes are those that the stamp belongs to.

    Attributes:
        num: pages, from 0 on.
        size: bytes of each.
    """

    num: int
    size: int

    def fill(
        self, page: int, strips: SliceSet, slots: array[int], *, host: bool, stamp: int = 0
    ) -> QueuedCopy:
        """Queue a copy of slots into a page; ``host``: it is then in host memory as well."""

    def empty(
        self,
        page: int,
        strips: SliceSet,
        slots: array[int],
        *,
        host: bool,
        after: QueuedCopy | None = None,
    ) -> QueuedCopy:
        """Queue a copy of a page into slots; ``host``: of what is there in host memory; ``after``:
        not before this one is done."""

    def host(self, page: int) -> memoryview:
        """The page in host memory, to read and write."""

    def device(self, page: int) -> Tensor:
        """The page on the device, bytes."""

    def seen(self, page: int) -> Tensor:
        """[1] int64 in host memory, for the stamp of another process's page that comes here."""


@dataclass(frozen=True, slots=True)
class FinishedCopy:
    """A finished copy."""

    def wait(self) -> None:
        pass


Then = Callable[[], object]


class CopyWaiter:
    """A thread that waits for copies in the order in which they were queued, so that whoever queues
    them goes on meanwhile.

    Args:
        wake: called in the thread when there is something in :meth:`over`.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._queued: queue.SimpleQueue[tuple[QueuedCopy, Then] | None] = queue.SimpleQueue()
        self._over: deque[Then] = deque()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def watch(self, copied: QueuedCopy, then: Then) -> None:
        """``then`` is given back by :meth:`over` when the copy is done."""
        if isinstance(copied, FinishedCopy):
            self._over.append(then)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv waiter", daemon=True)
            self._thread.start()
        self._queued.put((copied, then))

    @property
    def idle(self) -> bool:
        """:meth:`over` has nothing to give now."""
        return not self._over and self._error is None

    def over(self) -> Iterator[Then]:
        """What belongs to copies that are done. Raises what the device raised."""
        for _ in range(len(self._over)):
            yield self._over.popleft()
        if self._error is not None:
            raise self._error

    def close(self, seconds: float | None = None) -> None:
        """End the thread when all that was queued is done; wait for that, at most so long."""
        if self._thread is not None:
            self._queued.put(None)
            self._thread.join(seconds)

    def _run(self) -> None:
        while (entry := self._queued.get()) is not None:
            copied, then = entry
            try:
                copied.wait()
            except RuntimeError as error:  # all of torch's are
                self._error = error
            else:
                self._over.append(then)
            self._wake()


class CpuPages:
    """Pages in main memory; copies are made at once.

    Args:
        memory: [num, row_bytes(size)], e.g. shared with another process; None: its own memory.
    """

    def __init__(self, num: int, size: int, memory: Tensor | None = None) -> None:
        self.num, self.size = num, size
        if memory is None:
            memory = torch.zeros(num, row_bytes(size), dtype=torch.uint8)
        self._memory, self._stamps = memory[:, :size], stamps(memory)
        self._seen = torch.zeros(num, 1, dtype=torch.int64)

    def fill(
        self, page: int, strips: SliceSet, slots: array[int], *, host: bool, stamp: int = 0
    ) -> FinishedCopy:
        self._stamps[page].fill_(stamp)
        rows_to_page(strips, _column(slots), self._memory[page])
        return FinishedCopy()

    def empty(
        self,
        page: int,
        strips: SliceSet,
        slots: array[int],
        *,
        host: bool,
        after: QueuedCopy | None = None,
    ) -> FinishedCopy:
        page_to_rows(strips, _column(slots), self._memory[page])
        return FinishedCopy()

    def host(self, page: int) -> memoryview:
        return self._memory[page].numpy().data

    def device(self, page: int) -> Tensor:
        return self._memory[page]

    def seen(self, page: int) -> Tensor:
        return self._seen[page]


def row_bytes(size: int) -> int:
    """Of a page of so many bytes, with its stamp."""
    return size + -size % STAMP + STAMP


def stamps(memory: Tensor) -> Tensor:
    """[num, 1] int64, of pages [num, row_bytes(size)]."""
    return memory[:, -STAMP : 8 - STAMP].view(torch.int64)


@dataclass(frozen=True, slots=True)
class CudaCopy:
    """A copy on a stream.

    Attributes:
        kept: what must stay until it is done.
    """

    event: torch.cuda.Event
    kept: object

    def wait(self) -> None:
        self.event.synchronize()


def warm_up(pages: PageBuffers, kv: KvBytes, slot: int) -> None:
    """Copy a slot that nobody reads into all pages and back, so that no transfer waits to compile
    or for pinned memory; start-up only."""
    strips = kv.whole()
    for page in range(pages.num):
        whole = array("i", [slot]) * (pages.size // strips.width)
        pages.fill(page, strips, whole, host=False).wait()
    pages.empty(0, strips, array("i", [slot]), host=False).wait()


class CudaPages:
    """Pages on the device, each with pinned memory on the host if that is asked for; copies go
    through a stream of their own, concurrent with steps.

    Attributes:
        all: [num, row_bytes(size)] bytes.
    """

    def __init__(self, num: int, size: int, device: torch.device) -> None:
        # imported here: without a GPU there may be no Triton
        from asyncllm.kernels import kv_rows

        self._kernels = kv_rows
        self.num, self.size, self._device = num, size, device
        self._stream = torch.cuda.Stream(device)
        self._columns: dict[int, tuple[Tensor, Tensor]] = {}  # of each page, pinned and there
        self.all = torch.zeros(num, row_bytes(size), dtype=torch.uint8, device=device)
        self._stamps, self._bytes = stamps(self.all), self.all[:, :size]
        self._seen = torch.zeros(num, 1, dtype=torch.int64, pin_memory=True)
        self._host: Tensor | None = None

    def fill(
        self, page: int, strips: SliceSet, slots: array[int], *, host: bool, stamp: int = 0
    ) -> CudaCopy:
        size = len(slots) * strips.width
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            there = self._there(page, slots)
            self._stamps[page].fill_(stamp)
            self._kernels.rows_to_page(strips.table, strips.word, there, self._bytes[page])
            if host:
                self._pinned[page, :size].copy_(self._bytes[page, :size], non_blocking=True)
            return recorded(self._stream)

    def empty(
        self,
        page: int,
        strips: SliceSet,
        slots: array[int],
        *,
        host: bool,
        after: QueuedCopy | None = None,
    ) -> CudaCopy:
        size = len(slots) * strips.width
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            there = self._there(page, slots)
            if host:
                self._bytes[page, :size].copy_(self._pinned[page, :size], non_blocking=True)
            if isinstance(after, CudaCopy):
                self._stream.wait_event(after.event)
            self._kernels.page_to_rows(strips.table, strips.word, there, self._bytes[page])
            return recorded(self._stream, after)

    def host(self, page: int) -> memoryview:
        return self._pinned[page].numpy().data

    def device(self, page: int) -> Tensor:
        return self._bytes[page]

    def seen(self, page: int) -> Tensor:
        return self._seen[page]

    @property
    def _pinned(self) -> Tensor:
        """Allocated on first use: not all transports go through the host."""
        if self._host is None:
            self._host = torch.empty(self.num, self.size, dtype=torch.uint8, pin_memory=True)
        return self._host

    def _there(self, page: int, slots: array[int]) -> Tensor:
        """On the device, by way of pinned memory that is the page's: neither is used for another
        copy before the page is."""
        num = len(slots)
        if page not in self._columns or len(self._columns[page][0]) < num:
            size = 1 << max(num - 1, 1).bit_length()
            pinned = torch.empty(size, dtype=torch.int32, pin_memory=True)
            self._columns[page] = pinned, torch.empty_like(pinned, device=self._device)
        pinned, there = (column[:num] for column in self._columns[page])
        pinned.copy_(_column(slots))
        return there.copy_(pinned, non_blocking=True)


def recorded(stream: torch.cuda.Stream, kept: object = None) -> CudaCopy:
    """What has been queued on ``stream`` until now."""
    return CudaCopy(stream.record_event(torch.cuda.Event(blocking=True)), kept)


def _column(slots: array[int]) -> Tensor:
    return torch.frombuffer(slots, dtype=torch.int32) if slots else torch.zeros(0).int()
