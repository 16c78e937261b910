"""State of one response, and the Reply interface that protocols implement.

Knows choices, token columns and usage; knows no protocol's JSON.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from asyncllm.api.common.request import GenerationRequest
from asyncllm.api.parsing.output_parser import OutputParser
from asyncllm.codec import INT32
from asyncllm.core.request import FinishReason
from asyncllm.errors import RequestError
from asyncllm.messages import TextDelta
from asyncllm.records import Logprobs

MOST_LOST: Final = 16  # characters between two tokens that a tokenizer may leave out
LONG: Final = 1024  # tokens that an answer may tell something of before a thread renders it
LEAST_LOGPROB: Final = -9999.0  # in place of -inf, which JSON does not have
REASONS: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
}


@dataclass(frozen=True, slots=True)
class Vocab:
    """What replies need to know about token ids.

    Args:
        piece: the bytes of one token.
        decode: the text of many, special tokens shown.
        spell: what each of many adds to it.
        special: ids of special tokens.
    """

    piece: Callable[[int], bytes]
    decode: Callable[[Sequence[int]], str]
    spell: Callable[[Sequence[int]], list[str]]
    special: frozenset[int] = frozenset()

    def text(self, token: int) -> str:
        """Text of one token; ``bytes:\\xNN..`` where its bytes are not whole characters."""
        raw = self.piece(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def offsets(self, text: str, ids: Sequence[int]) -> list[int]:
        """Where in ``text``, from which ``ids`` were made, each of them starts, in characters.

        Of a token that is a part of a character: where the character does. The tokenizer may have
        put tokens and a space before the text and may have changed it, so it is gone along with it.
        """
        out, at = [], 0
        for token, piece in zip(ids, self.spell(ids), strict=True):
            out.append(at)
            if not text.startswith(piece, at):
                if token in self.special:
                    continue
                if piece[0] == " " and text.startswith(piece[1:], at):
                    piece = piece[1:]
                elif (found := text.find(piece, at, at + len(piece) + MOST_LOST)) >= 0:
                    out[-1] = at = found
            at = min(at + len(piece), len(text))
        return out


@dataclass(slots=True)
class TokenLogprobs:
    """Tokens with their log-probabilities, each with ``num_top`` alternatives at most."""

    num_top: int = 0
    ids: array[int] = field(default_factory=lambda: array(INT32))
    logprobs: Logprobs = field(init=False)

    def __post_init__(self) -> None:
        self.logprobs = Logprobs(self.num_top)

    def logprob(self, i: int) -> float | None:
        """Log-probability of token ``i``, or None where it is not known."""
        chosen = self.logprobs.chosen
        return finite(chosen[i]) if i < len(chosen) else None

    def top(self, i: int) -> list[tuple[int, float]]:
        """The best (id, logprob) pairs at token ``i``, best first."""
        at = self.logprobs.slice(i, i + 1)
        return [(j, finite(value)) for j, value in zip(at.top_ids, at.top, strict=True)]


@dataclass(slots=True, eq=False)
class Choice:
    """One of the answers that a request asks for."""

    index: int
    prompt_idx: int
    texts: list[str] = field(default_factory=list)
    wants: tuple[int, int] = (-1, -1)  # log-probabilities of tokens, and of the prompt's
    keeps_ids: bool = False  # the tokens are wanted even without their log-probabilities
    tokens: TokenLogprobs = field(init=False)
    scores: TokenLogprobs = field(init=False)  # of prompt tokens 1..; the ids are the prompt's
    num_tokens: int = 0
    prompt_len: int = 0
    cached_len: int = 0
    drafted: int = 0  # tokens that were guessed and tried
    accepted: int = 0  # those that were right
    reason: FinishReason | None = None
    stop: str = ""  # the stop string that ended it
    pieces: list[str] = field(default_factory=list)  # text of each token, if wants[0] >= 0
    offset: int = 0  # characters before the next token, for text_offset
    output: OutputParser | None = None  # None: all text is content

    def __post_init__(self) -> None:
        self.tokens = TokenLogprobs(max(self.wants[0], 0))
        self.scores = TokenLogprobs(max(self.wants[1], 0))

    @property
    def text(self) -> str:
        """The whole text so far."""
        return "".join(self.texts)

    @property
    def is_cut(self) -> bool:
        """It would have gone on."""
        return self.reason in (FinishReason.LENGTH, FinishReason.ABORT)

    def take(self, delta: TextDelta) -> None:
        """Add new tokens and text."""
        if delta.text:
            self.texts.append(delta.text)
        self.num_tokens += len(delta.ids)
        if self.output is not None:
            self.output.take(delta.text, delta.pieces, len(delta.ids))
        if self.wants[0] >= 0 or self.keeps_ids:
            self.tokens.ids.extend(delta.ids)
        if self.wants[0] >= 0:
            self.pieces += delta.pieces
            if delta.logprobs is not None:
                self.tokens.logprobs.extend(delta.logprobs)
        if self.wants[1] >= 0 and delta.prompt is not None:
            self.scores.logprobs.extend(delta.prompt)

    def take_token(self, token: int, text: str, logprob: float) -> None:
        """Add one token and its whole text; the log-probability is NaN where it is not known."""
        if text:
            self.texts.append(text)
        self.num_tokens += 1
        if self.output is not None:
            self.output.take(text, (text,), 1)
        if self.wants[0] >= 0:
            self.tokens.ids.append(token)
            self.pieces.append(text)
            if logprob == logprob:
                self.tokens.logprobs.chosen.append(logprob)
        elif self.keeps_ids:
            self.tokens.ids.append(token)

    def end(
        self, reason: FinishReason, cached_len: int, stop: str, guessed: tuple[int, int] = (0, 0)
    ) -> None:
        """The choice has ended; of its tokens as many were guessed, and right."""
        self.reason, self.cached_len, self.stop = reason, cached_len, stop
        self.drafted, self.accepted = guessed
        if self.output is not None:
            self.output.finish()


@dataclass(slots=True, eq=False)
class Answer:
    """A request, its prompts' ids once they are known, and its choices."""

    generation: GenerationRequest
    id: str
    created: int
    model: str
    vocab: Vocab
    choices: list[Choice]
    prompts: list[array[int]]
    truncated: set[int] = field(default_factory=set)  # prompts that are shorter than they were sent
    fingerprint: str = ""  # what clients of text-generation-inference want beside the model

    def accept(self, prompt_idx: int, ids: array[int], thoughts: str, cut: bool = False) -> None:
        """A prompt has been accepted.

        Args:
            ids, thoughts, cut: as in Accepted.
        """
        if cut:
            self.truncated.add(prompt_idx)
        generation = self.generation
        self.prompts[prompt_idx] = ids
        if generation.output_options is not None:
            first = prompt_idx * generation.n
            for choice in self.choices[first : first + generation.n]:
                choice.output = generation.output_options.parser(thoughts)

    def prompt_text(self, prompt_idx: int) -> str:
        """The prompt as text, for echo: what was sent, unless that was ids or too long."""
        given = self.generation.prompts[prompt_idx].text
        if given is None or prompt_idx in self.truncated:
            return self.vocab.decode(self.prompts[prompt_idx])
        return given

    @property
    def is_long(self) -> bool:
        """Whether rendering it takes longer than the event loop can wait: it says something of each
        of many tokens."""
        generation, num = self.generation, 0
        params, ids = generation.params, generation.token_ids
        if generation.echo or ids or params.prompt_logprobs >= 0:
            num += sum(len(self.prompts[choice.prompt_idx]) for choice in self.choices)
        if ids or params.logprobs >= 0:
            num += sum(choice.num_tokens for choice in self.choices)
        return num > LONG

    def usage(self, choice: Choice | None = None) -> dict[str, Any]:
        """Tokens used by all choices, or by one; a prompt counts once for its n choices."""
        counted = self.choices if choice is None else [choice]
        firsts = counted[:: self.generation.n]
        prompt_tokens = sum(len(self.prompts[c.prompt_idx]) for c in firsts)
        completion = sum(c.num_tokens for c in counted)
        out = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_len for c in firsts)},
        }
        details: dict[str, int] = {}
        if self.generation.output_options is not None and self.generation.output_options.reasoning:
            thoughts = sum(c.output.num_reasoning_tokens for c in counted if c.output is not None)
            details["reasoning_tokens"] = thoughts
        drafted = sum(c.drafted for c in counted)
        if drafted or self.generation.prediction is not None:
            accepted = sum(c.accepted for c in counted)
            details["accepted_prediction_tokens"] = accepted
            details["rejected_prediction_tokens"] = drafted - accepted
        if details:
            out["completion_tokens_details"] = details
        return out


class Reply(Protocol):
    """Renders an answer in one protocol. Streams are bytes of server-sent events."""

    answer: Answer

    def opening(self) -> bytes:
        """The events right after the headers."""
        return b""

    def piece(self, choice: Choice, text: str, count: int) -> bytes:
        """Events for ``count`` new tokens and new text, which ``choice`` has taken already."""

    def flush_held(self) -> bytes:
        """Events that :meth:`piece` held back, if its choice goes on."""
        return b""

    def end(self, choice: Choice) -> bytes:
        """Events for the end of a choice, whose ``reason`` is set."""

    def closing(self) -> bytes:
        """Events for the end of the stream."""
        return b""

    def error(self, error: RequestError) -> bytes:
        """Events for a failure after the headers; nothing follows."""

    def whole(self) -> bytes:
        """The JSON of an answer that is not streamed. May run in a thread."""

    def keep(self) -> None:
        """Called on the event loop after :meth:`whole`: store what is to be known later."""
        return None


def finite(value: float) -> float:
    """A log-probability as JSON can carry it, rounded to the precision of float32."""
    if not math.isfinite(value):
        return LEAST_LOGPROB
    return round(value, 7)
