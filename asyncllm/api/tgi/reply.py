"""text-generation-inference's replies, with LightLLM's additions (--use_tgi_api).

Knows the JSON shapes; knows neither sockets nor request bodies.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Final

from asyncllm.api.common import sse
from asyncllm.api.common.answer import REASONS, Answer, Choice, finite
from asyncllm.api.lightllm.reply import HEAD, NO_TOKEN, NativeReply
from asyncllm.api.tgi.request import TgiRequest
from asyncllm.core.request import FinishReason
from asyncllm.errors import RequestError

NO_LOGPROB: Final = 0.0  # of an end without a token; clients want a number


class TgiReply(NativeReply):
    """/generate, /generate_stream and /.

    Args:
        listed: the whole answer is the only element of a list, as TGI has it on /.
    """

    def __init__(self, answer: Answer, asked: TgiRequest, *, listed: bool) -> None:
        super().__init__(answer)
        self._asked, self._listed = asked, listed

    def opening(self) -> bytes:
        """None; where the prompt is long this runs in a thread, and its text is made there."""
        _ = self._begins
        return b""

    def error(self, error: RequestError) -> bytes:
        """An error event."""
        return sse.event(error_body(error), HEAD)

    def whole(self) -> bytes:
        """The choice of the best mean log-probability."""
        choices, generation = self.answer.choices, self._asked.generation
        best = max(choices, key=_mean_logprob)
        out: dict[str, object] = {"generated_text": self._text(best)}
        if generation.details:
            out["details"] = details = self._details(best)
            details["prompt_tokens"] = len(self.answer.prompts[0])
            details["beam_sequences"] = [self._sequence(c) for c in choices]
            if len(choices) > 1:
                rest = [c for c in choices if c is not best]
                details["best_of_sequences"] = [
                    {"generated_text": self._text(c), **self._details(c)} for c in rest
                ]
        if self._asked.prompt_scores:
            out |= self.prompt_scores(choices[0])
        out["logprobs"] = self.scored(best)
        return sse.body([out] if self._listed else out)

    def _event(self, choice: Choice, i: int | None, text: str) -> bytes:
        token: dict[str, object] = {"id": NO_TOKEN, "text": text, "logprob": NO_LOGPROB}
        count = choice.num_tokens if i is None else i + 1
        if i is None:
            token |= {"special": not text, "count_output_tokens": count}
        else:
            token = self._token(choice.tokens.ids[i], choice.tokens.logprob(i), text)
            token["count_output_tokens"] = count
        out: dict[str, object] = {"index": count, "token": token}
        if i is not None and choice.tokens.num_top:
            out["top_tokens"] = self._top(choice, i)
        if self._asked.prompt_scores and not self._told_prompt:
            self._told_prompt = True
            out |= self.prompt_scores(choice)
        ended = choice.reason is not None
        out |= {"generated_text": None, "finished": ended, "finish_reason": None, "details": None}
        if ended:
            out["generated_text"] = self._text(choice)
            out["finish_reason"] = reason = self._reason(choice)
            if self._asked.generation.details:
                prompt_len = len(self.answer.prompts[0])
                out["details"] = {
                    "finish_reason": reason,
                    "generated_tokens": choice.num_tokens,
                    "seed": self._seed(choice),
                    "input_length": prompt_len,
                    "prompt_tokens": prompt_len,
                }
        return sse.event(out, HEAD)

    @cached_property
    def _begins(self) -> str:
        """What goes before the generated text."""
        return self.answer.prompt_text(0) if self.answer.generation.echo else ""

    def _text(self, choice: Choice) -> str:
        return self._begins + choice.text

    def _sequence(self, choice: Choice) -> dict[str, object]:
        """One of LightLLM's ``beam_sequences``."""
        return {
            "generated_text": self._text(choice),
            "finish_reason": self._reason(choice),
            "generated_tokens": choice.num_tokens,
            "logprob": finite(math.fsum(choice.tokens.logprobs.chosen)),
        }

    def _details(self, choice: Choice) -> dict[str, object]:
        out = {
            "finish_reason": self._reason(choice),
            "generated_tokens": choice.num_tokens,
            "seed": self._seed(choice),
            "prefill": self._prefill() if self._asked.prefill else [],
            "tokens": self.tokens(choice),
        }
        if choice.tokens.num_top:
            out["top_tokens"] = [self._top(choice, i) for i in range(len(choice.tokens.ids))]
        return out

    def _prefill(self) -> list[dict[str, object]]:
        scores, prompt = self.answer.choices[0].scores, self.answer.prompts[0]
        logprobs = [None, *(scores.logprob(i) for i in range(len(prompt) - 1))]
        text = self.answer.vocab.text
        return [
            {"id": token, "text": text(token), "logprob": logprob}
            for token, logprob in zip(prompt, logprobs, strict=True)
        ]

    def _top(self, choice: Choice, i: int) -> list[dict[str, object]]:
        vocab = self.answer.vocab
        best = choice.tokens.top(i)
        return [self._token(token, logprob, vocab.text(token)) for token, logprob in best]

    def _token(self, token: int, logprob: float | None, text: str) -> dict[str, object]:
        special = token in self.answer.vocab.special
        return {"id": token, "text": text, "logprob": logprob, "special": special}

    def _seed(self, choice: Choice) -> int | None:
        """The seed of a choice that was sampled."""
        params = self.answer.generation.params
        return (params.seed + choice.index) % 2**64 if params.temperature > 0 else None

    def _reason(self, choice: Choice) -> str:
        if choice.reason in (FinishReason.LENGTH, FinishReason.ABORT):
            return REASONS[choice.reason]
        params, ids = self.answer.generation.params, choice.tokens.ids
        sequences = (*((token,) for token in params.stop_token_ids), *params.stop_sequences)
        if choice.stop or any(tuple(ids[-len(s) :]) == s for s in sequences):
            return "stop_sequence"
        return "eos_token"


def error_body(error: RequestError) -> dict[str, object]:
    """``{"error": text, "error_type": ...}``."""
    kind = "validation"
    if error.status == 429:
        kind = "overloaded"
    elif error.status >= 500:
        kind = "generation"
    return {"error": error.message, "error_type": kind}


def _mean_logprob(choice: Choice) -> float:
    logprobs = choice.tokens.logprobs.chosen
    return math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf
