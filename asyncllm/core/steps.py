"""Requests, lanes and the rows of a step, as the scheduler keeps them.

Plain data and properties derived from it; makes no decisions.

A request's life on the device is a :class:`Lane`. Its tokens, left to right:

    [0, planned)          computed, or will be by a launched step; ``planned`` advances at planning
    [planned, known)      still to compute: prompt, and what a preempted life generated
    known = prompt + outputs; outputs grow at commit, trailing planned by up to the pipeline's depth
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from asyncllm.codec import INT32, INT64
from asyncllm.constrain.protocol import NO_PATH, Constraint, Path
from asyncllm.core.ngram_lookup import NgramLookup
from asyncllm.core.request import SamplingParams
from asyncllm.core.step_times import StepSize
from asyncllm.messages import MAX_COUNT, StepDone, StepPlan, Submit

NO_TOKEN = -1  # in a plan: the lane's last sampled token; in a result: none came out


@dataclass(slots=True, eq=False)
class Lane:
    """One life of a request on the device."""

    number: int
    fill_len: int  # tokens known when it was opened; rows carry token ids up to here
    late: int = 0  # the last ones of these, not sent to the allocator yet
    planned: int = 0
    inflight: int = 0  # rows of launched steps and of the open reservation
    opened: bool = False  # the allocator knows it
    seen: bool = False  # the runners know it
    over: bool = False  # its results are discarded; released when nothing is in flight
    leaves: array[int] = field(default_factory=lambda: array(INT32))  # when over: for the cache
    drafts: Sequence[int] = ()  # of the open proposal
    masks: Sequence[bytes] = ()  # what may follow each, if it has a mask of its own
    num_counted: int = 0  # how many of the first drafts are for the request's own figures
    # for K/V transfers, see core.transfer_tracker
    imports: bool = False  # its slots are filled by transfers
    imported: array[int] = field(default_factory=lambda: array(INT32))  # not in any step yet
    slot_holds: int = 0  # transfers that may still access its slots


@dataclass(slots=True, eq=False)
class Request:
    """One request from Submit to Finished. It is waiting while it has no lane or no granted
    slots."""

    rid: int
    prompt: array[int]
    params: SamplingParams
    max_new: int
    end_ids: frozenset[int]  # token ids that end it
    outputs: array[int] = field(default_factory=lambda: array(INT32))
    lane: Lane | None = None
    cached_len: int = -1  # prompt tokens of the first life's prefix hit; -1: none yet
    scored: int = 0  # prompt tokens whose log-probabilities have been sent
    constraint: Constraint | None = None  # has accepted all outputs except those in todo
    # tokens that the constraint has not accepted yet, each with the row it is from; the first is
    # queued for a thread or with one. (None, None, 0): it has not been started; (token, None, 0):
    # an output that the request came with
    todo: deque[tuple[int | None, Step | None, int]] = field(default_factory=deque)
    worked_s: float = 0.0  # CPU time that threads spent on the masks of its own tokens
    looked_s: float = 0.0  # and on looking ahead
    level: float = -1.0  # see mask_work.MaskWorkQueue
    leaves_at: int = MAX_COUNT  # number of outputs after which it continues elsewhere
    until: int = 0  # number of outputs after which it ends here
    final_len: int = (
        0  # tokens to compute until its last output is sampled (or the prompt is scored)
    )
    imports: bool = False  # K/V of its tokens are imported from another server
    lacks: bool = False  # the token that follows them has not arrived yet
    after: int = -1  # the rid whose prompt it waits for
    client: int = 0  # waiting clients are served round-robin
    lookup: NgramLookup | None = None  # over prompt and outputs, if tokens are guessed
    prediction: array[int] = field(default_factory=lambda: array(INT32))  # as in Submit
    drafted: int = 0  # draft tokens tried; of the prediction only, if there is one
    # those that were right: for each, the number of outputs up to it
    accepted_at: array[int] = field(default_factory=lambda: array(INT32))
    num_uncounted: int = 0  # outputs that only repeat the prompt's text

    @classmethod
    def of(cls, msg: Submit, eos_ids: frozenset[int]) -> Request:
        """From ``Submit``, whose ``max_new_tokens`` has been resolved to an int."""
        params, outputs = msg.params, msg.outputs
        if params.prompt_logprobs >= 0 and (outputs or msg.imports):
            params = replace(params, prompt_logprobs=-1)  # sent with the first of the outputs
        max_new = params.max_new_tokens
        assert max_new is not None, f"request {msg.rid}: max_new_tokens is unset"
        end_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids |= eos_ids
        req = cls(msg.rid, msg.prompt, params, max_new, end_ids, outputs[:])
        req.client, req.prediction = msg.client, msg.prediction
        req.imports = req.lacks = msg.imports
        if msg.exports is not None:
            req.leaves_at = len(outputs) + 1
        req.grow(0)
        return req

    @property
    def known_len(self) -> int:
        return len(self.prompt) + len(self.outputs)

    def ahead(self, lane: Lane) -> int:
        """How many tokens before the next one to plan are not known yet."""
        return lane.planned + 1 - self.known_len

    @property
    def ready(self) -> bool:
        """Whether it can be placed: its first row lacks nothing, or its K/V are imported first."""
        return self.imports or not (self.todo or self.lacks)

    def grow(self, num: int) -> None:
        """Raise the output limit: this many outputs do not count."""
        self.max_new += num
        self.num_uncounted += num
        self.until = min(self.max_new, self.leaves_at)
        self.final_len = len(self.prompt) + max(self.until - 1, 0)

    def next_todo(self) -> tuple[int | None, ...]:
        """What the constraint can take in one go: a row's token, or all outputs it arrived with."""
        came = tuple(token for token, _, _ in takewhile(lambda todo: todo[1] is None, self.todo))
        return came or (self.todo[0][0],)

    def guess(self, num: int) -> Path:
        """Up to ``num`` tokens that are likely to follow those sampled so far, without masks."""
        if not num or self.lookup is None or not self.lookup.guesses:
            return NO_PATH
        chances = self.lookup.chances(num)
        num_predicted = len(chances) if self.lookup.is_predicted else 0
        return Path([*self.lookup.guess(len(chances))], chances, num_predicted=num_predicted)

    def num_accepted(self, num_tokens: int) -> int:
        """How many of the first ``num_tokens`` outputs that count were drafts."""
        return bisect_right(self.accepted_at, num_tokens + self.num_uncounted)

    @property
    def launched(self) -> bool:
        """The whole prompt has been computed, or will be by a launched step."""
        return self.lane is not None and self.lane.planned >= len(self.prompt)

    @property
    def shares(self) -> bool:
        """May use the prefix cache."""
        return self.params.shares_prefix

    @property
    def needs_ids(self) -> bool:
        """The device needs the token ids themselves, not only their KV."""
        p = self.params
        penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or p.prompt_logprobs >= 0


Row = tuple[Request, Lane, int]  # the third is the proposed token count


@dataclass(slots=True)
class Step:
    """A planned step: what the runners get, and which request each row belongs to."""

    plan: StepPlan
    rows: list[Row]
    result: StepDone | None = None  # for the shell: see Emitted
    # rows whose input is a draft: a draft is right if the previous row, of the same lane, yields
    # that token and is itself right
    drafts: set[int] = field(default_factory=set)
    # of these: for the request's own figures; once the results are there, only right ones
    counted: set[int] = field(default_factory=set)
    num_unmasked: int = 0  # without a mask of their own
    launched_at: float = 0.0  # for the shell: seconds

    @property
    def decodes(self) -> bool:
        """Whether every row has one token."""
        return self.plan.num_decode == len(self.rows)

    @property
    def size(self) -> StepSize:
        """The inputs for predicting its time."""
        num_tokens = len(self.plan.tokens)
        num_read = sum(self.plan.starts) + num_tokens
        return StepSize(num_tokens, num_read, len(self.rows), self.decodes)

    def constrain(self, row: int, req: Request, lane: Lane, end: int) -> None:
        """Mask row ``row``, which computes the tokens before ``end``, by the tokens allowed next,
        as far as they are known."""
        if req.constraint is None or req.todo:
            return  # the token is checked when it is accepted
        num_drafts = end - req.known_len if lane.masks else 0
        if mask := lane.masks[num_drafts - 1] if num_drafts else req.constraint.mask():
            self.plan.masked.append(row)
            self.plan.masks.extend(mask)


@dataclass(frozen=True, slots=True)
class Emitted:
    """Tokens of a committed step, or part of them: parallel columns, one entry per token."""

    step: Step
    rids: array[int]  # int64
    tokens: array[int]
    ends: bytearray
    rows: list[int]  # where in the step

    @classmethod
    def of(cls, step: Step) -> Emitted:
        """Nothing yet."""
        return cls(step, array(INT64), array(INT32), bytearray(), [])
