"""Settings of a watchdog, and how it acts on the outside world."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from asyncllm.topology import Contract

STDERR = 2
TICK_S = 0.1
WATCH_S = 0.5


def dump_stacks() -> None:
    """Write the stacks of all threads to stderr."""
    faulthandler.dump_traceback(STDERR)


def guard_loop(seconds: float) -> None:
    """Dump stacks and end the process unless called again within ``seconds``; 0: disarm.

    Works from a thread that does not need the GIL, so it also ends a process in which foreign code
    holds the GIL; other hangs are detected earlier.
    """
    if seconds > 0:
        faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
    else:
        faulthandler.cancel_dump_traceback_later()


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogConfig:
    """Configuration of one watchdog.

    Args:
        contract: what must be equal in all processes.
        model_name: label in the metrics.
        max_len: maximum tokens of a request, for the metrics' buckets.
        linears: (kind of weights, number of linear layers), for the metrics.
        step_timeout_s: a launched step, or the loop, that takes longer ends the process. 0: never.
        busy_since: perf_counter time at which the oldest unfinished step was launched, or None.
        in_flight: describes the unfinished steps. Like busy_since, called in a thread.
        heartbeat_s: between two heartbeats, and two checks of the others'.
        dead_after_s: an endpoint silent for this long is lost.
        log_every_s: between two lines about throughput.
    """

    contract: Contract
    model_name: str
    max_len: int
    step_timeout_s: float
    busy_since: Callable[[], float | None] = lambda: None
    in_flight: Callable[[], str] = lambda: ""
    heartbeat_s: float = 1.0
    dead_after_s: float = 10.0
    log_every_s: float = 10.0
    linears: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogHooks:
    """How a watchdog acts on the outside world; tests replace these functions.

    ``beat``, ``last_beat`` and ``note`` are those of ``Heartbeats``; unused with only one process.
    ``others`` returns foreign frames and failed handshakes of the node's other processes.
    """

    clock: Callable[[], float] = perf_counter  # on Linux the same in all processes
    beat: Callable[[int, float], None] = lambda _endpoint, _now: None
    last_beat: Callable[[int], float] = lambda _: 0.0
    note: Callable[[int, int, int], None] = lambda _endpoint, _foreign, _failed_handshakes: None
    others: Callable[[], tuple[int, int]] = lambda: (0, 0)
    exit: Callable[[int], None] = os._exit  # thread-safe; works even if the loop hangs
    kill: Callable[[int], None] = lambda _: None  # end an endpoint's process at once
    dump: Callable[[], None] = dump_stacks
    guard: Callable[[float], None] = guard_loop
    tick_s: float = TICK_S
    watch_s: float = (
        WATCH_S  # between two checks by the thread that watches steps and loop; 0: none
    )
