"""Prefix cache: a radix tree from token sequences to the KV slots that hold them.

Knows token ids, slot numbers and locks; knows neither requests nor tensors.
"""

from __future__ import annotations

from array import array
from heapq import heapify, heappop, heappush
from itertools import count

_SERIALS = count()


class RadixNode:
    """A run of tokens that follows its parent's. The KV of ``key[i]`` is in ``slots[i]``.

    ``locks`` counts the holders of this node and of all nodes below it: a lock covers the whole
    path to the root, so an unlocked node has no locked descendant. ``member`` is a lane whose slots
    are those of this node and of all nodes above; -1: there is none, or it is not tracked
    (``core/shared_prefixes.py``). ``sliding``, ``ends``, ``readers`` and ``seen`` are for trees
    with sliding slots.
    """

    __slots__ = (
        *("children", "key", "locks", "member", "parent", "serial", "slots", "tick"),
        *("ends", "readers", "seen", "sliding"),
    )

    def __init__(self, key: array[int], slots: array[int], parent: RadixNode | None) -> None:
        self.key, self.slots, self.parent = key, slots, parent
        self.children: dict[int, RadixNode] = {}  # by the first token of their keys
        self.locks = 0
        self.member = -1
        self.tick = 0  # when it was last unlocked
        self.serial = next(_SERIALS)
        self.sliding = array("i")
        self.readers = self.seen = 0
        self.ends = False


class RadixTree:
    """A radix tree over token ids at token granularity, with LRU eviction of leaves.

    Attributes:
        size: tokens in the tree.
        locked: tokens that are locked; the others can be evicted.
    """

    def __init__(self) -> None:
        self.root = RadixNode(array("i"), array("i"), None)
        self.size = self.locked = 0
        self._tick = self._num_nodes = 0
        self._leaves: list[tuple[int, int, RadixNode]] = []  # heap; an entry may be out of date

    def match(self, ids: array[int], limit: int) -> tuple[RadixNode, array[int]]:
        """The longest cached prefix of ``ids[:limit]``: its end, locked for the caller,
        and slots."""
        node, slots = self.root, array("i")
        while len(slots) < limit:
            child = node.children.get(ids[len(slots)])
            if child is None:
                break
            common = common_len(child.key, ids, len(slots), limit)
            if common < len(child.key):
                child = self._split(child, common)
            node = child
            slots.extend(node.slots)
        self._lock(node, self.root)
        return node, slots

    def extend(
        self, node: RadixNode, ids: array[int], start: int, end: int, slots: array[int]
    ) -> tuple[RadixNode, int]:
        """Insert ``ids[start:end]``, whose KV is in ``slots[start:end]``, below ``node``.

        ``node`` is locked by the caller and ends at token ``start``; the lock moves to the returned
        node, which ends at ``end``. The first tokens may already be in the tree, with other slots:
        their number is returned too, and the caller keeps its own slots for them.

            [0, start)        held by the caller's lock on ``node``
            [start, +known)   in the tree already; the caller's slots are duplicates
            [.., end)         a new leaf, or a longer ``node`` where only the caller holds it
        """
        at, below = start, node
        while at < end and (child := self._child(below, ids, at, end)) is not None:
            below = child
            at += len(child.key)
        known = at - start
        if at < end:
            if below is node and self._is_sole(node):
                self._grow(node, ids, at, end, slots)
                return node, known
            below = self._add(below, ids, at, end, slots)
        self._lock(below, node)
        return below, known

    def unlock(self, node: RadixNode) -> None:
        """Give back one lock on ``node`` and the path to it."""
        self._tick += 1
        end: RadixNode | None = node
        while end is not None and end.parent is not None:
            assert end.locks > 0, f"a node of {len(end.key)} tokens is unlocked once too often"
            end.locks -= 1
            end.tick = self._tick
            if not end.locks:
                self.locked -= len(end.key)
            end = end.parent
        if node.parent is not None and not node.locks and not node.children:
            self._offer(node)

    def evict(self, num_tokens: int) -> array[int]:
        """Evict the least recently used unlocked tokens; returns their slots.

        Fewer than asked for only if fewer are unlocked. The last leaf loses only its end.
        """
        out = array("i")
        while len(out) < num_tokens and self._leaves:
            entry = heappop(self._leaves)
            if not _is_current(entry):
                continue
            node = entry[2]
            parent, left = node.parent, num_tokens - len(out)
            if len(node.key) > left:
                out.extend(node.slots[-left:])
                self._cut(node, left)
                self._offer(node)
                break
            out.extend(node.slots)
            assert parent is not None
            del parent.children[node.key[0]]
            self._cut(node, len(node.key))
            node.parent = None
            self._num_nodes -= 1
            if parent.parent is not None and not parent.children and not parent.locks:
                self._offer(parent)
        self.size -= len(out)
        return out

    def _child(self, node: RadixNode, ids: array[int], at: int, end: int) -> RadixNode | None:
        """The part of ``ids[at:end]`` that is in the tree below ``node``, up to a node's end."""
        child = node.children.get(ids[at])
        if child is None:
            return None
        common = common_len(child.key, ids, at, end)
        return child if common == len(child.key) else self._split(child, common)

    def _is_sole(self, node: RadixNode) -> bool:
        """Whether it is locked only by the caller and is a leaf, so that it can grow in place."""
        return node.locks == 1 and not node.children and node.parent is not None

    def _grow(self, node: RadixNode, ids: array[int], at: int, end: int, slots: array[int]) -> None:
        node.key.extend(ids[at:end])
        node.slots.extend(slots[at:end])
        self.size += end - at
        self.locked += end - at

    def _add(
        self, above: RadixNode, ids: array[int], at: int, end: int, slots: array[int]
    ) -> RadixNode:
        node = above.children[ids[at]] = RadixNode(ids[at:end], slots[at:end], above)
        self.size += end - at
        self._num_nodes += 1
        return node

    def _cut(self, node: RadixNode, num: int) -> None:
        """Evict the last tokens of an unlocked leaf."""
        del node.key[-num:], node.slots[-num:]

    def _lock(self, node: RadixNode, above: RadixNode) -> None:
        """Lock the path from ``node`` up to ``above``, which is not part of it."""
        while node is not above:
            if not node.locks:
                self.locked += len(node.key)
            node.locks += 1
            assert node.parent is not None
            node = node.parent

    def _split(self, node: RadixNode, at: int) -> RadixNode:
        """Split ``node`` before its token ``at``; returns the new upper part.

        ``node`` stays the lower part, so locks on it cover the same tokens as before.
        """
        assert node.parent is not None
        upper = RadixNode(node.key[:at], node.slots[:at], node.parent)
        upper.locks, upper.tick, upper.member = node.locks, node.tick, node.member
        node.parent.children[node.key[0]] = upper
        del node.key[:at], node.slots[:at]
        upper.children[node.key[0]] = node
        node.parent = upper
        self._num_nodes += 1
        return upper

    def _offer(self, node: RadixNode) -> None:
        """Make an unlocked leaf a candidate for eviction."""
        if len(self._leaves) > 2 * self._num_nodes + 64:  # mostly outdated entries
            self._leaves = [entry for entry in self._leaves if _is_current(entry)]
            heapify(self._leaves)
        heappush(self._leaves, (node.tick, node.serial, node))


def _is_current(entry: tuple[int, int, RadixNode]) -> bool:
    tick, _, node = entry
    return not (node.locks or node.children or node.tick != tick or node.parent is None)


def common_len(key: array[int], ids: array[int], at: int, limit: int) -> int:
    """Length of the common prefix of ``key`` and ``ids[at:limit]``;
    their first tokens are equal."""
    high = min(len(key), limit - at)
    if key[:high] == ids[at : at + high]:
        return high
    low = 1  # key[:low] is equal, key[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if key[low:middle] == ids[at + low : at + middle]:
            low = middle
        else:
            high = middle
    return low
