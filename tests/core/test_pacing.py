"""How long steps take is learned; by it the next one is launched late, and prompts get a share."""

from __future__ import annotations

import random

import pytest

from asyncllm.core.pacing import (
    LEAST_ROOM,
    MARGIN_S,
    NEXT_S,
    ROW_S,
    Pacer,
)
from asyncllm.core.step_times import KNOWN, STUBBORN, StepSize, StepTimes, TimeFit


def ms(num_tokens: int, num_read: int) -> float:
    return 6.0 + 0.02 * num_tokens + 3e-5 * num_read


def learned(times: TimeFit, num: int = 200, noise: float = 0.0) -> TimeFit:
    draw = random.Random(7)
    for _ in range(num):
        size = draw.randrange(1, 256), draw.randrange(100, 300_000)
        times.learn(*size, ms(*size) * (1 + draw.uniform(-noise, noise)))
    return times


@pytest.mark.parametrize(("noise", "off"), [(0.0, 0.001), (0.05, 0.03)])
def test_times_are_learned_beyond_the_sizes_seen(noise: float, off: float) -> None:
    times = learned(TimeFit(), noise=noise)
    for size in ((1, 100), (100, 100_000), (400, 400_000)):
        assert times.predict(*size) == pytest.approx(ms(*size), rel=off)
    assert times.error <= noise + 0.001
    assert times.tokens_within(ms(150, 50_000), 50_000) == pytest.approx(150, abs=15)


def test_nothing_is_built_on_few_steps_of_mixed_kinds() -> None:
    size, times = StepSize(100, 100, 1, decodes=False), StepTimes()
    alike = StepSize(1, 100, 1, decodes=True)
    for _ in range(KNOWN - 1):
        times.over(1.0, 0.0, size, 6.0, drafts=False)
        times.over(1.0, 0.0, alike, 6.0, drafts=False)
    assert times.predict(size) == 0
    assert times.predict(alike) == pytest.approx(6.0)
    assert times.error(alike) == 1.0
    assert times.tokens_beside(1, 100, 0.5) is None
    times.over(1.0, 0.0, size, 6.0, drafts=False)
    assert times.predict(size) == pytest.approx(6.0)


def test_where_the_device_measures_nothing_the_clock_does() -> None:
    """From the launch, or from the end of the step before, whatever is later."""
    times, size = StepTimes(), StepSize(1, 100, 1, decodes=True)
    times.over(1.0, 0.0, size, 0.0, drafts=False)
    assert times.decoding(1) == pytest.approx(1000)
    times.over(3.0, 0.5, size, 0.0, drafts=False)
    times.over(3.5, 3.3, size, 0.0, drafts=False)
    assert 200 < times.decoding(1) < 2000


def test_the_gap_is_that_before_steps_with_drafts() -> None:
    times, size = StepTimes(), StepSize(1, 100, 1, decodes=True)
    for at in range(1, 200):
        times.over(2.0 * at, 0.0, size, 1000.0, drafts=at % 2 == 0)
    assert times.gap_s == pytest.approx(1.0, rel=0.01)


def test_many_steps_of_one_size_forget_no_others_and_stay_finite() -> None:
    times = learned(TimeFit())
    for _ in range(20_000):
        times.learn(8, 4000, ms(8, 4000))
    assert times.predict(8, 4000) == pytest.approx(ms(8, 4000), rel=0.001)
    assert times.predict(200, 200_000) == pytest.approx(ms(200, 200_000), rel=0.1)


def test_a_step_out_of_line_is_left_out_and_a_new_pace_is_not() -> None:
    times = learned(TimeFit())
    before = times.predict(50, 50_000)
    times.learn(50, 50_000, 900.0)
    assert times.predict(50, 50_000) == before
    for _ in range(2000):  # the GPU is slower from here on
        times.learn(50, 50_000, 3 * before)
    assert times.predict(50, 50_000) == pytest.approx(3 * before, rel=0.05)
    assert STUBBORN < 2000


def paced(share: float = 1.0) -> Pacer:
    """Knows steps that decode (6 ms and a little) and others (2 ms, 25 us a token)."""
    draw, steps = random.Random(3), []
    for _ in range(100):
        rows, tokens = draw.randrange(1, 100), draw.randrange(100, 2000)
        steps.append((StepSize(rows, 100 * rows, rows, decodes=True), 6.0 + 0.01 * rows))
        steps.append((StepSize(tokens, 3 * tokens, 9, decodes=False), 2.0 + 0.025 * tokens))
    pacer = Pacer(StepTimes(steps), share)
    pacer.over(0.0, 6.0)
    return pacer


@pytest.mark.parametrize(
    ("running", "takes"),
    [(StepSize(1, 100, 1, True), 6.01e-3), (StepSize(1000, 3000, 5, False), 27e-3)],
)
def test_a_step_is_held_back_until_a_margin_before_the_end_of_the_one_in_front(
    running: StepSize, takes: float
) -> None:
    pacer = paced()
    pacer.launched(100.0, idle=True)
    pacer.launched(100.001, idle=False)  # behind another it has not begun
    margin = max(MARGIN_S, 0.05 * takes) + ROW_S * running.num_rows
    pause = pacer.pause(100.0, running)
    assert pause == pytest.approx(takes - margin, rel=0.01)
    assert pacer.pause(100.001, running) == pytest.approx(pause - 0.001)
    assert pacer.pause(100.0 + pause, running) == 0
    assert pacer.pause(200.0, running) == 0


def test_behind_what_is_not_known_it_is_launched_at_once() -> None:
    pacer = paced()
    pacer.times = StepTimes()
    assert pacer.pause(0.0, StepSize(1000, 1000, 1, decodes=False)) == 0


def test_a_device_that_measures_nothing_is_not_made_to_wait() -> None:
    pacer = paced()
    pacer.over(100.0, 0.0)
    assert pacer.pause(100.0, StepSize(1, 100, 1, decodes=True)) == 0


def test_a_late_launch_does_not_make_the_next_one_later() -> None:
    """What counts is the time on the device; a gap before a step is not part of it."""
    pacer, now, size = paced(), 100.0, StepSize(1, 100, 1, decodes=True)
    pauses = []
    for late in (0.0, 0.004, 0.004, 0.004):
        now += 0.006 + late
        pacer.over(now, 6.01)
        pacer.times.over(now, now - 0.001, size, 6.01, drafts=False)
        pauses.append(pacer.pause(now, size))
    assert pauses == pytest.approx([pauses[0]] * 4, rel=0.001)


def test_requests_whose_predecessors_ended_together_wait_for_each_other() -> None:
    pacer, running = paced(), StepSize(4, 400, 4, decodes=True)
    pacer.launched(100.0, idle=True)
    pause = pacer.pause(100.001, running)
    assert pause > 0

    def waits() -> float:
        return pacer.pause(100.001, running, waiting=True)

    assert waits() == 0  # nobody is expected
    pacer.ended(100.0, 2)
    pacer.ended(100.0, 1)
    for _ in range(2):
        pacer.came()
        assert waits() == pause
    pacer.came()
    assert waits() == 0  # all are there
    pacer.came()  # one more than have ended is not missed later
    pacer.ended(100.0, 1)
    assert waits() == pause
    pacer.launched(100.0 + NEXT_S, idle=True)
    assert pacer.pause(100.0 + NEXT_S, running, waiting=True) == 0  # too late to be one of them
    pacer.ended(100.0 + NEXT_S, 1)
    pacer.came()
    assert pacer.pause(100.0 + NEXT_S, running, waiting=True) == 0  # the earlier one is forgotten


def test_prompts_take_their_share_of_a_step() -> None:
    assert Pacer(StepTimes(), 0.5).prompt_room(8, 800) is None  # not known yet
    assert paced(1.0).prompt_room(8, 800) is None
    # 6.08 ms alone, so 12.16 with prompts: 406 tokens, of which 8 decode
    assert paced(0.5).prompt_room(8, 800) == pytest.approx(398, abs=8)
    assert paced(0.8).prompt_room(8, 800) == pytest.approx(1128, abs=12)
    assert paced(0.01).prompt_room(400, 40_000) == LEAST_ROOM
