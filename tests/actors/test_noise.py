"""Random bytes, and mutated frames, at the ports where actors are told something."""

from __future__ import annotations

import random
from typing import Any

import pytest
import zmq

from asyncllm.actors.base import Actor
from asyncllm.actors.channel import Channel
from asyncllm.actors.peer_messages import PeerHeartbeat, PeerHello, PeerMessage
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.transport import CurveKeys, TransportSettings, frame_head
from asyncllm.codec import encode, protocol
from asyncllm.messages import StepFinished
from tests.actors.test_channel import End, an_info, running, until
from tests.actors.test_transport import run
from tests.raw import mutated, offer, push, raw, scream

ROUNDS = 200
HONEST = 10**12  # numbers that no mutation comes upon


class Keeper(Actor[Any]):
    """Keeps what comes, from whomever."""

    remote = foreign = frozenset({StepFinished})

    def __init__(self) -> None:
        super().__init__("owner")
        self.got: list[int] = []
        self.told = 0

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            self.told += 1
            msg = msg.msg if isinstance(msg, PeerMessage) else msg
            if isinstance(msg, StepFinished) and msg.step >= HONEST:
                self.got.append(msg.step)


class Door(End):
    """A port of one of two kinds, and an honest process that tells it something."""

    def __init__(self, kind: str) -> None:
        self.keys = CurveKeys.make()
        self.wired = kind == "messages"
        if self.wired:
            self.system = ActorSystem(0, TransportSettings("tcp://127.0.0.1:*", self.keys))
            self.port, self.sort = int(self.system.address.rpartition(":")[2]), zmq.PUSH
        else:
            self.channel = Channel(an_info("pd_master"), (self.keys,))
            self.channel.listen("127.0.0.1", 0)
            self.system = ActorSystem()
            self.system.use_channel(self.channel, "owner")
            self.port, self.sort = self.channel.port, zmq.DEALER
            self.honest = End(an_info("decode"), self.keys)
            self.honest.channel.dial("127.0.0.1", self.port)
        self.keeper = Keeper()
        self.system.add(self.keeper)
        self.address = f"tcp://127.0.0.1:{self.port}"

    async def hears(self, number: int) -> None:
        """What the honest one says comes through."""
        said = HONEST + number
        if self.wired:
            push(self.address, self.keys, [frame_head("owner") + encode(StepFinished(said))])
        else:
            await until(lambda: self.honest.owner.joined)
            self.honest.tell(said)
        await until(lambda: self.keeper.got and self.keeper.got[-1] == said)

    def assail(self, draw: random.Random, keys: CurveKeys | None) -> None:
        """Mutated frames and random ones, from several sockets."""
        control = frame_head(f"#{protocol()}")
        valid = [
            control + encode(PeerHello(an_info())),
            control + encode(PeerHeartbeat()),
            frame_head("owner") + encode(StepFinished(1)),
        ]
        for _ in range(4):
            with raw(self.address, keys, self.sort, linger_ms=500) as sock:
                if draw.random() < 0.5:
                    offer(sock, valid[0])  # and is let in, with the key
                for _ in range(ROUNDS // 4):
                    offer(sock, *mutated(draw, [draw.choice(valid)]))
                    offer(sock, draw.randbytes(draw.randint(0, 99)))


@pytest.mark.parametrize("kind", ["messages", "channel"])
def test_noise_reaches_no_actor_without_the_key_and_harms_nobody_with_it(kind: str) -> None:
    async def go() -> None:
        draw, door = random.Random(7), Door(kind)
        async with running(*([door] if door.wired else [door, door.honest])):
            await door.hears(1)
            told = door.keeper.told
            scream("127.0.0.1", door.port, draw, 20)
            for keys in (None, CurveKeys.make()):
                door.assail(draw, keys)
            await door.hears(2)
            assert door.keeper.told == told + 1
            assert door.system.foreign_frames == 0
            await until(lambda: door.system.failed_handshakes)
            door.assail(draw, door.keys)
            await until(lambda: door.system.foreign_frames > ROUNDS // 2)
            await door.hears(3)
            assert door.keeper.got == [HONEST + i for i in (1, 2, 3)]
            if not door.wired:
                assert door.honest.owner.left == []

    run(go())
