"""The wire: order, early frames, foreign bytes, peers that do not read, full mailboxes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import uvloop
import zmq

from asyncllm.actors import channel, kv_thread, transport
from asyncllm.actors.base import Actor
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.transport import HANDSHAKE_S, CurveKeys, Transport, TransportSettings
from asyncllm.codec import encode
from asyncllm.errors import ActorCrashed, PeerLost, StartupError
from asyncllm.messages import Halt, StepFinished
from asyncllm.topology import Topology, http_worker
from tests.raw import offer, push, raw

ZmqAddresses = Callable[[int], list[TransportSettings]]


class Sink(Actor[StepFinished]):
    """Keeps what comes; stops its system at ``last``."""

    remote = frozenset({StepFinished})

    def __init__(self, last: int) -> None:
        super().__init__("sink")
        self.last, self.got = last, list[int]()

    def receive(self, batch: list[StepFinished]) -> None:
        self.got += [msg.step for msg in batch]
        if self.last in self.got:
            self.system.stop()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await main

    return uvloop.run(bounded())


def frame(name: str, number: int) -> bytes:
    return bytes(msgpack.packb(name)) + encode(StepFinished(number))


def test_frames_arrive_once_and_in_order_even_from_before_the_start(wires: ZmqAddresses) -> None:
    async def go() -> list[int]:
        sender = ActorSystem(1, wires(2)[1])
        sink = sender.ref("sink", 0)
        for i in range(3000):  # more than both high-water marks hold: the outbox is used
            sink.tell(StepFinished(i))
        receiver = ActorSystem(0, wires(2)[0])
        actor = Sink(2999)
        actor.capacity = 10_000
        receiver.add(actor)
        running = asyncio.ensure_future(sender.run())
        await receiver.run()
        sender.stop()
        await running
        return actor.got

    assert run(go()) == list(range(3000))


FOREIGN = {
    "no msgpack": b"GET / HTTP/1.1\r\n\r\n",
    "empty": b"",
    "header alone": bytes(msgpack.packb("sink")),
    "header of another type": b"\x05" + encode(StepFinished(1)),
    "header of several": bytes(msgpack.packb(("sink", 1))) + encode(StepFinished(1)),
    "endless header": b"\xdb\x00\x10\x00\x00" + b"a" * 5000,
    "header not UTF-8": b"\xa1\xff" + encode(StepFinished(1)),
    "unknown tag": bytes(msgpack.packb("sink")) + b"\x91\x7e",
    "too few fields": bytes(msgpack.packb("sink")) + bytes([0x91, StepFinished.tag]),
    "broken body": bytes(msgpack.packb("sink")) + b"\xc1",
}


@pytest.mark.parametrize("bad", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_frame_is_dropped_and_counted(bad: bytes) -> None:
    async def go() -> None:
        keys = CurveKeys.make()
        system = ActorSystem(0, TransportSettings("tcp://127.0.0.1:*", keys))
        actor = Sink(7)
        system.add(actor)
        push(system.address, keys, [frame("sink", 6), bad, frame("sink", 7)])
        await system.run()
        assert actor.got == [6, 7]
        assert system.foreign_frames == 1

    run(go())


def test_foreign_frames_are_one_line_a_minute(
    wires: ZmqAddresses, caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        wire = wires(1)[0]
        system = ActorSystem(0, wire)
        system.add(Sink(7))
        letters = [frame("nobody", i) for i in range(30)]
        push(wire.address, wire.keys, [*[b"x"] * 50, *letters, frame("sink", 7)])
        await system.run()
        assert (system.foreign_frames, system.dead_letters) == (50, 30)

    run(go())
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "foreign frame dropped",
        "dead letter for nobody",
    ]


def test_a_message_that_is_not_for_other_processes_is_dropped(wires: ZmqAddresses) -> None:
    async def go() -> list[int]:
        wire = wires(1)[0]
        system = ActorSystem(0, wire)
        actor = Sink(7)
        system.add(actor)
        halt = bytes(msgpack.packb("sink")) + encode(Halt())
        push(wire.address, wire.keys, [halt, frame("sink", 7)])
        await system.run()
        assert system.foreign_frames == 1
        return actor.got

    assert run(go()) == [7]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "ipc"])
@pytest.mark.parametrize("keys", [None, CurveKeys.make()], ids=["no keys", "other keys"])
def test_who_has_not_the_keys_is_not_heard(
    wires: ZmqAddresses, address: str, keys: CurveKeys | None
) -> None:
    """Strangers go on sending until one of us has been heard."""

    async def go() -> list[int]:
        wire = wires(1)[0]
        if address != "ipc":
            wire = TransportSettings(address, wire.keys)
        system = ActorSystem(0, wire)
        actor = Sink(7)
        system.add(actor)
        running = asyncio.ensure_future(system.run())
        with raw(system.address, keys) as sock:
            for i in range(20):
                offer(sock, frame("sink", 100 + i))
                await asyncio.sleep(0.02)
            push(system.address, wire.keys, [frame("sink", 7)])
            await running
        assert system.foreign_frames == 0
        return actor.got

    assert run(go()) == [7]


def test_bytes_that_are_not_even_zmq_do_no_harm() -> None:
    async def go() -> None:
        keys = CurveKeys.make()
        system = ActorSystem(0, TransportSettings("tcp://127.0.0.1:*", keys))
        actor = Sink(1)
        system.add(actor)
        running = asyncio.ensure_future(system.run())
        port = int(system.address.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(OSError):  # the server may have hung up at any byte of this
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
            writer.write_eof()
            await reader.read()
        writer.close()
        push(system.address, keys, [frame("sink", 1)])
        await running
        assert actor.got == [1]

    run(go())


def test_a_peer_may_come_later_and_another_may_take_its_place(wires: ZmqAddresses) -> None:
    async def go() -> tuple[list[int], list[int]]:
        keys = CurveKeys.make()
        sender = ActorSystem(0, TransportSettings("tcp://127.0.0.1:*", keys))
        sender.ref("sink", 1).tell(StepFinished(0))
        assert sender.dead_letters == 1  # nobody is there
        got = []
        for last in (1, 2):
            receiver = ActorSystem(last, TransportSettings("tcp://127.0.0.1:*", keys))
            actor = Sink(last)
            receiver.add(actor)
            worker = replace(http_worker(last), address=receiver.address)
            sender.join(sender.topology.replaced(last - 1 or -1, worker))
            sink = sender.ref("sink", last)
            sink.tell(StepFinished(last))
            await receiver.run()
            got.append(actor.got)
            sink.tell(StepFinished(9))  # the other has gone; nobody else gets it
        sender.join(sender.topology.replaced(2, None))
        sink.tell(StepFinished(0))
        assert sender.dead_letters == 2
        with pytest.raises(ValueError, match="nonsense"):
            sender.join(sender.topology.replaced(2, replace(worker, id=3, address="nonsense")))
        sender.stop()
        await sender.run()
        return got[0], got[1]

    assert run(go()) == ([1], [2])


def test_a_remote_message_for_a_missing_name_is_a_dead_letter(wires: ZmqAddresses) -> None:
    async def go() -> int:
        system = ActorSystem(0, wires(1)[0])
        system.add(Sink(1))
        wire = wires(1)[0]
        push(wire.address, wire.keys, [frame("nobody", 0), frame("sink", 1)])
        await system.run()
        return system.dead_letters

    assert run(go()) == 1


def test_a_remote_message_for_a_full_mailbox_ends_the_endpoint(wires: ZmqAddresses) -> None:
    async def go() -> None:
        system = ActorSystem(0, wires(1)[0])
        actor = Sink(-1)
        actor.capacity = 2
        system.add(actor)
        wire = wires(1)[0]
        push(wire.address, wire.keys, [frame("sink", i) for i in range(20)])
        await system.run()

    with pytest.raises(ActorCrashed, match=r"sink@0.*MailboxFull"):
        run(go())


def test_a_peer_that_does_not_read_is_lost(
    wires: ZmqAddresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "OUTBOX_LIMIT", 5)

    async def go() -> None:
        wire = Transport(wires(2)[0], lambda *_: None)
        try:
            for _ in range(5000):
                wire.send(1, "sink", b"x")
        finally:
            for out in wire._outs.values():
                out._sock.setsockopt(zmq.LINGER, 0)
            wire.close()

    with pytest.raises(PeerLost, match="endpoint 1"):
        run(go())


def test_a_peer_lost_in_a_handler_ends_the_endpoint_as_such(
    wires: ZmqAddresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "OUTBOX_LIMIT", 5)
    monkeypatch.setattr(transport, "LINGER_MS", 0)

    class Talker(Actor[StepFinished]):
        vital = False  # even so: a message to a peer is lost

        def started(self) -> None:
            for i in range(5000):
                self.system.ref("sink", 1).tell(StepFinished(i))

    async def go() -> None:
        system = ActorSystem(0, wires(2)[0])
        system.add(Talker("talker"))
        await system.run()

    with pytest.raises(PeerLost, match="endpoint 1"):
        run(go())


def test_a_worker_that_does_not_read_costs_only_itself(
    wires: ZmqAddresses, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transport, "OUTBOX_LIMIT", 5)
    monkeypatch.setattr(transport, "LINGER_MS", 0)
    given_up: list[int] = []

    class Talker(Actor[StepFinished]):
        def started(self) -> None:
            for i in range(5000):
                self.system.ref("sink", 1).tell(StepFinished(i))
            self.system.stop()

    async def go() -> None:
        wire = wires(2)[0]
        workers = (http_worker(0), replace(http_worker(1), address=wire.peers[1]))
        system = ActorSystem(0, wire, topology=Topology(workers))
        system.on_overrun = given_up.append
        system.add(Talker("talker"))
        await system.run()
        assert given_up == [1]
        assert 0 < system.dead_letters < 5000

    run(go())
    assert "HTTP worker 1 is given up: endpoint 1 does not read" in caplog.text


def test_idle_connections_are_kept_alive(wires: ZmqAddresses) -> None:
    async def go() -> None:
        wire = Transport(wires(2)[0], lambda *_: None)
        for sock in (wire._in, *(out._sock for out in wire._outs.values())):
            assert sock.get(zmq.TCP_KEEPALIVE) == 1
            assert sock.get(zmq.TCP_KEEPALIVE_IDLE) == 60
        wire.close()

    run(go())


def test_an_address_in_use_is_a_startup_error() -> None:
    async def go() -> None:
        keys = CurveKeys.make()
        first = ActorSystem(0, TransportSettings("tcp://127.0.0.1:*", keys))
        again = TransportSettings(first.address, keys)
        with pytest.raises(StartupError, match=first.address):
            ActorSystem(0, again)
        first.stop()
        await first.run()
        system = ActorSystem(0, again)  # and is free after the end
        system.stop()
        await system.run()

    run(go())


def test_what_was_told_just_before_stop_still_leaves(wires: ZmqAddresses) -> None:
    async def go() -> list[int]:
        receiver = ActorSystem(0, wires(2)[0])
        actor = Sink(9)
        receiver.add(actor)
        sender = ActorSystem(1, wires(2)[1])
        sender.ref("sink", 0).tell(StepFinished(9))
        sender.stop()
        await sender.run()
        await receiver.run()
        return actor.got

    assert run(go()) == [9]


@pytest.mark.parametrize(
    ("bound", "advertised"), [("[::1]", "::1"), ("127.0.0.1", "localhost"), ("127.0.0.1", "")]
)
def test_others_dial_what_is_advertised_by_name_or_address(bound: str, advertised: str) -> None:
    async def main() -> None:
        keys = CurveKeys.make()
        there = ActorSystem(1, TransportSettings(f"tcp://{bound}:*", keys, advertised=advertised))
        there.add(sink := Sink(last=7))
        host = f"[{advertised}]" if ":" in advertised else advertised or bound
        assert there.address.startswith(f"tcp://{host}:")
        here = ActorSystem(0, TransportSettings("tcp://127.0.0.1:*", keys, {1: there.address}))
        here.ref("sink", 1).tell(StepFinished(7))
        await there.run()
        assert sink.got == [7]
        here.close()

    run(main())


def test_who_hangs_up_or_speaks_something_else_is_a_stranger_when_his_time_is_over() -> None:
    async def go() -> None:
        now, came = 100.0, asyncio.Event()
        keys = CurveKeys.make()
        door = Transport(TransportSettings("tcp://127.0.0.1:*", keys), lambda *_: came.set())
        door._failed_handshakes._clock = lambda: now
        door.start()
        where = ("127.0.0.1", int(door.address.rpartition(":")[2]))
        with socket.create_connection(where, timeout=20) as stranger:
            assert stranger.recv(1000)  # how ZeroMQ greets everybody
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        push(door.address, keys, [frame("sink", 1)])
        await came.wait()
        while door.failed_handshakes + len(door._failed_handshakes._accepted) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # libzmq may call it failed at once, or not at all
        now += 3 * HANDSHAKE_S
        assert door.failed_handshakes == 1
        door.close()

    run(go())


@pytest.mark.parametrize(
    "limit",
    [kv_thread.bounds, lambda sock: channel._bounds(sock, "127.0.0.1")],
    ids=["K/V", "channel"],
)
def test_connections_that_were_cut_off_are_found_by_tcp(limit: Callable[[Any], None]) -> None:
    # not by ZeroMQ's heartbeat: it aborts the process if a connection with a full queue has ended
    with raw("tcp://127.0.0.1:1", None, zmq.ROUTER) as sock:
        limit(sock)
        assert sock.getsockopt(zmq.HEARTBEAT_IVL) <= 0
        assert sock.getsockopt(zmq.TCP_KEEPALIVE) == 1
        assert 0 < sock.getsockopt(zmq.TCP_MAXRT) <= 20_000
