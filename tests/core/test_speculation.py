"""How many guesses a step has: as many as make more tokens in a second, for all requests."""

from __future__ import annotations

import pytest

from asyncllm.core.speculation import FRESH, Speculation, step_rows
from asyncllm.core.step_times import StepSize, StepTimes

SURE = [0.95**i for i in range(1, 9)]


def make(
    ms: float, per_row: float = 0.0, gap_s: float = 0.0, most_rows: int = 64, *, tried: bool = True
) -> Speculation:
    """Steps take ``ms`` and ``per_row`` for each row; 0: nothing is known. ``tried``: drafts have
    been, lately."""
    rows = (1, 2, 4, 8, 16, 32) * 8 if ms else ()
    times = StepTimes([(StepSize(n, 9 * n, n, decodes=True), ms + per_row * n) for n in rows])
    times.gap_s = gap_s
    made = Speculation(8, most_rows, times)
    if tried:
        made.over(drafts=True)
    return made


@pytest.mark.parametrize(
    ("ms", "per_row", "gap_s", "tried", "num"),
    [
        (9.0, 0.0, 0.0, True, 8),  # rows are free
        (2.0, 2.0, 0.0, True, 7),  # 1 + 5.65 tokens in 18 ms; the graph of 16 rows begins here
        (2.0, 5.0, 0.0, True, 3),
        (1.0, 8.0, 0.0, True, 0),
        (1.0, 8.0, 0.0, False, 8),  # what has not been tried seems free
        (9.0, 0.0, 0.09, True, 0),  # the device would wait too long
        (0.0, 0.0, 0.0, True, 0),  # a step without is measured first
    ],
)
def test_guesses_are_as_many_as_pay(
    ms: float, per_row: float, gap_s: float, tried: bool, num: int
) -> None:
    made = make(ms, per_row, gap_s, tried=tried)
    assert made.choose([SURE], 1, 99) == [num]
    assert made.waits([SURE], 1) == (num > 0)


def test_one_request_that_repeats_itself_does_not_hold_up_many_that_do_not() -> None:
    made = make(9.0, gap_s=0.003)
    assert made.choose([SURE, *[[]] * 31], 32, 99) == [0] * 32
    assert not made.waits([SURE], 32)
    assert sum(made.choose([SURE] * 4 + [[]] * 28, 32, 99)) == 32


def test_one_that_waits_for_its_mask_anyway_has_guesses_beside_many_that_have_none() -> None:
    made = make(9.0, gap_s=0.003)
    assert made.choose([SURE, *[[]] * 31], 32, 99, waits=False) == [8, *[0] * 31]
    assert make(1.0, 8.0).choose([SURE, *[[]] * 31], 32, 99, waits=False) == [0] * 32


def test_fewer_tokens_are_followed_ahead_where_many_requests_share_the_rows() -> None:
    made = make(9.0, most_rows=256)
    assert [made.ahead(num) for num in (1, 40, 64, 128, 200, 256, 300)] == [8, 8, 6, 2, 0, 0, 0]


def test_the_likeliest_guesses_get_the_rows() -> None:
    made = make(9.0, most_rows=8)
    taken = made.choose([[0.3, 0.1], SURE, [0.5]], 3, 99)
    assert taken == [0, 5, 0]
    assert made.choose([SURE, SURE], 2, 3) == [2, 1], "no more than there is room for"
    assert make(9.0, most_rows=2).choose([SURE, SURE], 2, 9) == [0, 0]


def test_what_was_too_dear_is_tried_again_after_long() -> None:
    made = make(1.0, 8.0)
    for _ in range(FRESH - 1):
        made.over(drafts=False)
    assert made.choose([SURE], 1, 99) == [0]
    made.over(drafts=False)
    assert made.choose([SURE], 1, 99) == [8]
    made.over(drafts=True)
    assert made.choose([SURE], 1, 99) == [0]


def test_rows_of_a_step() -> None:
    assert step_rows(1, 8) == 9
    assert step_rows(100, 8) == 256
    assert step_rows(1000, 8) == 1000
