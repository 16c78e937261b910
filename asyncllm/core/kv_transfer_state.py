"""State of K/V transfers: what a rank of a prefill node still has to send, and what a rank of a
decode node has received and still expects.

Slots may only be written for an epoch that is in the :class:`ImportTable`. Knows positions and
slots; knows neither sockets nor bytes nor when anything is sent.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from asyncllm.core.interval_set import IntervalSet

MOST_ENDED = 1 << 16


class ProtocolViolation(Exception):
    """A message that no correct peer could have sent."""


@dataclass(slots=True, eq=False)
class ExportChunk:
    """Computed K/V, whose slots must not change until all of it has been copied.

    Attributes:
        first: the position of the first slot.
        left: portions, or receivers for whom it is not divided yet, that still need the slots.
        copying: running copies of it.
        dropped: nobody needs it any longer.
        said: it was reported that its slots are free.
    """

    rid: int
    seq: int
    step: int
    first: int
    slots: array[int]
    left: int
    copying: int = 0
    dropped: bool = False
    said: bool = False

    @property
    def end(self) -> int:
        """The end position."""
        return self.first + len(self.slots)

    def is_over(self) -> bool:
        """Whether its slots have just become free; True once."""
        free = not self.said and (self.left == 0 or (self.dropped and self.copying == 0))
        self.said |= free
        return free


@dataclass(frozen=True, slots=True, eq=False)
class PageRange:
    """Adjacent positions of a chunk, for one receiver: a page of bytes."""

    chunk: ExportChunk
    epoch: int
    first: int
    count: int

    @property
    def slots(self) -> array[int]:
        at = self.first - self.chunk.first
        return self.chunk.slots[at : at + self.count]


@dataclass(slots=True, eq=False)
class OpenExport:
    """A request whose K/V are needed elsewhere.

    Attributes:
        hit, length: the positions that are.
        receivers: ranks there that still get something from this one.
        chunks: those whose slots are not free yet, by number.
        computed: when the last of them could be sent; None: not yet.
    """

    rid: int
    epoch: int
    hit: int
    length: int
    receivers: tuple[int, ...]
    chunks: dict[int, ExportChunk] = field(default_factory=dict)
    computed: float | None = None


class ExportTable:
    """The exports of one rank. Every chunk is reported as over exactly once."""

    def __init__(self) -> None:
        self.exports: dict[int, OpenExport] = {}
        self._waiting: list[ExportChunk] = []  # waiting for the step that computes them
        self._over = 0  # the last finished step

    def export(self, export: OpenExport) -> None:
        """A request that will be sent. A second one of its rid is ignored."""
        self.exports.setdefault(export.rid, export)

    def computed(self, chunk: ExportChunk) -> ExportChunk | None:
        """Take in a chunk; gives it if it can be sent now. Its ``left`` and place are set here.

        One of which nothing is wanted is over at once.
        """
        export = self.exports.get(chunk.rid)
        if export is None:
            chunk.left = 0
            return chunk
        first, end = max(chunk.first, export.hit), min(chunk.end, export.length)
        at = first - chunk.first
        chunk.slots = chunk.slots[at : at + end - first] if first < end else array("i")
        chunk.first, chunk.left = first, len(export.receivers) if chunk.slots else 0
        if chunk.left == 0:
            return chunk
        export.chunks[chunk.seq] = chunk
        if chunk.step <= self._over:
            return chunk
        self._waiting.append(chunk)
        return None

    def step_over(self, step: int) -> list[ExportChunk]:
        """This step and all before it have finished; gives what can be sent now."""
        self._over = max(self._over, step)
        ready = [chunk for chunk in self._waiting if chunk.step <= self._over and not chunk.dropped]
        self._waiting = [
            chunk for chunk in self._waiting if chunk.step > self._over and not chunk.dropped
        ]
        return ready

    def divide(self, chunk: ExportChunk, tokens: int) -> list[PageRange]:
        """Portions of a chunk for one receiver, of at most ``tokens``; none of a dropped one."""
        export = self.exports.get(chunk.rid)
        if chunk.dropped or export is None:
            return []
        firsts = range(chunk.first, chunk.end, tokens)
        chunk.left += len(firsts) - 1
        return [PageRange(chunk, export.epoch, at, min(tokens, chunk.end - at)) for at in firsts]

    def copied(self, portion: PageRange) -> bool:
        """A copy is done; returns whether the chunk's slots are free now."""
        chunk = portion.chunk
        chunk.copying -= 1
        chunk.left -= 1
        over = chunk.is_over()
        if over and (export := self.exports.get(chunk.rid)) is not None:
            export.chunks.pop(chunk.seq, None)
        return over

    def drop(self, rid: int) -> list[ExportChunk]:
        """Nothing more of a request is sent; gives the chunks whose slots are free now.

        Those that are being copied follow by :meth:`copied`.
        """
        export = self.exports.pop(rid, None)
        if export is None:
            return []
        for chunk in export.chunks.values():
            chunk.dropped = True
        self._waiting = [chunk for chunk in self._waiting if not chunk.dropped]
        return [chunk for chunk in export.chunks.values() if chunk.is_over()]


@dataclass(slots=True, eq=False)
class OpenImport:
    """A request whose K/V are received from elsewhere.

    Attributes:
        hit, length: the positions to receive.
        since: when it was told of, or when its first sender was heard of.
        tp: ranks of the server that they come from; 0: none has been heard of.
        had: written positions, by sender.
        links: the connection of each sender.
        writing: running copies into its slots.
        why: it is over, for this reason, as soon as no copy is under way; None: it is not.
    """

    rid: int
    hit: int
    length: int
    slots: array[int]
    since: float
    tp: int = 0
    had: dict[int, IntervalSet] = field(default_factory=dict)
    links: dict[int, Hashable] = field(default_factory=dict)
    writing: int = 0
    why: str | None = None

    @property
    def complete(self) -> bool:
        """Whether everything has been written."""
        wanted = [(self.hit, self.length)]
        return self.tp > 0 and all(list(spans) == wanted for spans in self.had.values())


class ImportTable:
    """The imports of one rank.

    Args:
        senders: which ranks, of so many, send something to this one.
    """

    def __init__(self, senders: Callable[[int], tuple[int, ...]]) -> None:
        self._senders = senders
        self.imports: dict[int, OpenImport] = {}
        self._ended: dict[int, None] = {}  # recently ended or rejected epochs

    def is_early(self, epoch: int) -> bool:
        """Whether it has never been here: its sender may have been quicker than our scheduler."""
        return epoch not in self.imports and epoch not in self._ended

    def end(self, epoch: int) -> None:
        """Mark an epoch as ended, so that it is no longer early."""
        self._ended[epoch] = None
        if len(self._ended) > MOST_ENDED:
            del self._ended[next(iter(self._ended))]

    def expect(self, entry: OpenImport) -> None:
        """Allow writing K/V of this rid."""
        self.imports[entry.rid] = entry

    def begin(self, epoch: int, tp: int, sender: int, link: Hashable, now: float) -> bool:
        """A rank says that it will send. Gives whether it may: the epoch is here, and nobody else
        has said so before, whoever of the two is wrong.

        Raises:
            ProtocolViolation: it has nothing for us.
        """
        entry = self.imports.get(epoch)
        if entry is None or entry.why is not None:
            return False
        if sender not in self._senders(tp):
            raise ProtocolViolation(f"rank {sender} of {tp} sends what others do")
        if entry.tp == 0:
            entry.tp, entry.since = tp, now
            entry.had = {rank: IntervalSet() for rank in self._senders(tp)}
        return entry.tp == tp and entry.links.setdefault(sender, link) == link

    def wants(self, epoch: int, sender: int, link: Hashable, first: int, count: int) -> bool:
        """Whether some of these positions are still to come from a rank, on this connection.

        Raises:
            ProtocolViolation: they do not belong to the request.
        """
        entry = self.imports.get(epoch)
        if entry is None or entry.why is not None or entry.links.get(sender) != link:
            return False
        if not (count > 0 and entry.hit <= first and first + count <= entry.length):
            raise ProtocolViolation(
                f"positions {first} to {first + count} of a request that lacks others"
            )
        return not entry.had[sender].covers(first, first + count)

    def write(
        self, epoch: int, sender: int, link: Hashable, first: int, count: int
    ) -> array[int] | None:
        """The slots of these positions, into which a copy begins now; None: it must not."""
        if not self.wants(epoch, sender, link, first, count):
            return None
        entry = self.imports[epoch]
        entry.writing += 1
        at = first - entry.hit
        return entry.slots[at : at + count]

    def written(self, epoch: int, sender: int, first: int, count: int) -> OpenImport | None:
        """The copy is done. Gives the import if it is over now: complete, or given up before."""
        entry = self.imports[epoch]
        entry.writing -= 1
        entry.had[sender].add(first, first + count)
        return self._if_over(entry)

    def drop(self, epoch: int, why: str) -> OpenImport | None:
        """Write nothing more of it. Gives it if it is over now; else :meth:`written` does."""
        entry = self.imports.get(epoch)
        if entry is None or entry.why is not None:
            return None
        entry.why = why
        return self._if_over(entry)

    def _if_over(self, entry: OpenImport) -> OpenImport | None:
        if entry.writing or (entry.why is None and not entry.complete):
            return None
        del self.imports[entry.rid]
        self.end(entry.rid)
        return entry
