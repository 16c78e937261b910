"""Director: runs ``core.request_director`` on a master, in place of a scheduler.

Owns the connections to prefill and decode nodes; tells all HTTP processes whether there are
enough of them. Knows neither text nor what nodes compute.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import assert_never

from asyncllm.actors.base import Actor
from asyncllm.actors.channel import Channel
from asyncllm.actors.peer_messages import PeerInfo, PeerJoined, PeerLeft, PeerMessage, PeerRefused
from asyncllm.core import request_director
from asyncllm.core.node_selection import DECODE, PREFILL, EngineNode, NodeSelector
from asyncllm.core.request import FinishReason
from asyncllm.messages import (
    FRONTEND_SHIFT,
    Abort,
    AskNodes,
    AskServing,
    DecodeReserved,
    DirectorStats,
    Drain,
    Drained,
    EndpointGone,
    Finished,
    NodesAnswer,
    NodeState,
    Probe,
    Serving,
    StopHit,
    Submit,
    Tokens,
)
from asyncllm.records import Failure, TransferTotals

TICK_S = 0.25
ROLES = (PREFILL, DECODE)

Inbox = (
    Submit
    | Abort
    | StopHit
    | PeerMessage
    | PeerJoined
    | PeerLeft
    | PeerRefused
    | AskServing
    | AskNodes
    | Drain
    | EndpointGone
    | Probe
)

log = logging.getLogger(__name__)


class Director(Actor[Inbox]):
    """One per master, on its coordinator.

    Args:
        channel: to the nodes.
        strategy: see ``core.node_selection.NodeSelector``.
        counts: required (prefill nodes, decode nodes), and no more; None: any number, at least one
            of each.
        vocab_size: limit of token ids from nodes.
    """

    # each step of each node is a message, and each end another
    capacity = 65536
    remote = frozenset({Submit, Abort, StopHit, AskServing, AskNodes})
    foreign = frozenset({NodeState, DecodeReserved, Tokens, Finished})

    def __init__(
        self,
        channel: Channel,
        strategy: str,
        *,
        counts: tuple[int, int] | None = None,
        vocab_size: int,
    ) -> None:
        super().__init__("director")
        self.core = request_director.RequestDirector(NodeSelector(strategy))
        self._channel, self._counts, self._vocab_size = channel, counts, vocab_size
        self._infos: dict[int, PeerInfo] = {}  # of connected nodes, perhaps without a state yet
        self._moved: dict[int, TransferTotals] = {}  # K/V counters, as last reported by each node
        self._moved_before = TransferTotals()  # those of nodes that have left
        self._asking: set[int] = set()  # endpoints that asked whether requests can be served
        self._told = ""
        self._gone: set[int] = set()  # endpoints whose processes have ended
        self._draining = self._drained = False

    def started(self) -> None:
        self._watchdog = self.system.ref("watchdog")
        self._channel.admit = self._complaint
        self._told = self.lacks
        self.repeat(TICK_S, self._tick)

    def holds(self) -> str:
        there = {role: len(self.core.nodes.of(role)) for role in ROLES}
        nodes = ", ".join(f"{num} {role} nodes" for role, num in there.items())
        return f"requests {len(self.core.requests)}; {nodes}" + ", drains" * self._draining

    def receive(self, batch: list[Inbox]) -> None:
        self.core.now = self.system.loop.time()
        for msg in batch:
            match msg:
                case Submit():
                    self._submit(msg)
                case Abort(rid):
                    self.core.abort(rid)
                case StopHit(rid, num_tokens):
                    self.core.stop(rid, num_tokens)
                case PeerMessage():
                    self._received(msg)
                case PeerJoined(peer, info):
                    self._infos[peer] = info
                case PeerLeft(peer, info, why):
                    self._left(peer, info, why)
                case PeerRefused():
                    pass  # a master connects to nobody
                case AskServing(endpoint):
                    self._asking.add(endpoint)
                    self.system.ref("frontend", endpoint).tell(Serving(self.lacks))
                case AskNodes(query, endpoint):
                    answer = NodesAnswer(query, json.dumps(self._table()).encode())
                    self.system.ref("frontend", endpoint).tell(answer)
                case Drain(timeout_s):
                    self._drain(timeout_s)
                case EndpointGone(endpoint):
                    self._gone.add(endpoint)
                    self._asking.discard(endpoint)
                    self.core.forget(endpoint)
                case Probe(query):
                    self._watchdog.tell(self._stats(query))
                case _:
                    assert_never(msg)
        self._flush()

    def possible(self, msg: Inbox) -> bool:
        """Whether a node's tokens are in the vocabulary."""
        told = msg.msg if isinstance(msg, PeerMessage) else None
        return not isinstance(told, Tokens) or max(told.tokens, default=0) < self._vocab_size

    @property
    def lacks(self) -> str:
        """What is missing before this master is ready, "": nothing."""
        if self._counts is None:
            return self.core.lacks
        there = [len(self.core.nodes.of(role)) for role in ROLES]
        missing = [
            f"{num} of {wanted} {role} nodes"
            for role, num, wanted in zip(ROLES, there, self._counts, strict=True)
            if num < wanted
        ]
        return f"there are {' and '.join(missing)} (--pd_master_mode)" if missing else ""

    # -- nodes ----------------------------------------------------------------------------------

    def _complaint(self, info: PeerInfo) -> str | None:
        """Why a connecting server is refused, or None. One that has restarted, or has connected
        again before the end of its former connection was noticed, replaces its former self."""
        if info.role not in ROLES:
            return f"it is no prefill or decode node, but {info.role!r}"
        peers = self._channel.peers  # those of a moment ago too, which have not been told
        former = {peer: other for peer, other in peers.items() if other.name == info.name}
        there = [other for peer, other in peers.items() if peer not in former]
        for other in there:
            if found := other.difference(info):
                what, ours, theirs = found
                return f"{what} of {info} is {theirs}, that of {other} {ours}"
        if self._counts is not None:
            most = self._counts[ROLES.index(info.role)]
            if sum(other.role == info.role for other in there) >= most:
                return f"there are {most} {info.role} nodes already (--pd_master_mode)"
        for peer, other in former.items():
            again = other.incarnation == info.incarnation
            by = "a new connection of its own" if again else "another process with its address"
            self._channel.drop(peer, f"replaced by {by}")
        return None

    def _received(self, msg: PeerMessage) -> None:
        peer, core = msg.peer, self.core
        match msg.msg:
            case NodeState() as state:
                self._state(peer, state)
            case DecodeReserved(ticket, to):
                core.reserved(peer, ticket, to)
            case Tokens() as tokens:
                core.tokens(peer, tokens)
            case Finished() as end:
                core.finished(peer, end)
            case other:
                assert type(other) in self.foreign, other

    def _state(self, peer: int, state: NodeState) -> None:
        if (node := self.core.nodes.get(peer)) is None:
            if (info := self._infos.get(peer)) is None:
                return  # it has left
            node = EngineNode(peer, info.role, info.name, state.total)
            self.core.joined(node)
            log.info("%s takes requests: %d K/V slots", node, state.total)
        if state.draining and not node.draining:
            log.info("%s drains", node)
        node.used, node.cached = state.used, state.cached
        node.running, node.waiting = state.running, state.waiting
        node.draining = state.draining
        self._moved[peer] = state.moved

    def _left(self, peer: int, info: PeerInfo, why: str) -> None:
        self._infos.pop(peer, None)
        gone = self._moved.pop(peer, TransferTotals())
        self._moved_before += replace(gone, waiting=0)
        before = self.core.counts.retries
        self.core.left(peer, why)
        moved = self.core.counts.retries - before
        log.warning("%s is lost: %s; %d requests are tried elsewhere", info, why, moved)

    def _table(self) -> list[dict[str, object]]:
        """For ``/pd_nodes``."""
        rows: list[dict[str, object]] = []
        for peer, info in self._infos.items():
            node = self.core.nodes.get(peer)
            row: dict[str, object] = {"role": info.role, "address": info.name, "state": "joining"}
            if node is not None:
                row |= {
                    "state": "draining" if node.draining else "serving",
                    "load": round(node.used / max(node.total, 1), 4),
                    "used_tokens": node.used,
                    "cached_tokens": node.cached,
                    "total_tokens": node.total,
                    "running": node.running,
                    "waiting": node.waiting,
                }
            rows.append(row | {"incarnation": info.incarnation})
        return rows

    # -- requests -------------------------------------------------------------------------------

    def _submit(self, msg: Submit) -> None:
        if msg.rid >> FRONTEND_SHIFT in self._gone:
            return
        if msg.rid in self.core.requests:
            self.system.reject(msg, f"request {msg.rid} is there already")
        elif self._draining:
            failure = Failure("server is shutting down", request_director.SHUTTING_DOWN, 503)
            self.core.ended.append(Finished(msg.rid, FinishReason.ERROR, failure))
        else:
            self.core.submit(msg)

    def _drain(self, timeout_s: float) -> None:
        self._draining = True
        if timeout_s <= 0:
            self.core.abort_all()

    def _flush(self) -> None:
        """Send the resulting messages to nodes and clients."""
        core = self.core
        orders, core.orders = core.orders, []
        for peer, order in orders:
            self.system.ref("agent", peer).tell(order)
        emitted, core.emitted = core.emitted, []
        for endpoint, tokens in emitted:
            self.system.ref("detokenizer", endpoint).tell(tokens)
        ended, core.ended = core.ended, []
        for end in ended:
            self.system.ref("detokenizer", end.rid >> FRONTEND_SHIFT).tell(end)
        if (lacks := self.lacks) != self._told:
            self._told = lacks
            log.info("%s", lacks or "all nodes that are needed are there")
            for endpoint in sorted(self._asking):
                self.system.ref("frontend", endpoint).tell(Serving(lacks))
        if self._draining and not (self._drained or core.requests):
            self._drained = True
            self._watchdog.tell(Drained("director", self.system.endpoint))

    def _tick(self) -> None:
        self.core.now = self.system.loop.time()
        self.core.tick()
        self._flush()

    def _stats(self, query: int) -> DirectorStats:
        nodes, counts = self.core.nodes, self.core.counts
        decode = [node for node in nodes if node.role == DECODE]
        moved = sum(self._moved.values(), self._moved_before)
        return DirectorStats(
            query=query,
            endpoint=self.system.endpoint,
            requests=len(self.core.requests),
            prefill_nodes=len(nodes.of(PREFILL)),
            decode_nodes=len(nodes.of(DECODE)),
            used=sum(node.used for node in decode),
            total=sum(node.total for node in decode),
            attempts=counts.attempts,
            retries=counts.retries,
            failed=counts.failed,
            lost_nodes=counts.lost_nodes,
            handovers=counts.handovers,
            reserve_ms=round(1e3 * counts.reserve_s),
            handover_ms=round(1e3 * counts.handover_s),
            kv_sent_bytes=moved.sent_bytes,
            kv_tokens=moved.tokens,
            kv_transfers=moved.transfers,
            kv_ms=moved.ms,
            kv_lapses=moved.lapses,
            kv_waiting=moved.waiting,
        )
