"""Which lanes have the same first slots, kept up to date as lanes come and go.

Knows lanes and nodes of the prefix tree; knows neither slots' numbers nor requests.
"""

from __future__ import annotations

from array import array

from asyncllm.core.radix import RadixNode

LEAST = 32  # common tokens: fewer are not worth anybody's attention
NOBODY = array("i"), array("i")


class Siblings:
    """Lanes in an order in which all that share a prefix follow one another, as in a walk through
    the prefix tree, with the length of what each has in common with the one before:

        order      3     7     1     4     9
        commons    0   512  1536   512     0      lanes 3, 7, 1, 4 share 512 tokens, 7 and 1 more

    Any two lanes have in common what the least of the numbers between them says. A lane costs its
    path in the tree when it comes and when it goes, and nothing in between. Each node of the tree
    knows one of the lanes whose slots are its own and those of the nodes above (``member``).
    """

    def __init__(self, least: int = LEAST) -> None:
        self.least = least
        self.order, self.commons = array("i"), array("i")
        self._told: tuple[array[int], array[int]] | None = None

    def columns(self) -> tuple[array[int], array[int]]:
        """Both, not to be changed; empty where nobody shares anything."""
        if self._told is None:
            shared = any(self.commons)
            self._told = (self.order[:], self.commons[:]) if shared else NOBODY
        return self._told

    def join(self, lane: int, node: RadixNode, end: int) -> None:
        """A lane's first ``end`` slots are those of the tree down to ``node``."""
        self._told = None
        while node.parent is not None and node.member < 0:
            node.member = lane
            end -= len(node.key)
            node = node.parent
        order, commons = self.order, self.commons
        at, common = len(order), 0
        if end >= self.least:
            at, common = order.index(node.member) + 1, end
            while at < len(order) and commons[at] > common:
                at += 1  # who shares more with that one stays beside it
        order.insert(at, lane)
        commons.insert(at, common)

    def leave(self, lane: int, node: RadixNode, end: int) -> None:
        """A lane that is in the tree down to ``node``, which ends at token ``end``, is over."""
        self._told = None
        order, commons = self.order, self.commons
        at, last = order.index(lane), len(order) - 1
        left, before = (order[at - 1], commons[at]) if at else (-1, 0)
        right, behind = (order[at + 1], commons[at + 1]) if at < last else (-1, 0)
        while node.parent is not None:
            if node.member == lane:
                node.member = left if before >= end else right if behind >= end else -1
            end -= len(node.key)
            node = node.parent
        if at < last:
            commons[at + 1] = min(before, behind)
        del order[at], commons[at]
