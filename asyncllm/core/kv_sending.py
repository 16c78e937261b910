"""Tracks which K/V one rank of a prefill node still has to send, and to whom.

Knows positions and slots; knows neither sockets nor bytes nor when anything is sent.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Lot:
    """Computed K/V, whose slots must not change until all of it has been copied.

    Attributes:
        first: the position of the first slot.
        left: portions, or takers for whom it is not divided yet, that still need the slots.
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
class Portion:
    """Adjacent positions of a lot, for one taker: a page of bytes."""

    lot: Lot
    epoch: int
    first: int
    count: int

    @property
    def slots(self) -> array[int]:
        at = self.first - self.lot.first
        return self.lot.slots[at : at + self.count]


@dataclass(slots=True, eq=False)
class OpenExport:
    """A request whose K/V are needed elsewhere.

    Attributes:
        hit, length: the positions that are.
        takers: ranks there that still get something from this one.
        lots: lots whose slots are not free yet, by number.
        computed: when the last of them could be sent; None: not yet.
    """

    rid: int
    epoch: int
    hit: int
    length: int
    takers: tuple[int, ...]
    lots: dict[int, Lot] = field(default_factory=dict)
    computed: float | None = None


class PageOutbox:
    """The exports of one rank. Every lot is reported as over exactly once."""

    def __init__(self) -> None:
        self.exports: dict[int, OpenExport] = {}
        self._waiting: list[Lot] = []  # waiting for the step that computes them
        self._over = 0  # the last finished step

    def export(self, export: OpenExport) -> None:
        """A request that will be sent. A second one of its rid is ignored."""
        self.exports.setdefault(export.rid, export)

    def computed(self, lot: Lot) -> Lot | None:
        """Take in a chunk; gives it if it can be sent now. Its ``left`` and place are set here.

        One of which nothing is wanted is over at once.
        """
        export = self.exports.get(lot.rid)
        if export is None:
            lot.left = 0
            return lot
        first, end = max(lot.first, export.hit), min(lot.end, export.length)
        at = first - lot.first
        lot.slots = lot.slots[at : at + end - first] if first < end else array("i")
        lot.first, lot.left = first, len(export.takers) if lot.slots else 0
        if lot.left == 0:
            return lot
        export.lots[lot.seq] = lot
        if lot.step <= self._over:
            return lot
        self._waiting.append(lot)
        return None

    def step_over(self, step: int) -> list[Lot]:
        """This step and all before it have finished; gives what can be sent now."""
        self._over = max(self._over, step)
        ready = [lot for lot in self._waiting if lot.step <= self._over and not lot.dropped]
        self._waiting = [lot for lot in self._waiting if lot.step > self._over and not lot.dropped]
        return ready

    def divide(self, lot: Lot, tokens: int) -> list[Portion]:
        """Portions of a lot for one taker, of at most so many tokens; none of a dropped one."""
        export = self.exports.get(lot.rid)
        if lot.dropped or export is None:
            return []
        firsts = range(lot.first, lot.end, tokens)
        lot.left += len(firsts) - 1
        return [Portion(lot, export.epoch, at, min(tokens, lot.end - at)) for at in firsts]

    def copied(self, portion: Portion) -> bool:
        """A copy is done; returns whether the lot's slots are free now."""
        lot = portion.lot
        lot.copying -= 1
        lot.left -= 1
        over = lot.is_over()
        if over and (export := self.exports.get(lot.rid)) is not None:
            export.lots.pop(lot.seq, None)
        return over

    def drop(self, rid: int) -> list[Lot]:
        """Nothing more of a request is sent; gives the lots whose slots are free now.

        Those that are being copied follow by :meth:`copied`.
        """
        export = self.exports.pop(rid, None)
        if export is None:
            return []
        for lot in export.lots.values():
            lot.dropped = True
        self._waiting = [lot for lot in self._waiting if not lot.dropped]
        return [lot for lot in export.lots.values() if lot.is_over()]
