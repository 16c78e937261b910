"""Sends K/V from a rank of a prefill node to ranks of decode nodes.

Owns one connection to each rank of each decode node, and the data in transit. A taker that
does not read only blocks a few pages that it was promised, and nothing of other takers.
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
MOST_FRAMES = 64  # read per iteration from one taker

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _OutgoingPage:
    """A portion that has been announced.

    Attributes:
        pulled: the taker has asked for it.
        copied: its slots are no longer needed.
        unwanted: the taker already had it.
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
        lots: what to announce after its answer.
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
    way: str = ""
    tokens: int = 0
    next: int = 0
    pair: RankPair | None = None
    lots: list[ExportChunk] = field(default_factory=list)
    cargo: dict[int, _OutgoingPage] = field(default_factory=dict)
    next_up: deque[int] = field(default_factory=deque)
    filled: deque[int] = field(default_factory=deque)
    leaving: dict[int, _OutgoingPage] = field(default_factory=dict)
    control: ControlQueue = field(default_factory=ControlQueue)
    epochs: dict[int, int] = field(default_factory=dict)


class KvSender(TransferThread):
    """See the module.

    Args:
        keys: of the cluster's secrets, tried in turn.
        ways: transports that this rank supports.
    """

    def __init__(
        self,
        share: KvShard,
        pages: PageBuffers,
        ways: KvTransports,
        times: TransferTimeouts | None = None,
        *,
        keys: Sequence[CurveKeys],
    ) -> None:
        super().__init__(share, pages, times or TransferTimeouts(), zmq.Context())
        self._keys, self._ways = keys, ways
        self._outbox = ExportTable()
        self._lines: dict[tuple[str, str], _ReceiverConnection] = {}
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
                lot = ExportChunk(
                    msg.rid, msg.seq, msg.step, msg.start, array("i", msg.slots), left=0
                )
                self._ready(self._outbox.computed(lot))
            case StepFinished(step):
                for lot in self._outbox.step_over(step):
                    self._ready(lot)
            case CancelTransfer(rid):
                self._drop(rid, "its request has ended there")
            case _:  # others are for the taker
                raise TypeError(type(msg).__name__)

    def _export(self, rid: int, to: KvDestination) -> None:
        tp = to.wire.tp
        if tp not in self._partners:
            self._partners[tp] = self.share.partners(tp, sent=True)
        takers = self._partners[tp]
        if not takers or rid in self._to:  # it only has padding heads
            return
        self._outbox.export(OpenExport(rid, to.epoch, to.hit, to.length, takers))
        self._to[rid] = [self._line(to, rank) for rank in takers]
        for line in self._to[rid]:
            line.epochs[to.epoch] = rid
            if line.sock is not None:
                self._tell(line, EpochOpened(to.epoch))

    def _ready(self, lot: ExportChunk | None) -> None:
        if lot is None:
            return
        if lot.is_over():
            self.say(KvSent(lot.rid, self.share.rank, lot.seq))
            return
        export = self._outbox.exports[lot.rid]
        if lot.end == export.length:
            export.computed = self.clock.now
        for line in self._to[lot.rid]:
            if line.way:
                self._announce(line, lot)
            else:
                line.lots.append(lot)

    def _announce(self, line: _ReceiverConnection, lot: ExportChunk) -> None:
        for portion in self._outbox.divide(lot, line.tokens):
            line.next += 1
            line.cargo[line.next] = _OutgoingPage(portion, portion.count * line.strips.width)
            if line.way != TCP:  # it lies ready by the time that there is room for it
                line.next_up.append(line.next)
            self._tell(
                line,
                PageAnnounced(
                    number=line.next,
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
        for line in self._to.pop(rid):
            line.epochs.pop(export.epoch, None)
            for number, cargo in [*line.cargo.items()]:
                if cargo.portion.epoch == export.epoch:
                    self._unload(line, number)
            if line is not silent and line.sock is not None:
                self._tell(line, EpochClosed(export.epoch, why))
        for lot in self._outbox.drop(rid):
            self.say(KvSent(rid, self.share.rank, lot.seq))

    def _unload(self, line: _ReceiverConnection, number: int) -> None:
        """Drop a portion; its page becomes free as soon as nothing reads it."""
        cargo = line.cargo.pop(number)
        if not cargo.busy:
            self._free(line, cargo)

    def _free(self, line: _ReceiverConnection, cargo: _OutgoingPage) -> None:
        if cargo.page is not None:
            self.pool.give(line.address, cargo.page)
            cargo.page = None

    def _complete(self, line: _ReceiverConnection, epoch: int) -> None:
        """A taker has everything it needs of a request."""
        if (rid := line.epochs.pop(epoch, None)) is None:
            return
        for number, cargo in [*line.cargo.items()]:
            if cargo.portion.epoch == epoch:
                self._taken(line, number)
        left = self._to[rid] = [other for other in self._to[rid] if other is not line]
        export = self._outbox.exports[rid]
        export.takers = tuple(other.rank for other in left)
        if not left:
            if export.computed is not None:
                self.counts.sent += 1
                self.counts.tail_ms += 1e3 * (self.clock.now - export.computed)
            self._drop(rid, "")

    # -- connections -------------------------------------------------------------------------------

    def _line(self, to: KvDestination, rank: int) -> _ReceiverConnection:
        key = to.node, to.addresses[rank]
        if (line := self._lines.get(key)) is None:
            strips = self.share.strips(to.wire.tp, rank, sent=True)
            line = _ReceiverConnection(*key, to.wire.tp, rank, strips, self.clock.now)
            self._lines[key] = line
            self._connect(line)
        return line

    def _connect(self, line: _ReceiverConnection) -> None:
        sock = self.ctx.socket(zmq.DEALER)
        line.monitor = Monitor(sock, zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        sock.setsockopt(zmq.RECONNECT_IVL, -1)  # a new connection would be a new peer
        bounds(sock)
        sock.setsockopt(zmq.IPV6, ipv6(line.address))
        known_to(sock, self._keys[line.attempts % len(self._keys)])
        try:
            sock.connect(line.address)
        except zmq.ZMQError as error:
            log.warning("K/V cannot be sent to %s: %s", line.address, error)
            self._disconnect(line)
            sock.close()
            return
        line.sock, line.attempts = sock, line.attempts + 1
        self.poller.register(sock, zmq.POLLIN)
        share = self.share
        self._tell(
            line,
            SenderHello(
                node=line.node,
                name=share.name,
                wire=share.wire,
                rank=share.rank,
                ways=self._ways.names,
                machine=self._ways.machine,
                memory=self._ways.memory,
            ),
        )
        for epoch in line.epochs:
            self._tell(line, EpochOpened(epoch))

    def _disconnect(self, line: _ReceiverConnection) -> None:
        if line.monitor is not None:
            line.monitor.close()
        if line.sock is not None:
            self.poller.unregister(line.sock)
            line.sock.close(0)
        line.sock = line.monitor = None
        line.control.clear()
        line.again = self.clock.now + AGAIN_S

    def _hang_up(self, line: _ReceiverConnection, why: str) -> None:
        """The other side is gone or unusable: disconnect."""
        if self._lines.pop((line.node, line.address), None) is None:
            return
        if line.epochs:
            self.counts.lapses += 1
            log.warning("K/V are not sent to %s any more: %s", line.address, why)
        for rid in [*line.epochs.values()]:
            self._drop(rid, why, silent=line)
        for number in [*line.cargo]:
            self._unload(line, number)
        self._disconnect(line)
        if line.pair is not None:
            line.pair.close()
            self._ending.append(line)

    def _tell(self, line: _ReceiverConnection, msg: Message) -> None:
        line.control.say(msg, self.clock.now)

    # -- what comes in -----------------------------------------------------------------------------

    def look(self, events: dict[Socket, int]) -> None:
        for line in [*self._lines.values()]:
            if line.sock is None:
                continue
            if line.sock in events:
                self._read(line)
            if line.monitor is not None and line.monitor.take():
                self._gone(line)

    def _gone(self, line: _ReceiverConnection) -> None:
        if line.way:
            self._hang_up(line, "its connection is closed")
        else:
            self._disconnect(line)  # it may not listen yet, or with another of the keys

    def _read(self, line: _ReceiverConnection) -> None:
        for _ in range(MOST_FRAMES):
            if line.sock is None:
                return
            try:
                raw = line.sock.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                msg = decode(raw)
                line.heard = self.clock.now
                self._hear(line, msg)
            except (CodecError, ProtocolViolation) as error:
                self.counts.refused += 1
                self._hang_up(line, str(error))
                return

    def _hear(self, line: _ReceiverConnection, msg: Message) -> None:
        match msg:
            case SenderAdmitted(way, tokens) if not line.way and way in self._ways.names:
                line.way, line.tokens = way, tokens
                line.tokens = min(tokens, max(1, self.pages.size // max(1, line.strips.width)))
                if way == NCCL:
                    line.pair = self._ways.pair(0, self.bell.ring)
                lots, line.lots = line.lots, []
                for lot in lots:
                    self._announce(line, lot)
            case PullPage(number) if line.way:
                if (cargo := line.cargo.get(number)) is not None:
                    if cargo.pulled:
                        raise ProtocolViolation(f"portion {number} is pulled twice")
                    cargo.pulled = True
                    if line.way == TCP:
                        line.next_up.append(number)
                    elif cargo.copied:
                        self._go(line, number, cargo)
            case PageReceived(number) if line.way:
                self._taken(line, number)
            case EpochClosed(epoch, ""):
                self._complete(line, epoch)
            case EpochClosed(epoch, why):
                if epoch in line.epochs:
                    self._drop(line.epochs[epoch], why, silent=line)
            case StoreValue(key, value) if line.pair is not None:
                line.pair.known(key, value)
            case TransferHeartbeat():
                pass
            case TransferRefused(why):
                self._hang_up(line, f"it refuses them: {why}")
            case _:
                raise ProtocolViolation(f"a {type(msg).__name__} that it cannot have meant")

    def _taken(self, line: _ReceiverConnection, number: int) -> None:
        cargo = line.cargo.get(number)
        if cargo is None:
            return  # of a request that has been dropped
        if cargo.busy and not cargo.copied:
            cargo.unwanted = True
            return
        self._unload(line, number)
        if not cargo.copied:  # the taker had these positions already
            cargo.portion.lot.copying += 1
            self._copied(cargo.portion)

    def _copied(self, portion: PageRange) -> None:
        if self._outbox.copied(portion):
            self.say(KvSent(portion.lot.rid, self.share.rank, portion.lot.seq))

    # -- what goes out -----------------------------------------------------------------------------

    def work(self) -> int:
        waiting = 0
        for line in [line for line in self._ending if line.pair and line.pair.closed]:
            self._ending.remove(line)
            for cargo in line.leaving.values():
                self._free(line, cargo)
        for line in [*self._lines.values()]:
            if line.sock is not None and line.pair is not None:
                self._step(line, line.pair)
        self._fill()  # pages freed above
        for line in [*self._lines.values()]:
            if line.sock is None:
                continue
            more = self._flush(line)
            if line.sock is not None:
                self.poller.modify(line.sock, zmq.POLLIN | (zmq.POLLOUT if more else 0))
            waiting += len(line.next_up)
        self.counts.waiting = waiting
        if any(line.cargo or line.lots for line in self._lines.values()):
            self.drained.clear()
        else:
            self.drained.set()
        return IDLE_MS

    def _fill(self) -> None:
        """Copy the next portions into pages, round-robin over the takers."""
        lines = [line for line in self._lines.values() if line.next_up]
        while lines:
            for line in [*lines]:
                if not line.next_up or (line.pair is not None and not line.pair.ready):
                    lines.remove(line)
                    continue
                if (cargo := line.cargo.get(line.next_up[0])) is None:
                    line.next_up.popleft()
                    continue
                # A portion that was asked for has a page there that others wait for. If pages that
                # nobody has asked for held it up here, servers could wait in a circle.
                spare = cargo.pulled or self.pool.free > 1
                if not spare or (page := self.pool.take(line.address)) is None:
                    lines.remove(line)
                    continue
                number = line.next_up.popleft()
                portion = cargo.portion
                portion.lot.copying += 1
                self._stamp += 1
                cargo.page, cargo.busy, cargo.stamp = page, True, self._stamp
                copied = self.pages.fill(
                    page, line.strips, portion.slots, host=line.way == TCP, stamp=cargo.stamp
                )
                self.copies.watch(copied, partial(self._filled, line, number, cargo))

    def _filled(self, line: _ReceiverConnection, number: int, cargo: _OutgoingPage) -> None:
        cargo.busy, cargo.copied = False, True
        self._copied(cargo.portion)
        assert cargo.page is not None
        if line.cargo.get(number) is not cargo:  # dropped in the meantime
            self._free(line, cargo)
        elif cargo.unwanted:
            self._taken(line, number)
        elif cargo.pulled or line.way == P2P:
            self._go(line, number, cargo)

    def _go(self, line: _ReceiverConnection, number: int, cargo: _OutgoingPage) -> None:
        """Its bytes are in a page, and the taker has room for them, or looks for it."""
        assert cargo.page is not None
        self.counts.sent_bytes += cargo.nbytes
        self.counts.sent_pages += 1
        self._tell(
            line,
            PageFilled(number=number, page=cargo.page, nbytes=cargo.nbytes, stamp=cargo.stamp),
        )
        if line.way == TCP:
            line.filled.append(number)
        elif line.pair is not None:
            cargo.busy, line.leaving[number] = True, cargo
            line.pair.send(number, self.pages.device(cargo.page)[: cargo.nbytes])

    def _step(self, line: _ReceiverConnection, pair: RankPair) -> None:
        """Advance the operations of communicators."""
        for key, value in pair.to_tell():
            self._tell(line, StoreValue(key, value))
        for number in pair.done(self.clock.now):
            cargo = line.leaving.pop(number)
            cargo.busy = False
            self._free(line, cargo)
        if pair.failed:
            self._hang_up(line, pair.failed)

    def _flush(self, line: _ReceiverConnection) -> bool:
        """Send what the socket accepts; returns whether there is more."""
        assert line.sock is not None
        try:
            line.control.flush(partial(line.sock.send, flags=zmq.NOBLOCK), self.clock.now)
            while line.filled:
                number = line.filled[0]
                cargo = line.cargo.get(number)
                if cargo is None or cargo.page is None:
                    line.filled.popleft()
                    continue
                self._send_piece(line.sock, number, cargo)
                if cargo.at == cargo.nbytes:
                    line.filled.popleft()
                    self._free(line, cargo)
        except zmq.Again:
            return True
        return False

    def _send_piece(self, sock: Socket, number: int, cargo: _OutgoingPage) -> None:
        assert cargo.page is not None
        end = min(cargo.at + PIECE, cargo.nbytes)
        piece = self.pages.host(cargo.page)[cargo.at : end]
        sock.send_multipart([encode(PageBytes(number, cargo.at)), piece], zmq.NOBLOCK)
        cargo.at = end

    # -- time --------------------------------------------------------------------------------------

    def tick(self) -> None:
        now = self.clock.now
        for line in [*self._lines.values()]:
            if now - line.heard > self.times.lapse_s:
                self._hang_up(line, f"it has been silent for {self.times.lapse_s:g} s")
            elif line.sock is None:
                if now >= line.again:
                    self._connect(line)
            elif why := line.control.stuck(now, self.times.lapse_s):
                self._hang_up(line, f"it {why}")
            elif now - line.control.said > self.times.alive_s:
                self._tell(line, TransferHeartbeat())

    def shut(self) -> None:
        for line in self._lines.values():
            if line.pair is not None:
                line.pair.close()
            self._disconnect(line)
