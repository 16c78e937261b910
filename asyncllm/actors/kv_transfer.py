"""K/V transfer: forwards the scheduler's messages to the thread that transfers K/V, and back.

Owns that thread, and no other state: see ``kv_sender`` and ``kv_receiver``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn, TypeVar, assert_never

from asyncllm.actors.base import Actor
from asyncllm.actors.kv_thread import TransferThread
from asyncllm.codec import Message
from asyncllm.messages import (
    CancelTransfer,
    ExportKv,
    ImportKv,
    KvComputed,
    KvListening,
    Probe,
    StepFinished,
    TransferStats,
)

DRAINED_S = 4.0

T = TypeVar("T")

TransferInbox = ImportKv | ExportKv | KvComputed | CancelTransfer | StepFinished | Probe


class KvTransfer(Actor[TransferInbox]):
    """One on each rank of a prefill or decode node.

    Args:
        thread: what transfers, not started.
        address: where senders connect to it; "": it is a sender itself.
    """

    remote = frozenset({ImportKv, ExportKv, KvComputed, CancelTransfer})
    orders = frozenset({Probe})

    def __init__(self, thread: TransferThread, address: str = "") -> None:
        super().__init__("kv_transfer")
        self._thread, self._address = thread, address
        self._stopped = False

    @property
    def failed_handshakes(self) -> int:
        return self._thread.counts.failed_handshakes

    def started(self) -> None:
        system = self.system
        group = system.topology[system.endpoint].group
        self._scheduler = system.ref("scheduler", system.topology.leader(group).id)
        self._watchdog = system.at_coordinator("watchdog")
        self._thread.start(
            lambda batch: self._post(self._say, batch), lambda error: self._post(self._fail, error)
        )
        if self._address:
            wire = self._thread.share.wire
            system.at_coordinator("agent").tell(KvListening(system.endpoint, self._address, wire))

    def receive(self, batch: list[TransferInbox]) -> None:
        moving: list[Message] = []
        for msg in batch:
            match msg:
                case ImportKv() | ExportKv() | KvComputed() | CancelTransfer() | StepFinished():
                    moving.append(msg)
                case Probe(query):
                    self._watchdog.tell(self._stats(query))
                case _:
                    assert_never(msg)
        if moving:
            self._thread.put(moving)

    async def closing(self) -> None:
        """Wait until data in transit to others has arrived, unless they are gone."""
        await asyncio.to_thread(self._thread.drained.wait, DRAINED_S)

    def stopped(self) -> None:
        self._stopped = True
        self._thread.close()

    def holds(self) -> str:
        counts = self._thread.counts
        moved = counts.sent_bytes + counts.taken_bytes
        return f"{moved / 1e9:.2f} GB moved, {counts.waiting} pages wait"

    def _post(self, callback: Callable[[T], object], value: T) -> None:
        """Called by the thread with its messages."""
        try:
            self.system.loop.call_soon_threadsafe(callback, value)
        except RuntimeError:  # the loop is closed: nobody is left to notify
            if not self.system.loop.is_closed():
                raise

    def _say(self, batch: list[Message]) -> None:
        for msg in batch if not self._stopped else ():
            self._scheduler.tell(msg)

    def _fail(self, error: BaseException) -> NoReturn:
        """On the loop, whose exception handler ends the system."""
        raise error

    def _stats(self, query: int) -> TransferStats:
        counts = self._thread.counts
        return TransferStats(
            query=query,
            endpoint=self.system.endpoint,
            sent_bytes=counts.sent_bytes,
            taken_bytes=counts.taken_bytes,
            sent_pages=counts.sent_pages,
            taken_pages=counts.taken_pages,
            taken_tokens=counts.taken_tokens,
            transfers=counts.transfers,
            transfer_ms=round(counts.transfer_ms),
            sent=counts.sent,
            tail_ms=round(counts.tail_ms),
            lapsed=counts.lapses,
            waiting=counts.waiting,
            refused=counts.refused,
        )
