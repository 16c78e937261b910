"""Scheduling: what goes into a step, budgets, admission, ends, preemption."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from asyncllm.constrain.protocol import Constraint, ResampleToken
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.core.scheduling import SchedulerCore
from asyncllm.core.steps import Step
from asyncllm.core.windows import Window
from asyncllm.messages import SlotsGranted, Submit

EOS = 2


def make(**changes: Any) -> SchedulerCore:
    limits: dict[str, Any] = {
        "num_lanes": 8,
        "num_slots": 1000,
        "batch_max_tokens": 64,
        "chunked_prefill_size": 16,
        "eos_ids": {EOS},
        "headroom": 0,
    }
    return SchedulerCore(**(limits | changes))


def add(
    core: SchedulerCore,
    rid: int,
    prompt_len: int,
    max_new: int = 10,
    after: int = -1,
    client: int = 0,
    **params: Any,
) -> None:
    asked = SamplingParams(max_new_tokens=max_new, **params)
    ids = array("i", range(100, 100 + prompt_len))
    core.add(Submit(rid, ids, asked, after=after, client=client))


def grant(
    core: SchedulerCore, *, rows: int | None = None, available: int = 500, hit: int = 0
) -> Step | None:
    """Propose and grant the first ``rows`` rows; opened ones hit ``hit`` tokens."""
    proposal = core.propose()
    assert proposal is not None
    opened = {lane: len(ids) for lane, ids, _ in proposal.opened}
    hits, counts = array("i"), array("i")
    for lane, count in list(zip(proposal.lanes, proposal.counts, strict=True))[:rows]:
        hits.append(hit if lane in opened else 0)
        counts.append(min(count, opened.get(lane, 10**6) - hits[-1]))
    slots = array("i", range(sum(hits) + sum(counts)))
    return core.plan(SlotsGranted(hits, counts, slots, available))


class Countdown(Constraint):
    """Any token, then only one; near the change the mask depends on how many have come."""

    def __init__(self, most: int) -> None:
        self.left = most

    def mask(self) -> bytes:
        return b"" if self.left else b"\1\0\0\0"

    def mask_is_stable_for(self, ahead: int) -> bool:
        return ahead == 0 or self.left > ahead

    def accept(self, token: int) -> bool:
        self.left -= self.left > 0
        return False


def step(core: SchedulerCore, **how: Any) -> Step:
    planned = grant(core, **how)
    assert planned is not None
    return planned


def shape(planned: Step) -> list[tuple[int, int]]:
    return [
        (row[0].rid, count) for row, count in zip(planned.rows, planned.plan.counts, strict=True)
    ]


def commit(core: SchedulerCore, planned: Step, token: int = 7) -> None:
    core.commit(planned, array("i", [token if s else -1 for s in planned.plan.samples]))


def reasons(core: SchedulerCore) -> dict[int, tuple[FinishReason, int]]:
    return {end.rid: (end.reason, end.num_tokens) for end in core.ended}


def test_a_prompt_goes_in_chunks_and_samples_at_its_end() -> None:
    core = make()
    add(core, 1, 40)
    steps = [step(core) for _ in range(3)]
    assert [shape(s) for s in steps] == [[(1, 16)], [(1, 16)], [(1, 8)]]
    assert [list(s.plan.starts) for s in steps] == [[0], [16], [32]]
    assert [bytes(s.plan.samples) for s in steps] == [b"\0", b"\0", b"\1"]
    assert list(steps[2].plan.tokens) == list(range(132, 140))
    assert [len(s.plan.opened) for s in steps] == [1, 0, 0]


def test_decode_rows_come_first_oldest_first_and_hold_the_step_to_one_chunk() -> None:
    core = make()
    add(core, 1, 4)
    add(core, 2, 4)
    step(core)
    add(core, 3, 10)
    add(core, 4, 60)
    mixed = step(core)
    assert shape(mixed) == [(1, 1), (2, 1), (3, 10), (4, 4)], "16 tokens"
    assert mixed.plan.num_decode == 2
    assert list(mixed.plan.tokens[:3]) == [-1, -1, 100]


@pytest.mark.parametrize(("chunk", "half"), [(4, 2), (1, 1)])
def test_many_decode_rows_leave_prompts_half_a_chunk(chunk: int, half: int) -> None:
    core = make(chunked_prefill_size=chunk)
    for rid in range(3):
        add(core, rid, 1)
    step(core)
    add(core, 9, 60)
    assert shape(step(core)) == [(0, 1), (1, 1), (2, 1), (9, half)]


def test_a_constraint_waits_only_while_its_mask_depends_on_tokens_to_come() -> None:
    core = make()
    packed = SamplingParams(max_new_tokens=9)
    core.add(Submit(1, array("i", range(4)), packed), Countdown(3))
    first, second = step(core), step(core)
    commit(core, first)
    third = step(core)
    assert [list(s.plan.masked) for s in (first, second, third)] == [[], [], []]
    commit(core, second)
    assert core.propose() is None, "the mask after the third token is another one"
    commit(core, third)
    fourth = step(core)
    assert (list(fourth.plan.masked), bytes(fourth.plan.masks)) == ([0], b"\1\0\0\0")
    assert core.propose() is None


class Picky(Constraint):
    """After a 5 only a 6 may come, which is known too late to wait for it."""

    def __init__(self) -> None:
        self.wants = False

    def mask(self) -> bytes:
        return b"\x40\0\0\0" if self.wants else b""

    def mask_is_stable_for(self, ahead: int) -> bool:
        return ahead == 0 or not self.wants

    def accept(self, token: int) -> bool:
        if self.wants and token != 6:
            raise ResampleToken
        self.wants = token == 5
        return False


def test_a_token_that_came_too_early_is_sampled_again() -> None:
    core = make()
    packed = SamplingParams(max_new_tokens=5)
    core.add(Submit(1, array("i", range(4)), packed), Picky())
    add(core, 2, 4)
    first, second = step(core), step(core)
    commit(core, first, 5)
    third = step(core)
    assert shape(third) == [(2, 1)], "the first waits for its 6"
    add(core, 3, 4)
    assert core.propose() is not None  # open while the wrong token comes
    emitted = core.commit(second, array("i", [7, 8]))
    assert list(emitted.rids) == [2]
    assert (list(core.requests[1].outputs), core.preemptions) == ([5], 0)
    core.plan(SlotsGranted(array("i", [0, 0]), array("i", [1, 4]), array("i", range(5)), 500))
    assert list(core.running) == [2, 3]
    again = step(core)
    row = [r[0].rid for r in again.rows].index(1)
    assert again.plan.counts[row] == 5
    assert (list(again.plan.masked), bytes(again.plan.masks)) == ([row], b"\x40\0\0\0")
    commit(core, again, 6)
    assert list(core.requests[1].outputs) == [5, 6]


def test_prefill_alone_fills_the_step() -> None:
    core = make(batch_max_tokens=40)
    for rid in range(4):
        add(core, rid, 30)
    assert shape(step(core)) == [(0, 16), (1, 16), (2, 8)]


def test_running_prefill_goes_before_waiting_requests() -> None:
    core = make(batch_max_tokens=20)
    add(core, 1, 30)
    add(core, 2, 30)
    assert shape(step(core)) == [(1, 16), (2, 4)]
    assert shape(step(core)) == [(1, 14), (2, 6)]


def test_a_hit_moves_the_start_and_a_row_of_one_token_comes_first() -> None:
    core = make()
    add(core, 1, 10)
    add(core, 2, 13)
    planned = step(core, hit=9)
    assert shape(planned) == [(1, 1), (2, 4)]
    assert planned.plan.num_decode == 1
    assert list(planned.plan.cached_counts) == [9, 9]
    assert list(planned.plan.starts) == [9, 9]
    assert list(planned.plan.tokens) == [109, 109, 110, 111, 112]
    assert core.running[1].cached_len == 9


def test_single_rows_granted_behind_longer_ones_keep_their_slots() -> None:
    core = make()
    add(core, 1, 12)
    add(core, 2, 10)
    core.propose()
    hits, counts = array("i", [0, 9]), array("i", [12, 1])
    planned = core.plan(SlotsGranted(hits, counts, array("i", range(22)), 500))
    assert planned is not None
    assert shape(planned) == [(2, 1), (1, 12)]
    assert list(planned.plan.slots) == [*range(12, 22), *range(12)]


def test_no_rows_are_asked_for_beyond_the_last_token() -> None:
    core = make()
    add(core, 1, 4, max_new=3)
    steps = [step(core) for _ in range(3)]
    assert core.propose() is None
    for planned in steps:
        commit(core, planned)
    assert reasons(core) == {1: (FinishReason.LENGTH, 3)}
    assert core.released[0][1].tolist() == [7, 7]  # the third has no KV


@pytest.mark.parametrize(
    ("params", "token", "reason"),
    [
        ({}, EOS, FinishReason.STOP),
        ({"ignore_eos": True}, EOS, None),
        ({"stop_token_ids": (5,)}, 5, FinishReason.STOP),
        ({"stop_token_ids": (5,), "ignore_eos": True}, 5, FinishReason.STOP),
        ({"min_new_tokens": 1}, EOS, None),
        ({"min_new_tokens": 1, "stop_token_ids": (5,)}, 5, None),
        ({}, 7, None),
    ],
)
def test_tokens_that_end_a_request(
    params: dict[str, Any], token: int, reason: FinishReason | None
) -> None:
    core = make()
    add(core, 1, 4, **params)
    emitted = core.commit(step(core), array("i", [token]))
    assert list(emitted.ends) == [int(reason is not None)]
    assert reasons(core) == ({1: (reason, 1)} if reason is not None else {})


def test_eos_at_the_length_limit_is_a_stop() -> None:
    core = make()
    add(core, 1, 4, max_new=1)
    core.commit(step(core), array("i", [EOS]))
    assert reasons(core) == {1: (FinishReason.STOP, 1)}


def test_rows_behind_the_end_are_wasted_and_hold_the_lane() -> None:
    core = make()
    add(core, 1, 4)
    first, second = step(core), step(core)
    core.commit(first, array("i", [EOS]))
    assert not core.released
    emitted = core.commit(second, array("i", [9]))
    assert not emitted.rids
    assert [(lane, ids.tolist()) for lane, ids in core.released] == [(0, [EOS])]


def test_stop_hit_and_abort_end_once_and_late_ones_are_ignored() -> None:
    core = make()
    add(core, 1, 4)
    add(core, 2, 4)
    commit(core, step(core))
    core.stop(1, 1)
    core.abort(2)
    core.stop(2, 1)
    core.abort(1)
    core.abort(77)
    assert reasons(core) == {1: (FinishReason.STOP, 1), 2: (FinishReason.ABORT, 1)}
    assert len(core.ended) == 2


def test_waiting_requests_are_admitted_only_while_kv_is_likely_to_last() -> None:
    core = make(num_slots=100, headroom=5)
    add(core, 1, 10)
    step(core, available=20)
    add(core, 2, 12)
    proposal = core.propose()
    assert proposal is not None
    assert not proposal.opened  # 12 + 5 does not fit 20 - 1 - 5
    core.plan(SlotsGranted(array("i", [0]), array("i", [1]), array("i", [0]), 40))
    assert shape(step(core)) == [(1, 1), (2, 12)]


def test_layers_with_windows_need_room_for_windows_only() -> None:
    """17 with what is given back late; those of a long prompt need new tokens beside them."""
    window = Window(16)
    for prompt_len, needed in ((300, 17 + 16), (12, 12)):
        for missing in (0, 1):
            core = make(num_slots=10_000, window=window, num_sliding=500)
            add(core, 1, 10)
            step(core, available=9000)
            core.sliding_available = 1 + needed - missing  # one for the row that runs
            add(core, 2, prompt_len)
            proposal = core.propose()
            assert proposal is not None
            assert len(proposal.opened) == 1 - missing


def test_a_waiting_request_is_always_tried_when_nothing_runs() -> None:
    core = make(num_slots=100, headroom=50)
    core.available = 0
    add(core, 1, 90)
    add(core, 2, 90)
    assert shape(step(core)) == [(1, 16)]


def test_no_more_requests_than_lanes() -> None:
    core = make(num_lanes=2)
    for rid in range(4):
        add(core, rid, 2)
    assert shape(step(core)) == [(0, 2), (1, 2)]


def test_rows_that_got_nothing_are_as_before() -> None:
    core = make()
    add(core, 1, 4)
    add(core, 2, 4)
    assert shape(step(core, rows=1)) == [(1, 4)]
    assert list(core.waiting) == [core.requests[2]]
    assert core.requests[2].lane is None
    assert sorted(core._free_lanes) == list(range(1, 8))
    assert shape(step(core)) == [(1, 1), (2, 4)]


def test_nothing_fits_waits_for_a_launched_step() -> None:
    core = make()
    add(core, 1, 4)
    step(core)
    assert grant(core, rows=0) is None
    assert core.relieve(any_inflight=True)
    assert core.preemptions == 0


def test_nothing_fits_and_nothing_is_in_flight_preempts_the_newest() -> None:
    core = make(num_lanes=3)
    for rid in (1, 2, 3, 4):
        add(core, rid, 4)
    commit(core, step(core))
    assert grant(core, rows=0) is None
    assert not core.relieve(any_inflight=False)
    assert list(core.running) == [1, 2]
    assert [req.rid for req in core.waiting] == [3, 4]
    assert [lane for lane, _ in core.released] == [2]
    again = step(core)
    assert shape(again) == [(1, 1), (2, 1), (3, 5)]
    assert list(again.plan.tokens[2:]) == [100, 101, 102, 103, 7]
    assert (
        again.plan.opened[0].prompt_len == 4
    )  # the prompt's length, without the token made before


def test_a_preempted_request_that_has_outgrown_the_kv_fails_instead_of_starting_over() -> None:
    core = make(num_slots=10, chunked_prefill_size=4)
    add(core, 1, 10)
    for _ in range(3):
        commit(core, step(core))
    core._preempt(core.running[1])  # 11 tokens are known
    for _ in range(2):
        commit(core, step(core))
    assert grant(core, rows=0) is None
    assert not core.relieve(any_inflight=False)
    assert reasons(core) == {1: (FinishReason.ERROR, 1)}


def test_a_result_of_a_former_lane_is_ignored() -> None:
    core = make()
    for rid in (1, 2):
        add(core, rid, 4)
    late = step(core)
    core._preempt(core.running[2])
    again = step(core)
    emitted = core.commit(late, array("i", [8, 9]))
    assert list(emitted.rids) == [1]
    assert [lane for lane, _ in core.released] == [late.plan.lanes[1]]
    assert again.plan.lanes[1] != late.plan.lanes[1]


def test_a_release_since_the_reservation_is_tried_before_preempting() -> None:
    core = make()
    add(core, 1, 4)
    add(core, 2, 4)
    first = step(core)
    proposal = core.propose()
    assert proposal is not None
    commit(core, first, EOS)  # both end while their rows are reserved
    assert core.plan(SlotsGranted(array("i"), array("i"), array("i"), 0)) is None
    assert not core.relieve(any_inflight=False)
    assert core.preemptions == 0
    assert len(core.released) == 2


def test_a_score_only_request_ends_when_its_last_chunk_is_committed() -> None:
    core = make()
    add(core, 1, 20, max_new=0)
    first, second = step(core), step(core)
    assert not any(first.plan.samples + second.plan.samples)
    commit(core, first)
    assert not core.ended
    commit(core, second)
    assert reasons(core) == {1: (FinishReason.LENGTH, 0)}


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"prompt_logprobs": 0},
    ],
    ids=lambda params: next(iter(params)),
)
def test_known_ids_go_to_the_device_where_it_needs_them(params: dict[str, Any]) -> None:
    core = make()
    add(core, 1, 20)
    add(core, 2, 20, **params)
    opened = {o.lane: (o.prompt_len, o.known.tolist()) for o in step(core).plan.opened}
    assert opened == {0: (20, []), 1: (20, list(range(100, 120)))}


def test_scores_known_from_before_a_preemption_are_cut() -> None:
    core = make()
    add(core, 1, 40, prompt_logprobs=0)
    first = step(core)
    assert core.score(first, 0, 16) == (1, 0)
    commit(core, first)
    core._preempt(core.running[1])
    core.chunk = 24
    second = step(core)
    assert core.score(second, 0, 24) == (1, 16)
    core.abort(1)
    assert core.score(second, 0, 24) is None


def test_launched_prompt_chunks_are_told_unless_they_may_not_be_shared() -> None:
    core = make()
    add(core, 1, 4)
    add(core, 2, 4, use_cache=False)
    commit(core, step(core))
    assert list(core.launched) == [0]
    step(core)
    assert not core.launched  # told with the proposal; decode rows are not


def test_a_turn_that_was_proposed_but_not_granted_is_not_lost() -> None:
    core = make(num_lanes=8, batch_max_tokens=8)
    for rid in (1, 2, 3):
        add(core, rid, 4, client=1)
    add(core, 10, 4, client=2)
    add(core, 20, 4, client=3)
    assert shape(step(core, rows=1)) == [(1, 4)], "2 and 3 have been proposed, 10 had no slots"
    assert [req.rid for req in core.waiting] == [10, 20, 2, 3]
    core.abort(10)
    assert [req.rid for req in core.waiting] == [20, 2, 3]


def test_a_preempted_request_returns_before_everybody_and_costs_no_turn() -> None:
    core = make(num_lanes=2)
    add(core, 1, 4, client=1)
    add(core, 2, 4, client=1)
    planned = step(core)
    add(core, 3, 4, client=1)
    add(core, 4, 4, client=2)
    commit(core, planned)
    assert core.propose() is not None
    assert core.plan(SlotsGranted(array("i"), array("i"), array("i"), 0)) is None
    assert not core.relieve(False)
    assert [req.rid for req in core.waiting] == [2, 3, 4]
    core.abort(1)
    core.available = 100
    assert shape(step(core)) == [(2, 5), (3, 4)]
    assert [req.rid for req in core.waiting] == [4]


def test_held_choices_follow_in_their_own_clients_line() -> None:
    core = make(num_lanes=8, batch_max_tokens=8, share_prompts=True)
    add(core, 1, 8, client=1)
    for rid in (2, 3):
        add(core, rid, 8, after=1, client=1)
    add(core, 4, 8, client=1)
    add(core, 10, 8, client=2)
    add(core, 11, 8, client=2)
    assert shape(step(core)) == [(1, 8)]
    assert [req.rid for req in core.waiting] == [10, 2, 11, 3, 4]


def test_attributes_of_the_core_are_few_enough_to_be_fast() -> None:
    """With more, CPython gives each object a dict of its own: commit takes 8 % longer."""
    assert len(make().__dict__) < 30
