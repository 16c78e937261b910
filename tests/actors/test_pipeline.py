"""Scheduler, allocator and runner together: overlap, full KV, aborts at bad moments, drain."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
import uvloop

from asyncllm.actors.allocator import Allocator
from asyncllm.actors.base import Actor
from asyncllm.actors.runner import Runner
from asyncllm.actors.scheduler import Scheduler
from asyncllm.actors.system import ActorSystem
from asyncllm.codec import i32
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.core.scheduling import SchedulerCore
from asyncllm.messages import (
    FRONTEND_SHIFT,
    Abort,
    AllocatorStats,
    Drain,
    Drained,
    EndpointGone,
    Finished,
    LaunchDue,
    Probe,
    ReserveSlots,
    SchedulerStats,
    StepPlan,
    StopHit,
    Submit,
    Tokens,
)
from tests.actors.fake_device import FakeDevice, World, check_ledger, oracle


def test_abort_between_reserve_and_grant_neither_hangs_nor_frees_twice() -> None:
    world = World(num_slots=20)
    world.submit(1, [1] * 8, max_new_tokens=4)
    world.submit(2, [2] * 18, max_new_tokens=2)  # has to wait for the first
    world.settle("scheduler")
    assert world.ref("allocator")  # the reservation is open
    world.tell(Abort(1))
    world.settle("scheduler")
    world.run()
    world.check_end()
    assert world.finished[1].reason == FinishReason.ABORT
    assert world.finished[2].reason == FinishReason.LENGTH


def test_requests_of_a_process_that_has_gone_end_untold_and_late_ones_are_ignored() -> None:
    theirs = 1 << FRONTEND_SHIFT
    world = World(num_slots=40)
    world.submit(1, [1] * 6, max_new_tokens=4)
    world.submit(theirs, [2] * 6, max_new_tokens=20)
    world.submit(theirs + 1, [3] * 30, max_new_tokens=20)  # waits
    world.settle("scheduler", "allocator", "runner")
    world.tell(EndpointGone(1))
    world.submit(theirs + 2, [4] * 6, max_new_tokens=20)  # sent before its end
    world.run()
    assert set(world.core.requests) == set()
    assert set(world.finished) == {1}
    assert world.ledger.used == 0
    assert world.finished[1].reason == FinishReason.LENGTH


def decoding(step_ms: float) -> World:
    """A request that decodes: its prompt is done, one step is in flight and one may follow."""
    world = World()
    world.device.step_ms = step_ms
    world.submit(1, [1] * 6, max_new_tokens=20)
    world.settle("scheduler", "allocator", "runner")
    for _ in range(2):  # the prompt's step and the decode step behind it
        world.turn(("device", 0))
        world.settle("scheduler", "allocator", "runner")
    return world


def test_a_decode_step_is_launched_behind_another_at_once_if_its_time_is_not_known() -> None:
    world = decoding(step_ms=0.0)
    assert len(world.pending) == 2
    assert not world.loop.set
    world.run()
    world.check_end()


def test_a_decode_step_waits_for_newcomers_while_the_device_is_busy() -> None:
    world = decoding(step_ms=1e6)
    assert len(world.pending) == 1
    ((delay, _),) = world.loop.set
    assert 700 < delay < 760  # three quarters of the step in front
    world.submit(2, [2] * 3, max_new_tokens=1)
    world.settle("scheduler", "allocator", "runner")
    assert [len(plan.lanes) for plan in world.device.plans][-1] == 2, "both are in the next step"
    world.run()
    world.check_end()


def test_a_held_back_step_is_launched_when_its_time_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = decoding(step_ms=1e6)
    later = perf_counter() + 760
    monkeypatch.setattr("asyncllm.actors.scheduler.perf_counter", lambda: later)
    world.tell(LaunchDue())
    world.settle("scheduler", "allocator", "runner")
    assert len(world.pending) == 2
    world.run()
    world.check_end()


def test_abort_of_all_granted_rows_reserves_again_at_once() -> None:
    world = World(num_slots=20, num_lanes=1)
    world.submit(1, [1] * 4, max_new_tokens=4)
    world.submit(2, [2] * 4, max_new_tokens=1)
    world.settle("scheduler")
    world.tell(Abort(1))
    world.settle("allocator", "scheduler", "runner")
    assert world.pending, "the second request is on the device without any other event"
    world.run()
    world.check_end()


def test_abort_of_a_running_request_while_its_row_is_reserved_keeps_its_slots_until_done() -> None:
    world = World(num_slots=40)
    world.submit(1, [1] * 6, max_new_tokens=20)
    world.settle("scheduler", "allocator", "runner")
    assert len(world.pending) == 2
    world.turn(("device", 0))
    world.settle("scheduler")  # committed; the next row is being reserved
    assert world.ref("allocator")
    world.tell(Abort(1))
    world.settle("scheduler", "allocator", "detokenizer")
    assert world.ledger.used > 0, "one launched step still writes to the lane"
    world.run()
    world.check_end()


def test_two_running_requests_on_a_full_kv_finish() -> None:
    world = World(num_slots=24, headroom=0)
    world.submit(1, [1] * 8, max_new_tokens=12, seed=1)
    world.submit(2, [2] * 8, max_new_tokens=12, seed=2)
    world.run()
    world.check_end()
    assert world.core.preemptions >= 1
    assert [world.finished[rid].reason for rid in (1, 2)] == [FinishReason.LENGTH] * 2


def test_requests_that_do_not_fit_do_not_make_the_actors_spin() -> None:
    world = World(num_slots=30, headroom=0)
    world.submit(1, [1] * 10, max_new_tokens=16)
    world.submit(2, [2] * 28, max_new_tokens=2)
    world.settle("scheduler", "allocator", "runner")
    before = world.reserves
    world.settle("scheduler", "allocator", "runner")
    assert world.reserves == before
    world.run()
    world.check_end()
    assert world.reserves <= 2 * world.core.steps + 4


def test_a_stall_ends_with_the_step_that_frees_slots() -> None:
    world = World(num_slots=16, headroom=0, chunked_prefill_size=16)
    world.submit(1, [1] * 8, max_new_tokens=2)
    world.submit(2, [2] * 8, max_new_tokens=2)
    world.run()
    world.check_end()


def test_a_request_tried_while_an_aborted_one_still_holds_its_slots_waits_for_its_step() -> None:
    world = World(num_slots=16, num_lanes=2, chunked_prefill_size=16)
    world.submit(1, [1] * 12, max_new_tokens=4)
    world.submit(2, [2] * 12, max_new_tokens=4)
    world.settle("scheduler", "allocator", "runner")
    world.tell(Abort(1))
    world.settle("scheduler", "allocator", "runner")
    assert world.core.requests[2].lane is None, "tried, and not granted"
    reserves = world.reserves
    world.settle("scheduler", "allocator", "runner")
    assert world.reserves == reserves
    world.run()
    world.check_end()
    assert world.finished[2].reason == FinishReason.LENGTH


def test_an_abort_in_the_batch_of_its_submit_ends_the_request() -> None:
    world = World()
    world.submit(1, [1, 2, 3], max_new_tokens=50)
    world.tell(Abort(1))
    world.run()
    world.check_end()
    assert world.finished[1].reason == FinishReason.ABORT
    assert not world.device.plans


def test_a_prompt_larger_than_the_kv_is_an_error_with_the_numbers_and_the_flags() -> None:
    world = World(num_slots=40)
    world.submit(1, [1] * 41, max_new_tokens=1)
    world.submit(2, [1] * 4, max_new_tokens=1)
    world.run()
    end = world.finished[1]
    assert (end.reason, end.failure.status) == (FinishReason.ERROR, 400)
    assert all(
        text in end.failure.detail for text in ("41", "40", "--max_total_token_num", "--mem_frac")
    )
    assert world.finished[2].reason == FinishReason.LENGTH


def test_a_request_that_outgrows_the_kv_alone_ends_with_an_error_after_its_tokens() -> None:
    world = World(num_slots=40)
    world.submit(1, [1] * 30, max_new_tokens=30)
    world.run()
    world.check_end()
    assert world.finished[1].reason == FinishReason.ERROR
    assert world.finished[1].num_tokens == len(world.tokens[1]) == 11  # 30 + 11 - 1 slots


def test_a_request_whose_duplicates_fill_the_kv_starts_afresh_instead_of_failing() -> None:
    world = World(num_slots=40, headroom=0, chunked_prefill_size=40, batch_max_tokens=80)
    world.submit(1, [1] * 16, max_new_tokens=2)
    world.submit(2, [1] * 16 + [3] * 4, max_new_tokens=20)  # opened with the first: no hit
    world.run()
    world.check_end()
    assert world.finished[2].reason == FinishReason.LENGTH


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_preempted_request_yields_the_tokens_of_an_undisturbed_one(depth: int) -> None:
    world = World(num_slots=48, headroom=0, depth=depth)
    for rid in range(4):
        params: dict[str, Any] = {"temperature": 1.0, "seed": 1234 + rid, "repetition_penalty": 1.2}
        world.submit(rid, [rid] * 8, max_new_tokens=24, **params)
    world.run(random.Random(depth))
    assert world.core.preemptions > 0
    world.check_end()  # compares with the oracle
    assert all(len(world.tokens[rid]) == 24 for rid in range(4))
    opened = [each for plan in world.device.plans for each in plan.opened]
    late = [each for each in opened if len(each.known) > each.prompt_len]
    assert late, "a preempted request with penalties brings the ids it has generated"


def test_prompt_scores_of_a_preempted_request_come_once() -> None:
    world = World(num_slots=40, headroom=0)
    world.submit(1, [1] * 8, max_new_tokens=30)
    world.submit(2, list(range(32)), max_new_tokens=0, prompt_logprobs=1)
    world.run()
    world.check_end()
    assert world.core.preemptions > 0
    assert world.parts[2] == [-float(i) for i in range(1, 32)]
    assert world.finished[2].num_tokens == 0


def test_a_score_only_request_samples_nothing_and_leaves_its_prompt_in_the_cache() -> None:
    world = World()
    world.submit(1, list(range(20)), max_new_tokens=0)
    world.run()
    world.check_end()
    assert world.finished[1].reason == FinishReason.LENGTH
    assert not any(any(plan.samples) for plan in world.device.plans)
    assert world.ledger.cached == 20


def test_running_requests_share_a_launched_prompt() -> None:
    world = World(chunked_prefill_size=32)
    world.submit(1, list(range(20)), max_new_tokens=8)
    world.settle("scheduler", "allocator", "runner")  # launched, not done
    world.submit(2, [*range(20), 49], max_new_tokens=8)
    world.run()
    world.check_end()
    assert world.finished[2].cached_len == 20


@pytest.mark.parametrize("params", [{"use_cache": False}, {"prompt_logprobs": 0}])
def test_such_requests_take_no_hit(params: dict[str, Any]) -> None:
    world = World()
    for rid, extra in enumerate([{}, params]):
        world.submit(rid, list(range(20)), max_new_tokens=2, **extra)
        world.run()
    world.check_end()
    assert world.finished[1].cached_len == 0


def test_without_a_tree_nothing_is_cached() -> None:
    world = World(use_tree=False)
    for rid in range(2):
        world.submit(rid, list(range(20)), max_new_tokens=2)
        world.run()
    world.check_end()
    assert world.ledger.free == world.ledger.total


def test_a_stop_hit_ends_with_its_number_of_tokens() -> None:
    world = World()
    world.submit(1, [1, 2, 3], max_new_tokens=30)
    world.stop_after[1] = 4
    world.run()
    world.check_end()
    assert (world.finished[1].reason, world.finished[1].num_tokens) == (FinishReason.STOP, 4)
    world.tell(StopHit(1, 4))
    world.tell(Abort(1))
    world.run()  # late ones are ignored


def test_drain_refuses_new_requests_and_finishes_the_others() -> None:
    world = World(num_lanes=1)
    for rid in (1, 2):  # the second waits
        world.submit(rid, [rid] * 4, max_new_tokens=5)
    world.settle("scheduler", "allocator", "runner")
    world.tell(Drain(30.0))
    world.settle("scheduler")
    world.submit(3, [1, 2, 3], max_new_tokens=5)
    world.settle("scheduler", "detokenizer")
    end = world.finished[3]
    assert (end.reason, end.failure.status) == (FinishReason.ERROR, 503)
    assert end.failure.detail == "server is shutting down"
    assert not world.others
    world.run()
    assert [world.finished[rid].reason for rid in (1, 2)] == [FinishReason.LENGTH] * 2
    assert world.others == [Drained("scheduler", 0)]


def test_drain_without_time_aborts_everything() -> None:
    world = World(num_lanes=1)
    for rid in (1, 2):
        world.submit(rid, [rid] * 4, max_new_tokens=50)
    world.settle("scheduler", "allocator", "runner")
    world.tell(Drain(0.0))
    world.run()
    world.check_end()
    assert [world.finished[rid].reason for rid in (1, 2)] == [FinishReason.ABORT] * 2
    assert world.others == [Drained("scheduler", 0)]


def test_stats_tell_what_is_held() -> None:
    world = World()
    world.submit(1, list(range(20)), max_new_tokens=5)
    world.settle("scheduler", "allocator", "runner")
    world.tell(Probe(7))
    world.ref("allocator").tell(Probe(7))
    world.settle("scheduler", "allocator", "watchdog")
    scheduler, allocator = sorted(world.others, key=lambda msg: type(msg).__name__, reverse=True)
    assert scheduler == SchedulerStats(
        query=7, running=1, inflight_steps=2, steps=2, prompt_tokens=16, expected_slots=25
    )
    assert allocator == AllocatorStats(query=7, used=16, total=64, looked_up_tokens=20)


def test_one_message_per_frontend_and_step() -> None:
    world = World()
    far = 3 << 40
    world.submit(1, [1, 2], max_new_tokens=3)
    world.submit(far + 1, [1, 2, 3], max_new_tokens=3, logprobs=1)
    world.settle("scheduler", "allocator", "runner")
    world.turn(("device", 0))
    world.settle("scheduler", "allocator", "runner")
    for endpoint, rid in ((0, 1), (3, far + 1)):
        (tokens,) = world.ref("detokenizer", endpoint).queue
        assert list(tokens.rids) == [rid]
    world.run()
    world.check_end()


class Sink(Actor[Any]):
    """Keeps what it gets and calls ``on`` for each message."""

    def __init__(self, name: str, on: Callable[[Any], None] = lambda msg: None) -> None:
        super().__init__(name)
        self.got: list[Any] = []
        self.on = on

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            self.got.append(msg)
            self.on(msg)


def serve(
    submits: list[Submit],
    device: FakeDevice,
    on: Callable[[ActorSystem, Any], None] = lambda system, msg: None,
    *,
    encode_local: bool = False,
    depth: int = 2,
    num_slots: int = 4096,
    allocator: type[Allocator] = Allocator,
) -> tuple[list[Any], Allocator]:
    """Serve these on a real loop until each has ended; what the detokenizer got."""

    async def go() -> tuple[list[Any], Allocator]:
        system = ActorSystem(encode_local=encode_local)
        left = {msg.rid for msg in submits}

        def heard(msg: Any) -> None:
            on(system, msg)
            if isinstance(msg, Finished):
                left.remove(msg.rid)
                if not left:
                    system.stop()

        sink, slots = Sink("detokenizer", heard), allocator(num_slots)
        core = SchedulerCore(
            num_lanes=32,
            num_slots=num_slots,
            batch_max_tokens=64,
            chunked_prefill_size=16,
            eos_ids=device.eos,
            headroom=0,
        )
        scheduler = Scheduler(core, runners=[0], depth=depth)
        for actor in (Sink("watchdog"), sink, slots, Runner(device, reports=True)):
            system.add(actor)
        ref = system.add(scheduler)
        for msg in submits:
            ref.tell(msg)
        await asyncio.wait_for(system.run(), 20)
        return sink.got, slots

    return uvloop.run(go())


def requests(num: int, max_new: int) -> list[Submit]:
    rng = random.Random(num)
    out = []
    for rid in range(num):
        params = SamplingParams(max_new_tokens=max_new, seed=rid)
        out.append(Submit(rid, i32(rng.randrange(50) for _ in range(rng.randint(1, 40))), params))
    return out


@pytest.mark.parametrize("encode_local", [False, True], ids=["objects", "frames"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_crowd_on_a_real_loop_gets_its_tokens(depth: int, encode_local: bool) -> None:
    submits, device = requests(30, 12), FakeDevice(eos={3})
    got, slots = serve(submits, device, encode_local=encode_local, depth=depth, num_slots=128)
    tokens: dict[int, list[int]] = {msg.rid: [] for msg in submits}
    for msg in got:
        if isinstance(msg, Tokens):
            for rid, token in zip(msg.rids, msg.tokens, strict=True):
                tokens[rid].append(token)
    for msg in submits:
        params = msg.params
        assert tokens[msg.rid] == oracle(msg.prompt, params, 50, {3})
    check_ledger(slots.ledger)
    assert device.closed


def test_a_launch_runs_before_the_fan_out_of_the_step_two_before() -> None:
    events: list[tuple[str, int]] = []

    class Device(FakeDevice):
        def launch(self, plan: StepPlan) -> Any:
            events.append(("launch", plan.step))
            return super().launch(plan)

    def on(system: ActorSystem, msg: Any) -> None:
        if isinstance(msg, Tokens):
            events.append(("publish", msg.step))

    serve([Submit(r, i32([r] * 3), requests(1, 40)[0].params) for r in range(16)], Device(), on)
    at = {event: i for i, event in enumerate(events)}
    last = max(step for what, step in events if what == "launch")
    assert last >= 40
    for step in range(1, last - 1):
        if ("publish", step) in at:
            assert at["launch", step + 2] < at["publish", step]


def test_a_queue_that_does_not_fit_costs_few_reservations() -> None:
    count: Counter[str] = Counter()

    class Counting(Allocator):
        def receive(self, batch: list[Any]) -> None:
            count.update(type(msg).__name__ for msg in batch)
            super().receive(batch)

    device = FakeDevice()
    serve(requests(12, 10), device, num_slots=64, allocator=Counting)
    assert count[ReserveSlots.__name__] <= 2 * len(device.plans) + 20
