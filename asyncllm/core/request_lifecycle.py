"""Tracks a scheduler's requests from arrival to end: waiting or running, and on which lane.

Knows requests and lanes (see :mod:`asyncllm.core.steps`); knows neither budgets nor the contents of
steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection

from asyncllm.codec import INT32
from asyncllm.constrain.healing import Healing
from asyncllm.constrain.protocol import Constraint
from asyncllm.core.fair_queue import FairQueue
from asyncllm.core.mask_work import MaskWorkQueue
from asyncllm.core.request import FinishReason
from asyncllm.core.steps import Emitted, Lane, Request, Step
from asyncllm.core.transfer_tracker import TransferTracker
from asyncllm.messages import Finished, StepPlan, Submit
from asyncllm.records import Failure

NO_STEP = Step(StepPlan(step=0, num_decode=0), [])


class RequestLifecycle:
    """The scheduler's requests, each of which ends once.

    Args:
        num_lanes, num_slots, eos_ids, share_prompts, constraint_s, num_ranks: see
            ``scheduling.SchedulerCore``.

    Attributes:
        ended: ends not yet reported. The shell takes and clears it.
        begun: rids of requests that have been placed on a lane. The shell takes and clears it.
        released: (lane, ids for the cache) not yet reported. The shell takes and clears it.
        launched: lanes whose prompt tokens have been launched, or have arrived, since the last
            proposal.
    """

    def __init__(
        self,
        *,
        num_lanes: int,
        num_slots: int,
        eos_ids: Collection[int],
        share_prompts: bool,
        constraint_s: float,
        num_ranks: int,
    ) -> None:
        self.num_lanes, self.num_slots = num_lanes, num_slots
        self.eos_ids = frozenset(eos_ids)
        self.requests: dict[int, Request] = {}
        self.waiting: FairQueue[Request] = FairQueue()  # returning ones first, then round-robin
        self.held: dict[int, list[Request]] = {}  # held until this rid's prompt is computed
        self.share_prompts = share_prompts
        self.running: dict[int, Request] = {}  # oldest first
        # oldest first: they have slots, but K/V or the token after them have not arrived yet
        self.importing: dict[int, Request] = {}
        self.moves = TransferTracker(num_ranks)
        self.ended: list[Finished] = []
        self.begun: list[int] = []
        self.released: list[tuple[int, array[int]]] = []
        self.launched = array(INT32)
        self.preemptions = 0
        self._free_lanes = list(range(num_lanes - 1, -1, -1))
        self._line = MaskWorkQueue(constraint_s)
        self._changed = False  # something ended or was released since the last proposal

    def add(self, msg: Submit, constraint: Constraint | None = None) -> None:
        """Queue a new request after its client's others; one that can never fit ends at once.

        A thread feeds ``msg.outputs`` to the constraint.
        """
        rid = msg.rid
        assert rid not in self.requests, f"request {rid} submitted twice"
        req = Request.of(msg, self.eos_ids)
        if msg.exports is not None:
            self.moves.export(rid, msg.exports)
        req.constraint = constraint
        if constraint is not None:
            if constraint.slow(None):
                req.todo.append((None, None, 0))
            req.todo.extend((token, None, 0) for token in req.outputs)
            if req.todo:
                self._line.add(req)
        first = self.requests.get(msg.after) if self.share_prompts and req.shares else None
        self.requests[rid] = req
        if first is not None and not first.launched:
            req.after = msg.after
            self.held.setdefault(msg.after, []).append(req)
        else:
            self.waiting.append(req.client, rid, req)
        if not msg.prompt:
            failure = Failure("the prompt has no tokens", param="prompt")
            self._end(req, FinishReason.ERROR, failure=failure)
        elif req.known_len > self.num_slots:
            self._fail_too_large(req)
        else:
            self._resume(req)

    def refuse(self, rid: int, failure: Failure) -> None:
        """End a request without queueing it."""
        self.ended.append(Finished(rid, FinishReason.ERROR, failure))

    def abort(self, rid: int) -> None:
        """End a request; unknown and ended ids are ignored, as everywhere."""
        if req := self.requests.get(rid):
            self._end(req, FinishReason.ABORT)
        else:
            self.moves.end(rid)  # it may have moved on while its K/V are still in transit

    def abort_all(self) -> None:
        for rid in [*self.requests, *self.moves.outgoing]:
            self.abort(rid)

    def stop(self, rid: int, num_tokens: int) -> None:
        """End a request whose text has reached a stop string after ``num_tokens``."""
        if req := self.requests.get(rid):
            self._end(req, FinishReason.STOP, num_tokens=num_tokens)

    @property
    def expected_slots(self) -> int:
        """Upper bound of the slots that all requests will hold: prompts plus max_new_tokens."""
        return sum(len(r.prompt) + r.until for r in self.requests.values())

    def _resume(self, req: Request, whole: bool = False) -> None:
        """Outputs the request arrived with have been accepted; after the last it may be
        finished."""
        if req.outputs and not req.todo:
            self._emit(req, req.outputs.pop(), whole, 0, Emitted.of(NO_STEP))

    def _emit(self, req: Request, token: int, whole: bool, row: int, emitted: Emitted) -> None:
        """Count an accepted token, which may be the last."""
        req.outputs.append(token)
        if req.lookup is not None:
            if row + 1 in emitted.step.counted:  # it is the draft that the next row begins with
                req.accepted_at.append(len(req.outputs))
            if req.constraint is None:  # else it was added when it was sampled
                req.lookup.push(token)
        if req.constraint is not None and isinstance(req.constraint, Healing):
            req.grow(req.constraint.uncounted())
        num = len(req.outputs)
        stops = token in req.end_ids and num > req.params.min_new_tokens
        if whole:
            stops |= token in self.eos_ids
        emitted.rids.append(req.rid)
        emitted.tokens.append(token)
        emitted.ends.append(stops)
        emitted.rows.append(row)
        if stops or whole:
            self._end(req, FinishReason.STOP)
        elif num >= req.until:
            self._end(req, FinishReason.LENGTH if num >= req.max_new else FinishReason.MOVED)

    # K/V from elsewhere

    def begin(self, rid: int, token: int) -> None:
        """The token that follows a request's imported K/V: it continues from there once all is
        there."""
        req = self.requests.get(rid)
        if req is None or not req.lacks:
            return
        req.lacks = False
        if req.lane is None:
            req.imports = False  # no rank has been told where to send its K/V
        req.outputs.append(token)
        if req.constraint is None:
            self._resume(req)
        else:
            req.todo.append((token, None, 0))
            if len(req.todo) == 1:
                self._line.add(req)
        self._go_in(req)

    def arrived(self, rid: int, rank: int) -> None:
        """A rank has received all K/V that a request imports."""
        self._answered(rid, rank, None)

    def lapsed(self, rid: int, rank: int, why: str) -> None:
        """A rank will not receive all K/V; ``why`` "": they are no longer wanted."""
        self._answered(rid, rank, why)

    def sent(self, rid: int, rank: int, seq: int) -> None:
        """A rank has finished with part of a request's exported K/V."""
        if lane := self.moves.sent(rid, rank, seq):
            self._let_go(lane)

    def _answered(self, rid: int, rank: int, why: str | None) -> None:
        flow = self.moves.incoming.get(rid)
        if flow is None or rank not in flow.slot_hold.ranks:
            return
        if why is not None and not flow.void and (req := self.importing.get(rid)):
            self.moves.lapses += 1
            detail = f"the K/V of the prompt did not come: {why or 'nobody sends them'}"
            self._end(req, FinishReason.ERROR, failure=Failure(detail, "transfer_failed", 503))
        if self.moves.answered(rid, rank, lapsed=why is not None) is None:
            return
        lane = flow.slot_hold.lane
        self._let_go(lane)
        if not (flow.void or flow.lapsed):
            req = self.importing[rid]
            lane.planned = lane.fill_len
            if req.shares:
                self.launched.append(lane.number)
            self._go_in(req)

    def _expect(self, req: Request, lane: Lane, hit: int, slots: array[int]) -> None:
        """The request has its slots, those of ``hit`` cached tokens first: K/V may arrive."""
        req.imports = False
        lane.imports, lane.imported = False, slots
        self.moves.expect(req.rid, lane, hit, slots)
        self.moves.placed.append((req.rid, hit, len(slots)))
        self._changed = True

    def _go_in(self, req: Request) -> None:
        """Start it if everything has arrived: only rows are missing then."""
        lane = req.lane
        if req.rid not in self.importing or req.lacks or req.todo:
            return
        assert lane is not None
        if lane.planned == lane.fill_len:
            lane.late = req.known_len - lane.fill_len
            lane.fill_len = req.known_len
            self.running[req.rid] = self.importing.pop(req.rid)

    # ends

    def _preempt(self, req: Request) -> None:
        """Make room: the request waits for its next life."""
        self.preemptions += 1
        self._requeue(req)

    def _again(self, req: Request) -> None:
        """Drop this life's tokens after the last accepted one."""
        req.todo.clear()
        req.lookup = None
        if req.rid in self.running:  # else it has been preempted in the meantime
            self._requeue(req)

    def _requeue(self, req: Request) -> None:
        """Put it back at the head of the queue; the next life recomputes prompt and outputs, once
        the missing token is there."""
        del (self.running if req.rid in self.running else self.importing)[req.rid]
        self._leave(req)
        self.waiting.put_first(req.rid, req)

    def _fail_too_large(self, req: Request) -> None:
        detail = (
            f"the request holds {req.known_len:,} tokens ({len(req.prompt):,} of them prompt), the "
            f"KV cache has room for {self.num_slots:,} (--max_total_token_num, --mem_fraction)"
        )
        failure = Failure(detail, param="prompt")
        if req.outputs:
            failure = Failure(detail, status=500)
        self._end(req, FinishReason.ERROR, failure=failure)

    def _fail_too_slow(self, req: Request) -> None:
        detail = (
            f"finding out which tokens the constraint allows has taken {req.worked_s:.1f} s of CPU"
            f" time, limit {self._line.limit_s:g} (--constraint_time_limit): simplify it"
        )
        self._end(req, FinishReason.ERROR, failure=Failure(detail, param="grammar"))

    def _end(
        self,
        req: Request,
        reason: FinishReason,
        *,
        failure: Failure | None = None,
        num_tokens: int | None = None,
    ) -> None:
        req.todo.clear()
        if req.rid in self.running:
            del self.running[req.rid]
        elif req.rid in self.importing:
            del self.importing[req.rid]
        elif req.after < 0:
            self.waiting.discard(req.client, req.rid)
        else:
            self.held[req.after].remove(req)
        del self.requests[req.rid]
        if held := self.held.pop(req.rid, None):  # the next one goes first
            first, *others = held
            first.after = -1
            self.waiting.append(first.client, first.rid, first)
            for other in others:
                other.after = first.rid
            if others:
                self.held[first.rid] = others
        self._leave(req)
        self.moves.end(req.rid, moved=reason is FinishReason.MOVED)
        self._changed = True
        num = len(req.outputs) if num_tokens is None else num_tokens
        self.ended.append(
            Finished(
                req.rid,
                reason,
                failure,
                cached_len=max(req.cached_len, 0),
                num_tokens=num,
                drafted=req.drafted,
                accepted=req.num_accepted(num),
            )
        )

    def _leave(self, req: Request) -> None:
        """Retire the request's lane. Launched rows and open reservations keep it alive."""
        if (lane := req.lane) is None:
            return
        lane.over, req.lane = True, None
        self.moves.drop(req.rid)
        prompt_len, told = len(req.prompt), lane.fill_len - lane.late
        valid = min(lane.planned, req.known_len)
        if valid > told:
            lane.leaves = req.outputs[told - prompt_len : valid - prompt_len]
        self._let_go(lane)

    def _ungrant(self, req: Request, lane: Lane) -> None:
        """A proposed row got no slots."""
        lane.inflight -= 1
        if not lane.opened:
            self._free_lanes.append(lane.number)
            req.lane = None
        else:
            self._let_go(lane)

    def _let_go(self, lane: Lane) -> None:
        """One row or hold less: release the lane if nobody reads or writes its slots any more."""
        if lane.over and not (lane.inflight or lane.slot_holds):
            self._release(lane)

    def _release(self, lane: Lane) -> None:
        self.released.append((lane.number, lane.leaves))
        self._free_lanes.append(lane.number)
        self._changed = True
