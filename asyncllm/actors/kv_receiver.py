"""Receives K/V on a rank of a decode node from ranks of prefill nodes.

Owns the socket that they connect to, what each of them has announced, and the data in transit into
pages, and from pages into slots. Only this thread writes into the slots of an import, and only
while its epoch is open here.
"""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, partial
from math import inf

import torch
import zmq

from asyncllm.actors.kv_listener import KvListener
from asyncllm.actors.kv_thread import (
    IDLE_MS,
    SOON_MS,
    ControlQueue,
    KvShard,
    TransferThread,
    TransferTimeouts,
)
from asyncllm.actors.transport import Socket
from asyncllm.codec import CodecError, Message, decode
from asyncllm.core.kv_transfer_state import ImportTable, OpenImport, ProtocolViolation
from asyncllm.engine.kv_pages import PageBuffers, SliceSet
from asyncllm.engine.kv_pair import RankPair
from asyncllm.engine.kv_transports import NCCL, P2P, TCP, KvTransports, PeerMemory
from asyncllm.log import RateLimitedLog
from asyncllm.messages import CancelTransfer, ImportKv, KvArrived, TransferFailed
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

MOST_FRAMES = 256  # read per iteration
MOST_READY = 1 << 16  # portions that a sender may have announced
MOST_RANKS = 1024
GONE_S = 30.0  # refused connections are forgotten after this much silence

log = logging.getLogger(__name__)


class _PageState(Enum):
    """The state of a portion; says whether its page may be reused."""

    READY = 0  # at its sender; it has no page here
    PULLED = 1  # requested, or arriving in pieces: the page may be freed
    FETCHING = 2  # being received into the page, which cannot be cancelled
    WRITING = 3  # being copied out of the page; with p2p first into it


@dataclass(slots=True, eq=False)
class _IncomingPage:
    """A portion announced by a sender.

    Attributes:
        page: its page; -1: none yet.
        there: the sender's page that holds it; -1: none that can be fetched.
        stamp: of that page, for as long as it does.
        got: bytes received in pieces.
        since: time of the last progress.
    """

    epoch: int
    first: int
    count: int
    state: _PageState = _PageState.READY
    page: int = -1
    there: int = -1
    stamp: int = 0
    got: int = 0
    since: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether its page is in use."""
        return self.state in (_PageState.FETCHING, _PageState.WRITING)


@dataclass(slots=True, eq=False)
class _SenderConnection:
    """A connection, and the rank at its other end.

    Attributes:
        name: for the log; "": not identified yet.
        out: messages for it.
        moved: when it last said that a page holds a portion.
        over: further frames from it are ignored.
        early: by epoch: since when, and its announcements.
        ready: numbers of announced portions that wait for a page here, in order.
        portions: by number, including requested ones.
    """

    ident: bytes
    heard: float
    out: ControlQueue = field(default_factory=ControlQueue)
    moved: float = 0.0
    name: str = ""
    tp: int = 0
    rank: int = 0
    strips: SliceSet = field(default_factory=lambda: SliceSet(()))
    transport: str = ""
    over: bool = False
    window: PeerMemory | None = None
    pair: RankPair | None = None
    early: dict[int, tuple[float, list[Message]]] = field(default_factory=dict)
    num_early: int = 0
    ready: deque[int] = field(default_factory=deque)
    portions: dict[int, _IncomingPage] = field(default_factory=dict)

    def nbytes(self, portion: _IncomingPage) -> int:
        return portion.count * self.strips.width


class KvReceiver(TransferThread):
    """See the module.

    Args:
        transports: those that this rank supports.
        node: the id of this server.
        listener: its listening socket, owned by the thread from now on.
    """

    def __init__(
        self,
        share: KvShard,
        pages: PageBuffers,
        transports: KvTransports,
        times: TransferTimeouts | None = None,
        *,
        node: str,
        listener: KvListener,
    ) -> None:
        super().__init__(share, pages, times or TransferTimeouts(), listener.ctx)
        self._node, self._transports = node, transports
        self.inbox = ImportTable(cache(lambda tp: share.partners(tp, sent=False)))
        self.senders: dict[bytes, _SenderConnection] = {}
        self._strips: dict[tuple[int, int], SliceSet] = {}
        self._ending: list[
            tuple[_SenderConnection, RankPair]
        ] = []  # connections whose pages may still be written
        # nobody reads it, so one is enough; it must not be freed while a communicator writes
        unread = pages.size if NCCL in transports.names else 0
        self._nowhere = torch.empty(unread, dtype=torch.uint8, device=transports.device)
        self._log = RateLimitedLog(log)
        self.listener, self._failed_handshakes, self.port = (
            listener.sock,
            listener.failed_handshakes,
            listener.port,
        )
        self.poller.register(self.listener, zmq.POLLIN)

    # -- from the scheduler ------------------------------------------------------------------------

    def take(self, msg: Message) -> None:
        match msg:
            case ImportKv():
                slots = array("i", msg.slots)
                entry = OpenImport(msg.rid, msg.hit, msg.length, slots, since=self.clock.now)
                self.inbox.expect(entry)
                self._hear_early(msg.rid)
                if not self.share.partners(self.share.wire.tp, sent=False):  # only padding heads
                    self._end(self.inbox.drop(msg.rid, ""), arrived=True)
            case CancelTransfer(rid):
                self._drop(rid, "")
            case _:  # others are for the sender
                raise TypeError(type(msg).__name__)

    def _drop(self, rid: int, why: str) -> None:
        """Stop writing K/V of a request; ``why`` "": on its scheduler's request."""
        self._end(self.inbox.drop(rid, why))

    def _end(self, entry: OpenImport | None, *, arrived: bool = False) -> None:
        """End an import: notify the scheduler and its senders, and free its pages."""
        if entry is None:
            return
        arrived = arrived or entry.why is None
        rank = self.share.rank
        if arrived:
            self.say(KvArrived(entry.rid, rank))
            self.counts.transfers += 1
            self.counts.transfer_ms += 1e3 * (self.clock.now - entry.since)
            self.counts.taken_tokens += entry.length - entry.hit
        else:
            self.say(TransferFailed(entry.rid, rank, entry.why or ""))
            if entry.why:
                self.counts.lapses += 1
                log.warning("K/V of request %x will not come: %s", entry.rid, entry.why)
        why = "" if arrived else entry.why or "its request has ended there"
        for ident in entry.links.values():
            assert isinstance(ident, bytes)
            if (sender := self.senders.get(ident)) is not None:
                self._tell(sender, EpochClosed(entry.rid, why))
                self._forget_portions(sender, entry.rid)

    def _forget_portions(self, sender: _SenderConnection, epoch: int) -> None:
        for number, portion in [*sender.portions.items()]:
            if portion.epoch == epoch and not portion.busy:
                del sender.portions[number]
                self._free(sender, portion)

    def _free(self, sender: _SenderConnection, portion: _IncomingPage) -> None:
        if portion.page >= 0:
            self.pool.give(sender.ident, portion.page)
            portion.page = -1

    # -- what comes in -----------------------------------------------------------------------------

    def look(self, events: dict[Socket, int]) -> None:
        if self.listener not in events:
            return
        for _ in range(MOST_FRAMES):
            try:
                ident, *frames = self.listener.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._read(ident.bytes, frames)

    def _read(self, ident: bytes, frames: list[zmq.Frame]) -> None:
        sender = self.senders.get(ident)
        if sender is None:
            sender = self.senders[ident] = _SenderConnection(ident, self.clock.now)
        sender.heard = self.clock.now
        if sender.over:
            return
        try:
            msg = decode(frames[0].buffer)
        except CodecError as error:
            self.counts.refused += 1
            self._refuse(sender, str(error))
            return
        self._hear_one(sender, msg, [part.buffer for part in frames[1:]])

    def _hear_one(
        self, sender: _SenderConnection, msg: Message, data: Sequence[memoryview] = ()
    ) -> None:
        try:
            if len(data) != isinstance(msg, PageBytes):
                raise ProtocolViolation(f"a {type(msg).__name__} in {1 + len(data)} frames")
            if isinstance(msg, PageBytes):
                self._piece(sender, msg, data[0])
            else:
                self._hear(sender, msg)
        except ProtocolViolation as error:
            self.counts.refused += 1
            self._refuse(sender, str(error))

    def _hear(self, sender: _SenderConnection, msg: Message) -> None:
        if not sender.name:
            if not isinstance(msg, SenderHello):
                raise ProtocolViolation(f"a {type(msg).__name__} before it has said who it is")
            self._admit(sender, msg)
            return
        match msg:
            case EpochOpened(epoch) | PageAnnounced(_, epoch) | EpochClosed(epoch) if (
                self.inbox.is_early(epoch)
            ):
                self._keep(sender, epoch, msg)
            case EpochOpened(epoch):
                if not self.inbox.begin(
                    epoch, sender.tp, sender.rank, sender.ident, self.clock.now
                ):
                    self._tell(sender, EpochClosed(epoch, "it is not expected there"))
            case PageAnnounced():
                self._announced(sender, msg)
            case PageFilled():
                self._filled(sender, msg)
            case EpochClosed(epoch, why):
                entry = self.inbox.imports.get(epoch)
                if entry is not None and entry.links.get(sender.rank) == sender.ident:
                    self._drop(epoch, why or "its sender gives up")
            case StoreValue(key, value) if sender.pair is not None:
                sender.pair.known(key, value)
            case TransferHeartbeat():
                pass
            case TransferRefused(why):
                self._end_sender(sender, f"its sender refuses: {why}")
            case _:
                raise ProtocolViolation(f"a {type(msg).__name__} that it cannot have meant")

    def _keep(self, sender: _SenderConnection, epoch: int, msg: Message) -> None:
        """Its request is unknown here: our scheduler's message may still be on its way."""
        _, said = sender.early.setdefault(epoch, (self.clock.now, []))
        said.append(msg)
        sender.num_early += 1
        if sender.num_early > MOST_READY:
            raise ProtocolViolation(f"{len(sender.early)} requests that nobody expects")

    def _hear_early(self, epoch: int) -> None:
        for sender in [*self.senders.values()]:
            _, said = sender.early.pop(epoch, (0.0, []))
            sender.num_early -= len(said)
            for msg in said:
                if not sender.over:
                    self._hear_one(sender, msg)

    def _admit(self, sender: _SenderConnection, msg: SenderHello) -> None:
        sender.name, sender.tp, sender.rank = msg.name or "?", msg.wire.tp, msg.rank
        if msg.wire.tp > MOST_RANKS:
            raise ProtocolViolation(f"a server of {msg.wire.tp} ranks")
        if msg.node != self._node:
            self._refuse(sender, f"server {msg.node} is not here any more")
            return
        if difference := self.share.wire.difference(msg.wire):
            self._refuse(sender, f"K/V differ: {difference}")
            return
        key = sender.tp, sender.rank
        if key not in self._strips:
            self._strips[key] = self.share.strips(*key, sent=False)
        sender.strips = self._strips[key]
        if not sender.strips.width:
            raise ProtocolViolation(f"rank {sender.rank} of {sender.tp} has nothing for us")
        transport, window = self._transports.choose(msg.transports, msg.machine, msg.memory)
        if transport is None:
            self._refuse(sender, self._transports.nothing_in_common(msg.transports))
            return
        sender.transport, sender.window = transport, window
        if transport == NCCL:
            sender.pair = self._transports.pair(1, self.bell.ring)
        log.info("K/V of %s come by %s", sender.name, transport)
        self._tell(
            sender, SenderAdmitted(transport, max(1, self.pages.size // sender.strips.width))
        )

    def _announced(self, sender: _SenderConnection, msg: PageAnnounced) -> None:
        if msg.number in sender.portions or len(sender.portions) >= MOST_READY:
            raise ProtocolViolation(f"portion {msg.number} beside {len(sender.portions)} others")
        portion = _IncomingPage(msg.epoch, msg.first, msg.count, since=self.clock.now)
        if sender.nbytes(portion) > self.pages.size:
            raise ProtocolViolation(f"a portion of {msg.count} positions, more than a page has")
        if self.inbox.wants(msg.epoch, sender.rank, sender.ident, msg.first, msg.count):
            sender.portions[msg.number] = portion
            if sender.transport != P2P:
                sender.ready.append(msg.number)
        else:
            self._tell(sender, PageReceived(msg.number))

    def _piece(self, sender: _SenderConnection, msg: PageBytes, data: memoryview) -> None:
        if sender.transport != TCP:
            raise ProtocolViolation("bytes that come by another way")
        if (portion := sender.portions.get(msg.number)) is None:
            return  # of a request that has ended here
        end = msg.offset + len(data)
        pulled = portion.state is _PageState.PULLED
        if not pulled or msg.offset != portion.got or end > sender.nbytes(portion):
            raise ProtocolViolation(f"bytes {msg.offset} to {end} of portion {msg.number}")
        self.pages.host(portion.page)[msg.offset : end] = data
        portion.got, portion.since = end, self.clock.now
        if end == sender.nbytes(portion):
            self._write(sender, msg.number, portion)

    def _filled(self, sender: _SenderConnection, msg: PageFilled) -> None:
        """The bytes are in a page of the sender's."""
        number, portion = msg.number, sender.portions.get(msg.number)
        if portion is None:
            # its request has ended here; what a communicator sends must be received all the same
            if sender.pair is not None:
                if msg.nbytes > self.pages.size:
                    raise ProtocolViolation(f"{msg.nbytes} bytes, more than a page has")
                sender.pair.receive(number, self._nowhere[: msg.nbytes])
            return
        expected = _PageState.READY if sender.window is not None else _PageState.PULLED
        same = portion.there < 0 and msg.nbytes == sender.nbytes(portion)
        if portion.state is not expected or not same:
            raise ProtocolViolation(f"portion {number} is filled while it is {portion.state.name}")
        portion.since = sender.moved = self.clock.now
        if sender.window is not None:
            if not sender.window.has(msg.page, msg.nbytes):
                raise ProtocolViolation(
                    f"page {msg.page} with {msg.nbytes} bytes, which it has not"
                )
            portion.there, portion.stamp = msg.page, msg.stamp
            sender.ready.append(number)
        elif sender.pair is not None:
            portion.state = _PageState.FETCHING
            sender.pair.receive(number, self.pages.device(portion.page)[: msg.nbytes])

    # -- from pages into slots ---------------------------------------------------------------------

    def work(self) -> int:
        senders = [*self.senders.values()]
        for sender in senders:
            if sender.pair is not None:
                self._step(sender, sender.pair)
        self._pull()  # into pages freed above
        more = [self._flush(sender) and not sender.over for sender in senders]
        for sender, pair in [entry for entry in self._ending if entry[1].closed]:
            self._ending.remove((sender, pair))
            for number, portion in [*sender.portions.items()]:
                if portion.state is _PageState.FETCHING:
                    self._free(sender, sender.portions.pop(number))
        return SOON_MS if any(more) else IDLE_MS

    def _pull(self) -> None:
        """Fetch or request portions while there are free pages, round-robin over the senders."""
        senders = [g for g in self.senders.values() if g.ready and not g.over]
        self.counts.waiting = sum(len(sender.ready) for sender in senders)
        while senders:
            senders = [sender for sender in senders if self._pull_one(sender)]

    def _pull_one(self, sender: _SenderConnection) -> bool:
        """Request one portion of a sender; returns whether there may be another one."""
        while sender.ready and (portion := sender.portions.get(sender.ready[0])) is None:
            sender.ready.popleft()  # its request has ended
        if not sender.ready or (sender.pair is not None and not sender.pair.ready):
            return False
        if (page := self.pool.take(sender.ident)) is None:
            return False
        number = sender.ready.popleft()
        assert portion is not None
        portion.page, portion.state, portion.since = page, _PageState.PULLED, self.clock.now
        if sender.window is None:
            self._tell(sender, PullPage(number))
            return True
        self._write(sender, number, portion, sender.window)
        return True

    def _write(
        self,
        sender: _SenderConnection,
        number: int,
        portion: _IncomingPage,
        window: PeerMemory | None = None,
    ) -> None:
        """Copy its bytes to their slots, if the request is still open. They are in its page, or
        are first copied there through ``window``."""
        place = portion.epoch, sender.rank, sender.ident, portion.first, portion.count
        slots = self.inbox.write(*place)
        if slots is None:
            self._done(sender, number, portion)
            return
        portion.state = _PageState.WRITING
        page, fetched = portion.page, None
        if window is not None:
            here = self.pages.device(page)[: sender.nbytes(portion)]
            fetched = window.fetch(portion.there, here, self.pages.seen(page))
        host = sender.transport == TCP
        copied = self.pages.empty(page, sender.strips, slots, host=host, after=fetched)
        self.copies.watch(copied, partial(self._written, sender, number, portion))

    def _done(self, sender: _SenderConnection, number: int, portion: _IncomingPage) -> None:
        """A portion no longer needs its page, nor its sender's."""
        sender.portions.pop(number, None)
        self._free(sender, portion)
        self._tell(sender, PageReceived(number))

    def _written(self, sender: _SenderConnection, number: int, portion: _IncomingPage) -> None:
        held = sender.transport != P2P or int(self.pages.seen(portion.page)) == portion.stamp
        self.counts.taken_bytes += sender.nbytes(portion)
        self.counts.taken_pages += 1
        self._done(sender, number, portion)
        if not held:  # what is in its slots is not its own
            self._drop(portion.epoch, "its sender has used the page for something else")
        place = portion.epoch, sender.rank, portion.first, portion.count
        self._end(self.inbox.written(*place))

    def _received(self, sender: _SenderConnection, number: int, portion: _IncomingPage) -> None:
        """What a communicator has sent is in its page."""
        if sender.portions.get(number) is portion and portion.epoch in self.inbox.imports:
            self._write(sender, number, portion)
        else:  # ended meanwhile
            sender.portions.pop(number, None)
            self._free(sender, portion)

    def _step(self, sender: _SenderConnection, pair: RankPair) -> None:
        """Advance the operations of communicators."""
        for key, value in pair.to_tell():
            self._tell(sender, StoreValue(key, value))
        for number in pair.done(self.clock.now):
            if (portion := sender.portions.get(number)) is not None:
                self._received(sender, number, portion)
        if pair.failed and not sender.over:
            self._refuse(sender, pair.failed)

    # -- connections and time ----------------------------------------------------------------------

    def _tell(self, sender: _SenderConnection, msg: Message) -> None:
        sender.out.say(msg, self.clock.now)

    def _flush(self, sender: _SenderConnection) -> bool:
        """Send what the socket accepts; returns whether there is more."""
        try:
            sender.out.flush(
                lambda frame: self.listener.send_multipart([sender.ident, frame], zmq.NOBLOCK),
                self.clock.now,
            )
        except zmq.Again:  # many frames are sent at once when many requests end
            return True
        except zmq.ZMQError:  # its connection is closed
            sender.out.clear()
            self._end_sender(sender, "its sender has hung up")
        return False

    def _refuse(self, sender: _SenderConnection, why: str) -> None:
        """Ignore further frames from it; the others continue."""
        self._log.warning("K/V of %s are refused: %s", sender.name or "nobody we know", why)
        sender.out.clear()  # send only the refusal, at once
        self._tell(sender, TransferRefused(why))
        self._end_sender(sender, why)

    def _end_sender(self, sender: _SenderConnection, why: str) -> None:
        sender.over = True
        for entry in [*self.inbox.imports.values()]:
            if entry.links.get(sender.rank) == sender.ident:
                self._drop(entry.rid, why)
        for number, portion in [*sender.portions.items()]:
            if not portion.busy:
                self._free(sender, sender.portions.pop(number))
        sender.ready.clear()
        if sender.pair is not None:
            sender.pair.close()
            self._ending.append((sender, sender.pair))
            sender.pair = None
        if sender.window is not None:
            sender.window.close()
            sender.window = None

    def tick(self) -> None:
        self.counts.failed_handshakes = (
            self._failed_handshakes.count()
        )  # also that nothing of them piles up
        now, times = self.clock.now, self.times
        for sender in [*self.senders.values()]:
            silent = now - sender.heard
            if sender.over:
                if silent > GONE_S:
                    del self.senders[sender.ident]
            elif silent > times.lapse_s:
                self._refuse(sender, f"its sender has been silent for {times.lapse_s:g} s")
            elif why := sender.out.stuck(now, times.lapse_s):
                self._refuse(sender, f"its sender {why}")
            elif now - sender.out.said > times.alive_s:
                self._tell(sender, TransferHeartbeat())
            for epoch, (since, said) in [*sender.early.items()]:
                if now - since > times.early_s:
                    del sender.early[epoch]
                    sender.num_early -= len(said)
                    self.inbox.end(epoch)
                    self._tell(sender, EpochClosed(epoch, "it is not expected there"))
        for entry in [*self.inbox.imports.values()]:
            if entry.why is None and (why := self._lacks_senders(entry)):
                self._drop(entry.rid, why)
        for epoch, why in self._overdue().items():
            self._drop(epoch, why)

    def _lacks_senders(self, entry: OpenImport) -> str:
        """Why an import cannot complete; "": it may, as far as its senders have come."""
        now, times = self.clock.now, self.times
        if entry.tp == 0:
            late = now - entry.since > times.first_s
            return f"no sender has been heard of in {times.first_s:g} s" if late else ""
        for rank in entry.had:
            if rank not in entry.links and now - entry.since > times.lapse_s:
                return f"rank {rank} of its sender has not come in {times.lapse_s:g} s"
        return ""

    def _overdue(self) -> dict[int, str]:
        """By epoch, why imports with portions that do not come cannot complete."""
        now, found = self.clock.now, {}
        for sender in self.senders.values():
            for portion in sender.portions.values():
                limit_s = self.times.lapse_s
                if portion.page < 0:  # its sender's pages may be others' until these have lapsed
                    limit_s = 2 * limit_s if sender.transport == P2P and portion.there < 0 else inf
                since = portion.since if portion.page >= 0 else max(portion.since, sender.moved)
                if now - since > limit_s:
                    found[portion.epoch] = f"{portion.count} tokens have not come in {limit_s:g} s"
        return found

    def shut(self) -> None:
        for sender in self.senders.values():
            if sender.pair is not None:
                sender.pair.close()
            if sender.window is not None:
                sender.window.close()
        self._failed_handshakes.close()
