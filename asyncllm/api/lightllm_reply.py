"""LightLLM's native answers: /generate's JSON and /generate_stream's events.

Knows the JSON shapes; knows neither sockets nor request bodies.
"""

from __future__ import annotations

from typing import Any, Final

from asyncllm.api import sse
from asyncllm.api.answer import REASONS, Answer, Choice, Columns, Piece
from asyncllm.errors import RequestError

HEAD: Final = b"data:"  # no space, as LightLLM has it
NO_TOKEN: Final = -1  # id in a last event that brings no token


class NativeReply:
    """/generate and /generate_stream."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._held: dict[str, Any] | None = None  # the newest token: perhaps it is the last

    def opening(self) -> bytes:
        """Nothing."""
        return b""

    def piece(self, choice: Choice, piece: Piece) -> bytes:
        """An event per token, the newest held back. The texts of the events are the whole text."""
        count = len(piece.ids) // 4
        if not count:
            if not piece.text:
                return b""
            if self._held is None:
                self._held = self._token(choice, None, "")
            self._held["text"] += piece.text  # held back until the end came
            return b""
        if "".join(piece.pieces) == piece.text and len(piece.pieces) == count:
            texts = list(piece.pieces)
        else:  # bytes of a character over several tokens, or a stop string held back
            texts = [""] * (count - 1) + [piece.text]
        out = self.settle()
        first = choice.num_tokens - count
        for i, text in enumerate(texts):
            out += self.settle()
            self._held = self._token(choice, first + i, text)
        return out

    def settle(self) -> bytes:
        """The token held back, as one that more follow."""
        if self._held is None:
            return b""
        out = _event(self._held)
        self._held = None
        return out

    def end(self, choice: Choice) -> bytes:
        """The last event; it has the last token if that came together with the end."""
        token = self._held or self._token(choice, None, "")
        self._held = None
        assert choice.reason is not None
        return _event(token, choice.text, REASONS[choice.reason])

    def closing(self) -> bytes:
        """Nothing: the last event said it."""
        return b""

    def error(self, error: RequestError) -> bytes:
        """An error event."""
        return sse.error_event(error, HEAD)

    def whole(self) -> bytes:
        """The answer in one piece; lists where n > 1, scalars otherwise."""
        answer = self.answer
        choices, prompt = answer.choices, answer.prompts[0]
        out: dict[str, Any] = {
            "generated_text": [c.text for c in choices],
            "count_output_tokens": _each([c.num_tokens for c in choices]),
            "finish_reason": _each([REASONS[c.reason] for c in choices if c.reason is not None]),
            "prompt_tokens": len(prompt),
            "input_usage": {
                "input_text_tokens": len(prompt),
                "input_audio_tokens": 0,
                "input_image_tokens": 0,
            },
        }
        if answer.generation.details:
            out["tokens"] = _each([self._tokens(c) for c in choices])
        if answer.generation.params.prompt_logprobs >= 0:
            out["prompt_token_ids"] = prompt.tolist()
            out["prompt_logprobs"] = self._prompt_logprobs(choices[0].scores)
        return sse.body(out)

    def _token(self, choice: Choice, i: int | None, text: str) -> dict[str, Any]:
        """``i``: which generated token; None: text or an end without one."""
        tokens = choice.tokens
        token = NO_TOKEN if i is None else tokens.ids[i]
        return {
            "id": token,
            "text": text,
            "logprob": None if i is None else tokens.logprob(i),
            "special": token in self.answer.vocab.special,
            "count_output_tokens": choice.num_tokens if i is None else i + 1,
            "prompt_tokens": len(self.answer.prompts[choice.prompt_idx]),
        }

    def _tokens(self, choice: Choice) -> list[dict[str, Any]]:
        vocab, total, out = self.answer.vocab, 0.0, []
        for i, token in enumerate(choice.tokens.ids):
            logprob = choice.tokens.logprob(i)
            total += logprob or 0.0
            out.append(
                {
                    "id": token,
                    "text": vocab.text(token),
                    "logprob": logprob,
                    "cumlogprob": round(total, 7),
                    "special": token in vocab.special,
                    "count_output_tokens": i + 1,
                    "prompt_cache_len": choice.cached_len,
                }
            )
        return out

    def _prompt_logprobs(self, scores: Columns) -> list[dict[str, Any] | None]:
        """Per prompt token ``{id: {logprob, decoded_token}}``; null for the first."""
        vocab, out = self.answer.vocab, list[dict[str, Any] | None]([None])
        for i, token in enumerate(self.answer.prompts[0][1:]):
            pairs = {token: scores.logprob(i)} | dict(scores.top(i))
            out.append(
                {
                    str(t): {"logprob": value, "decoded_token": vocab.text(t)}
                    for t, value in pairs.items()
                }
            )
        return out


def _event(token: dict[str, Any], text: str | None = None, reason: str | None = None) -> bytes:
    """One event; a ``reason`` makes it the last."""
    value = {
        "token": token,
        "generated_text": text,
        "finished": reason is not None,
        "finish_reason": reason,
        "details": None,
    }
    return sse.event(value, HEAD)


def _each(values: list[Any]) -> Any:
    """A list, or its only element."""
    return values[0] if len(values) == 1 else values
