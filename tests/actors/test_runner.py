"""Runner: order of plans, the waiter thread, failure and stop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from asyncllm.actors import runner as runner_module
from asyncllm.actors.base import Actor
from asyncllm.actors.runner import Runner
from asyncllm.actors.system import ActorSystem
from asyncllm.codec import i32
from asyncllm.core.request import SamplingParams
from asyncllm.errors import ActorCrashed, PlanOutOfOrder
from asyncllm.messages import Probe, RunnerStats, StepDone, StepFinished, StepPlan
from asyncllm.records import OpenedLane
from tests.actors.fake_device import FakeDevice


class Sink(Actor[Any]):
    """Keeps what it gets; ``arrived`` is set by each message. ``act`` runs from its start on."""

    def __init__(self, name: str, act: Callable[[], Coroutine[Any, Any, None]] | None = None):
        super().__init__(name)
        self.got: list[Any] = []
        self.arrived = asyncio.Event()
        self.act = act

    def started(self) -> None:
        if self.act:
            self.spawn(self.act())

    def receive(self, batch: list[Any]) -> None:
        self.got += batch
        self.arrived.set()


def plan(step: int) -> StepPlan:
    """Step ``step`` of a lane whose prompt is one token."""
    opened = [OpenedLane(0, 1, SamplingParams(max_new_tokens=99), i32([]))] if step == 1 else []
    token = 5 if step == 1 else -1
    columns = (i32([0]), i32([step - 1]), i32([1]), i32([0]), i32([step]), i32([token]))
    return StepPlan(step, 1, *columns, bytearray(b"\1"), opened)


def run(
    device: FakeDevice,
    act: Callable[[ActorSystem, Runner, Sink], Awaitable[None]],
    *,
    reports: bool = True,
) -> Sink:
    """Run one runner beside a scheduler that only listens, until ``act`` is through."""

    async def go() -> Sink:
        system = ActorSystem()
        runner = Runner(device, reports=reports)

        async def acting() -> None:
            await act(system, runner, sink)
            system.stop()

        sink = Sink("scheduler", acting)
        for actor in (Sink("watchdog"), runner, sink):
            system.add(actor)
        await asyncio.wait_for(system.run(), 60)
        return sink

    return uvloop.run(go())


def test_results_come_in_order() -> None:
    async def act(system: ActorSystem, runner: Runner, sink: Sink) -> None:
        for step in range(1, 6):
            system.ref("runner").tell(plan(step))
        while len(sink.got) < 5:
            sink.arrived.clear()
            await sink.arrived.wait()

    device = FakeDevice()
    sink = run(device, act)
    assert [msg.step for msg in sink.got] == [1, 2, 3, 4, 5]
    assert all(isinstance(msg, StepDone) for msg in sink.got)
    assert device.closed


@pytest.mark.parametrize("step", [1, 3], ids=["again", "gap"])
def test_a_plan_out_of_order_is_fatal(step: int) -> None:
    async def act(system: ActorSystem, runner: Runner, sink: Sink) -> None:
        system.ref("runner").tell(plan(1))
        system.ref("runner").tell(plan(step))
        await asyncio.Event().wait()

    with pytest.raises(PlanOutOfOrder, match=f"step plan {step} arrived after plan 1"):
        run(FakeDevice(), act)


def test_a_step_that_fails_on_the_device_ends_the_system() -> None:
    class ServerLost:
        gap_ms: float | None = None

        def wait(self) -> StepDone:
            raise RuntimeError("device lost")

    class Device(FakeDevice):
        def launch(self, plan: StepPlan) -> Any:
            return ServerLost()

    async def act(system: ActorSystem, runner: Runner, sink: Sink) -> None:
        system.ref("runner").tell(plan(1))
        await asyncio.Event().wait()

    device = Device()
    with pytest.raises(ActorCrashed, match="device lost"):
        run(device, act)
    assert device.closed


@pytest.mark.parametrize("reports", [True, False])
def test_the_oldest_unfinished_launch_is_known_on_each_rank(reports: bool) -> None:
    device = FakeDevice(gated=True)
    seen: list[float | None] = []
    told: list[str] = []
    runners: list[Runner] = []

    async def act(system: ActorSystem, runner: Runner, sink: Sink) -> None:
        runners.append(runner)
        seen.append(runner.busy_since())
        runner.receive([plan(1), plan(2)])
        seen.append(runner.busy_since())
        told.append(runner.in_flight())
        (first, entered), (second, then) = device.gates
        assert entered.wait(20)
        first.set()
        assert then.wait(20)  # the waiter is through with the first and waits for the second
        seen.append(runner.busy_since())
        second.set()

    sink = run(device, act, reports=reports)
    idle, first, second = seen
    assert idle is None
    assert first is not None
    assert second is not None
    assert first < second
    assert runners[0].busy_since() is None
    assert runners[0].in_flight() == ""
    assert told[0].startswith("step 1: 1 rows (1 decode), 1 tokens, lanes opened [0], ")
    assert "; step 2: 1 rows (1 decode), 1 tokens, 0." in told[0]
    if not reports:
        assert not sink.got


def test_a_hung_device_does_not_hang_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "JOIN_S", 0.05)
    device = FakeDevice(gated=True)
    threads: list[threading.Thread] = []

    async def act(system: ActorSystem, runner: Runner, sink: Sink) -> None:
        runner.receive([plan(1)])
        threads.append(runner._thread)

    run(device, act)
    (thread,) = threads
    assert thread.is_alive()
    assert thread.daemon
    assert not device.closed, "closing a hung device would hang as well"
    device.gates[0][0].set()  # done after the loop has been closed: nobody is told
    thread.join(20)
    assert not thread.is_alive()  # and pytest would report what it raised


def test_a_launch_that_fails_ends_the_system() -> None:
    class Device(FakeDevice):
        def launch(self, plan: StepPlan) -> Any:
            raise RuntimeError("no such kernel")

    async def act(system: ActorSystem, runner: Runner, sink: Sink) -> None:
        system.ref("runner").tell(plan(1))
        await asyncio.Event().wait()

    with pytest.raises(ActorCrashed, match="no such kernel"):
        run(Device(), act)


def test_a_probe_is_answered_with_times_and_compilations() -> None:
    async def go() -> list[Any]:
        system = ActorSystem()
        runner = Runner(FakeDevice(), reports=False, jit_after_warmup=lambda: 3)

        async def acting() -> None:
            system.ref("runner").tell(plan(1))
            system.ref("runner").tell(Probe(9))
            await watchdog.arrived.wait()
            system.stop()

        watchdog = Sink("watchdog", acting)
        for actor in (runner, watchdog):
            system.add(actor)
        await asyncio.wait_for(system.run(), 60)
        return watchdog.got

    (stats,) = uvloop.run(go())
    assert isinstance(stats, RunnerStats)
    assert (stats.query, stats.jit_after_warmup) == (9, 3)
    assert stats.launch_ms > 0
    assert stats.gap_ms == 0  # the fake device does not measure it


def test_kv_transfer_is_told_which_steps_are_over_on_followers_too() -> None:
    async def go() -> list[Any]:
        system = ActorSystem()
        runner = Runner(FakeDevice(), reports=False, transfers=True)

        async def acting() -> None:
            for step in (1, 2):
                system.ref("runner").tell(plan(step))
            while len(transfer.got) < 2:
                transfer.arrived.clear()
                await transfer.arrived.wait()
            system.stop()

        transfer = Sink("kv_transfer", acting)
        for actor in (runner, transfer):
            system.add(actor)
        await asyncio.wait_for(system.run(), 60)
        return transfer.got

    assert uvloop.run(go()) == [StepFinished(1), StepFinished(2)]
