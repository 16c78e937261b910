"""Masters: whatever nodes and clients do, each request ends once, with the tokens of one server."""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import pytest

from asyncllm.codec import INT32, INT64, Message, i32
from asyncllm.core.node_selection import DECODE, PREFILL, STRATEGIES, EngineNode, NodeSelector
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.core.request_director import (
    MOST_RETRIES,
    RETRY_S,
    SHUTTING_DOWN,
    AttemptPhase,
    RequestDirector,
)
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
from asyncllm.records import Failure, KvDestination, KvWireFormat, Logprobs

EOS = 7
WIRE = KvWireFormat(format="", dtype="fp32", num_layers=1, num_heads=1, head_bytes=4)
LOST = Failure("no progress", "transfer_failed", 503)


def token_after(known: array[int]) -> int:
    """What any node generates: one answer for one beginning, now and then the end."""
    return (sum(known) * 31 + len(known) * 7) % 61


def answer(msg: Submit) -> tuple[list[int], FinishReason]:
    """What one server would give."""
    known, out = msg.prompt[:], list[int]()
    most = msg.params.max_new_tokens or 0
    while len(out) < most:
        token = token_after(known)
        known.append(token)
        out.append(token)
        if token == EOS:
            return out, FinishReason.STOP
    return out, FinishReason.LENGTH


def tokens(ticket: int, *ids: int, ends: bool = False, **more: Any) -> Tokens:
    """A step of a node that gives these to one request."""
    marks = bytes(len(ids) - 1) + bytes([ends]) if ids else b""
    given = {"logprobs": None, "prompt": (), **more}
    return Tokens(1, array(INT64, [ticket] * len(ids)), array(INT32, ids), marks, **given)


def submit(rid: int, prompt: list[int], max_new: int = 8, after: int = -1, **more: Any) -> Submit:
    params = SamplingParams(max_new_tokens=max_new, **more)
    return Submit(rid, i32(prompt), params, after=after)


@dataclass
class Part:
    """An attempt at a node."""

    ticket: int
    known: array[int]
    left: int
    to: KvDestination | None = None
    placed: bool = False
    begun: bool = False


@dataclass
class FakeNode:
    """Takes orders one at a time, and does something for one of its parts when it is its turn."""

    peer: int
    role: str
    orders: deque[Message] = field(default_factory=deque)
    says: deque[Message] = field(default_factory=deque)
    parts: dict[int, Part] = field(default_factory=dict)
    moved: set[int] = field(default_factory=set)  # tickets whose K/V may still be on their way

    def order(self) -> None:
        match self.orders.popleft():
            case PrefillRequest() | DecodeRequest() as msg:
                left = (msg.params.max_new_tokens or 0) - len(msg.outputs)
                assert msg.ticket not in self.parts
                part = Part(msg.ticket, msg.prompt + msg.outputs, left)
                part.to = msg.to if isinstance(msg, PrefillRequest) else None
                part.begun = isinstance(msg, PrefillRequest)
                self.parts[msg.ticket] = part
            case BeginDecode(ticket, token):
                if part := self.parts.get(ticket):
                    part.known.append(token)
                    part.left -= 1
                    part.begun = True
            case Abort(ticket):
                self.parts.pop(ticket, None)
                self.moved.discard(ticket)
            case StopHit(ticket, _):
                if self.parts.pop(ticket, None):
                    drafts = {"drafted": 5, "accepted": 4} if self.role == DECODE else {}
                    self.says.append(Finished(ticket, FinishReason.STOP, cached_len=3, **drafts))
            case other:
                raise AssertionError(other)

    def act(self, rng: random.Random) -> None:
        part = rng.choice([*self.parts.values()])
        if self.role == DECODE and not part.placed:
            part.placed = True
            self.says.append(reserved(self.peer, part.ticket, len(part.known)))
        elif part.begun and part.left <= 0:
            self.end(part, FinishReason.LENGTH)
        elif part.begun:
            token = token_after(part.known)
            part.known.append(token)
            part.left -= 1
            self.says.append(tokens(part.ticket, token, ends=token == EOS))
            if token == EOS:
                self.end(part, FinishReason.STOP)
            elif part.left <= 0:
                self.end(part, FinishReason.LENGTH)
            elif part.to is not None:
                self.moved.add(part.ticket)
                self.end(part, FinishReason.MOVED)

    def end(self, part: Part, reason: FinishReason, failure: Failure | None = None) -> None:
        del self.parts[part.ticket]
        self.says.append(Finished(part.ticket, reason, failure, cached_len=3))


def reserved(peer: int, ticket: int, length: int) -> Message:
    from asyncllm.messages import DecodeReserved

    to = KvDestination(
        node=str(peer), epoch=ticket, hit=0, length=length, addresses=("tcp://x",), wire=WIRE
    )
    return DecodeReserved(ticket, to)


class World:
    """A master's core among fake nodes."""

    def __init__(self, strategy: str = "cache_aware", seed: int = 0) -> None:
        self.core = RequestDirector(NodeSelector(strategy, random.Random(seed)))
        self.nodes: dict[int, FakeNode] = {}
        self.given: dict[int, list[int]] = {}  # rid -> tokens that the client has
        self.ends: dict[int, Finished] = {}
        self.attempts: Counter[int] = Counter()
        self.submitted: dict[int, Submit] = {}
        self.last_peer = 0
        self.rids: dict[int, int] = {}  # ticket -> rid

    def join(self, *roles: str) -> None:
        for role in roles:
            self.last_peer += 1
            self.nodes[self.last_peer] = FakeNode(self.last_peer, role)
            self.core.joined(EngineNode(self.last_peer, role, f"n{self.last_peer}", 1000))
            self.carry()

    def kill(self, peer: int) -> None:
        del self.nodes[peer]
        self.core.left(peer, "killed")
        self.carry()

    def submit(self, msg: Submit) -> None:
        self.submitted[msg.rid] = msg
        self.core.submit(msg)
        self.carry()

    def carry(self) -> None:
        """What the shell does."""
        core = self.core
        for request in core.requests.values():
            if request.attempt is not None:
                self.rids[request.attempt.ticket] = request.rid
        for peer, order in core.orders:
            assert peer in self.nodes, f"{order} is for a dead node"
            if isinstance(order, DecodeRequest) or (
                isinstance(order, PrefillRequest) and order.to is None
            ):
                self.attempts[self.rids[order.ticket]] += 1
            self.nodes[peer].orders.append(order)
        for endpoint, msg in core.emitted:
            for rid, token in zip(msg.rids, msg.tokens, strict=True):
                assert rid >> FRONTEND_SHIFT == endpoint
                assert rid not in self.ends
                self.given.setdefault(rid, []).append(token)
        for end in core.ended:
            assert end.rid not in self.ends, "it ended twice"
            self.ends[end.rid] = end
        core.orders, core.emitted, core.ended = [], [], []

    def hear(self, peer: int) -> None:
        msg = self.nodes[peer].says.popleft()
        match msg:
            case Tokens():
                self.core.tokens(peer, msg)
            case Finished():
                self.core.finished(peer, msg)
            case _:
                self.core.reserved(peer, msg.ticket, msg.to)  # type: ignore[attr-defined]
        self.carry()

    def tick(self, seconds: float = 0.25) -> None:
        self.core.now += seconds
        self.core.tick()
        self.carry()

    def settle(self, seed: int = 0, most: int = 100_000) -> None:
        """Everybody acts until nobody has anything to do."""
        rng = random.Random(seed)
        for _ in range(most):
            if not (acts := self.ready()):
                return
            rng.choice(acts)(rng)
        raise AssertionError("no end")

    def ready(self) -> list[Any]:
        acts: list[Any] = []
        for node in self.nodes.values():
            if node.orders:
                acts.append(lambda _, node=node: node.order())
            if node.says:
                acts.append(lambda _, peer=node.peer: self.hear(peer))
            if any(
                not p.placed if node.role == DECODE else p.begun for p in node.parts.values()
            ) or any(p.begun for p in node.parts.values()):
                acts.append(lambda rng, node=node: node.act(rng))
        return acts

    def check(self, rid: int) -> None:
        """The client has got what one server gives, or a beginning of it and the reason."""
        wanted, reason = answer(self.submitted[rid])
        given, end = self.given.get(rid, []), self.ends[rid]
        if end.reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert (given, end.reason) == (wanted, reason)
            assert end.num_tokens == len(given)
        else:
            assert given == wanted[: len(given)]

    def all_quiet(self) -> None:
        """Nothing of any request is left, here or at a node."""
        assert not self.core.requests
        assert self.ends.keys() == self.submitted.keys()
        for node in self.nodes.values():
            assert not node.parts
            assert not node.moved
        for seen in self.core.nodes:
            assert (seen.requests, seen.tokens) == (0, 0)


def served(*roles: str, **more: Any) -> World:
    world = World(**more)
    world.join(*(roles or (PREFILL, DECODE)))
    return world


# -- one request ------------------------------------------------------------------------------------


def test_a_request_is_reserved_prefilled_and_goes_on_at_the_decode_node() -> None:
    world = served()
    world.submit(submit(1, [1, 2, 3]))
    prefill, decode = world.nodes.values()
    assert [type(order) for order in decode.orders] == [DecodeRequest]
    assert not prefill.orders
    world.settle()
    world.check(1)
    assert world.ends[1].cached_len == 3
    assert world.core.counts.handovers == 1
    assert world.core.counts.retries == 0
    world.all_quiet()


@pytest.mark.parametrize("max_new", [0, 1])
def test_one_token_needs_no_decode_node(max_new: int) -> None:
    world = served()
    world.submit(submit(1, [1, 2, 3], max_new))
    prefill, decode = world.nodes.values()
    assert [type(order) for order in prefill.orders] == [PrefillRequest]
    assert not decode.orders
    world.settle()
    world.check(1)
    world.all_quiet()


def test_a_healed_prompt_is_answered_by_the_prefill_node_alone() -> None:
    world = served()
    params = SamplingParams(max_new_tokens=5)
    world.submit(Submit(1, i32([1, 2]), params, healed=(b"a",)))
    world.settle()
    assert not world.nodes[2].orders
    world.check(1)


@pytest.mark.parametrize("roles", [(), (PREFILL,), (DECODE,)])
def test_a_missing_role_is_told_at_once(roles: tuple[str, ...]) -> None:
    world = World()
    world.join(*roles)
    world.submit(submit(1, [1, 2, 3]))
    failure = world.ends[1].failure
    assert failure is not None
    assert (failure.status, failure.code) == (503, "no_nodes")
    for role in {PREFILL, DECODE} - {*roles}:
        assert role in failure.detail
    world.all_quiet()


def test_a_draining_node_gets_nothing_new_and_ends_what_it_has() -> None:
    world = served(PREFILL, DECODE, DECODE)
    world.submit(submit(1, [1, 2, 3]))
    (busy,) = [n for n in world.nodes.values() if n.role == DECODE and n.orders]
    node = world.core.nodes.get(busy.peer)
    assert node is not None
    node.draining = True
    for rid in range(2, 6):
        world.submit(submit(rid, [rid, 2, 3]))
    assert len(busy.orders) == 1
    world.settle()
    for rid in world.submitted:
        world.check(rid)
    assert world.core.counts.retries == 0


# -- what goes wrong ----------------------------------------------------------------------------------


def played(world: World, until: Any) -> None:
    """Let everybody act until something is so."""
    rng = random.Random(1)
    while not until():
        rng.choice(world.ready())(rng)


def test_a_lost_decode_node_is_replaced_and_the_tokens_so_far_are_kept() -> None:
    world = served(PREFILL, DECODE, DECODE)
    world.submit(submit(1, [1, 2, 3], 20))
    played(world, lambda: len(world.given.get(1, [])) == 4)
    attempt = world.core.requests[1].attempt
    assert attempt is not None
    assert attempt.decode is not None
    world.kill(attempt.decode.peer)
    again = [o for n in world.nodes.values() for o in n.orders if isinstance(o, DecodeRequest)]
    assert [list(order.outputs) for order in again] == [world.given[1]]
    world.settle()
    world.check(1)
    assert world.attempts[1] == 2
    world.all_quiet()


@pytest.mark.parametrize("phase", [AttemptPhase.RESERVE, AttemptPhase.PREFILL, AttemptPhase.HANDED])
def test_a_decode_node_lost_before_it_has_given_a_token_is_replaced(phase: AttemptPhase) -> None:
    world = served(PREFILL, DECODE, DECODE)
    world.submit(submit(1, [1, 2, 3], 20))
    request = world.core.requests[1]
    played(world, lambda: request.attempt is not None and request.attempt.phase is phase)
    assert request.attempt is not None
    assert request.attempt.decode is not None
    assert len(world.given.get(1, [])) == (phase is AttemptPhase.HANDED)  # of the prefill node
    world.kill(request.attempt.decode.peer)
    world.settle()
    world.check(1)
    assert world.attempts[1] == 2
    world.all_quiet()


@pytest.mark.parametrize("role", [PREFILL, DECODE])
def test_what_a_node_that_stops_has_not_ended_in_time_goes_on_elsewhere(role: str) -> None:
    """It says so of each request, behind --drain_timeout, and then it goes."""
    world = served(PREFILL, PREFILL, DECODE, DECODE)
    world.submit(submit(1, [1, 2, 3], 20))
    request = world.core.requests[1]
    played(world, lambda: len(request.sent) == (4 if role == DECODE else 0) and world.ready())
    if role == PREFILL:
        played(world, lambda: any(n.parts for n in world.nodes.values() if n.role == PREFILL))
    busy = next(n for n in world.nodes.values() if n.role == role and n.parts)
    seen = world.core.nodes.get(busy.peer)
    assert seen is not None
    seen.draining = True
    (part,) = busy.parts.values()
    busy.says.clear()
    busy.end(part, FinishReason.ERROR, Failure("the node is shutting down", SHUTTING_DOWN, 503))
    world.hear(busy.peer)
    world.kill(busy.peer)
    world.settle()
    world.check(1)
    assert world.attempts[1] == 2
    world.all_quiet()


def test_a_lost_prefill_node_matters_until_the_decode_node_has_all() -> None:
    world = served(PREFILL, PREFILL, DECODE)
    world.submit(submit(1, [1, 2, 3], 20))
    played(world, lambda: len(world.given.get(1, [])) == 3)
    attempt = world.core.requests[1].attempt
    assert attempt is not None
    world.kill(attempt.prefill.peer)
    assert world.core.requests[1].attempt is attempt
    world.submit(submit(2, [1, 2, 4], 20))
    played(world, lambda: len(world.given.get(2, [])) == 1)
    second = world.core.requests[2].attempt
    assert second is not None
    world.join(PREFILL)
    world.kill(second.prefill.peer)
    world.settle()
    world.check(1), world.check(2)
    assert (world.attempts[1], world.attempts[2]) == (1, 2)
    world.all_quiet()


def test_without_another_node_it_fails_by_name_in_time() -> None:
    world = served()
    world.submit(submit(1, [1, 2, 3], 20))
    played(world, lambda: len(world.given.get(1, [])) == 3)
    world.kill(2)
    assert 1 not in world.ends  # one may come
    for _ in range(int(RETRY_S / 0.25) + 1):
        world.tick()
    failure = world.ends[1].failure
    assert failure is not None
    assert failure.code == "nodes_failed"
    assert "decode node n2 is lost: killed" in failure.detail
    assert "there is no decode node" in failure.detail
    world.settle()
    world.all_quiet()


def test_a_node_that_comes_back_takes_what_waits_for_one() -> None:
    world = served()
    world.submit(submit(1, [1, 2, 3], 20))
    played(world, lambda: len(world.given.get(1, [])) == 3)
    world.kill(2)
    world.tick(RETRY_S - 1)
    world.join(DECODE)
    world.settle()
    world.check(1)
    world.all_quiet()


def test_a_request_that_fails_wherever_it_goes_is_given_up() -> None:
    world = served(PREFILL, DECODE, DECODE)
    world.submit(submit(1, [1, 2, 3], 20))
    while 1 not in world.ends:
        for node in [n for n in world.nodes.values() if n.role == DECODE]:
            while node.orders:
                node.order()
            for part in [*node.parts.values()]:
                node.end(part, FinishReason.ERROR, LOST)
            while node.says:
                world.hear(node.peer)
    failure = world.ends[1].failure
    assert failure is not None
    assert failure.status == 503
    assert world.attempts[1] == MOST_RETRIES + 1
    assert "no progress" in failure.detail
    assert "4 attempts" in failure.detail


def test_an_error_that_would_come_anywhere_is_the_clients() -> None:
    world = served()
    world.submit(submit(1, [1, 2, 3], 20))
    decode = world.nodes[2]
    decode.order()
    decode.end(
        next(iter(decode.parts.values())), FinishReason.ERROR, Failure("too long for its K/V")
    )
    world.hear(2)
    assert world.ends[1].failure == Failure("too long for its K/V")
    world.settle()
    world.all_quiet()


def test_a_pair_that_failed_is_avoided_for_a_while() -> None:
    world = served(PREFILL, DECODE, DECODE, strategy="round_robin")
    world.submit(submit(1, [1, 2, 3], 20))
    first = next(n for n in world.nodes.values() if n.role == DECODE and n.orders)
    first.order()
    first.end(next(iter(first.parts.values())), FinishReason.ERROR, LOST)
    world.hear(first.peer)
    for rid in range(2, 6):
        world.submit(submit(rid, [rid]))
    assert not [order for order in first.orders if isinstance(order, DecodeRequest)]
    world.core.now += 11
    for rid in range(6, 10):
        world.submit(submit(rid, [rid]))
    assert [order for order in first.orders if isinstance(order, DecodeRequest)]


def test_the_end_that_a_dead_node_could_not_tell_is_not_generated_twice() -> None:
    """Its last token came, and with it that it is the last; the node's Finished did not."""
    world = served(PREFILL, DECODE, DECODE)
    msg = submit(1, [1, 2, 3], 20)
    world.submit(msg)
    played(world, lambda: len(world.given.get(1, [])) == 2)
    attempt = world.core.requests[1].attempt
    assert attempt is not None
    assert attempt.decode is not None
    world.core.tokens(attempt.decode.peer, tokens(attempt.ticket, EOS, ends=True))
    world.kill(attempt.decode.peer)
    assert world.ends[1].reason is FinishReason.STOP
    world.settle()
    world.all_quiet()


def test_nobody_speaks_for_another_ones_attempt() -> None:
    world = served(PREFILL, PREFILL, DECODE, DECODE)
    world.submit(submit(1, [1, 2, 3], 20))
    played(world, lambda: len(world.given.get(1, [])) == 2)
    attempt = world.core.requests[1].attempt
    assert attempt is not None
    there = {node.peer for node in attempt.matters}
    for stranger in {1, 2, 3, 4} - there:
        world.core.tokens(stranger, tokens(attempt.ticket, 5))
        world.core.finished(stranger, Finished(attempt.ticket, FinishReason.LENGTH))
    world.carry()
    assert 1 not in world.ends
    world.settle()
    world.check(1)


# -- clients ------------------------------------------------------------------------------------------


def test_a_stop_string_in_the_first_token_waits_for_what_the_prefix_cache_had() -> None:
    world = served()
    world.submit(submit(1, [1, 2, 3], 20))
    prefill, decode = world.nodes[1], world.nodes[2]
    rng = random.Random(0)
    decode.order()
    decode.act(rng)
    world.hear(2)
    prefill.order()
    prefill.act(rng)
    world.hear(1)  # the token; the end is still on its way
    world.core.stop(1, 1)
    world.carry()
    assert 1 not in world.ends
    world.settle()
    assert (world.ends[1].reason, world.ends[1].cached_len) == (FinishReason.STOP, 3)
    world.all_quiet()


@pytest.mark.parametrize("dies", [False, True])
def test_a_stop_string_waits_for_the_decode_nodes_drafts(dies: bool) -> None:
    """They are in the answer's usage; a node that is lost cannot tell them."""
    world = served()
    world.submit(submit(1, [1, 2, 3], 20))
    rng = random.Random(0)
    while len(world.given.get(1, ())) < 3:
        rng.choice(world.ready())(rng)
    world.core.stop(1, 2)
    world.carry()
    assert 1 not in world.ends
    if dies:
        world.kill(2)
    world.settle()
    end = world.ends[1]
    drafts = (0, 0) if dies else (5, 4)
    assert (end.reason, end.drafted, end.accepted) == (FinishReason.STOP, *drafts)
    world.all_quiet()


@pytest.mark.parametrize("acts", range(0, 24, 3))
def test_a_client_that_leaves_frees_both_nodes(acts: int) -> None:
    world = served()
    world.submit(submit(1, [1, 2, 4], 20))
    rng = random.Random(2)
    for _ in range(acts):
        if ready := world.ready():
            rng.choice(ready)(rng)
    world.core.abort(1)
    world.carry()
    world.settle()
    world.all_quiet()


def test_choices_of_one_prompt_wait_until_it_is_in_both_caches() -> None:
    world = served(PREFILL, PREFILL, DECODE, DECODE)
    for rid in (1, 2, 3):
        world.submit(submit(rid, [5, 6, 7], 20, after=-1 if rid == 1 else 1))
    assert sum(world.attempts.values()) == 1
    attempt = world.core.requests[1].attempt
    assert attempt is not None
    assert attempt.decode is not None
    places = attempt.prefill, attempt.decode
    played(world, lambda: len(world.given.get(1, [])) == 2)
    for rid in (2, 3):
        other = world.core.requests[rid].attempt
        assert other is not None
        assert (other.prefill, other.decode) == places
    world.settle()
    for rid in (1, 2, 3):
        world.check(rid)
    world.all_quiet()


@pytest.mark.parametrize("ends", ["abort", "lost"])
def test_choices_begin_when_the_first_one_ends_early(ends: str) -> None:
    world = served()
    world.submit(submit(1, [5, 6, 7]))
    world.submit(submit(2, [5, 6, 7], after=1))
    if ends == "abort":
        world.core.abort(1)
    else:
        world.core.forget(0)
    world.carry()
    if ends == "abort":
        world.settle()
        world.check(2)
        world.all_quiet()
    else:  # both were of that process
        assert not world.core.requests
        assert not world.ends


def test_prompt_log_probabilities_are_passed_on_once() -> None:
    world = served(PREFILL, PREFILL, DECODE)
    world.submit(submit(1, [1, 2, 3, 4, 5], prompt_logprobs=0))
    world.nodes[3].order()
    world.nodes[3].act(random.Random(0))
    world.hear(3)
    scores = Logprobs(chosen=array("f", [-1, -2, -3, -4]))
    got: list[float] = []

    def score(first: int, last: int) -> None:
        attempt = world.core.requests[1].attempt
        assert attempt is not None
        part = ((attempt.ticket, scores.slice(first, last)),)
        world.core.tokens(attempt.prefill.peer, tokens(attempt.ticket, prompt=part))
        for _, msg in world.core.emitted:
            got.extend(x for _, some in msg.prompt for x in some.chosen)
        world.carry()

    score(0, 2)
    score(2, 3)
    attempt = world.core.requests[1].attempt
    assert attempt is not None
    world.kill(attempt.prefill.peer)
    decode = world.nodes[3]
    while decode.orders:
        decode.order()
    decode.act(random.Random(0))
    world.hear(3)
    score(0, 2)
    score(2, 4)
    assert got == [-1, -2, -3, -4]


def test_log_probabilities_of_others_stay_with_them() -> None:
    world = served()
    for rid in (1, 2 << FRONTEND_SHIFT):
        world.submit(submit(rid, [1, 2, rid % 5], 1))
    first, second = (r.attempt for r in world.core.requests.values())
    assert first is not None
    assert second is not None
    rids = array(INT64, [first.ticket, 99, second.ticket])
    logprobs = Logprobs(chosen=array("f", [-1, -2, -3]))
    world.core.tokens(1, Tokens(1, rids, array(INT32, [4, 5, 6]), bytes(3), logprobs, ()))
    told = [
        (endpoint, list(msg.tokens), list(msg.logprobs.chosen if msg.logprobs else ()))
        for endpoint, msg in world.core.emitted
    ]
    assert told == [(0, [4], [-1.0]), (2, [6], [-3.0])]


# -- which nodes --------------------------------------------------------------------------------------


def places(world: World, prompts: list[list[int]]) -> list[int]:
    """The prefill node of each."""
    chosen = []
    for prompt in prompts:
        rid = len(world.submitted) + 1
        world.submit(submit(rid, prompt))
        attempt = world.core.requests[rid].attempt
        assert attempt is not None
        chosen.append(attempt.prefill.peer)
        world.settle()
    return chosen


def test_known_beginnings_go_where_they_are_known() -> None:
    world = served(PREFILL, PREFILL, PREFILL, DECODE)
    stems = [[i] * 200 for i in range(3)]
    first = places(world, stems)
    assert len({*first}) == 3
    again = places(world, [[*stem, i] for i, stem in enumerate(stems * 3)])
    assert again == first * 3


def test_turns_are_taken() -> None:
    world = served(PREFILL, PREFILL, PREFILL, DECODE, strategy="round_robin")
    assert places(world, [[1] * 200] * 6) == [1, 2, 3] * 2


def test_more_free_room_is_likelier() -> None:
    world = served(PREFILL, PREFILL, DECODE, strategy="adaptive_load")
    full = world.core.nodes.get(1)
    assert full is not None
    full.used = 900
    chosen = Counter(places(world, [[1]] * 300))
    assert 0 < chosen[1] < chosen[2] / 4


def test_chance_knows_no_room() -> None:
    world = served(PREFILL, PREFILL, DECODE, strategy="random")
    full = world.core.nodes.get(1)
    assert full is not None
    full.used = 900
    chosen = Counter(places(world, [[1] * 200] * 300))
    assert min(chosen[1], chosen[2]) > 100


def test_a_crowd_with_one_beginning_is_divided() -> None:
    world = served(PREFILL, PREFILL, DECODE)
    for rid in range(1, 31):
        world.submit(submit(rid, [1] * 200 + [rid]))
    decode = world.nodes[3]
    while decode.orders:
        decode.order()
    chosen = Counter(
        r.attempt.prefill.peer for r in world.core.requests.values() if r.attempt is not None
    )
    assert min(chosen.values()) >= 8
    assert len(chosen) == 2


# -- random lives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_random_lives(seed: int) -> None:
    """Nodes die, come and drain, transfers fail, clients leave and stop: each request ends once,
    with the tokens of one server or a named failure, and nothing is left anywhere."""
    rng = random.Random(seed)
    world = served(
        *[PREFILL] * rng.randint(1, 3), *[DECODE] * rng.randint(1, 3),
        strategy=STRATEGIES[seed % len(STRATEGIES)], seed=seed,
    )  # fmt: skip
    calm = seed % 4 == 0
    for rid in range(1, 120):
        if rng.random() < 0.3:
            msg = submit((rid % 2 << FRONTEND_SHIFT) + rid, [rng.randrange(60)] * rng.randint(1, 40),
                         rng.choice([0, 1, 2, 6, 25]), after=rng.choice([-1, -1, rid - 1]))  # fmt: skip
            world.submit(msg)
        chance = rng.random()
        if chance < 0.1 and world.core.requests:
            world.core.abort(rng.choice([*world.core.requests]))
        elif chance < 0.15 and world.given:
            world.core.stop(rng.choice([*world.given]), 1)
        elif calm:
            pass
        elif chance < 0.22 and world.nodes:
            world.kill(rng.choice([*world.nodes]))
        elif chance < 0.30:
            world.join(rng.choice([PREFILL, DECODE]))
        elif chance < 0.33 and (node := world.core.nodes.get(rng.randint(1, world.last_peer))):
            node.draining = not node.draining
        elif chance < 0.45 and (alive := [n for n in world.nodes.values() if n.parts]):
            fake = rng.choice(alive)
            part = rng.choice([*fake.parts.values()])
            how = rng.choice([LOST, Failure("going", "shutting_down", 503), None, Failure("no")])
            fake.end(part, FinishReason.ABORT if how is None else FinishReason.ERROR, how)
        world.carry()
        for _ in range(rng.randint(0, 30)):
            if ready := world.ready():
                rng.choice(ready)(rng)
        world.tick(rng.choice([0.01, 0.25, 1.0]))
    for node in world.core.nodes:
        node.draining = False
    world.settle(seed)
    for _ in range(100):
        world.tick()
        world.settle(seed)
    world.all_quiet()
    for rid, end in world.ends.items():
        world.check(rid) if not (end.reason is FinishReason.STOP and end.num_tokens) else None
        given = world.given.get(rid, [])
        assert given == answer(world.submitted[rid])[0][: len(given)]
        assert world.attempts[rid] <= MOST_RETRIES + 1
        if end.failure is not None:
            assert end.failure.detail
        if calm:
            assert end.reason is not FinishReason.ERROR
