"""Sends K/V from a rank of a prefill node to ranks of decode nodes.

Owns one connection to each rank of each decode node, and the data in transit. A receiver
that does not read only blocks the few pages that it was promised, and no other receiver.
"""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import zmq

from asyncllm.actors.kv_thread import (
    IDLE_MS,
    PIECE,
    ControlQueue,
    KvShard,
    TransferThread,
    TransferTimeouts,
    bounds,
)
from asyncllm.actors.transport import CurveKeys, Monitor, Socket, ipv6, known_to
from asyncllm.codec import CodecError, Message, decode, encode
from asyncllm.core.kv_transfer_state import (
    ExportChunk,
    ExportTable,
    OpenExport,
    PageRange,
    ProtocolViolation,
)
from asyncllm.engine.kv_pages import PageBuffers, SliceSet
from asyncllm.engine.kv_pair import RankPair
from asyncllm.engine.kv_transports import NCCL, P2P, TCP, KvTransports
from asyncllm.messages import CancelTransfer, ExportKv, KvComputed, KvSent, StepFinished
from asyncllm.messages.transfer import (
    EpochClosed,
    EpochOpened,
    PageAnnounced,
    PageBytes,
    PageFilled,
    PageReceived,
    PullPage,
    SenderAdmitted,
    SenderHello,
    StoreValue,
    TransferHeartbeat,
    TransferRefused,
)
from asyncllm.records import KvDestination

AGAIN_S = 0.3  # between two attempts to connect
MOST_FRAMES = 64  # read per iteration from one receiver

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _OutgoingPage:
    """A portion that has been announced.

    Attributes:
        pulled: the receiver has asked for it.
        copied: its slots are no longer needed.
        unwanted: the receiver already had it.
        page: the page with its bytes; None: not yet, or no longer.
        busy: the page is in use by an operation that cannot be cancelled.
        stamp: in the page for as long as it holds these bytes.
        at: bytes that the socket has accepted.
    """

    portion: PageRange
    nbytes: int
    pulled: bool = False
    copied: bool = False
    unwanted: bool = False
    page: int | None = None
    busy: bool = False
    stamp: int = 0
    at: int = 0


@dataclass(slots=True, eq=False)
class _ReceiverConnection:
    """The connection to one rank of a decode node.

    Attributes:
        heard: time of its last frame, or when we began to wait for it.
        way: the agreed transport; "": it has not answered yet.
        chunks: what to announce after its answer.
        cargo: announced portions, by number.
        next_up: numbers of portions to copy into pages, in order.
        filled: numbers of portions being sent through the socket.
        leaving: portions being sent through ``pair``, by number.
        control: messages for it.
        epochs: epochs that were announced to it, with our own rids.
    """

    node: str
    address: str
    tp: int
    rank: int
    strips: SliceSet
    heard: float
    sock: Socket | None = None
    monitor: Monitor | None = None
    attempts: int = 0
    again: float = 0.0
    transport: str = ""
    tokens: int = 0
    next: int = 0
    pair: RankPair | None = None
    chunks: list[ExportChunk] = field(default_factory=list)
    outgoing: dict[int, _OutgoingPage] = field(default_factory=dict)
    next_up: deque[int] = field(default_factory=deque)
    filled: deque[int] = field(default_factory=deque)
    leaving: dict[int, _OutgoingPage] = field(default_factory=dict)
    control: ControlQueue = field(default_factory=ControlQueue)
    epochs: dict[int, int] = field(default_factory=dict)


class KvSender(TransferThread):
    """See the module.

    Args:
        keys: of the cluster's secrets, tried in turn.
        transports: those that this rank supports.
    """

    def __init__(
        self,
        share: KvShard,
        pages: PageBuffers,
        transports: KvTransports,
        times: TransferTimeouts | None = None,
        *,
        keys: Sequence[CurveKeys],
    ) -> None:
        super().__init__(share, pages, times or TransferTimeouts(), zmq.Context())
        self._keys, self._transports = keys, transports
        self._outbox = ExportTable()
        self._receivers: dict[tuple[str, str], _ReceiverConnection] = {}
        self._to: dict[int, list[_ReceiverConnection]] = {}  # by rid
        self._partners: dict[int, tuple[int, ...]] = {}  # by the other server's tp
        self._ending: list[_ReceiverConnection] = []  # connections whose pages may still be read
        self._stamp = 0  # the last one; each is used once

    # -- from the scheduler ------------------------------------------------------------------------

    def take(self, msg: Message) -> None:
        match msg:
            case ExportKv(rid, to):
                self._export(rid, to)
            case KvComputed():
                chunk = ExportChunk(
                    msg.rid, msg.seq, msg.step, msg.start, array("i", msg.slots), left=0
                )
                self._ready(self._outbox.computed(chunk))
            case StepFinished(step):
                for chunk in self._outbox.step_over(step):
                    self._ready(chunk)
            case CancelTransfer(rid):
                self._drop(rid, "its request has ended there")
            case _:  # others are for the receiver
                raise TypeError(type(msg).__name__)

    def _export(self, rid: int, to: KvDestination) -> None:
        tp = to.wire.tp
        if tp not in self._partners:
            self._partners[tp] = self.share.partners(tp, sent=True)
        receivers = self._partners[tp]
        if not receivers or rid in self._to:  # it only has padding heads
            return
        self._outbox.export(OpenExport(rid, to.epoch, to.hit, to.length, receivers))
        self._to[rid] = [self._receiver(to, rank) for rank in receivers]
        for receiver in self._to[rid]:
            receiver.epochs[to.epoch] = rid
            if receiver.sock is not None:
                self._tell(receiver, EpochOpened(to.epoch))

    def _ready(self, chunk: ExportChunk | None) -> None:
        if chunk is None:
            return
        if chunk.is_over():
            self.say(KvSent(chunk.rid, self.share.rank, chunk.seq))
            return
        export = self._outbox.exports[chunk.rid]
        if chunk.end == export.length:
            export.computed = self.clock.now
        for receiver in self._to[chunk.rid]:
            if receiver.transport:
                self._announce(receiver, chunk)
            else:
                receiver.chunks.append(chunk)

    def _announce(self, receiver: _ReceiverConnection, chunk: ExportChunk) -> None:
        for portion in self._outbox.divide(chunk, receiver.tokens):
            receiver.next += 1
            receiver.outgoing[receiver.next] = _OutgoingPage(
                portion, portion.count * receiver.strips.width
            )
            if receiver.transport != TCP:  # it lies ready by the time that there is room for it
                receiver.next_up.append(receiver.next)
            self._tell(
                receiver,
                PageAnnounced(
                    number=receiver.next,
                    epoch=portion.epoch,
                    first=portion.first,
                    count=portion.count,
                ),
            )

    def _drop(self, rid: int, why: str, silent: _ReceiverConnection | None = None) -> None:
        """Send nothing more of a request."""
        export = self._outbox.exports.get(rid)
        if export is None:
            return
        for receiver in self._to.pop(rid):
            receiver.epochs.pop(export.epoch, None)
            for number, outgoing in [*receiver.outgoing.items()]:
                if outgoing.portion.epoch == export.epoch:
                    self._unload(receiver, number)
            if receiver is not silent and receiver.sock is not None:
                self._tell(receiver, EpochClosed(export.epoch, why))
        for chunk in self._outbox.drop(rid):
            self.say(KvSent(rid, self.share.rank, chunk.seq))

    def _unload(self, receiver: _ReceiverConnection, number: int) -> None:
        """Drop a portion; its page becomes free as soon as nothing reads it."""
        outgoing = receiver.outgoing.pop(number)
        if not outgoing.busy:
            self._free(receiver, outgoing)

    def _free(self, receiver: _ReceiverConnection, outgoing: _OutgoingPage) -> None:
        if outgoing.page is not None:
            self.pool.give(receiver.address, outgoing.page)
            outgoing.page = None

    def _complete(self, receiver: _ReceiverConnection, epoch: int) -> None:
        """A receiver has everything it needs of a request."""
        if (rid := receiver.epochs.pop(epoch, None)) is None:
            return
        for number, outgoing in [*receiver.outgoing.items()]:
            if outgoing.portion.epoch == epoch:
                self._taken(receiver, number)
        left = self._to[rid] = [other for other in self._to[rid] if other is not receiver]
        export = self._outbox.exports[rid]
        export.receivers = tuple(other.rank for other in left)
        if not left:
            if export.computed is not None:
                self.counts.sent += 1
                self.counts.tail_ms += 1e3 * (self.clock.now - export.computed)
            self._drop(rid, "")

    # -- connections -------------------------------------------------------------------------------

    def _receiver(self, to: KvDestination, rank: int) -> _ReceiverConnection:
        key = to.node, to.addresses[rank]
        if (receiver := self._receivers.get(key)) is None:
            strips = self.share.strips(to.wire.tp, rank, sent=True)
            receiver = _ReceiverConnection(*key, to.wire.tp, rank, strips, self.clock.now)
            self._receivers[key] = receiver
            self._connect(receiver)
        return receiver

    def _connect(self, receiver: _ReceiverConnection) -> None:
        try:
            sock = self.ctx.socket(zmq.DEALER)
            receiver.monitor = Monitor(sock, zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
            sock.setsockopt(zmq.RECONNECT_IVL, -1)  # a new connection would be a new peer
            bounds(sock)
            sock.setsockopt(zmq.IPV6, ipv6(receiver.address))
            known_to(sock, self._keys[receiver.attempts % len(self._keys)])
            sock.connect(receiver.address)
        except zmq.ZMQError as error:  # no such address, or no descriptor is left
            log.warning("K/V cannot be sent to %s: %s", receiver.address, error)
            self._disconnect(receiver)
            return
        receiver.sock, receiver.attempts = sock, receiver.attempts + 1
        self.poller.register(sock, zmq.POLLIN)
        share = self.share
        self._tell(
            receiver,
            SenderHello(
                node=receiver.node,
                name=share.name,
                wire=share.wire,
                rank=share.rank,
                transports=self._transports.names,
                machine=self._transports.machine,
                memory=self._transports.memory,
            ),
        )
        for epoch in receiver.epochs:
            self._tell(receiver, EpochOpened(epoch))

    def _disconnect(self, receiver: _ReceiverConnection) -> None:
        if receiver.monitor is not None:
            receiver.monitor.close()
        if receiver.sock is not None:
            self.poller.unregister(receiver.sock)
            receiver.sock.close(0)
        receiver.sock = receiver.monitor = None
        receiver.control.clear()
        receiver.again = self.clock.now + AGAIN_S

    def _hang_up(self, receiver: _ReceiverConnection, why: str) -> None:
        """The other side is gone or unusable: disconnect."""
        if self._receivers.pop((receiver.node, receiver.address), None) is None:
            return
        if receiver.epochs:
            self.counts.lapses += 1
            log.warning("K/V are not sent to %s any more: %s", receiver.address, why)
        for rid in [*receiver.epochs.values()]:
            self._drop(rid, why, silent=receiver)
        for number in [*receiver.outgoing]:
            self._unload(receiver, number)
        self._disconnect(receiver)
        if receiver.pair is not None:
            receiver.pair.close()
            self._ending.append(receiver)

    def _tell(self, receiver: _ReceiverConnection, msg: Message) -> None:
        receiver.control.say(msg, self.clock.now)

    # -- what comes in -----------------------------------------------------------------------------

    def look(self, events: dict[Socket, int]) -> None:
        for receiver in [*self._receivers.values()]:
            if receiver.sock is None:
                continue
            if receiver.sock in events:
                self._read(receiver)
            if receiver.monitor is not None and receiver.monitor.take():
                self._gone(receiver)

    def _gone(self, receiver: _ReceiverConnection) -> None:
        if receiver.transport:
            self._hang_up(receiver, "its connection is closed")
        else:
            self._disconnect(receiver)  # it may not listen yet, or with another of the keys

    def _read(self, receiver: _ReceiverConnection) -> None:
        for _ in range(MOST_FRAMES):
            if receiver.sock is None:
                return
            try:
                raw = receiver.sock.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                msg = decode(raw)
                receiver.heard = self.clock.now
                self._hear(receiver, msg)
            except (CodecError, ProtocolViolation) as error:
                self.counts.refused += 1
                self._hang_up(receiver, str(error))
                return

    def _hear(self, receiver: _ReceiverConnection, msg: Message) -> None:
        match msg:
            case SenderAdmitted(transport, tokens) if (
                not receiver.transport and transport in self._transports.names
            ):
                receiver.transport, receiver.tokens = transport, tokens
                receiver.tokens = min(
                    tokens, max(1, self.pages.size // max(1, receiver.strips.width))
                )
                if transport == NCCL:
                    receiver.pair = self._transports.pair(0, self.bell.ring)
                chunks, receiver.chunks = receiver.chunks, []
                for chunk in chunks:
                    self._announce(receiver, chunk)
            case PullPage(number) if receiver.transport:
                if (outgoing := receiver.outgoing.get(number)) is not None:
                    if outgoing.pulled:
                        raise ProtocolViolation(f"portion {number} is pulled twice")
                    outgoing.pulled = True
                    if receiver.transport == TCP:
                        receiver.next_up.append(number)
                    elif outgoing.copied:
                        self._go(receiver, number, outgoing)
            case PageReceived(number) if receiver.transport:
                self._taken(receiver, number)
            case EpochClosed(epoch, ""):
                self._complete(receiver, epoch)
            case EpochClosed(epoch, why):
                if epoch in receiver.epochs:
                    self._drop(receiver.epochs[epoch], why, silent=receiver)
            case StoreValue(key, value) if receiver.pair is not None:
                receiver.pair.known(key, value)
            case TransferHeartbeat():
                pass
            case TransferRefused(why):
                self._hang_up(receiver, f"it refuses them: {why}")
            case _:
                raise ProtocolViolation(f"a {type(msg).__name__} that it cannot have meant")

    def _taken(self, receiver: _ReceiverConnection, number: int) -> None:
        outgoing = receiver.outgoing.get(number)
        if outgoing is None:
            return  # of a request that has been dropped
        if outgoing.busy and not outgoing.copied:
            outgoing.unwanted = True
            return
        self._unload(receiver, number)
        if not outgoing.copied:  # the receiver had these positions already
            outgoing.portion.chunk.copying += 1
            self._copied(outgoing.portion)

    def _copied(self, portion: PageRange) -> None:
        if self._outbox.copied(portion):
            self.say(KvSent(portion.chunk.rid, self.share.rank, portion.chunk.seq))

    # -- what goes out -----------------------------------------------------------------------------

    def work(self) -> int:
        waiting = 0
        for receiver in [
            receiver for receiver in self._ending if receiver.pair and receiver.pair.closed
        ]:
            self._ending.remove(receiver)
            for outgoing in receiver.leaving.values():
                self._free(receiver, outgoing)
        for receiver in [*self._receivers.values()]:
            if receiver.sock is not None and receiver.pair is not None:
                self._step(receiver, receiver.pair)
        self._fill()  # pages freed above
        for receiver in [*self._receivers.values()]:
            if receiver.sock is None:
                continue
            more = self._flush(receiver)
            if receiver.sock is not None:
                self.poller.modify(receiver.sock, zmq.POLLIN | (zmq.POLLOUT if more else 0))
            waiting += len(receiver.next_up)
        self.counts.waiting = waiting
        if any(receiver.outgoing or receiver.chunks for receiver in self._receivers.values()):
            self.drained.clear()
        else:
            self.drained.set()
        return IDLE_MS

    def _fill(self) -> None:
        """Copy the next portions into pages, round-robin over the receivers."""
        receivers = [receiver for receiver in self._receivers.values() if receiver.next_up]
        while receivers:
            for receiver in [*receivers]:
                if not receiver.next_up or (receiver.pair is not None and not receiver.pair.ready):
                    receivers.remove(receiver)
                    continue
                if (outgoing := receiver.outgoing.get(receiver.next_up[0])) is None:
                    receiver.next_up.popleft()
                    continue
                # A portion that was asked for has a page there that others wait for. If pages that
                # nobody has asked for held it up here, servers could wait in a circle.
                spare = outgoing.pulled or self.pool.free > 1
                if not spare or (page := self.pool.take(receiver.address)) is None:
                    receivers.remove(receiver)
                    continue
                number = receiver.next_up.popleft()
                portion = outgoing.portion
                portion.chunk.copying += 1
                self._stamp += 1
                outgoing.page, outgoing.busy, outgoing.stamp = page, True, self._stamp
                copied = self.pages.fill(
                    page,
                    receiver.strips,
                    portion.slots,
                    host=receiver.transport == TCP,
                    stamp=outgoing.stamp,
                )
                self.copies.watch(copied, partial(self._filled, receiver, number, outgoing))

    def _filled(self, receiver: _ReceiverConnection, number: int, outgoing: _OutgoingPage) -> None:
        outgoing.busy, outgoing.copied = False, True
        self._copied(outgoing.portion)
        assert outgoing.page is not None
        if receiver.outgoing.get(number) is not outgoing:  # dropped in the meantime
            self._free(receiver, outgoing)
        elif outgoing.unwanted:
            self._taken(receiver, number)
        elif outgoing.pulled or receiver.transport == P2P:
            self._go(receiver, number, outgoing)

    def _go(self, receiver: _ReceiverConnection, number: int, outgoing: _OutgoingPage) -> None:
        """Its bytes are in a page, and the receiver has room for them, or looks for it."""
        assert outgoing.page is not None
        self.counts.sent_bytes += outgoing.nbytes
        self.counts.sent_pages += 1
        self._tell(
            receiver,
            PageFilled(
                number=number, page=outgoing.page, nbytes=outgoing.nbytes, stamp=outgoing.stamp
            ),
        )
        if receiver.transport == TCP:
            receiver.filled.append(number)
        elif receiver.pair is not None:
            outgoing.busy, receiver.leaving[number] = True, outgoing
            receiver.pair.send(number, self.pages.device(outgoing.page)[: outgoing.nbytes])

    def _step(self, receiver: _ReceiverConnection, pair: RankPair) -> None:
        """Advance the operations of communicators."""
        for key, value in pair.to_tell():
            self._tell(receiver, StoreValue(key, value))
        for number in pair.done(self.clock.now):
            outgoing = receiver.leaving.pop(number)
            outgoing.busy = False
            self._free(receiver, outgoing)
        if pair.failed:
            self._hang_up(receiver, pair.failed)

    def _flush(self, receiver: _ReceiverConnection) -> bool:
        """Send what the socket accepts; returns whether there is more."""
        assert receiver.sock is not None
        try:
            receiver.control.flush(partial(receiver.sock.send, flags=zmq.NOBLOCK), self.clock.now)
            while receiver.filled:
                number = receiver.filled[0]
                outgoing = receiver.outgoing.get(number)
                if outgoing is None or outgoing.page is None:
                    receiver.filled.popleft()
                    continue
                self._send_piece(receiver.sock, number, outgoing)
                if outgoing.at == outgoing.nbytes:
                    receiver.filled.popleft()
                    self._free(receiver, outgoing)
        except zmq.Again:
            return True
        return False

    def _send_piece(self, sock: Socket, number: int, outgoing: _OutgoingPage) -> None:
        assert outgoing.page is not None
        end = min(outgoing.at + PIECE, outgoing.nbytes)
        piece = self.pages.host(outgoing.page)[outgoing.at : end]
        sock.send_multipart([encode(PageBytes(number, outgoing.at)), piece], zmq.NOBLOCK)
        outgoing.at = end

    # -- time --------------------------------------------------------------------------------------

    def tick(self) -> None:
        now = self.clock.now
        for receiver in [*self._receivers.values()]:
            if now - receiver.heard > self.times.lapse_s:
                self._hang_up(receiver, f"it has been silent for {self.times.lapse_s:g} s")
            elif receiver.sock is None:
                if now >= receiver.again:
                    self._connect(receiver)
            elif why := receiver.control.stuck(now, self.times.lapse_s):
                self._hang_up(receiver, f"it {why}")
            elif now - receiver.control.said > self.times.alive_s:
                self._tell(receiver, TransferHeartbeat())

    def shut(self) -> None:
        for receiver in self._receivers.values():
            if receiver.pair is not None:
                receiver.pair.close()
            self._disconnect(receiver)
