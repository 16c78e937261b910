"""A prefill and a decode node as actors on a loop: requests move and lose nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
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
    BeginDecode,
    ExportKv,
    Finished,
    ImportKv,
    ImportPlaced,
    KvArrived,
    KvComputed,
    KvSent,
    StepFinished,
    Submit,
    Tokens,
)
from asyncllm.records import KvDestination, KvWireFormat
from tests.actors.fake_device import FakeDevice, check_ledger, oracle

WIRE = KvWireFormat(format="plain", dtype="fp32", num_layers=1, num_heads=1, head_bytes=8)
EOS = {3}


class Mover(Actor[Any]):
    """``kv_transfer`` of a node's one rank; what a step has computed goes when it is over."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__("kv_transfer")
        self.device, self.over = device, 0
        self.peer: Mover
        self.exports: dict[int, KvDestination] = {}
        self.waiting: list[KvComputed] = []
        self.imports: dict[int, ImportKv] = {}
        self.arrived: dict[int, int] = {}

    def started(self) -> None:
        self.scheduler = self.system.ref("scheduler")

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            match msg:
                case StepFinished(step):
                    assert step == self.over + 1
                    self.over = step
                case ExportKv(rid, to):
                    self.exports[rid] = to
                case KvComputed():
                    self.waiting.append(msg)
                case ImportKv():
                    self.imports[msg.rid], self.arrived[msg.rid] = msg, 0
        ready = [msg for msg in self.waiting if msg.step <= self.over]
        self.waiting = [msg for msg in self.waiting if msg.step > self.over]
        for msg in ready:
            assert all(self.device.written[slot] <= self.over for slot in msg.slots)
            entries = [self.device.store[slot] for slot in msg.slots]
            epoch = self.exports[msg.rid].epoch
            self.system.loop.call_soon(self.peer.write, epoch, msg.start, entries)
            self.scheduler.tell(KvSent(rid=msg.rid, rank=0, seq=msg.seq))

    def write(self, epoch: int, start: int, entries: list[tuple[int, int, int]]) -> None:
        wanted = self.imports[epoch]
        first = start - wanted.hit
        for slot, entry in zip(wanted.slots[first:], entries, strict=False):
            self.device.store[slot] = entry
        self.arrived[epoch] += len(entries)
        if self.arrived[epoch] == wanted.length - wanted.hit:
            self.scheduler.tell(KvArrived(epoch, 0))


class Agent(Actor[Any]):
    """Tells the master what comes."""

    def __init__(self, on: Callable[[Any], None]) -> None:
        super().__init__("agent")
        self.on = on

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            self.on(msg)


class Watchdog(Actor[Any]):
    def __init__(self) -> None:
        super().__init__("watchdog")

    def receive(self, batch: list[Any]) -> None:
        pass


class Node:
    """One that prefills or decodes."""

    def __init__(self, on: Callable[[Any], None], encode_local: bool) -> None:
        self.system = ActorSystem(encode_local=encode_local)
        self.device, self.slots = FakeDevice(eos=EOS), Allocator(2048)
        self.mover = Mover(self.device)
        runner = Runner(self.device, reports=True, transfers=True)
        for actor in (Agent(on), Watchdog(), self.slots, runner, self.mover):
            self.system.add(actor)
        core = SchedulerCore(
            num_lanes=16, num_slots=2048, batch_max_tokens=64, chunked_prefill_size=16,
            eos_ids=EOS, headroom=0,
        )  # fmt: skip
        self.scheduler = Scheduler(core, runners=[0], reader="agent", transfers=[0])
        self.ref = self.system.add(self.scheduler)


async def serve(asked: list[tuple[list[int], SamplingParams]], encode_local: bool) -> Any:
    """(tokens by request, prefill node, decode node); a request has its number as rid on both."""
    tokens: dict[int, list[int]] = {rid: [] for rid in range(len(asked))}
    left = set(tokens)

    def from_prefill(msg: Any) -> None:
        if isinstance(msg, Tokens):
            heard(msg)
        elif msg.reason is FinishReason.MOVED:
            d.ref.tell(BeginDecode(msg.rid, tokens[msg.rid][-1]))
        else:
            ended(msg)

    def from_decode(msg: Any) -> None:
        if isinstance(msg, ImportPlaced):
            prompt, params = asked[msg.rid]
            to = KvDestination(
                node="d", epoch=msg.rid, hit=msg.hit, length=msg.length, addresses=("",), wire=WIRE
            )
            p.ref.tell(Submit(rid=msg.rid, prompt=i32(prompt), params=params, exports=to))
        elif isinstance(msg, Tokens):
            heard(msg)
        else:
            ended(msg)

    def heard(msg: Tokens) -> None:
        for rid, token in zip(msg.rids, msg.tokens, strict=True):
            tokens[rid].append(token)

    def ended(msg: Finished) -> None:
        left.remove(msg.rid)
        if not left:
            p.system.stop()
            d.system.stop()

    p, d = Node(from_prefill, encode_local), Node(from_decode, encode_local)
    p.mover.peer, d.mover.peer = d.mover, p.mover
    for rid, (prompt, params) in enumerate(asked):
        d.ref.tell(Submit(rid=rid, prompt=i32(prompt), params=params, imports=True))
    await asyncio.wait_for(asyncio.gather(p.system.run(), d.system.run()), 60)
    return tokens, p, d


@pytest.mark.parametrize("encode_local", [False, True], ids=["objects", "frames"])
def test_a_crowd_is_prefilled_on_one_node_and_decoded_on_another(encode_local: bool) -> None:
    rng = random.Random(1)
    asked = [
        (
            [rng.randrange(50) for _ in range(rng.randint(1, 40))],
            SamplingParams(max_new_tokens=12, min_new_tokens=2, seed=i),
        )
        for i in range(24)
    ]
    tokens, p, d = uvloop.run(serve(asked, encode_local))
    for rid, (prompt, params) in enumerate(asked):
        assert tokens[rid] == oracle(prompt, params, 50, EOS)
    assert p.scheduler.core.generated_tokens == d.scheduler.core.moves.imports == len(asked)
    assert d.scheduler.core.prompt_tokens == 0
    for node in (p, d):
        check_ledger(node.slots.ledger)
