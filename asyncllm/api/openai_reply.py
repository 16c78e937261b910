"""OpenAI's answers: completions and chat completions, whole and as chunks.

Knows the JSON shapes; knows neither sockets nor request bodies.
"""

from __future__ import annotations

from typing import Any, Final

from asyncllm.api import sse
from asyncllm.api.answer import REASONS, Answer, Choice, Vocab
from asyncllm.api.generation import Served
from asyncllm.errors import RequestError
from asyncllm.messages import Delta

MARK: Final = "\ue000text\ue001"  # stands for the text in a chunk template


class _OpenAIReply:
    """What both routes share: chunk framing, usage, the end of a stream."""

    kind = ""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._templates: dict[int, tuple[bytes, bytes]] = {}
        self._wants_logprobs = answer.generation.params.logprobs >= 0
        self._continuous = answer.generation.continuous_usage

    def settle(self) -> bytes:
        """Nothing is ever held back."""
        return b""

    def closing(self) -> bytes:
        """The usage chunk if it was asked for, and the end mark."""
        if not self.answer.generation.include_usage:
            return sse.DONE
        return sse.event(self._head() | {"choices": [], "usage": self.answer.usage()}) + sse.DONE

    def error(self, error: RequestError) -> bytes:
        """An error event."""
        return sse.error_event(error)

    def _head(self) -> dict[str, Any]:
        answer = self.answer
        return {
            "id": answer.id,
            "object": self.kind,
            "created": answer.created,
            "model": answer.model,
        }

    def _chunk(self, choice: Choice, body: dict[str, Any]) -> dict[str, Any]:
        """One chunk's JSON; ``usage`` is null where only the last chunk has it."""
        out = self._head() | {"choices": [{"index": choice.index} | body]}
        if self._continuous:
            out["usage"] = self.answer.usage(choice)
        elif self.answer.generation.include_usage:
            out["usage"] = None
        return out

    def _whole(self, kind: str, choices: list[dict[str, Any]]) -> bytes:
        return sse.body(
            self._head() | {"object": kind, "choices": choices, "usage": self.answer.usage()}
        )


class CompletionReply(_OpenAIReply):
    """/v1/completions."""

    kind = "text_completion"

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self._echoed: set[int] = set()  # choices whose prompt has been sent

    def opening(self) -> bytes:
        """The prompts, if echo wants them without log-probabilities."""
        if not self.answer.generation.echo or self._wants_logprobs:
            return b""
        unsaid = [c for c in self.answer.choices if c.index not in self._echoed]
        return b"".join(self._echo(choice) for choice in unsaid)

    def piece(self, choice: Choice, piece: Delta) -> bytes:
        """One chunk; with echo and logprobs the prompt's chunk once its scores are complete."""
        generation = self.answer.generation
        out = b""
        if generation.echo and choice.index not in self._echoed:
            complete = (
                len(choice.scores.logprobs) >= len(self.answer.prompts[choice.prompt_idx]) - 1
            )
            if complete or piece.ids:
                out = self._echo(choice)
        if self._wants_logprobs:
            if piece.ids or piece.text:
                count = len(piece.ids)
                logprobs = self._logprobs(choice, choice.num_tokens - count)
                out += self._event(choice, piece.text, logprobs)
        elif piece.text:
            out += self._event(choice, piece.text, None)
        return out

    def end(self, choice: Choice) -> bytes:
        """The chunk with the finish reason, after a prompt that is still to be echoed."""
        out = b""
        if self.answer.generation.echo and choice.index not in self._echoed:
            out = self._echo(choice)
        body = {"text": "", "logprobs": None, "finish_reason": _reason(choice)}
        return out + sse.event(self._chunk(choice, body))

    def whole(self) -> bytes:
        """The answer in one piece."""
        choices = []
        for choice in self.answer.choices:
            text, logprobs = choice.text, None
            if self._wants_logprobs:
                before = self._prompt_logprobs(choice) if self.answer.generation.echo else None
                logprobs = _joined(before, self._logprobs(choice, 0))
            if self.answer.generation.echo:
                text = self.answer.prompt_text(choice.prompt_idx) + text
            choices.append(
                {
                    "index": choice.index,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": _reason(choice),
                }
            )
        return self._whole(self.kind, choices)

    def _event(self, choice: Choice, text: str, logprobs: dict[str, Any] | None) -> bytes:
        if logprobs is not None or self._continuous:
            return sse.event(self._chunk(choice, self._body(text, logprobs)))
        if (ready := self._templates.get(choice.index)) is None:
            ready = sse.template(self._chunk(choice, self._body(MARK, None)), MARK)
            self._templates[choice.index] = ready
        return ready[0] + sse.escaped(text) + ready[1]

    def _body(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs, "finish_reason": None}

    def _echo(self, choice: Choice) -> bytes:
        self._echoed.add(choice.index)
        logprobs = self._prompt_logprobs(choice) if self._wants_logprobs else None
        return self._event(choice, self.answer.prompt_text(choice.prompt_idx), logprobs)

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
        text = self.answer.vocab.text
        best: dict[str, float | None] = {}
        for other, value in top:
            name = text(other)
            # the text of the token itself is its own, that of several others the best one's
            if other != token and (name in best or name == text(token)):
                name = f"token_id:{other}"
            best[name] = value
        best.setdefault(text(token), logprob)
        out["tokens"].append(text(token))
        out["token_logprobs"].append(logprob)
        out["top_logprobs"].append(best)
        out["text_offset"].append(offset)


class ChatReply(_OpenAIReply):
    """/v1/chat/completions."""

    kind = "chat.completion.chunk"

    def opening(self) -> bytes:
        """One chunk per choice that names the role."""
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._event(choice, delta, None, None) for choice in self.answer.choices)

    def piece(self, choice: Choice, piece: Delta) -> bytes:
        """One content chunk, if there is something to say."""
        if self._wants_logprobs:
            if not piece.ids and not piece.text:
                return b""
            logprobs = self._logprobs(choice, choice.num_tokens - len(piece.ids))
            return self._event(choice, {"content": piece.text}, logprobs, None)
        if not piece.text:
            return b""
        if self._continuous:
            return self._event(choice, {"content": piece.text}, None, None)
        if (ready := self._templates.get(choice.index)) is None:
            body = {"delta": {"content": MARK}, "logprobs": None, "finish_reason": None}
            ready = self._templates[choice.index] = sse.template(self._chunk(choice, body), MARK)
        return ready[0] + sse.escaped(piece.text) + ready[1]

    def end(self, choice: Choice) -> bytes:
        """An empty delta with the finish reason."""
        return self._event(choice, {}, None, self._reason(choice))

    def whole(self) -> bytes:
        """The answer in one piece."""
        choices = [
            {
                "index": choice.index,
                "message": self._message(choice),
                "logprobs": self._logprobs(choice, 0) if self._wants_logprobs else None,
                "finish_reason": self._reason(choice),
            }
            for choice in self.answer.choices
        ]
        return self._whole("chat.completion", choices)

    def _message(self, choice: Choice) -> dict[str, Any]:
        return {"role": "assistant", "content": choice.text, "refusal": None}

    def _reason(self, choice: Choice) -> str | None:
        return _reason(choice)

    def _event(
        self,
        choice: Choice,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        reason: str | None,
    ) -> bytes:
        body = {"delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return sse.event(self._chunk(choice, body))

    def _logprobs(self, choice: Choice, first: int) -> dict[str, Any]:
        return {"content": scored(self.answer.vocab, choice, first), "refusal": None}


def scored(vocab: Vocab, choice: Choice, first: int = 0) -> list[dict[str, Any]]:
    """The generated tokens from ``first`` on with their log-probabilities."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = list(vocab.piece(token))
        return {"token": vocab.text(token), "logprob": logprob, "bytes": raw}

    tokens = choice.tokens
    return [
        entry(tokens.ids[i], tokens.logprob(i))
        | {"top_logprobs": [entry(*best) for best in tokens.top(i)]}
        for i in range(first, len(tokens.ids))
    ]


def models(served: Served) -> bytes:
    """/v1/models."""
    return sse.body({"object": "list", "data": [model(served, name) for name in served.listed]})


def model(served: Served, name: str) -> dict[str, Any]:
    """/v1/models/{name}. Raises ModelNotFound (404)."""
    served.check_name(name)
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": served.owned_by,
        "root": served.name,
        "parent": None,
        "max_model_len": served.max_len,
    }


def _reason(choice: Choice) -> str | None:
    return None if choice.reason is None else REASONS[choice.reason]


def _no_logprobs() -> dict[str, Any]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _joined(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    return second if first is None else {key: first[key] + second[key] for key in second}
