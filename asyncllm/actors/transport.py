"""ZMQ under uvloop: one PULL socket in, one PUSH per peer, drained from the event loop.

Knows frames and peers; knows neither actors nor what to do when one is missing.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import inf
from time import monotonic

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

from asyncllm.codec import CodecError, Message, decode
from asyncllm.errors import PeerLost, StartupError
from asyncllm.log import RateLimitedLog

DRAIN_LIMIT = 256  # frames per wake, so that a flood cannot hold the loop
HANDSHAKE_S = 5.0  # for a connection to authenticate
OUTBOX_LIMIT = 65536
HEAD_LIMIT = 256  # bytes; names are short
FRAME_LIMIT = 1 << 30  # bytes; a foreign sender cannot make us allocate more
LINGER_MS = 500
RETRY_S = (0.001, 0.064)  # first and longest wait for a peer that accepts no frames

Socket = zmq.Socket[bytes]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The CURVE key pair that all processes of one server share.

    A socket only answers those who know its public key, and only the server's own processes get it:
    it is never sent in clear. So knowing it identifies a process as one of the server's.
    """

    public: str
    secret: str = field(repr=False)

    @staticmethod
    def make() -> CurveKeys:
        """A new pair."""
        public, secret = zmq.curve_keypair()
        return CurveKeys(public.decode(), secret.decode())


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """How one endpoint communicates with the others.

    Args:
        address: where it listens: ``ipc://path``, or ``tcp://127.0.0.1:*`` for any free port.
        keys: the server's.
        peers: addresses of endpoints that are already known.
        advertised: host that others dial instead of the one in ``address``; "": that one.
    """

    address: str
    keys: CurveKeys
    peers: Mapping[int, str] = field(default_factory=dict)
    advertised: str = ""


def netloc(host: str, port: int | str) -> str:
    """A port of a host, given by name, IPv4 or IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tcp(host: str, port: int | str) -> str:
    """ZeroMQ's name for it."""
    return f"tcp://{netloc(host, port)}"


def ipv6(address: str) -> bool:
    """Whether a socket must know IPv6 for this address: names may resolve to it."""
    return address.startswith("tcp://") and not re.fullmatch(r"tcp://[\d.]+:[\d*]+", address)


def protected(sock: Socket, keys: CurveKeys) -> HandshakeFailures:
    """Make a listening socket answer only those who know its public key.

    Returns:
        a counter of the others.
    """
    failed_handshakes = HandshakeFailures(sock)
    sock.setsockopt(zmq.CURVE_SERVER, 1)
    sock.setsockopt_string(zmq.CURVE_SECRETKEY, keys.secret)
    return failed_handshakes


def known_to(sock: Socket, server: CurveKeys, own: CurveKeys | None = None) -> None:
    """Make a connecting socket authenticate with the public key of the other side.

    Args:
        own: its own pair; None: a new one.
    """
    own = own or CurveKeys.make()
    sock.setsockopt_string(zmq.CURVE_SERVERKEY, server.public)
    sock.setsockopt_string(zmq.CURVE_PUBLICKEY, own.public)
    sock.setsockopt_string(zmq.CURVE_SECRETKEY, own.secret)


def detect_dead_connections(sock: Socket) -> None:
    """Have TCP close connections that were cut off, after about 20 s.

    ZeroMQ's own heartbeat (HEARTBEAT_IVL) would do so too, but aborts the process (libzmq 4.3.5,
    ``stream_engine_base_t::timer_event``) when it is due on a connection that ended while its
    receive queue was full.
    """
    for option, value in (
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 5),  # s
        (zmq.TCP_KEEPALIVE_INTVL, 5),  # s
        (zmq.TCP_KEEPALIVE_CNT, 3),
        (zmq.TCP_MAXRT, 20_000),  # ms, where data has been sent
    ):
        sock.setsockopt(option, value)


def keep_alive(sock: Socket) -> None:
    """Have TCP send something on an idle connection once a minute: firewalls forget those on which
    nothing is sent for some minutes, and then what is sent first is lost."""
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 60)  # s


class Monitor:
    """ZeroMQ's events about the connections of a socket; create it before bind or connect.

    ZeroMQ's thread waits for whoever reads this, and it is the one thread of all sockets of a
    context. So all events are read, and monitoring is stopped before reading stops.
    """

    def __init__(self, sock: Socket, events: int) -> None:
        self._of, where = sock, f"inproc://monitor-{sock.FD}"
        sock.monitor(where, events)
        self._events: Socket = sock.context.socket(zmq.PAIR)
        self._events.setsockopt(zmq.RCVHWM, 0)
        self._events.connect(where)
        self.fileno = self._events.fileno()

    def take(self) -> int:
        """The next event; 0: none."""
        if self._events.closed or not self._events.poll(0):
            return 0
        return int(recv_monitor_message(self._events)["event"])

    def close(self) -> None:
        """Call before closing the socket: with LINGER its connection outlives it for a while."""
        self._of.disable_monitor()
        self._events.close(0)


class HandshakeFailures:
    """Counts connections to a listening socket that failed to authenticate.

    Only those that ZeroMQ calls failed are counted at once: of those that hang up, or send what is
    no handshake, it only reports that they were accepted. They count when the time for a
    handshake is over.
    """

    def __init__(self, sock: Socket, clock: Callable[[], float] = monotonic) -> None:
        sock.setsockopt(zmq.HANDSHAKE_IVL, int(1e3 * HANDSHAKE_S))
        failed = (
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | failed
        self._clock, self._monitor = clock, Monitor(sock, events)
        self._accepted: deque[float] = deque()  # times of those that may still authenticate
        self._count = 0

    def count(self) -> int:
        """The count since the start."""
        now = self._clock()
        while event := self._monitor.take():
            if event == zmq.EVENT_ACCEPTED:
                self._accepted.append(now)
            elif self._accepted:  # ZeroMQ does not say which one
                self._accepted.popleft()
                self._count += event != zmq.EVENT_HANDSHAKE_SUCCEEDED
        while self._accepted and self._accepted[0] < now - 2 * HANDSHAKE_S:
            self._accepted.popleft()
            self._count += 1
        return self._count

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count events as they arrive, so that nothing piles up."""
        loop.add_reader(self._monitor.fileno, self.count)
        loop.call_soon(self.count)

    def close(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Call before closing the socket; ``loop``: that of :meth:`watch`."""
        if loop is not None:
            loop.remove_reader(self._monitor.fileno)
        self._monitor.close()


class Transport:
    """Frame = msgpack(name) + message. FIFO per (sender, receiver) pair, no loss.

    Everything is encrypted; frames are only accepted from holders of the server's keys.

    Args:
        on_message: called with (actor name, message) for each frame that decodes.

    Attributes:
        address: where others reach this endpoint.
        foreign_frames: invalid received frames; dropped.

    Raises:
        StartupError: the own address cannot be bound.
    """

    def __init__(self, wire: TransportSettings, on_message: Callable[[str, Message], None]) -> None:
        self._loop, self._on_message = asyncio.get_running_loop(), on_message
        self._keys = wire.keys
        self.foreign_frames = 0
        self._foreign_log = RateLimitedLog(log)
        self._reading = False
        self._ctx: zmq.Context[Socket] = zmq.Context()
        self._in = self._ctx.socket(zmq.PULL)
        self._in.setsockopt(zmq.MAXMSGSIZE, FRAME_LIMIT)
        self._in.setsockopt(zmq.IPV6, ipv6(wire.address))
        keep_alive(self._in)
        self._failed_handshakes = protected(self._in, wire.keys)
        try:
            self._in.bind(wire.address)
        except zmq.ZMQError as error:
            self._failed_handshakes.close()
            self._in.close()
            self._ctx.term()
            raise StartupError(f"cannot listen on {wire.address}: {error}") from error
        self._failed_handshakes.watch(self._loop)
        self.address = self._in.getsockopt_string(zmq.LAST_ENDPOINT)
        if wire.advertised:
            self.address = tcp(wire.advertised, int(self.address.rpartition(":")[2]))
        self._fd = int(self._in.getsockopt(zmq.FD))
        self._outs: dict[int, _PeerSocket] = {}
        for peer, address in wire.peers.items():
            self.connect(peer, address)

    def connect(self, peer: int, address: str) -> None:
        """Connect to ``peer``. Raises ValueError for an invalid address."""
        sock = self._ctx.socket(zmq.PUSH)
        sock.setsockopt(zmq.LINGER, LINGER_MS)
        sock.setsockopt(zmq.IPV6, ipv6(address))
        keep_alive(sock)
        known_to(sock, self._keys, self._keys)
        try:
            sock.connect(address)
        except zmq.ZMQError as error:
            sock.close()
            raise ValueError(f"cannot connect to {address!r}: {error}") from error
        self.disconnect(peer)
        self._outs[peer] = _PeerSocket(peer, sock, self._loop)

    def disconnect(self, peer: int) -> None:
        """Forget ``peer`` and unsent frames to it."""
        if (out := self._outs.pop(peer, None)) is not None:
            out.drop()

    def knows(self, peer: int) -> bool:
        """Whether we are connected to ``peer``."""
        return peer in self._outs

    @property
    def closed(self) -> bool:
        """After :meth:`close`."""
        return self._in.closed

    def start(self) -> None:
        """Start delivering frames, those that arrived earlier first."""
        self._reading = True
        self._loop.add_reader(self._fd, self._pump)
        self._loop.call_soon(self._pump)  # edge-triggered: look once before waiting

    def send(self, peer: int, name: str, body: bytes) -> None:
        """Queue one encoded message for a peer that is connected to.

        Raises:
            PeerLost: it has stopped reading.
        """
        self._outs[peer].push(frame_head(name) + body)

    def reject(self, why: str) -> None:
        """Count a frame, or its content, as foreign."""
        self.foreign_frames += 1
        self._foreign_log.warning("foreign frame dropped: %s", why)

    @property
    def failed_handshakes(self) -> int:
        """Connections that failed to authenticate."""
        return self._failed_handshakes.count()

    def pause(self) -> None:
        """Stop delivering; sending continues."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def close(self) -> None:
        """Close all sockets; queued frames have ``LINGER_MS`` to be sent."""
        self.pause()
        for out in self._outs.values():
            out.close()
        self._failed_handshakes.close(self._loop)
        self._in.close()
        self._ctx.term()

    def _pump(self) -> None:
        for _ in range(DRAIN_LIMIT):
            if not self._reading:  # a callback from before pause(), or a handler that stopped us
                return
            try:
                frame = self._in.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                name, body = split_frame(frame)
                msg = decode(body)
            except CodecError as error:
                self.reject(str(error))
                continue
            self._on_message(name, msg)
        self._loop.call_soon(self._pump)


class OutboxFull(Exception):
    """A peer does not read; the text says how much is queued for it."""


class Outbox:
    """The queue to one peer: frames wait here while its socket accepts none.

    Args:
        send: passes one frame to the socket; raises zmq.Again if it is full.
        limit: the maximum of queued frames and bytes.
    """

    def __init__(
        self,
        send: Callable[[bytes], object],
        loop: asyncio.AbstractEventLoop,
        limit: tuple[int, float],
    ) -> None:
        self._send, self._loop, self._limit = send, loop, limit
        self._box: deque[bytes] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._retry_s = RETRY_S[0]
        self.size = 0  # queued bytes

    def push(self, frame: bytes) -> None:
        """Send now, or as soon as possible. Raises OutboxFull."""
        if len(self._box) >= self._limit[0] or self.size >= self._limit[1]:
            raise OutboxFull(f"{len(self._box)} frames, {self.size} bytes wait")
        self._box.append(frame)
        self.size += len(frame)
        if self._timer is None:
            self._flush()

    def stop(self, *, flush: bool) -> None:
        """Stop sending, after flushing what the socket accepts now if ``flush``."""
        if self._timer is not None:
            self._timer.cancel()
        if flush:
            self._send_all()
        self._box.clear()
        self.size = 0

    def _flush(self) -> None:
        if self._send_all():
            self._timer, self._retry_s = None, RETRY_S[0]
        else:
            self._timer = self._loop.call_later(self._retry_s, self._flush)
            self._retry_s = min(self._retry_s * 2, RETRY_S[1])

    def _send_all(self) -> bool:
        """Returns False if the peer is not connected yet or at its high-water mark."""
        while self._box:
            try:
                self._send(self._box[0])
            except zmq.Again:
                return False
            self.size -= len(self._box.popleft())
        return True


class _PeerSocket:
    """The connection to one endpoint, with its own socket."""

    def __init__(self, peer: int, sock: Socket, loop: asyncio.AbstractEventLoop) -> None:
        self._peer, self._sock = peer, sock
        limit = OUTBOX_LIMIT, inf
        self._box = Outbox(lambda frame: sock.send(frame, zmq.NOBLOCK), loop, limit)

    def push(self, frame: bytes) -> None:
        try:
            self._box.push(frame)
        except OutboxFull as error:
            raise PeerLost(f"endpoint {self._peer} does not read: {error}") from None

    def close(self) -> None:
        self._box.stop(flush=True)
        self._sock.close()

    def drop(self) -> None:
        """Close; drops queued frames."""
        self._box.stop(flush=False)
        self._sock.close()  # frames passed to it have LINGER_MS


@cache
def frame_head(name: str) -> bytes:
    """The header of a message on the wire."""
    head: bytes = msgpack.packb(name)
    assert len(head) <= HEAD_LIMIT, name
    return head


def split_frame(frame: bytes) -> tuple[str, memoryview]:
    """Actor name and message of one frame. Raises CodecError for any other bytes."""
    view = memoryview(frame)
    reader = msgpack.Unpacker(use_list=False)
    reader.feed(view[:HEAD_LIMIT])
    try:
        name = reader.unpack()
        if type(name) is not str:
            raise TypeError("not a name")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CodecError(f"{len(frame)} bytes without a header: {error!r}") from error
    return name, view[reader.tell() :]
