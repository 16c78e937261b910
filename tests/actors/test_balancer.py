"""Balancer: a request and all that is said about it go to one leader, in order."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from asyncllm.actors.balancer import Balancer
from asyncllm.actors.base import Actor
from asyncllm.actors.system import ActorSystem
from asyncllm.codec import INT64, i32
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.messages import (
    FRONTEND_SHIFT,
    Abort,
    BeginDecode,
    CompileGrammar,
    EndpointGone,
    Finished,
    GroupProgress,
    GroupRemoved,
    RequestsOrphaned,
    ResubmitRequests,
    StopHit,
    Submit,
)
from asyncllm.topology import Topology

COMPILE = CompileGrammar(endpoint=0, job=3, kind="regex", text="a")


class Sink(Actor[Any]):
    def __init__(self, name: str, log: list[tuple[int, str, Any]]) -> None:
        super().__init__(name)
        self.log = log

    def receive(self, batch: list[Any]) -> None:
        self.log.extend((0, self.name, msg) for msg in batch)


class Office:
    """A balancer of two groups of one rank; ``log``: (endpoint, actor, message) of all it tells."""

    def __init__(self, **options: Any) -> None:
        self.log: list[tuple[int, str, Any]] = []
        self.system = ActorSystem(topology=Topology.on_one_node(tp=2, dp=2), encode_local=True)
        deliver = self.system.deliver

        def divert(endpoint: int, name: str, msg: Any) -> None:
            if endpoint:
                self.log.append((endpoint, name, msg))
            else:
                deliver(endpoint, name, msg)

        self.system.deliver = divert  # type: ignore[method-assign]
        for name in ("scheduler", "grammar", "detokenizer"):
            self.system.add(Sink(name, self.log))
        given = {"policy": "round_robin", "num_slots": 1000, **options}
        self.balancer = Balancer(**given)
        self.ref = self.system.add(self.balancer)

    async def tell(self, *msgs: Any) -> list[tuple[int, str, Any]]:
        """What came of these messages."""
        self.log.clear()
        for msg in msgs:
            self.ref.tell(msg)
        for _ in range(6):
            await asyncio.sleep(0)
        return self.log.copy()


def play(script: Callable[[Office], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def go() -> None:
        office = Office(**options)
        running = asyncio.ensure_future(office.system.run())
        async with asyncio.timeout(20):
            await script(office)
        office.system.stop()
        await running

    uvloop.run(go())


def submit(rid: int, **more: Any) -> Submit:
    return Submit(rid, i32([1, 2, 3]), SamplingParams(max_new_tokens=4), **more)


def test_what_is_said_about_a_request_follows_it() -> None:
    async def script(office: Office) -> None:
        first, second = submit(1), submit(2)
        assert await office.tell(first, second, BeginDecode(2, 7), Abort(2), StopHit(1, 3)) == [
            (1, "scheduler", second), (1, "scheduler", BeginDecode(2, 7)),  # at once
            (1, "scheduler", Abort(2)),
            (0, "scheduler", first), (0, "scheduler", StopHit(1, 3)),
        ]  # fmt: skip

    play(script)


def test_what_is_said_about_others_goes_nowhere() -> None:
    async def script(office: Office) -> None:
        await office.tell(submit(1), submit(2))
        ended = GroupProgress(0, ended=_rids(1))
        assert await office.tell(ended, Abort(1), StopHit(1, 2), Abort(99)) == []
        assert office.balancer.core.num_requests == [0, 1]

    play(script)


def test_a_request_that_is_there_already_is_no_request() -> None:
    async def script(office: Office) -> None:
        assert len(await office.tell(submit(1), submit(1))) == 1
        assert office.balancer.core.num_requests == [1, 0]

    play(script)


def test_requests_that_run_weigh_less_than_those_that_wait() -> None:
    async def script(office: Office) -> None:
        await office.tell(submit(1), submit(2), GroupProgress(1, begun=_rids(2)))
        ((endpoint, _, _),) = await office.tell(submit(3))
        assert endpoint == 1, "it would have been the other one's turn"

    play(script, policy="cache_aware", num_slots=0)


def test_requests_of_a_process_that_has_gone_are_forgotten_and_late_ones_ignored() -> None:
    async def script(office: Office) -> None:
        theirs = 5 << FRONTEND_SHIFT
        await office.tell(submit(1), submit(theirs), submit(theirs + 1))
        assert await office.tell(EndpointGone(5), Abort(theirs), submit(theirs + 2)) == []
        assert office.balancer.core.num_requests == [1, 0]

    play(script)


def test_a_grammar_is_compiled_by_every_leader() -> None:
    async def script(office: Office) -> None:
        told = await office.tell(COMPILE)
        assert sorted(told[:2], key=lambda each: each[0]) == [
            (0, "grammar", COMPILE), (1, "grammar", COMPILE),
        ]  # fmt: skip

    play(script)


def test_what_another_process_submits_is_held_against_the_limits() -> None:
    async def script(office: Office) -> None:
        balancer = office.balancer
        assert balancer.possible(submit(1))
        assert not balancer.possible(Submit(1, i32([1, 2, 10]), SamplingParams(max_new_tokens=4)))
        assert not balancer.possible(Submit(1, i32([1] * 7), SamplingParams(max_new_tokens=4)))
        assert balancer.possible(Abort(1))

    play(script, vocab_size=10, max_len=10)


def _rids(*rids: int) -> array[int]:
    return array(INT64, rids)


def test_what_a_lost_group_had_goes_to_others_if_nothing_of_it_has_come() -> None:
    async def script(office: Office) -> None:
        theirs = 5 << FRONTEND_SHIFT  # of another process that serves HTTP
        begun, fresh, aborted = submit(2), submit(4), submit(theirs)
        await office.tell(submit(1), begun, submit(3), fresh, submit(5), aborted)
        assert await office.tell(GroupRemoved(1, 1, "it was killed")) == [
            (5, "detokenizer", RequestsOrphaned(_rids(theirs), "it was killed")),
            (0, "detokenizer", RequestsOrphaned(_rids(2, 4), "it was killed")),
        ]
        assert await office.tell(StopHit(4, 1), Abort(theirs)) == [
            (5, "detokenizer", Finished(theirs, FinishReason.ABORT))
        ]
        assert await office.tell(
            ResubmitRequests(_rids(theirs), _rids()), ResubmitRequests(_rids(4), _rids(2))
        ) == [(0, "scheduler", fresh)]
        # what the lost group says counts no more, and nothing goes there
        told = await office.tell(GroupProgress(1, ended=_rids(4)), Abort(4), submit(6), COMPILE)
        assert told == [
            (0, "scheduler", Abort(4)), (0, "scheduler", submit(6)), (0, "grammar", COMPILE)
        ]  # fmt: skip
        assert office.balancer.core.num_requests == [5, 0]
        assert await office.tell(ResubmitRequests(_rids(2, 4), _rids())) == [], (
            "it was said already"
        )

    play(script)


@pytest.mark.parametrize("policy", ["cache_aware", "bs_balancer", "round_robin"])
def test_no_policy_chooses_a_lost_group(policy: str) -> None:
    async def script(office: Office) -> None:
        await office.tell(GroupRemoved(1, 1, ""))
        told = await office.tell(*(submit(i) for i in range(8)))
        assert {endpoint for endpoint, _, _ in told} == {0}

    play(script, policy=policy)


def test_orphans_of_a_process_that_has_gone_are_not_begun_again() -> None:
    async def script(office: Office) -> None:
        theirs = 5 << FRONTEND_SHIFT
        await office.tell(submit(1), submit(theirs))
        await office.tell(GroupRemoved(1, 1, ""))
        assert await office.tell(EndpointGone(5), ResubmitRequests(_rids(theirs), _rids())) == []

    play(script)
