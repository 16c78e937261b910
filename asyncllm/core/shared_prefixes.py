"""Tracks which running lanes share their first slots, for attention that reads them only once.

Knows lanes and nodes of the prefix tree; knows neither slot numbers nor requests.
"""

from __future__ import annotations

from array import array

from asyncllm.core.radix import RadixNode

LEAST = 32  # common tokens: shorter prefixes are not tracked
NOBODY = array("i"), array("i")


class SharedPrefixIndex:
    """Orders lanes so that those that share a prefix are adjacent, as in a traversal of the prefix
    tree, and keeps the length of the prefix that each shares with the previous one:

        order        3     7     1     4     9
        shared_lens  0   512  1536   512     0      lanes 3, 7, 1, 4 share 512 tokens, 7 and 1 more

    Any two lanes share the minimum of the numbers between them. Adding or removing a lane costs its
    path in the tree; nothing is done in between. Each node of the tree knows one of the lanes whose
    slots are its own and those of the nodes above (``member``).
    """

    def __init__(self, least: int = LEAST) -> None:
        self.least = least
        self.order, self.shared_lens = array("i"), array("i")
        self._told: tuple[array[int], array[int]] | None = None

    def columns(self) -> tuple[array[int], array[int]]:
        """Both columns, read-only; empty if no lanes share a prefix."""
        if self._told is None:
            shared = any(self.shared_lens)
            self._told = (self.order[:], self.shared_lens[:]) if shared else NOBODY
        return self._told

    def join(self, lane: int, node: RadixNode, end: int) -> None:
        """Add a lane whose first ``end`` slots are those of the tree down to ``node``."""
        self._told = None
        while node.parent is not None and node.member < 0:
            node.member = lane
            end -= len(node.key)
            node = node.parent
        order, shared_lens = self.order, self.shared_lens
        at, common = len(order), 0
        if end >= self.least:
            at, common = order.index(node.member) + 1, end
            while at < len(order) and shared_lens[at] > common:
                at += 1  # lanes that share more with that one stay next to it
        order.insert(at, lane)
        shared_lens.insert(at, common)

    def leave(self, lane: int, node: RadixNode, end: int) -> None:
        """Remove a lane that is in the tree down to ``node``, which ends at token ``end``."""
        self._told = None
        order, shared_lens = self.order, self.shared_lens
        at, last = order.index(lane), len(order) - 1
        left, before = (order[at - 1], shared_lens[at]) if at else (-1, 0)
        right, behind = (order[at + 1], shared_lens[at + 1]) if at < last else (-1, 0)
        while node.parent is not None:
            if node.member == lane:
                node.member = left if before >= end else right if behind >= end else -1
            end -= len(node.key)
            node = node.parent
        if at < last:
            shared_lens[at + 1] = min(before, behind)
        del order[at], shared_lens[at]
