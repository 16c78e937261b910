"""Schedules the work of constraints on threads, and bounds its CPU time.

Owns the queue of that work and its budgets. Knows neither threads nor the device; :func:`work` is
what a thread runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from math import inf
from time import thread_time
from typing import NamedTuple

from asyncllm.constrain.protocol import NO_PATH, Constraint, Path, ResampleToken, Verdict
from asyncllm.core.faults import contained
from asyncllm.core.steps import Request
from asyncllm.errors import RequestError
from asyncllm.records import ConstraintDone, Failure

STEP_S = 0.05  # CPU seconds for all constraints while the device is busy with one step
BATCH_S = 0.005  # a thread returns after this long, with the rest left undone
CHEAP_S = 0.002  # a step may wait for masks that usually take less than this
AHEAD_SHARE = 0.5  # of a request's time limit; it may look ahead for as long besides


class Job(NamedTuple):
    """Work of a request's constraint."""

    rid: int
    constraint: Constraint
    tokens: tuple[int | None, ...]  # to accept; None: start
    ahead: int = 0  # tokens to look ahead behind them
    guess: Path = NO_PATH  # of these


def work(jobs: Sequence[Job], clock: Callable[[], float] = thread_time) -> list[ConstraintDone]:
    """Runs in a thread: does as much of the jobs as BATCH_S allows, at least one token."""
    done: list[ConstraintDone] = []
    begun = before = clock()
    for job in jobs:
        if before - begun >= BATCH_S:
            done.append(ConstraintDone(job.rid, Verdict.UNDONE))
            continue
        num, failure, ahead_s = 0, None, 0.0
        try:
            verdict, num, ahead_s = contained(_advance, job, clock, begun + BATCH_S)
        except ResampleToken:
            verdict = Verdict.AGAIN
        except RequestError as error:
            verdict, failure = Verdict.REFUSED, Failure.of(error, "grammar")
        now = clock()
        done.append(ConstraintDone(job.rid, verdict, now - before - ahead_s, ahead_s, failure, num))
        before = now
    return done


def _advance(job: Job, clock: Callable[[], float], until: float) -> tuple[Verdict, int, float]:
    """The verdict, how many tokens have been accepted, and the seconds spent on looking ahead."""
    constraint, verdict, num = job.constraint, Verdict.GOES_ON, 0
    for token in job.tokens:
        if num and clock() >= until:
            break
        verdict = Verdict.GOES_ON
        if token is None:
            constraint.start()
        elif constraint.accept(token):
            verdict = Verdict.WHOLE
        num += 1
    if not job.ahead or num < len(job.tokens) or verdict is not Verdict.GOES_ON:
        return verdict, num, 0.0
    accepted = clock()
    constraint.look_ahead(job.guess, job.ahead)
    return verdict, num, clock() - accepted


class MaskWorkQueue:
    """Requests whose constraint has work to do; each is queued here or with a thread at most once.

    The request that has used the least CPU time is next; a new one starts with the usage of the
    last one taken. So a request with cheap masks waits for at most one piece of other work, and
    when all are expensive each gets its share.

    Attributes:
        limit_s: CPU seconds that a request's own tokens may take; looking ahead does not count.
    """

    def __init__(self, limit_s: float = inf) -> None:
        self.limit_s = limit_s
        self._heap: list[tuple[float, int, Request]] = []
        self._number = 0
        self._level = 0.0
        self._left = STEP_S
        self._working = 0  # requests that are with a thread

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def idle(self) -> bool:
        """No work is queued or running."""
        return not (self._heap or self._working)

    def add(self, req: Request) -> None:
        """Queue the first entry of ``req.todo``, followed by the outputs the request arrived
        with."""
        if req.level < 0:
            req.level = self._level
        self._number += 1
        heappush(self._heap, (req.level, self._number, req))

    def take(self, most: int, busy: bool, ahead: int = 0) -> list[Job]:
        """Work for a thread, of at most ``most`` requests.

        Args:
            busy: the device is working on a step, so at most STEP_S are available.
            ahead: tokens that each is to look ahead, until AHEAD_SHARE of ``limit_s`` is used for
                that.
        """
        jobs: list[Job] = []
        while self._heap and len(jobs) < most and (self._left > 0 or not busy):
            level, _, req = heappop(self._heap)
            self._level = max(self._level, level)
            if req.todo:  # else it has ended in the meantime
                assert req.constraint is not None
                num = ahead if req.looked_s < AHEAD_SHARE * self.limit_s else 0
                jobs.append(Job(req.rid, req.constraint, req.next_todo(), num, req.guess(num)))
        self._working += len(jobs)
        return jobs

    def spent(self, req: Request | None, cpu_s: float, ahead_s: float = 0.0) -> None:
        """A thread has returned from ``req``; None: it has ended in the meantime."""
        self._working -= 1
        self._left -= cpu_s + ahead_s
        if req is not None:
            req.level += cpu_s + ahead_s
            req.worked_s += cpu_s
            req.looked_s += ahead_s

    def step_over(self) -> None:
        """The device has finished a step."""
        self._left = STEP_S
