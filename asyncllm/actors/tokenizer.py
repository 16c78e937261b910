"""Tokenizer: renders chats, encodes prompts, checks lengths, and submits requests.

Owns the thread pool that renders and encodes, and the requests waiting for it. Knows neither
HTTP nor steps.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol, assert_never

import numpy as np

from asyncllm import templates
from asyncllm.actors.base import Actor
from asyncllm.api.common.errors import NotServing
from asyncllm.api.parsing.reasoning import prompt_state
from asyncllm.codec import INT32
from asyncllm.core.admission import FairQuota
from asyncllm.core.fair_queue import FairQueue
from asyncllm.core.faults import contained
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.core.truncation import encode_ends, shortened
from asyncllm.errors import PromptTooLong, RequestError, ServerBusy
from asyncllm.messages import (
    Abort,
    Accepted,
    CompileGrammar,
    CountTokens,
    Finished,
    GrammarReady,
    GroupRemoved,
    OpenTextStream,
    PromptEncoded,
    Submit,
    Tokenize,
    TokensCounted,
)
from asyncllm.messages.checks import are_below
from asyncllm.records import Failure, Overflow
from asyncllm.text import ModelTokenizer

MOST_HEALED = 2  # tokens removed from a prompt's end, as in LightLLM
TAIL_TOKENS = 8  # prompt ids that the detokenizer gets: more than any character needs
MIN_CHARS_PER_TOKEN = 16  # minimum, if the longest token is shorter; also for /tokens
# A prompt takes one place in its queue per PLACE_CHARS characters, so a queue holds up to 32 Mi
# characters: 8 s of English for one thread on a slow core, 37 s of digits (1 token each). A prompt
# of several places is long: at least one thread takes no long prompts, so that short ones do not
# wait for them.
PLACE_CHARS = 32 << 10
COUNT_S = 5.0  # requests to count that have waited longer were given up (Limits.query_s)
LIMIT_FLAG = "--max_req_total_len"
INPUT_FLAG = "--max_req_input_len"

Inbox = Tokenize | Abort | CountTokens | PromptEncoded | GrammarReady | GroupRemoved


@dataclass(slots=True, eq=False)
class _PromptJob:
    """A prompt being processed; ``alive``: those of its requests that were not aborted."""

    msg: Tokenize | CountTokens
    alive: list[int]
    since: float  # in the loop's time
    head: str = ""  # see Prepared
    ids: array[int] = field(default_factory=lambda: array(INT32))  # once known
    cut: bool = False  # whether ids were left out
    prediction: array[int] = field(default_factory=lambda: array(INT32))
    dropped: int = 0  # tokens at the end that the output regenerates
    compiling: set[int] = field(default_factory=set)  # leaders whose grammar is not ready
    params: SamplingParams = field(
        default_factory=SamplingParams
    )  # with max_new_tokens resolved, of a Tokenize


class ChatRenderer(Protocol):
    """See :class:`asyncllm.actors.renderer.ChatRenderer`."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    async def render(self, chat: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _JobQueue:
    """Jobs waiting for a thread, by number, and the places they take."""

    jobs: FairQueue[int]
    places: FairQuota


class Tokenizer(Actor[Inbox]):
    """Every Tokenize ends in Accepted or in Finished, every CountTokens in TokensCounted.

    Args:
        text: the model's tokenizer.
        renderer: renders chats to text.
        limit: prompt and generated tokens of one request (--max_req_total_len).
        input_limit: prompt tokens of one request (--max_req_input_len); None: ``limit``.
        truncation: what to do with longer prompts (--long_truncation_mode): "None": refuse them;
            "head": drop the beginning; "center": drop the middle.
        vocab_size: ids the model has rows for.
        most_new: default of max_new_tokens; None: as many as fit.
        heals: the end of a text is regenerated (--token_healing_mode).
        workers: number of encoding threads.
        time_limit_s: for encoding a prompt; the thread stays busy until it is done.
        max_queue: prompts that may wait for a thread; a long one counts as several (PLACE_CHARS).
    """

    remote = frozenset({GrammarReady})
    orders = frozenset({GroupRemoved})

    def __init__(
        self,
        text: ModelTokenizer,
        renderer: ChatRenderer,
        *,
        limit: int,
        vocab_size: int,
        input_limit: int | None = None,
        most_new: int | None = None,
        truncation: str = "None",
        heals: bool = False,
        workers: int = 2,
        time_limit_s: float = 10.0,
        max_queue: int = 1024,
    ) -> None:
        super().__init__("tokenizer")
        self._text, self._limit, self._vocab_size = text, limit, vocab_size
        self._input_limit, self._truncation = input_limit or limit, truncation
        self._heals, self._most_new = heals, most_new
        self._input_flag = LIMIT_FLAG if input_limit is None else INPUT_FLAG
        self._renderer = renderer
        # a text with more characters cannot fit, so it is refused without encoding it
        self._chars_per_token = max(MIN_CHARS_PER_TOKEN, text.max_piece_chars)
        self._workers, self._time_limit_s = workers, time_limit_s
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenizer")
        self._running: dict[int, bool] = {}  # jobs with a thread -> whether they are long
        self._jobs: dict[int, _PromptJob] = {}
        self._job_of: dict[int, int] = {}  # rid -> job
        # jobs without a thread yet: short ones, long ones
        self._lines = tuple(_JobQueue(FairQueue(), FairQuota(max_queue)) for _ in range(2))
        self._last_job = 0

    @property
    def waiting(self) -> int:
        """Prompts not yet answered."""
        return len(self._jobs)

    def started(self) -> None:
        self.frontend = self.system.ref("frontend")
        self.detokenizer = self.system.ref("detokenizer")
        self.scheduler = self.system.at_intake("scheduler")
        self.grammar = self.system.at_intake("grammar")
        self._leaders = frozenset(self.system.topology.placed("grammar"))
        if self._text.templates:
            self._renderer.start()

    def receive(self, batch: list[Inbox]) -> None:
        for msg in batch:
            match msg:
                case Tokenize() | CountTokens():
                    self._take(msg)
                case Abort():
                    self._abort(msg)
                case PromptEncoded():
                    self._prepared(msg)
                case GrammarReady():
                    self._compiled(msg)
                case GroupRemoved(_, endpoint):
                    self._leaders -= {endpoint}
                    for number, job in [*self._jobs.items()]:
                        self._compiled_at(endpoint, number, job)
                case _:
                    assert_never(msg)

    def stopped(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._renderer.stop()

    # -- waiting for a thread ----------------------------------------------------------------------

    def _take(self, msg: Tokenize | CountTokens) -> None:
        self._last_job += 1
        number = self._last_job
        rids = list(msg.rids) if isinstance(msg, Tokenize) else []
        job = self._jobs[number] = _PromptJob(msg, rids, self.system.loop.time())
        for rid in job.alive:
            self._job_of[rid] = number
        if isinstance(msg, Tokenize) and msg.ids is not None:
            ids, job.cut = _fitted(msg.ids, self._keeps(msg))
            self._answer(number, job, ids)
        elif (error := self._too_long(msg)) is not None:
            self._forget(number, job)
            self._refuse(job, Failure.of(error))
        else:
            self._wait(number, job)

    def _forget(self, number: int, job: _PromptJob) -> None:
        del self._jobs[number]
        for rid in job.alive:
            del self._job_of[rid]

    def _wait(self, number: int, job: _PromptJob) -> None:
        client, line = job.msg.client, self._line(job.msg)
        if line.places.room(client) <= 0:
            self._drop_given_up(line)
        if line.places.room(client) <= 0:
            self._forget(number, job)
            error = ServerBusy(
                f"prompts of this client in {line.places.of(client)} places (of {PLACE_CHARS} "
                f"characters) and {line.places.total} together wait to be tokenized, at most "
                f"{line.places.most} may, half of them of one client while others wait; try "
                "again later"
            )
            self._refuse(job, Failure.of(error))
            return
        line.jobs.append(client, number, number)
        line.places.take(client, _places(job.msg))
        self._start_some()

    def _start_some(self) -> None:
        while len(self._running) < self._workers and (number := self._next()) >= 0:
            job = self._jobs[number]
            msg, line = job.msg, self._line(job.msg)
            line.jobs.serve(msg.client, number)
            line.places.give(msg.client, _places(msg))
            if self._given_up(job):
                self._drop(number, job)
            else:
                self._running[number] = _places(msg) > 1
                self.spawn(self._run(number, msg))

    def _next(self) -> int:
        """The next job for a thread, chosen fairly among short and long ones;
        -1 if there is none."""
        short, long = (next(iter(line.jobs), -1) for line in self._lines)
        if long < 0 or sum(self._running.values()) >= max(self._workers - 1, 1):
            return short
        return long if short < 0 else min(short, long)

    def _line(self, msg: Tokenize | CountTokens) -> _JobQueue:
        return self._lines[_places(msg) > 1]

    def _given_up(self, job: _PromptJob) -> bool:
        return isinstance(job.msg, CountTokens) and self.system.loop.time() - job.since > COUNT_S

    def _drop_given_up(self, line: _JobQueue) -> None:
        for number in [each for each in line.jobs if self._given_up(self._jobs[each])]:
            job = self._jobs[number]
            self._leave_line(number, job)
            self._drop(number, job)

    def _drop(self, number: int, job: _PromptJob) -> None:
        self._forget(number, job)
        self._refuse(job, Failure.of(NotServing(f"not counted within {COUNT_S:g} s")))

    def _leave_line(self, number: int, job: _PromptJob) -> None:
        """Remove a job from its queue, if it is in one, without using up its client's turn."""
        client, line = job.msg.client, self._line(job.msg)
        if line.jobs.has(client, number):
            line.jobs.discard(client, number)
            line.places.give(client, _places(job.msg))

    async def _run(self, number: int, msg: Tokenize | CountTokens) -> PromptEncoded:
        rendered = b""
        try:
            if msg.chat is not None:
                rendered = await self._renderer.render(msg.chat)
        except RequestError as error:
            return PromptEncoded(number, failure=Failure.of(error))
        work = self.system.loop.run_in_executor(
            self._pool, contained, self._ids, number, msg, rendered
        )
        try:
            async with asyncio.timeout(self._time_limit_s):
                return await asyncio.shield(work)
        except TimeoutError:
            self.spawn(self._late(number, work))
            detail = f"the prompt could not be prepared in {self._time_limit_s:g} s"
            return PromptEncoded(number, failure=Failure(detail, param="prompt"), frees=False)
        except RequestError as error:
            return PromptEncoded(number, failure=Failure.of(error))

    async def _late(self, number: int, work: asyncio.Future[PromptEncoded]) -> PromptEncoded:
        """Free the thread of a job that has already been answered."""
        with contextlib.suppress(RequestError):
            await work
        return PromptEncoded(number)

    def _prepared(self, msg: PromptEncoded) -> None:
        if msg.frees:
            del self._running[msg.job]
            self._start_some()
        if (job := self._jobs.get(msg.job)) is None:
            return
        job.head, job.cut, job.prediction = msg.head, msg.cut, msg.prediction
        if msg.failure is not None:
            self._forget(msg.job, job)
            self._refuse(job, msg.failure)
        else:
            self._answer(msg.job, job, msg.ids)

    def _compiled(self, msg: GrammarReady) -> None:
        if (job := self._jobs.get(msg.job)) is None or msg.endpoint not in job.compiling:
            return
        if msg.failure is None:
            self._compiled_at(msg.endpoint, msg.job, job)
            return
        self._forget(msg.job, job)
        self._refuse(job, msg.failure)

    def _compiled_at(self, leader: int, number: int, job: _PromptJob) -> None:
        """Submit a request once all leaders are ready, since any group may get it."""
        if leader not in job.compiling:
            return
        job.compiling.discard(leader)
        if not job.compiling:
            self._forget(number, job)
            assert isinstance(job.msg, Tokenize)
            self._submit(job, job.msg)

    def _abort(self, msg: Abort) -> None:
        """A request that has not been submitted ends here; others are left to the scheduler."""
        if (number := self._job_of.pop(msg.rid, None)) is None:
            self.scheduler.tell(msg)
            return
        job = self._jobs[number]
        job.alive.remove(msg.rid)
        if not job.alive:
            del self._jobs[number]
            self._leave_line(number, job)
        self.frontend.tell(Finished(msg.rid, FinishReason.ABORT))

    # -- in a thread of the pool: plain data in and out --------------------------------------------

    def _ids(self, number: int, msg: Tokenize | CountTokens, rendered: bytes) -> PromptEncoded:
        """Encode a text or a chat. Raises RequestError."""
        head = ""
        try:
            if msg.chat is not None:
                done, text, head, *named = templates.unpack(rendered)
                if not done:
                    raise RequestError(text, param=head)
                adds, is_named = False, named == [True]
            else:
                text, adds, is_named = msg.text or "", msg.add_special_tokens, False
            own = self._text
            encode = own.encode_named if is_named else lambda part: own.encode(part, adds)
            ids, cut = self._encoded(text, encode, msg)
            prediction = array(INT32)
            if isinstance(msg, Tokenize) and msg.prediction:
                prediction = own.encode(msg.prediction, False)
                self._check_ids(prediction, "prediction")
                self._check_prediction(len(prediction))
            return PromptEncoded(number, ids, head=head, cut=cut, prediction=prediction)
        except UnicodeEncodeError as error:
            message = "the prompt is not valid Unicode: a lone surrogate"
            raise RequestError(message, param="prompt") from error

    def _encoded(
        self, text: str, encode: Callable[[str], array[int]], msg: Tokenize | CountTokens
    ) -> tuple[array[int], bool]:
        """Ids of a text that has been rendered, and whether any were left out."""
        keeps = self._keeps(msg) if isinstance(msg, Tokenize) else []
        if not keeps or sum(keeps[-1]) > self._input_limit:
            self._check_chars(len(text), msg)
        if not keeps:
            return encode(text), False
        ids, cut = encode_ends(text, encode, *keeps[0], self._chars_per_token)
        ids, more = _fitted(ids, keeps[1:])
        return ids, cut or more

    # -- how long prompts may be -------------------------------------------------------------------

    def _too_long(self, msg: Tokenize | CountTokens) -> RequestError | None:
        """The checks that need no thread."""
        try:
            if isinstance(msg, Tokenize):
                self._check_prediction(-(-len(msg.prediction) // self._chars_per_token))
                if msg.truncate or self._truncation != "None":
                    return None
            # a chat is JSON, which may take two bytes for a character
            self._check_chars(len(msg.text or "") if msg.chat is None else len(msg.chat) // 2, msg)
        except RequestError as error:
            return error
        return None

    def _check_chars(self, num_chars: int, msg: Tokenize | CountTokens) -> None:
        at_least = -(-num_chars // self._chars_per_token)
        if at_least <= self._input_limit:
            return
        if isinstance(msg, CountTokens):
            limit, each = self._input_limit, self._chars_per_token
            raise RequestError(
                f"at least {num_chars} characters are too many to be counted: at most"
                f" {limit * each} are, {each} for each of {limit} tokens ({self._input_flag})",
                param="prompt",
                code=PromptTooLong.code,
            )
        raise self._too_long_prompt(
            f"{num_chars} characters are at least {at_least}", at_least, self._input_limit
        )

    def _check_prediction(self, at_least: int) -> None:
        """Refuse what is longer than any answer."""
        if at_least > self._limit:
            raise RequestError(
                f"prediction: at least {at_least} tokens, limit {self._limit} ({LIMIT_FLAG})",
                param="prediction",
            )

    def _check_ids(self, ids: array[int], name: str) -> None:
        """Raises RequestError for a token id that the model has no row for."""
        if not are_below(self._vocab_size, ids):
            bad = ids[(np.frombuffer(ids, np.uint32) >= self._vocab_size).argmax()]
            raise RequestError(
                f"token id {bad} is not in the vocabulary (0 to {self._vocab_size - 1})",
                param=name,
            )

    def _keeps(self, msg: Tokenize) -> list[tuple[int, int]]:
        """Numbers of (first, last) ids that a prompt is shortened to.

        They leave room for the tokens to be generated (the least number if the greatest is open).
        """
        keeps = [(0, msg.truncate)] if msg.truncate else []
        most, least = msg.params.max_new_tokens, max(msg.params.min_new_tokens, 1)
        room = self._limit - (least if most is None else most)
        if self._truncation != "None" and room > 0:
            room = min(room, self._input_limit)
            head = room // 2 if self._truncation == "center" else 0
            keeps.append((head, room - head))
        return keeps

    # -- answers -----------------------------------------------------------------------------------

    def _answer(self, number: int, job: _PromptJob, ids: array[int]) -> None:
        """The ids are ready; a grammar must be compiled before its request is accepted."""
        msg = job.msg
        if isinstance(msg, CountTokens):
            self._forget(number, job)
            self.frontend.tell(TokensCounted(msg.query, ids))
            return
        params = msg.params
        try:
            room = self._room(ids, params)
        except RequestError as error:
            self._forget(number, job)
            self._refuse(job, Failure.of(error))
            return
        usual = self._most_new or msg.usual_max
        if params.max_new_tokens is None and usual:
            room = min(room, max(usual, params.min_new_tokens))
        job.ids, job.params = ids, replace(params, max_new_tokens=room)
        job.dropped = self._to_heal(ids, job.params) if msg.text is not None else 0
        if params.grammar is not None:
            kind, source = params.grammar
            job.compiling = set(self._leaders)
            asked = CompileGrammar(
                endpoint=self.system.endpoint,
                job=number,
                kind=kind,
                text=source,
                client=msg.client,
            )
            self.grammar.tell(asked)
            return
        self._forget(number, job)
        self._submit(job, msg)

    def _submit(self, job: _PromptJob, msg: Tokenize) -> None:
        ids, params, thoughts = job.ids, job.params, ""
        if msg.reasoning:
            thoughts = prompt_state(msg.reasoning, job.head + msg.continued, msg.continued)
        kept = ids[: len(ids) - job.dropped]
        healed = tuple(self._pieces(ids[len(kept) :]))
        for rid in job.alive:
            opened = OpenTextStream(
                rid=rid,
                prompt_tail=kept[-TAIL_TOKENS:],
                stop=params.stop,
                skip_special_tokens=params.skip_special_tokens,
                print_eos=params.print_eos,
                shown=msg.shown,
                stop_sequences=params.stop_sequences,
                healed=b"".join(healed),
                include_stop=params.include_stop,
            )
            self.detokenizer.tell(opened)
        for i, rid in enumerate(msg.rids):
            if rid in job.alive:
                own = replace(params, seed=_wrapped(params.seed + i))
                after = -1 if rid == job.alive[0] else job.alive[0]
                submit = Submit(
                    rid=rid,
                    prompt=kept,
                    params=own,
                    thoughts=thoughts,
                    after=after,
                    healed=healed,
                    client=msg.client,
                    request_id=msg.request_id,
                    prediction=job.prediction,
                )
                self.scheduler.tell(submit)
        self.frontend.tell(Accepted(msg.rids[0], ids, thoughts=thoughts, cut=job.cut))

    def _to_heal(self, ids: array[int], params: SamplingParams) -> int:
        """The number of tokens at the end of a text that the output regenerates."""
        bound = params.grammar is not None or params.allowed_token_ids
        if not self._heals or bound or params.prompt_logprobs >= 0 or not params.max_new_tokens:
            return 0
        for num in range(min(MOST_HEALED, len(ids) - 1), 0, -1):
            pieces = self._pieces(ids[-num:])
            # only whole characters, so that the output's text can be cut after them
            if all(pieces) and b"".join(pieces).decode(errors="ignore").encode() == b"".join(
                pieces
            ):
                return num
        return 0

    def _pieces(self, ids: array[int]) -> list[bytes]:
        """Bytes of ordinary tokens, b"" of special ones."""
        text = self._text
        return [
            text.pieces[i] if i < len(text.pieces) and i not in text.special else b"" for i in ids
        ]

    def _room(self, ids: array[int], params: SamplingParams) -> int:
        """Tokens the request may generate. Raises RequestError if the prompt cannot be served."""
        if not ids:
            raise RequestError("prompt is empty", param="prompt")
        self._check_ids(ids, "prompt")
        prompt_len, limit, wanted = len(ids), self._limit, params.max_new_tokens
        if prompt_len > self._input_limit:
            raise self._too_long_prompt(str(prompt_len), prompt_len, self._input_limit)
        # without max_new_tokens the request needs at least one token
        if wanted != 0 and prompt_len == limit:
            raise self._too_long_prompt(str(prompt_len), prompt_len, limit - 1, LIMIT_FLAG)
        name = "max_tokens" if wanted is not None else "min_tokens"
        needed = params.min_new_tokens if wanted is None else wanted
        if (total := prompt_len + needed) > limit:
            raise PromptTooLong(
                f"This model's maximum context length is {limit} tokens. This request exceeds the"
                f" context window: {prompt_len} prompt tokens + {needed} {name} ="
                f" {total}, limit {limit} ({LIMIT_FLAG})",
                Overflow(prompt_len, needed, limit, LIMIT_FLAG),
                param=name,
            )
        return limit - prompt_len if wanted is None else wanted

    def _too_long_prompt(
        self, said: str, at_least: int, limit: int, flag: str = ""
    ) -> PromptTooLong:
        """``said``: a text with its number of tokens; ``limit``: of the prompt."""
        flag = flag or self._input_flag
        return PromptTooLong(
            f"This model's maximum context length is {self._limit} tokens. This prompt exceeds the"
            f" context window: {said} prompt tokens, limit {limit} ({flag})",
            Overflow(at_least, 0, limit, flag),
            param="prompt",
        )

    def _refuse(self, job: _PromptJob, failure: Failure) -> None:
        if isinstance(job.msg, CountTokens):
            self.frontend.tell(TokensCounted(job.msg.query, failure=failure))
            return
        # the group's first, unless that one has been aborted
        self.frontend.tell(Finished(job.alive[0], FinishReason.ERROR, failure))


def _fitted(ids: array[int], keeps: list[tuple[int, int]]) -> tuple[array[int], bool]:
    """The shortened ids, and whether any were left out."""
    sent_len = len(ids)
    for head, tail in keeps:
        ids = shortened(ids, head, tail)
    return ids, len(ids) < sent_len


def _places(msg: Tokenize | CountTokens) -> int:
    """The number of places that it takes in the queue."""
    size = len(msg.chat if msg.chat is not None else msg.text or "")
    if isinstance(msg, Tokenize):
        size += len(msg.prediction)
    return 1 + size // PLACE_CHARS


def _wrapped(seed: int) -> int:
    """``seed`` as a signed 64-bit number."""
    return (seed + 2**63) % 2**64 - 2**63
