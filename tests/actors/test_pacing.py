"""Late launch and the share of prompts, with requests that come at random and a device whose steps
take what their tokens and K/V reads say; time is only simulated."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from asyncllm.actors import scheduler as module
from asyncllm.actors.allocator import Allocator
from asyncllm.actors.scheduler import Scheduler
from asyncllm.codec import i32
from asyncllm.core.pacing import LEAST_ROOM, Pacer
from asyncllm.core.request import SamplingParams
from asyncllm.core.scheduling import SchedulerCore
from asyncllm.core.step_times import StepTimes
from asyncllm.messages import StepDone, StepPlan, Submit, Tokens

PROMPT, OUTPUT, NUM, RATE = 1024, 48, 150, 14.0  # tokens, requests, requests a second
LAUNCH_S, TOLD_S = 0.0005, 0.0001  # from the plan to the device, from the device to the scheduler


def step_ms(plan: StepPlan) -> float:
    return 5.5 + 0.02 * len(plan.tokens) + 3e-5 * sum(plan.starts)


def alone_ms(plan: StepPlan) -> float:
    """Of its rows that decode."""
    num = plan.num_decode
    return 5.5 + 0.02 * num + 3e-5 * sum(plan.starts[:num])


class Simulation:
    """Scheduler and allocator on a clock of their own, and a device that takes steps in turn.

    Attributes:
        ttft: seconds to each first token.
        gaps: seconds that the device waited between two steps while requests were running.
    """

    endpoint, topology = 0, None

    def __init__(self, monkeypatch: pytest.MonkeyPatch, share: float = 1.0) -> None:
        self.now = self.free_at = 0.0
        monkeypatch.setattr(module, "perf_counter", lambda: self.now)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.mail: deque[tuple[str, Any]] = deque()
        self.loop = SimpleNamespace(
            call_later=lambda delay, put, msg, urgent: self.at(
                self.now + delay, lambda: self.mail.append(("scheduler", msg))
            )
        )
        self.plans: list[StepPlan] = []
        self.sent: dict[int, float] = {}
        self.ttft: dict[int, float] = {}
        self.gaps: list[float] = []
        self.allocator = Allocator(200_000)
        core = SchedulerCore(
            num_lanes=128,
            num_slots=200_000,
            batch_max_tokens=8192,
            chunked_prefill_size=2048,
            eos_ids=(),
        )
        self.scheduler = Scheduler(core, runners=[0], pacer=Pacer(StepTimes(), share))
        for actor in (self.allocator, self.scheduler):
            actor.system = self  # type: ignore[assignment]
            actor.started()

    def ref(self, name: str, endpoint: int = 0) -> Any:
        return SimpleNamespace(tell=lambda msg, urgent=False: self.mail.append((name, msg)))

    at_coordinator = ref

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, len(self.sent) + len(self.events), what))

    def run(self) -> None:
        rng, when = random.Random(5), 0.0
        for rid in range(NUM):
            when += rng.expovariate(RATE)
            prompt = i32([rid, *(rng.randrange(1000) for _ in range(PROMPT - 1))])
            self.at(when, partial(self.submit, rid, prompt))
        while self.events:
            self.now, _, what = heapq.heappop(self.events)
            what()
            while self.mail:
                self.deliver(*self.mail.popleft())

    def submit(self, rid: int, prompt: Any) -> None:
        self.sent[rid] = self.now
        params = SamplingParams(max_new_tokens=OUTPUT, ignore_eos=True)
        self.mail.append(("scheduler", Submit(rid=rid, prompt=prompt, params=params)))

    def deliver(self, name: str, msg: Any) -> None:
        if name == "scheduler":
            self.scheduler.receive([msg])
        elif name == "allocator":
            self.allocator.receive([msg])
        elif name == "runner":
            self.launch(msg)
        elif isinstance(msg, Tokens):
            for rid in msg.rids:
                self.ttft.setdefault(rid, self.now - self.sent[rid])

    def launch(self, plan: StepPlan) -> None:
        ready, ms = self.now + LAUNCH_S, step_ms(plan)
        if self.free_at and plan.num_decode:  # some requests were running already
            self.gaps.append(max(ready - self.free_at, 0.0))
        self.free_at = max(ready, self.free_at) + ms / 1e3
        self.plans.append(plan)
        tokens = i32([7] * len(plan.lanes))
        done = StepDone(step=plan.step, tokens=tokens, logprobs=None, prompt=(), device_ms=ms)
        self.at(self.free_at + TOLD_S, lambda: self.mail.append(("scheduler", done)))


def simulated(monkeypatch: pytest.MonkeyPatch, share: float = 1.0, late: bool = True) -> Simulation:
    made = Simulation(monkeypatch, share)
    if not late:
        monkeypatch.setattr(made.scheduler._pacer, "pause", lambda *_: 0.0)
    made.run()
    assert len(made.ttft) == NUM
    return made


def mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def test_a_late_launch_takes_newcomers_into_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    late, at_once = (simulated(monkeypatch, late=late) for late in (True, False))
    # of a step of 6 to 7 ms; the rest is the prompt's own step
    assert mean(late.ttft.values()) < mean(at_once.ttft.values()) - 0.004
    assert len(late.gaps) > 300
    # the device waits no longer than for a launch, and hardly ever
    assert max(late.gaps) <= LAUNCH_S + TOLD_S + 1e-9
    assert mean(late.gaps) < 0.1 * LAUNCH_S


def test_a_share_bounds_what_prompts_add_to_steps_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ratios(share: float) -> list[float]:
        """Of mixed steps to what they would have taken without prompts, once these are known."""
        plans = simulated(monkeypatch, share).plans[100:]
        return [
            step_ms(plan) / alone_ms(plan)
            for plan in plans
            if 0 < plan.num_decode < len(plan.lanes)
            and len(plan.tokens) - plan.num_decode > LEAST_ROOM
        ]

    whole, half = ratios(1.0), ratios(0.5)
    assert len(half) > 50
    assert max(half) <= 2.02
    assert max(whole) > 4
