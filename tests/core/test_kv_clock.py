"""Time of one's own, and pages shared out among those who want them."""

from __future__ import annotations

import pytest

from asyncllm.core.kv_clock import PagePool, PauseAwareClock


def test_time_in_which_one_could_not_look_does_not_pass() -> None:
    now = [100.0]
    clock = PauseAwareClock(0.5, lambda: now[0])
    for step, passed in ((0.2, 0.2), (0.3, 0.5), (3600.0, 1.0), (0.1, 1.1)):
        now[0] += step
        assert clock.look() == pytest.approx(passed) == clock.now


def test_peers_that_stand_still_leave_pages_for_others() -> None:
    pool = PagePool(16)
    held = {}
    for who in "abcd":  # each takes all it can get, and gives nothing back
        held[who] = [page for _ in range(16) if (page := pool.take(who)) is not None]
    assert [len(pages) for pages in held.values()] == [12, 3, 1, 0]
    assert pool.free == 0
    assert len({page for pages in held.values() for page in pages}) == 16
    assert pool.take("e") is None
    pool.give("a", held["a"][0])
    assert pool.take("a") is None  # it still holds many more than are free
    assert pool.take("e") == held["a"][0]


@pytest.mark.parametrize(("num", "most"), [(1, 1), (2, 1), (3, 2), (4, 3), (8, 6), (16, 12)])
def test_one_peer_alone_has_three_quarters(num: int, most: int) -> None:
    pool = PagePool(num)
    assert sum(pool.take("a") is not None for _ in range(num)) == most


def test_a_page_is_given_back_once() -> None:
    pool = PagePool(2)
    page = pool.take("a")
    assert page is not None
    pool.give("a", page)
    with pytest.raises(AssertionError, match="twice"):
        pool.give("a", page)
