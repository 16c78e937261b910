"""Sets of positions stored as runs, for when there are too many to list.

Knows only numbers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class IntervalSet:
    """A growing set of integers, as disjoint runs [first, end) in order; those that touch merge."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._firsts, self._ends, strict=True)

    def __repr__(self) -> str:
        return f"IntervalSet({list(self)})"

    def add(self, first: int, end: int) -> None:
        """Add [first, end), any part of which may already be in the set."""
        if first >= end:
            return
        low, high = bisect_left(self._ends, first), bisect_right(self._firsts, end)
        if low < high:
            first, end = min(first, self._firsts[low]), max(end, self._ends[high - 1])
        self._firsts[low:high], self._ends[low:high] = [first], [end]

    def covers(self, first: int, end: int) -> bool:
        """Whether all of [first, end) is in it."""
        at = bisect_right(self._firsts, first) - 1
        return first >= end or (at >= 0 and self._ends[at] >= end)
