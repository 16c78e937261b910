"""Servers of a cluster: who is let in, what is passed on, and who has gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import uvloop
import zmq
import zmq.asyncio

from asyncllm.actors import channel as channels
from asyncllm.actors.base import Actor
from asyncllm.actors.channel import FIRST_PEER, Channel
from asyncllm.actors.peer_messages import (
    PeerGoodbye,
    PeerHeartbeat,
    PeerHello,
    PeerInfo,
    PeerJoined,
    PeerLeft,
    PeerMessage,
    PeerRefused,
)
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.transport import CurveKeys, frame_head, known_to
from asyncllm.codec import Message, decode, encode, protocol
from asyncllm.errors import StartupError
from asyncllm.messages import Halt, StepFinished
from tests.actors.test_transport import run

KEYS = CurveKeys.make()
FACTS = (("model", "m1"), ("tokenizer", "t1"), ("max_req_total_len", "2048"))
DEAD_AFTER_S = 4.0
WAIT_S = 45.0


class Owner(Actor[PeerMessage | PeerJoined | PeerLeft | PeerRefused]):
    """Keeps what it is told."""

    foreign = frozenset({StepFinished})

    def __init__(self) -> None:
        super().__init__("owner")
        self.got: list[PeerMessage] = []
        self.joined: list[PeerJoined] = []
        self.left: list[PeerLeft] = []
        self.refused: list[PeerRefused] = []

    def receive(self, batch: list[PeerMessage | PeerJoined | PeerLeft | PeerRefused]) -> None:
        for msg in batch:
            match msg:
                case PeerMessage():
                    self.got.append(msg)
                case PeerJoined():
                    self.joined.append(msg)
                case PeerLeft():
                    self.left.append(msg)
                case PeerRefused():
                    self.refused.append(msg)

    def possible(self, msg: Message) -> bool:
        return not (isinstance(msg, PeerMessage) and msg.msg == StepFinished(66_666))

    @property
    def numbers(self) -> list[int]:
        return [each.msg.step for each in self.got if isinstance(each.msg, StepFinished)]


class End:
    """One server with an end of the channel."""

    def __init__(self, info: PeerInfo, *keys: CurveKeys) -> None:
        self.channel = Channel(info, keys or (KEYS,), DEAD_AFTER_S)
        self.system, self.owner = ActorSystem(), Owner()
        self.system.add(self.owner)
        self.system.use_channel(self.channel, "owner")

    @property
    def peer(self) -> int:
        return self.owner.joined[-1].peer

    def tell(self, number: int, name: str = "owner") -> None:
        self.system.ref(name, self.peer).tell(StepFinished(number))


def an_info(role: str = "prefill", **changes: object) -> PeerInfo:
    return replace(PeerInfo(role=role, name=f"{role}.example:1", facts=FACTS), **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def running(*ends: End) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(end.system.run()) for end in ends]
    try:
        yield
    finally:
        for end in ends:
            end.system.stop()
        await asyncio.gather(*tasks)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # it is about sockets: there is no event
            await asyncio.sleep(0.01)


class Raw:
    """Somebody who knows the key, and has no manners."""

    open: ClassVar[list[Raw]] = []

    def __init__(self, port: int, keys: CurveKeys = KEYS) -> None:
        self.open.append(self)
        self.ctx = zmq.asyncio.Context()
        self.sock = self.ctx.socket(zmq.DEALER)
        self.sock.setsockopt(zmq.LINGER, 0)
        known_to(self.sock, keys)
        self.sock.connect(f"tcp://127.0.0.1:{port}")

    async def say(self, msg: Message) -> None:
        await self.sock.send(frame_head(f"#{protocol()}") + encode(msg))

    async def hears(self, kind: type) -> Message:
        """The next message of the channel's own of this kind."""
        async with asyncio.timeout(WAIT_S):
            while True:
                frame = await self.sock.recv()
                head = frame_head(f"#{protocol()}")
                if frame.startswith(head) and isinstance(msg := decode(frame[len(head) :]), kind):
                    return msg

    async def greet(self, info: PeerInfo) -> Message:
        await self.say(PeerHello(info))
        return await self.hears(PeerHello)

    def close(self) -> None:
        self.ctx.destroy(0)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while Raw.open:
        Raw.open.pop().close()


def hub(**facts: object) -> End:
    end = End(an_info("pd_master", **facts))
    end.channel.listen("127.0.0.1", 0)
    return end


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_what_is_told_comes_once_in_order_both_ways_and_says_from_whom(host: str) -> None:
    async def go() -> None:
        one, two = End(an_info("pd_master")), End(an_info("prefill"))
        one.channel.listen("127.0.0.1" if host == "localhost" else host, 0)
        where = two.channel.dial(host, one.channel.port)
        async with running(one, two):
            await until(lambda: one.owner.joined and two.owner.joined)
            assert one.owner.joined[0].info == two.channel.info
            assert two.owner.joined == [PeerJoined(two.peer, one.channel.info, where)]
            assert one.peer >= FIRST_PEER
            for i in range(2000):  # more than the queues of ZeroMQ hold
                one.tell(i)
                two.tell(i)
            await until(lambda: len(one.owner.got) == len(two.owner.got) == 2000)
            for end in (one, two):
                assert end.owner.numbers == [*range(2000)]
                assert {each.peer for each in end.owner.got} == {end.peer}
                assert end.channel.waiting(end.peer) == 0
            two.system.stop()
            await until(lambda: one.owner.left)
            assert one.owner.left[0].why == "it hung up: it stops"
            one.tell(1)  # to nobody
            assert one.system.dead_letters == 1
            assert one.owner.refused == two.owner.refused == two.owner.left == []

    run(go())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"facts": (("tokenizer", "t2"),)},
            r"^tokenizer of prefill \S+ is t2, that of pd_master \S+ t1$",
        ),
        ({"role": "nobody"}, "^nobody is not wanted$"),
    ],
)
def test_who_does_not_fit_is_told_why_and_nobody_else_notices(
    changes: dict[str, object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        one, good, bad = hub(), End(an_info()), End(an_info(**changes))
        one.channel.admit = lambda info: "nobody is not wanted" if info.role == "nobody" else None
        for end in (good, bad):
            end.channel.dial("127.0.0.1", one.channel.port)
        async with running(one, good, bad):
            await until(lambda: bad.owner.refused and good.owner.joined)
            good.tell(7)
            await until(lambda: one.owner.got)
            assert [each.info.role for each in one.owner.joined] == ["prefill"]
            assert one.owner.left == bad.owner.joined == []
            with pytest.raises(StartupError, match=said):
                raise StartupError(bad.owner.refused[0].why)
            assert len(one.channel.peers) == 1

    run(go())
    assert sum("is not let in" in record.getMessage() for record in caplog.records) == 1


def test_facts_that_only_one_side_has_do_not_matter() -> None:
    ours = an_info(facts=(*FACTS, ("K/V layout", "int8kv")))
    assert ours.difference(an_info("pd_master")) is None
    assert an_info("config_server", facts=()).difference(ours) is None
    other = replace(ours, facts=(("K/V layout", "fp8kv_sph"), *FACTS))
    assert ours.difference(other) == ("K/V layout", "int8kv", "fp8kv_sph")


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        one = hub()
        async with running(one):
            raw = Raw(one.channel.port)
            await raw.sock.send(frame_head("#other") + b"whatever it means there")
            bye = await raw.hears(PeerGoodbye)
            assert bye == PeerGoodbye(f"its protocol is 'other', ours {protocol()!r}", True)
        assert one.owner.joined == []

    run(go())


MALFORMED = {
    "noise": b"\x00\x01\x02",
    "no message": frame_head("owner") + b"\xc1",
    "a message that the actor does not take": frame_head("owner") + encode(Halt()),
    "a message that nobody can mean": frame_head("owner") + encode(StepFinished(66_666)),
    "a second greeting": None,  # its protocol is known when all messages have been imported
}


@pytest.mark.parametrize("bad", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_message_of_a_peer_ends_its_connection_and_nothing_else(
    bad: bytes | None,
) -> None:
    greeting = frame_head(f"#{protocol()}") + encode(PeerHello(an_info()))

    async def go() -> None:
        one, other = hub(), End(an_info())
        other.channel.dial("127.0.0.1", one.channel.port)
        async with running(one, other):
            await until(lambda: one.owner.joined)
            peer = one.peer
            raw = Raw(one.channel.port)
            await raw.greet(an_info("decode"))
            await raw.sock.send(frame_head("owner") + encode(StepFinished(1)))
            await until(lambda: one.owner.got)
            await raw.sock.send(greeting if bad is None else bad)
            await raw.sock.send(frame_head("owner") + encode(StepFinished(2)))  # of nobody now
            assert not (await raw.hears(PeerGoodbye)).refused  # type: ignore[attr-defined]
            await until(lambda: one.owner.left and one.channel.foreign_frames)
            assert one.owner.left[0].info.role == "decode"
            assert one.owner.left[0].why.startswith("it sends what is not possible: ")
            other.tell(3)
            await until(lambda: len(one.owner.got) == 2)
            assert one.owner.numbers == [1, 3]
            assert one.owner.got[1].peer == peer
            assert [*one.channel.peers] == [peer]

    run(go())


def test_frames_of_those_who_have_not_said_who_they_are_are_dropped_and_counted() -> None:
    async def go() -> None:
        one = hub()
        async with running(one):
            raw = Raw(one.channel.port)
            await raw.sock.send(frame_head("owner") + encode(StepFinished(1)))
            await raw.say(PeerHeartbeat())
            await until(lambda: one.system.foreign_frames == 2)
            assert one.owner.got == one.owner.joined == []
            await raw.say(PeerGoodbye("go away", True))  # we have not asked to be let in
            stranger = Raw(one.channel.port, CurveKeys.make())
            await stranger.say(PeerHello(an_info()))
            await until(lambda: one.system.failed_handshakes)
            assert one.owner.joined == one.owner.refused == []

    run(go())


def test_who_is_killed_is_missed_at_once_and_who_is_stopped_after_half_of_the_time() -> None:
    async def go() -> None:
        one = hub()
        loop = asyncio.get_running_loop()
        async with running(one):
            killed, stopped = Raw(one.channel.port), Raw(one.channel.port)
            await killed.greet(an_info("killed"))
            await stopped.greet(an_info("stopped"))
            began = loop.time()
            killed.close()
            await until(lambda: one.owner.left)
            assert (one.owner.left[0].info.role, one.owner.left[0].why) == (
                "killed",
                "its connection is closed",
            )
            await until(lambda: len(one.owner.left) == 2)
            assert loop.time() - began >= DEAD_AFTER_S / 2 - 0.1
            assert one.owner.left[1].info.role == "stopped"
            assert "(--dead_after)" in one.owner.left[1].why
            await stopped.hears(PeerGoodbye)  # when it reads again

    run(go())


def test_a_server_that_comes_back_is_found_again_and_is_another_peer() -> None:
    async def go() -> None:
        one, two = hub(), End(an_info())
        port = one.channel.port
        two.channel.dial("127.0.0.1", port)
        async with running(two):
            async with running(one):
                await until(lambda: two.owner.joined)
                first = two.peer
            await until(lambda: two.owner.left)
            again = End(an_info("pd_master"))
            again.channel.listen("127.0.0.1", port)
            async with running(again):
                await until(lambda: len(two.owner.joined) == 2)
                infos = [each.info for each in two.owner.joined]
                assert two.peer != first
                assert infos[0].name == infos[1].name
                assert infos[0].incarnation != infos[1].incarnation
                two.channel.forget(two.owner.joined[1].dialled)
                await until(lambda: len(two.owner.left) == 2 and again.owner.left)
                assert not two.channel.peers

    run(go())


def test_a_call_that_is_cut_off_while_it_ends_does_not_keep_the_next_one_from_getting_in() -> None:
    async def go() -> None:
        one, two = hub(), End(an_info())
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as mute:
            mute.setblocking(False)
            where = two.channel.dial("127.0.0.1", mute.getsockname()[1])
            async with running(one, two):
                async with asyncio.timeout(WAIT_S):
                    taken, _ = await loop.sock_accept(mute)
                await until(lambda: two.channel._dials[where].call is not None)
                two.channel.forget(where)  # its greeting waits still: the socket lingers
                taken.close()
                two.channel.dial("127.0.0.1", one.channel.port)
                await until(lambda: two.owner.joined)

    run(go())


def test_each_secret_is_tried_and_a_wrong_one_finds_nobody() -> None:
    async def go() -> None:
        one, both, wrong = (
            hub(),
            End(an_info(), CurveKeys.make(), KEYS),
            End(an_info(), CurveKeys.make()),
        )
        for end in (both, wrong):
            end.channel.dial("127.0.0.1", one.channel.port)
        async with running(one, both, wrong):
            await until(lambda: both.owner.joined and one.system.failed_handshakes >= 3)
            assert wrong.owner.joined == wrong.owner.refused == []
            assert len(one.channel.peers) == 1

    run(go())


def test_a_name_that_leads_nowhere_is_looked_up_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    async def lookup(_: object, host: str, port: int, **options: object) -> list[tuple[Any, ...]]:
        asked.append(host)
        if len(asked) < 4:
            raise OSError("no address")
        return [(None, None, None, "", ("127.0.0.1", port))]

    monkeypatch.setattr(channels, "AGAIN_S", (0.02, 0.02))
    monkeypatch.setattr(channels, "BEAT_S", 0.02)
    monkeypatch.setattr(uvloop.Loop, "getaddrinfo", lookup)

    async def go() -> None:
        one, two = hub(), End(an_info(), CurveKeys.make(), KEYS)
        two.channel.dial("later.example", one.channel.port)
        async with running(one, two):
            await until(lambda: two.owner.joined)

    run(go())
    assert asked == ["later.example"] * 4
    assert "later.example" in caplog.text


def test_a_peer_that_does_not_read_is_dropped_and_blocks_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channels, "OUTBOX", (64, 1 << 20))

    async def go() -> None:
        one, other = hub(), End(an_info())
        other.channel.dial("127.0.0.1", one.channel.port)
        async with running(one, other):
            await until(lambda: one.owner.joined)
            reads = one.peer
            raw = Raw(one.channel.port)
            await raw.greet(an_info("decode"))
            deaf = one.peer
            body = frame_head("owner")
            for _ in range(1000):
                if not one.channel.knows(deaf):
                    break
                one.channel.send(deaf, "owner", body * 20_000)
            assert not one.channel.knows(deaf)
            one.system.ref("owner", reads).tell(StepFinished(5))
            await until(lambda: other.owner.got)
            assert one.owner.left[0].why.startswith("it does not read: ")

    run(go())


@pytest.mark.parametrize("full", [False, True])
def test_what_waits_for_a_peer_that_does_not_read_holds_up_nothing_of_others(
    monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """To try again to send is to take note of what has come, too, of which the loop is told once."""
    # a heartbeat also looks whether something has come
    monkeypatch.setattr(channels, "BEAT_S", 60.0)
    monkeypatch.setattr(channels, "BEATS", DEAD_AFTER_S / 60)

    def refuse(_: bytes) -> None:
        raise zmq.Again

    async def go() -> None:
        one = hub()
        async with running(one):
            deaf, other = Raw(one.channel.port), Raw(one.channel.port)
            await deaf.greet(an_info("decode"))
            link = one.channel._peers[one.peer]
            await other.greet(an_info("prefill"))
            await asyncio.sleep(0)
            sock = one.channel._listen_sock
            assert sock is not None
            other.sock.send(frame_head("owner") + encode(StepFinished(5)))
            assert sock.poll(20_000)  # the loop does nothing meanwhile
            assert one.owner.got == []
            if full:  # not even the goodbye finds room
                monkeypatch.setattr(link, "put", refuse)
                one.channel.drop(link.peer, "it does not read")
            else:
                link.box.push(b"x")
            await until(lambda: one.owner.numbers == [5])

    run(go())


def test_a_peer_that_is_killed_while_frames_wait_for_it_is_missed_and_nothing_else_happens() -> (
    None
):
    async def go() -> None:
        one = hub()
        async with running(one):
            raw = Raw(one.channel.port)
            await raw.greet(an_info("decode"))
            peer = one.peer
            while not one.channel.waiting(peer):
                one.channel.send(peer, "owner", bytes(100_000))
            raw.close()
            await until(lambda: one.owner.left)
            assert not one.system.over
            assert one.owner.left[0].why == "its connection is closed"

    run(go())


def test_an_actor_that_is_overrun_costs_only_the_peer() -> None:
    async def go() -> None:
        one = hub()
        one.owner.capacity = 4
        async with running(one):
            raw = Raw(one.channel.port)
            await raw.greet(an_info("decode"))
            for i in range(50):  # one wake of the loop takes them all
                await raw.sock.send(frame_head("owner") + encode(StepFinished(i)))
            await until(lambda: one.owner.left)
            assert one.owner.left[0].why.endswith("owner is overrun")

    run(go())


def test_a_busy_port_is_one_line() -> None:
    async def go() -> None:
        one = hub()
        other = Channel(an_info(), (KEYS,))
        with pytest.raises(StartupError, match=rf"cannot connect to 127.0.0.1:{one.channel.port}"):
            other.listen("127.0.0.1", one.channel.port)
        other.close()
        one.channel.close()

    run(go())
