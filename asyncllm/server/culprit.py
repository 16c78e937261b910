"""Decides what a failing server names as the cause.

When a process ends, collectives fail in all others, and some of these end before it is known, above
all if it is on another node.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Culprit:
    """The first known cause of a failure, or, if none is heard of in time, the first suspect.

    Args:
        wait_s: from a suspicion on, time for the cause to be heard of.
        fail: called on the loop with an exit code and the reason when the server must end; at least
            once per cause, the first time with the one that counts.
    """

    def __init__(self, wait_s: float, fail: Callable[[int, str], None]) -> None:
        self._wait_s, self._fail = wait_s, fail
        self._why = self._suspect = ""
        self._known = asyncio.Event()

    def found(self, code: int, why: str) -> None:
        """A process has failed by itself: end the server."""
        self._why = self._why or why
        self._known.set()
        self._fail(code, why)

    def suspect(self, why: str) -> None:
        """A process has ended as it does when a collective fails: end the server, but later."""
        if not self._suspect and not self._why:
            self._suspect = why
            asyncio.get_running_loop().call_later(self._wait_s, self._not_found)

    def _not_found(self) -> None:
        if not self._why:
            self.found(1, self._suspect)

    @property
    def why(self) -> str:
        """What is known of it; "": nothing."""
        return self._why or self._suspect

    async def wait(self) -> None:
        """Wait for the cause, at most ``wait_s``."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._known.wait(), self._wait_s)
