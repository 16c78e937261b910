"""Prefix cache for models in which some layers have a sliding window.

Knows token ids, slot numbers of both spaces and locks; knows neither requests nor tensors.
"""

from __future__ import annotations

from array import array
from heapq import heapify, heappop, heappush

from asyncllm.core.radix import RadixNode, RadixTree, common_len
from asyncllm.core.windows import Window

# whether a sequence or a hit ended there, when last read, where it starts, serial
Unread = tuple[bool, int, int, int, RadixNode]


class WindowTree(RadixTree):
    """A radix tree whose tokens each have a full slot; a node's last ones have a sliding slot too.

        node   | key              |
               | slots            |
               |      | sliding   |   those before it have been given back

    A prefix of h tokens can be used where the last ``window.reach`` of them have sliding slots, or
    all of them. ``readers`` counts the lanes whose window reaches into a node: its sliding slots
    stay. Those of other nodes can be evicted separately: first those that a lane has merely passed,
    then the windows at whose ends a sequence or a hit has ended (``ends``), since others are likely
    to end there too; least recently read first, and from the start of a node.

    Attributes:
        live: sliding slots in the tree.
        read: those of them in nodes that lanes read.
        spilled: sliding slots of tokens that :meth:`evict` has dropped. The owner takes them.
    """

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        self.live = self.read = 0
        self.spilled = array("i")
        self._unread: list[Unread] = []  # heap; an entry may be out of date

    def match(self, ids: array[int], limit: int) -> tuple[RadixNode, array[int]]:
        """The longest usable prefix of ``ids[:limit]``: its end, locked for the caller; slots."""
        reach, node, depth = self.window.reach, self.root, 0
        run = 0  # number of tokens up to here, without a gap, that have sliding slots
        best, rest = node, 0  # rest: tokens of that node that are not common
        while depth < limit:
            child = node.children.get(ids[depth])
            if child is None:
                break
            common = common_len(child.key, ids, depth, limit)
            dead = len(child.key) - len(child.sliding)
            run = max(common - dead, 0) if dead else run + common
            node, depth = child, depth + common
            if run >= min(reach, depth):
                best, rest = node, len(node.key) - common
            if common < len(node.key):
                break
        if rest:
            best = self._split(best, len(best.key) - rest)
        self._lock(best, self.root)
        slots, path = array("i"), _path(best)
        for node in reversed(path):
            slots.extend(node.slots)
        return best, slots

    def keep(self, node: RadixNode, end: int) -> tuple[int, array[int]]:
        """A lane at ``end``, where ``node`` ends, reads what its next token can see.

        Returns where the first node that is kept for it begins, and the slots of what it sees.
        """
        begin = max(end - self.window.reach, 0)
        seen, kept = end - begin, []
        while end > begin:
            start = end - len(node.key)
            if begin - start >= self.window.grain:
                self._split(node, begin - start)
                start = begin
            self._add_reader(node)
            node.ends = True
            kept.append(node)
            assert node.parent is not None
            node, end = node.parent, start
        slots = array("i")
        for node in reversed(kept):
            slots.extend(node.sliding)
        return end, slots[len(slots) - seen :]

    def leave(self, node: RadixNode, end: int, kept: int, begin: int, *, over: bool = False) -> int:
        """A lane whose locked ``node`` ends at ``end`` no longer sees anything before ``begin``.

        Nodes from ``kept`` on were kept for it. Returns the start of those that still are.

        Args:
            over: the lane has ended.
        """
        self._tick += 1
        still = end
        while end > kept:
            start = end - len(node.key)
            node.ends |= over
            if end <= begin:
                self._drop_reader(node, start)
            elif begin - start >= self.window.grain:
                node = self._split(node, begin - start)
                self._drop_reader(node, start)
                still = begin
            else:
                still = start
            assert node.parent is not None
            node, end = node.parent, start
        return still

    def insert(
        self,
        node: RadixNode,
        ids: array[int],
        span: tuple[int, int],
        slots: array[int],
        sliding: array[int],
        kept: int,
    ) -> tuple[RadixNode, int, list[tuple[int, int]], int]:
        """:meth:`extend` for a lane whose last tokens, up to ``slots``' end, have also ``sliding``.

        Tokens in the tree that have lost their sliding slots take the caller's.

        Returns:
            The result of ``extend``; spans of tokens in the tree whose sliding slots remain the
            caller's; and the start of the nodes kept for the caller.
        """
        (start, end), first = span, len(slots) - len(sliding)
        own: list[tuple[int, int]] = []
        at, below = start, node
        while at < end and (child := self._child(below, ids, at, end)) is not None:
            below, begin = child, max(first, at)
            at += len(child.key)
            if begin < (there := at - len(child.sliding)):
                self._take_back(child, sliding[begin - first : there - first])
                begin = there
            if begin < at:
                own.append((begin, at))
        known = at - start
        if at < end:
            fresh = sliding[max(first, at) - first : max(end - first, 0)]
            grows = self._is_sole(node) and node.readers and not node.ends
            if below is node and grows and first <= at:
                self._grow(node, ids, at, end, slots)
                self._extend_sliding(node, fresh)
                return node, known, own, kept
            below = self._add(below, ids, at, end, slots)
            self._extend_sliding(below, fresh)
        self._lock(below, node)
        above = below
        while above is not node and (end > first or kept < start):
            self._add_reader(above)
            end -= len(above.key)
            assert above.parent is not None
            above = above.parent
        return below, known, own, kept if kept < start else end

    def evict_sliding(self, num: int) -> array[int]:
        """Take sliding slots of tokens that nobody reads; fewer only if there are fewer."""
        out = array("i")
        while len(out) < num and self._unread:
            entry = heappop(self._unread)
            if not _is_unread(entry):
                continue
            node, left = entry[-1], num - len(out)
            out.extend(node.sliding[:left])
            del node.sliding[:left]
            if node.sliding:
                heappush(self._unread, entry)
            if node.tick and not (node.children or node.locks) and self._is_useless(node):
                self._offer(node)
        self.live -= len(out)
        return out

    def _is_useless(self, node: RadixNode) -> bool:
        """No prefix that ends in this leaf can be used."""
        return len(node.sliding) < min(self.window.reach, len(node.key))

    def _take_back(self, node: RadixNode, slots: array[int]) -> None:
        """Give these to tokens that had lost their sliding slots."""
        node.sliding = slots + node.sliding
        self.live += len(slots)
        self.read += len(slots) if node.readers else 0

    def _extend_sliding(self, node: RadixNode, slots: array[int]) -> None:
        node.sliding.extend(slots)
        self.live += len(slots)
        self.read += len(slots) if node.readers else 0

    def _add_reader(self, node: RadixNode) -> None:
        if not node.readers:
            self.read += len(node.sliding)
        node.readers += 1

    def _drop_reader(self, node: RadixNode, start: int) -> None:
        assert node.readers > 0, f"a node of {len(node.key)} tokens is left once too often"
        node.readers -= 1
        if not node.readers:
            self.read -= len(node.sliding)
            node.seen = self._tick
            self._offer_sliding(node, start)

    def _offer_sliding(self, node: RadixNode, start: int) -> None:
        """Make its sliding slots candidates for eviction."""
        if not node.sliding:
            return
        if len(self._unread) > 2 * self._num_nodes + 64:  # mostly outdated entries
            self._unread = [entry for entry in self._unread if _is_unread(entry)]
            heapify(self._unread)
        heappush(self._unread, (node.ends, node.seen, start, node.serial, node))

    def _split(self, node: RadixNode, at: int) -> RadixNode:
        upper = super()._split(node, at)
        num = max(len(node.sliding) - len(node.key), 0)
        upper.sliding = node.sliding[:num]
        del node.sliding[:num]
        upper.readers, upper.seen, upper.ends = node.readers, node.seen, node.ends
        if not upper.readers:
            self._offer_sliding(upper, 0)
        return upper

    def _cut(self, node: RadixNode, num: int) -> None:
        super()._cut(node, num)
        if gone := min(num, len(node.sliding)):
            self.spilled.extend(node.sliding[-gone:])
            del node.sliding[-gone:]
            self.live -= gone

    def _offer(self, node: RadixNode) -> None:
        if self._is_useless(node):
            node.tick = 0  # the first to go
        super()._offer(node)


def _path(node: RadixNode) -> list[RadixNode]:
    """From ``node`` up to below the root."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path


def _is_unread(entry: Unread) -> bool:
    ends, seen, *_, node = entry
    return bool(node.sliding) and not node.readers and (node.ends, node.seen) == (ends, seen)
