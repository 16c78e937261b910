"""The channel between the servers of a cluster: connects them and carries their frames.

Each server has one end, in one of its processes. It listens, connects to others, or both; two
connected ends are peers, and know each other's :class:`PeerInfo`. Knows frames and peers; knows
neither actors nor the contents of messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

import zmq

from asyncllm.actors.peer_messages import (
    PeerGoodbye,
    PeerHeartbeat,
    PeerHello,
    PeerInfo,
    PeerJoined,
    PeerLeft,
    PeerRefused,
)
from asyncllm.actors.transport import (
    DRAIN_LIMIT,
    LINGER_MS,
    CurveKeys,
    HandshakeFailures,
    Monitor,
    Outbox,
    OutboxFull,
    Socket,
    detect_dead_connections,
    frame_head,
    ipv6,
    known_to,
    protected,
    split_frame,
    tcp,
)
from asyncllm.codec import CodecError, Message, decode, encode, protocol
from asyncllm.errors import StartupError
from asyncllm.log import RateLimitedLog

FIRST_PEER = 1 << 23  # above all endpoint numbers of a server, which are part of request ids
MOST_PEERS = 1024
BEAT_S = 0.3  # between two heartbeats, less with a small --dead_after
BEATS = 20  # of --dead_after, at least
FRAME_LIMIT = 1 << 26  # bytes
QUEUE = 128  # frames that ZeroMQ buffers per peer, in each direction
OUTBOX = 65536, 1 << 28  # frames and bytes queued for a peer besides these
ATTEMPT_S = 3.0  # to connect and be accepted by the other side
AGAIN_S = (0.5, 5.0)  # first and longest wait between two attempts
CONTROL = "#"  # prefix of the name in the channel's own frames; the protocol hash follows

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChannelCallbacks:
    """Callbacks for the channel's events.

    Args:
        owner: told which peers join and leave.
        message: called with (peer, actor name, message); returns a reason if no peer can
            have sent that.
    """

    owner: Callable[[PeerJoined | PeerLeft | PeerRefused], None]
    message: Callable[[int, str, Message], str | None]


class _LinkClosed(Exception):
    """The connection no longer exists."""


class _Link(ABC):
    """A connection to another end, established or in progress.

    Args:
        sent: called when its queue has used the socket.

    Attributes:
        peer: its number; 0: not identified yet.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, sent: Callable[[], object]) -> None:
        self._sent = sent
        self.peer, self.info, self.dialled = 0, PeerInfo(role="", name="", incarnation=""), ""
        self.heard = monotonic()
        self.box = Outbox(self._put_queued, loop, OUTBOX)

    @abstractmethod
    def put(self, frame: bytes) -> None:
        """Hand a frame to the socket. Raises zmq.Again, or _LinkClosed."""

    def _put_queued(self, frame: bytes) -> None:
        """The same for the queue, which a timer of its own empties: the next heartbeat notices, and
        ends, a link that is closed."""
        self._sent()
        try:
            self.put(frame)
        except _LinkClosed:
            raise zmq.Again from None

    def close(self) -> None:
        """Stop sending and receiving."""
        self.box.stop(flush=False)


class _IncomingLink(_Link):
    """A connection from another end to us."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sent: Callable[[], object],
        sock: Socket,
        ident: bytes,
    ) -> None:
        super().__init__(loop, sent)
        self._sock, self.ident = sock, ident

    def put(self, frame: bytes) -> None:
        try:
            self._sock.send_multipart([self.ident, frame], zmq.NOBLOCK)
        except zmq.Again:
            raise
        except zmq.ZMQError as error:
            raise _LinkClosed("its connection is closed") from error


class _OutgoingLink(_Link):
    """One attempt to connect to another end, and the resulting connection.

    ZeroMQ would reconnect by itself, to whoever is there then, without reporting lost frames: so
    reconnecting is disabled, and each attempt has its own socket.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sent: Callable[[], object],
        sock: Socket,
        address: str,
        keys: CurveKeys,
    ) -> None:
        super().__init__(loop, sent)
        self.sock, self._gone = sock, False
        self._monitor = Monitor(sock, zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        sock.setsockopt(zmq.ROUTING_ID, b"p" + secrets.token_bytes(12))
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        _bounds(sock, address)
        known_to(sock, keys)
        sock.connect(address)

    def put(self, frame: bytes) -> None:
        if self.gone():
            raise _LinkClosed("its connection is closed")
        self.sock.send(frame, zmq.NOBLOCK)

    def gone(self) -> bool:
        """Whether it was never established, or has been closed."""
        self._gone = self._gone or self._monitor.take() != 0
        return self._gone

    def close(self) -> None:
        super().close()
        self._monitor.close()
        self.sock.close(LINGER_MS)


@dataclass(slots=True)
class _DialTarget:
    """An end that we try to connect to, at each of its addresses, with each of our secrets."""

    host: str
    port: int
    call: _OutgoingLink | None = None
    attempts: int = 0
    due: float = 0.0
    again_s: float = AGAIN_S[0]
    looking: asyncio.Task[None] | None = None
    addresses: Sequence[str] = ()


class Channel:
    """One server's end of the channel.

    Args:
        info: how this server identifies itself.
        keys: pairs of the cluster's secrets: it listens with the first, and connects with
            each in turn.
        dead_after_s: a peer may be silent for half of that.

    Attributes:
        admit: called for each new peer; returns the reason if it is refused.
        foreign_frames: frames from unidentified ends; dropped.
        port: where it listens; 0: it does not.
    """

    def __init__(
        self, info: PeerInfo, keys: Sequence[CurveKeys], dead_after_s: float = 10.0
    ) -> None:
        self.info, self._keys = info, keys
        self.admit: Callable[[PeerInfo], str | None] = lambda _: None
        self.foreign_frames = self.port = 0
        self._beat_s, self._limit_s = min(BEAT_S, dead_after_s / BEATS), dead_after_s / 2
        self._ctx: zmq.Context[Socket] = zmq.Context()
        self._listen_sock: Socket | None = None
        self._failed_handshakes: HandshakeFailures | None = None
        self._listener: ChannelCallbacks | None = None
        self._loop: asyncio.AbstractEventLoop
        self._dials: dict[str, _DialTarget] = {}
        self._incoming: dict[bytes, _IncomingLink] = {}
        self._peers: dict[int, _Link] = {}
        self._next_peer = FIRST_PEER
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._pumping = False
        self._log = RateLimitedLog(log)

    # -- for its owner -----------------------------------------------------------------------------

    def listen(self, host: str, port: int) -> None:
        """Let others connect to a port of this machine (0: any).

        Raises:
            StartupError: it cannot be used.
        """
        self._listen_sock = sock = self._ctx.socket(zmq.ROUTER)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        address = tcp(host, port or "*")
        _bounds(sock, address)
        self._failed_handshakes = protected(sock, self._keys[0])
        try:
            sock.bind(address)
        except zmq.ZMQError as error:
            raise StartupError(f"other servers cannot connect to {host}:{port}: {error}") from None
        self.port = int(sock.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    def dial(self, host: str, port: int) -> str:
        """Keep connecting to the server there until :meth:`forget`, even after it has gone.

        Returns:
            the name of that address in messages about it.
        """
        where = tcp(host, port).removeprefix("tcp://")
        if where not in self._dials:
            self._dials[where] = _DialTarget(host, port)
            if self._listener is not None:
                self._call(where, self._dials[where])
        return where

    def forget(self, where: str) -> None:
        """Stop connecting there; disconnect a peer that was found there."""
        if (dial := self._dials.pop(where, None)) is not None:
            if dial.looking is not None:
                dial.looking.cancel()
            if dial.call is not None:
                self._end(
                    dial.call,
                    "it is not wanted any more",
                    PeerGoodbye("not wanted any more"),
                )

    def drop(self, peer: int, why: str) -> None:
        """Disconnect a peer, telling it why."""
        if (link := self._peers.get(peer)) is not None:
            self._end(link, why, PeerGoodbye(why))

    @property
    def peers(self) -> Mapping[int, PeerInfo]:
        """The connected peers."""
        return {peer: link.info for peer, link in self._peers.items()}

    def waiting(self, peer: int) -> int:
        """Bytes queued for a peer; 0 if it has left."""
        return link.box.size if (link := self._peers.get(peer)) else 0

    @property
    def failed_handshakes(self) -> int:
        """Connections that failed to authenticate."""
        return self._failed_handshakes.count() if self._failed_handshakes else 0

    # -- for the system ----------------------------------------------------------------------------

    def start(self, listener: ChannelCallbacks) -> None:
        """Start, on the running loop."""
        self._listener, self._loop = listener, asyncio.get_running_loop()
        if self._listen_sock is not None:
            assert self._failed_handshakes is not None
            self._failed_handshakes.watch(self._loop)
            self._loop.add_reader(self._listen_sock.fileno(), self._pump)
        self._due = monotonic()
        self._tick()
        self._pump_soon()

    def knows(self, peer: int) -> bool:
        """Whether a peer is connected."""
        return peer in self._peers

    def send(self, peer: int, name: str, body: bytes) -> None:
        """Queue one encoded message for a connected peer; a peer that does not read is dropped."""
        self._push(self._peers[peer], frame_head(name) + body)

    def close(self) -> None:
        """Say goodbye to all."""
        if self._ctx.closed:
            return
        for link in [*self._peers.values()]:
            self._say(link, PeerGoodbye("it stops"))
        for dial in self._dials.values():
            if dial.looking is not None:
                dial.looking.cancel()
            if dial.call is not None:
                self._hang_up(dial.call)
        for incoming in self._incoming.values():
            incoming.close()
        if self._timer is not None:
            self._timer.cancel()
        if self._listen_sock is not None:
            assert self._failed_handshakes is not None
            if self._listener is not None:
                self._loop.remove_reader(self._listen_sock.fileno())
            self._failed_handshakes.close(self._loop if self._listener is not None else None)
        self._listener = None
        self._ctx.destroy(LINGER_MS)

    # -- frames ------------------------------------------------------------------------------------

    def _pump_soon(self) -> None:
        """Sending also clears the readable state of a descriptor (it is edge-triggered)."""
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping, left = False, DRAIN_LIMIT
        while left > 0 and self._listener is not None:
            before = left
            if self._listen_sock is not None:
                with contextlib.suppress(zmq.Again):
                    ident, *frames = self._listen_sock.recv_multipart(zmq.NOBLOCK)
                    left -= 1
                    self._from_incoming(ident, frames)
            for dial in [*self._dials.values()]:
                if (call := dial.call) is not None and not call.sock.closed:
                    with contextlib.suppress(zmq.Again):
                        frames = call.sock.recv_multipart(zmq.NOBLOCK)
                        left -= 1
                        self._take(call, frames)
            if left == before:
                return
        if self._listener is not None:
            self._pump_soon()

    def _from_incoming(self, ident: bytes, frames: list[bytes]) -> None:
        assert self._listen_sock is not None
        if (incoming := self._incoming.get(ident)) is None:
            incoming = _IncomingLink(self._loop, self._pump_soon, self._listen_sock, ident)
        self._take(incoming, frames)

    def _take(self, link: _Link, frames: list[bytes]) -> None:
        link.heard = monotonic()
        try:
            if len(frames) != 1:
                raise CodecError(f"{len(frames)} frames instead of one")
            name, body = split_frame(frames[0])
            if name.startswith(CONTROL):
                self._control(link, name, body)
                return
            if not link.peer:
                raise CodecError("no greeting")
            assert self._listener is not None
            complaint = self._listener.message(link.peer, name, decode(body))
        except CodecError as error:
            complaint = str(error)
        if complaint is not None:
            self._foreign(link, complaint)

    def _foreign(self, link: _Link, complaint: str) -> None:
        if link.peer:
            log.warning("%s sends what is not possible: %s", link.info, complaint)
            self._end(link, f"it sends what is not possible: {complaint}", PeerGoodbye(complaint))
            return
        self.foreign_frames += 1
        self._log.warning("frame of nobody that is known is dropped: %s", complaint)
        self._say(link, PeerGoodbye(complaint))  # it may believe it is a peer

    def _control(self, link: _Link, name: str, body: memoryview) -> None:
        if (theirs := name.removeprefix(CONTROL)) != protocol():
            self._unlike(link, f"its protocol is {theirs!r}, ours {protocol()!r}")
            return
        match decode(body):
            case PeerHello(info) if not link.peer:
                self._meet(link, info)
            case PeerGoodbye(why, refused):
                self._end(link, f"it hung up: {why}", None, refused=why if refused else "")
            case PeerHeartbeat() if link.peer:
                pass
            case other:
                raise CodecError(f"{type(other).__name__}, which is not expected")

    def _unlike(self, link: _Link, what: str) -> None:
        """The other end and we cannot belong to the same cluster."""
        if isinstance(link, _OutgoingLink):
            self._end(link, what, None, refused=what)
        else:
            self._refuse(link, what)

    def _refuse(self, link: _Link, what: str) -> None:
        self._log.warning("%s is not let in: %s", link.info if link.info.role else "one", what)
        self._end(link, what, PeerGoodbye(what, refused=True))

    def _meet(self, link: _Link, info: PeerInfo) -> None:
        link.info = info
        if difference := self.info.difference(info):
            what, ours, theirs = difference
            if isinstance(link, _OutgoingLink):
                why = f"{what} here is {ours}, that of {info} {theirs}"
            else:
                why = f"{what} of {info} is {theirs}, that of {self.info} {ours}"
            self._unlike(link, why)
            return
        if isinstance(link, _IncomingLink):
            if len(self._incoming) >= MOST_PEERS:
                self._refuse(link, f"{MOST_PEERS} are connected already")
                return
            if why_not := self.admit(info):
                self._refuse(link, why_not)
                return
            self._incoming[link.ident] = link
            self._say(link, PeerHello(self.info))
        link.peer, self._next_peer = self._next_peer, self._next_peer + 1
        self._peers[link.peer] = link
        if dial := self._dials.get(link.dialled):
            dial.again_s = AGAIN_S[0]
        log.info("%s is there (peer %d)", info, link.peer)
        self._tell(PeerJoined(link.peer, info, link.dialled))

    def _say(self, link: _Link, msg: Message) -> None:
        """Send one of the channel's own messages; lost if the other end does not read."""
        with contextlib.suppress(zmq.Again, _LinkClosed):
            link.put(frame_head(CONTROL + protocol()) + encode(msg))
        self._pump_soon()

    def _push(self, link: _Link, frame: bytes) -> None:
        try:
            link.box.push(frame)
        except OutboxFull as error:
            self._end(link, f"it does not read: {error}", PeerGoodbye("does not read"))

    def _end(self, link: _Link, why: str, bye: PeerGoodbye | None, refused: str = "") -> None:
        """End a connection, and the peer on it, if there was one."""
        if bye is not None:
            self._say(link, bye)
        self._hang_up(link)
        if peer := link.peer:
            link.peer = 0
            del self._peers[peer]
            log.info("%s has left (peer %d): %s", link.info, peer, why)
            self._tell(PeerLeft(peer, link.info, why))
        if refused and link.dialled:  # who connects to us has no say in whether we start
            self._tell(PeerRefused(link.dialled, refused))

    def _hang_up(self, link: _Link) -> None:
        if isinstance(link, _OutgoingLink):
            if not link.sock.closed:
                self._loop.remove_reader(link.sock.fileno())
            link.close()
            if (dial := self._dials.get(link.dialled)) and dial.call is link:
                dial.call, dial.due = None, monotonic() + dial.again_s
                dial.again_s = min(2 * dial.again_s, AGAIN_S[1])
        elif isinstance(link, _IncomingLink):
            self._incoming.pop(link.ident, None)
            link.close()

    def _tell(self, msg: PeerJoined | PeerLeft | PeerRefused) -> None:
        if self._listener is not None:
            self._listener.owner(msg)

    # -- time --------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Heartbeats, both ways, and attempts to connect."""
        now = monotonic()
        # this process itself may have been stopped: do not blame others for that time
        late = max(0.0, now - self._due - self._beat_s)
        self._due = now + self._beat_s
        self._timer = self._loop.call_later(self._beat_s, self._tick)
        for link in [*self._peers.values()]:
            link.heard += late
            try:
                with contextlib.suppress(zmq.Again):
                    link.put(frame_head(CONTROL + protocol()) + encode(PeerHeartbeat()))
            except _LinkClosed as error:
                self._end(link, str(error), None)
                continue
            if (silent := now - link.heard) > self._limit_s:
                why = f"it has been silent for {silent:.1f} s (--dead_after)"
                self._end(link, why, PeerGoodbye(why))
        for where, dial in [*self._dials.items()]:
            self._look_at(where, dial, now)
        self._pump_soon()

    def _look_at(self, where: str, dial: _DialTarget, now: float) -> None:
        if (call := dial.call) is None:
            if now >= dial.due and dial.looking is None:
                self._call(where, dial)
        elif not call.peer and (call.gone() or now > call.heard + ATTEMPT_S):
            self._end(call, "no answer", None)

    def _call(self, where: str, dial: _DialTarget) -> None:
        dial.looking = self._loop.create_task(self._connect(where, dial))

    async def _connect(self, where: str, dial: _DialTarget) -> None:
        """Make one attempt: the next of our keys at the next of its addresses."""
        number, dial.attempts = dial.attempts, dial.attempts + 1
        try:
            turn, key = divmod(number, len(self._keys))
            if not dial.addresses or (key == 0 and turn % len(dial.addresses) == 0):
                found = await self._loop.getaddrinfo(dial.host, dial.port, type=socket.SOCK_STREAM)
                dial.addresses = [*dict.fromkeys(str(each[4][0]) for each in found)]
            address = tcp(dial.addresses[turn % len(dial.addresses)], dial.port)
            sock = self._ctx.socket(zmq.DEALER)
            call = _OutgoingLink(self._loop, self._pump_soon, sock, address, self._keys[key])
        except (OSError, UnicodeError, zmq.ZMQError) as error:
            self._log.warning("%s: %s", where, error)
            dial.due = monotonic() + AGAIN_S[1]
            return
        finally:
            dial.looking = None
        call.dialled, dial.call = where, call
        self._loop.add_reader(call.sock.fileno(), self._pump)
        self._say(call, PeerHello(self.info))


def _bounds(sock: Socket, address: str) -> None:
    sock.setsockopt(zmq.LINGER, LINGER_MS)
    sock.setsockopt(zmq.MAXMSGSIZE, FRAME_LIMIT)
    sock.setsockopt(zmq.SNDHWM, QUEUE)
    sock.setsockopt(zmq.RCVHWM, QUEUE)
    detect_dead_connections(sock)
    sock.setsockopt(zmq.IPV6, ipv6(address))
