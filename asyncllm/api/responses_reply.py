"""OpenAI's Responses: the answer, whole and as typed events.

Knows the JSON shapes; knows neither sockets nor request bodies.
"""

from __future__ import annotations

from typing import Any

from asyncllm.api import sse
from asyncllm.api.answer import Answer, Choice, Piece
from asyncllm.api.responses import Asked, Store, answered
from asyncllm.core.request import Reason
from asyncllm.errors import RequestError


class ResponseReply:
    """/v1/responses: one message of one text part; a finished one goes into ``store``."""

    def __init__(self, answer: Answer, asked: Asked, store: Store) -> None:
        self.answer, self._asked, self._store = answer, asked, store
        self._item_id = "msg_" + answer.id.removeprefix("resp_")
        self._number = 0  # of the next event
        kind = "response.output_text.delta"
        head = {
            "type": kind,
            "item_id": self._item_id,
            "output_index": 0,
            "content_index": 0,
            "delta": "",
        }
        self._delta = _head(kind) + sse.body(head).removesuffix(b'""}')

    def opening(self) -> bytes:
        """The response and its one item, both empty."""
        response = self._response("in_progress", [])
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._item_event("added", "in_progress", [])
            + self._part_event("content_part.added", part=_part(""))
        )

    def piece(self, choice: Choice, piece: Piece) -> bytes:
        """New text."""
        if not piece.text:
            return b""
        tail = b',"logprobs":[],"sequence_number":%d}\n\n' % self._next()
        return self._delta + sse.escaped(piece.text) + tail

    def settle(self) -> bytes:
        """Nothing is ever held back."""
        return b""

    def end(self, choice: Choice) -> bytes:
        """The whole text once more, part by part."""
        text = choice.text
        return (
            self._part_event("output_text.done", text=text, logprobs=[])
            + self._part_event("content_part.done", part=_part(text))
            + self._item_event("done", _status(choice), [_part(text)])
        )

    def closing(self) -> bytes:
        """The whole response."""
        (choice,) = self.answer.choices
        response = self._finish(choice)
        return self._event(f"response.{response['status']}", response=response)

    def error(self, error: RequestError) -> bytes:
        """The response as a failed one."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failure = {"code": code, "message": error.message}
        response = self._response("failed", []) | {"error": failure}
        return self._event("response.failed", response=response)

    def whole(self) -> bytes:
        """The answer in one piece."""
        (choice,) = self.answer.choices
        return sse.body(self._finish(choice))

    def _finish(self, choice: Choice) -> dict[str, Any]:
        """The finished response, which is stored if it may be."""
        status, text = _status(choice), choice.text
        response = self._response(status, [self._item(status, [_part(text)])])
        usage = self.answer.usage()
        response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if self._asked.echo["store"]:
            stored = answered(self._asked, text, sse.body(response))
            self._store.put(self.answer.id, stored)
        return response

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.answer.id,
            "object": "response",
            "created_at": self.answer.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self.answer.model,
            "output": output,
            "parallel_tool_calls": True,
            "service_tier": "default",
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": 0,
            "truncation": "disabled",
            "usage": None,
        } | self._asked.echo

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _item_event(self, kind: str, status: str, content: list[dict[str, Any]]) -> bytes:
        item = self._item(status, content)
        return self._event(f"response.output_item.{kind}", output_index=0, item=item)

    def _part_event(self, kind: str, **more: Any) -> bytes:
        where = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return self._event(f"response.{kind}", **where, **more)

    def _event(self, kind: str, **more: Any) -> bytes:
        return sse.event({"type": kind, **more, "sequence_number": self._next()}, _head(kind))

    def _next(self) -> int:
        self._number += 1
        return self._number - 1


def _head(kind: str) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: "


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(choice: Choice) -> str:
    return "incomplete" if choice.reason is Reason.LENGTH else "completed"
