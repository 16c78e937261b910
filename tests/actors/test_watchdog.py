"""Start, liveness, hung steps, drain and scrapes; time is a number that the test moves."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import uvloop

from asyncllm.actors.base import Actor
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.watchdog import Watchdog, gather
from asyncllm.actors.watchdog_settings import WatchdogConfig, WatchdogHooks
from asyncllm.core.metrics import StatsSnapshot
from asyncllm.errors import Mismatch, PeerLost
from asyncllm.messages import (
    AllocatorStats,
    Cancel,
    Drain,
    Drained,
    EndpointGone,
    GroupFailed,
    GroupRemoved,
    Halt,
    Hello,
    Probe,
    RequestServed,
    RunnerStats,
    SchedulerStats,
    Scrape,
    Scraped,
    ServerLost,
    Started,
    Welcome,
    WorkerOverrun,
    WorkerReplaced,
)
from asyncllm.records import GroupLoad
from asyncllm.topology import Contract, Topology, http_worker

CONTRACT = Contract(protocol="p1", options="o1")
LOAD = GroupLoad(used=30, expected=77, total=100, cached=20, running=3, waiting=2)


def hello(endpoint: int, address: str = "", **changes: Any) -> Hello:
    return replace(Hello(endpoint=endpoint, contract=CONTRACT, node=0, address=address), **changes)


class Fake(Actor[Any]):
    """Keeps what it is told, answers probes unless ``silent``."""

    silent = False
    generated = 0
    running = 0
    waiting = 2
    prompt = 50

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.got: list[Any] = []

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            self.got.append(msg)
            if isinstance(msg, Probe) and not self.silent:
                self.answer(msg.query)

    def answer(self, query: int) -> None:
        dog = self.system.ref("watchdog")
        if self.name == "scheduler":
            dog.tell(
                SchedulerStats(
                    query=query,
                    running=self.running,
                    waiting=self.waiting,
                    inflight_steps=1,
                    expected_slots=77,
                    steps=9,
                    prompt_tokens=self.prompt,
                    generated_tokens=self.generated,
                )
            )
        elif self.name == "allocator":
            dog.tell(AllocatorStats(query, 0, 30, 20, 100, 8, 16, 4))
        elif self.name == "runner":
            dog.tell(RunnerStats(query, 0, 5.0, 0.5, 0.1, 0))


class Beats:
    """Signs of life: ``last`` is what others have given, ``who`` the endpoints that gave one here."""

    def __init__(self) -> None:
        self.last: dict[int, float] = {}
        self.who: list[int] = []
        self._came = threading.Condition()

    def beat(self, endpoint: int, now: float) -> None:
        with self._came:
            self.who.append(endpoint)
            self._came.notify()

    def come(self, number: int) -> None:
        """Wait for so many more."""
        with self._came:
            wanted = len(self.who) + number
            assert self._came.wait_for(lambda: len(self.who) >= wanted, 20)


@dataclass
class World:
    """A watchdog among fakes, with a clock that stands still."""

    endpoint: int = 0
    topology: Topology = field(default_factory=Topology.on_one_node)
    now: float = 1000.0
    clock_step: float = 0.0  # each look at the clock moves it
    tick_s: float = 1e6
    watch_s: float = 0.0
    beats: Beats = field(default_factory=lambda: Beats())
    dead_after_s: float = 10.0
    busy_since: float | None = None
    ends: list[Any] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)
    guards: list[float] = field(default_factory=list)
    sent: list[tuple[int, str, Any]] = field(default_factory=list)

    def build(self) -> ActorSystem:
        self.system = ActorSystem(self.endpoint, topology=self.topology, encode_local=True)
        deliver = self.system.deliver

        def divert(endpoint: int, name: str, msg: Any) -> None:
            if endpoint == self.endpoint:
                deliver(endpoint, name, msg)
            else:
                self.sent.append((endpoint, name, msg))

        self.system.deliver = divert  # type: ignore[method-assign]
        self.fakes = {
            n: Fake(n)
            for n in (
                *("scheduler", "allocator", "runner", "frontend", "balancer", "agent"),
                "config_client",
            )
        }
        for fake in self.fakes.values():
            self.system.add(fake)
        self.dog = Watchdog(
            WatchdogConfig(
                contract=CONTRACT,
                model_name="m",
                max_len=1000,
                step_timeout_s=120.0,
                dead_after_s=self.dead_after_s,
                busy_since=lambda: self.busy_since,
                in_flight=lambda: "step 7",
            ),
            WatchdogHooks(
                clock=self.clock,
                exit=self.ends.append,
                kill=self.killed.append,
                dump=lambda: self.ends.append("dump"),
                guard=self.guards.append,
                tick_s=self.tick_s,
                watch_s=self.watch_s,
                beat=self.beats.beat,
                last_beat=lambda endpoint: self.beats.last.get(endpoint, 0.0),
            ),
        )
        self.system.add(self.dog)
        return self.system

    def clock(self) -> float:
        self.now += self.clock_step
        return self.now

    def tell(self, msg: Any) -> None:
        self.system.ref("watchdog").tell(msg)

    def pass_time(self, seconds: float, late: float = 0.0) -> None:
        """One timer tick after ``seconds``, of which the loop was away for ``late``."""
        self.now += seconds
        self.dog._due = self.now - late
        self.dog.tick()

    def got(self, name: str, kind: type) -> list[Any]:
        return [m for m in self.fakes[name].got if isinstance(m, kind)]

    def sent_of(self, kind: type) -> list[tuple[int, str]]:
        return [(e, n) for e, n, m in self.sent if isinstance(m, kind)]


def play(world: World, script: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    """Run the script beside the system; it may end the system itself."""

    async def go() -> None:
        system = world.build()
        running = asyncio.ensure_future(system.run())
        async with asyncio.timeout(20):
            await settle()
            await script(world)
            system.stop()
            await running

    uvloop.run(go())


async def settle() -> None:
    """Let every message, and the answers to it, arrive."""
    for _ in range(10):
        await asyncio.sleep(0)


def trio(**more: Any) -> World:
    return World(topology=Topology.on_one_node(tp=2, http=2), **more)


# -- start ---------------------------------------------------------------------------------------


def test_alone_it_is_ready_at_once() -> None:
    async def script(w: World) -> None:
        assert w.got("frontend", Started) == [Started()]

    play(World(), script)


def test_an_agent_is_told_when_every_rank_of_its_node_is_there() -> None:
    async def script(w: World) -> None:
        assert w.got("agent", Started) == []
        w.tell(hello(1))
        await settle()
        assert w.got("agent", Started) == [Started()]

    play(World(topology=Topology.on_one_node(tp=2).as_node()), script)


def test_doors_open_when_every_endpoint_is_there_and_once() -> None:
    async def script(w: World) -> None:
        w.tell(hello(2))
        w.tell(hello(2))
        await settle()
        assert w.got("frontend", Started) == []
        w.tell(hello(1))
        await settle()
        assert w.got("frontend", Started) == [Started()]
        assert w.sent_of(Started) == [(2, "frontend")]
        w.tell(hello(1))
        await settle()
        assert w.got("frontend", Started) == [Started()]

    play(trio(), script)


def test_the_others_say_that_they_are_there() -> None:
    async def script(w: World) -> None:
        assert (0, "watchdog", hello(1)) in w.sent

    play(trio(endpoint=1), script)


def test_everybody_is_told_who_there_is_once_all_are_there() -> None:
    async def script(w: World) -> None:
        w.tell(hello(2))
        await settle()
        assert w.sent_of(Welcome) == []
        w.tell(hello(1))
        await settle()
        assert set(w.sent_of(Welcome)) == {(1, "watchdog"), (2, "watchdog")}
        w.sent.clear()
        w.tell(WorkerReplaced(2, http_worker(3)))
        w.tell(hello(3))
        await settle()
        told = [(e, m.topology.placed("frontend")) for e, _, m in w.sent if type(m) is Welcome]
        assert told == [(1, (0, 3)), (3, (0, 3))]

    play(trio(), script)


BREACHES: list[tuple[dict[str, Any], str]] = [
    ({"contract": replace(CONTRACT, protocol="p2")}, "protocol is p2, that of rank 0 p1"),
    ({"contract": replace(CONTRACT, options="o2")}, "options is o2, that of rank 0 o1"),
    ({"node": 7}, "node is 7, that of rank 0 0"),
]


@pytest.mark.parametrize(("changes", "words"), BREACHES, ids=str)
def test_a_process_that_does_not_fit_ends_the_start_and_is_told(
    changes: dict[str, Any], words: str
) -> None:
    async def go() -> None:
        world = trio()
        system = world.build()
        world.tell(hello(1, **changes))
        try:
            await asyncio.wait_for(system.run(), 20)
        finally:
            assert world.sent_of(Welcome) == [(1, "watchdog")]

    with pytest.raises(Mismatch, match=f"rank 1 cannot belong to this server: its {words}"):
        uvloop.run(go())


def test_one_that_is_told_so_ends_with_the_same_line(caplog: pytest.LogCaptureFixture) -> None:
    async def go(welcome: Welcome) -> None:
        world = trio(endpoint=1)
        system = world.build()
        world.tell(welcome)
        await asyncio.wait_for(system.run(), 20)

    words = "rank 1 cannot belong to this server: its options is o1, that of rank 0 o2"
    topology = Topology.on_one_node(tp=2, http=2)
    with pytest.raises(Mismatch, match=words):
        uvloop.run(go(Welcome(replace(CONTRACT, options="o2"), topology)))
    moved = Topology(tuple(replace(e, node=3) for e in topology.endpoints))
    with pytest.raises(Mismatch, match="its node is 0, that of rank 0 3"):
        uvloop.run(go(Welcome(CONTRACT, moved)))
    assert "Traceback" not in caplog.text


def test_a_welcome_says_who_is_where() -> None:
    async def script(w: World) -> None:
        topology = Topology.on_one_node(tp=2, http=2).at(2, "ipc://there")
        w.tell(Welcome(CONTRACT, topology))
        await settle()
        assert w.system.topology == topology

    play(trio(endpoint=1), script)


# -- liveness --------------------------------------------------------------------------------------


def test_a_busy_loop_is_no_silence() -> None:
    """A thread says that the process lives."""
    beats = Beats()

    async def script(w: World) -> None:
        beats.come(3)  # the loop does nothing else meanwhile
        assert set(beats.who) == {1}

    play(trio(endpoint=1, watch_s=0.01, beats=beats), script)


def test_a_silent_endpoint_is_lost_by_name() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        await settle()
        for _ in range(10):
            w.beats.last[2] = w.now
            await settle()
            w.pass_time(1.0)
        with pytest.raises(PeerLost, match=r"rank 1 has been silent for 11.0 s"):
            w.pass_time(1.0)

    play(trio(), script)


def test_an_endpoint_that_still_loads_is_not_lost() -> None:
    async def script(w: World) -> None:
        for _ in range(100):
            w.pass_time(1.0)

    play(trio(), script)
    play(trio(endpoint=1), script)


def test_followers_lose_the_first_endpoint() -> None:
    async def script(w: World) -> None:
        w.beats.last[0] = w.now
        w.beats.last[2] = w.now  # not theirs to watch
        await settle()
        w.pass_time(10.0)
        with pytest.raises(PeerLost, match="rank 0"):
            w.pass_time(1.0)

    play(trio(endpoint=1), script)


def test_a_loop_that_was_away_does_not_blame_the_others() -> None:
    async def script(w: World) -> None:
        w.beats.last[0] = w.now
        await settle()
        w.pass_time(60.0, late=59.9)  # perhaps all were stopped
        w.pass_time(5.0)
        with pytest.raises(PeerLost):
            w.pass_time(5.0)

    play(trio(endpoint=1), script)


def test_a_lost_peer_ends_the_system() -> None:
    async def go() -> None:
        world = trio(tick_s=0.001, clock_step=0.5)
        system = world.build()
        world.tell(hello(1))
        await asyncio.wait_for(system.run(), 20)

    with pytest.raises(PeerLost, match="rank 1"):
        uvloop.run(go())


def groups(**more: Any) -> World:
    """Two ranks in each of three groups, and another process that serves HTTP."""
    return World(topology=Topology.on_one_node(tp=6, http=2, dp=3), **more)


async def all_there(world: World) -> None:
    for endpoint in range(1, 7):
        world.tell(hello(endpoint))
    await settle()
    world.sent.clear()


def test_a_server_goes_on_without_a_group(caplog: pytest.LogCaptureFixture) -> None:
    async def script(world: World) -> None:
        await all_there(world)
        for _ in range(2):  # both of its ranks are missed
            world.tell(GroupFailed(1, "rank 3 has gone"))
        await settle()
        assert world.sent_of(ServerLost) == [(2, "watchdog"), (3, "watchdog")]
        assert world.killed == [2, 3]
        gone = GroupRemoved(1, 2, "rank 3 has gone")
        assert world.got("balancer", GroupRemoved) == world.got("frontend", GroupRemoved) == [gone]
        assert world.sent_of(GroupRemoved) == [
            (6, n) for n in ("tokenizer", "detokenizer", "frontend")
        ]
        assert world.sent_of(Welcome) == [(e, "watchdog") for e in (1, 4, 5, 6)]
        assert world.system.topology.groups == (0, 2)
        world.pass_time(11.0)  # of which only those who live are expected to give signs
        world.tell(Drain(10.0))
        await settle()
        assert sorted(world.sent_of(Drain)) == [(4, "scheduler"), (6, "frontend")]

    world = groups(dead_after_s=1e6)
    play(world, script)
    line = "group 1 is lost: rank 3 has gone; 2 of 3 groups serve"
    assert [r.getMessage() for r in caplog.records].count(line) == 1


@pytest.mark.parametrize(
    ("topology", "group", "open_"),
    [
        (Topology.on_one_node(tp=6, http=2, dp=3), 0, True),  # that of the process that serves
        (Topology.on_one_node(tp=6, http=2, dp=3), 1, False),  # not all are there yet
        (Topology.on_one_node(tp=6, http=2, dp=3, in_step=True), 1, True),
    ],
)
def test_it_does_not_go_on_without_one_that_others_need(
    topology: Topology, group: int, open_: bool
) -> None:
    async def script(world: World) -> None:
        if open_:
            await all_there(world)
        world.tell(GroupFailed(group, "rank 3 has gone"))
        await settle()
        assert world.system.over

    with pytest.raises(PeerLost, match="rank 3 has gone"):
        play(World(topology=topology), script)


def test_a_silent_rank_of_another_group_is_killed_and_one_of_its_own_is_the_end() -> None:
    async def script(world: World) -> None:
        await all_there(world)
        world.beats.last.update(dict.fromkeys(range(1, 7), 1e6))
        world.beats.last[4] = 0.0
        world.pass_time(11.0)
        assert world.killed == [4]
        world.beats.last[1] = 0.0
        world.dog._heard[1] = 0.0
        with pytest.raises(PeerLost, match="rank 1 has been silent"):
            world.pass_time(11.0)

    play(groups(), script)


def test_a_silent_http_worker_is_killed_once() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        await settle()
        for _ in range(15):
            w.beats.last[1] = w.now
            await settle()
            w.pass_time(1.0)
        assert w.killed == [2]

    play(trio(), script)


def test_a_worker_that_does_not_read_what_any_leader_sends_is_killed() -> None:
    async def of_a_leader(world: World) -> None:
        world.system.on_overrun(6)
        assert world.sent[-1] == (0, "watchdog", WorkerOverrun(6))

    async def of_the_coordinator(world: World) -> None:
        await all_there(world)
        assert WorkerOverrun in world.dog.remote
        for endpoint in (6, 3, 77):  # only a worker is replaced
            world.tell(WorkerOverrun(endpoint))
        await settle()
        assert world.killed == [6]
        world.system.on_overrun(6)
        await settle()
        assert world.killed == [6, 6]

    play(groups(endpoint=2), of_a_leader)
    play(groups(), of_the_coordinator)


def test_a_worker_takes_the_place_of_another() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        await settle()
        w.tell(WorkerReplaced(2, http_worker(3)))
        await settle()
        assert w.got("scheduler", EndpointGone) == [EndpointGone(2)]
        w.tell(Cancel("all"))
        w.tell(hello(2))  # on its way when it died
        w.beats.last[2] = w.now
        await settle()
        assert w.sent_of(Started) == [(2, "frontend")]
        w.tell(hello(3))
        await settle()
        assert w.sent_of(Started) == [(2, "frontend"), (3, "frontend")]
        for _ in range(11):
            w.beats.last[1] = w.now
            w.beats.last[3] = w.now
            await settle()
            w.pass_time(1.0)
        assert w.killed == []
        w.tell(Cancel("x"))
        w.tell(Drain(30.0))
        await settle()
        assert w.sent_of(Cancel)[-1:] == [(3, "frontend")]
        assert w.sent_of(Drain) == [(3, "frontend")]

    play(trio(), script)


def test_all_who_tell_a_worker_something_learn_that_it_has_gone() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        await settle()
        w.tell(WorkerReplaced(1, http_worker(2)))
        await settle()
        for name in ("scheduler", "agent", "config_client"):
            assert w.got(name, EndpointGone) == [EndpointGone(1)]

    play(World(topology=Topology.on_one_node(http=2).as_node().with_config_client()), script)


def test_a_worker_learns_of_the_group_that_was_lost_while_it_started() -> None:
    """Its tokenizer would wait for the group's grammars."""

    async def script(world: World) -> None:
        await all_there(world)
        world.tell(WorkerReplaced(6, http_worker(7)))
        world.tell(GroupFailed(1, "rank 3 has gone"))
        await settle()
        world.sent.clear()
        world.tell(hello(7))
        await settle()
        to = [(name, msg) for endpoint, name, msg in world.sent if endpoint == 7]
        gone = GroupRemoved(1, 2, "rank 3 has gone")
        told = [(name, gone) for name in ("tokenizer", "detokenizer", "frontend")]
        assert to[1:] == [*told, ("frontend", Started())]
        assert type(to[0][1]) is Welcome

    play(groups(), script)


def test_a_worker_that_dies_while_the_server_drains_is_not_waited_for() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        w.tell(Drain(30.0))
        await settle()
        w.tell(Drained("scheduler", 0))
        w.tell(Drained("frontend", 0))
        await settle()
        assert not w.system.over
        w.tell(WorkerReplaced(2, None))
        await settle()
        assert w.system.over
        assert w.sent_of(Halt) == [(1, "watchdog")]

    play(trio(), script)


def test_a_worker_that_still_loads_does_not_hold_up_the_end() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        await settle()
        w.tell(WorkerReplaced(2, http_worker(3)))
        w.tell(Drain(30.0))
        await settle()
        assert w.sent_of(Drain) == []
        w.tell(Drained("scheduler", 0))
        w.tell(Drained("frontend", 0))
        await settle()
        assert w.system.over
        assert w.killed == [3]

    play(trio(), script)


def test_a_worker_that_comes_while_the_server_drains_is_sent_away() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        await settle()
        w.tell(WorkerReplaced(2, http_worker(3)))
        w.tell(Drain(30.0))
        w.tell(hello(3))
        await settle()
        assert (3, "frontend") not in w.sent_of(Started)
        assert w.sent_of(Halt) == [(3, "watchdog")]

    play(trio(), script)


def test_a_cancellation_reaches_every_frontend() -> None:
    async def script(w: World) -> None:
        w.tell(Cancel("x"))
        await settle()
        assert w.got("frontend", Cancel) == [Cancel("x")]
        assert w.sent_of(Cancel) == [(2, "frontend")]

    play(trio(), script)


def test_a_failing_server_tells_those_that_serve_http() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        await settle()
        await w.dog.failing()
        assert w.sent_of(ServerLost) == [(2, "watchdog")]

    play(trio(), script)


def test_a_worker_that_is_told_of_the_failure_fails_too() -> None:
    async def go() -> None:
        world = trio(endpoint=2)
        system = world.build()
        world.tell(ServerLost())
        await asyncio.wait_for(system.run(), 20)

    with pytest.raises(PeerLost, match="the server has failed"):
        uvloop.run(go())


# -- a hung step ---------------------------------------------------------------------------------


def test_a_step_that_does_not_end_dumps_stacks_and_exits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def script(w: World) -> None:
        w.busy_since = w.now
        w.pass_time(119.0)
        w.dog.watch()
        assert w.ends == []
        w.pass_time(2.0)
        w.dog.watch()
        assert w.ends == ["dump", 70]

    play(World(), script)
    assert "rank 0: a step has not ended for 121.0 s" in caplog.text
    assert "in flight: step 7" in caplog.text


def test_a_loop_that_hangs_is_seen_by_the_watching_thread(caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    async def go() -> None:
        system = ActorSystem()
        duty = WatchdogConfig(
            contract=CONTRACT,
            model_name="m",
            max_len=1000,
            step_timeout_s=0.05,
        )
        dog = Watchdog(duty, WatchdogHooks(exit=end, dump=lambda: None, tick_s=0.01, watch_s=0.01))
        system.add(dog)
        running = asyncio.ensure_future(system.run())
        await settle()
        assert ended.wait(20)  # holds the loop
        system.stop()
        await running

    codes: list[int] = []
    uvloop.run(go())
    assert codes[0] == 70
    assert "rank 0: the event loop has not come round for" in caplog.text


def test_an_idle_runner_is_not_hung() -> None:
    async def script(w: World) -> None:
        w.pass_time(1000.0)
        w.dog.watch()
        assert w.ends == []

    play(World(), script)


def test_the_guard_of_the_loop_is_renewed_and_taken_back() -> None:
    world = World()

    async def script(w: World) -> None:
        w.pass_time(1.0)
        w.pass_time(1.0)
        assert w.guards == [125.0, 125.0]

    play(world, script)
    assert world.guards[-1] == 0.0


def test_the_guard_ends_a_process_whose_loop_hangs() -> None:
    code = (
        "from asyncllm.actors.watchdog_settings import guard_loop\n"
        "import threading\n"
        "guard_loop(0.05)\n"
        "threading.Event().wait(20)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env
    )
    assert done.returncode == 1
    assert "most recent call first" in done.stderr


def test_the_loops_lateness_is_measured() -> None:
    async def script(w: World) -> None:
        for late in (0.001, 0.002, 0.5):
            w.pass_time(0.1, late=late)
        w.tell(Scrape(1, 0))
        await settle()
        text = w.got("frontend", Scraped)[0].exposition.decode()
        assert 'asyncllm_loop_lag_seconds_count{endpoint="0"} 3.0' in text
        median = text.split("\nasyncllm_loop_lag_ms ")[1].split()[0]
        assert float(median) == pytest.approx(2)

    play(World(), script)


# -- drain -----------------------------------------------------------------------------------------


def test_drain_tells_everybody_and_ends_when_all_have_drained() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        await settle()
        w.tell(Drain(30.0))
        await settle()
        assert w.got("scheduler", Drain) == [Drain(30.0)]
        assert w.got("frontend", Drain) == [Drain(30.0)]
        assert w.sent_of(Drain) == [(2, "frontend")]
        w.tell(Drained("scheduler", 0))
        w.tell(Drained("frontend", 2))
        w.pass_time(29.0)
        await settle()
        assert not w.system.over
        w.tell(Drained("frontend", 0))
        await settle()
        assert w.system.over
        assert w.sent_of(Halt) == [(1, "watchdog"), (2, "watchdog")]
        assert w.got("scheduler", Drain) == [Drain(30.0)]

    play(trio(dead_after_s=1e6), script)


def test_a_drain_that_takes_too_long_aborts_then_halts() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        await settle()
        w.tell(Drain(30.0))
        await settle()
        w.tell(Drained("frontend", 2))
        await settle()
        w.pass_time(30.0)
        await settle()
        assert w.got("scheduler", Drain) == [Drain(30.0), Drain(0.0)]
        assert not w.system.over
        w.pass_time(1.9)
        assert not w.system.over
        w.pass_time(0.1)
        assert w.system.over
        assert w.sent_of(Halt) == [(1, "watchdog"), (2, "watchdog")]

    play(trio(dead_after_s=1e6), script)


def test_aborted_requests_that_are_answered_end_the_wait() -> None:
    async def script(w: World) -> None:
        w.tell(Drain(30.0))
        await settle()
        w.pass_time(30.0)
        w.tell(Drained("scheduler", 0))
        w.tell(Drained("frontend", 0))
        await settle()
        assert w.system.over

    play(World(), script)


def test_a_second_drain_halts_at_once() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        await settle()
        w.tell(Drain(30.0))
        w.tell(Drain(30.0))
        await settle()
        assert w.system.over
        assert w.sent_of(Halt) == [(1, "watchdog"), (2, "watchdog")]

    play(trio(), script)


def test_only_the_first_endpoint_drains() -> None:
    async def script(w: World) -> None:
        w.tell(Drain(30.0))
        w.tell(Drain(30.0))
        await settle()
        assert not w.system.over
        assert w.got("frontend", Drain) == []

    play(trio(endpoint=2), script)


def test_halt_stops_the_endpoint() -> None:
    async def script(w: World) -> None:
        w.tell(Halt())
        await settle()
        assert w.system.over

    play(trio(endpoint=1), script)


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", ["scheduler", "allocator", "runner"])
def test_a_scrape_is_answered_although_somebody_is_silent(
    silent: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(w: World) -> None:
        w.tell(Scrape(1, 0))
        await settle()
        w.fakes[silent].silent = True
        w.fakes["scheduler"].running = 3
        w.tell(Scrape(2, 0))
        await settle()
        w.pass_time(0.9)
        await settle()
        assert [s.query for s in w.got("frontend", Scraped)] == [1]
        w.pass_time(0.1)
        await settle()
        first, second = w.got("frontend", Scraped)
        assert b"asyncllm_silent_reporters 0.0" in first.exposition
        assert b"asyncllm_silent_reporters 1.0" in second.exposition
        running = 0.0 if silent == "scheduler" else 3.0
        assert second.loads == (replace(LOAD, running=int(running)),), "older ones, not zeros"
        assert f"asyncllm_requests_running {running}".encode() in second.exposition
        w.tell(Scrape(3, 0))  # the next one is asked again
        await settle()
        assert len(w.got(silent, Probe)) == 3

    play(World(), script)
    assert f"no numbers from {silent}@0 within 1 s" in caplog.text


def test_a_server_that_computes_nothing_has_metrics() -> None:
    async def script(w: World) -> None:
        w.tell(Scrape(1, 0))
        await settle()
        assert b"asyncllm_steps_total 0.0" in w.got("frontend", Scraped)[0].exposition
        assert not any(w.got(name, Probe) for name in w.fakes)

    play(World(topology=Topology((http_worker(0),))), script)


def test_groups_are_added_up_and_the_slowest_time_counts() -> None:
    state = gather(
        {
            0: [
                SchedulerStats(1, 0, 3, 2, 1, 9, 0, 50, 7, 77),
                AllocatorStats(1, 0, 30, 20, 100, 8, 16, 4),
                RunnerStats(1, 0, 5.0, 0.5, 0.1, 0),
            ],
            1: [
                SchedulerStats(1, 4, 1, 0, 2, 5, 1, 10, 3, 20),
                RunnerStats(1, 4, 4.0, 0.9, 0.2, 1),
            ],
        },
        silent=1,
    )
    assert state.groups[0].allocator == AllocatorStats(0, 0, 30, 20, 100, 8, 16, 4)
    assert state.groups[1] == StatsSnapshot(
        scheduler=SchedulerStats(0, 0, 1, 0, 2, 5, 1, 10, 3, 20),
        runner=RunnerStats(0, 0, 4.0, 0.9, 0.2, 1),
    )
    assert state == StatsSnapshot(
        scheduler=SchedulerStats(0, 0, 4, 2, 3, 14, 1, 60, 10, 97),
        allocator=AllocatorStats(0, 0, 30, 20, 100, 8, 16, 4),
        runner=RunnerStats(0, 0, 5.0, 0.9, 0.2, 1),
        silent_reporters=1,
        groups=state.groups,
    )


def two_groups() -> World:
    """One rank each, and an HTTP worker; the watchdog is that of the first."""
    return World(topology=Topology.on_one_node(tp=2, dp=2, http=2), dead_after_s=1e6)


def test_a_scrape_speaks_for_all_groups() -> None:
    async def script(w: World) -> None:
        w.fakes["scheduler"].running = 3
        w.tell(Scrape(41, 0))
        await settle()
        assert sorted(w.sent_of(Probe)) == [(1, "allocator"), (1, "runner"), (1, "scheduler")]
        assert w.got("frontend", Scraped) == []
        w.tell(SchedulerStats(1, 1, 4, 2, 1, 9, 0, 50, 7, 10))
        w.tell(AllocatorStats(1, 1, 5, 20, 50, 8, 16, 4))
        w.tell(RunnerStats(1, 1, 5.0, 0.5, 0.1, 0))
        await settle()
        (answer,) = w.got("frontend", Scraped)
        assert answer.loads == (
            LOAD,
            GroupLoad(used=5, expected=10, total=50, cached=20, running=4, waiting=2),
        )
        text = answer.exposition.decode()
        assert "asyncllm_requests_running 7.0" in text
        assert "asyncllm_kv_slots_total 150.0" in text
        for line in (
            'requests_running{group="0"} 3.0', 'requests_running{group="1"} 4.0',
            'steps_total{group="1"} 9.0', 'kv_slots_used{group="0"} 30.0',
        ):  # fmt: skip
            assert f"asyncllm_group_{line}" in text

    play(two_groups(), script)


def test_a_drain_waits_for_the_schedulers_of_all_groups() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        await settle()
        w.tell(Drain(30.0))
        await settle()
        assert sorted(w.sent_of(Drain)) == [(1, "scheduler"), (2, "frontend")]
        for who, endpoint in (("scheduler", 0), ("frontend", 0), ("frontend", 2)):
            w.tell(Drained(who, endpoint))
        await settle()
        assert not w.system.over
        w.tell(Drained("scheduler", 1))
        await settle()
        assert w.system.over

    play(two_groups(), script)


def test_the_balancer_and_all_schedulers_hear_of_a_worker_that_has_gone() -> None:
    async def script(w: World) -> None:
        w.tell(hello(1))
        w.tell(hello(2))
        await settle()
        w.tell(WorkerReplaced(2, http_worker(3)))
        await settle()
        assert (
            w.got("balancer", EndpointGone) == w.got("scheduler", EndpointGone) == [EndpointGone(2)]
        )
        assert w.sent_of(EndpointGone) == [(1, "scheduler")]

    play(two_groups(), script)


def test_a_scrape_gets_numbers_and_text() -> None:
    async def script(w: World) -> None:
        w.fakes["scheduler"].running = 3
        w.tell(RequestServed((("/generate", 200, 10, 5, "stop", 0.1, 0.01, 0.2),)))
        w.tell(Scrape(41, 0))
        await settle()
        (answer,) = w.got("frontend", Scraped)
        text = answer.exposition.decode()
        assert answer.query == 41
        assert answer.loads == (LOAD,)
        assert "asyncllm_kv_slots_used 30.0" in text
        assert "asyncllm_requests_running 3.0" in text
        assert "asyncllm_requests_waiting 2.0" in text
        assert "asyncllm_group_" not in text
        assert 'asyncllm_http_requests_total{route="/generate",status="200"} 1.0' in text
        assert 'asyncllm_mailbox_depth{actor="scheduler"} 0.0' in text
        assert "asyncllm_step_ms 5.0" in text

    play(World(), script)


def test_scrapes_at_once_share_a_probe_and_a_later_one_gets_a_fresh_one() -> None:
    async def script(w: World) -> None:
        w.fakes["runner"].silent = True
        w.tell(Scrape(1, 0))
        w.tell(Scrape(2, 2))
        await settle()
        assert w.got("scheduler", Probe) == [Probe(1)]
        w.fakes["scheduler"].running = 5  # after the answer to the first probe
        w.tell(Scrape(3, 0))
        await settle()
        assert w.got("scheduler", Probe) == [Probe(1)]
        w.fakes["runner"].silent = False
        w.fakes["runner"].answer(1)
        await settle()
        assert w.got("scheduler", Probe) == [Probe(1), Probe(2)]
        first, third = w.got("frontend", Scraped)
        assert (first.query, third.query) == (1, 3)
        assert b"asyncllm_requests_running 0.0" in first.exposition
        assert b"asyncllm_requests_running 5.0" in third.exposition
        assert w.sent_of(Scraped) == [(2, "frontend")]

    play(trio(), script)


def test_answers_to_an_old_probe_are_ignored() -> None:
    async def script(w: World) -> None:
        w.fakes["runner"].answer(7)
        w.fakes["runner"].silent = True
        w.tell(Scrape(1, 0))
        await settle()
        w.fakes["runner"].answer(0)
        await settle()
        assert w.got("frontend", Scraped) == []

    play(World(), script)


def test_a_line_is_logged_each_ten_seconds_when_busy(caplog: pytest.LogCaptureFixture) -> None:
    async def script(w: World) -> None:
        w.fakes["scheduler"].running = 4
        w.fakes["scheduler"].generated = 250
        w.pass_time(9.0)
        await settle()
        assert caplog.messages == []
        w.pass_time(1.0)
        await settle()
        assert caplog.messages == [
            "prompt 5.0 tok/s, generated 25.0 tok/s, running 4, waiting 2, "
            "KV used 30.0%, cached 20.0%, prefix hit 50.0%"
        ]
        assert w.got("frontend", Scraped) == []
        w.fakes["scheduler"].generated = 260
        w.pass_time(10.0)
        await settle()
        assert "generated 1.0 tok/s" in caplog.messages[1]

    caplog.set_level(logging.INFO, "asyncllm.actors.watchdog")
    play(World(), script)


def test_an_idle_server_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def script(w: World) -> None:
        w.fakes["scheduler"].waiting = w.fakes["scheduler"].prompt = 0
        w.pass_time(10.0)
        await settle()
        assert w.got("runner", Probe) == [Probe(1)]
        assert caplog.messages == []

    caplog.set_level(logging.INFO, "asyncllm.actors.watchdog")
    play(World(), script)
