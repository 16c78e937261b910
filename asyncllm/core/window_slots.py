"""KV slots for models in which some layers have a sliding window: two spaces, one ledger.

Knows slot numbers, lanes and token ids; knows neither requests nor tensors.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace

from asyncllm.core.radix import RadixNode
from asyncllm.core.shared_prefixes import SharedPrefixIndex
from asyncllm.core.slots import LaneSlots, Ledger, SlotPool
from asyncllm.core.window_radix import WindowTree
from asyncllm.core.windows import PerSpace, Window
from asyncllm.messages import SlotsGranted


@dataclass(slots=True, eq=False)
class SlidingSlots:
    """A lane's sliding slots: ``slots`` of its last tokens, from position ``first`` on.

    Those before the lane's ``shared`` belong to the tree, whose nodes are kept from token ``kept``
    on, except for spans in ``own``, for which the tree has other slots. Those and all later ones
    are the lane's own. The last ``drafts`` are those of draft tokens, until the lane's next row:
    if they are wrong, its next token is one of them, and sees further back.
    """

    first: int = 0
    slots: array[int] = field(default_factory=lambda: array("i"))
    kept: int = 0
    own: list[tuple[int, int]] = field(default_factory=list)
    drafts: int = 0


class WindowLedger(Ledger):
    """A ledger with a second slot space, for layers with a sliding window.

    In it a lane holds slots only for what its next tokens can see; in each space ``used + cached +
    free == total`` always.

    A slot of the second space is freed by the reservation after the one in which its lane advanced:
    steps run in order, so the next step to get it writes it after the last step that reads it. New
    tokens need room besides what they see, but only for one step: a row may be granted in part if
    there is room for ``window.most`` tokens, the first row if there is any.

    Args:
        num: slots of both spaces; the sliding ones are at least ``window.most + 1``.
        use_tree, shared_prefixes: as in ``Ledger``; lanes share slots of the full space.
    """

    def __init__(
        self,
        num: PerSpace,
        window: Window,
        *,
        use_tree: bool = True,
        shared_prefixes: SharedPrefixIndex | None = None,
    ) -> None:
        self._tree, self._window = WindowTree(window), window
        super().__init__(
            num.full, use_tree=use_tree, tree=self._tree, shared_prefixes=shared_prefixes
        )
        self.sliding = SlotPool(num.sliding)
        self.views: dict[int, SlidingSlots] = {}
        self.evicted_sliding = 0
        self._column = array("i")  # of the grant in progress
        self._opening = SlidingSlots()

    @property
    def sliding_cached(self) -> int:
        """Sliding slots used only by the prefix cache."""
        return self._tree.live - self._tree.read

    @property
    def sliding_used(self) -> int:
        """Sliding slots in use by lanes: their own and those of the tree that they read."""
        return self.sliding.total - len(self.sliding) - self.sliding_cached

    @property
    def sliding_available(self) -> int:
        """Sliding slots that could be reserved."""
        return len(self.sliding) + self.sliding_cached

    def reserve(
        self,
        lanes: array[int],
        counts: array[int],
        opened: dict[int, tuple[array[int], bool]],
    ) -> SlotsGranted:
        most, going_on = self._window.reach + self._window.grain, set(lanes)
        for lane, view in self.views.items():
            held = self.lanes[lane]
            if lane in going_on:
                view.drafts = 0
            if (end := len(held.slots) - view.drafts) - view.first >= most:
                self._go_on(held, view, end)
        self._column = array("i")
        granted = super().reserve(lanes, counts, opened)
        return replace(granted, sliding=self._column, sliding_available=self.sliding_available)

    def trim(self, lane: int, num: int) -> None:
        super().trim(lane, num)
        slots = self.views[lane].slots
        self.sliding.give(slots[-num:])
        del slots[-num:]

    def _go_on(self, held: LaneSlots, view: SlidingSlots, end: int) -> None:
        """Free slots that no token from ``end`` on sees."""
        begin = end - self._window.reach
        if held.node is not None:
            view.kept = self._tree.leave(held.node, held.shared, view.kept, begin)
        self._give(held, view, begin)

    def _give(self, held: LaneSlots, view: SlidingSlots, begin: int) -> None:
        """Drop the slots of tokens before ``begin``; the lane's own ones become free."""
        first, slots = view.first, view.slots
        mine = [*view.own, (max(first, held.shared), len(held.slots))]
        for start, end in mine:
            self.sliding.give(slots[start - first : max(min(end, begin), start) - first])
        view.own = [(max(start, begin), end) for start, end in view.own if end > begin]
        del slots[: begin - first]
        view.first = begin

    @property
    def _room(self) -> int:
        return min(self.available, self.sliding_available)

    def _fitting(self, count: int) -> int:
        room = self.sliding_available
        if count > room and (room >= self._window.most or not self._column):
            count = room
        return super()._fitting(count) if count <= room else 0

    def _take_singles(self, lanes: array[int]) -> array[int]:
        out = super()._take_singles(lanes)
        sliding = self._take_sliding(len(lanes))
        before = -1
        for lane, slot in zip(lanes, sliding, strict=True):
            view = self.views[lane]
            view.slots.append(slot)
            view.drafts += lane == before
            before = lane
        self._column.extend(sliding)
        return out

    def _take(self, num: int) -> array[int]:
        out = super()._take(num)
        if self._tree.spilled:
            self.sliding.give(self._tree.spilled)
            self._tree.spilled = array("i")
        return out

    def _take_sliding(self, num: int) -> array[int]:
        if (short := num - len(self.sliding)) > 0:
            evicted = self._tree.evict_sliding(short)
            self.evicted_sliding += len(evicted)
            self.sliding.give(evicted)
        return self.sliding.take(num)

    def _see(self, view: SlidingSlots, count: int) -> None:
        """Add slots for ``count`` new tokens."""
        slots = self._take_sliding(count)
        view.slots.extend(slots)
        self._column.extend(slots)

    def _grow(self, lane: int, count: int) -> tuple[int, array[int]] | None:
        row = super()._grow(lane, count)
        if row is not None:
            self._see(self.views[lane], len(row[1]))
        return row

    def _open(
        self, lane: int, count: int, ids: array[int], may_share: bool
    ) -> tuple[int, array[int]] | None:
        view = self._opening = SlidingSlots()
        row = super()._open(lane, count, ids, may_share)
        if row is not None:
            hit, slots = row
            self.views[lane] = view
            self._column.extend(array("i", [self.sliding.total]) * view.first)  # the padding slot
            self._column.extend(view.slots)
            self._see(view, len(slots) - hit)
        return row

    def _match(self, ids: array[int]) -> tuple[RadixNode, array[int]]:
        node, slots = super()._match(ids)
        view = self._opening
        view.kept, view.slots = self._tree.keep(node, len(slots))
        view.first = len(slots) - len(view.slots)
        return node, slots

    def _unmatch(self, node: RadixNode, hit: int) -> None:
        self._tree.leave(node, hit, self._opening.kept, hit)
        super()._unmatch(node, hit)

    def _close(self, lane: int, held: LaneSlots) -> None:
        view = self.views.pop(lane)
        self._give(held, view, len(held.slots))
        if held.node is not None:
            self._tree.leave(held.node, held.shared, view.kept, held.shared, over=True)
        super()._close(lane, held)

    def _share(self, lane: int, held: LaneSlots, ids: array[int], end: int) -> None:
        assert held.node is not None
        if end <= held.shared:
            return
        start, view = held.shared, self.views[lane]
        held.node, known, own, view.kept = self._tree.insert(
            held.node, ids, (start, end), held.slots, view.slots, view.kept
        )
        view.own += own
        self._shared(lane, held, known, end)
