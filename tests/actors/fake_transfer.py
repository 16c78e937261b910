"""K/V that move between two worlds, and a master that makes requests of theirs one.

Each rank of a server has a part of every token's K/V: here, positions that are its number modulo
the ranks. What a slot gets and from which one it is read is checked against who holds it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from asyncllm.codec import i32
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.messages import (
    Abort,
    BeginDecode,
    CancelTransfer,
    ExportKv,
    Finished,
    ImportKv,
    ImportPlaced,
    KvArrived,
    KvComputed,
    KvSent,
    StepFinished,
    StopHit,
    Submit,
    Tokens,
    TransferFailed,
)
from asyncllm.records import KvDestination, KvWireFormat
from tests.actors.fake_device import World

RANKS = 2
WIRE = KvWireFormat(
    format="plain", dtype="fp32", num_layers=1, num_heads=RANKS, head_bytes=8, tp=RANKS
)


@dataclass
class Page:
    """K/V on their way: label, and position -> what it holds."""

    epoch: int
    entries: dict[int, Any]


@dataclass(eq=False)
class FakeRank:
    """``kv_transfer`` of one rank."""

    world: World
    rank: int
    over: int = 0
    exports: dict[int, KvDestination] = field(default_factory=dict)
    computed: dict[tuple[int, int], KvComputed] = field(default_factory=dict)  # not sent yet
    imports: dict[int, ImportKv] = field(default_factory=dict)
    missing: dict[int, set[int]] = field(default_factory=dict)  # positions, by epoch
    seqs: dict[int, int] = field(default_factory=dict)  # the next one, by rid
    left: dict[int, int] = field(default_factory=dict)  # positions to be sent, by rid
    early: list[Page] = field(default_factory=list)  # of epochs that this rank has not heard of
    heard: set[int] = field(default_factory=set)

    def say(self, msg: Any) -> None:
        self.world.tell(msg)

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            match msg:
                case StepFinished(step):
                    assert step == self.over + 1
                    self.over = step
                case ExportKv(rid, to):
                    assert rid not in self.exports
                    self.exports[rid] = to
                    self.left[rid] = to.length - to.hit
                case KvComputed():
                    self._computed(msg)
                case ImportKv():
                    assert msg.rid not in self.imports
                    self.imports[msg.rid] = msg
                    mine = range(msg.hit, msg.length)
                    self.missing[msg.rid] = {i for i in mine if i % RANKS == self.rank}
                    self.heard.add(msg.rid)
                    self.finish(msg.rid)
                    pages, self.early = self.early, []
                    for page in pages:
                        self.take(page)
                case CancelTransfer(rid):
                    self._forget(rid)
                case _:
                    raise AssertionError(msg)

    def _computed(self, msg: KvComputed) -> None:
        if (to := self.exports.get(msg.rid)) is None:
            self.say(KvSent(rid=msg.rid, rank=self.rank, seq=msg.seq))
            return
        assert to.hit <= msg.start < msg.start + len(msg.slots) <= to.length
        assert msg.seq == self.seqs.get(msg.rid, 0)
        self.seqs[msg.rid] = msg.seq + 1
        self.computed[msg.rid, msg.seq] = msg

    def _forget(self, rid: int) -> None:
        if self.exports.pop(rid, None) is not None:
            for key in [key for key in self.computed if key[0] == rid]:
                del self.computed[key]
                self.say(KvSent(rid=rid, rank=self.rank, seq=key[1]))
        if self.imports.pop(rid, None) is not None:
            del self.missing[rid]
            self.say(TransferFailed(rid, self.rank))

    def sendable(self) -> list[tuple[int, int]]:
        return [key for key, msg in self.computed.items() if msg.step <= self.over]

    def send(self, key: tuple[int, int]) -> tuple[int, Page]:
        """Read a part that is ready: its epoch's page."""
        msg = self.computed.pop(key)
        to = self.exports[msg.rid]
        entries = {}
        for position, slot in enumerate(msg.slots, msg.start):
            assert slot not in set(self.world.ledger.pool.free), "read from a slot that is free"
            entry = self.read(slot, position)
            if position % RANKS == self.rank:
                entries[position] = entry
        self.left[msg.rid] -= len(msg.slots)
        if not self.left[msg.rid]:
            del self.exports[msg.rid]
        self.say(KvSent(rid=msg.rid, rank=self.rank, seq=msg.seq))
        return self.rank, Page(to.epoch, entries)

    def read(self, slot: int, position: int) -> Any:
        """What a slot holds."""
        device = self.world.device
        assert device.written[slot] <= self.over, "read before it was written"
        assert device.store[slot][0] == position
        return device.store[slot]

    def write(self, slot: int, entry: Any) -> None:
        self.world.device.store[slot] = entry

    def take(self, page: Page) -> None:
        """What is labelled with the epoch of an import that is wanted goes into its slots."""
        if page.epoch not in self.heard:
            self.early.append(page)
            return
        if (wanted := self.imports.get(page.epoch)) is None:
            return
        free, tree = set(self.world.ledger.pool.free), set(in_tree(self.world))
        for position, entry in page.entries.items():
            slot = wanted.slots[position - wanted.hit]
            assert slot not in free | tree, "written into a slot of somebody else"
            self.write(slot, entry)
            self.missing[page.epoch].discard(position)
        self.finish(page.epoch)

    def finish(self, epoch: int) -> None:
        if not self.missing[epoch]:
            del self.imports[epoch], self.missing[epoch]
            self.say(KvArrived(epoch, self.rank))

    def lapse(self, epoch: int) -> None:
        """Of its own accord."""
        del self.imports[epoch], self.missing[epoch]
        self.say(TransferFailed(epoch, self.rank, "nothing comes"))


def in_tree(world: World) -> Iterable[int]:
    stack = [world.ledger.tree.root]
    while stack:
        node = stack.pop()
        yield from node.slots
        stack += node.children.values()


@dataclass
class Client:
    """A request as its client sees it, and its attempt of the moment."""

    prompt: list[int]
    params: SamplingParams
    stop_after: int = 0
    thoughts: str = ""
    healed: tuple[bytes, ...] = ()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    here: int = -1  # rid on the prefill node; -1: none
    there: int = -1
    end: Finished | None = None
    attempts: int = 0


class Pair:
    """A prefill node, a decode node, and the master: the test says who acts when."""

    def __init__(
        self, rng: random.Random, p: World, d: World, rank: type[FakeRank] = FakeRank
    ) -> None:
        self.rng, self.p, self.d = rng, p, d
        self.ranks = {id(world): [rank(world, i) for i in range(RANKS)] for world in (p, d)}
        self.pages: list[tuple[int, Page]] = []
        self.clients: list[Client] = []
        self.of: dict[tuple[int, int], Client] = {}  # by world and rid
        self.ended: set[tuple[int, int]] = set()
        self.next_rid = 0
        self.lapses = 0.0  # how likely an import lapses, at any moment
        for world in (p, d):
            world.actors["kv_transfer"] = partial(self._move, world)
            world.actors["agent"] = partial(self._hear, world)

    def _move(self, world: World, rank: int, batch: list[Any]) -> None:
        self.ranks[id(world)][rank].receive(batch)

    def _hear(self, world: World, _: int, batch: list[Any]) -> None:
        for msg in batch:
            self.heard(world, msg)

    # the master

    def ask(self, client: Client) -> None:
        self.clients.append(client)
        self.attempt(client)

    def attempt(self, client: Client) -> None:
        client.attempts += 1
        left = (client.params.max_new_tokens or 0) - len(client.tokens)
        if left > 1:
            client.there = self._submit(self.d, client, imports=True)
        else:
            client.here = self._submit(self.p, client)

    def _submit(self, world: World, client: Client, **how: Any) -> int:
        self.next_rid += 1
        msg = Submit(
            rid=self.next_rid, prompt=i32(client.prompt), params=client.params,
            thoughts=client.thoughts, healed=client.healed, outputs=i32(client.tokens), **how,
        )  # fmt: skip
        self.of[id(world), msg.rid] = client
        world.tell(msg)
        return msg.rid

    def drop(self, client: Client) -> None:
        """Both halves of an attempt."""
        for world, rid in ((self.p, client.here), (self.d, client.there)):
            if rid >= 0:
                world.tell(Abort(rid))
        client.here = client.there = -1

    def abort(self, client: Client) -> None:
        if client.end is None:
            self.drop(client)
            client.end = Finished(0, FinishReason.ABORT)

    def heard(self, world: World, msg: Any) -> None:
        match msg:
            case ImportPlaced():
                assert world is self.d
                client = self.of[id(world), msg.rid]
                if client.there == msg.rid:
                    to = KvDestination(
                        node="d", epoch=msg.rid, hit=msg.hit, length=msg.length,
                        addresses=("",) * RANKS, wire=WIRE,
                    )  # fmt: skip
                    client.here = self._submit(self.p, client, exports=to)
            case Tokens():
                for rid, logprobs in msg.prompt:
                    assert world is self.p
                    client = self.of[id(world), rid]
                    if client.here == rid and not client.tokens:
                        client.scores += logprobs.chosen
                logprobs = msg.logprobs.chosen if msg.logprobs else [0.0] * len(msg.rids)
                for rid, token, score in zip(msg.rids, msg.tokens, logprobs, strict=True):
                    self._token(world, rid, token, score)
            case Finished():
                assert (id(world), msg.rid) not in self.ended, "ended twice"
                self.ended.add((id(world), msg.rid))
                self._finished(world, msg)
            case _:
                raise AssertionError(msg)

    def _token(self, world: World, rid: int, token: int, score: float) -> None:
        client = self.of[id(world), rid]
        assert (id(world), rid) not in self.ended
        if rid != (client.here if world is self.p else client.there):
            return  # of an attempt that has been given up
        client.tokens.append(token)
        client.logprobs.append(score)
        if len(client.tokens) == client.stop_after:
            if client.there >= 0:
                self.d.tell(StopHit(client.there, client.stop_after))
            elif client.here >= 0:
                self.p.tell(StopHit(client.here, client.stop_after))

    def _finished(self, world: World, end: Finished) -> None:
        client = self.of[id(world), end.rid]
        if end.rid != (client.here if world is self.p else client.there):
            return
        if world is self.p:
            client.here = -1
            if end.reason is FinishReason.MOVED:
                self.d.tell(BeginDecode(client.there, client.tokens[-1]))
                return
        else:
            client.there = -1
        self.drop(client)
        if end.failure and end.failure.code == "transfer_failed" and client.attempts < 4:
            self.scored(client)
            self.attempt(client)
        else:
            client.end = end

    @staticmethod
    def scored(client: Client) -> None:
        """An attempt that has given no token gives its scores again."""
        if not client.tokens:
            client.scores.clear()

    # everybody

    def acts(self) -> list[Any]:
        """What somebody could do now."""
        out: list[Any] = []
        for world in (self.p, self.d):
            out += [(world.turn, key) for key in world.ready()]
            for rank in self.ranks[id(world)]:
                out += [(self._send, rank, key) for key in rank.sendable()]
        out += [(self._deliver, i) for i in range(len(self.pages))]
        return out

    def act(self, act: Any) -> None:
        call, *args = act
        call(*args)
        for rank in self.ranks[id(self.d)]:
            if rank.imports and self.rng.random() < self.lapses:
                rank.lapse(self.rng.choice(list(rank.imports)))

    def _send(self, rank: FakeRank, key: tuple[int, int]) -> None:
        self.pages.append(rank.send(key))

    def _deliver(self, i: int) -> None:
        rank, page = self.pages.pop(i)
        self.ranks[id(self.d)][rank].take(page)

    def run(self, turns: int = 200_000) -> None:
        for _ in range(turns):
            if not (acts := self.acts()):
                return
            self.act(self.rng.choice(acts))
        raise AssertionError("no end")
