"""A clock that excludes the time this process was stopped, and a fair pool of pages.

Knows neither sockets nor what pages hold.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from time import monotonic

MOST_OF_LEFT = 3


class PauseAwareClock:
    """Seconds, excluding time in which this process was stopped or did not run.

    A process that waits for others must not mistake its own absence for theirs.

    Args:
        most_s: maximum time counted between two looks; the owner looks more often.
    """

    def __init__(self, most_s: float, clock: Callable[[], float] = monotonic) -> None:
        self._most_s, self._clock = most_s, clock
        self._last, self.now = clock(), 0.0

    def look(self) -> float:
        """Update and return ``now``, which stays the same until the next look."""
        last, self._last = self._last, self._clock()
        self.now += min(self._last - last, self._most_s)
        return self.now


class PagePool:
    """Free pages, and how many each peer holds.

    A peer that holds some gets another one only if it then holds at most three times as many as are
    left. So one peer alone may hold three quarters of them, and those that stand still never hold
    all before several others have had theirs.
    """

    def __init__(self, num: int) -> None:
        self.num = num
        self._free = list(range(num))
        self._held: dict[Hashable, int] = {}

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def take(self, who: Hashable) -> int | None:
        """Take a page; None: there is none for ``who`` now."""
        held, left = self._held.get(who, 0), len(self._free) - 1
        if left < 0 or (held and held + 1 > MOST_OF_LEFT * left):
            return None
        self._held[who] = held + 1
        return self._free.pop()

    def give(self, who: Hashable, page: int) -> None:
        """Free a page that ``who`` holds."""
        assert 0 <= page < self.num
        assert page not in self._free, f"page {page} given back twice"
        self._free.append(page)
        self._held[who] -= 1
        if not self._held[who]:
            del self._held[who]
