"""Sets of positions stored as runs, for when there are too many to list.

Knows only numbers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class IntervalSet:
    """A set of integers, stored as disjoint runs [first, end) in order; adjacent runs are merged.

    Args:
        runs: initial contents.
    """

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        self._firsts: list[int] = []
        self._ends: list[int] = []
        for first, end in runs:
            self.add(first, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._firsts, self._ends, strict=True)

    def __bool__(self) -> bool:
        return bool(self._firsts)

    def __repr__(self) -> str:
        return f"IntervalSet({list(self)})"

    @property
    def total(self) -> int:
        """How many numbers it holds."""
        return sum(self._ends) - sum(self._firsts)

    def add(self, first: int, end: int) -> None:
        """Add [first, end), any part of which may already be in the set."""
        if first >= end:
            return
        low, high = bisect_left(self._ends, first), bisect_right(self._firsts, end)
        if low < high:
            first, end = min(first, self._firsts[low]), max(end, self._ends[high - 1])
        self._firsts[low:high], self._ends[low:high] = [first], [end]

    def remove(self, first: int, end: int) -> None:
        """Remove [first, end), any part of which may be missing."""
        if first >= end:
            return
        low, high = bisect_right(self._ends, first), bisect_left(self._firsts, end)
        if low >= high:
            return
        left = [(self._firsts[low], first)] if self._firsts[low] < first else []
        right = [(end, self._ends[high - 1])] if self._ends[high - 1] > end else []
        kept = left + right
        self._firsts[low:high] = [run[0] for run in kept]
        self._ends[low:high] = [run[1] for run in kept]

    def covers(self, first: int, end: int) -> bool:
        """Whether all of [first, end) is in it."""
        at = bisect_right(self._firsts, first) - 1
        return first >= end or (at >= 0 and self._ends[at] >= end)

    def missing(self, first: int, end: int) -> list[tuple[int, int]]:
        """The parts of [first, end) that are not in the set, in order."""
        found = []
        for at in range(bisect_right(self._ends, first), len(self._ends)):
            if self._firsts[at] >= end:
                break
            if self._firsts[at] > first:
                found.append((first, self._firsts[at]))
            first = self._ends[at]
        if first < end:
            found.append((first, end))
        return found
