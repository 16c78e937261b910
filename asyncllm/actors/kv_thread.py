"""The thread that transfers K/V between servers; base of the sender and the receiver.

Owns the thread, its sockets and its time. What a rank of a prefill node does in it is in
``kv_sender``, what one of a decode node does in ``kv_receiver``.
"""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import zmq

from asyncllm.actors.transport import Socket, detect_dead_connections
from asyncllm.codec import Message, encode
from asyncllm.core.kv_clock import PagePool, PauseAwareClock
from asyncllm.core.kv_heads import HeadRange, HeldHeads, part
from asyncllm.engine.kv_pages import CopyWaiter, KvBytes, PageBuffers, SliceSet
from asyncllm.records import KvWireFormat

ALIVE_S = 0.5  # between two heartbeats
LAPSE_S = 4.0  # without heartbeat, or without promised data: a transfer has failed
FIRST_S = 8.0  # for the first frame of an import's sender
EARLY_S = 2.0  # by which a sender may be ahead of our own scheduler's message
TICK_S = 0.05  # between two checks for late peers, while busy
IDLE_MS = 100  # between two checks of the time
SOON_MS = 1  # between two polls of copies that do not signal completion
PIECE = 1 << 18  # bytes of a frame: small enough that nobody waits for the GIL
FRAME_LIMIT = PIECE + (1 << 16)
MOST_WAITING = 1 << 16  # frames that wait for room in it
QUEUE = 32  # frames that ZeroMQ holds for a peer, on either side
JOIN_S = 5.0

log = logging.getLogger(__name__)

HeldOf = Callable[[int], Sequence[tuple[tuple[int, ...], ...]]]


@dataclass(frozen=True, slots=True)
class KvShard:
    """This rank's K/V, and how they are divided.

    Args:
        name: name of this process in others' logs.
        rank: its rank in the group.
        wire: what all K/V of this server look like.
        kv: the bytes.
        held: from a number of ranks to the heads per layer and rank.
    """

    name: str
    rank: int
    wire: KvWireFormat
    kv: KvBytes
    held: HeldOf

    def parts(self, other_tp: int, other: int, *, sent: bool) -> list[HeadRange | None]:
        """Per layer, the heads sent from here to rank ``other`` of ``other_tp``, or, unless it is
        ``sent``, from there to here."""

        @cache  # most layers are alike
        def of(mine: HeldHeads, yours: HeldHeads) -> HeadRange | None:
            ends = (mine, yours, self.rank, other) if sent else (yours, mine, other, self.rank)
            return part(*ends)

        return list(map(of, self.held(self.wire.tp), self.held(other_tp)))

    def strips(self, other_tp: int, other: int, *, sent: bool) -> SliceSet:
        """The bytes of that."""
        return self.kv.strips(self.parts(other_tp, other, sent=sent), sent=sent)

    def partners(self, other_tp: int, *, sent: bool) -> tuple[int, ...]:
        """Ranks of another server that this one sends something to, or receives from."""
        return tuple(
            other for other in range(other_tp) if any(self.parts(other_tp, other, sent=sent))
        )


@dataclass(slots=True)
class TransferCounters:
    """Counters of a rank since the start; read from any thread."""

    sent_bytes: int = 0
    taken_bytes: int = 0
    sent_pages: int = 0
    taken_pages: int = 0
    taken_tokens: int = 0  # positions of whole requests
    transfers: int = 0  # completed transfers
    transfer_ms: float = 0.0  # of these, from the first sign of the sender to the last byte
    sent: int = 0  # whole requests, to all receivers
    tail_ms: float = 0.0  # of these, from the end of the last step until all has been taken
    lapses: int = 0
    waiting: int = 0  # portions ready to be sent that wait
    refused: int = 0  # connections that were ended for what came on them
    failed_handshakes: int = 0  # connections that failed to authenticate


@dataclass(frozen=True, slots=True)
class TransferTimeouts:
    """Seconds; see the constants of this module."""

    alive_s: float = ALIVE_S
    lapse_s: float = LAPSE_S
    first_s: float = FIRST_S
    early_s: float = EARLY_S


class _WakeupFd:
    """Wakes the thread. Thread-safe; may be called after the thread has ended."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()

    def ring(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        with self._lock:
            os.close(self.fd)
            self.fd = -1


class ControlQueue:
    """What a peer is to be told; what ZeroMQ has no room for yet waits here, up to a limit.

    Attributes:
        said: when something was last said.
    """

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._full, self._moved, self.said = False, 0.0, 0.0

    def say(self, msg: Message, now: float) -> None:
        """Send it as soon as there is room."""
        self.said = now
        if not self._frames:
            self._moved = now
        self._full |= len(self._frames) >= MOST_WAITING
        if not self._full:
            self._frames.append(encode(msg))

    def flush(self, send: Callable[[bytes], object], now: float) -> None:
        """Give ZeroMQ what it takes. Raises zmq.Again: there is more."""
        while self._frames:
            send(self._frames[0])
            self._frames.popleft()
            self._moved = now

    def clear(self) -> None:
        """Say nothing of it."""
        self._frames.clear()
        self._full = False

    def stuck(self, now: float, lapse_s: float) -> str:
        """Why its peer is given up; "": it is not."""
        if self._full:
            return f"has read none of {MOST_WAITING} messages"
        if self._frames and now - self._moved > lapse_s:
            return f"has read nothing for {lapse_s:g} s"
        return ""


class TransferThread(ABC):
    """A thread with a mailbox.

    Args:
        share: the rank's.
        pages: buffers for the bytes in transit.
        times: heartbeat intervals and timeouts; for tests.
        ctx: ZeroMQ's; it belongs to the thread from now on.
    """

    def __init__(
        self, share: KvShard, pages: PageBuffers, times: TransferTimeouts, ctx: zmq.Context[Socket]
    ) -> None:
        self.share, self.pages, self.times, self.ctx = share, pages, times, ctx
        self.counts = TransferCounters()
        self.clock = PauseAwareClock(5e-3 * IDLE_MS)
        self.pool = PagePool(pages.num)
        self.poller = zmq.Poller()
        self.bell = _WakeupFd()
        self.poller.register(self.bell.fd, zmq.POLLIN)
        self.copies = CopyWaiter(self.bell.ring)
        self._inbox: deque[Message] = deque()
        self._closing = False
        self._tick_at = 0.0
        self.drained = threading.Event()  # nothing in transit would be lost at the end
        self.drained.set()
        self._out: list[Message] = []
        self.post: Callable[[list[Message]], None] = lambda _: None
        self.failed: Callable[[BaseException], None] = lambda _: None
        self._thread = threading.Thread(target=self._run, name="kv", daemon=True)

    # -- from the event loop -----------------------------------------------------------------------

    def start(
        self, post: Callable[[list[Message]], None], failed: Callable[[BaseException], None]
    ) -> None:
        """Start; the thread calls ``post`` with its messages and ``failed`` with a fatal error."""
        self.post, self.failed = post, failed
        self._thread.start()

    def put(self, batch: list[Message]) -> None:
        """Queue messages, in order; never blocks."""
        self._inbox.extend(batch)
        self.bell.ring()

    def close(self) -> None:
        """End the thread and close all sockets; running copies are left alone."""
        self._closing = True
        if self._thread.ident is not None:
            self.bell.ring()
            self._thread.join(JOIN_S)
        if not self._thread.is_alive():
            self.shut()
            self.copies.close(JOIN_S)
            self.ctx.destroy(0)
            self.bell.close()

    # -- the thread --------------------------------------------------------------------------------

    @abstractmethod
    def take(self, msg: Message) -> None:
        """Handle a message of this process's actors."""

    @abstractmethod
    def look(self, events: dict[Socket, int]) -> None:
        """Read incoming frames."""

    @abstractmethod
    def work(self) -> int:
        """Advance transfers; returns how many milliseconds the next iteration may wait."""

    @abstractmethod
    def tick(self) -> None:
        """Periodic checks."""

    @abstractmethod
    def shut(self) -> None:
        """Close resources of subclasses."""

    def say(self, msg: Message) -> None:
        """Queue a message for this process's actor."""
        self._out.append(msg)

    def turn(self, wait_ms: int) -> int:
        """One iteration of the thread; returns how many milliseconds the next one may wait."""
        events = dict(self.poller.poll(wait_ms))
        if events.pop(self.bell.fd, 0):
            os.eventfd_read(self.bell.fd)
        self.clock.look()
        while self._inbox:
            self.take(self._inbox.popleft())
        self.look(events)
        for then in self.copies.over():
            then()
        wait_ms = self.work()
        if self.clock.now >= self._tick_at:
            self._tick_at = self.clock.now + TICK_S
            self.tick()
        if self._out:
            out, self._out = self._out, []
            self.post(out)
        return wait_ms if self.copies.idle else 0

    def _run(self) -> None:
        wait_ms = IDLE_MS
        try:
            while not self._closing:
                wait_ms = self.turn(wait_ms)
        except BaseException as error:  # any error ends the rank; raised on the loop
            self.failed(error)


def bounds(sock: Socket) -> None:
    """What a socket that carries K/V may hold."""
    sock.setsockopt(zmq.MAXMSGSIZE, FRAME_LIMIT)
    sock.setsockopt(zmq.SNDHWM, QUEUE)
    sock.setsockopt(zmq.RCVHWM, QUEUE)
    sock.setsockopt(zmq.LINGER, 0)
    detect_dead_connections(sock)
