"""Receives K/V on a rank of a decode node from ranks of prefill nodes.

Owns the socket that they connect to, what each of them has announced, and what is in transit from
there into a page, and from a page into slots. Nothing but this thread writes into slots of a
request that is to come, and only while its epoch is open here.
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
    way: str = ""
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
        ways: transports that this rank supports.
        node: the id of this server.
        door: its listening socket, owned by the thread from now on.
    """

    def __init__(
        self,
        share: KvShard,
        pages: PageBuffers,
        ways: KvTransports,
        times: TransferTimeouts | None = None,
        *,
        node: str,
        door: KvListener,
    ) -> None:
        super().__init__(share, pages, times or TransferTimeouts(), door.ctx)
        self._node, self._ways = node, ways
        self.inbox = ImportTable(cache(lambda tp: share.partners(tp, sent=False)))
        self.guests: dict[bytes, _SenderConnection] = {}
        self._strips: dict[tuple[int, int], SliceSet] = {}
        self._ending: list[
            tuple[_SenderConnection, RankPair]
        ] = []  # connections whose pages may still be written
        # nobody reads it, so one is enough; it must not be freed while a communicator writes
        unread = pages.size if NCCL in ways.names else 0
        self._nowhere = torch.empty(unread, dtype=torch.uint8, device=ways.device)
        self._log = RateLimitedLog(log)
        self.door, self._strangers, self.port = door.sock, door.strangers, door.port
        self.poller.register(self.door, zmq.POLLIN)

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
            if (guest := self.guests.get(ident)) is not None:
                self._tell(guest, EpochClosed(entry.rid, why))
                self._forget_portions(guest, entry.rid)

    def _forget_portions(self, guest: _SenderConnection, epoch: int) -> None:
        for number, portion in [*guest.portions.items()]:
            if portion.epoch == epoch and not portion.busy:
                del guest.portions[number]
                self._free(guest, portion)

    def _free(self, guest: _SenderConnection, portion: _IncomingPage) -> None:
        if portion.page >= 0:
            self.pool.give(guest.ident, portion.page)
            portion.page = -1

    # -- what comes in -----------------------------------------------------------------------------

    def look(self, events: dict[Socket, int]) -> None:
        if self.door not in events:
            return
        for _ in range(MOST_FRAMES):
            try:
                ident, *frames = self.door.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._read(ident.bytes, frames)

    def _read(self, ident: bytes, frames: list[zmq.Frame]) -> None:
        guest = self.guests.get(ident)
        if guest is None:
            guest = self.guests[ident] = _SenderConnection(ident, self.clock.now)
        guest.heard = self.clock.now
        if guest.over:
            return
        try:
            msg = decode(frames[0].buffer)
        except CodecError as error:
            self.counts.refused += 1
            self._refuse(guest, str(error))
            return
        self._hear_one(guest, msg, [part.buffer for part in frames[1:]])

    def _hear_one(
        self, guest: _SenderConnection, msg: Message, data: Sequence[memoryview] = ()
    ) -> None:
        try:
            if len(data) != isinstance(msg, PageBytes):
                raise ProtocolViolation(f"a {type(msg).__name__} in {1 + len(data)} frames")
            if isinstance(msg, PageBytes):
                self._piece(guest, msg, data[0])
            else:
                self._hear(guest, msg)
        except ProtocolViolation as error:
            self.counts.refused += 1
            self._refuse(guest, str(error))

    def _hear(self, guest: _SenderConnection, msg: Message) -> None:
        if not guest.name:
            if not isinstance(msg, SenderHello):
                raise ProtocolViolation(f"a {type(msg).__name__} before it has said who it is")
            self._admit(guest, msg)
            return
        match msg:
            case EpochOpened(epoch) | PageAnnounced(_, epoch) | EpochClosed(epoch) if (
                self.inbox.is_early(epoch)
            ):
                self._keep(guest, epoch, msg)
            case EpochOpened(epoch):
                if not self.inbox.begin(epoch, guest.tp, guest.rank, guest.ident, self.clock.now):
                    self._tell(guest, EpochClosed(epoch, "it is not expected there"))
            case PageAnnounced():
                self._announced(guest, msg)
            case PageFilled():
                self._filled(guest, msg)
            case EpochClosed(epoch, why):
                entry = self.inbox.imports.get(epoch)
                if entry is not None and entry.links.get(guest.rank) == guest.ident:
                    self._drop(epoch, why or "its sender gives up")
            case StoreValue(key, value) if guest.pair is not None:
                guest.pair.known(key, value)
            case TransferHeartbeat():
                pass
            case TransferRefused(why):
                self._end_guest(guest, f"its sender refuses: {why}")
            case _:
                raise ProtocolViolation(f"a {type(msg).__name__} that it cannot have meant")

    def _keep(self, guest: _SenderConnection, epoch: int, msg: Message) -> None:
        """Its request is unknown here: our scheduler's message may still be on its way."""
        _, said = guest.early.setdefault(epoch, (self.clock.now, []))
        said.append(msg)
        guest.num_early += 1
        if guest.num_early > MOST_READY:
            raise ProtocolViolation(f"{len(guest.early)} requests that nobody expects")

    def _hear_early(self, epoch: int) -> None:
        for guest in [*self.guests.values()]:
            _, said = guest.early.pop(epoch, (0.0, []))
            guest.num_early -= len(said)
            for msg in said:
                if not guest.over:
                    self._hear_one(guest, msg)

    def _admit(self, guest: _SenderConnection, msg: SenderHello) -> None:
        guest.name, guest.tp, guest.rank = msg.name or "?", msg.wire.tp, msg.rank
        if msg.wire.tp > MOST_RANKS:
            raise ProtocolViolation(f"a server of {msg.wire.tp} ranks")
        if msg.node != self._node:
            self._refuse(guest, f"server {msg.node} is not here any more")
            return
        if difference := self.share.wire.difference(msg.wire):
            self._refuse(guest, f"K/V differ: {difference}")
            return
        key = guest.tp, guest.rank
        if key not in self._strips:
            self._strips[key] = self.share.strips(*key, sent=False)
        guest.strips = self._strips[key]
        if not guest.strips.width:
            raise ProtocolViolation(f"rank {guest.rank} of {guest.tp} has nothing for us")
        way, window = self._ways.choose(msg.ways, msg.machine, msg.memory)
        if way is None:
            self._refuse(guest, self._ways.nothing_in_common(msg.ways))
            return
        guest.way, guest.window = way, window
        if way == NCCL:
            guest.pair = self._ways.pair(1, self.bell.ring)
        log.info("K/V of %s come by %s", guest.name, way)
        self._tell(guest, SenderAdmitted(way, max(1, self.pages.size // guest.strips.width)))

    def _announced(self, guest: _SenderConnection, msg: PageAnnounced) -> None:
        if msg.number in guest.portions or len(guest.portions) >= MOST_READY:
            raise ProtocolViolation(f"portion {msg.number} beside {len(guest.portions)} others")
        portion = _IncomingPage(msg.epoch, msg.first, msg.count, since=self.clock.now)
        if guest.nbytes(portion) > self.pages.size:
            raise ProtocolViolation(f"a portion of {msg.count} positions, more than a page has")
        if self.inbox.wants(msg.epoch, guest.rank, guest.ident, msg.first, msg.count):
            guest.portions[msg.number] = portion
            if guest.way != P2P:
                guest.ready.append(msg.number)
        else:
            self._tell(guest, PageReceived(msg.number))

    def _piece(self, guest: _SenderConnection, msg: PageBytes, data: memoryview) -> None:
        if guest.way != TCP:
            raise ProtocolViolation("bytes that come by another way")
        if (portion := guest.portions.get(msg.number)) is None:
            return  # of a request that has ended here
        end = msg.offset + len(data)
        pulled = portion.state is _PageState.PULLED
        if not pulled or msg.offset != portion.got or end > guest.nbytes(portion):
            raise ProtocolViolation(f"bytes {msg.offset} to {end} of portion {msg.number}")
        self.pages.host(portion.page)[msg.offset : end] = data
        portion.got, portion.since = end, self.clock.now
        if end == guest.nbytes(portion):
            self._write(guest, msg.number, portion)

    def _filled(self, guest: _SenderConnection, msg: PageFilled) -> None:
        """The bytes are in a page of the sender's."""
        number, portion = msg.number, guest.portions.get(msg.number)
        if portion is None:
            # its request has ended here; what a communicator sends must be received all the same
            if guest.pair is not None:
                if msg.nbytes > self.pages.size:
                    raise ProtocolViolation(f"{msg.nbytes} bytes, more than a page has")
                guest.pair.receive(number, self._nowhere[: msg.nbytes])
            return
        expected = _PageState.READY if guest.window is not None else _PageState.PULLED
        same = portion.there < 0 and msg.nbytes == guest.nbytes(portion)
        if portion.state is not expected or not same:
            raise ProtocolViolation(f"portion {number} is filled while it is {portion.state.name}")
        portion.since = guest.moved = self.clock.now
        if guest.window is not None:
            if not guest.window.has(msg.page, msg.nbytes):
                raise ProtocolViolation(
                    f"page {msg.page} with {msg.nbytes} bytes, which it has not"
                )
            portion.there, portion.stamp = msg.page, msg.stamp
            guest.ready.append(number)
        elif guest.pair is not None:
            portion.state = _PageState.FETCHING
            guest.pair.receive(number, self.pages.device(portion.page)[: msg.nbytes])

    # -- from pages into slots ---------------------------------------------------------------------

    def work(self) -> int:
        guests = [*self.guests.values()]
        for guest in guests:
            if guest.pair is not None:
                self._step(guest, guest.pair)
        self._pull()  # into pages freed above
        more = [self._flush(guest) and not guest.over for guest in guests]
        for guest, pair in [entry for entry in self._ending if entry[1].closed]:
            self._ending.remove((guest, pair))
            for number, portion in [*guest.portions.items()]:
                if portion.state is _PageState.FETCHING:
                    self._free(guest, guest.portions.pop(number))
        return SOON_MS if any(more) else IDLE_MS

    def _pull(self) -> None:
        """Fetch or request portions while there are free pages, round-robin over the senders."""
        guests = [g for g in self.guests.values() if g.ready and not g.over]
        self.counts.waiting = sum(len(guest.ready) for guest in guests)
        while guests:
            guests = [guest for guest in guests if self._pull_one(guest)]

    def _pull_one(self, guest: _SenderConnection) -> bool:
        """Request one portion of a sender; returns whether there may be another one."""
        while guest.ready and (portion := guest.portions.get(guest.ready[0])) is None:
            guest.ready.popleft()  # its request has ended
        if not guest.ready or (guest.pair is not None and not guest.pair.ready):
            return False
        if (page := self.pool.take(guest.ident)) is None:
            return False
        number = guest.ready.popleft()
        assert portion is not None
        portion.page, portion.state, portion.since = page, _PageState.PULLED, self.clock.now
        if guest.window is None:
            self._tell(guest, PullPage(number))
            return True
        self._write(guest, number, portion, guest.window)
        return True

    def _write(
        self,
        guest: _SenderConnection,
        number: int,
        portion: _IncomingPage,
        window: PeerMemory | None = None,
    ) -> None:
        """Copy its bytes to their slots, if the request is still open. They are in its page, or
        are first copied there through ``window``."""
        place = portion.epoch, guest.rank, guest.ident, portion.first, portion.count
        slots = self.inbox.write(*place)
        if slots is None:
            self._done(guest, number, portion)
            return
        portion.state = _PageState.WRITING
        page, fetched = portion.page, None
        if window is not None:
            here = self.pages.device(page)[: guest.nbytes(portion)]
            fetched = window.fetch(portion.there, here, self.pages.seen(page))
        host = guest.way == TCP
        copied = self.pages.empty(page, guest.strips, slots, host=host, after=fetched)
        self.copies.watch(copied, partial(self._written, guest, number, portion))

    def _done(self, guest: _SenderConnection, number: int, portion: _IncomingPage) -> None:
        """A portion no longer needs its page, nor its sender's."""
        guest.portions.pop(number, None)
        self._free(guest, portion)
        self._tell(guest, PageReceived(number))

    def _written(self, guest: _SenderConnection, number: int, portion: _IncomingPage) -> None:
        held = guest.way != P2P or int(self.pages.seen(portion.page)) == portion.stamp
        self.counts.taken_bytes += guest.nbytes(portion)
        self.counts.taken_pages += 1
        self._done(guest, number, portion)
        if not held:  # what is in its slots is not its own
            self._drop(portion.epoch, "its sender has used the page for something else")
        place = portion.epoch, guest.rank, portion.first, portion.count
        self._end(self.inbox.written(*place))

    def _received(self, guest: _SenderConnection, number: int, portion: _IncomingPage) -> None:
        """What a communicator has sent is in its page."""
        if guest.portions.get(number) is portion and portion.epoch in self.inbox.imports:
            self._write(guest, number, portion)
        else:  # ended meanwhile
            guest.portions.pop(number, None)
            self._free(guest, portion)

    def _step(self, guest: _SenderConnection, pair: RankPair) -> None:
        """Advance the operations of communicators."""
        for key, value in pair.to_tell():
            self._tell(guest, StoreValue(key, value))
        for number in pair.done(self.clock.now):
            if (portion := guest.portions.get(number)) is not None:
                self._received(guest, number, portion)
        if pair.failed and not guest.over:
            self._refuse(guest, pair.failed)

    # -- connections and time ----------------------------------------------------------------------

    def _tell(self, guest: _SenderConnection, msg: Message) -> None:
        guest.out.say(msg, self.clock.now)

    def _flush(self, guest: _SenderConnection) -> bool:
        """Send what the socket accepts; returns whether there is more."""
        try:
            guest.out.flush(
                lambda frame: self.door.send_multipart([guest.ident, frame], zmq.NOBLOCK),
                self.clock.now,
            )
        except zmq.Again:  # many frames are sent at once when many requests end
            return True
        except zmq.ZMQError:  # its connection is closed
            guest.out.clear()
            self._end_guest(guest, "its sender has hung up")
        return False

    def _refuse(self, guest: _SenderConnection, why: str) -> None:
        """Ignore further frames from it; the others continue."""
        self._log.warning("K/V of %s are refused: %s", guest.name or "nobody we know", why)
        guest.out.clear()  # send only the refusal, at once
        self._tell(guest, TransferRefused(why))
        self._end_guest(guest, why)

    def _end_guest(self, guest: _SenderConnection, why: str) -> None:
        guest.over = True
        for entry in [*self.inbox.imports.values()]:
            if entry.links.get(guest.rank) == guest.ident:
                self._drop(entry.rid, why)
        for number, portion in [*guest.portions.items()]:
            if not portion.busy:
                self._free(guest, guest.portions.pop(number))
        guest.ready.clear()
        if guest.pair is not None:
            guest.pair.close()
            self._ending.append((guest, guest.pair))
            guest.pair = None
        if guest.window is not None:
            guest.window.close()
            guest.window = None

    def tick(self) -> None:
        self.counts.strangers = self._strangers.count()  # also that nothing of them piles up
        now, times = self.clock.now, self.times
        for guest in [*self.guests.values()]:
            silent = now - guest.heard
            if guest.over:
                if silent > GONE_S:
                    del self.guests[guest.ident]
            elif silent > times.lapse_s:
                self._refuse(guest, f"its sender has been silent for {times.lapse_s:g} s")
            elif why := guest.out.stuck(now, times.lapse_s):
                self._refuse(guest, f"its sender {why}")
            elif now - guest.out.said > times.alive_s:
                self._tell(guest, TransferHeartbeat())
            for epoch, (since, said) in [*guest.early.items()]:
                if now - since > times.early_s:
                    del guest.early[epoch]
                    guest.num_early -= len(said)
                    self.inbox.end(epoch)
                    self._tell(guest, EpochClosed(epoch, "it is not expected there"))
        for entry in [*self.inbox.imports.values()]:
            if entry.why is None and (why := self._late(entry)):
                self._drop(entry.rid, why)

    def _late(self, entry: OpenImport) -> str:
        """Why an import cannot complete; "": it may."""
        now, times = self.clock.now, self.times
        if entry.tp == 0:
            late = now - entry.since > times.first_s
            return f"no sender has been heard of in {times.first_s:g} s" if late else ""
        for rank in entry.had:
            if rank not in entry.links and now - entry.since > times.lapse_s:
                return f"rank {rank} of its sender has not come in {times.lapse_s:g} s"
        for ident in entry.links.values():
            assert isinstance(ident, bytes)
            if (guest := self.guests.get(ident)) is None:
                continue
            for portion in guest.portions.values():
                limit_s = times.lapse_s
                if portion.page < 0:  # its sender's pages may be others' until these have lapsed
                    limit_s = 2 * limit_s if guest.way == P2P and portion.there < 0 else inf
                since = portion.since if portion.page >= 0 else max(portion.since, guest.moved)
                if portion.epoch == entry.rid and now - since > limit_s:
                    return f"{portion.count} tokens have not come in {limit_s:g} s"
        return ""

    def shut(self) -> None:
        for guest in self.guests.values():
            if guest.pair is not None:
                guest.pair.close()
            if guest.window is not None:
                guest.window.close()
        self._strangers.close()
