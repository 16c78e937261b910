"""Ledger of KV slots: free ones, those that belong to a lane, and those cached for their prefix.

Knows slot numbers, lanes and token ids; knows neither requests nor tensors.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from asyncllm.core.radix import RadixNode, RadixTree
from asyncllm.core.shared_prefixes import NOBODY, SharedPrefixIndex
from asyncllm.messages import SlotsGranted


class SlotPool:
    """The free slots, as a stack: slots taken together are an ascending run where possible."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = array("i", range(total))

    def __len__(self) -> int:
        return len(self.free)

    def take(self, num: int) -> array[int]:
        """Take ``num`` slots. The caller has made sure that there are enough."""
        assert num <= len(self.free), f"{num} slots wanted, {len(self.free)} free"
        if not num:
            return array("i")
        taken = self.free[-num:]
        del self.free[-num:]
        return taken

    def give(self, slots: array[int]) -> None:
        self.free.extend(slots)
        assert len(self.free) <= self.total, "a slot was freed twice"


@dataclass(slots=True, eq=False)
class LaneSlots:
    """What one lane holds.

        [0, shared)          in the tree, held by the lock on ``node``
        [shared, launched)   empty but for lanes that do not use the tree
        [launched, len)      granted, not in the tree yet

    ``duplicates`` are the lane's own slots for tokens that another lane put into the tree first:
    this lane keeps reading its own, the tree has the other's. The first ``same`` slots are the
    tree's.
    """

    ids: array[int]
    slots: array[int]
    node: RadixNode | None  # None: neither uses nor adds prefix cache entries
    shared: int
    same: int
    duplicates: array[int] = field(default_factory=lambda: array("i"))


class Ledger:
    """All slots of one KV pool and who holds them; ``used + cached + free == total`` always.

    Args:
        total: slots in the pool.
        use_tree: False: no prefix cache.
        shared_prefixes: tracks which lanes share their first slots; None: not tracked.
    """

    def __init__(
        self,
        total: int,
        *,
        use_tree: bool = True,
        tree: RadixTree | None = None,
        shared_prefixes: SharedPrefixIndex | None = None,
    ) -> None:
        self.pool = SlotPool(total)
        self.tree = tree or RadixTree()
        self.lanes: dict[int, LaneSlots] = {}
        self._use_tree, self._shared_prefixes = use_tree, shared_prefixes
        self.hit_tokens = self.looked_up_tokens = self.evicted_tokens = 0

    @property
    def total(self) -> int:
        return self.pool.total

    @property
    def free(self) -> int:
        return len(self.pool)

    @property
    def cached(self) -> int:
        """Slots used only by the prefix cache."""
        return self.tree.size - self.tree.locked

    @property
    def used(self) -> int:
        """Slots in use by lanes: their own and the locked part of the tree."""
        return self.total - self.free - self.cached

    @property
    def available(self) -> int:
        """Slots that could be reserved: free or evictable."""
        return self.free + self.cached

    def reserve(
        self,
        lanes: array[int],
        counts: array[int],
        opened: dict[int, tuple[array[int], bool]],
    ) -> SlotsGranted:
        """Grant the longest prefix of the rows that fits.

        Args:
            lanes, counts: row i wants ``counts[i]`` new slots for ``lanes[i]``.
            opened: lanes that are new: (token ids, may use the tree). A new lane whose row is not
                granted is not opened.
        """
        num = self._num_singles(lanes, counts, opened)
        out = self._take_singles(lanes[:num])
        hits, granted = array("i", bytes(4 * num)), counts[:num]
        for lane, count in zip(lanes[num:], counts[num:], strict=True):
            if lane in opened:
                row = self._open(lane, count, *opened[lane])
            else:
                row = self._grow(lane, count)
            if row is None:
                break
            hits.append(row[0])
            granted.append(len(row[1]) - row[0])
            out.extend(row[1])
        order, shared_lens = (
            NOBODY if self._shared_prefixes is None else self._shared_prefixes.columns()
        )
        return SlotsGranted(
            hits,
            granted,
            out,
            available=self.available,
            prefix_order=order,
            shared_lens=shared_lens,
        )

    def trim(self, lane: int, num: int) -> None:
        """Free the last slots of a lane, which nobody reads and which are not in the tree."""
        held = self.lanes[lane]
        assert len(held.slots) - num >= max(held.shared, len(held.ids)), "not slots of drafts"
        self.pool.give(held.slots[-num:])
        del held.slots[-num:]

    def launched(self, lanes: array[int]) -> None:
        """All slots these lanes were granted have been written, or will be before any later step:
        put the prompt tokens they stand for into the tree."""
        for lane in lanes:
            held = self.lanes[lane]
            if held.node is not None:
                self._share(lane, held, held.ids, min(len(held.slots), len(held.ids)))

    def release(self, lane: int, generated: array[int]) -> None:
        """Close a lane. Its launched tokens and ``generated`` stay in the tree, unlocked."""
        held = self.lanes[lane]
        if held.node is not None and generated:
            ids = held.ids + generated
            self._share(lane, held, ids, len(ids))
        self._close(lane, held)

    def _close(self, lane: int, held: LaneSlots) -> None:
        del self.lanes[lane]
        self.pool.give(held.duplicates)
        self.pool.give(held.slots[held.shared :])
        if held.node is not None:
            if self._shared_prefixes is not None:
                self._shared_prefixes.leave(lane, held.node, held.shared)
            self.tree.unlock(held.node)

    def _num_singles(
        self,
        lanes: array[int],
        counts: array[int],
        opened: dict[int, tuple[array[int], bool]],
    ) -> int:
        """Number of leading rows that want one slot for an open lane and can get it."""
        num, room = 0, self._room
        if not opened and counts.count(1) == len(counts):
            return min(len(counts), room)
        for lane, count in zip(lanes, counts, strict=True):
            if count != 1 or num == room or lane in opened:
                break
            num += 1
        return num

    @property
    def _room(self) -> int:
        """One-token rows that could be granted."""
        return self.available

    def _take_singles(self, lanes: array[int]) -> array[int]:
        """Grant each of these rows one slot."""
        out = self._take(len(lanes))
        for lane, slot in zip(lanes, out, strict=True):
            self.lanes[lane].slots.append(slot)
        return out

    def _take(self, num: int) -> array[int]:
        if (short := num - len(self.pool)) > 0:
            evicted = self.tree.evict(short)
            self.evicted_tokens += len(evicted)
            self.pool.give(evicted)
        return self.pool.take(num)

    def _grow(self, lane: int, count: int) -> tuple[int, array[int]] | None:
        if not (count := self._fitting(count)):
            return None
        slots = self._take(count)
        self.lanes[lane].slots.extend(slots)
        return 0, slots

    def _open(
        self, lane: int, count: int, ids: array[int], may_share: bool
    ) -> tuple[int, array[int]] | None:
        """(cached tokens, their slots followed by new ones); None: it does not fit."""
        assert lane not in self.lanes, f"lane {lane} is open"
        node: RadixNode | None = None
        slots = array("i")
        if may_share and self._use_tree:
            node, slots = self._match(ids)
        hit = len(slots)
        if not (count := self._fitting(min(count, len(ids) - hit))):
            if node is not None:
                self._unmatch(node, hit)
            return None
        if node is not None:
            self.hit_tokens += hit
            self.looked_up_tokens += len(ids)
        slots.extend(self._take(count))
        self.lanes[lane] = LaneSlots(ids, slots[:], node, hit, hit)
        if node is not None and self._shared_prefixes is not None:
            self._shared_prefixes.join(lane, node, hit)
        return hit, slots

    def _fitting(self, count: int) -> int:
        """``count`` if so many slots are free or can be evicted; 0: the row is not granted."""
        return count if count <= self.available else 0

    def _match(self, ids: array[int]) -> tuple[RadixNode, array[int]]:
        return self.tree.match(ids, len(ids) - 1)

    def _unmatch(self, node: RadixNode, hit: int) -> None:
        """Undo the opening of the lane."""
        self.tree.unlock(node)

    def _share(self, lane: int, held: LaneSlots, ids: array[int], end: int) -> None:
        """Put those of ``ids[:end]`` into the tree that are not in it yet."""
        assert held.node is not None
        if end <= held.shared:
            return
        start = held.shared
        held.node, known = self.tree.extend(held.node, ids, start, end, held.slots)
        self._shared(lane, held, known, end)

    def _shared(self, lane: int, held: LaneSlots, known: int, end: int) -> None:
        """Everything the lane holds up to ``end`` is in the tree now; for the first ``known`` new
        tokens the tree has other slots."""
        assert held.node is not None
        start = held.shared
        held.duplicates.extend(held.slots[start : start + known])
        held.shared = end
        if held.same == start and not known:
            held.same = end
            if self._shared_prefixes is not None:
                held.node.member = lane  # no other lane has these slots
