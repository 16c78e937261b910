"""Places and shares of a queue, and when a refused client may come back."""

from __future__ import annotations

import pytest

from asyncllm.core.admission import Admission, FairQuota
from asyncllm.errors import RequestError, ServerBusy

A, B, C = 1, 2, 3


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def full(client: int, admission: Admission) -> int:
    """How many of one client come in, one after the other."""
    num = 0
    while True:
        try:
            admission.enter(client, 1)
        except ServerBusy:
            return num
        num += 1


def busy(admission: Admission, client: int, wanted: int = 1) -> str:
    with pytest.raises(ServerBusy) as caught:
        admission.enter(client, wanted)
    return caught.value.message


def test_a_client_alone_may_take_the_whole_queue() -> None:
    admission = Admission(max_running=2, max_waiting=8)
    assert full(A, admission) == 10
    assert "10 choices are being generated or wait, at most 10 may (--running_max" in busy(
        admission, A
    )


def test_half_is_the_most_while_others_wait() -> None:
    admission = Admission(max_running=0, max_waiting=8)
    admission.enter(B, 1)
    assert full(A, admission) == 4
    assert "this client has 4 choices waiting and asks for 1 more: one may hold 4 places, half of "\
        "--max_waiting, while others wait; try again in" in busy(admission, A)  # fmt: skip
    assert full(B, admission) == 3


def test_who_comes_later_finds_its_half_whatever_one_client_holds() -> None:
    admission = Admission(max_running=2, max_waiting=8)
    full(A, admission)
    for _ in range(2):
        admission.begin(A)
    assert full(B, admission) == 4, "half of the queue"
    assert full(C, admission) == 0, "the other half is A's"
    assert full(A, admission) == 0
    for _ in range(5):
        admission.leave(A, begun=False, served=False)
    assert full(A, admission) == 1, "four again, since others wait"


def test_a_share_is_back_when_the_others_are_gone() -> None:
    admission = Admission(max_running=0, max_waiting=8)
    admission.enter(B, 1)
    assert full(A, admission) == 4
    admission.leave(B, begun=False, served=True)
    assert full(A, admission) == 4


def test_the_queue_never_holds_more_than_half_as_much_again_and_forgets_clients() -> None:
    shares = FairQuota(10)
    for client in range(1, 200):
        while shares.room(client) > 0:
            shares.take(client)
    assert shares.total == 15
    assert shares.of(1) == 10
    for client in (1, 2):
        for _ in range(shares.of(client)):
            shares.give(client)
    assert shares._held == {}


def test_room_in_the_batch_counts_for_everybody() -> None:
    admission = Admission(max_running=100, max_waiting=4)
    admission.enter(B, 1)
    assert full(A, admission) == 102
    for _ in range(99):
        admission.begin(A)
    assert full(A, admission) == 0


def test_more_choices_than_there_are_places_is_a_bad_request() -> None:
    with pytest.raises(RequestError, match="11 choices in one request, at most 10 may") as caught:
        Admission(max_running=2, max_waiting=8).enter(A, 11)
    assert (caught.value.status, caught.value.param) == (400, "n")


def test_retry_after_is_the_queue_over_the_measured_rate() -> None:
    clock = Clock()
    admission = Admission(max_running=2, max_waiting=16, clock=clock)
    full(A, admission)
    for _ in range(60):  # two of two seconds each, all the time: one a second
        admission.begin(A)
        admission.begin(A)
        clock.now += 2
        for _ in range(2):
            admission.leave(A, begun=True, served=True)
        full(A, admission)
    assert 14 <= admission.retry_after_s() <= 18
    for _ in range(12):
        admission.leave(A, begun=False, served=False)  # clients that left are no service
    assert 4 <= admission.retry_after_s() <= 6


def test_what_one_alone_took_is_no_measure_of_a_full_batch() -> None:
    clock = Clock()
    admission = Admission(max_running=16, max_waiting=100, clock=clock)
    admission.enter(A, 1)
    clock.now += 0.7
    admission.begin(A)
    admission.leave(A, begun=True, served=True)
    full(A, admission)
    assert 3 <= admission.retry_after_s() <= 8, "100 of 0.7 s, 16 at a time"
    for _ in range(4):  # two seconds for each batch of 16
        for _ in range(16):
            admission.begin(A)
        clock.now += 2
        for _ in range(16):
            admission.leave(A, begun=True, served=True)
        full(A, admission)
    assert 11 <= admission.retry_after_s() <= 14, "100 of 8 a second"


def test_before_anything_is_measured_a_request_is_taken_to_last_a_second() -> None:
    clock = Clock()
    admission = Admission(max_running=4, max_waiting=32, clock=clock)
    full(A, admission)
    assert admission.retry_after_s() == 8
    clock.now += 5
    assert admission.retry_after_s() == 60


def test_an_idle_time_does_not_slow_the_rate_and_a_stall_does() -> None:
    clock = Clock()
    admission = Admission(max_running=1, max_waiting=10, clock=clock)
    for _ in range(100):
        admission.enter(A, 1)
        admission.begin(A)
        clock.now += 1
        admission.leave(A, begun=True, served=True)
    clock.now += 3600
    full(A, admission)
    assert 9 <= admission.retry_after_s() <= 11
    clock.now += 3600
    assert admission.retry_after_s() == 60


def test_retry_after_is_a_second_at_least() -> None:
    assert Admission(max_running=1, max_waiting=1).retry_after_s() == 1
