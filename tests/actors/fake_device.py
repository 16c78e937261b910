"""A device whose tokens depend on every token before them, and a process of actors run by hand.

What a slot holds is a hash over the whole sequence up to its token, so that a wrong slot, position,
prefix hit or order of steps is found by the device or changes the tokens.
"""

from __future__ import annotations

import json
import random
import threading
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import pytest

from asyncllm.actors.allocator import Allocator
from asyncllm.actors.scheduler import Scheduler
from asyncllm.codec import decode, encode, i32
from asyncllm.constrain.factory import ConstraintFactory
from asyncllm.constrain.protocol import Constraint, Path
from asyncllm.core.radix import RadixNode, RadixTree
from asyncllm.core.request import SamplingParams
from asyncllm.core.scheduling import SchedulerCore
from asyncllm.core.shared_prefixes import SharedPrefixIndex
from asyncllm.core.slots import Ledger
from asyncllm.core.speculation import Speculation, step_rows
from asyncllm.core.step_times import StepSize, StepTimes
from asyncllm.core.window_radix import _is_unread
from asyncllm.core.window_slots import WindowLedger
from asyncllm.core.windows import Window
from asyncllm.errors import RequestError
from asyncllm.messages import (
    ExportKv,
    Finished,
    ImportKv,
    KvComputed,
    StepDone,
    StepFinished,
    StepPlan,
    StopHit,
    Submit,
    Tokens,
)
from asyncllm.records import Logprobs

T = TypeVar("T")
PRIME = (1 << 61) - 1
START = 7


def chain(before: int, token: int) -> int:
    return (before * 1_000_003 + token + 11) % PRIME


def pick(
    state: int,
    params: SamplingParams,
    generated: int,
    vocab: int,
    eos: Iterable[int],
    allowed: Iterable[int] = (),
) -> int:
    """The token after a sequence; banned ones are stepped over as a sampler does."""
    token = chain(state, params.seed) % vocab
    banned = {*eos, *params.stop_token_ids} if generated < params.min_new_tokens else set()
    if allowed := set(allowed):
        # what is allowed wins over the ban, where they leave nothing
        banned = (banned if allowed - banned else set()) | (set(range(vocab)) - allowed)
    while token in banned:
        token = (token + 1) % vocab
    return token


def fake_grammar(prompt: Iterable[int]) -> tuple[str, str]:
    """For SamplingParams.grammar: what FakeConstraint allows depends on the whole sequence."""
    return "fake", json.dumps(list(prompt))


class FakeConstraint(Constraint):
    """What may come next is a function of every token before; some tokens are work for a thread."""

    def __init__(self, prompt: Iterable[int], vocab: int) -> None:
        self.state, self.vocab = START, vocab
        for token in prompt:
            self.state = chain(self.state, token)
        self.started = False
        self._path = Path()

    def slow(self, token: int | None) -> bool:
        return (self.state + (token or 0)) % 3 > 0 and self._path.tokens[:1] != [token]

    def start(self) -> None:
        assert not self.started
        self.started = True

    @staticmethod
    def allowed(state: int, vocab: int) -> set[int]:
        return {token for token in range(vocab) if (state + 7 * token) % 5 < 2}

    @classmethod
    def bits(cls, state: int, vocab: int) -> bytes:
        words = [0] * -(-vocab // 32)
        for token in cls.allowed(state, vocab):
            words[token // 32] |= 1 << token % 32
        return array("I", words).tobytes()

    def mask(self) -> bytes:
        assert self.started
        return self.bits(self.state, self.vocab)

    def mask_is_stable_for(self, ahead: int) -> bool:
        return ahead == 0

    def accept(self, token: int) -> bool:
        assert token in self.allowed(self.state, self.vocab), "a token that the mask did not allow"
        if self.state % 41 == 5:
            raise RequestError("nothing can follow")
        self.state = chain(self.state, token)
        right = self._path.tokens[:1] == [token]
        path = self._path if right else Path()
        predicted = max(path.num_predicted - 1, 0)
        self._path = Path(path.tokens[1:], path.chances[1:], path.masks[1:], predicted)
        return self.state % 13 == 0

    def look_ahead(self, guess: Path, most: int) -> None:
        """Follow what is guessed as far as it is allowed, then anything."""
        state, path, agrees = self.state, Path(), True
        while len(path.tokens) < most and state % 41 != 5:
            allowed = self.allowed(state, self.vocab)
            guessed = guess.tokens[len(path.tokens) : len(path.tokens) + 1]
            agrees = agrees and bool(guessed) and allowed.issuperset(guessed)
            token = guessed[0] if agrees else min(allowed)
            state = chain(state, token)
            if state % 13 == 0:
                break
            path.tokens.append(token)
            path.num_predicted += agrees and len(path.tokens) <= guess.num_predicted
            path.chances.append(0.8 ** len(path.tokens))
            path.masks.append(self.bits(state, self.vocab))
        self._path = path

    @property
    def path(self) -> Path:
        return self._path


def listed(params: SamplingParams, eos: Iterable[int]) -> set[int]:
    """What allowed_token_ids leaves; empty: everything."""
    if not params.allowed_token_ids:
        return set()
    return {*params.allowed_token_ids, *(() if params.ignore_eos else eos)}


def oracle(prompt: Iterable[int], params: SamplingParams, vocab: int, eos: set[int]) -> list[int]:
    """What a request yields when nobody interferes."""
    state, out = START, []
    for token in prompt:
        state = chain(state, token)
    constraint = FakeConstraint(prompt, vocab) if params.grammar else None
    if constraint:
        constraint.start()
    while len(out) < (params.max_new_tokens or 0):
        allowed = constraint.allowed(state, vocab) if constraint else listed(params, eos)
        token = pick(state, params, len(out), vocab, eos, allowed)
        try:
            whole = constraint.accept(token) if constraint else False
        except RequestError:
            break
        out.append(token)
        over = len(out) > params.min_new_tokens
        if whole or (
            over and ((token in eos and not params.ignore_eos) or token in params.stop_token_ids)
        ):
            break
        state = chain(state, token)
    return out


@dataclass
class FakePending:
    done: StepDone
    gate: tuple[threading.Event, threading.Event] | None = None
    gap_ms: float | None = None

    def wait(self) -> StepDone:
        if self.gate is not None:
            opened, entered = self.gate
            entered.set()
            opened.wait()
        return self.done


@dataclass
class LaneTable:
    prompt_len: int
    params: SamplingParams
    known: array[int]
    slots: list[int] = field(default_factory=list)
    sliding: list[int] = field(default_factory=list)
    last: int | None = None
    guessed: bool = False  # the last step's rows had guessed tokens: some of them may be wrong


class FakeDevice:
    """Checks each plan against what its slots hold; tokens are a hash of the sequence.

    With ``window``, layers that see as many tokens find theirs in the slots of a second space; all
    rows write there before any of them reads.

    ``gated``: step i is done once ``gates[i][0]`` is set; ``gates[i][1]`` tells that it is awaited.
    """

    def __init__(
        self,
        vocab: int = 50,
        eos: Iterable[int] = (),
        *,
        gated: bool = False,
        window: int | None = None,
    ) -> None:
        self.vocab, self.eos, self.gated, self.window = vocab, set(eos), gated, window
        self.store: dict[int, tuple[int, int, int]] = {}  # slot -> position, state before, after
        self.sliding_store: dict[int, tuple[int, int, int]] = {}
        self.lanes: dict[int, LaneTable] = {}
        self.plans: list[StepPlan] = []
        self.gates: list[tuple[threading.Event, threading.Event]] = []
        self.written: dict[int, int] = {}  # slot -> the step that has written it
        self.closed = False
        self.step_ms = 0.0  # what each step is said to have taken

    def close(self) -> None:
        self.closed = True

    def launch(self, plan: StepPlan) -> FakePending:
        self.plans.append(plan)
        opened = {row.lane: row for row in plan.opened}
        assert len(opened) == len(plan.opened)
        counts = plan.counts
        assert all((c == 1) == (i < plan.num_decode) for i, c in enumerate(counts))
        tries = Counter(plan.lanes)  # one row, or several of one token of which all but one guess
        assert all(tries[lane] == 1 or c == 1 for lane, c in zip(plan.lanes, counts, strict=True))
        slots, fed, sliding = deque(plan.slots), deque(plan.tokens), deque(plan.sliding)
        assert len(sliding) == (len(slots) if self.window else 0)
        words = -(-self.vocab // 32) * 4
        masks = {row: plan.masks[i * words : (i + 1) * words] for i, row in enumerate(plan.masked)}
        tokens, prompt, logprobs, asks = [], [], [], False
        columns = zip(
            plan.lanes, plan.starts, counts, plan.cached_counts, plan.samples, strict=True
        )
        for row, (lane, start, count, head, samples) in enumerate(columns):
            if lane in opened:
                new = opened[lane]
                self.lanes[lane] = LaneTable(new.prompt_len, new.params, new.known)
            table = self.lanes[lane]
            if table.guessed:
                del table.slots[start:], table.sliding[start:]
            table.guessed = tries[lane] > 1
            assert len(table.slots) == start - head, f"lane {lane}: gap before {start - head}"
            assert not head or lane in opened
            table.slots += [slots.popleft() for _ in range(head + count)]
            if self.window:
                table.sliding += [sliding.popleft() for _ in range(head + count)]
            assert len(set(table.slots)) == len(table.slots)
            state = self._read(table, start)
            state = self._write(table, start, [fed.popleft() for _ in range(count)], state)
            token = -1
            restricted = table.params.grammar or table.params.allowed_token_ids
            assert (row in masks) == bool(samples and restricted)
            if samples:
                at = start + count - table.prompt_len
                allowed = bits(masks[row]) if row in masks else set()
                # the mask is that of the very tokens before
                assert allowed == (
                    FakeConstraint.allowed(state, self.vocab)
                    if table.params.grammar
                    else listed(table.params, self.eos)
                )
                token = pick(state, table.params, at, self.vocab, self.eos, allowed)
                table.last = None if table.guessed else token  # the last of the rows has written it
            tokens.append(token)
            asks |= table.params.logprobs >= 0
            logprobs.append(-float(token))
            scored = min(start + count, table.prompt_len - 1) - start
            if table.params.prompt_logprobs >= 0 and scored > 0:
                values = array("f", [-(start + 1.0 + i) for i in range(scored)])
                tops = i32(range(start + 1, start + 1 + scored))
                prompt.append((row, Logprobs(1, values, tops, values)))
        assert not slots
        assert not fed
        self._check_shared_prefixes(plan)
        if self.window:
            for lane, start in zip(plan.lanes, plan.starts, strict=True):
                self._read_window(self.lanes[lane], start, self.window)
        ids, column = i32(tokens), array("f", logprobs)
        columns = Logprobs(1, column, ids, column) if asks else None
        gate = (threading.Event(), threading.Event()) if self.gated else None
        if gate is not None:
            self.gates.append(gate)
        return FakePending(StepDone(plan.step, ids, columns, tuple(prompt), self.step_ms), gate)

    def _check_shared_prefixes(self, plan: StepPlan) -> None:
        """Rows have in common what the plan says, written by earlier steps."""
        starts = dict(zip(plan.lanes, plan.starts, strict=True))
        assert len(set(plan.prefix_order)) == len(plan.prefix_order)
        before, common = None, 0
        for lane, with_last in zip(plan.prefix_order, plan.shared_lens, strict=True):
            common = min(common, with_last)
            if lane in starts:
                if before is not None and common:
                    assert common <= min(starts[lane], starts[before])
                    left, right = (self.lanes[some].slots[:common] for some in (before, lane))
                    assert left == right
                before, common = lane, 1 << 30

    def _read(self, table: LaneTable, end: int) -> int:
        """The state at ``end``, after checking that the slots hold one unbroken sequence."""
        state = START
        for position, slot in enumerate(table.slots[:end]):
            at, before, after = self.store[slot]
            assert (at, before) == (position, state), f"slot {slot} is somebody else's"
            state = after
        return state

    def _read_window(self, table: LaneTable, start: int, window: int) -> None:
        """What the row's tokens see is its own, whoever wrote in this step."""
        for position in range(max(start + 1 - window, 0), len(table.slots)):
            wanted = self.store[table.slots[position]]
            got = self.sliding_store.get(table.sliding[position])
            assert got == wanted, f"sliding slot of {position} is somebody else's: row at {start}"

    def _write(self, table: LaneTable, start: int, fed: list[int], state: int) -> int:
        for position, token in enumerate(fed, start):
            if token < 0:
                assert table.last is not None, "no token has been sampled in this lane"
                token = table.last
            elif position < len(table.known):
                assert table.known[position] == token
            p = table.params
            penalized = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
            needs = penalized != (1.0, 0.0, 0.0) or p.prompt_logprobs >= 0
            assert bool(table.known) == needs
            after = chain(state, token)
            self.store[table.slots[position]] = (position, state, after)
            self.written[table.slots[position]] = self.plans[-1].step
            if self.window:
                self.sliding_store[table.sliding[position]] = (position, state, after)
            state = after
        return state


def bits(mask: bytes) -> set[int]:
    """Numbers of the bits that are set."""
    words = array("I", mask)
    return {32 * i + bit for i, word in enumerate(words) for bit in range(32) if word >> bit & 1}


def check_ledger(ledger: Ledger) -> None:
    """Each slot is in exactly one place, locks are the holders', and the counters are right."""
    holders: Counter[int] = Counter()
    private: list[int] = []
    for held in ledger.lanes.values():
        private += held.duplicates
        private += held.slots[held.shared :]
        node, depth = held.node, 0
        while node is not None and node.parent is not None:
            holders[id(node)] += 1
            depth += len(node.key)
            node = node.parent
        assert depth == held.shared
    nodes: list[RadixNode] = []
    stack = [ledger.tree.root]
    while stack:
        for first, child in (node := stack.pop()).children.items():
            assert child.parent is node
            assert child.key[0] == first
            assert len(child.key) == len(child.slots)
            assert child.locks == holders[id(child)]
            nodes.append(child)
            stack.append(child)
    tree = [slot for node in nodes for slot in node.slots]
    locked = sum(len(node.key) for node in nodes if node.locks)
    everything = [*ledger.pool.free, *tree, *private]
    assert sorted(everything) == list(range(ledger.total))
    assert (ledger.tree.size, ledger.tree.locked) == (len(tree), locked)
    assert ledger.used == locked + len(private)
    assert ledger.used + ledger.cached + ledger.free == ledger.total
    if ledger._shared_prefixes is not None:
        check_prefix_order(ledger, ledger._shared_prefixes)


def check_prefix_order(ledger: Ledger, index: SharedPrefixIndex) -> None:
    """Any two lanes have in common what their slots say, and nobody else is named."""
    order, shared_lens = list(index.order), list(index.shared_lens)
    assert sorted(order) == sorted(lane for lane, held in ledger.lanes.items() if held.node)
    for i, lane in enumerate(order):
        common = 1 << 30
        for j in range(i - 1, -1, -1):
            common = min(common, shared_lens[j + 1])
            left, right = ledger.lanes[lane].slots, ledger.lanes[order[j]].slots
            assert left[:common] == right[:common], (lane, order[j], order)
            end = max(common + 1, index.least)
            assert left[:end] != right[:end] or min(len(left), len(right)) < end


def check_windows(ledger: WindowLedger) -> None:
    """The same of the sliding space, and each lane holds what its next token sees."""
    tree, reach = ledger._tree, ledger._window.reach
    readers: Counter[int] = Counter()
    private: list[int] = []
    assert ledger.views.keys() == ledger.lanes.keys()
    for lane, view in ledger.views.items():
        held = ledger.lanes[lane]
        assert view.first + len(view.slots) == len(held.slots)
        assert view.first <= max(len(held.slots) - reach, 0)
        mine = {i for span in view.own for i in range(*span)}
        mine |= set(range(max(view.first, held.shared), len(held.slots)))
        private += [view.slots[i - view.first] for i in sorted(mine)]
        node, end = held.node, held.shared
        while node is not None and end > view.kept:
            readers[id(node)] += 1
            sliding = dict(zip(range(end - len(node.sliding), end), node.sliding, strict=True))
            end -= len(node.key)
            for i in range(max(view.first, end), end + len(node.key)):
                assert i in mine or view.slots[i - view.first] == sliding[i]
            node = node.parent
        assert end <= max(view.first, view.kept) or not held.shared
        assert held.node is None or end == view.kept
    inside: list[int] = []
    read = 0
    stack = [tree.root]
    while stack:
        for child in (node := stack.pop()).children.values():
            assert child.readers == readers[id(child)]
            assert child.readers <= child.locks
            inside += child.sliding
            read += len(child.sliding) if child.readers else 0
            assert len(child.sliding) <= len(child.key)
            stack.append(child)
    everything = [*ledger.sliding.free, *inside, *private]
    assert sorted(everything) == list(range(ledger.sliding.total))
    assert (tree.live, tree.read, list(tree.spilled)) == (len(inside), read, [])
    assert ledger.sliding_used == read + len(private)
    used, cached = ledger.sliding_used, ledger.sliding_cached
    assert used + cached + len(ledger.sliding) == ledger.sliding.total
    candidates = {id(entry[-1]) for entry in tree._unread if _is_unread(entry)}
    assert sum(len(n.sliding) for n in _nodes(tree) if id(n) in candidates) == tree.live - read


def _nodes(tree: RadixTree) -> list[RadixNode]:
    nodes, stack = [], [tree.root]
    while stack:
        more = list(stack.pop().children.values())
        nodes += more
        stack += more
    return nodes


@dataclass
class Mailbox:
    """Stands for a Ref and the mailbox behind it."""

    encode_local: bool
    queue: list[Any] = field(default_factory=list)

    def tell(self, msg: Any) -> None:
        bounded_by_admission = Finished | ImportKv | ExportKv | KvComputed
        assert msg.urgent or not isinstance(msg, bounded_by_admission), "may be refused"
        msg = decode(encode(msg)) if self.encode_local else msg
        self.queue.append(msg)

    def take(self) -> list[Any]:
        batch, self.queue = self.queue, []
        return batch

    def __bool__(self) -> bool:
        return bool(self.queue)


class Timers:
    """Of an event loop whose clock stands still: the test says when they go off."""

    def __init__(self) -> None:
        self.set: list[tuple[float, Callable[[], Any]]] = []

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> None:
        self.set.append((delay, partial(callback, *args)))

    async def run_in_executor(self, pool: object, call: Callable[..., T], *args: Any) -> T:
        return call(*args)


class Eager(Speculation):
    """Steps with drafts seem to take no longer than others, whatever the clock says."""

    def __init__(self, most: int, most_rows: int) -> None:
        super().__init__(most, most_rows, StepTimes([(StepSize(1, 1, 1, decodes=True), 1.0)]))
        self.times.gap_s = 0.0

    def over(self, *, drafts: bool) -> None:
        pass


class World:
    """Scheduler, allocator and a fake device; the test says who handles its mail when."""

    endpoint = 0

    def __init__(
        self,
        *,
        num_slots: int = 64,
        num_lanes: int = 6,
        batch_max_tokens: int = 32,
        chunked_prefill_size: int = 8,
        eos_ids: Iterable[int] = (),
        depth: int = 2,
        headroom: int = 8,
        use_tree: bool = True,
        encode_local: bool = False,
        vocab: int = 50,
        share_prompts: bool = False,
        window: int | None = None,
        num_sliding: int = 0,
        in_step: bool = False,
        reader: str = "detokenizer",
        num_ranks: int = 0,
        drafts: int = 0,
    ) -> None:
        self._encode_local = encode_local
        self.boxes: dict[tuple[str, int], Mailbox] = {}
        self.device = FakeDevice(vocab, eos_ids, window=window)
        slides: Any = {}
        if window is not None:
            slides = {"window": Window(window), "num_sliding": num_sliding}
        self.pending: deque[FakePending] = deque()
        self.allocator = Allocator(num_slots, use_tree=use_tree, shared_prefixes=True, **slides)
        assert self.ledger._shared_prefixes is not None
        self.ledger._shared_prefixes.least = 1
        core = SchedulerCore(
            num_lanes=num_lanes,
            num_slots=num_slots,
            batch_max_tokens=batch_max_tokens,
            chunked_prefill_size=chunked_prefill_size,
            eos_ids=set(eos_ids),
            headroom=headroom,
            share_prompts=share_prompts,
            **slides,
            num_ranks=num_ranks,
            speculation=Eager(drafts, step_rows(num_lanes, drafts)) if drafts else None,
        )
        self.scheduler = Scheduler(
            core,
            runners=[0],
            depth=depth,
            in_step=in_step,
            reader=reader,
            transfers=range(num_ranks),
            constrain=ConstraintFactory(
                vocab, set(eos_ids), lambda kind, text: FakeConstraint(json.loads(text), vocab)
            ).of,
        )
        for actor in (self.allocator, self.scheduler):
            actor.system = self  # type: ignore[assignment]
            actor.started()
        self.loop = Timers()
        self.threads: deque[Coroutine[Any, Any, Any]] = deque()  # at work
        self.reserves = 0
        self.submitted: dict[int, Submit] = {}
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.parts: dict[int, list[float]] = defaultdict(list)
        self.finished: dict[int, Finished] = {}
        self.stop_after: dict[int, int] = {}
        self.others: list[Any] = []  # what the watchdog got
        self.actors: dict[str, Callable[[int, list[Any]], None]] = {}  # further ones
        self.num_ranks = num_ranks
        self.rejected: list[Any] = []

    @property
    def core(self) -> Any:
        return self.scheduler.core

    @property
    def ledger(self) -> Ledger:
        return self.allocator.ledger

    def ref(self, name: str, endpoint: int | None = None) -> Mailbox:
        return self.boxes.setdefault((name, endpoint or 0), Mailbox(self._encode_local))

    at_intake = at_coordinator = ref  # there is but one endpoint

    def reject(self, msg: Any, why: str) -> None:
        self.rejected.append(msg)

    def submit(
        self,
        rid: int,
        prompt: list[int],
        after: int = -1,
        client: int = 0,
        *,
        outputs: Iterable[int] = (),
        prediction: Iterable[int] = (),
        **params: Any,
    ) -> None:
        """Mail a request; keywords are SamplingParams'."""
        msg = Submit(
            rid=rid,
            prompt=i32(prompt),
            params=SamplingParams(**params),
            after=after,
            client=client,
            outputs=i32(outputs),
            prediction=i32(prediction),
        )
        self.submitted[rid] = msg
        self.tokens[rid] = list(msg.outputs)
        self.ref("scheduler").tell(msg)

    def tell(self, msg: Any) -> None:
        self.ref("scheduler").tell(msg)

    def spawn(self, actor: Any, work: Coroutine[Any, Any, Any]) -> None:
        self.threads.append(work)

    def ready(self) -> list[tuple[str, int]]:
        """Who has mail; ("thread", 0), ("device", 0): it has something to do."""
        return [
            *(key for key, box in self.boxes.items() if box),
            *[("thread", 0)][: len(self.threads)],
            *[("device", 0)][: len(self.pending)],
        ]

    def turn(self, key: tuple[str, int]) -> None:
        """Let one of the ready ones do its work."""
        if key[0] == "device":
            done = self.pending.popleft().wait()
            for rank in range(self.num_ranks):
                self.ref("kv_transfer", rank).tell(StepFinished(done.step))
            self.tell(done)
            return
        if key[0] == "thread":
            with pytest.raises(StopIteration) as ended:
                self.threads.popleft().send(None)
            self.tell(ended.value.value)
            return
        batch = self.boxes[key].take()
        if key[0] == "scheduler":
            self.scheduler.receive(batch)
        elif key[0] == "allocator":
            self.reserves += sum(type(msg).__name__ == "ReserveSlots" for msg in batch)
            self.allocator.receive(batch)
        elif key[0] == "runner":
            self.pending.extend(self.device.launch(plan) for plan in batch)
        elif key[0] == "detokenizer":
            for msg in batch:
                self._detokenize(key[1], msg)
        elif key[0] in self.actors:
            self.actors[key[0]](key[1], batch)
        else:
            self.others += batch
        self.check()

    def run(self, rng: random.Random | None = None, *, turns: int = 100_000) -> None:
        """Until nobody has anything to do; FIFO-like order or a random one."""
        for _ in range(turns):
            if not (ready := self.ready()):
                assert not self.core.requests, "a request hangs: nobody has anything to do"
                return
            self.turn(rng.choice(ready) if rng else ready[0])
        raise AssertionError(f"still busy after {turns} turns")

    def settle(self, *names: str) -> None:
        """Let these handle their mail until none of them has any."""
        while ready := [key for key in self.ready() if key[0] in names]:
            self.turn(ready[0])

    def check(self) -> None:
        check_ledger(self.ledger)
        if isinstance(self.ledger, WindowLedger):
            check_windows(self.ledger)

    def check_end(self) -> None:
        """Everything has ended, exactly once, with exactly its tokens; nothing is held."""
        assert set(self.finished) == set(self.submitted)
        assert self.ledger.used == 0
        assert not isinstance(self.ledger, WindowLedger) or self.ledger.sliding_used == 0
        assert not self.ledger.lanes
        assert sorted(self.core._free_lanes) == list(range(self.core.num_lanes))
        for rid, end in self.finished.items():
            submit = self.submitted[rid]
            params, prompt = submit.params, submit.prompt
            want = oracle(prompt, params, self.device.vocab, self.device.eos)
            got = self.tokens[rid]
            assert 0 <= end.cached_len < max(submit.length, 1)
            assert end.cached_len <= len(prompt)
            if params.grammar and end.failure and end.failure.detail == "nothing can follow":
                assert got == want
            elif end.reason >= 2 or rid in self.stop_after:
                assert got == want[: len(got)]
            elif params.grammar:
                assert got == want
                assert end.reason == 0 or len(want) == params.max_new_tokens
            else:
                assert got == want
                assert (end.reason == 1) == (
                    not want
                    or not (
                        len(want) > params.min_new_tokens
                        and (
                            (want[-1] in self.device.eos and not params.ignore_eos)
                            or want[-1] in params.stop_token_ids
                        )
                    )
                )
            if end.reason != 3:
                assert len(submit.outputs) <= end.num_tokens <= len(got)
            if submit.outputs:
                assert not self.parts[rid], "they came with the first of the outputs"
            elif params.prompt_logprobs >= 0:
                scores = [-float(i) for i in range(1, len(prompt))]
                assert self.parts[rid] == scores[: len(self.parts[rid])]
                assert end.reason >= 2 or len(self.parts[rid]) == len(scores)

    def _detokenize(self, endpoint: int, msg: Tokens | Finished) -> None:
        if isinstance(msg, Finished):
            assert msg.rid >> 40 == endpoint
            assert msg.rid not in self.finished, "ended twice"
            self.finished[msg.rid] = msg
            return
        rids, tokens = msg.rids, msg.tokens
        if msg.logprobs is not None:
            scores = array("f", [-float(t) for t in tokens])
            assert msg.logprobs == Logprobs(1, scores, tokens, scores)
        for rid, token, ends in zip(rids, tokens, msg.ends, strict=True):
            assert rid >> 40 == endpoint
            assert rid not in self.finished, "a token after the end"
            self.tokens[rid].append(token)
            params = self.submitted[rid].params
            eos = not params.ignore_eos and token in self.device.eos
            late = len(self.tokens[rid]) > params.min_new_tokens
            if not params.grammar:
                assert bool(ends) == (late and (eos or token in params.stop_token_ids))
            if len(self.tokens[rid]) == self.stop_after.get(rid):
                self.tell(StopHit(rid, self.stop_after[rid]))
        for rid, logprobs in msg.prompt:
            scores, first = logprobs.chosen, len(self.parts[rid]) + 1
            ids = i32(range(first, first + len(scores)))
            assert logprobs == Logprobs(1, scores, ids, scores)
            self.parts[rid] += scores
