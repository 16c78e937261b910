"""Agent: submits masters' requests on a prefill or decode node, and returns the results.

Owns the mapping from requests to masters, and the connections to masters. Knows neither text nor
how the scheduler handles a request.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from asyncllm.actors.base import Actor
from asyncllm.actors.channel import Channel
from asyncllm.actors.peer_connector import PeerConnector
from asyncllm.actors.peer_messages import PeerJoined, PeerLeft, PeerMessage, PeerRefused
from asyncllm.codec import INT32, INT64, Message
from asyncllm.core.node_selection import DECODE
from asyncllm.core.request import FinishReason
from asyncllm.core.request_director import SHUTTING_DOWN
from asyncllm.errors import StartupError
from asyncllm.messages import (
    FRONTEND_SHIFT,
    Abort,
    AskServing,
    BeginDecode,
    CompileGrammar,
    DecodeRequest,
    DecodeReserved,
    Drain,
    Drained,
    EndpointGone,
    Finished,
    GrammarReady,
    ImportPlaced,
    KvListening,
    MasterList,
    NodeState,
    PrefillRequest,
    Scrape,
    Scraped,
    Serving,
    Started,
    StopHit,
    Submit,
    Tokens,
)
from asyncllm.records import Failure, KvDestination

STATE_S = 0.5  # between two states sent to masters
WHAT = "the pd_master (--pd_master_ip, --pd_master_port)"

log = logging.getLogger(__name__)


Asked = PrefillRequest | DecodeRequest
Inbox = (
    PeerMessage
    | PeerJoined
    | PeerLeft
    | PeerRefused
    | MasterList
    | Tokens
    | Finished
    | ImportPlaced
    | KvListening
    | Started
    | GrammarReady
    | Scraped
    | AskServing
    | EndpointGone
    | Drain
)


@dataclass(slots=True, eq=False)
class _Task:
    """One master's request on this node."""

    rid: int
    peer: int
    msg: Asked
    compiling: int = 0  # groups whose grammar is not ready
    over: bool = False  # it has ended, but its K/V are still being sent


class Agent(Actor[Inbox]):
    """One per node, on its coordinator.

    Args:
        channel: to the masters.
        masters: host and HTTP port of each; (): the config_client provides them.
        vocab_size, max_len: limits that requests of masters are checked against.
    """

    capacity = 65536
    remote = frozenset({Tokens, Finished, ImportPlaced, KvListening, GrammarReady, AskServing})
    foreign = frozenset({PrefillRequest, DecodeRequest, BeginDecode, Abort, StopHit})

    def __init__(
        self,
        channel: Channel,
        masters: Sequence[tuple[str, int]],
        *,
        vocab_size: int,
        max_len: int,
    ) -> None:
        super().__init__("agent")
        self._channel = channel
        self._vocab_size, self._max_len = vocab_size, max_len
        self._searches = [PeerConnector(channel, master, WHAT, self.spawn) for master in masters]
        self._listed: frozenset[tuple[str, int]] = (
            frozenset()
        )  # channels listed by the config_client
        self._dialled: set[str] = set()  # those of them that we connect to
        self._refusing: set[str] = set()  # masters that refuse us
        self._peers: dict[int, str] = {}  # connected masters -> where they were dialled
        self._complete = self._looking = self._joined_once = False
        self._tasks: dict[int, _Task] = {}  # by rid
        self._tickets: dict[tuple[int, int], _Task] = {}  # by master and ticket
        self._counter = 0
        self._kv_listening: dict[int, KvListening] = {}  # of kv_transfer, by rank's endpoint
        self._asking: set[int] = set()  # endpoints that asked whether there is a master
        self._draining = self._drained = False

    def started(self) -> None:
        self._scheduler = self.system.at_intake("scheduler")
        self._grammar = self.system.at_intake("grammar")
        self._watchdog = self.system.ref("watchdog")
        self._num_grammars = len(self.system.topology.placed("grammar"))
        takes = self._channel.info.role == DECODE
        self._awaited = {*self.system.topology.placed("kv_transfer")} if takes else set()
        self.repeat(STATE_S, self._ask_state)

    def holds(self) -> str:
        masters = f"{len(self._peers)} of {len(self._searches) + len(self._listed)} masters"
        return f"{len(self._tasks)} requests of {masters}" + ", drains" * self._draining

    def receive(self, batch: list[Inbox]) -> None:
        for msg in batch:
            match msg:
                case PeerMessage(peer, told):
                    self._told(peer, told)
                case Tokens():
                    self._tokens(msg)
                case Finished():
                    self._finished(msg)
                case ImportPlaced():
                    self._placed(msg)
                case GrammarReady():
                    self._compiled(msg)
                case PeerJoined(peer, _, where):
                    self._joined(peer, where)
                case PeerLeft(peer):
                    self._left(peer)
                case PeerRefused(where, why):
                    self._refused(where, why)
                case MasterList(masters):
                    self._listed = frozenset((each.host, each.port) for each in masters)
                    self._follow()
                case Started():
                    self._complete = True
                    self._look_for_masters()
                case KvListening():
                    self._kv_listening[msg.endpoint] = msg
                    self._look_for_masters()
                case Scraped():
                    self._say_state(msg)
                case AskServing(endpoint):
                    self._asking.add(endpoint)
                    self._say_serving(endpoint)
                case EndpointGone(endpoint):
                    self._asking.discard(endpoint)
                case Drain():
                    self._draining = True
                    self._ask_state()  # tell masters at once
                case _:
                    assert_never(msg)
        if self._draining and not (self._drained or self._tasks):
            self._drained = True
            self._watchdog.tell(Drained("agent", self.system.endpoint))

    def possible(self, msg: Inbox) -> bool:
        """Whether a master's request is within the limits that the master has checked."""
        if isinstance(msg, PeerMessage) and isinstance(msg.msg, PrefillRequest | DecodeRequest):
            return self._submit_of(0, msg.msg).fits(self._vocab_size, self._max_len)
        return True

    # -- masters --------------------------------------------------------------------------------

    def _look_for_masters(self) -> None:
        """Once, when all processes are there and each rank of a decode node has said where it takes
        K/V."""
        if self._complete and not self._looking and self._awaited <= self._kv_listening.keys():
            self._looking = True
            for search in self._searches:
                search.look()
            self._follow()

    def _follow(self) -> None:
        """Look for all masters that the config_server knows, and for no others. Those who are here
        stay, whether it knows them or not: it may have started anew."""
        if self._looking:
            wanted = {self._channel.dial(*place) for place in self._listed}
            for where in self._dialled - wanted - {*self._peers.values()}:
                self._channel.forget(where)
            self._dialled = wanted | self._dialled & {*self._peers.values()}

    def _joined(self, peer: int, where: str) -> None:
        self._peers[peer] = where
        self._joined_once = True
        for search in self._searches:
            search.joined(peer, where)
        self._say_serving(*self._asking)
        self._ask_state()

    def _left(self, peer: int) -> None:
        """A master has gone: drop its requests."""
        self._peers.pop(peer, None)
        for task in [task for task in self._tasks.values() if task.peer == peer]:
            self._abort(task)
        for search in self._searches:
            search.left(peer)
        self._follow()
        self._say_serving(*self._asking)

    def _refused(self, where: str, why: str) -> None:
        """Raises StartupError if no master has ever accepted us, and none is left that might."""
        places = {search.where for search in self._searches} | self._dialled
        if where not in places:
            return
        self._refusing.add(where)
        if not self._joined_once and places <= self._refusing:
            raise StartupError(f"the pd_master at {where} does not take this node: {why}")
        log.error("the pd_master at %s does not take this node: %s", where, why)

    @property
    def lacks(self) -> str:
        """What is missing before this node is ready, "": nothing."""
        return "" if self._peers else "no pd_master is connected"

    def _say_serving(self, *endpoints: int) -> None:
        for endpoint in endpoints:
            self.system.ref("frontend", endpoint).tell(Serving(self.lacks))

    def _ask_state(self) -> None:
        if self._peers:
            self._watchdog.tell(Scrape(0, self.system.endpoint, asks="agent"))

    def _say_state(self, scraped: Scraped) -> None:
        loads = scraped.loads
        state = NodeState(
            used=sum(load.used for load in loads),
            cached=sum(load.cached for load in loads),
            total=sum(load.total for load in loads),
            running=sum(load.running for load in loads),
            waiting=sum(load.waiting for load in loads),
            draining=self._draining,
            moved=scraped.moved,
        )
        for peer in self._peers:
            self._to_master(peer, state)

    def _to_master(self, peer: int, msg: Message) -> None:
        self.system.ref("director", peer).tell(msg)

    # -- requests -------------------------------------------------------------------------------

    def _told(self, peer: int, told: Message) -> None:
        if peer not in self._peers:
            return  # sent before it left
        match told:
            case PrefillRequest() | DecodeRequest():
                self._take(peer, told)
            case Abort(ticket):
                if (task := self._tickets.get((peer, ticket))) is not None:
                    self._abort(task)
            case BeginDecode(ticket) | StopHit(ticket):
                if (task := self._tickets.get((peer, ticket))) is not None and not task.over:
                    self._scheduler.tell(replace(told, rid=task.rid))
            case other:
                raise AssertionError(other)  # it is not in ``foreign``

    def _take(self, peer: int, msg: Asked) -> None:
        if (peer, msg.ticket) in self._tickets:
            self._channel.drop(peer, f"ticket {msg.ticket} is there already")
            return
        log.log(
            logging.INFO if msg.request_id else logging.DEBUG,
            "request %s: %s, ticket %d of peer %d, %d tokens are known",
            msg.request_id or "-",
            type(msg).__name__.lower(),
            msg.ticket,
            peer,
            len(msg.prompt) + len(msg.outputs),
        )
        if self._draining:
            failure = Failure("the node is shutting down", SHUTTING_DOWN, 503)
            self._to_master(peer, Finished(msg.ticket, FinishReason.ERROR, failure))
            return
        self._counter += 1
        rid = (self.system.endpoint << FRONTEND_SHIFT) + self._counter
        task = self._tasks[rid] = self._tickets[peer, msg.ticket] = _Task(rid, peer, msg)
        if msg.params.grammar is None:
            self._submit(task)
            return
        kind, text = msg.params.grammar
        task.compiling = self._num_grammars  # any group may get the request
        self._grammar.tell(
            CompileGrammar(
                endpoint=self.system.endpoint, job=rid, kind=kind, text=text, client=msg.client
            )
        )

    def _compiled(self, msg: GrammarReady) -> None:
        if (task := self._tasks.get(msg.job)) is None or not task.compiling:
            return
        task.compiling -= 1
        if msg.failure is not None:
            self._forget(task)
            self._to_master(task.peer, Finished(task.msg.ticket, FinishReason.ERROR, msg.failure))
        elif not task.compiling:
            self._submit(task)

    def _submit(self, task: _Task) -> None:
        self._scheduler.tell(self._submit_of(task.rid, task.msg))

    def _submit_of(self, rid: int, msg: Asked) -> Submit:
        return Submit(
            rid=rid,
            prompt=msg.prompt,
            params=msg.params,
            thoughts=msg.thoughts,
            healed=msg.healed,
            client=msg.client,
            outputs=msg.outputs,
            imports=isinstance(msg, DecodeRequest),
            exports=msg.to if isinstance(msg, PrefillRequest) else None,
            prediction=msg.prediction if isinstance(msg, DecodeRequest) else array(INT32),
        )

    def _placed(self, msg: ImportPlaced) -> None:
        """The request has its slots: its K/V may be sent to the ranks of its group."""
        if (task := self._tasks.get(msg.rid)) is None:
            return
        topology = self.system.topology
        listening = [
            self._kv_listening[rank.id] for rank in topology.group(topology[msg.leader].group)
        ]
        to = KvDestination(
            node=self._channel.info.incarnation,
            epoch=msg.rid,
            hit=msg.hit,
            length=msg.length,
            addresses=tuple(each.address for each in listening),
            wire=listening[0].wire,
        )
        self._to_master(task.peer, DecodeReserved(task.msg.ticket, to))

    def _abort(self, task: _Task) -> None:
        self._forget(task)
        if not task.compiling:
            self._scheduler.tell(Abort(task.rid))

    def _forget(self, task: _Task) -> None:
        del self._tasks[task.rid], self._tickets[task.peer, task.msg.ticket]

    def _tokens(self, msg: Tokens) -> None:
        """To each master those of its requests, under its tickets."""
        if len(self._peers) == 1:
            (peer,) = self._peers
            rows = [i for i, rid in enumerate(msg.rids) if rid in self._tasks]
            self._pass_on(peer, msg, rows)
            return
        by_peer: dict[int, list[int]] = {
            self._tasks[rid].peer: [] for rid, _ in msg.prompt if rid in self._tasks
        }
        for i, rid in enumerate(msg.rids):
            if (task := self._tasks.get(rid)) is not None:
                by_peer.setdefault(task.peer, []).append(i)
        for peer, rows in by_peer.items():
            self._pass_on(peer, msg, rows)

    def _pass_on(self, peer: int, msg: Tokens, rows: list[int]) -> None:
        tasks = self._tasks
        prompt = tuple(
            (tasks[rid].msg.ticket, scores)
            for rid, scores in msg.prompt
            if rid in tasks and tasks[rid].peer == peer
        )
        logprobs = msg.logprobs
        if logprobs is not None and len(rows) < len(msg.rids):
            logprobs = logprobs.pick(rows)
        if rows or prompt:
            self._to_master(
                peer,
                Tokens(
                    step=msg.step,
                    rids=array(INT64, [tasks[msg.rids[i]].msg.ticket for i in rows]),
                    tokens=array(INT32, [msg.tokens[i] for i in rows]),
                    ends=bytes(msg.ends[i] for i in rows),
                    logprobs=logprobs,
                    prompt=prompt,
                ),
            )

    def _finished(self, msg: Finished) -> None:
        if (task := self._tasks.get(msg.rid)) is None:
            return
        if msg.reason is FinishReason.MOVED:
            task.over = True  # the master reports when its K/V have been received
        else:
            self._forget(task)
        self._to_master(task.peer, replace(msg, rid=task.msg.ticket))
