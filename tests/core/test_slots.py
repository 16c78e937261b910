"""Slot pool and ledger: grants, sharing, release, counters."""

from __future__ import annotations

from array import array

import pytest

from asyncllm.core.slots import Ledger, SlotPool
from asyncllm.messages import SlotsGranted
from tests.actors.fake_device import check_ledger


def ints(values: range | list[int]) -> array[int]:
    return array("i", values)


def reserve(
    ledger: Ledger, *rows: tuple[int, int], **opened: tuple[list[int] | range, bool]
) -> SlotsGranted:
    """Rows are (lane, count); keywords ``lane3=(ids, may_share)``."""
    grant = ledger.reserve(
        ints([lane for lane, _ in rows]),
        ints([count for _, count in rows]),
        {int(name[4:]): (ints(ids), share) for name, (ids, share) in opened.items()},
    )
    check_ledger(ledger)
    return grant


def release(ledger: Ledger, lane: int, generated: list[int] | None = None) -> None:
    ledger.release(lane, ints(generated or []))
    check_ledger(ledger)


def test_slots_taken_at_once_ascend() -> None:
    pool = SlotPool(10)
    first = pool.take(4)
    assert list(first) == [6, 7, 8, 9]
    assert list(pool.take(2)) == [4, 5]
    pool.give(first)
    assert list(pool.take(4)) == [6, 7, 8, 9]
    assert len(pool) == 4
    assert list(pool.take(0)) == []


def test_a_prefix_of_the_rows_is_granted() -> None:
    ledger = Ledger(10)
    grant = reserve(ledger, (1, 4), (2, 7), (3, 1), lane1=([1] * 4, True), lane2=([2] * 7, True),
                    lane3=([3], True))  # fmt: skip
    assert list(grant.counts) == [4]
    assert grant.available == 6
    assert set(ledger.lanes) == {1}


def test_single_rows_of_open_lanes_are_granted_as_far_as_slots_last() -> None:
    ledger = Ledger(5)
    reserve(ledger, (1, 1), (2, 1), lane1=([1], True), lane2=([2], True))
    grant = reserve(ledger, (1, 1), (2, 1))
    assert list(grant.counts) == [1, 1]
    grant = reserve(ledger, (2, 1), (1, 1))
    assert list(grant.counts) == [1]
    assert len(ledger.lanes[2].slots) == 3
    assert (ledger.used, ledger.free, ledger.available) == (5, 0, 0)


def test_a_hit_leaves_one_token_to_compute() -> None:
    ledger = Ledger(32)
    reserve(ledger, (1, 8), lane1=(range(8), True))
    ledger.launched(ints([1]))
    grant = reserve(ledger, (2, 8), lane2=(range(8), True))
    assert list(grant.hits) == [7]
    assert list(grant.counts) == [1]
    assert list(grant.slots[:7]) == list(ledger.lanes[1].slots[:7])
    assert (ledger.hit_tokens, ledger.looked_up_tokens) == (7, 16)
    assert ledger.used == 9


def test_an_unlaunched_chunk_is_not_shared() -> None:
    ledger = Ledger(32)
    reserve(ledger, (1, 8), lane1=(range(8), True))
    assert list(reserve(ledger, (2, 8), lane2=(range(8), True)).hits) == [0]


def test_chunks_are_shared_as_they_are_launched() -> None:
    ledger = Ledger(64)
    reserve(ledger, (1, 4), lane1=(range(12), True))
    ledger.launched(ints([1]))
    reserve(ledger, (1, 4))
    assert list(reserve(ledger, (2, 8), lane2=(range(12), True)).hits) == [4]
    ledger.launched(ints([1]))
    assert list(reserve(ledger, (3, 8), lane3=(range(12), True)).hits) == [8]


def test_duplicates_stay_with_their_lane_until_it_is_released() -> None:
    ledger = Ledger(64)
    reserve(ledger, (1, 6), (2, 8), lane1=(range(6), True), lane2=(range(8), True))
    ledger.launched(ints([1, 2]))
    check_ledger(ledger)
    assert ledger.tree.size == 8  # six of the first, two of the second
    assert len(ledger.lanes[2].duplicates) == 6
    release(ledger, 1)
    assert (ledger.used, ledger.cached) == (14, 0)  # the second holds both
    release(ledger, 2)
    assert (ledger.used, ledger.cached, ledger.free) == (0, 8, 56)


def test_generated_tokens_stay_in_the_cache_and_granted_ones_without_kv_do_not() -> None:
    ledger = Ledger(64)
    reserve(ledger, (1, 4), lane1=(range(4), True))
    ledger.launched(ints([1]))
    for _ in range(3):
        reserve(ledger, (1, 1))
    release(ledger, 1, [10, 11])
    assert (ledger.used, ledger.cached, ledger.free) == (0, 6, 58)
    grant = reserve(ledger, (2, 8), lane2=([0, 1, 2, 3, 10, 11, 12], True))
    assert list(grant.hits) == [6]


def test_a_lane_released_before_its_launch_leaves_nothing() -> None:
    ledger = Ledger(64)
    reserve(ledger, (1, 4), lane1=(range(4), True))
    release(ledger, 1)
    assert ledger.free == 64


@pytest.mark.parametrize("whole", [True, False], ids=["ledger", "lane"])
def test_without_the_tree_all_slots_come_back(whole: bool) -> None:
    ledger = Ledger(16, use_tree=not whole)
    reserve(ledger, (1, 4), lane1=(range(4), whole))
    ledger.launched(ints([1]))
    reserve(ledger, (1, 1))
    release(ledger, 1, [9])
    assert ledger.free == 16
    assert ledger.looked_up_tokens == 0


def test_cached_slots_are_evicted_for_new_ones_but_not_the_hit() -> None:
    ledger = Ledger(10)
    for lane, ids in enumerate([range(4), range(10, 14)]):
        ledger.reserve(ints([lane]), ints([4]), {lane: (ints(ids), True)})
        ledger.launched(ints([lane]))
        release(ledger, lane)
    assert ledger.available == 10
    grant = reserve(ledger, (5, 6), lane5=([0, 1, 2, 3, *range(20, 26)], True))
    assert list(grant.hits) == [4]
    assert list(grant.counts) == [6]
    assert (ledger.used, ledger.evicted_tokens) == (10, 4)


def test_a_row_that_does_not_fit_evicts_nothing_and_leaves_its_hit_unlocked() -> None:
    ledger = Ledger(10)
    reserve(ledger, (1, 4), lane1=(range(4), True))
    ledger.launched(ints([1]))
    release(ledger, 1)
    grant = reserve(ledger, (2, 7), lane2=(range(20), True))
    assert list(grant.counts) == []
    assert (ledger.cached, ledger.used, ledger.evicted_tokens) == (4, 0, 0)
    assert ledger.looked_up_tokens == 4
