"""What constraints leave to threads: order, budgets, and requests that wait for it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import accumulate, count

import pytest

from asyncllm.constrain.protocol import Constraint, Path, ResampleToken, Verdict
from asyncllm.core import mask_work
from asyncllm.core.mask_work import Job, MaskWorkQueue
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.core.scheduling import SchedulerCore
from asyncllm.core.steps import Request, Step
from asyncllm.errors import RequestError
from asyncllm.messages import SlotsGranted, Submit
from asyncllm.records import ConstraintDone
from tests.core.test_scheduling import add, commit, grant, make, reasons, shape, step

WHOLE, BAD, AGAIN, MARK, FAULT = 30, 31, 29, 20, 28


class Slow(Constraint):
    """All that comes is worked out in a thread; ``loose``: only what follows a MARK.

    A loose one does not wait for tokens that it does not know.
    """

    def __init__(self, loose: bool = False) -> None:
        self.loose, self.seen = loose, array("i")

    def slow(self, token: int | None) -> bool:
        return token == MARK if self.loose else True

    def mask(self) -> bytes:
        return bytes([1 + len(self.seen), 0, 0, 0])

    def mask_is_stable_for(self, ahead: int) -> bool:
        return ahead == 0 or self.loose

    def accept(self, token: int) -> bool:
        if token == BAD:
            raise RequestError("not that")
        if token == AGAIN:
            raise ResampleToken
        if token == FAULT:
            raise ZeroDivisionError
        self.seen.append(token)
        return token == WHOLE


def ask(core: SchedulerCore, rid: int, *, max_new: int = 5, loose: bool = False) -> Slow:
    made = Slow(loose)
    core.add(Submit(rid, array("i", range(4)), SamplingParams(max_new_tokens=max_new)), made)
    return made


def play(core: SchedulerCore, most: int = 9) -> list[tuple[int, list[int]]]:
    """Let a thread do what waits for it: (rid, its new tokens)."""
    out = []
    for done in mask_work.work(core.jobs(most, False)):
        out += [(done.rid, list(emitted.tokens)) for emitted in core.worked(done)]
    return out


def test_a_request_waits_for_its_mask_and_others_do_not() -> None:
    core = make()
    ask(core, 1)
    add(core, 2, 4)
    assert shape(step(core)) == [(2, 4)], "the first mask is not known"
    assert play(core) == []
    first = step(core)
    assert (shape(first), list(first.plan.masked)) == ([(2, 1), (1, 4)], [1])
    emitted = core.commit(first, array("i", [7, 8]))
    assert (list(emitted.rids), list(emitted.tokens)) == ([2], [7])
    assert shape(step(core)) == [(2, 1)]
    assert play(core) == [(1, [8])]
    following = step(core)
    assert shape(following) == [(2, 1), (1, 1)]
    assert bytes(following.plan.masks) == bytes([2, 0, 0, 0])


@pytest.mark.parametrize(
    ("token", "reason"),
    [(WHOLE, FinishReason.STOP), (BAD, FinishReason.ERROR), (7, FinishReason.LENGTH)],
)
def test_ends_are_known_when_a_thread_has_found_them(token: int, reason: FinishReason) -> None:
    core = make()
    ask(core, 1, max_new=1)
    play(core)
    commit(core, step(core), token)
    assert not core.ended
    play(core)
    assert reasons(core) == {1: (reason, int(token != BAD))}
    assert len(core.released) == 1
    assert not core.requests


def test_a_fault_in_one_constraint_ends_its_request_only() -> None:
    core = make()
    ask(core, 1)
    ask(core, 2)
    play(core)
    core.commit(step(core), array("i", [FAULT, 7]))
    assert play(core) == [(2, [7])]
    ((rid, failure),) = [(end.rid, end.failure) for end in core.ended]
    assert (rid, failure and failure.status) == (1, 500)


def test_an_abort_while_a_thread_works() -> None:
    core = make()
    ask(core, 1)
    ask(core, 2)
    jobs = core.jobs(1, False)
    core.abort(1)
    core.abort(2)
    assert [core.worked(done) for done in mask_work.work(jobs)] == [[]]
    assert core.jobs(9, False) == []
    assert core.propose() is None
    assert reasons(core) == {1: (FinishReason.ABORT, 0), 2: (FinishReason.ABORT, 0)}


def loose_mark(core: SchedulerCore) -> tuple[Slow, Step]:
    """A request that waits for a thread, while a step with its next token is in flight."""
    made = ask(core, 1, loose=True)
    first, second = step(core), step(core)
    assert list(core.commit(first, array("i", [MARK])).tokens) == []
    return made, second


def test_what_is_in_flight_meanwhile_waits_its_turn() -> None:
    core = make()
    made, second = loose_mark(core)
    assert core.propose() is None
    assert list(core.commit(second, array("i", [7])).tokens) == []
    assert play(core) == [(1, [MARK]), (1, [7])]
    assert list(made.seen) == [MARK, 7]
    assert shape(step(core)) == [(1, 1)]


def test_a_row_that_was_proposed_before_goes_without_a_mask() -> None:
    core = make()
    ask(core, 1, loose=True)
    first, second = step(core), step(core)
    assert (bytes(first.plan.masks), bytes(second.plan.masks)) == (bytes([1, 0, 0, 0]),) * 2
    core.propose()
    core.commit(first, array("i", [MARK]))
    third = core.plan(SlotsGranted(array("i", [0]), array("i", [1]), array("i", [9]), 500))
    assert third is not None
    assert list(third.plan.masked) == [], "a thread is making it"


def test_a_token_that_a_thread_does_not_take_is_sampled_again() -> None:
    core = make()
    made, second = loose_mark(core)
    (job,) = core.jobs(9, False)
    core.commit(second, array("i", [7]))
    assert core.worked(ConstraintDone(job[0], Verdict.AGAIN)) == []
    again = step(core)
    assert shape(again) == [(1, 4)], "a new life without the mark and what came after it"
    assert list(core.requests[1].outputs) == list(made.seen) == []


@pytest.mark.parametrize("verdict", [Verdict.GOES_ON, Verdict.AGAIN])
def test_preempted_while_a_thread_works(verdict: Verdict) -> None:
    core = make(num_slots=20)
    add(core, 2, 4)
    ask(core, 1)
    play(core)
    commit(core, step(core))
    ((rid, _, tokens, _, _),) = core.jobs(9, False)
    assert (rid, tokens) == (1, (7,))
    assert grant(core, rows=0) is None
    assert not core.relieve(False)
    assert list(core.running) == [2]
    assert shape(step(core)) == [(2, 1)], "the other one waits for its mask"
    core.worked(ConstraintDone(1, verdict))
    outputs = [7] if verdict is Verdict.GOES_ON else []
    assert list(core.requests[1].outputs) == outputs
    assert shape(step(core))[1:] == [(1, 4 + len(outputs))]


def test_a_request_over_its_budget_ends_alone() -> None:
    core = make(constraint_s=1.0)
    for rid in (1, 2):
        ask(core, rid)
    for done in ((1, 0.6), (2, 0.1)):
        core.worked(ConstraintDone(done[0], Verdict.GOES_ON, done[1]))
    core.jobs(9, False)
    planned = step(core)
    core.commit(planned, array("i", [7, 7]))
    core.jobs(9, False)
    core.worked(ConstraintDone(1, Verdict.GOES_ON, 0.6))
    core.worked(ConstraintDone(2, Verdict.GOES_ON, 0.1))
    (end,) = core.ended
    assert (end.rid, end.reason, end.failure.status) == (1, FinishReason.ERROR, 400)
    assert "1.2 s of CPU time, limit 1 (--constraint_time_limit)" in end.failure.detail
    assert list(core.running) == [2]
    assert len(core.released) == 1


# -- the line ------------------------------------------------------------------------------------


def waiting(rid: int) -> Request:
    packed = SamplingParams(max_new_tokens=5)
    req = Request.of(Submit(rid, array("i", [1]), packed), frozenset())
    req.constraint = Slow()
    req.todo.append((None, None, 0))
    return req


def rids(jobs: list[Job]) -> list[int]:
    return [job.rid for job in jobs]


def test_cheap_constraints_wait_for_one_piece_of_anybodys_work() -> None:
    line, cheap = MaskWorkQueue(), waiting(0)
    costly = [waiting(rid) for rid in range(1, 10)]
    for req in (cheap, *costly):
        line.add(req)
    assert rids(line.take(10, False)) == list(range(10))
    for req in (*costly, cheap):
        line.spent(req, 0.001 if req is cheap else 0.05)
        line.add(req)
    for _ in range(40):
        assert rids(line.take(1, False)) == [0]
        line.spent(cheap, 0.001)
        line.add(cheap)
        assert len(line) == 10


def test_newcomers_do_not_overtake_and_costly_ones_share() -> None:
    line, count = MaskWorkQueue(), dict.fromkeys(range(4), 0)
    requests = {rid: waiting(rid) for rid in count}
    for rid in (0, 1):
        line.add(requests[rid])
    for turn in range(400):
        if turn == 200:
            for rid in (2, 3):
                line.add(requests[rid])
        (rid,) = rids(line.take(1, False))
        count[rid] += 1
        line.spent(requests[rid], 0.05)
        line.add(requests[rid])
    assert all(49 <= count[rid] <= 52 for rid in (2, 3)), count
    assert all(148 <= count[rid] <= 152 for rid in (0, 1)), count


def test_looking_ahead_has_a_budget_of_its_own() -> None:
    line, req, other = MaskWorkQueue(1.0), waiting(0), waiting(1)
    seen = []
    for _ in range(4):
        line.add(req)
        (job,) = line.take(1, False, 8)
        seen.append(job.ahead)
        line.spent(req, 0.1, 0.2)
    assert seen == [8, 8, 8, 0]
    assert [round(used, 6) for used in (req.worked_s, req.looked_s)] == [0.4, 0.8]
    other.level = 1.0
    line.add(req)
    line.add(other)
    assert rids(line.take(1, False)) == [1], "what it has looked ahead counts for its turn"


class Watched(Slow):
    """Takes so many ticks of a clock for a token, and for looking ahead."""

    def __init__(self, ticks: Iterator[float], own: int, ahead: int) -> None:
        super().__init__()
        self.ticks, self.own, self.ahead = ticks, own, ahead

    def accept(self, token: int) -> bool:
        for _ in range(self.own):
            next(self.ticks)
        return super().accept(token)

    def look_ahead(self, guess: Path, most: int) -> None:
        for _ in range(self.ahead):
            next(self.ticks)


@pytest.mark.parametrize(("own", "ahead", "ends"), [(1, 50, False), (50, 1, True)])
def test_a_request_is_only_charged_for_its_own_tokens(own: int, ahead: int, ends: bool) -> None:
    ticks: Iterator[float] = count(0.0, 0.001)
    core = make(constraint_s=0.1)
    submit = Submit(1, array("i", [1]), SamplingParams(max_new_tokens=20))
    core.add(submit, Watched(ticks, own, ahead))
    for _ in range(6):
        for job in core.jobs(9, False):
            (done,) = mask_work.work([job._replace(ahead=8)], ticks.__next__)
            core.worked(done)
        if not core.requests:
            break
        core.commit(step(core), array("i", [7]))
    assert [end.reason for end in core.ended] == [FinishReason.ERROR] * ends


def test_while_the_device_is_busy_all_together_have_so_much_a_step() -> None:
    line = MaskWorkQueue()
    for rid in range(4):
        line.add(waiting(rid))
    assert rids(line.take(2, True)) == [0, 1]
    line.spent(None, mask_work.STEP_S)
    assert line.take(2, True) == []
    assert rids(line.take(1, False)) == [2], "nobody is held up"
    line.step_over()
    assert rids(line.take(2, True)) == [3]


def test_a_thread_comes_back_in_time() -> None:
    ticks: Iterator[float] = accumulate([0.0, 0.004, 0.004, 0.004])
    jobs: list[Job] = [Job(rid, Slow(), (7,)) for rid in range(4)]
    done = mask_work.work(jobs, lambda: next(ticks))
    undone = Verdict.UNDONE
    assert [one.verdict for one in done] == [Verdict.GOES_ON, Verdict.GOES_ON, undone, undone]
    assert [round(one.cpu_s, 6) for one in done] == [0.004, 0.004, 0, 0]
    assert [len(job.constraint.seen) for job in jobs] == [1, 1, 0, 0]  # type: ignore[attr-defined]


def test_what_a_thread_has_left_undone_is_done_later() -> None:
    core = make()
    ask(core, 1)
    core.jobs(9, False)
    assert core.worked(ConstraintDone(1, Verdict.UNDONE)) == []
    assert core.propose() is None
    play(core)
    assert shape(step(core)) == [(1, 4)]


def resume(core: SchedulerCore, outputs: list[int], max_new: int = 9) -> Slow:
    made = Slow()
    params = SamplingParams(max_new_tokens=max_new)
    core.add(Submit(1, array("i", range(4)), params, outputs=array("i", outputs)), made)
    return made


def test_tokens_that_a_request_came_with_are_told_to_its_constraint_in_pieces() -> None:
    core = make()
    made = resume(core, [5, 6, 7, 8])
    assert core.propose() is None, "what comes next is not known"
    ticks: Iterator[float] = count(0.0, 0.003)
    nums = []
    while jobs := core.jobs(9, False):
        (done,) = mask_work.work(jobs, ticks.__next__)
        nums.append(done.num)
        core.worked(done)
    assert nums == [2, 2, 1], "the start and four tokens"
    assert list(made.seen) == [5, 6, 7, 8]
    assert shape(step(core)) == [(1, 8)]
    assert core.generated_tokens == 0


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [([5, WHOLE], FinishReason.STOP), ([5] * 9, FinishReason.LENGTH), ([5, BAD], FinishReason.ERROR), ([AGAIN, 5], FinishReason.ERROR)],
)  # fmt: skip
def test_a_request_that_came_with_its_end_ends(outputs: list[int], reason: FinishReason) -> None:
    core = make()
    resume(core, outputs)
    assert play(core) == []
    assert reasons(core) == {1: (reason, len(outputs))}
    assert core.propose() is None
