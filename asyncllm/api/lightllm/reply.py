"""LightLLM's native answers: /generate's JSON and /generate_stream's events.

Knows the JSON shapes; knows neither sockets nor request bodies.
"""

from __future__ import annotations

from typing import Any, Final

from asyncllm.api.common import sse
from asyncllm.api.common.answer import REASONS, Answer, Choice, finite
from asyncllm.errors import RequestError
from asyncllm.messages import Delta

HEAD: Final = b"data:"  # no space, as LightLLM has it
NO_TOKEN: Final = -1  # id in a last event that brings no token


class NativeReply:
    """/generate and /generate_stream."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        # the newest token (its number, or None: text without one), which may be the last, and text
        self._held: tuple[int | None, str] | None = None
        self._told_prompt = answer.generation.params.prompt_logprobs < 0

    def opening(self) -> bytes:
        """Nothing."""
        return b""

    def piece(self, choice: Choice, piece: Delta) -> bytes:
        """An event per token, the newest held back. The texts of the events are the whole text."""
        count = len(piece.ids)
        if not count:
            if piece.text:  # held back until the end came
                i, text = self._held or (None, "")
                self._held = i, text + piece.text
            return b""
        if "".join(piece.pieces) == piece.text and len(piece.pieces) == count:
            texts = list(piece.pieces)
        else:  # bytes of a character over several tokens, or a stop string held back
            texts = [""] * (count - 1) + [piece.text]
        out = b""
        first = choice.num_tokens - count
        for i, text in enumerate(texts):
            out += self.flush_held()
            self._held = first + i, text
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
        }
        if answer.generation.details:
            out["tokens"] = _each([self.tokens(c) for c in choices])
        out |= self.prompt_scores(choices[0])
        usage = {"input_audio_tokens": 0, "input_image_tokens": 0}
        out["input_usage"] = {"input_text_tokens": len(prompt)} | usage
        maps = [self.scored(c) for c in choices]
        scored = maps[0] if len(maps) == 1 else f"[{','.join(maps)}]"
        return f'{sse.dumps(out)[:-1]},"logprobs":{scored}}}'.encode("utf-8", "replace")

    def tokens(self, choice: Choice) -> list[dict[str, Any]]:
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

    def scored(self, choice: Choice) -> str:
        """``{id: {logprob, rank, decoded_token}}`` of every token of a choice, as JSON."""
        ids, text = choice.tokens.ids, self.answer.vocab.text
        names = {token: sse.quoted(text(token)) for token in set(ids)}
        pairs = zip(ids, choice.tokens.logprobs.chosen, strict=True)
        return f"[{','.join([_map(token, finite(x), names[token]) for token, x in pairs])}]"

    def prompt_scores(self, choice: Choice) -> dict[str, Any]:
        """Ids and log-probabilities of the prompt's tokens, null for the first; {} if not asked."""
        if self.answer.generation.params.prompt_logprobs < 0:
            return {}
        scores, prompt = choice.scores, self.answer.prompts[choice.prompt_idx]
        out: list[dict[str, Any] | None] = [None]
        for i, token in enumerate(prompt[1:]):
            best = [(t, logprob, at + 1) for at, (t, logprob) in enumerate(scores.top(i))]
            some = [(token, scores.logprob(i), None), *best]
            out.append({str(t): self._entry(t, logprob, rank) for t, logprob, rank in some})
        return {"prompt_token_ids": prompt.tolist(), "prompt_logprobs": out}

    def _event(self, choice: Choice, i: int | None, text: str) -> bytes:
        """One event, the last one if the choice has ended.

        Put together by hand, as :func:`_map`: a JSON encoder takes twice the time, and this is done
        for each token.

        Args:
            i: which generated token; None: text or an end without one.
        """
        vocab, prompt_len = self.answer.vocab, len(self.answer.prompts[choice.prompt_idx])
        token, logprob, scored, count = NO_TOKEN, "null", "null", choice.num_tokens
        if i is not None:
            token, count, known = choice.tokens.ids[i], i + 1, choice.tokens.logprob(i)
            assert known is not None
            logprob, scored = repr(known), _map(token, known, sse.quoted(vocab.text(token)))
        special = "true" if token in vocab.special else "false"
        end = '"generated_text":null,"finished":false,"finish_reason":null'
        if choice.reason is not None:
            text_of_all, reason = sse.quoted(choice.text), REASONS[choice.reason]
            end = f'"generated_text":{text_of_all},"finished":true,"finish_reason":"{reason}"'
        more = ""
        if not self._told_prompt:
            self._told_prompt = True
            more = "," + sse.dumps(self.prompt_scores(choice))[1:-1]
        return HEAD + (
            f'{{"token":{{"id":{token},"text":{sse.quoted(text)},"logprob":{logprob},'
            f'"special":{special},"count_output_tokens":{count},"prompt_tokens":{prompt_len},'
            f'"logprobs":{scored}}},{end},"details":null,"input_usage":{{"input_text_tokens":'
            f'{prompt_len},"input_audio_tokens":0,"input_image_tokens":0}}{more}}}\n\n'
        ).encode("utf-8", "replace")

    def _entry(self, token: int, logprob: float | None, rank: int | None) -> dict[str, Any]:
        name = self.answer.vocab.text(token)
        return {"logprob": logprob, "rank": rank, "decoded_token": name}


def _map(token: int, logprob: float, name: str) -> str:
    return f'{{"{token}":{{"logprob":{logprob!r},"rank":null,"decoded_token":{name}}}}}'


def _each(values: list[Any]) -> Any:
    """A list, or its only element."""
    return values[0] if len(values) == 1 else values
