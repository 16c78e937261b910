"""Decides what runs in the next step: queue order, budgets, phases.

Knows requests, lanes and counts of tokens (see :mod:`asyncllm.core.request_lifecycle`); knows
neither slots' contents nor tensors, actors, text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable

from asyncllm.codec import INT32
from asyncllm.constrain.protocol import ResampleToken, Verdict
from asyncllm.core.draft_scheduler import DraftScheduler
from asyncllm.core.mask_work import CHEAP_S, Job
from asyncllm.core.request import FinishReason
from asyncllm.core.speculation import Speculation
from asyncllm.core.steps import Emitted, Lane, Request, Row, Step
from asyncllm.core.windows import Window
from asyncllm.errors import RequestError
from asyncllm.messages import MAX_COUNT, ReserveSlots, SlotsGranted, StepPlan
from asyncllm.records import ConstraintDone, Failure, OpenedLane

PlacedRow = tuple[Row, int, int, slice]  # with cached and new tokens, and their slots in the grant

UNFIT = Failure("the tokens so far violate the constraint", status=500)


class SchedulerCore(DraftScheduler):
    """Pure scheduler state. At most one proposal is open: propose and plan alternate.

    Args:
        num_lanes: most requests on the device at a time.
        num_slots: tokens the KV pool holds.
        batch_max_tokens: new tokens per step.
        chunked_prefill_size: prompt tokens per request and step, and of all requests together in
            a step that decodes.
        eos_ids: tokens that end a request unless it ignores them.
        headroom: tokens to keep free per running request when admitting another.
        window: of layers with a separate (sliding) slot space, if there are any.
        num_sliding: size of that space in slots.
        share_prompts: of several requests with the same prompt, all but the first are held until
            its prompt has been launched, so that it is computed once.
        num_ranks: of the group, if K/V are transferred in or out.
        speculation: decides about draft tokens; None: there are none.
        constraint_s: limit of CPU seconds spent in threads on a request's constraint.

    """

    def __init__(
        self,
        *,
        num_lanes: int,
        num_slots: int,
        batch_max_tokens: int,
        chunked_prefill_size: int,
        eos_ids: Collection[int],
        headroom: int = 8,
        share_prompts: bool = False,
        constraint_s: float = 5.0,
        window: Window | None = None,
        num_sliding: int = 0,
        num_ranks: int = 1,
        speculation: Speculation | None = None,
    ) -> None:
        super().__init__(
            num_lanes=num_lanes,
            num_slots=num_slots,
            eos_ids=eos_ids,
            share_prompts=share_prompts,
            constraint_s=constraint_s,
            num_ranks=num_ranks,
        )
        self.speculation = speculation
        self.headroom = headroom
        self.batch_max_tokens, self.chunk = batch_max_tokens, chunked_prefill_size
        self.available = num_slots  # as of the last grant
        self.window, self.sliding_available = window, num_sliding
        self.steps = self.prompt_tokens = self.generated_tokens = 0
        self._proposal: list[Row] = []

    # a step

    def propose(
        self, prompt_room: Callable[[int, int], int | None] = lambda num_rows, num_read: None
    ) -> ReserveSlots | None:
        """The rows of the next step, before it is known whether they fit; None: nothing to do, or
        not before the running step is over. ``prompt_room``: see ``Pacer``."""
        assert not self._proposal, "a proposal is open"
        speculation = self.speculation
        if speculation is not None and self._awaits_drafts(speculation):
            return None
        self._changed = False
        rows: list[Row] = []
        filling: list[Request] = []
        budget = self.batch_max_tokens
        for req in self.running.values():
            lane = req.lane
            assert lane is not None
            if lane.planned < lane.fill_len:
                filling.append(req)
            elif req.constraint is not None and (
                req.todo or not req.constraint.mask_is_stable_for(req.ahead(lane))
            ):
                pass  # the next mask depends on a token that is not known or accepted yet
            elif lane.planned < req.final_len and budget:
                rows.append((req, lane, 1))
                lane.inflight += 1
                budget -= 1
        if speculation is not None and rows:
            spare = self.available - self.headroom * len(self.running)
            if self.window is not None:
                spare = min(spare, self.sliding_available)
            rows = self._draft(speculation, rows, min(budget, spare - len(rows)))
            budget = self.batch_max_tokens - len(rows)
        if rows:
            # a decode waits for one chunk at most, which full steps hold exactly: that size has a
            # graph
            budget = min(budget, max(self.chunk - len(rows), (self.chunk + 1) // 2))
            if filling or self.waiting:
                num_read = sum(lane.planned + 1 for _, lane, _ in rows)
                room = prompt_room(len(rows), num_read)
                budget = budget if room is None else min(budget, room)
        for req in filling:
            if not budget:
                break
            lane = req.lane
            assert lane is not None
            count = min(lane.fill_len - lane.planned, self.chunk, budget)
            rows.append((req, lane, count))
            lane.inflight += 1
            budget -= count
        opened = self._admit(rows, filling, budget) if self.waiting and budget else []
        if not rows:
            return None
        self._proposal = rows
        return ReserveSlots(
            lanes=array(INT32, [lane.number for _, lane, _ in rows]),
            counts=array(INT32, [count for _, _, count in rows]),
            opened=tuple(opened),
            launched=self.take_launched(),
            trimmed=self._take_wrong(),
        )

    def take_launched(self) -> array[int]:
        """Take and clear ``launched``."""
        launched, self.launched = self.launched, array(INT32)
        return launched

    def plan(self, granted: SlotsGranted) -> Step | None:
        """Turn the granted rows into a step; None: none are left (see :meth:`relieve`)."""
        rows, self._proposal = self._proposal, []
        self.available = granted.available
        self.sliding_available = granted.sliding_available
        num = len(granted.counts)
        refused, rows = rows[num:], rows[:num]
        for req, lane, _ in refused:
            self._ungrant(req, lane)
        step = self._plan(rows, granted)
        if step is not None:
            self.steps += 1
        if self.speculation is not None:
            self.speculation.trying += 0 if step is None else step.num_unmasked
            for _, lane, _ in rows + refused:
                lane.drafts, lane.masks = (), ()
        return step

    def empty(self) -> Step:
        """A step without rows, because other groups need one; no proposal is open."""
        assert not self._proposal, "a proposal is open"
        self.steps += 1
        return Step(StepPlan(step=self.steps, num_decode=0), [])

    def relieve(self, any_inflight: bool) -> bool:
        """Called when a proposal led to no step. True: wait for a launched step to finish.

        Otherwise room has been made, if necessary by preempting the newest running request or by
        ending one that cannot fit, and the next proposal may succeed.
        """
        if self._changed:
            return False
        if any_inflight or self.moves.leaving:
            return True
        if self.importing:
            self._preempt(next(reversed(self.importing.values())))
        elif self.running:
            newest = next(reversed(self.running.values()))
            lane = newest.lane
            assert lane is not None
            assert lane.inflight == 0, f"lane {lane.number} has {lane.inflight} rows in flight"
            needed = max(lane.planned + 1, lane.fill_len)
            if len(self.running) == 1 and needed > self.num_slots:
                self._fail_too_large(newest)
            else:
                # even alone: its duplicates of cached tokens take room that a restart would not
                # need
                self._preempt(newest)
        elif first := next((req for req in self.waiting if req.ready), None):
            self._fail_too_large(first)
        return False

    def score(self, step: Step, row_idx: int, num: int) -> tuple[int, int] | None:
        """Row ``row_idx`` has the log-probabilities of ``num`` prompt tokens; call before its
        commit.

        Returns the rid and how many of the first are known from before a preemption; None: they are
        not wanted.
        """
        req, lane, _ = step.rows[row_idx]
        if lane.over:
            return None
        start = step.plan.starts[row_idx]
        known = min(max(req.scored - start, 0), num)
        req.scored = max(req.scored, start + num)
        return req.rid, known

    def commit(self, step: Step, tokens: array[int]) -> Emitted:
        """Apply the result of a launched step: int32[num_rows], -1 where no token was sampled.

        Where accepting a token takes a constraint long, :meth:`worked` returns it later.
        """
        emitted = Emitted.of(step)
        self._line.step_over()
        if step.drafts:
            tokens = self._settle(step, tokens)
        for i, ((req, lane, _), token) in enumerate(zip(step.rows, tokens, strict=True)):
            lane.inflight -= 1
            if lane.over:
                self._let_go(lane)
            elif token < 0:
                if not (req.max_new or lane.inflight) and lane.planned == lane.fill_len:
                    self._end(req, FinishReason.LENGTH)
            elif req.constraint is None:
                self._emit(req, token, False, i, emitted)
            else:
                if req.lookup is not None:
                    req.lookup.push(token)
                req.todo.append((token, step, i))
                if len(req.todo) == 1:
                    self._go_on(req, [emitted])
        self.generated_tokens += len(emitted.tokens)
        return emitted

    def jobs(self, most: int, busy: bool) -> list[Job]:
        """Work of constraints for a thread, see ``MaskWorkQueue.take``."""
        ahead = 0 if self.speculation is None else self.speculation.ahead(len(self.running))
        return self._line.take(most, busy, ahead)

    @property
    def num_jobs(self) -> int:
        """How much constraint work waits for a thread."""
        return len(self._line)

    @property
    def masks_come(self) -> bool:
        """Whether running requests wait for masks that are quick to compute."""
        return not self._line.idle and any(
            req.todo and req.worked_s + req.looked_s < CHEAP_S * len(req.outputs)
            for req in self.running.values()
        )

    def worked(self, done: ConstraintDone) -> list[Emitted]:
        """Take in a thread's results; returns the tokens that have now been accepted."""
        req = self.requests.get(done.rid)
        self._line.spent(req, done.cpu_s, done.ahead_s)
        out: list[Emitted] = []
        if req is None:
            return out
        if done.verdict == Verdict.UNDONE:
            self._line.add(req)
            return out
        token, step, row = req.todo[0]
        if done.verdict == Verdict.REFUSED:
            self._end(req, FinishReason.ERROR, failure=done.failure)
        elif done.verdict == Verdict.AGAIN and step is None:
            self._end(req, FinishReason.ERROR, failure=UNFIT)
        elif done.verdict == Verdict.AGAIN:
            self._again(req)
        else:
            for _ in range(done.num):
                req.todo.popleft()
            whole = done.verdict == Verdict.WHOLE
            if step is None:
                self._resume(req, whole)
                self._go_in(req)
            else:
                assert token is not None
                out.append(Emitted.of(step))
                self._emit(req, token, whole, row, out[0])
            if req.worked_s > self._line.limit_s and req.rid in self.requests:
                self._fail_too_slow(req)
            self._go_on(req, out)
        self.generated_tokens += sum(len(emitted.tokens) for emitted in out)
        return out

    def _go_on(self, req: Request, out: list[Emitted]) -> None:
        """Accept a request's new tokens, up to the first that needs a thread."""
        assert req.constraint is not None
        while req.todo:
            token, step, row = req.todo[0]
            if step is None or req.constraint.slow(token):
                self._line.add(req)
                return
            assert token is not None
            try:
                whole = req.constraint.accept(token)
            except RequestError as error:
                self._end(req, FinishReason.ERROR, failure=Failure.of(error, "grammar"))
                return
            except ResampleToken:
                self._again(req)
                return
            req.todo.popleft()
            if not out or out[-1].step is not step:
                out.append(Emitted.of(step))
            self._emit(req, token, whole, row, out[-1])

    # queue

    def _admit(
        self, rows: list[Row], filling: Iterable[Request], budget: int
    ) -> list[tuple[int, array[int], bool]]:
        """Add rows of waiting requests, clients in turn, while the KV slots are likely to
        suffice."""
        reserved = self.headroom * (len(self.running) + len(self.importing)) + len(rows)
        room, sliding = self.available - reserved, 0
        if self.window is not None:
            sliding = self.sliding_available - reserved
        for req in filling:
            assert req.lane is not None
            room -= req.lane.fill_len - req.lane.planned
            sliding -= self._sliding_need(req.lane.fill_len, req.lane.planned)
        opened: list[tuple[int, array[int], bool]] = []
        alone = not (self.running or self.importing)
        for req in self.waiting:
            if not req.ready:
                continue
            known = req.known_len
            count = known if req.imports else min(known, self.chunk, budget)
            wanted, seen = known + self.headroom, self._sliding_need(known, 0)
            fits = wanted <= room and seen <= sliding
            if not (budget and self._free_lanes and (alone or fits)):
                break
            alone = False
            room -= wanted
            sliding -= seen
            req.lane = Lane(self._free_lanes.pop(), known, imports=req.imports)
            budget -= 0 if req.imports else count  # computed by another server
            rows.append((req, req.lane, count))
            req.lane.inflight += 1
            ids = req.prompt + req.outputs if req.outputs else req.prompt
            opened.append((req.lane.number, ids, req.shares))
        return opened

    def _sliding_need(self, known: int, planned: int) -> int:
        """Sliding slots that a request takes until its ``known`` tokens are computed."""
        if self.window is None:
            return 0
        most = self.window.most
        chunk = min(known - planned, self.chunk, most)
        return max(min(known, most) - min(planned, most), 0) + chunk * (known > most)

    # rows of a plan

    def _plan(self, rows: list[Row], granted: SlotsGranted) -> Step | None:
        """A step of these rows; None: none is left."""
        starts: list[int] = []  # of the first ones, which decode and are live: planned together
        for (_, lane, _), count in zip(rows, granted.counts, strict=True):
            start = lane.planned
            if count != 1 or lane.over or start < lane.fill_len:
                break
            starts.append(start)
            lane.planned = start + 1
        num = len(starts)
        singles, others = self._live(rows, granted, num)
        if not (num or singles or others):
            return None
        step = self._plan_decode(rows[:num], starts, granted, num + len(singles))
        for row, hit, count, part in singles + others:
            (req, lane, _), slots = row, granted.slots[part]
            if req.leaves_at < MAX_COUNT:
                self.moves.computed(req.rid, lane, 0, slots[:hit], self.steps)
                self.moves.computed(req.rid, lane, lane.planned, slots[hit:], self.steps + 1)
            if lane.imported:
                step.plan.slots.extend(lane.imported)
                hit, lane.imported = len(lane.imported), array(INT32)
            step.plan.slots.extend(slots)
            step.plan.sliding.extend(granted.sliding[part])
            self._plan_row(step, row, hit, count)
        return step

    def _plan_decode(
        self, rows: list[Row], starts: list[int], granted: SlotsGranted, num_decode: int
    ) -> Step:
        """A step whose first rows are these, which decode; ``num_decode`` will have one token."""
        num = len(rows)
        plan = StepPlan(
            step=self.steps + 1,
            num_decode=num_decode,
            lanes=array(INT32, [lane.number for _, lane, _ in rows]),
            starts=array(INT32, starts),
            counts=granted.counts[:num],
            cached_counts=array(INT32, bytes(4 * num)),
            slots=granted.slots[:num],
            sliding=granted.sliding[:num],
            samples=bytearray(b"\1" * num),
            prefix_order=granted.prefix_order,
            shared_lens=granted.shared_lens,
        )
        step = Step(plan, rows)
        if self.speculation is None:
            plan.tokens.frombytes(b"\xff" * (4 * num))  # NO_TOKEN
        else:
            for start, (req, lane, _) in zip(starts, rows, strict=True):
                plan.tokens.append(self._input(step, req, lane, start))
        for i, (req, lane, _) in enumerate(rows):
            if req.constraint is not None:
                step.constrain(i, req, lane, starts[i] + 1)
        return step

    def _live(
        self, rows: list[Row], granted: SlotsGranted, num: int
    ) -> tuple[list[PlacedRow], list[PlacedRow]]:
        """Of the rows after the first ``num``, each of one token, those that are in the step: with
        one token and with more. The others have ended since the reservation, or wait for K/V."""
        singles: list[PlacedRow] = []
        others: list[PlacedRow] = []
        at = num
        for i in range(num, len(rows)):
            (req, lane, _), hit, count = rows[i], granted.hits[i], granted.counts[i]
            part = slice(at, at + hit + count)
            at = part.stop
            self._granted(req, lane, hit)
            if lane.over:
                lane.inflight -= 1
                self._let_go(lane)
            elif lane.imports:
                lane.inflight -= 1
                self._expect(req, lane, hit, granted.slots[part])
            else:
                (singles if count == 1 else others).append((rows[i], hit, count, part))
        return singles, others

    def _granted(self, req: Request, lane: Lane, hit: int) -> None:
        """The allocator knows the lane now."""
        if lane.opened:
            return
        lane.opened = True
        lane.planned = hit
        if lane.over:
            return
        self.waiting.serve(req.client, req.rid)
        (self.importing if lane.imports else self.running)[req.rid] = req
        self.begun.append(req.rid)
        if req.cached_len < 0:
            req.cached_len = min(hit, len(req.prompt))

    def _plan_row(self, step: Step, row: Row, hit: int, count: int) -> None:
        """Append one row; its slots have been appended."""
        (req, lane, _), plan = row, step.plan
        start = lane.planned
        end = lane.planned = start + count
        step.rows.append(row)
        plan.lanes.append(lane.number)
        plan.starts.append(start)
        plan.counts.append(count)
        plan.cached_counts.append(hit)
        samples = start >= lane.fill_len or (end == lane.fill_len and req.max_new > 0)
        plan.samples.append(samples)
        if samples:
            step.constrain(len(step.rows) - 1, req, lane, end)
        if start >= lane.fill_len:
            plan.tokens.append(self._input(step, req, lane, start))
            return
        # no output since the lane was opened: its first rows are still filling it
        known = req.prompt + req.outputs if req.outputs else req.prompt
        plan.tokens.extend(known[start:end])
        if not lane.late:
            self.prompt_tokens += count
        if req.shares:
            self.launched.append(lane.number)
        if req.launched and (held := self.held.pop(req.rid, None)):
            for other in reversed(held):  # before the client's other waiting requests
                other.after = -1
                self.waiting.prepend(other.client, other.rid, other)  # no proposal is open
        if not lane.seen:
            lane.seen = True
            ids = known if req.needs_ids else array(INT32)
            plan.opened.append(OpenedLane(lane.number, len(req.prompt), req.params, ids))
