"""Signs of life of a server's processes, in memory that all of them share.

Each writes the time into a place of its own, from a thread, so that a busy event loop is no
silence; to look takes no message, so that nothing is missed while one's own loop is busy. Knows no
actor.
"""

from __future__ import annotations

import mmap
import os

PLACES = 1 << 16  # numbers of endpoints repeat after so many; only pages that are used are memory
SIZE = 8 * PLACES


class Pulse:
    """The memory behind a file descriptor from :meth:`create`, here or in the parent."""

    def __init__(self, fd: int) -> None:
        self._times = memoryview(mmap.mmap(fd, SIZE)).cast("d")

    @staticmethod
    def create() -> int:
        """New memory, in which nobody lives yet."""
        fd = os.memfd_create("asyncllm-pulse")
        os.ftruncate(fd, SIZE)
        return fd

    def beat(self, endpoint: int, now: float) -> None:
        """``endpoint`` lives at ``now``, of a clock that all processes share. From any thread."""
        self._times[endpoint % PLACES] = now

    def last(self, endpoint: int) -> float:
        """When ``endpoint`` has last given a sign of life; 0.0: it has not yet."""
        return self._times[endpoint % PLACES]
