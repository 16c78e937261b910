"""Which lanes have the same first slots: against a comparison of all slots, in random lives."""

from __future__ import annotations

import random
from array import array

import pytest

from asyncllm.core.shared_prefixes import LEAST, SharedPrefixIndex
from asyncllm.core.slots import Ledger
from asyncllm.core.window_slots import WindowLedger
from asyncllm.core.windows import PerSpace, Window
from tests.actors.fake_device import check_ledger


def ints(values: list[int]) -> array[int]:
    return array("i", values)


def opened(ledger: Ledger, lane: int, ids: list[int], share: bool = True) -> None:
    """A new lane, all of whose tokens are computed by one step."""
    granted = ledger.reserve(ints([lane]), ints([len(ids)]), {lane: (ints(ids), share)})
    if granted.counts:
        ledger.launched(ints([lane]))
    check_ledger(ledger)


def ledger_of(total: int, least: int = 1, **options: bool) -> Ledger:
    return Ledger(total, shared_prefixes=SharedPrefixIndex(least), **options)


def test_nested_prefixes_follow_one_another() -> None:
    ledger = ledger_of(300)
    trunk = list(range(40))
    for lane, kept, tail in [(0, 40, 50), (1, 20, 60), (2, 40, 70), (3, 0, 80), (4, 20, 60)]:
        opened(ledger, lane, trunk[:kept] + [tail + i for i in range(9)])
    granted = ledger.reserve(ints([0]), ints([1]), {})
    assert list(granted.prefix_order) == [0, 2, 1, 4, 3]
    assert list(granted.shared_lens) == [0, 40, 20, 28, 0]
    for lane in (0, 1):
        ledger.release(lane, ints([]))
        check_ledger(ledger)
    granted = ledger.reserve(ints([2]), ints([1]), {})
    assert (list(granted.prefix_order), list(granted.shared_lens)) == ([2, 4, 3], [0, 20, 0])


def test_who_shares_nothing_or_little_is_not_told() -> None:
    ledger = Ledger(300, shared_prefixes=SharedPrefixIndex())
    few = list(range(LEAST - 1))
    for lane in range(3):
        opened(ledger, lane, [*few, 1000 + lane])
    opened(ledger, 3, [*few, 1000], share=False)
    granted = ledger.reserve(ints([0]), ints([1]), {})
    assert (len(granted.prefix_order), len(granted.shared_lens)) == (0, 0)


def test_a_column_that_has_not_changed_is_the_same_object() -> None:
    ledger = ledger_of(100)
    for lane in range(2):
        opened(ledger, lane, [1, 2, 3, 4 + lane])
    first, then = (ledger.reserve(ints([0, 1]), ints([1, 1]), {}) for _ in range(2))
    assert first.prefix_order is then.prefix_order
    assert list(first.shared_lens) == [0, 3]
    opened(ledger, 2, [1, 2, 9])
    assert list(first.prefix_order) == [0, 1]


def test_computed_side_by_side_is_not_shared_though_the_tokens_are_equal() -> None:
    """The second one's slots are duplicates of what the tree has; what follows is not its prefix."""
    ledger = ledger_of(100)
    tokens = {lane: (ints([1, 2, 3, 4, 5 + lane]), True) for lane in (0, 1)}
    ledger.reserve(ints([0, 1]), ints([3, 3]), tokens)
    ledger.launched(ints([0, 1]))
    ledger.reserve(ints([0, 1]), ints([2, 2]), {})
    ledger.launched(ints([0, 1]))
    check_ledger(ledger)
    opened(ledger, 2, [1, 2, 3, 4, 5, 6])
    opened(ledger, 3, [1, 2, 3, 4, 6, 6])
    granted = ledger.reserve(ints([0]), ints([1]), {})
    order, shared_lens = list(granted.prefix_order), list(granted.shared_lens)
    assert order == [0, 2, 3, 1]
    assert shared_lens == [0, 5, 4, 0]


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_lives(seed: int, windows: bool) -> None:
    """Lanes come with prefixes of each other's tokens, in chunks; go, leaving some; are evicted."""
    rng = random.Random(seed)
    window = Window(rng.choice([3, 20]))
    told = SharedPrefixIndex(rng.choice([1, 4]))
    ledger = Ledger(400, shared_prefixes=told)
    if windows:
        ledger = WindowLedger(PerSpace(400, 350), window, shared_prefixes=told)
    texts: list[list[int]] = [[rng.randrange(3) for _ in range(60)] for _ in range(3)]
    lanes: dict[int, tuple[list[int], int]] = {}
    met = 0
    for turn in range(250):
        chance = rng.random()
        free = [lane for lane in range(12) if lane not in lanes]
        if chance < 0.45 and free:
            text = rng.choice(texts)
            ids = text[: rng.randrange(len(text) + 1)] + [rng.randrange(3) for _ in range(9)]
            texts[rng.randrange(3)] = ids[:60]
            lane, count = rng.choice(free), rng.randint(1, len(ids))
            granted = ledger.reserve(
                ints([lane]), ints([count]), {lane: (ints(ids), rng.random() < 0.9)}
            )
            if granted.counts:
                lanes[lane] = ids, granted.hits[0] + granted.counts[0]
        elif chance < 0.6 and lanes:
            lane = rng.choice(list(lanes))
            ids, done = lanes[lane]
            if granted := ledger.reserve(ints([lane]), ints([max(1, min(5, len(ids) - done))]), {}):
                lanes[lane] = ids, done + sum(granted.counts)
        elif chance < 0.8 and lanes:
            ledger.launched(ints(rng.sample(list(lanes), rng.randint(1, len(lanes)))))
        elif lanes:
            lane = rng.choice(list(lanes))
            ids, done = lanes.pop(lane)
            ledger.launched(ints([lane]))
            ledger.release(lane, ints([turn % 3] * max(0, done - len(ids))))
        check_ledger(ledger)
        met = max(met, sum(common >= told.least for common in told.shared_lens))
    assert met >= 3
