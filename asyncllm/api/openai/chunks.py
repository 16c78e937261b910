"""What OpenAI's completions and chat completions share: chunks, usage, the end of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asyncllm.api.common import sse
from asyncllm.api.common.answer import REASONS, Answer, Choice, Reply
from asyncllm.errors import RequestError


class OpenAIReply(Reply):
    """What both routes share: chunk framing, usage, the end of a stream."""

    kind = ""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._templates: dict[int, sse.ChunkTemplate] = {}
        self._wants_logprobs = answer.generation.params.logprobs >= 0
        self._continuous = answer.generation.continuous_usage
        self._wants_ids = answer.generation.token_ids

    def closing(self) -> bytes:
        """The usage chunk if it was asked for, and the end mark."""
        if not self.answer.generation.include_usage:
            return sse.DONE
        return sse.event(self._head() | {"choices": [], "usage": self.answer.usage()}) + sse.DONE

    def error(self, error: RequestError) -> bytes:
        """An error event."""
        return sse.error_event(error)

    def _logprobs(self, choice: Choice, first: int) -> dict[str, object]:
        """Of the tokens generated from ``first`` on."""
        raise NotImplementedError

    def _of_tokens(self, choice: Choice, count: int) -> dict[str, object]:
        """What a chunk says about its tokens, the newest ``count``, if that is wanted."""
        more: dict[str, object] = {}
        first = choice.num_tokens - count
        if self._wants_logprobs:
            more["logprobs"] = self._logprobs(choice, first)
        if self._wants_ids:
            more["token_ids"] = list(choice.tokens.ids[first:])
        return more

    def _name(self, token: int) -> str:
        """What a token with a log-probability is called."""
        as_id = self.answer.generation.tokens_as_ids
        return f"token_id:{token}" if as_id else self.answer.vocab.text(token)

    def _head(self) -> dict[str, object]:
        answer = self.answer
        return {
            "id": answer.id,
            "object": self.kind,
            "created": answer.created,
            "model": answer.model,
        } | ({"system_fingerprint": answer.fingerprint} if answer.fingerprint else {})

    def _chunk(self, choice: Choice, body: Mapping[str, object]) -> dict[str, object]:
        """One chunk's JSON; ``usage`` is null where only the last chunk has it."""
        out = self._head() | {"choices": [{"index": choice.index, **body}]}
        if self._continuous:
            out["usage"] = self.answer.usage(choice)
        elif self.answer.generation.include_usage:
            out["usage"] = None
        return out

    def _whole(
        self,
        kind: str,
        choices: Sequence[Mapping[str, object]],
        more: Mapping[str, object] | None = None,
    ) -> bytes:
        out = {"object": kind, "choices": choices, "usage": self.answer.usage()}
        return sse.body(self._head() | out | dict(more or {}))


def finish_reason(choice: Choice) -> str | None:
    return None if choice.reason is None else REASONS[choice.reason]
