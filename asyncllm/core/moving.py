"""K/V that come from other servers and go to them: who may touch slots of which lane, how long.

Knows requests, lanes, ranks and slot numbers; knows neither what slots hold nor how K/V travel.

A slot is given to nobody else while its lane has touches. An import is one touch, from the moment
that the ranks are told its slots until each of them has said that it writes no more. Each
``Computed`` of an export is one, until each rank has said that it is done with those slots.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from asyncllm.core.steps import Lane
from asyncllm.messages import Computed, Export, Forget, Import
from asyncllm.records import Destination

Told = Import | Export | Computed | Forget


@dataclass(slots=True, eq=False)
class Touch:
    """These ranks may still touch a lane's slots."""

    lane: Lane
    ranks: set[int]


@dataclass(slots=True, eq=False)
class Inflow:
    """K/V of a request on their way here."""

    touch: Touch
    num_tokens: int
    void: bool = False  # nobody wants them any more
    lapsed: bool = False  # a rank has not got all


@dataclass(slots=True, eq=False)
class Outflow:
    """K/V of a request on their way out, over all its lives here."""

    to: Destination
    end: int  # behind the last position that the ranks have been told
    num_told: int = 0
    touches: dict[int, Touch] = field(default_factory=dict)  # by Computed.seq
    ended: bool = False  # the request has
    void: bool = False  # the ranks have been told to forget it


class Moves:
    """All K/V that move in or out.

    Args:
        num_ranks: of the group, each of which has a part of all K/V.

    Attributes:
        told: what the ranks are to be told. The shell takes and clears it.
        placed: (rid, cached tokens, all tokens) of those that wait for K/V. The same.
        left: rids of requests whose K/V have left, or were let go, behind their end. The same.
        imports, imported_tokens: that have arrived, since the start.
        lapses: imports that have not, and were wanted.
        exports, exported_tokens: that have left.
    """

    def __init__(self, num_ranks: int) -> None:
        self._ranks = frozenset(range(num_ranks))
        self.inflows: dict[int, Inflow] = {}  # by rid, as those below
        self.outflows: dict[int, Outflow] = {}
        self.told: list[Told] = []
        self.left: list[int] = []
        self.placed: list[tuple[int, int, int]] = []
        self.imports = self.imported_tokens = self.lapses = 0
        self.exports = self.exported_tokens = 0

    def __bool__(self) -> bool:
        """Somebody may touch slots, or is being waited for."""
        return bool(self.inflows or self.outflows)

    @property
    def leaving(self) -> bool:
        """Slots of a lane that is over will be free when somebody lets go of them."""
        touches = [flow.touch for flow in self.inflows.values()]
        for flow in self.outflows.values():
            touches += flow.touches.values()
        return any(touch.lane.over for touch in touches)

    # in

    def expect(self, rid: int, lane: Lane, hit: int, slots: array[int]) -> None:
        """K/V of the positions from ``hit`` on may come; ``slots`` are those of all positions."""
        lane.touches += 1
        self.inflows[rid] = Inflow(Touch(lane, set(self._ranks)), len(slots) - hit)
        self.told.append(Import(rid=rid, hit=hit, length=len(slots), slots=slots[hit:]))

    def answered(self, rid: int, rank: int, *, lapsed: bool) -> Inflow | None:
        """A rank writes no more: the import of this rid if that is the last one's answer."""
        flow = self.inflows.get(rid)
        if flow is None or rank not in flow.touch.ranks:
            return None
        flow.touch.ranks.remove(rank)
        flow.lapsed |= lapsed
        if flow.touch.ranks:
            return None
        del self.inflows[rid]
        flow.touch.lane.touches -= 1
        if not (flow.lapsed or flow.void):
            self.imports += 1
            self.imported_tokens += flow.num_tokens
        return flow

    def drop(self, rid: int) -> None:
        """A request does without its import."""
        flow = self.inflows.get(rid)
        if flow is not None and not flow.void:
            flow.void = True
            self.told.append(Forget(rid))

    # out

    def export(self, rid: int, to: Destination) -> None:
        """A request's K/V will go there."""
        self.outflows[rid] = Outflow(to, to.hit)
        self.told.append(Export(rid, to))

    def computed(self, rid: int, lane: Lane, start: int, slots: array[int], step: int) -> None:
        """K/V from position ``start`` on are there when the step is over; what has been told
        before is left out."""
        flow = self.outflows[rid]
        first, end = max(start, flow.end), min(start + len(slots), flow.to.length)
        if first >= end:
            return
        assert first == flow.end, f"K/V of positions {flow.end} to {first} are left out"
        part = slots[first - start : end - start]
        computed = Computed(rid=rid, seq=flow.num_told, step=step, start=first, slots=part)
        flow.touches[flow.num_told] = Touch(lane, set(self._ranks))
        flow.end, flow.num_told = end, flow.num_told + 1
        lane.touches += 1
        self.told.append(computed)

    def sent(self, rid: int, rank: int, seq: int) -> Lane | None:
        """A rank is done with the slots of a Computed: the lane, if that is the last one's word."""
        if (flow := self.outflows.get(rid)) is None:
            return None
        touch = flow.touches.get(seq)
        if touch is None or rank not in touch.ranks:
            return None
        touch.ranks.remove(rank)
        if touch.ranks:
            return None
        del flow.touches[seq]
        touch.lane.touches -= 1
        if self._close(rid, flow):
            self.left.append(rid)
        return touch.lane

    def end(self, rid: int, *, moved: bool = False) -> None:
        """The request has ended; ``moved``: what it exports is wanted all the same."""
        if (flow := self.outflows.get(rid)) is None:
            return
        flow.ended = True
        if not (moved or flow.void):
            flow.void = True
            self.told.append(Forget(rid))
        self._close(rid, flow)

    def _close(self, rid: int, flow: Outflow) -> bool:
        if not flow.ended or flow.touches:
            return False
        del self.outflows[rid]
        if not flow.void:
            self.exports += 1
            self.exported_tokens += flow.end - flow.to.hit
        return True
