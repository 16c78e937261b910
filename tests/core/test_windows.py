"""Two slot spaces: what a lane holds, what a prefix needs, how memory is divided."""

from __future__ import annotations

import random
from array import array

import pytest

from asyncllm.core.window_slots import WindowLedger
from asyncllm.core.windows import PerSpace, SlotDivision, Window
from asyncllm.messages import SlotsGranted
from tests.actors.fake_device import World, check_ledger, check_windows
from tests.core.test_request_lifecycle import live

GIB = 1 << 30


def ints(values: range | list[int]) -> array[int]:
    return array("i", values)


class Lanes:
    """A ledger, and lanes that go on as a scheduler's do."""

    def __init__(self, window: int, full: int, sliding: int) -> None:
        self.ledger = WindowLedger(PerSpace(full, sliding), Window(window))
        self.launched = ints([])

    def step(
        self, rows: list[tuple[int, int]], opened: dict[int, list[int] | range] | None = None
    ) -> SlotsGranted:
        """Rows are (lane, count); what is granted is launched."""
        opened = opened or {}
        self.ledger.launched(self.launched)
        granted = self.ledger.reserve(
            ints([lane for lane, _ in rows]),
            ints([count for _, count in rows]),
            {lane: (ints(list(ids)), True) for lane, ids in opened.items()},
        )
        self.launched = ints([lane for lane, _ in rows[: len(granted.counts)]])
        self.check()
        return granted

    def release(self, lane: int, generated: list[int] | None = None) -> None:
        self.ledger.launched(self.launched)
        self.launched = ints([])
        self.ledger.release(lane, ints(generated or []))
        self.check()

    def run(self, lane: int, ids: list[int] | range, chunk: int = 8) -> int:
        """Open a lane and compute its tokens; the hit."""
        granted = self.step([(lane, chunk)], {lane: ids})
        hit, done = granted.hits[0], granted.hits[0] + granted.counts[0]
        while done < len(ids):
            done += self.step([(lane, min(chunk, len(ids) - done))]).counts[0]
        return hit

    def check(self) -> None:
        check_ledger(self.ledger)
        check_windows(self.ledger)


def test_a_long_sequence_runs_in_a_window_and_a_chunk() -> None:
    window = Window(1024)
    lanes = Lanes(1024, 40_000, window.most + 256)
    lanes.run(1, range(30_000), chunk=256)
    for _ in range(1500):
        assert lanes.ledger.sliding_used <= window.most + 1
        granted = lanes.ledger.reserve(ints([1]), ints([1]), {})
        assert list(granted.counts) == [1]
    lanes.check()
    assert lanes.ledger.used == 31_500
    lanes.release(1)
    assert lanes.ledger.sliding_used == 0


def test_what_a_lane_leaves_behind_stays_in_the_cache_as_long_as_there_is_room() -> None:
    lanes = Lanes(4, 200, 200)
    lanes.run(1, range(50))
    assert lanes.ledger.sliding_used < 15
    assert lanes.run(2, [*range(20), 99]) == 20, "a prefix that ended long before the window"
    assert lanes.ledger.evicted_sliding == 0


def test_a_prefix_without_its_window_is_not_used_and_gets_it_back() -> None:
    lanes = Lanes(8, 400, 60)
    lanes.run(1, range(40))
    lanes.release(1)
    lanes.run(2, range(100, 145))  # takes most of the sliding slots
    lanes.release(2)
    assert lanes.ledger.evicted_sliding > 20
    assert lanes.ledger.evicted_tokens == 0
    assert lanes.run(3, [*range(20), 99]) == 0, "its last tokens have no K/V in sliding layers"
    assert lanes.ledger.cached + lanes.ledger.used > 80
    lanes.release(3)
    assert lanes.run(4, [*range(20), 98]) == 20, "which have been computed again"
    assert lanes.ledger.evicted_tokens == 0


def test_the_end_of_a_sequence_outlives_its_inside() -> None:
    lanes = Lanes(8, 400, 60)
    lanes.run(1, range(40))
    lanes.release(1)
    lanes.run(2, range(100, 130))
    lanes.release(2)
    assert lanes.ledger.evicted_sliding > 0
    assert lanes.run(3, [*range(40), 99]) == 40


def test_a_long_prompt_takes_the_place_of_what_it_passes_and_not_of_others_ends() -> None:
    lanes = Lanes(8, 1000, 70)
    for lane in (1, 2):
        lanes.run(lane, range(100 * lane, 100 * lane + 40))
        lanes.release(lane)
    assert lanes.run(3, [*range(100, 120), 9]) == 20, "so a hit has ended there"
    lanes.release(3)
    lanes.run(4, range(1000, 1400))
    lanes.release(4)
    assert lanes.ledger.evicted_sliding > 300
    for lane, ids in enumerate(
        ([*range(100, 140), 8], [*range(200, 240), 8], [*range(100, 120), 8]), 5
    ):
        assert lanes.run(lane, ids) == len(ids) - 1
        lanes.release(lane)


def test_what_a_lane_reads_is_not_evicted_until_it_has_moved_on() -> None:
    lanes = Lanes(16, 400, 64)
    lanes.run(1, range(32))
    lanes.release(1)
    assert lanes.run(2, [*range(32), 99]) == 32
    shared = list(lanes.ledger.views[2].slots[1:15])  # the first has been seen for the last time
    held = lanes.ledger.sliding_used
    for lane in (3, 4, 5):
        lanes.run(lane, range(100 * lane, 100 * lane + 30))
        assert list(lanes.ledger.views[2].slots[:14]) == shared
        lanes.release(lane)
    assert lanes.ledger.evicted_sliding > 30
    for _ in range(16):
        assert lanes.ledger.sliding_used <= held + 1
        lanes.ledger.reserve(ints([2]), ints([1]), {})
        lanes.check()
    assert lanes.ledger.tree.root.children[0].readers == 0  # type: ignore[attr-defined]


def test_generated_tokens_of_the_last_window_can_be_gone_on_with() -> None:
    lanes = Lanes(8, 400, 100)
    lanes.run(1, range(10))
    for _ in range(40):
        lanes.step([(1, 1)])
    lanes.release(1, list(range(500, 539)))
    whole = [*range(10), *range(500, 539)]
    assert lanes.run(2, [*whole, 7]) == 49
    assert lanes.run(3, [*whole[:30], 7]) == 10, "in between nothing has been kept"


def test_rows_are_granted_in_part_where_they_are_not_too_small() -> None:
    window = Window(8)
    lanes = Lanes(8, 400, window.most + 3)
    assert list(lanes.step([(1, 64)], {1: range(64)}).counts) == [window.most + 3]
    granted = lanes.step([(1, 30), (2, 8)], {2: range(100, 108)})
    assert list(granted.counts) == [5]
    assert 2 not in lanes.ledger.lanes
    done = window.most + 3 + 5
    while done < 64:
        counts = lanes.step([(1, 64 - done)]).counts
        assert counts[0] > 0
        done += counts[0]
    lanes = Lanes(8, 400, 3 * window.most)
    lanes.run(1, range(20))
    granted = lanes.step([(1, 1), (2, 64)], {2: range(100, 164)})
    assert list(granted.counts) == [1, 27 - 8]
    assert list(lanes.step([(1, 1), (2, 64)]).counts) == [1, 27 - 8 - 7]


def test_a_row_that_does_not_fit_leaves_everything_as_it_was() -> None:
    lanes = Lanes(8, 400, 23)
    lanes.run(1, range(20))
    lanes.release(1)
    lanes.run(2, range(100, 110))
    lanes.step([(2, 1)])
    used, cached = lanes.ledger.sliding_used, lanes.ledger.sliding_cached
    granted = lanes.step([(2, 1), (3, 60)], {3: [*range(20), *range(200, 260)]})
    assert list(granted.counts) == [1], "the hit's window leaves too little for new tokens"
    assert (lanes.ledger.sliding_used, lanes.ledger.used) == (used, 12)
    assert abs(lanes.ledger.sliding_cached - cached) <= 1
    assert usable(lanes.ledger, [*range(20), 0]) == 20


def test_what_is_seen_after_wrong_drafts_stays_while_others_go_on() -> None:
    """Others are planned while drafts with masks of their own run, which may all be wrong."""
    lanes, ledger = (made := Lanes(8, 400, 60)), made.ledger
    for lane in (1, 2):
        lanes.run(lane, range(100 * lane, 100 * lane + 40))
    lanes.step([(1, 1)] * 7)  # 6 drafts
    lanes.step([(2, 1)])
    assert ledger.views[1].first == 41 - 7, "the token at 41 sees 7 before it"
    ledger.trim(1, 6)
    for end in (41, 42):
        lanes.step([(1, 1)])
        assert ledger.views[1].first == end - 7


def usable(ledger: WindowLedger, ids: list[int]) -> int:
    """The longest usable prefix, token by token."""
    node, there = ledger.tree.root, []
    while len(there) < len(ids) - 1 and (child := node.children.get(ids[len(there)])):
        dead = len(child.key) - len(child.sliding)
        for i, token in enumerate(child.key):
            if len(there) == len(ids) - 1 or ids[len(there)] != token:
                break
            there.append(i >= dead)
        else:
            node = child
            continue
        break
    reach = ledger._window.reach
    return max(h for h in range(len(there) + 1) if all(there[max(h - reach, 0) : h]))


@pytest.mark.parametrize("seed", range(20))
def test_a_hit_is_the_longest_prefix_that_can_be_used(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice([1, 2, 3, 8, 30])
    lanes = Lanes(size, rng.choice([80, 200]), Window(size).most + rng.choice([20, 60]))
    ledger, open_lanes, hits = lanes.ledger, {}, 0
    for lane in range(250):
        ids = [rng.randrange(2) for _ in range(rng.randint(1, 24))]
        ledger.launched(lanes.launched)
        lanes.launched = ints([])
        wanted = usable(ledger, ids)
        granted = lanes.step([(lane, rng.choice([4, 64]))], {lane: ids})
        if granted.counts:
            hits += granted.hits[0]
            assert granted.hits[0] == wanted
            open_lanes[lane] = ids
        for other in list(open_lanes):
            held = ledger.lanes[other]
            if len(held.slots) < len(open_lanes[other]):
                lanes.step([(other, len(open_lanes[other]) - len(held.slots))])
            elif rng.random() < 0.3:
                for _ in range(rng.randint(0, 5)):
                    lanes.step([(other, 1)])
            generated = len(held.slots) - len(open_lanes[other])
            if generated >= 0 and rng.random() < 0.5:
                del open_lanes[other]
                lanes.release(other, [rng.randrange(2) for _ in range(max(generated - 1, 0))])
        if not granted.counts and open_lanes:
            del open_lanes[lane := next(iter(open_lanes))]
            lanes.release(lane)
    assert hits > 100


GEMMA3 = {  # layers of both kinds, bytes of a token in one, window
    "1b": (4, 22, 1024, 512),
    "4b": (5, 29, 4096, 1024),
    "12b": (8, 40, 8192, 1024),
    "27b": (10, 52, 8192, 1024),
}


@pytest.mark.parametrize("budget", [3, 12, 40])
@pytest.mark.parametrize("model", GEMMA3)
def test_layers_that_alternate_leave_room_for_three_times_as_many_tokens(
    model: str, budget: int
) -> None:
    full, sliding, nbytes, size = GEMMA3[model]
    slot = PerSpace(full * nbytes, sliding * nbytes)
    division = SlotDivision(slot=slot, window=Window(size), max_len=32_768)
    num = division.fit(budget * GIB, None)
    assert division.nbytes(num) <= budget * GIB
    assert division.nbytes(PerSpace(num.full + 64, num.sliding + 8)) > budget * GIB
    assert num.full * sum(slot) > 3 * budget * GIB
    # as many of the longest sequences as fit into the one space fit into the other
    assert num.sliding >= (num.full // division.max_len + 1) * Window(size).most
    assert num.sliding >= num.full // 6


def test_given_tokens_are_those_of_the_full_space() -> None:
    division = SlotDivision(slot=PerSpace(100, 500), window=Window(64), max_len=1000)
    least = division.nbytes(division.balanced(2000))
    assert division.fit(least - 1, 2000).full < 2000, "told with the flag"
    assert division.fit(least, 2000) == division.balanced(2000) == PerSpace(2000, 333)
    assert division.fit(10 * least, 2000) == PerSpace(2000, 333)
    assert division.fit(least, 200) == PerSpace(200, 2 * 71), "a window, and new tokens"
    assert division.fit(least, 80) == PerSpace(80, 80), "one space"


def test_where_all_layers_slide_memory_is_for_windows_only() -> None:
    division = SlotDivision(slot=PerSpace(0, 100), window=Window(64), max_len=1000)
    assert division.fit(100_100, None) == PerSpace(13_000, 1000)
    assert division.fit(100_100, 400) == PerSpace(4000, 400), "slots, for longer sequences"
    assert division.fit(100_100, 80) == PerSpace(1000, 80), "one of the longest ones"
    assert division.fit(100_100, 50) == PerSpace(50, 50), "less than a window: all of them stay"
    assert division.fit(99, None) == PerSpace(0, 0)


def test_without_windows_there_is_one_space() -> None:
    division = SlotDivision(slot=PerSpace(100, 0), window=None, max_len=1000)
    assert division.fit(100_100, None) == PerSpace(1000, 1000)
    assert division.fit(100_100, 400) == PerSpace(400, 400)
    assert division.fit(100_100, 4000) == PerSpace(1000, 1000)


def test_lives_with_windows_meet_what_they_are_for() -> None:
    """Eviction of both kinds, hits and preemption happen in such lives; else they prove little."""
    rng, window = random.Random(5), Window(30)
    world = World(
        num_slots=150, num_lanes=9, batch_max_tokens=40, eos_ids={3}, headroom=0,
        window=30, num_sliding=window.most + 10,
    )  # fmt: skip
    live(world, rng, 200, constrained=0.0)
    world.check_end()
    ledger = world.ledger
    assert isinstance(ledger, WindowLedger)
    assert world.core.preemptions > 3
    assert ledger.evicted_tokens > 100
    assert ledger.evicted_sliding > 100
    assert ledger.hit_tokens > 100
    assert not [end.failure for end in world.finished.values() if end.failure]
