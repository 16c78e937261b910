"""Detokenizer: turns token ids into text for every stream of one frontend, in short slices.

Owns the text position of each request: unfinished characters, what may become a stop string or a
stop sequence, tokens not yet passed on. Knows neither HTTP nor why a token was chosen.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping
from math import inf, nan
from time import perf_counter
from typing import assert_never

from asyncllm.actors.base import Actor
from asyncllm.codec import FLOAT32, INT32, INT64
from asyncllm.core.detokenize import TextStream
from asyncllm.core.request import FinishReason
from asyncllm.core.stops import SequenceFinder, StopMatcher
from asyncllm.messages import (
    Finished,
    FlushStreams,
    GroupRemoved,
    OpenTextStream,
    RequestsOrphaned,
    ResubmitRequests,
    StopHit,
    TextDelta,
    Tokens,
    TokenTexts,
)
from asyncllm.records import Failure, Logprobs
from asyncllm.text import ModelTokenizer

BUDGET_S = 0.0005  # per slice, so that a launch never waits longer for the loop
LOOK_EVERY = 4  # streams between two checks of the clock

Inbox = OpenTextStream | Tokens | Finished | FlushStreams | GroupRemoved | RequestsOrphaned


class Detokenizer(Actor[Inbox]):
    """Arriving tokens are only buffered; slices of at most ``budget_s`` process them.

    A slice goes round the streams with new tokens, makes one delta of everything that a stream has,
    and posts the rest to itself, so that other actors run in between. Streams with one token and
    nothing else share a message. A stream's Finished follows its last delta.
    """

    remote = frozenset({Tokens, Finished})
    orders = frozenset({GroupRemoved, RequestsOrphaned})

    def __init__(self, text: ModelTokenizer, *, budget_s: float = BUDGET_S) -> None:
        super().__init__("detokenizer")
        self._text, self._budget_s = text, budget_s
        self._streams: dict[int, _Stream] = {}
        self._news: deque[_Stream] = deque()
        self._posted = False  # a FlushStreams is on its way
        self._lost = set[int]()  # leaders of lost groups; their messages are ignored
        self._special = {text.decode([i]): i for i in text.special}

    def started(self) -> None:
        self.frontend = self.system.ref("frontend")
        self.scheduler = self.system.at_intake("scheduler")
        topology = self.system.topology
        self._lost = {topology.leader(group).id for group in topology.lost}

    def receive(self, batch: list[Inbox]) -> None:
        for msg in batch:
            match msg:
                case Tokens():
                    if msg.endpoint not in self._lost:
                        self._append(msg)
                case Finished():
                    if msg.endpoint not in self._lost:
                        self._finish(msg)
                case OpenTextStream():
                    self._streams[msg.rid] = _Stream(
                        msg, self._text, self._special, self._shown(msg)
                    )
                case FlushStreams():
                    self._posted = False
                case GroupRemoved(_, endpoint):
                    self._lost.add(endpoint)
                case RequestsOrphaned(rids, why):
                    self._orphaned(rids, why)
                case _:
                    assert_never(msg)
        self._turn()

    def _finish(self, end: Finished) -> None:
        if stream := self._streams.get(end.rid):
            stream.finished = end
            self._mark(stream)

    def _orphaned(self, rids: array[int], why: str) -> None:
        """Restart orphaned requests without any output; end the others."""
        again, over = array(INT64), array(INT64)
        for rid in rids:
            if (stream := self._streams.get(rid)) is None or stream.has_begun:
                over.append(rid)
            else:
                again.append(rid)
        self.scheduler.tell(ResubmitRequests(again, over))
        for rid in over:
            if (stream := self._streams.get(rid)) is not None and stream.finished is None:
                detail = f"the ranks that generated this answer are lost ({why}); try again"
                failure = Failure(detail, "group_lost", 503)
                self._finish(Finished(rid, FinishReason.ERROR, failure))

    def _append(self, msg: Tokens) -> None:
        streams, logprobs = self._streams, msg.logprobs
        rows = zip(msg.rids, msg.tokens, msg.ends, strict=True)
        for i, (rid, token, ends) in enumerate(rows):
            stream = streams.get(rid)
            if stream is None or stream.stopped_at >= 0:
                continue
            if stream.healed and stream.repeats(token):
                continue
            stream.ids.append(token)
            stream.ends.append(ends)
            if logprobs is not None:
                stream.blocks.append((logprobs, i))
            if not stream.has_news:
                self._mark(stream)
        for rid, logprobs in msg.prompt:
            if stream := self._streams.get(rid):
                stream.prompt.append(logprobs)

    def _shown(self, msg: OpenTextStream) -> frozenset[int]:
        """Ids of the special tokens that a request shows; an unknown name is ordinary text."""
        return frozenset(self._special[name] for name in msg.shown if name in self._special)

    def _mark(self, stream: _Stream) -> None:
        if not stream.has_news:
            stream.has_news = True
            self._news.append(stream)

    def _turn(self) -> None:
        deadline = perf_counter() + self._budget_s
        count = 0
        rids, tokens, texts = array(INT64), array(INT32), list[str]()
        logprobs: array[float] = array(FLOAT32)
        while self._news:
            stream = self._news.popleft()
            stream.has_news = False
            if stream.has_one_token:
                token, text, logprob = stream.take_token()
                rids.append(stream.rid)
                tokens.append(token)
                texts.append(text)
                logprobs.append(logprob)
            else:
                self._pass_on(stream)
            count += 1
            if count % LOOK_EVERY == 0 and perf_counter() >= deadline:
                break
        if rids:
            self.frontend.tell(
                TokenTexts(rids=rids, tokens=tokens, texts=tuple(texts), logprobs=logprobs)
            )
        if self._news and not self._posted:
            self._posted = True
            self.put(FlushStreams())

    def _pass_on(self, stream: _Stream) -> None:
        if stream.stopped_at < 0 and (delta := stream.take()) is not None:
            self.frontend.tell(delta)
            if stream.stopped_at >= 0 and stream.finished is None:
                self.scheduler.tell(StopHit(stream.rid, stream.stopped_at))
        if stream.finished is not None:
            del self._streams[stream.rid]
            self.frontend.tell(stream.ending(stream.finished))


class _Stream:
    """Converts one request's ids to text."""

    __slots__ = (
        "begun",
        "blocks",
        "covered",
        "ends",
        "finished",
        "has_news",
        "healed",
        "ids",
        "include_end",
        "num_tokens",
        "pieces",
        "print_eos",
        "prompt",
        "rid",
        "scanned",
        "sequences",
        "shown",
        "simple",
        "special",
        "stopped_at",
        "stops",
        "text",
    )

    def __init__(
        self,
        follow: OpenTextStream,
        text: ModelTokenizer,
        special: Mapping[str, int],
        shown: frozenset[int],
    ) -> None:
        self.rid, self.pieces = follow.rid, text.pieces
        self.healed = follow.healed  # text of the prompt that must be generated again
        self.covered = len(follow.healed.decode())  # characters of it
        self.begun = False  # some of it has been generated again
        self.print_eos, self.shown = follow.print_eos, shown
        self.include_end = follow.print_eos or follow.include_stop
        self.text: TextStream = text.stream(follow.prompt_tail, follow.skip_special_tokens)
        self.stops: StopMatcher | None = None
        if follow.stop:
            self.stops = StopMatcher(follow.stop, special, keep=follow.include_stop)
        self.special = text.special
        self.sequences = SequenceFinder(follow.stop_sequences) if follow.stop_sequences else None
        self.simple = self.stops is None and self.sequences is None
        self.scanned = 0  # tokens that ``sequences`` has seen
        self.ids: array[int] = array(INT32)  # not passed on yet
        self.ends = bytearray()
        # where to find those of each id; fewer where steps brought none
        self.blocks: list[tuple[Logprobs, int]] = []
        self.prompt: list[Logprobs] = []  # one per chunk
        self.finished: Finished | None = None
        self.has_news = False
        self.num_tokens = 0  # passed on so far
        self.stopped_at = -1  # number of tokens that brought a stop string or sequence

    @property
    def has_begun(self) -> bool:
        """Whether any part of the answer has arrived."""
        return bool(self.begun or self.num_tokens or self.ids or self.prompt or self.finished)

    def repeats(self, token: int) -> bool:
        """Whether the token only repeats text of the prompt, and so does not count."""
        size, left = len(self.pieces[token]), len(self.healed)
        self.healed, self.begun = self.healed[size:], True
        if size <= left:
            self._uncovered(self.text.push(token))
        return size <= left

    def _uncovered(self, piece: str) -> str:
        """The part of the next text that is not in the prompt."""
        cut = min(len(piece), self.covered)
        self.covered -= cut
        return piece[cut:]

    def take(self) -> TextDelta | None:
        """Everything that has arrived since the last call; None: nothing to report."""
        shown: list[str] = []
        pieces: list[str] = []
        ready, hidden = self._ready()
        for token, ends in zip(self.ids[:ready], self.ends[:ready], strict=True):
            force = (ends and self.print_eos) or token in self.shown
            piece = self.text.push(token, bool(force)) if self.include_end or not ends else ""
            if self.covered:
                piece = self._uncovered(piece)
            pieces.append(piece)
            shown.append(self._before_stop(piece, token))
            if self.stops is not None and self.stops.hit:
                break
        if self.finished is not None or hidden:
            shown.append(self._rest(pieces))
        self.num_tokens += len(pieces)
        if self.stops is not None and self.stops.hit:
            self.stopped_at = self.num_tokens
        elif hidden:
            pieces += [""] * hidden
            self.num_tokens += hidden
            self.stopped_at = self.num_tokens
        used = len(pieces)
        text, ids, blocks = "".join(shown), self.ids[:used], self.blocks[:used]
        del self.ids[:used], self.ends[:used], self.blocks[:used]
        prompt = None
        if self.prompt and (ids or self.finished is not None):
            prompt = Logprobs.join(self.prompt)
            self.prompt = []
        if not (ids or text or prompt):
            return None
        # a request without log-probabilities sees columns only in steps it shares with others
        logprobs = None
        if blocks and len(blocks) == len(ids):
            logprobs = Logprobs.join([columns.slice(i, i + 1) for columns, i in blocks])
        return TextDelta(
            rid=self.rid,
            text=text,
            ids=ids,
            pieces=tuple(pieces),
            logprobs=logprobs,
            prompt=prompt,
        )

    @property
    def has_one_token(self) -> bool:
        """Whether there is one token, and nothing that could change or stop its text."""
        return (
            len(self.ids) == 1
            and self.simple
            and not (self.finished or self.prompt or self.covered)
            and not (self.blocks and self.blocks[0][0].num_top)
        )

    def take_token(self) -> tuple[int, str, float]:
        """The one token, its text, and its log-probability, NaN where steps brought none.

        Takes a third of the time of ``take``.
        """
        token, ends, text, logprob = self.ids.pop(), self.ends.pop(), "", nan
        if self.include_end or not ends:
            text = self.text.push(token, bool(ends and self.print_eos) or token in self.shown)
        self.num_tokens += 1
        if self.blocks:
            columns, i = self.blocks.pop()
            # a model may compute NaN, which is something else than no log-probability
            logprob = columns.chosen[i] if columns.chosen[i] == columns.chosen[i] else -inf
        return token, text, logprob

    def _ready(self) -> tuple[int, int]:
        """How many tokens can be shown now, and how many after them are a stop sequence."""
        if self.sequences is None:
            return len(self.ids), 0
        for token in self.ids[self.scanned - self.num_tokens :]:
            self.scanned += 1
            self.sequences.push(token)
            if hit := self.sequences.hit:
                return self.scanned - self.num_tokens - hit, hit
        return len(self.ids) - (self.sequences.held if self.finished is None else 0), 0

    def ending(self, finished: Finished) -> Finished:
        """The final message for the frontend; a stop string overrides any other reason."""
        if self.stopped_at < 0:
            return finished
        found = self.stops.found if self.stops is not None else ""
        return Finished(
            self.rid,
            FinishReason.STOP,
            cached_len=finished.cached_len,
            num_tokens=self.stopped_at,
            stop=found,
            drafted=finished.drafted,
            accepted=min(finished.accepted, self.stopped_at),  # it may have ended further on
        )

    def _before_stop(self, piece: str, token: int = -1) -> str:
        if self.stops is None:
            return piece
        hidden = not piece and token in self.special
        return self.stops.push(piece, self.pieces[token].decode(errors="replace") if hidden else "")

    def _rest(self, pieces: list[str]) -> str:
        """Text that was held back until the stream ended; it becomes part of the last piece."""
        if self.stops is not None and self.stops.hit:
            return ""
        rest = self._uncovered(self.text.flush())
        if rest and pieces:
            pieces[-1] += rest
        text = self._before_stop(rest)
        return text if self.stops is None else text + self.stops.flush()
