"""Schedulers of two groups that step together: equal steps of equal size, and none without need."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import uvloop

from asyncllm.actors.base import Actor
from asyncllm.actors.lockstep import Lockstep
from asyncllm.actors.system import ActorSystem
from asyncllm.messages import Abort, Drain, Drained, JoinStep, OfferStep, StepAgreed, StepPlan
from asyncllm.topology import Topology
from tests.actors.fake_device import World


class Office:
    """The actor beside sinks in the place of what it talks to."""

    def __init__(self) -> None:
        self.endpoint, self.topology = 0, Topology.on_one_node(tp=4, dp=2, in_step=True)
        self.sent: list[tuple[int, Any]] = []
        self.rejected: list[Any] = []

    def ref(self, name: str, endpoint: int) -> Office.To:
        assert name == "scheduler"
        return Office.To(self, endpoint)

    def reject(self, msg: Any, why: str) -> None:
        self.rejected.append(msg)

    class To:
        def __init__(self, office: Office, endpoint: int) -> None:
            self.office, self.endpoint = office, endpoint

        def tell(self, msg: Any) -> None:
            self.office.sent.append((self.endpoint, msg))


class Pair:
    """Two worlds, whose leaders are endpoints 0 and 2, and a lockstep between them."""

    def __init__(self, **options: Any) -> None:
        self.office = Office()
        self.lockstep = Lockstep()
        self.lockstep.system = self.office  # type: ignore[assignment]
        self.lockstep.started()
        self.worlds = {0: World(in_step=True, **options), 2: World(in_step=True, **options)}
        for endpoint, world in self.worlds.items():
            world.endpoint = endpoint

    def mail(self) -> list[tuple[int, str]]:
        """Who can do something: (endpoint, actor); also what the lockstep has to deliver."""
        found = [(e, key[0]) for e, world in self.worlds.items() for key in world.ready()]
        # a step's collectives end in all groups together
        launched = [len(world.pending) for world in self.worlds.values()]
        steps = [world.pending[0].done.step for world in self.worlds.values() if world.pending]
        if min(launched) == 0 or len({*steps}) > 1:
            found = [each for each in found if each[1] != "device"]
        return found

    def turn(self, endpoint: int, name: str) -> None:
        world = self.worlds[endpoint]
        if name == "lockstep":
            self.lockstep.receive(world.ref("lockstep").take())
            for to, msg in self.office.sent:
                self.worlds[to].tell(msg)
            self.office.sent.clear()
        elif name == "device":
            for each in self.worlds.values():
                each.turn(("device", 0))
        else:
            world.turn(next(key for key in world.ready() if key[0] == name))

    def run(self, rng: random.Random) -> None:
        for _ in range(20_000):
            if not (ready := self.mail()):
                break
            self.turn(*rng.choice(ready))
        assert not any(world.core.requests for world in self.worlds.values())
        assert not self.office.rejected

    def plans(self) -> list[list[StepPlan]]:
        return [world.device.plans for world in self.worlds.values()]

    def check(self) -> None:
        """Each step was taken by both, with one size that is that of the larger."""
        first, second = self.plans()
        assert [p.step for p in first] == [p.step for p in second] == [*range(1, len(first) + 1)]
        for one, other in zip(first, second, strict=True):
            assert one.common == other.common == max(len(one.tokens), len(other.tokens)) > 0
            mixed = [plan.num_decode < len(plan.lanes) for plan in (one, other)]
            assert one.mixed == other.mixed == any(mixed)
        for world in self.worlds.values():
            world.check_end()


def test_an_empty_group_steps_along_and_nobody_steps_when_both_are() -> None:
    pair = Pair()
    pair.worlds[0].submit(1, [1] * 5, max_new_tokens=4)
    pair.run(random.Random(0))
    pair.check()
    assert len(pair.plans()[0]) >= 4
    assert not any(plan.lanes for plan in pair.plans()[1])
    before = len(pair.plans()[0])
    pair.run(random.Random(0))
    assert len(pair.plans()[0]) == before


@pytest.mark.parametrize("seed", range(12))
def test_random_lives_in_two_groups(seed: int) -> None:
    """Little K/V, aborts at any time, groups that come and go: all ends, and steps stay equal."""
    rng = random.Random(seed)
    pair = Pair(num_slots=40, num_lanes=3, headroom=0, encode_local=seed % 2 == 0)
    rid = 0
    for _ in range(rng.randrange(5, 30)):
        for endpoint, world in pair.worlds.items():
            if rng.random() < (0.7 if endpoint else 0.3):
                rid += 1
                prompt = [rng.randrange(4) for _ in range(rng.randrange(1, 20))]
                world.submit(rid, prompt, max_new_tokens=rng.randrange(1, 12), seed=rid)
            if rng.random() < 0.2 and world.submitted:
                world.tell(Abort(rng.choice([*world.submitted])))
        for _ in range(rng.randrange(30)):
            if ready := pair.mail():
                pair.turn(*rng.choice(ready))
    pair.run(rng)
    pair.check()


def test_a_group_without_room_steps_along_with_the_other() -> None:
    """Its request waits for slots that a step in flight holds, while the other one goes on."""
    pair = Pair(num_slots=24, num_lanes=4, headroom=0)
    for rid in (1, 2, 3):
        pair.worlds[2].submit(rid, [rid] * 9, max_new_tokens=8)
    pair.worlds[0].submit(9, [7] * 4, max_new_tokens=20)
    pair.run(random.Random(3))
    pair.check()


def test_a_drained_group_goes_on_stepping_for_the_others() -> None:
    pair = Pair()
    pair.worlds[0].submit(1, [1] * 5, max_new_tokens=9)
    for world in pair.worlds.values():
        world.tell(Drain(30.0))
    pair.run(random.Random(1))
    pair.check()
    for world in pair.worlds.values():
        assert [type(msg) for msg in world.others if isinstance(msg, Drained)] == [Drained]


class Sink(Actor[Any]):
    def __init__(self, log: list[Any]) -> None:
        super().__init__("scheduler")
        self.log = log

    def receive(self, batch: list[Any]) -> None:
        self.log += batch


def test_offers_of_nobody_and_out_of_turn_are_dropped() -> None:
    log: list[Any] = []

    async def main() -> None:
        async with asyncio.timeout(20):
            system = ActorSystem(topology=Topology.on_one_node(tp=2, dp=2, in_step=True))
            actor = Lockstep()
            system.add(Sink(log))
            ref = system.add(actor)
            running = asyncio.ensure_future(system.run())
            await asyncio.sleep(0)
            assert not actor.possible(OfferStep(endpoint=7, step=1, num_tokens=1, mixed=False))
            for step in (1, 5, 1):
                ref.tell(OfferStep(endpoint=1, step=step, num_tokens=3, mixed=False))
            ref.tell(OfferStep(endpoint=0, step=1, num_tokens=0, mixed=False))
            for _ in range(5):
                await asyncio.sleep(0)
            system.stop()
            await running

    uvloop.run(main())
    assert log == [JoinStep(1), StepAgreed(step=1, num_tokens=3, mixed=False)]


def test_a_full_group_makes_room_while_the_other_keeps_the_device_busy() -> None:
    """Steps in flight that bring it nothing are none to wait for."""
    pair = Pair(num_slots=60, num_lanes=2, headroom=0)
    for rid in (1, 2):
        pair.worlds[2].submit(rid, [rid] * 20, max_new_tokens=20, ignore_eos=True)
    pair.worlds[0].submit(9, [7] * 4, max_new_tokens=50, ignore_eos=True)
    while ready := pair.mail():  # the device is never idle
        pair.turn(*min(ready, key=lambda each: each[1] == "device"))
    pair.check()
    rows = [len(plan.lanes) for plan in pair.plans()[1]]
    assert pair.worlds[2].core.preemptions == 1
    assert max(step for step, num in enumerate(rows) if num) < 40, rows
