"""How the nodes of a server find each other and notice when one of them fails.

The nodes meet node 0 at one port, under the keys of the cluster's secret. It compares what must be
equal on all of them and sends each the server's keys. The same connection then carries heartbeats,
sent by a thread, so that neither loading nor a busy event loop looks like a failure. Does not know
actors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from time import monotonic

import zmq

from asyncllm.actors.transport import CurveKeys, Monitor, ipv6, known_to, protected, tcp
from asyncllm.codec import Message, decode, encode, message, protocol
from asyncllm.errors import Mismatch, StartupError
from asyncllm.log import RateLimitedLog
from asyncllm.topology import Contract, Difference, Topology, first_difference

BEAT_S = 0.3  # between two heartbeats, less with a small --dead_after
BEATS = 20  # of --dead_after, at least
MISSED = 2  # heartbeats unsent on a closed connection before the node counts as failed
FRAME_LIMIT = 1 << 20  # bytes
DRAIN_LIMIT = 256  # frames per iteration
LINGER_MS = 500
CLOSE_S = 1.0
LATER_S = 3.0  # a node that has met node 0 waits longer: node 0 can name the one that is missing

log = logging.getLogger(__name__)


@message(60)
class NodeJoin(Message):
    """node -> node 0: introduces itself."""

    node: int
    host: str  # where others reach its processes
    contract: Contract
    facts: tuple[tuple[str, str], ...]  # facts about its files and devices, by name


@message(61)
class NodeJoined(Message):
    """node 0 -> node: all have joined, and these are the server's values."""

    topology: Topology
    store_port: int  # where torch.distributed's ranks meet
    public: str
    secret: str = field(repr=False)


@message(62)
class JoinRefused(Message):
    """node 0 -> node: the node cannot belong to this server."""

    why: str


@message(63)
class NodeAlive(Message):
    """Each node <-> node 0, periodically."""


@message(64)
class NodeEnding(Message):
    """Each node <-> node 0: the server fails."""

    code: int  # exit code
    why: str


@dataclass(slots=True)
class _JoinedNode:
    join: NodeJoin
    heard: float
    missed: int = 0

    @property
    def name(self) -> str:
        return f"node {self.join.node} ({self.join.host})"


class NodeLink:
    """One end of the connections between nodes.

    Args:
        dead_after_s: when a node fails, the server ends on all nodes within this time.

    Attributes:
        foreign_frames: invalid messages from holders of the key; dropped.
        failed_handshakes: connections that did not prove knowledge of the key.
    """

    def __init__(self, dead_after_s: float) -> None:
        self._beat_s = min(BEAT_S, dead_after_s / BEATS)
        self._limit_s = dead_after_s / 2  # the rest is for notifying the others and ending
        self._ctx: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._protocol = protocol().encode()
        self._spared: frozenset[int] = frozenset()
        self._on_spared: Callable[[int, str], None] = lambda _node, _why: None
        self._found: tuple[int, str] | None = None  # exit code and reason, from the others
        self._said: tuple[int, str] | None = None  # the same, to be sent
        self._due = self._last = monotonic()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        # what is to be told does not wait for the next heartbeat
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._bell)
        self._log = RateLimitedLog(log)
        self.foreign_frames = self.failed_handshakes = 0

    def watch(self, on_end: Callable[[int, str], None]) -> None:
        """Start monitoring the other nodes in a thread.

        Args:
            on_end: called once, in the thread, with an exit code and a reason when the server must
                end.
        """
        self._thread = threading.Thread(target=self._watch, args=(on_end,), daemon=True)
        self._thread.start()

    def spare(self, nodes: Collection[int], on_gone: Callable[[int, str], None]) -> None:
        """The server continues without these nodes from now on. From any thread.

        Args:
            on_gone: told the number of one that has gone, and why, in the thread of :meth:`watch`.
        """
        self._on_spared, self._spared = on_gone, frozenset(nodes)

    def fail(self, code: int, why: str) -> None:
        """Notify the others that the server is ending; the first reason counts. From any thread."""
        self._said = self._said or self._found or (code, why)
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Send pending notices and disconnect. From any thread."""
        self._stop.set()
        os.eventfd_write(self._bell, 1)
        if self._thread is None:
            self._hang_up()
        elif self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)

    def _watch(self, on_end: Callable[[int, str], None]) -> None:
        told = False
        while not self._stop.is_set():
            self._step()
            self._tell_end()
            if self._found is not None and not told:
                told = True
                on_end(*self._found)
        self._hang_up()

    def _hang_up(self) -> None:
        if not self._ctx.closed:
            self._tell_end()
            self._ctx.destroy(LINGER_MS)

    def _step(self) -> None:
        """Receive messages, waiting briefly for them, and send a heartbeat when due."""
        self._listen(self._beat_s)
        now = monotonic()
        if now < self._due:
            return
        # this process may have been stopped: do not blame others for that time
        late, self._last = max(0.0, now - self._last - self._limit_s / 2), now
        self._due = now + self._beat_s
        self._beat(now, late)

    def _lost(self, code: int, why: str) -> None:
        if self._found is None and self._said is None:
            self._found = code, why
            self.fail(code, why)

    def _gone(self, peer: _JoinedNode, code: int, why: str) -> None:
        """Another node has failed."""
        if (node := peer.join.node) in self._spared:
            self._spared -= {node}
            self._forget(peer)
            self._on_spared(node, why)
        else:
            self._lost(code, why)

    def _look(self, peer: _JoinedNode, now: float, late: float, sent: bool) -> None:
        """Whether a peer is alive; ``sent``: its connection accepted a heartbeat."""
        peer.heard += late
        peer.missed = 0 if sent else peer.missed + 1
        if peer.missed >= MISSED:
            self._gone(peer, 1, f"{peer.name} has gone: its connection was closed")
        elif now - peer.heard > self._limit_s:
            silent = now - peer.heard
            self._gone(peer, 1, f"{peer.name} has been silent for {silent:.1f} s (--dead_after)")

    def _frames(self, msg: Message) -> list[bytes]:
        return [self._protocol, encode(msg)]

    def _poll(self, wait_s: float, *socks: zmq.Socket[bytes]) -> None:
        """Wait until one of them has something to read, or there is something to tell."""
        poller = zmq.Poller()
        for sock in (self._bell, *socks):
            poller.register(sock, zmq.POLLIN)
        if self._bell in dict(poller.poll(int(1e3 * wait_s))):
            os.eventfd_read(self._bell)

    def _forget(self, peer: _JoinedNode) -> None:
        raise NotImplementedError

    def _listen(self, wait_s: float) -> None:
        raise NotImplementedError

    def _beat(self, now: float, late: float) -> None:
        raise NotImplementedError

    def _tell_end(self) -> None:
        raise NotImplementedError


class NodeRendezvous(NodeLink):
    """Node 0's end: all nodes meet here.

    Args:
        own: node 0's own values, which the others are compared with.
        bind: host (an address of this machine) and port.
        keys: of the cluster; the other nodes must have them.
        nnodes: number of nodes, including this one.

    Raises:
        StartupError: the port cannot be used.
    """

    def __init__(
        self,
        own: NodeJoin,
        bind: tuple[str, int],
        keys: CurveKeys,
        nnodes: int,
        dead_after_s: float,
    ) -> None:
        super().__init__(dead_after_s)
        self._own, self._nnodes, self._complete = own, nnodes, False
        self._peers: dict[bytes, _JoinedNode] = {}
        self._told = False
        self._sock = sock = self._ctx.socket(zmq.ROUTER)
        sock.setsockopt(zmq.MAXMSGSIZE, FRAME_LIMIT)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._counter = protected(sock, keys)
        address = tcp(*bind)
        sock.setsockopt(zmq.IPV6, ipv6(address))
        try:
            sock.bind(address)
        except zmq.ZMQError as error:
            self._ctx.destroy(0)
            raise StartupError(
                f"nodes cannot meet at {bind[0]}:{bind[1]}: {error} "
                "(--nccl_host, --multinode_httpmanager_port)"
            ) from None

    def gather(self, timeout_s: float) -> list[NodeJoin]:
        """All other nodes, in order, once they have joined. Blocks.

        Raises:
            StartupError: one has not joined in time, cannot belong to this server, or has left
                again.
        """
        deadline = monotonic() + timeout_s
        while len(self._peers) < self._nnodes - 1 and self._found is None:
            self._step()
            if monotonic() > deadline:
                here = {peer.join.node for peer in self._peers.values()}
                missing = " and ".join(str(n) for n in range(1, self._nnodes) if n not in here)
                self._lost(
                    2, f"node {missing} did not join within {timeout_s:g} s (--node_timeout)"
                )
        if self._found is not None:
            self.close()
            raise StartupError(self._found[1])
        self._complete = True
        return sorted((peer.join for peer in self._peers.values()), key=lambda join: join.node)

    def place(self, joined: NodeJoined) -> None:
        """Send all nodes the server's values."""
        for ident in self._peers:
            self._send(ident, joined)

    def _listen(self, wait_s: float) -> None:
        self.failed_handshakes = self._counter.count()
        self._poll(wait_s, self._sock)
        for _ in range(DRAIN_LIMIT):
            try:
                ident, *frames = self._sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(ident, frames)

    def _take(self, ident: bytes, frames: list[bytes]) -> None:
        peer = self._peers.get(ident)
        try:
            theirs, body = frames
            if theirs != self._protocol:
                found = Difference("protocol", protocol(), theirs.decode("ascii"))
                self._refuse(ident, "a node", found)
                return
            msg = decode(body)
        except ValueError as error:  # CodecError, or another number of frames
            self.foreign_frames += 1
            self._log.warning("dropped an invalid message: %s", error)
            if peer is not None:
                self._gone(peer, 1, f"{peer.name} sends invalid messages")
            return
        if peer is None:
            if isinstance(msg, NodeJoin):
                self._admit(ident, msg)
            elif isinstance(msg, NodeAlive):  # it was silent for too long
                self._send(ident, NodeEnding(1, "the server continues without this node"))
            return
        peer.heard = monotonic()
        if isinstance(msg, NodeEnding):
            self._gone(peer, msg.code, f"{peer.name}: {msg.why}")

    def _admit(self, ident: bytes, join: NodeJoin) -> None:
        """A process that knows the secret wants to be a node of this server."""
        name = f"node {join.node} ({join.host})"
        if self._complete:
            why = f"this server already has all its nodes: {name} cannot join"
            log.warning("%s", why)
            self._send(ident, JoinRefused(why))
            return
        own = self._own
        found = own.contract.difference(join.contract) or first_difference(own.facts, join.facts)
        if found is not None:
            self._refuse(ident, name, found)
            return
        twins = [peer for peer in self._peers.values() if peer.join.node == join.node]
        self._peers[ident] = _JoinedNode(join, monotonic())
        if twins or not 0 < join.node < self._nnodes:
            others = ", ".join(peer.join.host for peer in twins) or self._own.host
            self._lost(2, f"two nodes have --node_rank {join.node}: {others}, {join.host}")
        else:
            log.info("%s has joined", name)
            self._send(ident, NodeAlive())

    def _refuse(self, ident: bytes, name: str, difference: Difference) -> None:
        label, ours, theirs = difference
        why = f"{name} cannot belong to this server: its {label} is {theirs}, node 0's is {ours}"
        self._send(ident, JoinRefused(why))
        if self._complete:
            log.warning("%s", why)
        else:
            self._lost(2, why)

    def _forget(self, peer: _JoinedNode) -> None:
        self._peers = {ident: each for ident, each in self._peers.items() if each is not peer}

    def _beat(self, now: float, late: float) -> None:
        for ident, peer in self._peers.items():
            self._look(peer, now, late, self._send(ident, NodeAlive()))

    def _tell_end(self) -> None:
        if self._said is not None and not self._told:
            self._told = True
            for ident in self._peers:
                self._send(ident, NodeEnding(*self._said))

    def _send(self, ident: bytes, msg: Message) -> bool:
        """Returns False if there is no connection to it."""
        try:
            self._sock.send_multipart([ident, *self._frames(msg)], zmq.NOBLOCK)
        except zmq.Again:  # it does not read
            return True
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True


class NodeMember(NodeLink):
    """The end of any other node.

    Args:
        own: what this node sends.
        host, port: where node 0 is.
        keys: one pair per secret; node 0 uses one of them.
    """

    def __init__(
        self, own: NodeJoin, host: str, port: int, keys: Sequence[CurveKeys], dead_after_s: float
    ) -> None:
        super().__init__(dead_after_s)
        self._own, self._where = own, f"{host}:{port}"
        self._leader: _JoinedNode | None = None
        self._joined: NodeJoined | None = None
        self._told = False
        ident = b"%d-%s" % (own.node, secrets.token_bytes(8))
        self._ways = [_LeaderConnection(self._ctx, tcp(host, port), ident, each) for each in keys]
        self._peer = _JoinedNode(NodeJoin(0, host, own.contract, ()), 0.0)

    def join(self, timeout_s: float) -> NodeJoined:
        """Block until all nodes have joined; returns node 0's answer.

        Raises:
            StartupError: it does not answer in time, refuses, or has left again.
        """
        deadline = monotonic() + timeout_s
        while self._joined is None and self._found is None:
            self._step()
            if monotonic() > deadline + (LATER_S if self._leader is not None else 0.0):
                self._lost(2, self._not_in_time(timeout_s))
        if self._found is not None:
            self.close()
            raise StartupError(self._found[1])
        assert self._joined is not None
        return self._joined

    def _not_in_time(self, timeout_s: float) -> str:
        if self._leader is not None:
            return f"not all nodes joined within {timeout_s:g} s (--node_timeout)"
        return (
            f"node 0 does not answer at {self._where} within {timeout_s:g} s (--node_timeout, "
            "--nccl_host, --multinode_httpmanager_port; or its --cluster_key_file differs)"
        )

    def _listen(self, wait_s: float) -> None:
        self._poll(wait_s, *(way.sock for way in self._ways))
        for way in self._ways:
            for _ in range(DRAIN_LIMIT):
                try:
                    frames = way.sock.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._take(way, frames)

    def _take(self, way: _LeaderConnection, frames: list[bytes]) -> None:
        if self._leader is None:
            self._leader = self._peer
            for other in self._ways:
                if other is not way:
                    other.close()
            self._ways = [way]
        self._leader.heard = monotonic()
        try:
            theirs, body = frames
            if theirs != self._protocol:
                raise Mismatch(
                    f"node 0 has a different version: its protocol is "
                    f"{theirs.decode('ascii', 'replace')}, this node's is {protocol()}"
                )
            msg = decode(body)
        except Mismatch as error:
            self._lost(2, str(error))
            return
        except ValueError as error:  # CodecError, or another number of frames
            self._lost(1, f"{self._leader.name} sends an invalid message: {error}")
            return
        match msg:
            case NodeJoined():
                self._joined = msg
            case JoinRefused(why):
                self._lost(2, why)
            case NodeEnding(code, why):
                self._lost(code, why)
            case _:
                pass

    def _beat(self, now: float, late: float) -> None:
        if self._leader is None:
            for way in self._ways:
                way.send(self._frames(self._own))
        else:
            sent = self._ways[0].send(self._frames(NodeAlive()))
            self._look(self._leader, now, late, sent)

    def _tell_end(self) -> None:
        if self._said is not None and not self._told:
            self._told = True
            if self._leader is not None:
                self._ways[0].send(self._frames(NodeEnding(*self._said)))


class _LeaderConnection:
    """A connection to node 0, under the keys of one secret."""

    def __init__(
        self, ctx: zmq.Context[zmq.Socket[bytes]], address: str, ident: bytes, keys: CurveKeys
    ) -> None:
        self.sock = sock = ctx.socket(zmq.DEALER)
        self._connected = False
        # not IMMEDIATE, which discards frames received just before the other side disconnects
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._monitor = Monitor(sock, events)
        sock.setsockopt(zmq.MAXMSGSIZE, FRAME_LIMIT)
        sock.setsockopt(zmq.ROUTING_ID, ident)
        sock.setsockopt(zmq.IPV6, ipv6(address))
        known_to(sock, keys)
        sock.connect(address)

    def send(self, frames: list[bytes]) -> bool:
        """Returns False if there is no connection."""
        while event := self._monitor.take():
            self._connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if self._connected:
            with contextlib.suppress(zmq.Again):  # it does not read
                self.sock.send_multipart(frames, zmq.NOBLOCK)
        return self._connected

    def close(self) -> None:
        """Disconnect; drops unsent frames."""
        self._monitor.close()
        self.sock.close(0)
