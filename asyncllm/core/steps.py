"""Requests, lanes and the rows of a step, as the scheduler keeps them.

Plain data and what follows from it; decides nothing.

A request's life on the device is a :class:`Lane`. Its tokens, left to right:

    [0, planned)          computed, or will be by a launched step; ``planned`` advances at planning
    [planned, known)      the gap that the next steps close: prompt, and what a preempted life made
    known = prompt + outputs; outputs grow at commit, up to the pipeline's depth behind planned
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import takewhile

from asyncllm.codec import INT32, INT64
from asyncllm.constrain.protocol import Constraint
from asyncllm.core.request import SamplingParams
from asyncllm.messages import MAX_COUNT, StepDone, StepPlan

NO_TOKEN = -1  # in a plan: the lane's last sampled token; in a result: none came out


@dataclass(slots=True, eq=False)
class Lane:
    """One life of a request on the device."""

    number: int
    fill_len: int  # tokens known when it was opened; up to here rows carry their tokens
    late: int = 0  # the last ones of these, which the allocator has not been told
    planned: int = 0
    inflight: int = 0  # rows of launched steps and of the open reservation
    opened: bool = False  # the allocator knows it
    seen: bool = False  # the runners know it
    over: bool = False  # results no longer count; released when nothing is in flight
    leaves: array[int] = field(default_factory=lambda: array(INT32))  # when over: for the cache
    # where K/V move, see core.moving
    imports: bool = False  # its slots are filled by others
    imported: array[int] = field(default_factory=lambda: array(INT32))  # which no step knows yet
    touches: int = 0  # by others, of its slots


@dataclass(slots=True, eq=False)
class Request:
    """One request from Submit to Finished. It waits while it has no lane, or one not granted."""

    rid: int
    prompt: array[int]
    params: SamplingParams
    max_new: int
    end_ids: frozenset[int]  # tokens that end it
    outputs: array[int] = field(default_factory=lambda: array(INT32))
    lane: Lane | None = None
    cached_len: int = -1  # prompt tokens of the first life's prefix hit; -1: none yet
    scored: int = 0  # prompt tokens whose log-probabilities have been passed on
    constraint: Constraint | None = None  # has accepted the outputs, but for those in todo
    # tokens that the constraint has not accepted yet, each with the row it is from; the first is in
    # line for a thread or with one. (None, None, 0): it has not been started; (token, None, 0): an
    # output that the request came with
    todo: deque[tuple[int | None, Step | None, int]] = field(default_factory=deque)
    worked_s: float = 0.0  # CPU time of threads for the constraint
    level: float = -1.0  # see masking.Line
    leaves_at: int = MAX_COUNT  # outputs at which it goes on elsewhere
    until: int = 0  # outputs at which it ends here
    final_len: int = (
        0  # tokens to compute until the last of them comes out (or the prompt is scored)
    )
    imports: bool = False  # K/V of its tokens are to come from another server
    lacks: bool = False  # the token behind them has not come from there
    after: int = -1  # the rid it is held behind
    client: int = 0  # whose it is: clients that wait are served in turn

    @classmethod
    def of(
        cls,
        rid: int,
        prompt: array[int],
        params: SamplingParams,
        eos_ids: frozenset[int],
        outputs: array[int],
        *,
        imports: bool = False,
        exports: bool = False,
    ) -> Request:
        """From the fields of ``Submit``; ``max_new_tokens`` has been resolved to an int."""
        if params.prompt_logprobs >= 0 and (outputs or imports):
            params = replace(params, prompt_logprobs=-1)  # told with the first of the outputs
        max_new = params.max_new_tokens
        assert max_new is not None, f"request {rid}: max_new_tokens is open"
        end_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids |= eos_ids
        req = cls(rid, prompt, params, max_new, end_ids, outputs[:])
        req.imports = req.lacks = imports
        if exports:
            req.leaves_at = len(outputs) + 1
        req.grow(0)
        return req

    @property
    def known_len(self) -> int:
        return len(self.prompt) + len(self.outputs)

    def ahead(self, lane: Lane) -> int:
        """Tokens before the next one to be planned that are not known yet."""
        return lane.planned + 1 - self.known_len

    @property
    def ready(self) -> bool:
        """It can be given a place: its first row samples by what is known, or comes later."""
        return self.imports or not (self.todo or self.lacks)

    def grow(self, num: int) -> None:
        """That many of its outputs do not count."""
        self.max_new += num
        self.until = min(self.max_new, self.leaves_at)
        self.final_len = len(self.prompt) + max(self.until - 1, 0)

    def next_todo(self) -> tuple[int | None, ...]:
        """What the constraint can be told at once: a token of a row, or all that it came with."""
        came = tuple(token for token, _, _ in takewhile(lambda todo: todo[1] is None, self.todo))
        return came or (self.todo[0][0],)

    @property
    def launched(self) -> bool:
        """All of the prompt is computed, or will be by a launched step."""
        return self.lane is not None and self.lane.planned >= len(self.prompt)

    @property
    def shares(self) -> bool:
        """May use the prefix cache."""
        return self.params.shares_prefix

    @property
    def needs_ids(self) -> bool:
        """The device needs the known tokens themselves, not only their KV."""
        p = self.params
        penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or p.prompt_logprobs >= 0


Row = tuple[Request, Lane, int]  # the third: the count it was proposed with


@dataclass(slots=True)
class Step:
    """A planned step: what the runners get, and whose rows they are."""

    plan: StepPlan
    rows: list[Row]
    result: StepDone | None = None  # for the shell: see Emitted

    @property
    def decodes(self) -> bool:
        """Every row brings one token."""
        return self.plan.num_decode == len(self.rows)

    def constrain(self, row: int, req: Request) -> None:
        """Row ``row`` samples one of the tokens that may come next, as far as that is known."""
        if req.constraint is None or req.todo:
            return  # the token will be looked at when it is accepted
        if mask := req.constraint.mask():
            self.plan.masked.append(row)
            self.plan.masks.extend(mask)


@dataclass(frozen=True, slots=True)
class Emitted:
    """What a committed step gave, or a part of it: parallel columns, one entry per token."""

    step: Step
    rids: array[int]  # int64
    tokens: array[int]
    ends: bytearray
    rows: list[int]  # where in the step

    @classmethod
    def of(cls, step: Step) -> Emitted:
        """Nothing yet."""
        return cls(step, array(INT64), array(INT32), bytearray(), [])
