"""Anthropic's answers: messages, whole and as typed events, and its error object.

Knows the JSON shapes; knows neither sockets nor request bodies.
"""

from __future__ import annotations

from typing import Any, Final

from asyncllm.api import sse
from asyncllm.api.answer import Answer, Choice, Piece
from asyncllm.api.openai_reply import MARK
from asyncllm.core.request import Reason
from asyncllm.errors import RequestError

ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: RequestError) -> dict[str, Any]:
    """``{"type": "error", "error": {type, message}}``."""
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = ERROR_TYPES.get(error.status, usual)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class MessageReply:
    """/v1/messages: one choice, one text block, which is there only if there is text."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._open = False  # the text block has been begun
        delta = {"type": "text_delta", "text": MARK}
        event = {"type": "content_block_delta", "index": 0, "delta": delta}
        self._template = sse.template(event, MARK, _head("content_block_delta"))

    def opening(self) -> bytes:
        """The message's head, with the prompt's length."""
        usage = self._usage(0, 0)
        message = self._message([], None, None, usage)
        return _event({"type": "message_start", "message": message})

    def piece(self, choice: Choice, piece: Piece) -> bytes:
        """New text."""
        if not piece.text:
            return b""
        out = self._template[0] + sse.escaped(piece.text) + self._template[1]
        if self._open:
            return out
        self._open = True
        block = {"type": "text", "text": ""}
        return _event({"type": "content_block_start", "index": 0, "content_block": block}) + out

    def settle(self) -> bytes:
        """Nothing is ever held back."""
        return b""

    def end(self, choice: Choice) -> bytes:
        """The block's end, then why the message ends and what it took."""
        out = _event({"type": "content_block_stop", "index": 0}) if self._open else b""
        reason, stop = _reason(choice)
        usage = self._usage(choice.num_tokens, choice.cached_len)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return out + _event({"type": "message_delta", "delta": delta, "usage": usage})

    def closing(self) -> bytes:
        """The end mark."""
        return _event({"type": "message_stop"})

    def error(self, error: RequestError) -> bytes:
        """An error event."""
        return _event(error_body(error))

    def whole(self) -> bytes:
        """The answer in one piece."""
        (choice,) = self.answer.choices
        text = choice.text
        content = [{"type": "text", "text": text}] if text else []
        usage = self._usage(choice.num_tokens, choice.cached_len)
        return sse.body(self._message(content, *_reason(choice), usage))

    def _message(
        self,
        content: list[dict[str, Any]],
        reason: str | None,
        stop: str | None,
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        return {
            "id": self.answer.id,
            "type": "message",
            "role": "assistant",
            "model": self.answer.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        }

    def _usage(self, num_tokens: int, cached_len: int) -> dict[str, Any]:
        """The three inputs add up to the prompt; what came from the cache is known at the end."""
        return {
            "input_tokens": len(self.answer.prompts[0]) - cached_len,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached_len,
            "output_tokens": num_tokens,
        }


def _reason(choice: Choice) -> tuple[str, str | None]:
    """``stop_reason`` and ``stop_sequence``."""
    if choice.reason is Reason.LENGTH:
        return "max_tokens", None
    return ("stop_sequence", choice.stop) if choice.stop else ("end_turn", None)


def _head(kind: str) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: "


def _event(value: dict[str, Any]) -> bytes:
    return sse.event(value, _head(value["type"]))
