"""How many guesses a step has: as many as make more tokens in a second, for all requests."""

from __future__ import annotations

import pytest

from asyncllm.codec import i32
from asyncllm.core.speculation import FRESH, Speculation, StepTimes, step_rows
from asyncllm.core.steps import Step
from asyncllm.messages import StepPlan

SURE = [0.95**i for i in range(1, 9)]


def make(times: dict[int, float], gap_s: float = 0.0, most_rows: int = 64) -> Speculation:
    """Steps of up to as many rows take so many seconds."""
    made = Speculation(8, most_rows)
    for rows, took_s in times.items():
        made.times.measured(rows, took_s, None)
    made.times.gap_s = gap_s
    return made


@pytest.mark.parametrize(
    ("times", "gap_s", "num"),
    [
        ({1: 1.0}, 0.0, 8),  # what is not known seems free
        ({1: 1.0, 16: 1.0}, 0.0, 8),
        ({1: 1.0, 8: 1.0, 16: 3.0}, 0.0, 7),  # the ninth row costs too much
        ({1: 1.0, 2: 1.5, 4: 4.0, 8: 9.0, 16: 9.0}, 0.0, 1),
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 16.0}, 0.0, 0),
        ({1: 1.0}, 9.0, 0),  # the device would wait too long
        ({}, 0.0, 0),  # a step without is measured first
    ],
)
def test_guesses_are_as_many_as_pay(times: dict[int, float], gap_s: float, num: int) -> None:
    made = make(times, gap_s)
    assert made.choose([SURE], 1, 99) == [num]
    assert made.waits([SURE], 1) == (num > 0)


def test_one_request_that_repeats_itself_does_not_hold_up_many_that_do_not() -> None:
    made = make({32: 1.0}, gap_s=0.3)
    assert made.choose([SURE, *[[]] * 31], 32, 99) == [0] * 32
    assert not made.waits([SURE], 32)
    assert sum(made.choose([SURE] * 4 + [[]] * 28, 32, 99)) == 32


def test_the_likeliest_guesses_get_the_rows() -> None:
    made = make({1: 1.0}, most_rows=8)
    taken = made.choose([[0.3, 0.1], SURE, [0.5]], 3, 99)
    assert taken == [0, 5, 0]
    assert made.choose([SURE, SURE], 2, 3) == [2, 1], "no more than there is room for"
    assert make({1: 1.0}, most_rows=2).choose([SURE, SURE], 2, 9) == [0, 0]


def test_a_time_counts_at_once_if_it_is_shorter_and_is_forgotten_after_long() -> None:
    times = StepTimes()
    times.measured(1, 1.0, None)
    times.measured(4, 9.0, None)
    assert times.of(3) == times.of(4) == 9.0
    for _ in range(6):
        times.measured(4, 1.0, None)
    assert times.of(4) < 1.2
    times.measured(4, 2.0, None)
    assert times.of(4) < 1.3, "one that is longer may be an accident"
    for _ in range(FRESH):
        times.measured(1, 1.0, None)
    assert times.of(4) == 1.0


def test_times_are_those_of_the_device_and_the_gap_is_that_before_steps_with_guesses() -> None:
    made = Speculation(8, 64)

    def step(launched_at: float, drafts: set[int]) -> Step:
        plan = StepPlan(step=1, num_decode=1, lanes=i32([0]))
        return Step(plan, [None], drafts=drafts, launched_at=launched_at)  # type: ignore[list-item]

    made.over(step(0.0, set()), 1.0)
    made.over(step(0.5, set()), 3.0)  # it was launched while the first one ran
    assert made.times.of(1) == pytest.approx(1.1)
    for at in range(4, 300, 2):
        made.over(step(at - 0.5, {0}), at + 0.5)
    assert made.times.of(1) == pytest.approx(1.0)
    assert made.times.gap_s == pytest.approx(1.0, rel=0.01)


def test_rows_of_a_step() -> None:
    assert step_rows(1, 8) == 9
    assert step_rows(100, 8) == 256
    assert step_rows(1000, 8) == 1000
