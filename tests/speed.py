"""How fast this machine is at the moment, for bounds of CPU time."""

from __future__ import annotations

from collections.abc import Callable
from time import thread_time

_NOMINAL_S = 0.0045  # of the loop below, on the machines that the bounds were set on


def slowness(tries: int = 5) -> float:
    """How many times longer Python takes here and now than it should, at least 1.

    A slow core, or one whose other half is busy, makes all CPU times longer. The best of several
    tries is that of the core, a single one also shows what else holds it up.
    """
    best = float("inf")
    for _ in range(tries):
        begun, total = thread_time(), 0
        for number in range(200_000):
            total += number & 7
        best = min(best, thread_time() - begun)
    return max(1.0, best / _NOMINAL_S)


def within(seconds: float, limit_s: float) -> bool:
    """Whether CPU seconds just spent would be fewer than ``limit_s`` at nominal speed, for work that
    a second run would find done."""
    return seconds < limit_s or seconds < limit_s * slowness()


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
