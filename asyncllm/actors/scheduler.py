"""Scheduler: keeps the device's pipeline full and publishes its results.

Owns the queue, the step clock and steps in flight; knows neither slots' contents nor text.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf
from time import perf_counter
from typing import assert_never

from asyncllm.actors.base import Actor, Ref
from asyncllm.codec import INT32, INT64
from asyncllm.constrain.protocol import Constraint
from asyncllm.core.mask_work import Job, work
from asyncllm.core.pacing import Pacer
from asyncllm.core.request import SamplingParams
from asyncllm.core.scheduling import SchedulerCore
from asyncllm.core.step_times import StepTimes
from asyncllm.core.steps import Emitted, Step
from asyncllm.errors import RequestError
from asyncllm.messages import (
    FRONTEND_SHIFT,
    MAX_COUNT,
    Abort,
    BeginDecode,
    ConstraintsAdvanced,
    Drain,
    Drained,
    EndpointGone,
    GroupProgress,
    ImportPlaced,
    JoinStep,
    KvArrived,
    KvSent,
    LaunchDue,
    OfferStep,
    Probe,
    ReleaseSlots,
    SchedulerStats,
    SlotsGranted,
    StepAgreed,
    StepDone,
    StopHit,
    Submit,
    Tokens,
    TransferFailed,
)
from asyncllm.records import Failure, Logprobs

MOST_JOBS = 16  # of constraints, per call of a thread
MASKS_S = 0.005  # a step waits for cheap masks, counted from the end of the previous step:
# otherwise rows with masks would run a step later, alternating with each other

Inbox = (
    Submit
    | Abort
    | SlotsGranted
    | StepDone
    | StopHit
    | BeginDecode
    | KvArrived
    | TransferFailed
    | KvSent
    | LaunchDue
    | JoinStep
    | StepAgreed
    | Drain
    | EndpointGone
    | Probe
    | ConstraintsAdvanced
)
PromptScores = tuple[int, Logprobs]  # rid, log-probabilities of some of its prompt tokens


class Scheduler(Actor[Inbox]):
    """One per tp group, on its first rank, beside the allocator.

    Args:
        core: decides what runs.
        runners: endpoints of the group's runners.
        pacer: None: it knows nothing of steps yet.
        depth: steps in flight on the device.
        constrain: see ``ConstraintFactory.of``; None: constraints are off.
        workers: threads for the work of constraints.
        vocab_size, max_len: limits that requests from other processes are checked against, as their
            own process has already done.
        balanced: report to a balancer when requests begin and end.
        reader: the actor, on the endpoint of a request's rid, that receives its tokens and its end.
        transfers: endpoints whose ``kv_transfer`` transfer K/V of this group, by rank; (): none.
        in_step: the groups run each step together, see ``core.lockstep``.
    """

    remote = frozenset({Submit, Abort, StopHit, BeginDecode, KvArrived, TransferFailed, KvSent})
    orders = frozenset({StepAgreed, Drain, EndpointGone, JoinStep, Probe})

    def __init__(
        self,
        core: SchedulerCore,
        *,
        runners: Sequence[int],
        depth: int = 2,
        pacer: Pacer | None = None,
        workers: int = 1,
        vocab_size: int = MAX_COUNT,
        max_len: int = MAX_COUNT,
        balanced: bool = False,
        reader: str = "detokenizer",
        transfers: Sequence[int] = (),
        in_step: bool = False,
        constrain: Callable[[SamplingParams, str, tuple[bytes, ...]], Constraint | None] = (
            lambda *_: None
        ),
    ) -> None:
        super().__init__("scheduler")
        self.core = core
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="masks")
        self._workers = self._free = workers
        self._ranks, self._depth, self._constrain = runners, depth, constrain
        self._vocab_size, self._max_len = vocab_size, max_len
        self._balanced, self._in_step, self._moving_ranks = balanced, in_step, transfers
        self._reader = reader
        self._offered: Step | None = None  # planned, but not yet agreed by all groups
        self._joins = 0  # the last step that another group needs
        self._inflight: deque[Step] = deque()
        self._pacer = pacer or Pacer(StepTimes())
        self._masks_until, self._due_at = 0.0, inf  # deadline for masks; time of the next LaunchDue
        self._asked = False  # a reservation is open
        # nothing fits until a launched step is done or a request arrives or leaves
        self._stalled = self._draining = self._drained = False
        self._unpublished: list[tuple[Emitted, list[PromptScores]]] = []
        self._readers: dict[int, Ref] = {}
        self._gone: set[int] = set()  # endpoints whose processes have ended

    def started(self) -> None:
        self._allocator = self.system.ref("allocator")
        self._watchdog = self.system.at_coordinator("watchdog")
        self._balancer = self.system.at_coordinator("balancer")
        self._lockstep = self.system.at_coordinator("lockstep")
        self._runners = [self.system.ref("runner", rank) for rank in self._ranks]
        self._transfers = [self.system.ref("kv_transfer", rank) for rank in self._moving_ranks]

    def receive(self, batch: list[Inbox]) -> None:
        for msg in batch:
            match msg:
                case Submit():
                    self._submit(msg)
                case Abort(rid):
                    self._stalled = False
                    self.core.abort(rid)
                case StopHit(rid, num_tokens):
                    self._stalled = False
                    self.core.stop(rid, num_tokens)
                case BeginDecode() | KvArrived() | TransferFailed() | KvSent():
                    self._moved(msg)
                case SlotsGranted():
                    self._launch(msg)
                case StepDone():
                    self._commit(msg)
                case ConstraintsAdvanced():
                    self._worked(msg)
                case LaunchDue():
                    self._due_at = inf
                case JoinStep(step):
                    self._joins = step if step == self.core.steps + 1 else 0
                case StepAgreed():
                    self._agreed(msg)
                case Drain(timeout_s):
                    self._drain(timeout_s)
                case EndpointGone(endpoint):
                    self._forget(endpoint)
                case Probe(query):
                    self._watchdog.tell(self._stats(query))
                case _:
                    assert_never(msg)
        self._work()
        self._fill()
        self._tell_transfers()
        if not self._asked:  # no launch is pending, and those told run before the fan-out
            self._publish()

    def holds(self) -> str:
        running, total = len(self.core.running), len(self.core.requests)
        moves = len(self.core.moves.incoming), len(self.core.moves.outgoing)
        waits = (
            " for the allocator" * self._asked
            + " for the other groups" * (self._offered is not None)
            + " for room" * self._stalled
        )
        return (
            f"running {running}, waiting {total - running}, steps in flight {len(self._inflight)}"
            + (f", waits{waits}" if waits else "")
            + (f", K/V of {moves[0]} requests come, of {moves[1]} go" if any(moves) else "")
            + ", drains" * self._draining
        )

    def _submit(self, msg: Submit) -> None:
        if msg.rid >> FRONTEND_SHIFT in self._gone:
            return
        if msg.rid in self.core.requests:
            self.system.reject(msg, f"request {msg.rid} is there already")
            return
        if self._draining:
            self.core.refuse(msg.rid, Failure("server is shutting down", "shutting_down", 503))
            return
        try:
            constraint = self._constrain(msg.params, msg.thoughts, msg.healed)
            if constraint is not None and not constraint.slow(None):
                constraint.start()
        except RequestError as error:
            self.core.refuse(msg.rid, Failure.of(error, "grammar"))
            return
        self._stalled = False
        self._pacer.came()
        self.core.add(msg, constraint)

    def stopped(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def possible(self, msg: Inbox) -> bool:
        """Whether a message of another process is within the limits that it was checked against."""
        if not isinstance(msg, Submit):
            return True
        moves = msg.imports or msg.exports is not None
        return msg.fits(self._vocab_size, self._max_len) and (not moves or bool(self._transfers))

    def _forget(self, endpoint: int) -> None:
        """End the requests of a process without answers; ignore messages it sent before its end."""
        self._gone.add(endpoint)
        self._stalled = False
        rids = [*self.core.requests, *self.core.moves.outgoing]
        for rid in [rid for rid in rids if rid >> FRONTEND_SHIFT == endpoint]:
            self.core.abort(rid)

    def _drain(self, timeout_s: float) -> None:
        self._draining = True
        if timeout_s <= 0:
            self._stalled = False
            self.core.abort_all()

    def _fill(self) -> None:
        """Keep ``depth`` steps on the device; at most one reservation is open."""
        self._flush()
        if self._asked or self._offered is not None or len(self._inflight) >= self._depth:
            return
        joins = self._joins > self.core.steps  # the other groups are waiting for this one
        if not joins and (self._stalled or self._pauses()):
            return
        proposal = None if self._stalled else self.core.propose(self._pacer.prompt_room)
        if proposal is not None:
            self._asked = True
            self._allocator.tell(proposal)
        elif joins:
            self._offer(self.core.empty())

    def _pauses(self) -> bool:
        """Delay the next step a little to let more requests join."""
        now = perf_counter()
        if now < self._masks_until and self.core.masks_come:
            self._wake(now, self._masks_until)
            return True
        return self._waits_for_newcomers(now)

    def _waits_for_newcomers(self, now: float) -> bool:
        """Whether to delay: the device is busy, and newcomers may still join."""
        if len(self._inflight) != 1:
            return False
        if self._in_step:  # agreement takes a round trip: never delay
            return False
        waiting = bool(self.core.waiting)
        pause = self._pacer.pause(now, self._inflight[-1].size, waiting=waiting)
        if pause:
            self._wake(now, now + pause)
        return pause > 0

    def _wake(self, now: float, at: float) -> None:
        if at < self._due_at:
            self._due_at = at
            self.system.loop.call_later(at - now, self.put, LaunchDue())

    def _flush(self) -> None:
        if released := self.core.released:
            self.core.released = []
            # all that was granted to those: nothing is launched while a reservation is open
            self._allocator.tell(ReleaseSlots(tuple(released), self.core.take_launched()))

    def _launch(self, granted: SlotsGranted) -> None:
        self._asked = False
        step = self.core.plan(granted)
        self._tell_transfers()  # before they learn that the step is over
        if step is None:
            # empty steps for other groups hold nothing that could become free
            self._stalled = self.core.relieve(any(step.rows for step in self._inflight))
        elif self._in_step:
            self._offer(step)
        else:
            self._start(step)

    def _offer(self, step: Step) -> None:
        """Launch the step once all groups have agreed on its size."""
        self._offered, plan = step, step.plan
        offer = OfferStep(
            endpoint=self.system.endpoint,
            step=plan.step,
            num_tokens=len(plan.tokens),
            mixed=plan.num_decode < len(plan.lanes),
        )
        self._lockstep.tell(offer)

    def _agreed(self, msg: StepAgreed) -> None:
        step = self._offered
        if step is None or step.plan.step != msg.step:
            self.system.reject(msg, f"step {msg.step} has not been offered")
            return
        self._offered = None
        step.plan = replace(step.plan, common=msg.num_tokens, mixed=msg.mixed)
        self._start(step)

    def _start(self, step: Step) -> None:
        step.launched_at = perf_counter()
        self._pacer.launched(step.launched_at, idle=not self._inflight)
        self._inflight.append(step)  # lengths have advanced at planning, not at commit
        plan = step.plan
        for i, runner in enumerate(self._runners):
            if i == 1 and plan.masks:
                plan = replace(
                    plan, masked=array(INT32), masks=bytearray()
                )  # the group's first rank samples
            runner.tell(plan)

    def _moved(self, msg: BeginDecode | KvArrived | TransferFailed | KvSent) -> None:
        self._stalled = False
        match msg:
            case BeginDecode(rid, token) if token >= self._vocab_size:
                self.system.reject(msg, f"token {token} is not in the vocabulary")
                self.core.abort(rid)
            case BeginDecode(rid, token):
                self.core.begin(rid, token)
            case KvArrived(rid, rank):
                self.core.arrived(rid, rank)
            case TransferFailed(rid, rank, why):
                self.core.lapsed(rid, rank, why)
            case KvSent(rid, rank, seq):
                self.core.sent(rid, rank, seq)

    def _tell_transfers(self) -> None:
        told, placed = self.core.moves.told, self.core.moves.placed
        if not (told or placed):
            return
        for msg in told:
            for transfer in self._transfers:
                transfer.tell(msg)
        for rid, hit, length in placed:
            at = ImportPlaced(rid=rid, leader=self.system.endpoint, hit=hit, length=length)
            self._read(rid >> FRONTEND_SHIFT).tell(at)
        told.clear()
        placed.clear()

    def _commit(self, done: StepDone) -> None:
        self._stalled = False
        step = self._inflight.popleft()
        assert step.plan.step == done.step, (step.plan.step, done.step)
        now = perf_counter()
        self._pacer.over(now, done.device_ms)
        waited, size = step.num_unmasked > 0, step.size
        self._pacer.times.over(now, step.launched_at, size, done.device_ms, drafts=waited)
        if self.core.speculation is not None and step.decodes:
            self.core.speculation.over(drafts=bool(step.drafts))
        scores = [scored for got in done.prompt if (scored := self._score(step, *got)) is not None]
        step.result = done
        before = len(self.core.ended)
        emitted = self.core.commit(step, done.tokens)
        self._pacer.ended(now, len(self.core.ended) - before)
        if emitted.rows or scores:
            self._unpublished.append((emitted, scores))
        self._masks_until = now + MASKS_S

    def _work(self) -> None:
        """Give threads the work of constraints."""
        while self._free:
            most = min(MOST_JOBS, -(-self.core.num_jobs // self._workers))
            if not (jobs := self.core.jobs(most, bool(self._inflight))):
                return
            self._free -= 1
            self.spawn(self._run(jobs))

    async def _run(self, jobs: list[Job]) -> ConstraintsAdvanced:
        return ConstraintsAdvanced(
            tuple(await self.system.loop.run_in_executor(self._pool, work, jobs))
        )

    def _worked(self, msg: ConstraintsAdvanced) -> None:
        self._free += 1
        self._stalled = False
        for done in msg.done:
            self._unpublished += [(emitted, []) for emitted in self.core.worked(done)]

    def _score(self, step: Step, row: int, logprobs: Logprobs) -> PromptScores | None:
        if (scored := self.core.score(step, row, len(logprobs))) is None:
            return None
        rid, known = scored
        return rid, logprobs.slice(known)

    def _publish(self) -> None:
        for emitted, scores in self._unpublished:
            for endpoint, tokens in pack_tokens(emitted, scores, self.system.endpoint):
                if endpoint not in self._gone:
                    self._read(endpoint).tell(tokens)
        self._unpublished.clear()
        begun, ended, left = self.core.begun, self.core.ended, self.core.moves.left
        for end in ended:
            if (endpoint := end.rid >> FRONTEND_SHIFT) not in self._gone:
                told = replace(end, endpoint=self.system.endpoint) if self._balanced else end
                self._read(endpoint).tell(told)
        if self._balanced and (begun or ended or left):
            # an abort may still arrive for one whose K/V are in transit
            over = [end.rid for end in ended if end.rid not in self.core.moves.outgoing]
            rids = array(INT64, begun), array(INT64, over + left)
            self._balancer.tell(GroupProgress(self.system.endpoint, *rids))
        begun.clear()
        ended.clear()
        left.clear()
        core = self.core
        busy = core.requests or core.moves or self._inflight or self._offered is not None
        if self._draining and not (self._drained or busy):
            self._drained = True
            self._watchdog.tell(Drained("scheduler", self.system.endpoint))

    def _read(self, endpoint: int) -> Ref:
        """The actor that receives the output of an endpoint's requests."""
        if (ref := self._readers.get(endpoint)) is None:
            ref = self._readers[endpoint] = self.system.ref(self._reader, endpoint)
        return ref

    def _stats(self, query: int) -> SchedulerStats:
        core, speculation = self.core, self.core.speculation
        return SchedulerStats(
            query=query,
            endpoint=self.system.endpoint,
            running=len(core.running),
            waiting=len(core.requests) - len(core.running) - len(core.importing),
            importing=len(core.importing),
            inflight_steps=len(self._inflight),
            expected_slots=core.expected_slots,
            steps=core.steps,
            preemptions=core.preemptions,
            prompt_tokens=core.prompt_tokens,
            generated_tokens=core.generated_tokens,
            imports=core.moves.imports,
            imported_tokens=core.moves.imported_tokens,
            lapses=core.moves.lapses,
            exports=core.moves.exports,
            exported_tokens=core.moves.exported_tokens,
            drafted_tokens=0 if speculation is None else speculation.drafted,
            accepted_tokens=0 if speculation is None else speculation.accepted,
        )


def pack_tokens(
    emitted: Emitted, scores: Sequence[PromptScores], leader: int = 0
) -> list[tuple[int, Tokens]]:
    """A step's results as one message per frontend endpoint; ``leader``: the group's leader."""
    done = emitted.step.result
    assert done is not None
    endpoints = {rid >> FRONTEND_SHIFT for rid in emitted.rids}
    if len(endpoints) == 1 and not scores:
        (endpoint,) = endpoints
        return [(endpoint, _pack(done, emitted, range(len(emitted.rows)), (), leader))]
    out = []
    for endpoint in sorted(endpoints | {rid >> FRONTEND_SHIFT for rid, _ in scores}):
        mine = [i for i, rid in enumerate(emitted.rids) if rid >> FRONTEND_SHIFT == endpoint]
        own_scores = tuple(s for s in scores if s[0] >> FRONTEND_SHIFT == endpoint)
        out.append((endpoint, _pack(done, emitted, mine, own_scores, leader)))
    return out


def _pack(
    done: StepDone,
    emitted: Emitted,
    mine: Sequence[int],
    scores: tuple[PromptScores, ...],
    leader: int,
) -> Tokens:
    """``mine``: indices into the emitted columns; a range: all of them."""
    rids, tokens, ends = emitted.rids, emitted.tokens, bytes(emitted.ends)
    if not isinstance(mine, range):
        rids = array(INT64, [rids[i] for i in mine])
        tokens = array(INT32, [tokens[i] for i in mine])
        ends = bytes(ends[i] for i in mine)
    logprobs = done.logprobs
    if logprobs is not None and len(mine) != len(done.tokens):
        logprobs = logprobs.pick([emitted.rows[i] for i in mine])
    return Tokens(
        step=done.step,
        rids=rids,
        tokens=tokens,
        ends=ends,
        logprobs=logprobs,
        prompt=scores,
        endpoint=leader,
    )
