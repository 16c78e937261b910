"""LightLLM's native replies: /generate's JSON and /generate_stream's events.

Knows the JSON shapes; knows neither sockets nor request bodies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from asyncllm.api.common import sse
from asyncllm.api.common.answer import REASONS, Answer, Choice, Reply, finite
from asyncllm.errors import RequestError

HEAD: Final = b"data:"  # no space, as LightLLM has it
TOKEN: Final = ("id", "text", "logprob", "special", "count_output_tokens")
NO_TOKEN: Final = -1  # id in a last event that brings no token


class NativeReply(Reply):
    """/generate and /generate_stream."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        # the newest token (its number, or None: text without one), which may be the last, and text
        self._held: tuple[int | None, str] | None = None
        self._template: sse.ChunkTemplate | None = None
        self._told_prompt = answer.generation.params.prompt_logprobs < 0

    def piece(self, choice: Choice, text: str, count: int) -> bytes:
        """An event per token, the newest held back. The texts of the events are the whole text."""
        if not count:
            if text:  # held back until the end came
                i, before = self._held or (None, "")
                self._held = i, before + text
            return b""
        first = choice.num_tokens - count
        texts = choice.pieces[first:] if count > 1 else [text]
        if count > 1 and "".join(texts) != text:  # of a character, or a stop string held back
            texts = [""] * (count - 1) + [text]
        out = b""
        for i, part in enumerate(texts, first):
            out += self.flush_held()
            self._held = i, part
        return out

    def flush_held(self) -> bytes:
        """The token held back, as one that more follow."""
        if self._held is None:
            return b""
        out = self._event(self.answer.choices[0], *self._held)
        self._held = None
        return out

    def end(self, choice: Choice) -> bytes:
        """The last event; it has the last token if that came together with the end."""
        i, text = self._held or (None, "")
        self._held = None
        return self._event(choice, i, text)

    def error(self, error: RequestError) -> bytes:
        """An error event."""
        return sse.error_event(error, HEAD)

    def whole(self) -> bytes:
        """The answer in one piece; lists where n > 1, scalars otherwise."""
        answer = self.answer
        choices, prompt = answer.choices, answer.prompts[0]
        out: dict[str, object] = {
            "generated_text": [c.text for c in choices],
            "count_output_tokens": _each([c.num_tokens for c in choices]),
            "finish_reason": _each([REASONS[c.reason] for c in choices if c.reason is not None]),
            "prompt_tokens": len(prompt),
        }
        if answer.generation.details:
            out["tokens"] = _each([self.tokens(c) for c in choices])
        out |= self.prompt_scores(choices[0])
        out["input_usage"] = _usage(len(prompt))
        out["logprobs"] = _each([self.scored(c) for c in choices])
        return sse.body(out)

    def tokens(self, choice: Choice) -> list[dict[str, object]]:
        """Every token of a choice, for its details."""
        vocab, total, out = self.answer.vocab, 0.0, []
        for i, token in enumerate(choice.tokens.ids):
            logprob = choice.tokens.logprob(i)
            total += logprob or 0.0
            out.append(
                {
                    "id": token,
                    "text": choice.pieces[i],
                    "logprob": logprob,
                    "cumlogprob": round(total, 7),
                    "special": token in vocab.special,
                    "count_output_tokens": i + 1,
                    "prompt_tokens": len(self.answer.prompts[choice.prompt_idx]),
                    "prompt_cache_len": choice.cached_len,
                }
            )
        return out

    def scored(self, choice: Choice) -> list[dict[str, object]]:
        """``{id: {logprob, rank, decoded_token}}`` of every token of a choice."""
        pairs = zip(choice.tokens.ids, choice.tokens.logprobs.chosen, strict=True)
        return [{str(token): self._entry(token, finite(x), None)} for token, x in pairs]

    def prompt_scores(self, choice: Choice) -> dict[str, object]:
        """Ids and log-probabilities of the prompt's tokens, null for the first; {} if not asked."""
        if self.answer.generation.params.prompt_logprobs < 0:
            return {}
        scores, prompt = choice.scores, self.answer.prompts[choice.prompt_idx]
        out: list[dict[str, object] | None] = [None]
        for i, token in enumerate(prompt[1:]):
            best = [(t, logprob, at + 1) for at, (t, logprob) in enumerate(scores.top(i))]
            some = [(token, scores.logprob(i), None), *best]
            out.append({str(t): self._entry(t, logprob, rank) for t, logprob, rank in some})
        return {"prompt_token_ids": prompt.tolist(), "prompt_logprobs": out}

    def _event(self, choice: Choice, i: int | None, text: str) -> bytes:
        """One event, the last one if the choice has ended.

        Args:
            i: which generated token; None: text or an end without one.
        """
        token, logprob, count, scored = NO_TOKEN, None, choice.num_tokens, None
        if i is not None:
            token, logprob, count = choice.tokens.ids[i], choice.tokens.logprob(i), i + 1
            if choice.reason is None and self._told_prompt:
                return self._filled(choice, token, logprob, count, text)
            scored = {str(token): self._entry(token, logprob, None)}
        special = token in self.answer.vocab.special
        out = self._value(choice, (token, text, logprob, special, count), scored)
        if choice.reason is not None:
            out |= {"generated_text": choice.text, "finished": True}
            out["finish_reason"] = REASONS[choice.reason]
        if not self._told_prompt:
            self._told_prompt = True
            out |= self.prompt_scores(choice)
        return sse.event(out, HEAD)

    def _filled(
        self, choice: Choice, token: int, logprob: float | None, count: int, text: str
    ) -> bytes:
        """The usual event, by a template: a JSON encoder takes twice the time for each token."""
        if self._template is None:
            entry = {"logprob": sse.MARK, "rank": None, "decoded_token": sse.MARK}
            value = self._value(choice, (sse.MARK,) * 5, {sse.MARK: entry})
            self._template = sse.ChunkTemplate(value, HEAD)
        assert logprob is not None
        vocab, number, score = self.answer.vocab, b"%d" % token, repr(logprob).encode()
        special = b"true" if token in vocab.special else b"false"
        shown, name = sse.escaped(text), vocab.text(token)
        own = number, shown, score, special, b"%d" % count
        named = shown if name == text else sse.escaped(name)
        return self._template.fill(*own, b'"%d"' % token, score, named)

    def _value(self, choice: Choice, own: Sequence[Any], scored: Any) -> dict[str, object]:
        """The JSON of an event; ``own`` are the values of TOKEN."""
        prompt_len = len(self.answer.prompts[choice.prompt_idx])
        token = dict(zip(TOKEN, own, strict=True))
        return {
            "token": token | {"prompt_tokens": prompt_len, "logprobs": scored},
            "generated_text": None,
            "finished": False,
            "finish_reason": None,
            "details": None,
            "input_usage": _usage(prompt_len),
        }

    def _entry(self, token: int, logprob: float | None, rank: int | None) -> dict[str, object]:
        name = self.answer.vocab.text(token)
        return {"logprob": logprob, "rank": rank, "decoded_token": name}


def _usage(prompt_len: int) -> dict[str, int]:
    return {"input_text_tokens": prompt_len, "input_audio_tokens": 0, "input_image_tokens": 0}


def _each(values: list[object]) -> Any:
    """A list, or its only element."""
    return values[0] if len(values) == 1 else values
