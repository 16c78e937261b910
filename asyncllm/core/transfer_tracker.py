"""K/V transfers to and from other servers: who may touch which lane's slots, and how long.

Knows requests, lanes, ranks and slot numbers; knows neither the contents of slots nor how K/V
travel.

A slot is not reused while its lane has holds. An import is one hold, from when the ranks are
sent its slots until each of them has confirmed that it writes no more. Each ``KvComputed`` of an
export is one, until each rank has confirmed that it is done with those slots.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from asyncllm.core.steps import Lane
from asyncllm.messages import CancelTransfer, ExportKv, ImportKv, KvComputed
from asyncllm.records import KvDestination

TransferOrder = ImportKv | ExportKv | KvComputed | CancelTransfer


@dataclass(slots=True, eq=False)
class SlotHold:
    """These ranks may still touch a lane's slots."""

    lane: Lane
    ranks: set[int]


@dataclass(slots=True, eq=False)
class IncomingKv:
    """A request's K/V in transit to this server."""

    slot_hold: SlotHold
    num_tokens: int
    void: bool = False  # no longer wanted
    lapsed: bool = False  # a rank did not receive all


@dataclass(slots=True, eq=False)
class OutgoingKv:
    """A request's K/V in transit to another server, over all its lives here."""

    to: KvDestination
    end: int  # end of the positions sent to the ranks so far
    num_told: int = 0
    slot_holds: dict[int, SlotHold] = field(default_factory=dict)  # by KvComputed.seq
    ended: bool = False  # the request has
    void: bool = False  # the ranks have been told to forget it


class TransferTracker:
    """All K/V that move in or out.

    Args:
        num_ranks: of the group, each of which has a part of all K/V.

    Attributes:
        told: messages for the ranks. The shell takes and clears it.
        placed: (rid, cached tokens, all tokens) of requests that wait for K/V. Taken and cleared
            too.
        left: rids of ended requests whose K/V have been sent or dropped. Taken and cleared too.
        imports, imported_tokens: counts of arrivals since the start.
        lapses: wanted imports that did not arrive.
        exports, exported_tokens: counts of what has been sent.
    """

    def __init__(self, num_ranks: int) -> None:
        self._ranks = frozenset(range(num_ranks))
        self.incoming: dict[int, IncomingKv] = {}  # by rid, as those below
        self.outgoing: dict[int, OutgoingKv] = {}
        self.told: list[TransferOrder] = []
        self.left: list[int] = []
        self.placed: list[tuple[int, int, int]] = []
        self.imports = self.imported_tokens = self.lapses = 0
        self.exports = self.exported_tokens = 0

    def __bool__(self) -> bool:
        """Whether slots may still be touched, or an answer is awaited."""
        return bool(self.incoming or self.outgoing)

    @property
    def leaving(self) -> bool:
        """Slots of a retired lane will become free once a rank is done with them."""
        slot_holds = [flow.slot_hold for flow in self.incoming.values()]
        for flow in self.outgoing.values():
            slot_holds += flow.slot_holds.values()
        return any(slot_hold.lane.over for slot_hold in slot_holds)

    # in

    def expect(self, rid: int, lane: Lane, hit: int, slots: array[int]) -> None:
        """Allow K/V of the positions from ``hit`` on; ``slots`` are those of all positions."""
        lane.slot_holds += 1
        self.incoming[rid] = IncomingKv(SlotHold(lane, set(self._ranks)), len(slots) - hit)
        self.told.append(ImportKv(rid=rid, hit=hit, length=len(slots), slots=slots[hit:]))

    def answered(self, rid: int, rank: int, *, lapsed: bool) -> IncomingKv | None:
        """A rank has stopped writing; returns the import of this rid if it was the last rank."""
        flow = self.incoming.get(rid)
        if flow is None or rank not in flow.slot_hold.ranks:
            return None
        flow.slot_hold.ranks.remove(rank)
        flow.lapsed |= lapsed
        if flow.slot_hold.ranks:
            return None
        del self.incoming[rid]
        flow.slot_hold.lane.slot_holds -= 1
        if not (flow.lapsed or flow.void):
            self.imports += 1
            self.imported_tokens += flow.num_tokens
        return flow

    def drop(self, rid: int) -> None:
        """A request continues without its import."""
        flow = self.incoming.get(rid)
        if flow is not None and not flow.void:
            flow.void = True
            self.told.append(CancelTransfer(rid))

    # out

    def export(self, rid: int, to: KvDestination) -> None:
        """A request's K/V will be sent to that server."""
        self.outgoing[rid] = OutgoingKv(to, to.hit)
        self.told.append(ExportKv(rid, to))

    def computed(self, rid: int, lane: Lane, start: int, slots: array[int], step: int) -> None:
        """K/V from position ``start`` on will be computed when the step is over; what has been
        announced before is left out."""
        flow = self.outgoing[rid]
        first, end = max(start, flow.end), min(start + len(slots), flow.to.length)
        if first >= end:
            return
        assert first == flow.end, f"K/V of positions {flow.end} to {first} are left out"
        part = slots[first - start : end - start]
        computed = KvComputed(rid=rid, seq=flow.num_told, step=step, start=first, slots=part)
        flow.slot_holds[flow.num_told] = SlotHold(lane, set(self._ranks))
        flow.end, flow.num_told = end, flow.num_told + 1
        lane.slot_holds += 1
        self.told.append(computed)

    def sent(self, rid: int, rank: int, seq: int) -> Lane | None:
        """A rank is done with a KvComputed's slots; returns the lane if it was the last rank."""
        if (flow := self.outgoing.get(rid)) is None:
            return None
        slot_hold = flow.slot_holds.get(seq)
        if slot_hold is None or rank not in slot_hold.ranks:
            return None
        slot_hold.ranks.remove(rank)
        if slot_hold.ranks:
            return None
        del flow.slot_holds[seq]
        slot_hold.lane.slot_holds -= 1
        if self._close(rid, flow):
            self.left.append(rid)
        return slot_hold.lane

    def end(self, rid: int, *, moved: bool = False) -> None:
        """The request has ended; ``moved``: its exported K/V are still wanted."""
        if (flow := self.outgoing.get(rid)) is None:
            return
        flow.ended = True
        if not (moved or flow.void):
            flow.void = True
            self.told.append(CancelTransfer(rid))
        self._close(rid, flow)

    def _close(self, rid: int, flow: OutgoingKv) -> bool:
        if not flow.ended or flow.slot_holds:
            return False
        del self.outgoing[rid]
        if not flow.void:
            self.exports += 1
            self.exported_tokens += flow.end - flow.to.hit
        return True
