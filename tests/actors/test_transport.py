"""The wire: order, early frames, foreign bytes, peers that do not read, full mailboxes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgpack
import pytest
import uvloop
import zmq

from asyncllm.actors import transport
from asyncllm.actors.base import Actor
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.transport import Transport
from asyncllm.codec import encode
from asyncllm.errors import ActorCrashed, PeerLost, StartupError
from asyncllm.messages import Heartbeat

Ipc = Callable[[int], list[str]]


class Sink(Actor[Heartbeat]):
    """Keeps what comes; stops its system at ``last``."""

    def __init__(self, last: int) -> None:
        super().__init__("sink")
        self.last, self.got = last, list[int]()

    def receive(self, batch: list[Heartbeat]) -> None:
        self.got += [msg.endpoint for msg in batch]
        if self.last in self.got:
            self.system.stop()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await main

    return uvloop.run(bounded())


def push(ctx: zmq.Context[zmq.Socket[bytes]], endpoint: str, *frames: bytes) -> None:
    sock = ctx.socket(zmq.PUSH)
    sock.connect(endpoint)
    for frame in frames:
        sock.send(frame)
    sock.close()


def frame(name: str, number: int, urgent: bool = False) -> bytes:
    return bytes(msgpack.packb((name, urgent))) + encode(Heartbeat(number))


def test_frames_arrive_once_and_in_order_even_from_before_the_start(ipc: Ipc) -> None:
    async def go() -> list[int]:
        sender = ActorSystem(1, ipc(2))
        sink = sender.ref("sink", 0)
        for i in range(3000):  # more than both high-water marks hold: the outbox is used
            sink.tell(Heartbeat(i))
        receiver = ActorSystem(0, ipc(2))
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
    "header alone": bytes(msgpack.packb(("sink", False))),
    "header of other types": bytes(msgpack.packb((1, 2))) + encode(Heartbeat(1)),
    "header of three": bytes(msgpack.packb(("sink", False, 1))) + encode(Heartbeat(1)),
    "header not a tuple": b"\x05" + encode(Heartbeat(1)),
    "endless header": b"\x92\xdb\x00\x10\x00\x00" + b"a" * 5000,
    "header not UTF-8": b"\x92\xa1\xff\xc2" + encode(Heartbeat(1)),
    "unknown tag": bytes(msgpack.packb(("sink", False))) + b"\x91\x7e",
    "too few fields": bytes(msgpack.packb(("sink", False))) + b"\x91\x1f",
    "broken body": bytes(msgpack.packb(("sink", False))) + b"\xc1",
}


@pytest.mark.parametrize("bad", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_frame_is_dropped_and_counted(bad: bytes, free_port: int) -> None:
    async def go() -> None:
        endpoint = f"tcp://127.0.0.1:{free_port}"
        system = ActorSystem(0, [endpoint])
        actor = Sink(7)
        system.add(actor)
        with zmq.Context() as ctx:
            push(ctx, endpoint, frame("sink", 6), bad, frame("sink", 7))
        await system.run()
        assert actor.got == [6, 7]
        assert system.foreign_frames == 1

    run(go())


def test_bytes_that_are_not_even_zmq_do_no_harm(free_port: int) -> None:
    async def go() -> None:
        endpoint = f"tcp://127.0.0.1:{free_port}"
        system = ActorSystem(0, [endpoint])
        actor = Sink(1)
        system.add(actor)
        running = asyncio.ensure_future(system.run())
        reader, writer = await asyncio.open_connection("127.0.0.1", free_port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
        writer.write_eof()
        await reader.read()
        writer.close()
        with zmq.Context() as ctx:
            push(ctx, endpoint, frame("sink", 1))
        await running
        assert actor.got == [1]

    run(go())


def test_a_remote_message_for_a_missing_name_is_a_dead_letter(ipc: Ipc) -> None:
    async def go() -> int:
        system = ActorSystem(0, ipc(1))
        system.add(Sink(1))
        with zmq.Context() as ctx:
            push(ctx, ipc(1)[0], frame("nobody", 0), frame("sink", 1))
        await system.run()
        return system.dead_letters

    assert run(go()) == 1


def test_a_remote_message_for_a_full_mailbox_ends_the_endpoint(ipc: Ipc) -> None:
    async def go() -> None:
        system = ActorSystem(0, ipc(1))
        actor = Sink(-1)
        actor.capacity = 2
        system.add(actor)
        with zmq.Context() as ctx:
            push(ctx, ipc(1)[0], *[frame("sink", i) for i in range(20)])
        await system.run()

    with pytest.raises(ActorCrashed, match=r"sink@0.*MailboxFull"):
        run(go())


def test_a_peer_that_does_not_read_is_lost(ipc: Ipc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "OUTBOX_LIMIT", 5)

    async def go() -> None:
        wire = Transport(0, ipc(2), lambda *_: None)
        try:
            for _ in range(5000):
                wire.send(1, "sink", False, b"x")
        finally:
            for out in wire._outs.values():
                out._sock.setsockopt(zmq.LINGER, 0)
            wire.close()

    with pytest.raises(PeerLost, match="endpoint 1"):
        run(go())


def test_a_peer_lost_in_a_handler_ends_the_endpoint_as_such(
    ipc: Ipc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "OUTBOX_LIMIT", 5)
    monkeypatch.setattr(transport, "LINGER_MS", 0)

    class Talker(Actor[Heartbeat]):
        vital = False  # even so: a message to a peer is lost

        def started(self) -> None:
            for i in range(5000):
                self.system.ref("sink", 1).tell(Heartbeat(i))

    async def go() -> None:
        system = ActorSystem(0, ipc(2))
        system.add(Talker("talker"))
        await system.run()

    with pytest.raises(PeerLost, match="endpoint 1"):
        run(go())


def test_an_address_in_use_is_a_startup_error(free_port: int) -> None:
    async def go() -> None:
        endpoints = [f"tcp://127.0.0.1:{free_port}"]
        first = ActorSystem(0, endpoints)
        with pytest.raises(StartupError, match=str(free_port)):
            ActorSystem(0, endpoints)
        first.stop()
        await first.run()
        again = ActorSystem(0, endpoints)  # and is free after the end
        again.stop()
        await again.run()

    run(go())


def test_what_was_told_just_before_stop_still_leaves(ipc: Ipc) -> None:
    async def go() -> list[int]:
        receiver = ActorSystem(0, ipc(2))
        actor = Sink(9)
        receiver.add(actor)
        sender = ActorSystem(1, ipc(2))
        sender.ref("sink", 0).tell(Heartbeat(9))
        sender.stop()
        await sender.run()
        await receiver.run()
        return actor.got

    assert run(go()) == [9]
