"""Every message that crosses an actor boundary, with its tag.

Commands are imperative, events are past. Columns are arrays of int32 unless a comment says
otherwise; nobody changes a column once it has been sent. ``rid`` is ``endpoint << 40 | counter`` of
the frontend that took the request; a *lane* is a request's place in the device tables; a *slot* the
KV of one token. Tags are never reused. ``coordinator`` is the watchdog of the server's coordinator,
``@leader`` an actor of the group's leader (see ``topology``).
"""

from __future__ import annotations

from array import array
from dataclasses import field
from math import isfinite

from asyncllm.codec import INT32, Message, message
from asyncllm.core.request import GRAMMARS, Reason, SamplingParams
from asyncllm.records import Answered, Done, Failure, Load, Logprobs, Opened, int32s, int64s
from asyncllm.topology import Contract, Endpoint, Topology

FRONTEND_SHIFT = 40  # rid >> FRONTEND_SHIFT is the endpoint of the request's frontend
MAX_RID = (1 << 63) - 1
MAX_COUNT = (1 << 31) - 1  # of tokens; columns are int32


def _is_rid(rid: int) -> bool:
    return 0 <= rid <= MAX_RID


def _natural(*columns: array[int]) -> bool:
    """No value is negative: no sign bit is set (the columns are little-endian)."""
    return all(
        column.tobytes()[column.itemsize - 1 :: column.itemsize].isascii() for column in columns
    )


def _counts(*values: int) -> bool:
    return all(0 <= value <= MAX_COUNT for value in values)


# -- a request comes in -----------------------------------------------------------------------


@message(1)
class Tokenize(Message):
    """frontend -> tokenizer (same process). Exactly one of ``text``, ``ids`` and ``chat`` is set.

    The answer is one ``Accepted`` for the whole group (under its first rid), or one ``Finished``
    with reason ERROR (under its first rid).
    """

    rids: tuple[int, ...]  # one per choice of the same prompt (n); seed + i for the i-th
    text: str | None
    ids: array[int] | None
    chat: bytes | None  # JSON: {"messages": [...], "tools": [...] | null, "kwargs": {...}}
    add_special_tokens: bool  # for text only; chat templates bring their own
    params: SamplingParams
    shown: tuple[str, ...] = ()  # special tokens that are in the text whatever the params say
    reasoning: str = ""  # the format of reasoning in the answers to a chat, "": none
    continued: str = ""  # of a chat: the end of the prompt that is the beginning of the answer
    truncate: int = 0  # keep only that many of the prompt's last tokens; 0: all
    client: int = 0  # stands for an API key or an address; clients that wait are served in turn


@message(2)
class Accepted(Message):
    """tokenizer -> frontend (same process): the prompt is valid and on its way."""

    rid: int
    prompt: array[int]
    head: str = ""  # of a chat: the end of the prompt's text, without a message to be continued
    cut: bool = False  # tokens of the prompt as it was sent are not in ``prompt``


@message(3)
class Submit(Message):
    """tokenizer -> scheduler, by the balancer where there are several groups."""

    rid: int
    prompt: array[int]
    params: SamplingParams  # max_new_tokens is an int here
    thoughts: str = ""  # where the answer begins: "open", "closed" or "none" (inside reasoning,
    # behind it, neither), "": reasoning is content
    after: int = -1  # the rid of the first request for this prompt, if this is another
    # texts of tokens taken off the end of the prompt, with which the output begins
    healed: tuple[bytes, ...] = ()
    client: int = 0  # as in Tokenize

    def valid(self) -> bool:
        return _is_rid(self.rid) and self.thoughts in ("open", "closed", "none", "")

    def fits(self, vocab_size: int, max_len: int) -> bool:
        """Whether it is within the limits that its tokenizer has held it against."""
        prompt, params = self.prompt, self.params
        if params.max_new_tokens is None or len(prompt) + params.max_new_tokens > max_len:
            return False
        ids = min(prompt, default=0), max(prompt, default=0)
        return params.possible(vocab_size) and ids[0] >= 0 and ids[1] < vocab_size


@message(4)
class Abort(Message):
    """frontend -> tokenizer -> scheduler, urgent, on the way of what begins the request, behind it.

    The tokenizer passes it on unless the request is still there; unknown and ended ids are ignored.
    """

    rid: int

    def valid(self) -> bool:
        return _is_rid(self.rid)


@message(9)
class Cancel(Message):
    """frontend -> coordinator -> every frontend: end requests early,
    each with what it has so far."""

    request_id: str  # the client's X-Request-Id or the answer's id; "": all requests


@message(5)
class Follow(Message):
    """tokenizer -> detokenizer (same process), before Submit:
    how to turn this request's ids to text."""

    rid: int
    prompt_tail: array[int]  # the last few prompt ids, where decoding depends on what came before
    stop: tuple[str, ...]
    skip_special_tokens: bool
    print_eos: bool
    shown: tuple[str, ...] = ()  # as in Tokenize
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    healed: bytes = b""  # the output begins with this text of the prompt; it is not shown again


@message(6)
class Count(Message):
    """frontend -> tokenizer (same process): how many tokens is this text?"""

    query: int
    text: str
    add_special_tokens: bool
    chat: bytes | None = None  # instead of the text, as in Tokenize
    client: int = 0  # as in Tokenize


@message(7)
class Counted(Message):
    """tokenizer -> frontend."""

    query: int
    num_tokens: int = 0
    failure: Failure | None = None  # why they were not counted


@message(8)
class Prepared(Message):
    """tokenizer -> itself: what a thread of its pool answered, or that the time was up."""

    job: int
    ids: array[int] = field(default_factory=int32s)
    failure: Failure | None = None
    frees: bool = True  # the thread is free again; False: the answer is late, the thread still busy
    head: str = ""  # as in Accepted
    cut: bool = False  # as in Accepted


@message(26)
class Compile(Message):
    """tokenizer -> grammar@leader: make this grammar ready; the answer is ``Compiled``.

    Where there are several groups the balancer tells all leaders, and each of them answers.
    """

    endpoint: int  # where the tokenizer is
    job: int
    kind: str  # see core.request.GRAMMARS
    text: str
    client: int = 0  # as in Tokenize

    def valid(self) -> bool:
        return self.endpoint >= 0 and self.job >= 0 and self.kind in GRAMMARS


@message(27)
class Compiled(Message):
    """grammar@leader -> tokenizer: requests with this grammar can be submitted, or why not."""

    job: int
    failure: Failure | None = None

    def valid(self) -> bool:
        return self.failure is None or self.failure.valid


@message(28)
class Built(Message):
    """grammar@leader -> itself: what a thread of its pool answered."""

    kind: str
    text: str
    failure: Failure | None = None


@message(29)
class Worked(Message):
    """scheduler -> itself: what a thread has done for constraints."""

    done: tuple[Done, ...]


# -- a step --------------------------------------------------------------------------------------


@message(10)
class Reserve(Message):
    """scheduler -> allocator: slots for the next ``counts[i]`` tokens of each lane, in this order.

    ``opened`` names lanes seen for the first time, with their tokens; the allocator looks those up
    in the prefix cache. ``launched`` names lanes whose granted prompt tokens have been launched
    since the last Reserve, so that they may be shared from now on.
    """

    lanes: array[int]
    counts: array[int]
    opened: tuple[tuple[int, array[int], bool], ...]  # (lane, prompt ids, may use the prefix cache)
    launched: array[int]


@message(11)
class Granted(Message):
    """allocator -> scheduler: the first ``len(counts)`` rows of the reservation have their slots.

    Row i brings ``hits[i]`` cached tokens (0 unless it was opened) and room for ``counts[i]`` new
    ones (fewer than asked where the hit leaves less to compute).
    """

    hits: array[int]
    counts: array[int]
    slots: array[int]  # int32[sum(hits + counts)], row by row: cached slots, then new ones
    available: int  # free slots plus evictable ones, after this grant
    # where layers with a window have a slot space of their own: the same of that space; cached
    # tokens that nobody sees any more have a slot there that nobody reads
    sliding: array[int] = field(default_factory=int32s)
    sliding_available: int = 0


@message(12)
class Release(Message):
    """scheduler -> allocator: these lanes are over; no launched step touches them.

    ``items``: (lane, generated ids whose KV is valid). Prompt and generated tokens stay in the
    prefix cache.
    """

    items: tuple[tuple[int, array[int]], ...]
    launched: array[int]  # as in Reserve; a request may end before another Reserve is sent


@message(13)
class StepPlan(Message):
    """scheduler -> runner of every tp rank. Rows with one new token come first.

    Row i computes tokens at positions [starts[i], starts[i] + counts[i]) of lane i. Its slots are
    written to the lane's table from position starts[i] - heads[i] on.
    """

    step: int  # 1, 2, 3, ... without a gap
    num_decode: int  # the first rows have counts == 1
    lanes: array[int] = field(default_factory=int32s)
    starts: array[int] = field(default_factory=int32s)
    counts: array[int] = field(default_factory=int32s)
    heads: array[int] = field(default_factory=int32s)  # cached tokens before the new ones: > 0 only
    # in a lane's first step
    slots: array[int] = field(default_factory=int32s)  # sum(heads + counts)
    tokens: array[int] = field(default_factory=int32s)  # sum(counts); -1: the lane's last token
    samples: bytearray = field(default_factory=bytearray)  # 1 where the row ends the known tokens,
    # so that a token comes out
    opened: list[Opened] = field(default_factory=list)
    masked: array[int] = field(default_factory=int32s)  # rows whose token is constrained
    masks: bytearray = field(
        default_factory=bytearray
    )  # int32[len(masked), ceil(vocab_size / 32)]:
    # bit t % 32 of word t // 32 is 1 where token t may come; empty on ranks that do not sample
    # where groups step together: the most tokens that one of them brings, this one included, and
    # whether one brings rows of several tokens
    common: int = 0
    mixed: bool = False
    sliding: array[int] = field(default_factory=int32s)  # as many as slots, those of layers with a
    # window; none: these use ``slots`` as all others do

    def valid(self) -> bool:
        rows = len(self.lanes)
        if not (
            self.step > 0
            and _natural(self.lanes, self.starts, self.counts, self.heads, self.slots, self.masked)
            and _natural(self.sliding)
            and len(self.starts) == len(self.counts) == len(self.heads) == rows
            and len(self.samples) == rows
            and 0 <= self.num_decode <= rows
        ):
            return False
        num_new = sum(self.counts)
        return (
            0 not in self.counts
            and self.counts[: self.num_decode] == array(INT32, [1]) * self.num_decode
            and len(self.tokens) == num_new
            and len(self.slots) == num_new + sum(self.heads)
            and len(self.sliding) in (0, len(self.slots))
            and len(self.masks) % 4 == 0
            and (self.common == 0 or num_new <= self.common <= MAX_COUNT)
        )


@message(14)
class StepDone(Message):
    """runner@leader -> scheduler: a launched step has finished on the device."""

    step: int
    tokens: array[int]  # int32[num_rows], -1 where the row yields none
    logprobs: Logprobs | None  # one per row; None when no row asks
    prompt: tuple[tuple[int, Logprobs], ...] = ()  # row, those of its prompt tokens starts + 1 ..
    device_ms: float = 0.0  # between its first and last operation; 0: not measured


@message(15)
class Due(Message):
    """scheduler -> itself: the step that was held back is to be launched."""


@message(16)
class Progress(Message):
    """scheduler -> balancer, if there is one: what has changed about its requests."""

    begun: array[int] = field(default_factory=int64s)  # rids that have been given a place
    ended: array[int] = field(default_factory=int64s)


@message(17)
class Offer(Message):
    """scheduler -> lockstep, where groups step together: what the group brings to its next step."""

    endpoint: int
    step: int
    num_tokens: int  # 0: nothing, another group wants the step
    mixed: bool  # some rows have more than one token

    def valid(self) -> bool:
        return _counts(self.endpoint, self.step, self.num_tokens)


@message(18)
class Join(Message):
    """lockstep -> scheduler: another group takes this step; offer it as well, if without rows."""

    step: int


@message(19)
class Agreed(Message):
    """lockstep -> every scheduler: every group has offered this step; launch it."""

    step: int
    num_tokens: int  # the most that a group brings
    mixed: bool


# -- tokens go out -------------------------------------------------------------------------------


@message(20)
class Tokens(Message):
    """scheduler -> detokenizer of one frontend's process: what a step gave to its requests."""

    step: int
    rids: array[int]  # int64
    tokens: array[int]
    ends: bytes  # uint8: 1 where the token is the eos or stop token that ended the request
    logprobs: Logprobs | None
    prompt: tuple[tuple[int, Logprobs], ...]  # as in StepDone, with the rid

    def valid(self) -> bool:
        rows = len(self.rids)
        return (
            _natural(self.rids, self.tokens)
            and len(self.tokens) == len(self.ends) == rows
            and (self.logprobs is None or (self.logprobs.whole and len(self.logprobs) == rows))
            and all(_is_rid(rid) and logprobs.whole for rid, logprobs in self.prompt)
        )


@message(21)
class Delta(Message):
    """detokenizer -> frontend (same process): new text of one request,
    possibly of several tokens."""

    rid: int
    text: str  # may be empty: bytes of an unfinished character, a possible stop string
    ids: array[int]
    pieces: tuple[str, ...]  # text of each token alone, as the detokenizer shows it ("" for hidden)
    logprobs: Logprobs | None
    prompt: Logprobs | None  # prompt log-probabilities, once they are there


@message(22)
class StopHit(Message):
    """detokenizer -> scheduler, urgent, on the way of ``Submit``.

    A stop string or a stop sequence ended ``num_tokens``.
    """

    rid: int
    num_tokens: int

    def valid(self) -> bool:
        return _is_rid(self.rid) and _counts(self.num_tokens)


@message(23)
class Finished(Message):
    """scheduler -> detokenizer -> frontend, or tokenizer -> frontend: exactly one per request."""

    rid: int
    reason: Reason
    failure: Failure | None = None  # for ERROR
    cached_len: int = 0  # prompt tokens that came from the prefix cache
    num_tokens: int = 0  # generated tokens
    stop: str = ""  # for STOP: the stop string that was found

    def valid(self) -> bool:
        return (
            _is_rid(self.rid)
            and (self.failure is not None) == (self.reason is Reason.ERROR)
            and (self.failure is None or self.failure.valid)
            and _counts(self.cached_len, self.num_tokens)
        )


@message(24)
class Flush(Message):
    """detokenizer -> itself: go on with the streams that have new tokens."""


# -- the server itself -----------------------------------------------------------------------------


@message(36)
class Hello(Message):
    """every other watchdog -> coordinator: loaded, and this is who I am."""

    endpoint: int
    contract: Contract
    node: int
    address: str  # where its ZMQ socket is bound


@message(32)
class Drain(Message):
    """coordinator -> every frontend and the scheduler: no new requests; running ones may finish."""

    timeout_s: float


@message(33)
class Drained(Message):
    """scheduler or a frontend -> coordinator: nothing is left here."""

    who: str  # "scheduler" or "frontend"
    endpoint: int


@message(34)
class Halt(Message):
    """coordinator -> every watchdog: stop this endpoint now."""


@message(35)
class Started(Message):
    """coordinator -> every frontend: warm and complete; open the doors."""


@message(37)
class Lost(Message):
    """coordinator -> every other watchdog: the server fails; end what runs with an error."""


@message(47)
class Welcome(Message):
    """coordinator -> every other one: all are there, or one of them does not belong."""

    contract: Contract
    topology: Topology


@message(38)
class Gone(Message):
    """coordinator -> balancer and every scheduler: an endpoint's process has ended.

    Its requests have ended with it.
    """

    endpoint: int


@message(39)
class Replaced(Message):
    """the process -> coordinator: an HTTP worker has ended; another one starts in its place."""

    endpoint: int
    by: Endpoint | None  # None: none, the server is ending


@message(40)
class Scrape(Message):
    """frontend -> coordinator: state of the whole server, please."""

    query: int
    endpoint: int


@message(41)
class Scraped(Message):
    """coordinator -> frontend."""

    query: int
    exposition: bytes  # Prometheus text
    loads: tuple[Load, ...]  # of each group


@message(42)
class Probe(Message):
    """coordinator -> ``Topology.reporters``: report what you hold."""

    query: int


@message(43)
class SchedulerStats(Message):
    """scheduler -> coordinator."""

    query: int = 0
    endpoint: int = 0
    running: int = 0
    waiting: int = 0
    inflight_steps: int = 0
    steps: int = 0  # since the start, as those below
    preemptions: int = 0
    prompt_tokens: int = 0  # computed: without those from the prefix cache, twice if preempted
    generated_tokens: int = 0
    expected_slots: int = 0  # held and promised now


@message(44)
class AllocatorStats(Message):
    """allocator -> coordinator."""

    query: int = 0
    endpoint: int = 0
    used: int = 0  # slots held by requests
    cached: int = 0
    total: int = 0
    hit_tokens: int = 0  # since the start, as those below
    looked_up_tokens: int = 0
    evicted_tokens: int = 0
    # of the space of layers with a window, where there is one
    sliding_used: int = 0
    sliding_cached: int = 0
    sliding_total: int = 0
    evicted_sliding: int = 0


@message(45)
class Served(Message):
    """frontend -> coordinator: HTTP requests have been answered."""

    answers: tuple[Answered, ...]

    def valid(self) -> bool:
        return all(
            100 <= a.status <= 599
            and _counts(a.prompt_len, a.num_tokens)
            and all(map(isfinite, (a.ttft_s, a.tpot_s, a.total_s)))
            for a in self.answers
        )


@message(46)
class RunnerStats(Message):
    """runner -> coordinator: medians of the last steps."""

    query: int = 0
    endpoint: int = 0
    step_ms: float = 0.0
    launch_ms: float = 0.0
    gap_ms: float = 0.0  # device idle between two steps that were both launched; 0: not measured
    jit_after_warmup: int = 0
