"""Messages of a request: from the frontend to the scheduler, and its tokens back."""

from __future__ import annotations

from array import array
from dataclasses import field

from asyncllm.codec import FLOAT32, INT32, Message, message
from asyncllm.core.request import GRAMMARS, FinishReason, SamplingParams
from asyncllm.messages.checks import are_below, are_counts, are_natural, is_rid
from asyncllm.records import ConstraintDone, Failure, KvDestination, Logprobs, int32s

THOUGHTS = ("open", "closed", "none", "")  # of Submit


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
    shown: tuple[str, ...] = ()  # special tokens shown in the text regardless of params
    reasoning: str = ""  # the format of reasoning in answers to a chat; "": none
    continued: str = ""  # of a chat: the end of the prompt that begins the answer
    truncate: int = 0  # keep only that many of the prompt's last tokens; 0: all
    client: int = 0  # stands for an API key or an address; waiting clients are served round-robin
    request_id: str = ""  # the client's X-Request-Id, for logs of other servers; "": none
    usual_max: int = 0  # default of max_new_tokens if params do not set it; 0: none
    prediction: str = ""  # of a chat: what the answer may repeat


@message(2, urgent=True)
class Accepted(Message):
    """tokenizer -> frontend (same process): the prompt is valid and has been passed on."""

    rid: int
    prompt: array[int]
    thoughts: str = ""  # as in Submit
    cut: bool = False  # ``prompt`` was truncated


@message(3, urgent=True)
class Submit(Message):
    """tokenizer or agent -> scheduler, through the balancer if there are several groups.

    With ``outputs`` the request resumes after tokens that were generated earlier: they count, but
    only later ones are published.
    """

    rid: int
    prompt: array[int]
    params: SamplingParams  # max_new_tokens is an int here
    thoughts: str = ""  # the answer starts "open", "closed" or "none" (inside reasoning, after
    # it, neither); "": reasoning is content
    after: int = -1  # the rid of the first request for this prompt, if this is a later one
    # texts of tokens removed from the end of the prompt; the output must begin with them
    healed: tuple[bytes, ...] = ()
    client: int = 0  # this and the next one as in Tokenize
    request_id: str = ""
    outputs: array[int] = field(default_factory=int32s)
    # K/V of prompt and outputs, and the token after them (``BeginDecode``), come from elsewhere
    imports: bool = False
    # it ends with reason MOVED after one new token; K/V of prompt and outputs are sent there
    exports: KvDestination | None = None
    prediction: array[int] = field(default_factory=int32s)  # what the answer may repeat: a hint

    def valid(self) -> bool:
        return (
            is_rid(self.rid)
            and self.prompt.typecode == self.outputs.typecode == self.prediction.typecode == INT32
            and self.thoughts in THOUGHTS
            and (self.exports is None or (not self.imports and self.exports.reaches(self.length)))
        )

    @property
    def length(self) -> int:
        """Number of known tokens."""
        return len(self.prompt) + len(self.outputs)

    def fits(self, vocab_size: int, max_len: int) -> bool:
        """Whether it is within the limits that its tokenizer has checked."""
        params = self.params
        if max(self.length, len(self.prediction)) > max_len:
            return False
        if params.max_new_tokens is None or len(self.prompt) + params.max_new_tokens > max_len:
            return False
        ids = self.prompt, self.outputs, self.prediction
        return params.possible(vocab_size) and are_below(vocab_size, *ids)


@message(4, urgent=True)
class Abort(Message):
    """frontend -> tokenizer -> scheduler, by the route of the message that started it.

    The tokenizer forwards it unless the request is still there; unknown and ended ids are ignored.
    """

    rid: int

    def valid(self) -> bool:
        return is_rid(self.rid)


@message(9, urgent=True)
class Cancel(Message):
    """frontend -> coordinator -> every frontend: end requests early, each with its output so
    far."""

    request_id: str  # the client's X-Request-Id or the answer's id; "": all requests


@message(5, urgent=True)
class OpenTextStream(Message):
    """tokenizer -> detokenizer (same process), before Submit: how to turn this request's ids into
    text."""

    rid: int
    prompt_tail: array[int]  # the last few prompt ids, if decoding depends on preceding ids
    stop: tuple[str, ...]
    skip_special_tokens: bool
    print_eos: bool
    shown: tuple[str, ...] = ()  # as in Tokenize
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    healed: bytes = b""  # the output begins with this text of the prompt; it is not shown again
    include_stop: bool = False  # as in SamplingParams


@message(6)
class CountTokens(Message):
    """frontend -> tokenizer (same process): count the tokens of this text."""

    query: int
    text: str
    add_special_tokens: bool
    chat: bytes | None = None  # in place of the text, as in Tokenize
    client: int = 0  # as in Tokenize


@message(7, urgent=True)
class TokensCounted(Message):
    """tokenizer -> frontend: the answer to ``CountTokens``."""

    query: int
    ids: array[int] = field(default_factory=int32s)
    failure: Failure | None = None  # why counting failed


@message(8, urgent=True)
class PromptEncoded(Message):
    """tokenizer -> itself: the result of a pool thread, or a timeout."""

    job: int
    ids: array[int] = field(default_factory=int32s)
    failure: Failure | None = None
    frees: bool = True  # the thread is free again; False: it timed out and is still busy
    head: str = ""  # of a chat: the end of the prompt's text, without a message to continue
    cut: bool = False  # as in Accepted
    prediction: array[int] = field(default_factory=int32s)  # as in Submit


@message(26, urgent=True)
class CompileGrammar(Message):
    """tokenizer -> grammar@leader: compile this grammar; the answer is ``GrammarReady``.

    With several groups the balancer sends it to all leaders, and each of them answers.
    """

    endpoint: int  # where the tokenizer is
    job: int
    kind: str  # see core.request.GRAMMARS
    text: str
    client: int = 0  # as in Tokenize

    def valid(self) -> bool:
        return self.endpoint >= 0 and self.job >= 0 and self.kind in GRAMMARS


@message(27, urgent=True)
class GrammarReady(Message):
    """grammar@leader -> tokenizer: requests with this grammar can be submitted, or why not."""

    job: int
    failure: Failure | None = None
    endpoint: int = 0  # of the leader

    def valid(self) -> bool:
        return self.failure is None or self.failure.valid


@message(28, urgent=True)
class GrammarBuilt(Message):
    """grammar@leader -> itself: the result of a pool thread."""

    kind: str
    text: str
    failure: Failure | None = None


@message(29, urgent=True)
class ConstraintsAdvanced(Message):
    """scheduler -> itself: a thread's results for constraints."""

    done: tuple[ConstraintDone, ...]


@message(20)
class Tokens(Message):
    """scheduler -> detokenizer of one frontend's process: a step's tokens for its requests."""

    step: int
    rids: array[int]  # int64
    tokens: array[int]
    ends: bytes  # uint8: 1: this token is the eos or stop token that ended the request
    logprobs: Logprobs | None
    prompt: tuple[tuple[int, Logprobs], ...]  # as in StepDone, with the rid
    endpoint: int = 0  # of the leader

    def valid(self) -> bool:
        rows = len(self.rids)
        return (
            are_natural(self.rids, self.tokens)
            and len(self.tokens) == len(self.ends) == rows
            and (self.logprobs is None or (self.logprobs.whole and len(self.logprobs) == rows))
            and all(is_rid(rid) and logprobs.whole for rid, logprobs in self.prompt)
        )


@message(21)
class TextDelta(Message):
    """detokenizer -> frontend (same process): new text of one request, possibly for several
    tokens."""

    rid: int
    text: str  # may be empty: an unfinished character or a possible stop string is held back
    ids: array[int]
    pieces: tuple[str, ...]  # text of each token by itself, as shown ("" if hidden)
    logprobs: Logprobs | None
    prompt: Logprobs | None  # prompt log-probabilities, once available

    @classmethod
    def of_token(cls, rid: int, token: int, text: str, logprob: float) -> TextDelta:
        """The news of a row of ``TokenTexts``."""
        known = logprob == logprob
        logprobs = Logprobs(0, array(FLOAT32, [logprob])) if known else None
        return cls(rid, text, array(INT32, [token]), (text,), logprobs, None)


@message(25)
class TokenTexts(Message):
    """detokenizer -> frontend (same process): one new token of each of some requests.

    The usual case of ``TextDelta``, without an object for each token: every text is the whole text
    of its token, and no alternatives are told.
    """

    rids: array[int]  # int64
    tokens: array[int]
    texts: tuple[str, ...]
    logprobs: array[float]  # of the tokens; NaN: unknown


@message(52, urgent=True)
class EventsRendered(Message):
    """frontend -> itself: a thread has rendered the next events of the stream of ``rid``."""

    rid: int
    events: bytes


@message(22, urgent=True)
class StopHit(Message):
    """detokenizer -> scheduler, by ``Submit``'s route.

    A stop string or a stop sequence was found after ``num_tokens``.
    """

    rid: int
    num_tokens: int

    def valid(self) -> bool:
        return is_rid(self.rid) and are_counts(self.num_tokens)


@message(23, urgent=True)
class Finished(Message):
    """scheduler -> detokenizer -> frontend, or tokenizer -> frontend: exactly one per request."""

    rid: int
    reason: FinishReason
    failure: Failure | None = None  # for ERROR
    cached_len: int = 0  # prompt tokens that came from the prefix cache
    num_tokens: int = 0  # generated tokens
    stop: str = ""  # for STOP: the stop string that was found
    endpoint: int = -1  # of the leader, if there are several
    drafted: int = 0  # draft tokens tried; of the prediction only, if there is one
    accepted: int = 0  # those that were right

    def valid(self) -> bool:
        return (
            is_rid(self.rid)
            and self.accepted <= self.drafted
            and are_counts(self.drafted, self.accepted)
            and (self.failure is not None) == (self.reason is FinishReason.ERROR)
            and (self.failure is None or self.failure.valid)
            and are_counts(self.cached_len, self.num_tokens)
        )


@message(50)
class RequestsOrphaned(Message):
    """balancer -> detokenizer of one frontend's process: these requests were on a lost group.

    Those without any token so far are restarted; the others end.
    """

    rids: array[int]  # int64
    why: str


@message(51, urgent=True)
class ResubmitRequests(Message):
    """detokenizer -> balancer: the answer to ``RequestsOrphaned``."""

    rids: array[int]  # int64; to be restarted
    over: array[int]  # int64; the others

    def valid(self) -> bool:
        return are_natural(self.rids, self.over)


@message(24, urgent=True)
class FlushStreams(Message):
    """detokenizer -> itself: continue with the streams that have new tokens."""
