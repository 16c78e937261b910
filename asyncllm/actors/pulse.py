"""Heartbeats and counters of a node's processes, in memory that all of them share.

Each writes the time into a place of its own, from a thread, so that a busy event loop is no
silence; to look takes no message, so that nothing is missed while one's own loop is busy. Knows no
actor.
"""

from __future__ import annotations

import mmap
import os

PLACES = 1 << 16  # numbers of endpoints repeat after so many; only pages that are used are memory
TABLES = 3  # times, foreign frames, strangers
SIZE = 8 * PLACES * TABLES


class Pulse:
    """The memory behind a file descriptor from :meth:`create`, here or in the parent."""

    def __init__(self, fd: int) -> None:
        memory = memoryview(mmap.mmap(fd, SIZE)).cast("d")
        tables = (memory[PLACES * i : PLACES * (i + 1)] for i in range(TABLES))
        self._times, self._foreign, self._strangers = tables

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

    def note(self, endpoint: int, foreign_frames: int, strangers: int) -> None:
        """What ``endpoint`` has counted at its doors since its start."""
        self._foreign[endpoint % PLACES] = foreign_frames
        self._strangers[endpoint % PLACES] = strangers

    def noted(self, below: int, but: int) -> tuple[int, int]:
        """Foreign frames and strangers of all endpoints with numbers ``below``, ``but`` one."""
        end = min(below, PLACES)
        foreign, strangers = sum(self._foreign[:end]), sum(self._strangers[:end])
        mine = but % PLACES
        return int(foreign - self._foreign[mine]), int(strangers - self._strangers[mine])
