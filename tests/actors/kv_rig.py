"""Ranks of a prefill and of a decode node in one process, without threads: turn by turn."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import torch

from asyncllm.actors.kv_listener import KvListener
from asyncllm.actors.kv_receiver import KvReceiver
from asyncllm.actors.kv_sender import KvSender
from asyncllm.actors.kv_thread import KvShard, TransferThread, TransferTimeouts
from asyncllm.actors.transport import CurveKeys
from asyncllm.codec import Message
from asyncllm.core.windows import PerSpace
from asyncllm.engine.kv_pages import CpuPages, CudaPages, KvBytes, as_bytes
from asyncllm.engine.kv_pair import gloo_pair
from asyncllm.engine.kv_transports import P2P, TCP, KvTransports, make_ways
from asyncllm.messages import (
    ExportKv,
    ImportKv,
    KvArrived,
    KvComputed,
    KvSent,
    StepFinished,
    TransferFailed,
)
from asyncllm.models.attention import KvPairs, LayerKv
from asyncllm.models.spec import AttentionSpec, shard_heads
from asyncllm.records import KvDestination, KvWireFormat

CPU = torch.device("cpu")
NODE = "0123456789abcdef"
KEYS = CurveKeys.make()
SPEC = AttentionSpec(
    kind="gqa", num_q_heads=8, num_kv_heads=4, head_dim=8, v_dim=8, scale=1.0, rope=None
)
NUM_LAYERS, NUM_SLOTS = 2, 64
WIRE = KvWireFormat(format="", dtype="bf16", num_layers=NUM_LAYERS, num_heads=4, head_bytes=32)
WAIT_S = 30.0  # far more than anything here takes on a loaded machine


@dataclass(frozen=True)
class Size:
    """Of what a rank has: elements of a head, tokens of a page, pages."""

    dim: int = 8
    tokens: int = 4
    pages: int = 4


def held(tp: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return (tuple(shard_heads(SPEC, tp, rank).kv_heads for rank in range(tp)),) * NUM_LAYERS


class Rank:
    """One rank's K/V, noise in all slots, and what it has told its scheduler."""

    def __init__(self, rank: int, tp: int, seed: int, size: Size) -> None:
        spec = replace(SPEC, head_dim=size.dim).on(shard_heads(SPEC, tp, rank))
        layout = KvPairs([spec] * NUM_LAYERS, torch.bfloat16)
        self.kv: list[LayerKv] = layout.allocate(PerSpace(NUM_SLOTS, 0), CPU)
        noise = torch.Generator().manual_seed(seed + rank)
        for x in (x for layer in self.kv for x in layer):
            as_bytes(x).random_(256, generator=noise)
        self.rank, self.heads, self.size = rank, held(tp)[0][rank], size
        wire = KvWireFormat(**{**_plain(WIRE), "tp": tp})
        self.share = KvShard(f"rank {rank}", rank, wire, KvBytes(self.kv, layout), held)
        self.told: list[Message] = []
        self.thread: TransferThread

    def row(self, slot: int, head: int) -> bytes:
        """K and V of all layers, of one head of the whole model."""
        at = self.heads.index(head)
        return b"".join(
            as_bytes(x[slot, at : at + 1]).numpy().tobytes() for layer in self.kv for x in layer
        )

    def slots(self) -> list[bytes]:
        """Of each slot all bytes."""
        tensors = [as_bytes(x) for layer in self.kv for x in layer]
        return [b"".join(t[i].numpy().tobytes() for t in tensors) for i in range(NUM_SLOTS)]


def _plain(wire: KvWireFormat) -> dict[str, object]:
    return {name: getattr(wire, name) for name in KvWireFormat.__slots__}


def means(rank: Rank, names: Sequence[str]) -> tuple[CpuPages | CudaPages, KvTransports]:
    """Pages of a rank, and its ways; nccl is over gloo."""
    mode, size = P2P if P2P in names else TCP, rank.size
    pages, transports = make_ways(mode, size.pages, size.tokens * rank.share.kv.slot_bytes, CPU)
    return pages, replace(transports, names=tuple(names), timeout_s=WAIT_S, backend=gloo_pair)


def sender(
    rank: Rank, names: Sequence[str], times: TransferTimeouts, keys: Sequence[CurveKeys]
) -> None:
    """Give a rank what sends its K/V."""
    rank.thread = KvSender(rank.share, *means(rank, names), times, keys=keys)
    rank.thread.post = rank.told.extend


def receiver(rank: Rank, names: Sequence[str], times: TransferTimeouts, keys: CurveKeys) -> None:
    """Give a rank what takes K/V for it."""
    listener = KvListener(keys, "127.0.0.1", 0)
    rank.thread = KvReceiver(rank.share, *means(rank, names), times, node=NODE, listener=listener)
    rank.thread.post = rank.told.extend


class Rig:
    """``tps``: ranks that send, and that take. ``names``: ways of the two."""

    def __init__(
        self,
        tps: tuple[int, int] = (1, 1),
        names: tuple[Sequence[str], Sequence[str]] = (("tcp",), ("tcp",)),
        *,
        size: Size = Size(),
        times: TransferTimeouts | None = None,
        keys: Sequence[CurveKeys] = (KEYS,),
    ) -> None:
        times = times or TransferTimeouts(lapse_s=WAIT_S, first_s=WAIT_S)
        self.senders = [Rank(i, tps[0], 0, size) for i in range(tps[0])]
        self.receivers = [Rank(i, tps[1], 1000, size) for i in range(tps[1])]
        for rank in self.senders:
            sender(rank, names[0], times, keys)
        for rank in self.receivers:
            receiver(rank, names[1], times, KEYS)

    @property
    def threads(self) -> list[TransferThread]:
        return [rank.thread for rank in [*self.senders, *self.receivers]]

    def to(self, epoch: int, hit: int, length: int, node: str = NODE) -> KvDestination:
        addresses = []
        for rank in self.receivers:
            assert isinstance(rank.thread, KvReceiver)
            addresses.append(f"tcp://127.0.0.1:{rank.thread.port}")
        wire = self.receivers[0].share.wire
        return KvDestination(
            node=node, epoch=epoch, hit=hit, length=length, addresses=tuple(addresses), wire=wire
        )

    def begin(self, rid: int, epoch: int, slots: array[int], hit: int = 0) -> None:
        """The decode node waits, the prefill node knows: nothing is computed yet."""
        length = hit + len(slots)
        for rank in self.receivers:
            rank.thread.put([ImportKv(epoch, hit, length, slots)])
        for rank in self.senders:
            rank.thread.put([ExportKv(rid, self.to(epoch, hit, length))])

    def computed(self, rid: int, seq: int, start: int, slots: array[int]) -> None:
        """A chunk, and its step is over."""
        msg = KvComputed(rid=rid, seq=seq, step=seq + 1, start=start, slots=slots)
        for rank in self.senders:
            rank.thread.put([msg, StepFinished(seq + 1)])

    def until(
        self, met: Callable[[], bool], threads: Sequence[TransferThread] | None = None
    ) -> None:
        """Turn after turn."""
        end = monotonic() + WAIT_S
        while not met():
            assert monotonic() < end, [rank.told for rank in [*self.senders, *self.receivers]]
            self.turns(1, threads)

    def turns(self, num: int, threads: Sequence[TransferThread] | None = None) -> None:
        for _ in range(num):
            for thread in threads if threads is not None else self.threads:
                wait_ms = thread.turn(1)
                assert wait_ms == 0 or thread.copies.idle, "a copy would wait for the next noise"

    def arrived(self, epoch: int) -> bool:
        return all(KvArrived(epoch, rank.rank) in rank.told for rank in self.receivers)

    def lapsed(self, epoch: int) -> list[str]:
        return [
            msg.why
            for rank in self.receivers
            for msg in rank.told
            if isinstance(msg, TransferFailed) and msg.rid == epoch
        ]

    def sent(self, rid: int) -> list[list[int]]:
        """Of each rank."""
        return [
            sorted(msg.seq for msg in rank.told if isinstance(msg, KvSent) and msg.rid == rid)
            for rank in self.senders
        ]

    def matches(self, sources: array[int], targets: array[int]) -> bool:
        """Each head of each receiver in these slots is that of whoever has it."""
        for receiver in self.receivers:
            for source, target in zip(sources, targets, strict=True):
                for head in (head for head in receiver.heads if head >= 0):
                    owner = next(rank for rank in self.senders if head in rank.heads)
                    if owner.row(source, head) != receiver.row(target, head):
                        return False
        return True

    def close(self) -> None:
        for thread in self.threads:
            thread.close()
