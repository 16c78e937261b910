"""Late launch and the share of prompts, with requests that come at random or one after another, and
a device whose steps take what their tokens and K/V reads say; time is only simulated."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence

import pytest

from asyncllm.core.pacing import LEAST_ROOM, Pacer
from asyncllm.core.step_times import StepTimes
from asyncllm.messages import StepPlan
from bench import serve
from bench.common import Record
from bench.simulate import Delays, Simulation

OPEN = "--n 150 --rate 14 --inp 1024 --out 48"
CLOSED = "--n 60 --conc 8 --inp 512 --out 128"
DELAYS = Delays(launch=0.0005, timer=0.0)


def step_ms(plan: StepPlan) -> float:
    return 5.5 + 0.02 * len(plan.tokens) + 3e-5 * sum(plan.starts)


def alone_ms(plan: StepPlan) -> float:
    """Of its rows that decode."""
    num = plan.num_decode
    return 5.5 + 0.02 * num + 3e-5 * sum(plan.starts[:num])


def simulated(options: str, share: float = 1.0) -> tuple[Simulation, Sequence[Record]]:
    load = serve.make_load(serve.parser().parse_args(shlex.split(options)))
    made = Simulation(load, step_ms, pacer=Pacer(StepTimes(), share), delays=DELAYS, seed=5)
    records = made.run()
    assert len(records) == len(load.bodies)
    assert all(record.done for record in records)
    return made, records


def mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def test_a_late_launch_takes_newcomers_into_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made, late = simulated(OPEN)
    monkeypatch.setattr(Pacer, "pause", lambda *_, waiting: 0.0)
    _, at_once = simulated(OPEN)
    # of a step of 6 to 7 ms; the rest is the prompt's own step
    assert mean([r.ttft_s for r in late]) < mean([r.ttft_s for r in at_once]) - 0.004
    assert len(made.gaps) > 300
    # the device waits no longer than for a launch, and hardly ever
    assert max(made.gaps) <= DELAYS.launch + DELAYS.told + 1e-9
    assert mean(made.gaps) < 0.1 * DELAYS.launch


def test_clients_that_go_on_when_others_do_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def held_up(made: Simulation) -> int:
        """Tokens of requests that had to wait for prompts of others."""
        return sum(p.num_decode for p in made.plans if p.num_decode < len(p.lanes))

    together, _ = simulated(CLOSED)
    monkeypatch.setattr(Pacer, "ended", lambda *_: None)  # nobody is expected
    apart, _ = simulated(CLOSED)
    assert held_up(together) < 0.7 * held_up(apart)
    assert mean(together.gaps) < 0.1 * DELAYS.launch  # the device does not wait for them


def test_a_share_bounds_what_prompts_add_to_steps_of_others() -> None:
    def ratios(share: float) -> list[float]:
        """Of mixed steps to what they would have taken without prompts, once these are known."""
        plans = simulated(OPEN, share)[0].plans[100:]
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
