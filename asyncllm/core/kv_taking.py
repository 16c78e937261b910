"""Tracks which K/V one rank of a decode node has received and still expects.

The only authority on which slots may be written: none of an epoch that is not open here. Knows
positions and slots; knows neither sockets nor bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from asyncllm.core.spans import Spans

MOST_ENDED = 1 << 16


class Impossible(Exception):
    """A message that no correct sender could have sent."""


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
    had: dict[int, Spans] = field(default_factory=dict)
    links: dict[int, Hashable] = field(default_factory=dict)
    writing: int = 0
    why: str | None = None

    @property
    def complete(self) -> bool:
        """Whether everything has been written."""
        wanted = [(self.hit, self.length)]
        return self.tp > 0 and all(list(spans) == wanted for spans in self.had.values())


class Inbox:
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
        """A rank says that it will send. Gives whether it may: the epoch is here.

        Raises:
            Impossible: it has nothing for us, or others say something else.
        """
        entry = self.imports.get(epoch)
        if entry is None or entry.why is not None:
            return False
        if entry.tp == 0:
            entry.tp, entry.since = tp, now
            entry.had = {rank: Spans() for rank in self._senders(tp)}
        if entry.tp != tp or sender not in entry.had:
            raise Impossible(f"rank {sender} of {tp} sends what others do")
        if entry.links.setdefault(sender, link) != link:
            raise Impossible(f"rank {sender} sends one request on two connections")
        return True

    def wants(self, epoch: int, sender: int, first: int, count: int) -> bool:
        """Whether some of these positions are still to come from a rank.

        Raises:
            Impossible: they do not belong to the request.
        """
        entry = self.imports.get(epoch)
        if entry is None or entry.why is not None or sender not in entry.links:
            return False
        if not (count > 0 and entry.hit <= first and first + count <= entry.length):
            raise Impossible(f"positions {first} to {first + count} of a request that lacks others")
        return not entry.had[sender].covers(first, first + count)

    def write(self, epoch: int, sender: int, first: int, count: int) -> array[int] | None:
        """The slots of these positions, into which a copy begins now; None: it must not."""
        if not self.wants(epoch, sender, first, count):
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
