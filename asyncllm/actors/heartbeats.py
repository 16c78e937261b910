"""Heartbeats and counters of a node's processes, in memory that all of them share.

Each process writes the time into its own entry from a thread, so that a busy event loop does not
look dead; reading takes no message, so nothing is missed while one's own loop is busy. Knows no
actors.
"""

from __future__ import annotations

import mmap
import os

PLACES = 1 << 16  # endpoint numbers wrap around; only used pages take memory
TABLES = 3  # times, foreign frames, failed handshakes
SIZE = 8 * PLACES * TABLES


class Heartbeats:
    """The memory behind a file descriptor from :meth:`create`, here or in the parent."""

    def __init__(self, fd: int) -> None:
        memory = memoryview(mmap.mmap(fd, SIZE)).cast("d")
        tables = (memory[PLACES * i : PLACES * (i + 1)] for i in range(TABLES))
        self._times, self._foreign, self._failed_handshakes = tables

    @staticmethod
    def create() -> int:
        """Create the memory; no heartbeats in it yet."""
        fd = os.memfd_create("asyncllm-heartbeats")
        os.ftruncate(fd, SIZE)
        return fd

    def beat(self, endpoint: int, now: float) -> None:
        """Record a heartbeat of ``endpoint`` at ``now``, of a clock shared by all processes."""
        self._times[endpoint % PLACES] = now

    def last(self, endpoint: int) -> float:
        """Time of ``endpoint``'s last heartbeat; 0.0: none yet."""
        return self._times[endpoint % PLACES]

    def note(self, endpoint: int, foreign_frames: int, failed_handshakes: int) -> None:
        """Record the foreign frames and failed handshakes of ``endpoint`` since its start."""
        self._foreign[endpoint % PLACES] = foreign_frames
        self._failed_handshakes[endpoint % PLACES] = failed_handshakes

    def noted(self, below: int, but: int) -> tuple[int, int]:
        """Foreign frames and failed handshakes of endpoints with numbers ``below``, ``but`` one."""
        end = min(below, PLACES)
        foreign, failed_handshakes = sum(self._foreign[:end]), sum(self._failed_handshakes[:end])
        mine = but % PLACES
        return int(foreign - self._foreign[mine]), int(
            failed_handshakes - self._failed_handshakes[mine]
        )
