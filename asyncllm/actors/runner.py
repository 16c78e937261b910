"""Runner: launches planned steps on this rank's device and reports when they are done.

Owns the device and the order of plans; knows neither requests nor policy.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import NoReturn, Protocol, TypeVar, assert_never

from asyncllm.actors.base import Actor
from asyncllm.errors import PlanOutOfOrder
from asyncllm.messages import Probe, RunnerStats, StepDone, StepFinished, StepPlan

T = TypeVar("T")

RECENT = 256  # steps over which the metrics' median times are taken
JOIN_S = 5.0  # a device that hangs must not hang the exit


class PendingStep(Protocol):
    """A launched step.

    Attributes:
        gap_ms: after :meth:`wait`, how long the device was idle before this step although it had
            been launched in time; None if that was not measured.
    """

    gap_ms: float | None

    def wait(self) -> StepDone:
        """Block, with the GIL released, until the step is done. Called once, in a thread.

        What it raises ends the rank.
        """


class Device(Protocol):
    """One step at a time on one accelerator, or on the CPU."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue a step behind those already launched; does not wait for it."""

    def close(self) -> None:
        """Free everything; no step is in flight."""


class Runner(Actor[StepPlan | Probe]):
    """One per rank.

    Args:
        device: where steps run.
        reports: send results to the scheduler on this endpoint (the group's first rank).
        transfers: tell ``kv_transfer`` on this endpoint which steps are over.
        jit_after_warmup: counts kernels that were compiled while serving.
        kv_reads_saved: counts tokens whose K/V were read once for several rows.
    """

    remote = frozenset({StepPlan})
    orders = frozenset({Probe})

    def __init__(
        self,
        device: Device,
        *,
        reports: bool,
        transfers: bool = False,
        jit_after_warmup: Callable[[], int] = lambda: 0,
        kv_reads_saved: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__("runner")
        self.device, self.reports, self.transfers = device, reports, transfers
        self._jit_after_warmup, self._kv_reads_saved = jit_after_warmup, kv_reads_saved
        self._step = 0
        self._step_ms, self._launch_ms, self._gap_ms = (_recent() for _ in range(3))
        self._unfinished: deque[tuple[float, StepPlan]] = deque()  # with launch times
        self._waits: queue.SimpleQueue[PendingStep | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait_forever, name="waiter", daemon=True)
        self._stopped = False

    def started(self) -> None:
        self._loop = self.system.loop
        self._scheduler = self.system.ref("scheduler")
        self._transfer = self.system.ref("kv_transfer")
        self._watchdog = self.system.at_coordinator("watchdog")
        self._thread.start()

    def receive(self, batch: list[StepPlan | Probe]) -> None:
        for msg in batch:
            match msg:
                case StepPlan():
                    if msg.step != self._step + 1:
                        raise PlanOutOfOrder(self._step, msg.step)
                    self._step = msg.step
                    begin = perf_counter()
                    self._unfinished.append((begin, msg))  # a launch can hang too
                    self._waits.put(self.device.launch(msg))
                    self._launch_ms.append((perf_counter() - begin) * 1e3)
                case Probe(query):
                    self._watchdog.tell(self._stats(query))
                case _:
                    assert_never(msg)

    def stopped(self) -> None:
        """Wait briefly for the last step, then close the device, unless it hangs."""
        self._stopped = True
        self._waits.put(None)
        if self._thread.ident is not None:
            self._thread.join(JOIN_S)
        if not self._thread.is_alive():
            self.device.close()

    def busy_since(self) -> float | None:
        """``perf_counter`` at the launch of the oldest unfinished step; None: idle. Any thread."""
        try:
            return self._unfinished[0][0]
        except IndexError:
            return None

    def holds(self) -> str:
        return f"in flight: {self.in_flight() or 'nothing'}"

    def in_flight(self) -> str:
        """Describes the unfinished steps, oldest first, for diagnosing a hang. Thread-safe."""
        now = perf_counter()
        steps = (f"{_describe(plan)}, {now - began:.1f} s" for began, plan in [*self._unfinished])
        return "; ".join(steps)

    def _stats(self, query: int) -> RunnerStats:
        return RunnerStats(
            query=query,
            endpoint=self.system.endpoint,
            step_ms=_median(self._step_ms),
            launch_ms=_median(self._launch_ms),
            gap_ms=_median(self._gap_ms),
            jit_after_warmup=self._jit_after_warmup(),
            kv_reads_saved=self._kv_reads_saved(),
        )

    def _wait_forever(self) -> None:
        """The one waiter thread. Followers wait too, so that their hangs are noticed."""
        last = 0.0
        for pending in iter(self._waits.get, None):
            try:
                done = pending.wait()
                now = perf_counter()
                self._step_ms.append((now - max(self._unfinished.popleft()[0], last)) * 1e3)
                if pending.gap_ms is not None:
                    self._gap_ms.append(pending.gap_ms)
                last = now
            except BaseException as error:  # any error ends the rank; raised on the loop
                self._post(self._fail, error)
                return
            if self.reports or self.transfers:
                self._post(self._report, done)

    def _post(self, callback: Callable[[T], None], value: T) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, value)
        except RuntimeError:  # the loop is closed: nobody is left to notify
            if not self._loop.is_closed():
                raise

    def _report(self, done: StepDone) -> None:
        if self._stopped:
            return
        if self.transfers:
            self._transfer.tell(StepFinished(done.step))
        if self.reports:
            self._scheduler.tell(done)

    def _fail(self, error: BaseException) -> NoReturn:
        """On the loop, whose exception handler ends the system."""
        raise error


def _recent() -> deque[float]:
    return deque(maxlen=RECENT)


def _median(values: deque[float]) -> float:
    """Median of a deque that the waiter thread may be appending to; 0 if it is empty."""
    return median(values.copy()) if values else 0.0


def _describe(plan: StepPlan) -> str:
    num_rows, num_tokens = len(plan.lanes), len(plan.tokens)
    new = f", lanes opened {[o.lane for o in plan.opened]}" if plan.opened else ""
    return f"step {plan.step}: {num_rows} rows ({plan.num_decode} decode), {num_tokens} tokens{new}"
