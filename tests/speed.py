"""How fast this machine is at the moment, for bounds of CPU time."""

from __future__ import annotations

from collections.abc import Callable
from time import thread_time

_NOMINAL_S = 0.0045  # of the loop below, on the machines that the bounds were set on


def slowness() -> float:
    """How many times longer Python takes here and now than it should, at least 1.

    A slow core, or one whose other half is busy, makes all CPU times longer.
    """
    best = 1.0
    for _ in range(5):
        begun, total = thread_time(), 0
        for number in range(200_000):
            total += number & 7
        best = min(best, thread_time() - begun)
    return max(1.0, best / _NOMINAL_S)


def quickest(work: Callable[[], object], limit_s: float, tries: int = 10) -> float:
    """CPU seconds of the quickest run on a machine of nominal speed; the first below ``limit_s``
    is enough, since other work on the machine can only make a run longer."""
    best = float("inf")
    for _ in range(tries):
        begun = thread_time()
        work()
        best = min(best, (thread_time() - begun) / slowness())
        if best < limit_s:
            break
    return best
