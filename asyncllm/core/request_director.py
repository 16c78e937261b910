"""A master's requests: starts attempts on prefill and decode nodes, and retries failed ones.

An attempt uses one prefill node and, unless that generates the whole answer, one decode node. Every
failure is handled the same way: by another attempt that continues from the tokens that the client
has received. Knows nodes by their connection numbers; knows neither connections nor text.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial

from asyncllm.codec import Message
from asyncllm.core.balancing import PromptPrefix, spans_of
from asyncllm.core.node_selection import DECODE, PREFILL, EngineNode, NodeSelector
from asyncllm.core.request import FinishReason
from asyncllm.messages import (
    FRONTEND_SHIFT,
    Abort,
    BeginDecode,
    DecodeRequest,
    Finished,
    PrefillRequest,
    StopHit,
    Submit,
    Tokens,
)
from asyncllm.records import Failure, KvDestination, Logprobs, int32s, int64s

MOST_RETRIES = 3  # attempts after the first one
WITHIN_S = 10.0  # after a node fails, its requests have moved elsewhere or ended within this time
SILENT_S = 0.4 * WITHIN_S  # by then a silent node has been detected
# Since the first failure after a token: later failures are not retried. The rest is for timers.
RETRY_S = 0.45 * WITHIN_S
NO_NODES, FAILED = "no_nodes", "nodes_failed"  # failure codes
# codes with which a node ends an attempt that may succeed elsewhere
TRANSFER_FAILED, SHUTTING_DOWN = "transfer_failed", "shutting_down"
PASSING = (TRANSFER_FAILED, SHUTTING_DOWN)


class AttemptPhase(IntEnum):
    """How far an attempt has come."""

    RESERVE = 0  # the decode node allocates slots
    PREFILL = 1  # the prefill node computes
    HANDED = 2  # the decode node has the first token and waits for the remaining K/V
    DECODE = 3  # tokens come from the decode node


@dataclass(slots=True, eq=False)
class Attempt:
    """One try to serve a request; ``decode`` is None if the prefill node serves all of it."""

    ticket: int
    request: DirectedRequest
    prefill: EngineNode
    decode: EngineNode | None
    since: float  # when its phase began
    phase: AttemptPhase = AttemptPhase.RESERVE
    given: dict[int, int] = field(default_factory=dict)  # by node: the result of Node.give
    scored: int = 0  # prompt tokens whose log-probabilities have arrived in this attempt

    @property
    def speaker(self) -> EngineNode | None:
        """The node whose tokens currently count."""
        if self.phase is AttemptPhase.RESERVE:
            return None
        return self.prefill if self.phase is AttemptPhase.PREFILL else self.decode

    @property
    def matters(self) -> tuple[EngineNode, ...]:
        """Nodes that it needs to continue."""
        if self.decode is None:
            return (self.prefill,)
        return (self.decode,) if self.phase is AttemptPhase.DECODE else (self.prefill, self.decode)


@dataclass(slots=True, eq=False)
class DirectedRequest:
    """One request of a client, from its Submit to its only Finished."""

    msg: Submit
    spans: list[PromptPrefix]  # of its prompt, if it may use prefix caches
    sent: array[int] = field(default_factory=int32s)  # tokens that the client has received
    attempt: Attempt | None = None
    retries: int = 0
    failed_at: float | None = None  # the first failure since the last token
    why: str = ""  # of the last failure
    blamed: set[int] = field(default_factory=set)  # nodes that have failed it
    wanted: tuple[int, int] = (-1, -1)  # nodes that should have its prompt cached
    cached: int = -1  # prompt tokens from the prefix cache of its first prefill, once known
    scored: int = 0  # prompt tokens whose log-probabilities the client has received
    drafted: int = 0  # draft tokens of all attempts
    accepted: int = 0  # draft tokens accepted
    stopped: bool = False  # the client wants no more tokens; waiting for the node's report
    over: bool = False  # its last token has arrived
    opened: bool = False  # its prompt is in the caches of its nodes
    held: list[DirectedRequest] = field(default_factory=list)  # others that wait for its prompt

    @property
    def rid(self) -> int:
        return self.msg.rid

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        assert self.msg.params.max_new_tokens is not None
        return self.msg.params.max_new_tokens - len(self.sent)


@dataclass(slots=True)
class DirectorCounters:
    """Counters since the start."""

    attempts: int = 0
    retries: int = 0  # attempts after a request's first one
    failed: int = 0  # requests that ended for lack of nodes
    lost_nodes: int = 0
    handovers: int = 0  # requests that decode nodes have continued
    reserve_s: float = 0.0  # time until a decode node had allocated slots
    handover_s: float = 0.0  # from the prefill node's token to the decode node's first one


@dataclass(slots=True)
class _OutgoingTokens:
    """Tokens for the clients of one process."""

    rids: array[int] = field(default_factory=int64s)
    tokens: array[int] = field(default_factory=int32s)
    ends: bytearray = field(default_factory=bytearray)
    rows: list[int] = field(default_factory=list)  # row indices in the node's message
    prompt: list[tuple[int, Logprobs]] = field(default_factory=list)

    def message(self, of: Tokens) -> Tokens:
        """The message as a scheduler would send it."""
        logprobs = of.logprobs
        if logprobs is not None and len(self.rows) != len(of.rids):
            logprobs = logprobs.pick(self.rows)
        return Tokens(
            step=of.step,
            rids=self.rids,
            tokens=self.tokens,
            ends=bytes(self.ends),
            logprobs=logprobs,
            prompt=tuple(self.prompt),
        )


class RequestDirector:
    """Assigns requests to nodes and collects their results. Each request ends exactly once.

    Attributes:
        now: seconds of a monotonic clock. The shell sets it before each call.
        orders: (node's number, message) still to be sent. The shell takes and clears it, and the
            next two as well.
        emitted: (endpoint, tokens) for clients.
        ended: Finished messages, each after all tokens of its request.
        requests: unfinished requests, by rid.
        nodes: the connected nodes.
        counts: counters.
    """

    def __init__(self, nodes: NodeSelector) -> None:
        self.nodes, self.counts, self.now = nodes, DirectorCounters(), 0.0
        self.requests: dict[int, DirectedRequest] = {}
        self.orders: list[tuple[int, Message]] = []
        self.emitted: list[tuple[int, Tokens]] = []
        self.ended: list[Finished] = []
        self._attempts: dict[int, Attempt] = {}  # by ticket
        self._parked: dict[int, DirectedRequest] = {}  # waiting for a node for their next attempt
        self._last_ticket = 0

    @property
    def lacks(self) -> str:
        """A text that names the missing roles; "": none is missing."""
        missing = [role for role in (PREFILL, DECODE) if not self.nodes.of(role)]
        return f"there is no {' and no '.join(missing)} node" if missing else ""

    # -- clients --------------------------------------------------------------------------------

    def submit(self, msg: Submit) -> None:
        """Start a new request."""
        shares = msg.params.shares_prefix
        request = self.requests[msg.rid] = DirectedRequest(
            msg, spans_of(msg.prompt) if shares else []
        )
        first = self.requests.get(msg.after) if shares else None
        if lacks := self.lacks:
            self._fail(request, NO_NODES, lacks)
        elif first is not None and not first.opened:
            first.held.append(request)
        else:
            if first is not None and first.attempt is not None:
                request.wanted = _places(first.attempt)
            self._begin(request)

    def abort(self, rid: int) -> None:
        """End a request; unknown and ended ones are ignored."""
        if (request := self.requests.get(rid)) is not None:
            self._end(request, FinishReason.ABORT)

    def abort_all(self) -> None:
        for request in [*self.requests.values()]:
            request.held.clear()  # none of them must begin
            self._end(request, FinishReason.ABORT)

    def stop(self, rid: int, num_tokens: int) -> None:
        """End a request whose text has reached a stop string after ``num_tokens``."""
        if (request := self.requests.get(rid)) is None:
            return
        attempt = request.attempt
        if attempt is not None and (node := attempt.speaker) is not None:
            request.stopped = True  # the node still reports what was cached, and its drafts
            self._tell(node, StopHit(attempt.ticket, num_tokens))
        else:
            self._end(request, FinishReason.STOP)

    def forget(self, endpoint: int) -> None:
        """A process that submitted requests has ended; drop its requests without an answer."""
        for request in [r for r in self.requests.values() if r.rid >> FRONTEND_SHIFT == endpoint]:
            request.held.clear()  # they belong to that process too
            self._close(request)

    # -- nodes ----------------------------------------------------------------------------------

    def joined(self, node: EngineNode) -> None:
        """A node has connected and accepts requests."""
        self.nodes.add(node)
        self._unpark()

    def left(self, peer: int, why: str) -> None:
        """A node has gone, with everything it held."""
        if (node := self.nodes.get(peer)) is None:
            return
        self.counts.lost_nodes += 1
        self.nodes.remove(peer)
        for attempt in [a for a in self._attempts.values() if node in a.matters]:
            if attempt.ticket in self._attempts:  # not ended by the end of another one
                self._mend(attempt, f"{node} is lost: {why}", peer)

    def reserved(self, peer: int, ticket: int, to: KvDestination) -> None:
        """A decode node has allocated slots for the K/V of an attempt."""
        attempt = self._attempts.get(ticket)
        if (
            attempt is not None
            and attempt.phase is AttemptPhase.RESERVE
            and _is(attempt.decode, peer)
        ):
            self.counts.reserve_s += self.now - attempt.since
            self._prefill(attempt, to)

    def tokens(self, peer: int, msg: Tokens) -> None:
        """Tokens of a node's step; ``rids`` are tickets."""
        out: dict[int, _OutgoingTokens] = {}
        for row, (ticket, token) in enumerate(zip(msg.rids, msg.tokens, strict=True)):
            attempt = self._attempts.get(ticket)
            if attempt is None or not _is(attempt.speaker, peer):
                continue
            request = attempt.request
            request.sent.append(token)
            request.failed_at, request.over = None, bool(msg.ends[row])
            emitted = _of(out, request)
            emitted.rids.append(request.rid)
            emitted.tokens.append(token)
            emitted.ends.append(msg.ends[row])
            emitted.rows.append(row)
            if attempt.phase is AttemptPhase.HANDED:
                self._moved(attempt)
        for ticket, scores in msg.prompt:
            attempt = self._attempts.get(ticket)
            if attempt is not None and _is(attempt.speaker, peer):
                request = attempt.request
                known = min(max(request.scored - attempt.scored, 0), len(scores))
                attempt.scored += len(scores)
                request.scored = max(request.scored, attempt.scored)
                if known < len(scores):
                    _of(out, request).prompt.append((request.rid, scores.slice(known)))
        self.emitted += [(endpoint, each.message(msg)) for endpoint, each in out.items()]

    def finished(self, peer: int, msg: Finished) -> None:
        """A node's part in an attempt is over; ``rid`` is a ticket."""
        attempt = self._attempts.get(msg.rid)
        if attempt is None or not any(_is(node, peer) for node in attempt.matters):
            return
        request, failure = attempt.request, msg.failure
        request.drafted += msg.drafted
        request.accepted += msg.accepted
        speaks = _is(attempt.speaker, peer)
        if speaks and attempt.phase is AttemptPhase.PREFILL and request.cached < 0:
            request.cached = msg.cached_len
        if request.stopped:
            self._end(request, FinishReason.STOP)
        elif failure is not None and failure.code not in PASSING:
            self._end(request, FinishReason.ERROR, failure)
        elif failure is not None or msg.reason is FinishReason.ABORT or not speaks:
            detail = "it ended the request" if failure is None else failure.detail
            self._broken(attempt, peer, detail, failure)
        elif msg.reason is FinishReason.MOVED and attempt.decode is not None and request.sent:
            self._hand_over(attempt, attempt.decode)
        else:
            self._end(request, msg.reason)

    def tick(self) -> None:
        """Called periodically: end requests that have waited too long for a node."""
        self._unpark()
        for request in [*self._parked.values()]:
            if self.now > (request.failed_at or 0.0) + RETRY_S:
                self._fail(request, FAILED, "; ".join(filter(None, (request.why, self.lacks))))

    # -- an attempt -----------------------------------------------------------------------------

    def _begin(self, request: DirectedRequest) -> None:
        """Start the next attempt, or park the request if there is no node."""
        msg, length = request.msg, len(request.msg.prompt) + len(request.sent)
        alone = bool(msg.healed) or request.left <= 1
        wanted, then = request.wanted
        choose = partial(
            self.nodes.choose,
            spans=request.spans,
            length=length,
            blamed=request.blamed,
            now=self.now,
        )
        prefill, decode = choose(PREFILL, wanted=wanted), None
        if prefill is not None and not alone:
            decode = choose(DECODE, wanted=then, prefill=prefill.peer)
        if prefill is None or (decode is None and not alone):
            self._parked[request.rid] = request
            request.failed_at = self.now if request.failed_at is None else request.failed_at
            return
        self._parked.pop(request.rid, None)
        self._last_ticket += 1
        self.counts.attempts += 1
        attempt = Attempt(self._last_ticket, request, prefill, decode, self.now)
        request.attempt = self._attempts[attempt.ticket] = attempt
        for node in attempt.matters:
            attempt.given[node.peer] = node.give(request.spans, length)
        if decode is None:
            self._prefill(attempt, None)
        else:
            self._tell(
                decode,
                DecodeRequest(
                    ticket=attempt.ticket,
                    prompt=msg.prompt,
                    outputs=request.sent[:],
                    params=msg.params,
                    thoughts=msg.thoughts,
                    healed=msg.healed,
                    client=msg.client,
                    request_id=msg.request_id,
                    prediction=msg.prediction,
                ),
            )

    def _prefill(self, attempt: Attempt, to: KvDestination | None) -> None:
        attempt.phase, attempt.since = AttemptPhase.PREFILL, self.now
        request, msg = attempt.request, attempt.request.msg
        self._tell(
            attempt.prefill,
            PrefillRequest(
                ticket=attempt.ticket,
                prompt=msg.prompt,
                outputs=request.sent[:],
                params=msg.params,
                thoughts=msg.thoughts,
                healed=msg.healed,
                client=msg.client,
                request_id=msg.request_id,
                to=to,
            ),
        )

    def _hand_over(self, attempt: Attempt, decode: EngineNode) -> None:
        """The prefill node has sent its token: the decode node continues."""
        attempt.phase, attempt.since = AttemptPhase.HANDED, self.now
        _free(attempt, attempt.prefill)
        self._tell(decode, BeginDecode(attempt.ticket, attempt.request.sent[-1]))

    def _moved(self, attempt: Attempt) -> None:
        """The decode node has sent its first token: it has all K/V."""
        attempt.phase = AttemptPhase.DECODE
        self.counts.handovers += 1
        self.counts.handover_s += self.now - attempt.since
        self._tell(attempt.prefill, Abort(attempt.ticket))
        self._open(attempt.request, _places(attempt))

    def _broken(
        self, attempt: Attempt, peer: int, detail: str, failure: Failure | None = None
    ) -> None:
        """A node reports that its part has failed."""
        transfer = failure is not None and failure.code == TRANSFER_FAILED
        if transfer and attempt.decode is not None:
            self.nodes.avoid(attempt.prefill.peer, attempt.decode.peer, self.now)
        self._mend(attempt, f"{self.nodes.get(peer)}: {detail}", None if transfer else peer)

    def _mend(self, attempt: Attempt, why: str, blamed: int | None) -> None:
        """Abandon an attempt; start another from the tokens that the client has received."""
        request = attempt.request
        self._drop(attempt)
        request.why = why
        if blamed is not None:
            request.blamed.add(blamed)
        if request.failed_at is None:
            request.failed_at = self.now
        if request.stopped or request.over:
            self._end(request, FinishReason.STOP)
        elif request.sent and request.left <= 0:
            self._end(request, FinishReason.LENGTH)
        elif request.retries >= MOST_RETRIES or self.now > request.failed_at + RETRY_S:
            self._fail(request, FAILED, f"{why} ({request.retries + 1} attempts have failed)")
        else:
            request.retries += 1
            self.counts.retries += 1
            self._begin(request)

    def _drop(self, attempt: Attempt) -> None:
        """Cancel an attempt: its nodes free what it holds."""
        attempt.request.attempt = None
        del self._attempts[attempt.ticket]
        for node in attempt.matters:
            _free(attempt, node)
            told = node is attempt.decode or attempt.phase is not AttemptPhase.RESERVE
            if told and self.nodes.get(node.peer) is node:
                self._tell(node, Abort(attempt.ticket))

    def _unpark(self) -> None:
        for request in [*self._parked.values()]:
            self._begin(request)

    # -- ends -----------------------------------------------------------------------------------

    def _end(
        self, request: DirectedRequest, reason: FinishReason, failure: Failure | None = None
    ) -> None:
        self.ended.append(
            Finished(
                request.rid,
                reason,
                failure,
                cached_len=max(request.cached, 0),
                num_tokens=len(request.sent),
                drafted=request.drafted,
                accepted=request.accepted,
            )
        )
        self._close(request)

    def _fail(self, request: DirectedRequest, code: str, detail: str) -> None:
        self.counts.failed += 1
        self._end(request, FinishReason.ERROR, Failure(detail, code, 503))

    def _close(self, request: DirectedRequest) -> None:
        """Forget an ended request; start those that waited for its prompt."""
        del self.requests[request.rid]
        self._parked.pop(request.rid, None)
        places = (-1, -1)
        if (attempt := request.attempt) is not None:
            places = _places(attempt)
            self._drop(attempt)
        self._open(request, places)

    def _open(self, request: DirectedRequest, places: tuple[int, int]) -> None:
        """Its prompt is cached on its nodes: others with the same prompt go there too."""
        request.opened = True
        held, request.held = request.held, []
        for each in held:
            if each.rid in self.requests:
                each.wanted = places
                self._begin(each)

    def _tell(self, node: EngineNode, msg: Message) -> None:
        self.orders.append((node.peer, msg))


def _is(node: EngineNode | None, peer: int) -> bool:
    return node is not None and node.peer == peer


def _places(attempt: Attempt) -> tuple[int, int]:
    return attempt.prefill.peer, -1 if attempt.decode is None else attempt.decode.peer


def _free(attempt: Attempt, node: EngineNode) -> None:
    """Stop charging the node for the attempt."""
    if (given := attempt.given.pop(node.peer, None)) is not None:
        node.take(given)


def _of(out: dict[int, _OutgoingTokens], request: DirectedRequest) -> _OutgoingTokens:
    return out.setdefault(request.rid >> FRONTEND_SHIFT, _OutgoingTokens())
