"""OpenAI's completions, whole and as chunks.

Knows the JSON shapes; knows neither sockets nor request bodies.
"""

from __future__ import annotations

from typing import Any

from asyncllm.api.common import sse
from asyncllm.api.common.answer import Answer, Choice
from asyncllm.api.openai.chunks import OpenAIReply, finish_reason


class CompletionReply(OpenAIReply):
    """/v1/completions."""

    kind = "text_completion"

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self._echoes = answer.generation.echo
        self._echoed: set[int] = set()  # choices whose prompt has been sent
        self._told: set[int] = set()  # choices of whose prompt the ids have been sent

    def opening(self) -> bytes:
        """The prompts, if echo wants them without log-probabilities."""
        if not self._echoes or self._wants_logprobs:
            return b""
        unsaid = [c for c in self.answer.choices if c.index not in self._echoed]
        return b"".join(self._echo(choice) for choice in unsaid)

    def piece(self, choice: Choice, text: str, count: int) -> bytes:
        """One chunk; with echo and logprobs the prompt's chunk once its scores are complete."""
        out = b""
        if self._echoes and choice.index not in self._echoed:
            complete = (
                len(choice.scores.logprobs) >= len(self.answer.prompts[choice.prompt_idx]) - 1
            )
            if complete or count:
                out = self._echo(choice)
        if self._wants_logprobs or self._wants_ids:
            if count or text:
                out += self._event(choice, text, self._of_tokens(choice, count))
        elif text:
            out += self._event(choice, text)
        return out

    def _of_tokens(self, choice: Choice, count: int) -> dict[str, object]:
        more = super()._of_tokens(choice, count)
        if self._wants_ids:
            first = choice.index not in self._told
            self._told.add(choice.index)
            prompt = self.answer.prompts[choice.prompt_idx]
            more["prompt_token_ids"] = list(prompt) if first else None
        return more

    def end(self, choice: Choice) -> bytes:
        """The chunk with the finish reason, after a prompt that is still to be echoed."""
        out = b""
        if self._echoes and choice.index not in self._echoed:
            out = self._echo(choice)
        body = {"text": "", "logprobs": None, "finish_reason": finish_reason(choice)}
        return out + sse.event(self._chunk(choice, body))

    def whole(self) -> bytes:
        """The answer in one piece."""
        choices = []
        for choice in self.answer.choices:
            text, logprobs = choice.text, None
            if self._wants_logprobs:
                before = self._prompt_logprobs(choice) if self._echoes else None
                logprobs = _joined(before, self._logprobs(choice, 0))
            if self._echoes:
                text = self.answer.prompt_text(choice.prompt_idx) + text
            choices.append(
                {
                    "index": choice.index,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": finish_reason(choice),
                }
            )
            if self._wants_ids:
                prompt = self.answer.prompts[choice.prompt_idx]
                choices[-1] |= {
                    "token_ids": list(choice.tokens.ids),
                    "prompt_token_ids": list(prompt),
                }
        return self._whole(self.kind, choices)

    def _event(self, choice: Choice, text: str, more: dict[str, Any] | None = None) -> bytes:
        if more or self._continuous:
            return sse.event(self._chunk(choice, self._body(text) | (more or {})))
        if (ready := self._templates.get(choice.index)) is None:
            ready = sse.ChunkTemplate(self._chunk(choice, self._body(sse.MARK)))
            self._templates[choice.index] = ready
        return ready.text(text)

    def _body(self, text: str) -> dict[str, Any]:
        return {"text": text, "logprobs": None, "finish_reason": None}

    def _echo(self, choice: Choice) -> bytes:
        self._echoed.add(choice.index)
        more = {"logprobs": self._prompt_logprobs(choice)} if self._wants_logprobs else {}
        return self._event(choice, self.answer.prompt_text(choice.prompt_idx), more)

    def _prompt_logprobs(self, choice: Choice) -> dict[str, Any]:
        """Of the prompt's tokens; the first has no log-probability."""
        out, scores = _no_logprobs(), choice.scores
        ids, text = (
            self.answer.prompts[choice.prompt_idx],
            self.answer.prompt_text(choice.prompt_idx),
        )
        for i, (token, at) in enumerate(
            zip(ids, self.answer.vocab.offsets(text, ids), strict=True)
        ):
            if i == 0:
                self._append(out, at, token, None, [])
                out["top_logprobs"][0] = None
            else:
                self._append(out, at, token, scores.logprob(i - 1), scores.top(i - 1))
        choice.offset = len(text)
        return out

    def _logprobs(self, choice: Choice, first: int) -> dict[str, Any]:
        """Of the generated tokens from ``first`` on."""
        out, tokens = _no_logprobs(), choice.tokens
        for i in range(first, len(tokens.ids)):
            self._append(out, choice.offset, tokens.ids[i], tokens.logprob(i), tokens.top(i))
            choice.offset += len(choice.pieces[i])
        return out

    def _append(
        self,
        out: dict[str, Any],
        offset: int,
        token: int,
        logprob: float | None,
        top: list[tuple[int, float]],
    ) -> None:
        own = self._name(token)
        best: dict[str, float | None] = {}
        for other, value in top:
            name = self._name(other)
            # the text of the token itself is its own, that of several others the best one's
            if other != token and (name in best or name == own):
                name = f"token_id:{other}"
            best[name] = value
        best.setdefault(own, logprob)
        out["tokens"].append(own)
        out["token_logprobs"].append(logprob)
        out["top_logprobs"].append(best)
        out["text_offset"].append(offset)


def _no_logprobs() -> dict[str, Any]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _joined(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    return second if first is None else {key: first[key] + second[key] for key in second}
