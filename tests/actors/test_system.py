"""Actors of one process: delivery, failure in its three circles, stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from asyncllm.actors import base
from asyncllm.actors import system as system_module
from asyncllm.actors.base import Actor, MailboxFull
from asyncllm.actors.system import ActorSystem
from asyncllm.errors import ActorCrashed, PeerLost, StartupError
from asyncllm.messages import Abort, EndpointGone, Halt, Started, StepFinished

Step = Callable[["Probe", Any], None]


class Probe(Actor[Any]):
    """Writes down its life; ``act`` says what a message makes it do."""

    def __init__(self, name: str, act: Step | None = None, *, vital: bool = True) -> None:
        super().__init__(name)
        self.act, self.vital = act, vital
        self.got: list[Any] = []
        self.life: list[str] = []

    def started(self) -> None:
        self.life.append("started")

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            self.got.append(msg)
            if self.act:
                self.act(self, msg)

    async def closing(self) -> None:
        self.life.append("closing")

    async def failing(self) -> None:
        self.life.append("failing")

    def stopped(self) -> None:
        self.life.append("stopped")


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await main

    return uvloop.run(bounded())


def boom(actor: Probe, msg: Any) -> None:
    """Halt stops the system, Abort is a crash."""
    if isinstance(msg, Halt):
        actor.system.stop()
    elif isinstance(msg, Abort):
        raise RuntimeError("boom")


@pytest.mark.parametrize("encode_local", [False, True])
def test_messages_of_one_sender_stay_in_order(encode_local: bool) -> None:
    async def go() -> Probe:
        system = ActorSystem(encode_local=encode_local)
        probe = Probe("probe", lambda p, m: p.system.stop() if m == EndpointGone(499) else None)
        ref = system.add(probe)
        for i in range(500):
            ref.tell(EndpointGone(i))
        await system.run()
        return probe

    probe = run(go())
    assert probe.got == [EndpointGone(i) for i in range(500)]
    assert probe.busy_s > 0
    assert probe.depth == 0


def test_encode_local_hands_over_a_copy() -> None:
    async def go(encode_local: bool) -> bool:
        system = ActorSystem(encode_local=encode_local)
        probe = Probe("probe", lambda p, m: p.system.stop())
        sent = EndpointGone(1)
        system.add(probe).tell(sent)
        await system.run()
        return probe.got[0] is sent

    assert run(go(False))
    assert not run(go(True))


def test_urgent_messages_are_never_refused_and_keep_their_place() -> None:
    async def go() -> list[Any]:
        system = ActorSystem()
        probe = Probe("probe", boom)
        probe.capacity = 2
        ref = system.add(probe)
        ref.tell(StepFinished(1))
        ref.tell(StepFinished(2))
        with pytest.raises(MailboxFull, match="probe"):
            ref.tell(StepFinished(3))
        ref.tell(Started())
        with pytest.raises(MailboxFull, match="probe"):
            ref.tell(StepFinished(3))
        ref.tell(Halt())
        assert probe.depth == 4
        await system.run()
        return probe.got

    assert run(go()) == [StepFinished(1), StepFinished(2), Started(), Halt()]


def test_a_full_mailbox_here_raises_at_the_teller() -> None:
    async def go() -> ActorSystem:
        system = ActorSystem()
        slow = Probe("slow")
        slow.capacity = 1

        def flood(actor: Probe, msg: Any) -> None:
            target = actor.system.ref("slow")
            target.tell(StepFinished(1))
            try:
                target.tell(StepFinished(2))
            except MailboxFull:
                actor.life.append("refused")
            actor.system.stop()

        teller = Probe("teller", flood)
        system.add(slow)
        system.add(teller).tell(Started())
        await system.run()
        assert "refused" in teller.life
        return system

    run(go())


def test_early_messages_wait_for_started() -> None:
    async def go() -> None:
        system = ActorSystem()
        late = Probe("late", boom)

        class Early(Actor[Any]):
            def started(self) -> None:
                self.system.ref("late").tell(Halt())
                assert late.life == []

        system.add(Early("early"))
        system.add(late)
        await system.run()
        assert late.got == [Halt()]

    run(go())


def test_a_message_for_a_name_that_is_gone_is_counted_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def go() -> int:
        system = ActorSystem()
        system.ref("nobody").tell(EndpointGone(1))
        system.stop()
        await system.run()
        return system.dead_letters

    assert run(go()) == 1
    assert "dead letter for nobody: EndpointGone" in caplog.text


def test_a_vital_crash_ends_the_system_with_its_cause() -> None:
    async def go() -> None:
        system = ActorSystem()
        probe, other = Probe("probe", boom), Probe("other")
        system.add(other)
        system.add(probe).tell(Abort(1))
        try:
            await system.run()
        finally:
            assert probe.life == ["started", "failing", "stopped"]  # no closing() after a crash
            assert other.life == ["started", "failing", "stopped"]

    with pytest.raises(ActorCrashed, match=r"probe@0.*boom") as raised:
        run(go())
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_a_crash_that_is_not_vital_ends_the_actor_once_and_makes_dead_letters() -> None:
    async def go() -> None:
        system = ActorSystem()
        weak, strong = Probe("weak", boom, vital=False), Probe("strong", boom)
        ref = system.add(weak)
        system.add(strong)

        def after(actor: Probe, msg: Any) -> None:
            if isinstance(msg, Started):  # weak has crashed by now
                ref.tell(EndpointGone(5))
                actor.system.ref("strong").tell(Halt())
            else:
                actor.system.stop()

        strong.act = after
        ref.tell(Abort(1))
        system.ref("strong").tell(Started())
        await system.run()
        assert weak.life == ["started", "stopped"]
        assert weak.got == [Abort(1)]
        assert system.dead_letters == 1
        assert [a.name for a in system.actors] == ["strong"]
        assert strong.life == ["started", "closing", "stopped"]

    run(go())


def test_what_waits_for_an_actor_that_crashed_is_a_dead_letter() -> None:
    def act(actor: Probe, msg: Any) -> None:
        actor.system.ref(actor.name).tell(EndpointGone(1))
        raise RuntimeError("boom")

    async def go() -> int:
        system = ActorSystem()
        system.add(Probe("weak", act, vital=False)).tell(Started())
        system.loop.call_later(0.01, system.stop)
        await system.run()
        return system.dead_letters

    assert run(go()) == 1


def test_spawned_work_of_a_crashed_actor_is_cancelled() -> None:
    async def until_cancelled() -> None:
        began, cancelled = asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        def act(actor: Probe, msg: Any) -> None:
            if isinstance(msg, Started):
                actor.spawn(wait())
            else:
                raise RuntimeError("boom")

        system = ActorSystem()
        system.add(Probe("weak", act, vital=False)).tell(Started())
        running = asyncio.ensure_future(system.run())
        await began.wait()
        system.ref("weak").tell(Abort(1))
        await cancelled.wait()
        assert not system.over
        system.stop()
        await running

    run(until_cancelled())


def test_a_crash_in_started_is_the_actors_and_startup_errors_pass() -> None:
    class Unfit(Probe):
        def started(self) -> None:
            super().started()
            raise self.error

        error: Exception

    async def go(error: Exception, vital: bool) -> Unfit:
        system = ActorSystem()
        actor = Unfit("unfit", vital=vital)
        actor.error = error
        system.add(actor)
        system.loop.call_soon(system.stop)
        try:
            await system.run()
        finally:
            assert actor.life == ["started", *["failing"] * vital, "stopped"]
        return actor

    run(go(RuntimeError("boom"), False))
    with pytest.raises(ActorCrashed, match="unfit@0"):
        run(go(RuntimeError("boom"), True))
    with pytest.raises(StartupError, match="port"):
        run(go(StartupError("port 80 is taken"), True))


def test_no_handler_runs_after_stop_or_crash() -> None:
    async def go(first: Any) -> list[Any]:
        system = ActorSystem()
        other = Probe("other")

        def act(actor: Probe, msg: Any) -> None:
            actor.system.ref("other").tell(EndpointGone(1))
            boom(actor, msg)

        class Waits(Probe):
            async def closing(self) -> None:
                await asyncio.sleep(0.01)

        system.add(Waits("probe", act)).tell(first)
        system.add(other)
        try:
            await system.run()
        except ActorCrashed:
            await asyncio.sleep(0.01)
        return other.got

    assert run(go(Halt())) == []
    assert run(go(Abort(1))) == []


def test_stop_closes_then_stops_in_reverse_order() -> None:
    order: list[str] = []

    class Named(Probe):
        async def closing(self) -> None:
            await asyncio.sleep(0)
            order.append(f"closing {self.name}")

        def stopped(self) -> None:
            order.append(f"stopped {self.name}")

    async def go() -> None:
        system = ActorSystem()
        for name in "abc":
            system.add(Named(name))
        system.stop()  # before run(): nothing starts
        await system.run()
        assert order == []
        system = ActorSystem()
        for name in "abc":
            system.add(Named(name, boom))
        system.ref("b").tell(Halt())
        await system.run()

    run(go())
    assert order == [f"{what} {name}" for what in ("closing", "stopped") for name in "cba"]


def test_a_closing_that_hangs_or_fails_does_not_keep_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(system_module, "CLOSING_S", 0.01)

    class Hangs(Probe):
        async def closing(self) -> None:
            await asyncio.Event().wait()

    class Fails(Probe):
        async def closing(self) -> None:
            raise RuntimeError("late")

        def stopped(self) -> None:
            super().stopped()
            raise RuntimeError("later")

    async def go() -> None:
        system = ActorSystem()
        actors = [Probe("first", boom), Hangs("hangs"), Fails("fails")]
        for actor in actors:
            system.add(actor)
        system.ref("first").tell(Halt())
        await system.run()
        assert [a.life[-1] for a in actors] == ["stopped"] * 3
        assert "closing" in actors[0].life

    run(go())
    assert "hangs@0 did not close" in caplog.text
    assert "fails@0 failed to stop" in caplog.text


def test_spawned_work_comes_back_as_a_message() -> None:
    async def work() -> Halt:
        await asyncio.sleep(0)
        return Halt()

    async def go() -> list[Any]:
        system = ActorSystem()
        probe = Probe("probe", lambda p, m: p.spawn(work()) if m == Started() else boom(p, m))
        system.add(probe).tell(Started())
        await system.run()
        return probe.got

    assert run(go()) == [Started(), Halt()]


def test_a_failure_in_spawned_work_is_the_actors() -> None:
    async def work() -> None:
        raise RuntimeError("in the background")

    async def go() -> None:
        system = ActorSystem()
        system.add(Probe("probe", lambda p, m: p.spawn(work()))).tell(Started())
        await system.run()

    with pytest.raises(ActorCrashed, match=r"probe@0.*in the background"):
        run(go())


def test_an_error_in_a_plain_callback_ends_the_system() -> None:
    async def go() -> None:
        system = ActorSystem()
        system.loop.call_soon(lambda: 1 / 0)
        await system.run()

    with pytest.raises(ActorCrashed, match="division"):
        run(go())


def test_what_ends_the_server_knowingly_is_one_line_without_stacks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where a timer finds it out: whoever ends the process logs what the error says."""

    def look() -> None:
        raise PeerLost("rank 1 has been silent")

    async def go() -> None:
        system = ActorSystem()
        system.loop.call_soon(look)
        await system.run()

    with pytest.raises(PeerLost, match="rank 1 has been silent"):
        run(go())
    assert not caplog.records


def test_an_error_of_one_connection_does_not(caplog: pytest.LogCaptureFixture) -> None:
    class Bad(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            raise RuntimeError("protocol bug")

    async def go() -> None:
        system = ActorSystem()
        system.add(Probe("probe", boom))
        server = await system.loop.create_server(Bad, "127.0.0.1", 0)

        async def client() -> None:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"x")
            assert await reader.read() == b""  # closed by the loop
            writer.close()
            server.close()
            system.ref("probe").tell(Halt())

        calling = asyncio.ensure_future(client())
        await system.run()
        await calling

    with caplog.at_level(logging.ERROR):
        run(go())
    assert "protocol bug" in caplog.text


def test_two_actors_of_one_name_are_refused() -> None:
    async def go() -> None:
        system = ActorSystem()
        system.add(Probe("probe"))
        with pytest.raises(ValueError, match="probe"):
            system.add(Probe("probe"))

    run(go())


def test_a_cancelled_run_stops_the_actors() -> None:
    async def go() -> list[str]:
        system = ActorSystem()
        probe = Probe("probe")
        system.add(probe)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(system.run(), 0.01)
        return probe.life

    assert run(go()) == ["started", "stopped"]


def test_the_longest_callback_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of receive, of what is spawned, and of what is awaited elsewhere in the actor's name. Its CPU
    time: one that waits for its core is not long."""
    cpu_s = waited_s = 1.0
    monkeypatch.setattr(base, "thread_time", lambda: cpu_s)
    monkeypatch.setattr(base, "perf_counter", lambda: cpu_s + waited_s)

    def use(seconds: float, waiting: float = 0) -> None:
        nonlocal cpu_s, waited_s
        cpu_s += seconds
        waited_s += waiting

    async def work(*turns: float) -> None:
        for turn in turns:
            use(turn)
            await asyncio.sleep(0)

    def act(probe: Probe, msg: Any) -> None:
        match msg:
            case EndpointGone(0):
                use(3)
            case EndpointGone(1):
                probe.spawn(work(1, 4, 2))
            case EndpointGone(2):
                use(1, waiting=9)

    async def go() -> list[float]:
        system = ActorSystem()
        probe = Probe("probe", act)
        ref = system.add(probe)
        running = asyncio.create_task(system.run())
        seen = []
        for i in range(3):
            ref.tell(EndpointGone(i))
            for _ in range(9):
                await asyncio.sleep(0)
            seen.append(probe.take_longest())
        await probe.timed(work(5, 2))
        seen += [probe.take_longest(), probe.take_longest()]
        late = asyncio.create_task(probe.timed(asyncio.sleep(60)))
        await asyncio.sleep(0)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        system.stop()
        await running
        return seen

    assert run(go()) == [3, 4, 1, 5, 0]


def test_after_a_failure_actors_have_last_words_of_bounded_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(system_module, "LAST_WORDS_S", 0.01)

    class Talker(Probe):
        async def failing(self) -> None:
            await super().failing()
            await asyncio.sleep(60)

    async def go() -> Talker:
        told: list[bool] = []
        system = ActorSystem()
        talker = Talker("talker")
        system.add(talker)
        system.on_failure = lambda: told.append(system.over)
        running = asyncio.ensure_future(system.run())
        await asyncio.sleep(0)
        system.fail(PeerLost("rank 1 has gone"))
        system.fail(PeerLost("another reason"))
        with pytest.raises(PeerLost, match="rank 1 has gone"):
            await asyncio.wait_for(running, 20)
        assert told == [True]
        return talker

    assert run(go()).life == ["started", "failing", "stopped"]
