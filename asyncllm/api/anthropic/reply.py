"""Anthropic's answers: messages, whole and as typed events, and its error object.

Knows the JSON shapes; knows neither sockets nor request bodies.
"""

from __future__ import annotations

import json
from typing import Any, Final

from asyncllm.api.common import sse
from asyncllm.api.common.answer import Answer, Choice
from asyncllm.api.common.content_blocks import ContentBlock, ContentBlockReply
from asyncllm.api.parsing.events import CallStart, Content, Reasoning
from asyncllm.errors import RequestError
from asyncllm.records import Overflow

ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# type of a delta, and the key of its text
DELTAS: Final = {
    Content: ("text_delta", "text"),
    Reasoning: ("thinking_delta", "thinking"),
    CallStart: ("input_json_delta", "partial_json"),
}


def error_body(error: RequestError) -> dict[str, object]:
    """``{"type": "error", "error": {type, message}}``, with ``details`` where there are some."""
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    told: dict[str, object] = {
        "type": ERROR_TYPES.get(error.status, usual),
        "message": error.message if error.overflow is None else _overflow(error.overflow),
    }
    if error.details is not None:
        told["details"] = error.details
    return {"type": "error", "error": told}


def _overflow(found: Overflow) -> str:
    """Anthropic's own words, which clients look for: they shorten what does not fit."""
    prompt_len, most, limit = found.prompt_len, found.max_tokens, found.limit
    if not most:
        return f"prompt is too long: {prompt_len} tokens > {limit} maximum ({found.flag})"
    return (
        f"input length and `max_tokens` exceed context limit: {prompt_len} + {most} > {limit},"
        f" decrease input length or `max_tokens` and try again ({found.flag})"
    )


class MessageReply(ContentBlockReply):
    """/v1/messages: one choice, a block for each part.

    Clients send thinking back only with a signature, so it has one: the message's id.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self._delta: sse.ChunkTemplate  # of the block in progress

    def opening(self) -> bytes:
        """The start of the message, with the prompt's length."""
        message = self._message([], None, None, self._usage(0, 0))
        return _event({"type": "message_start", "message": message})

    def block_start(self, block: ContentBlock) -> bytes:
        """The start of the block."""
        kind, key = DELTAS[block.kind]
        event = {"type": "content_block_delta", "index": block.index}
        delta = event | {"delta": {"type": kind, key: sse.MARK}}
        self._delta = sse.ChunkTemplate(delta, sse.head("content_block_delta"))
        empty = self._block(block, empty=True)
        return _event({"type": "content_block_start", "index": block.index, "content_block": empty})

    def block_delta(self, block: ContentBlock, text: str) -> bytes:
        """A delta."""
        return self._delta.text(text)

    def block_stop(self, block: ContentBlock) -> bytes:
        """The block's end."""
        out, index = b"", block.index
        if block.kind is Reasoning:
            delta = {"type": "signature_delta", "signature": self.answer.id}
            out = _event({"type": "content_block_delta", "index": index, "delta": delta})
        return out + _event({"type": "content_block_stop", "index": index})

    def end(self, choice: Choice) -> bytes:
        """The last block's end, then why the message ends and what it took."""
        out = self.flush(choice)
        reason, stop = _reason(choice)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return out + _event({"type": "message_delta", "delta": delta, "usage": self._used(choice)})

    def closing(self) -> bytes:
        """The end mark."""
        return _event({"type": "message_stop"})

    def error(self, error: RequestError) -> bytes:
        """An error event."""
        return _event(error_body(error))

    def whole(self) -> bytes:
        """The answer in one piece; a call whose input is cut is left out."""
        (choice,) = self.answer.choices
        content = [
            self._block(block)
            for block in self.all_blocks(choice)
            if block.complete or block.kind is not CallStart
        ]
        return sse.body(self._message(content, *_reason(choice), self._used(choice)))

    def _block(self, block: ContentBlock, empty: bool = False) -> dict[str, object]:
        text = "" if empty else block.text
        if block.call is not None:
            value = json.loads(text) if text else {}
            call = block.call
            return {"type": "tool_use", "id": call.id, "name": call.name, "input": value}
        if block.kind is Reasoning:
            signature = "" if empty else self.answer.id
            return {"type": "thinking", "thinking": text, "signature": signature}
        return {"type": "text", "text": text}

    def _message(
        self,
        content: list[dict[str, object]],
        reason: str | None,
        stop: str | None,
        usage: dict[str, object],
    ) -> dict[str, object]:
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

    def _used(self, choice: Choice) -> dict[str, object]:
        """The usage of an answer that has ended."""
        usage = self._usage(choice.num_tokens, choice.cached_len)
        if choice.output is not None and choice.output.looks_for_reasoning:
            usage["output_tokens_details"] = {"thinking_tokens": choice.output.num_reasoning_tokens}
        return usage

    def _usage(self, num_tokens: int, cached_len: int) -> dict[str, object]:
        """The three inputs add up to the prompt; what came from the cache is known at the end."""
        return {
            "input_tokens": len(self.answer.prompts[0]) - cached_len,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached_len,
            "output_tokens": num_tokens,
        }


def _reason(choice: Choice) -> tuple[str, str | None]:
    """``stop_reason`` and ``stop_sequence``; there is none for an answer that was aborted, but one
    for answers that are not whole."""
    if choice.is_cut:
        return "max_tokens", None
    if choice.output is not None and choice.output.finish_reason("stop") == "tool_calls":
        return "tool_use", None
    return ("stop_sequence", choice.stop) if choice.stop else ("end_turn", None)


def _event(value: dict[str, Any]) -> bytes:
    return sse.event(value, sse.head(value["type"]))
