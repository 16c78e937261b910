"""A step behind another is launched shortly before its turn, and at once where that is not known."""

from __future__ import annotations

import pytest

from asyncllm.core.pacing import MARGIN_S, ROW_S, SHARE, Pacer


def test_nothing_is_known_before_the_first_step() -> None:
    assert Pacer().pause(100.0) == 0


@pytest.mark.parametrize(
    ("device_ms", "rows", "margin"),
    [
        (6.0, 1, MARGIN_S + ROW_S),
        (40.0, 1, SHARE * 0.040 + ROW_S),
        (20.0, 256, 0.005 + 256 * ROW_S),
    ],
)
def test_a_step_is_held_back_until_a_margin_before_the_end_of_the_one_in_front(
    device_ms: float, rows: int, margin: float
) -> None:
    pacer = Pacer()
    pacer.over(100.0, device_ms, rows)
    pause = pacer.pause(100.0)
    assert pause == pytest.approx(device_ms / 1e3 - margin)
    assert pacer.pause(100.001) == pytest.approx(pause - 0.001)
    assert pacer.pause(100.0 + pause) == 0
    assert pacer.pause(200.0) == 0


@pytest.mark.parametrize(("device_ms", "rows"), [(6.0, 0), (0.0, 1), (3.4, 1), (9.4, 256)])
def test_behind_what_cannot_be_foretold_or_is_short_it_is_launched_at_once(
    device_ms: float, rows: int
) -> None:
    pacer = Pacer()
    pacer.over(100.0, 6.0, 1)
    pacer.over(100.0, device_ms, rows)
    assert pacer.pause(100.0) == 0


def test_a_late_launch_does_not_make_the_next_one_later() -> None:
    """What counts is the time on the device; a gap before a step is not part of it."""
    pacer, now = Pacer(), 100.0
    pauses = []
    for late in (0.0, 0.004, 0.004, 0.004):
        now += 0.006 + late
        pacer.over(now, 6.0, 1)
        pauses.append(pacer.pause(now))
    assert pauses == pytest.approx([pauses[0]] * 4)
