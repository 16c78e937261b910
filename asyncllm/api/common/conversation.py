"""Builds the messages that chat templates expect from blocks or items.

Knows what chat templates expect: one turn per role in a row, calls with the assistant's words, each
result a turn. Knows no protocol's JSON.
"""

from __future__ import annotations

import json
from typing import Any, Final

from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.validation import expect, preview, reject, text

MAX_MESSAGES: Final = 4096

Messages = list[dict[str, Any]]
CallArguments = dict[str, Any] | str  # str: that is no JSON object, as it stands in the answer
_IN_PIECES: Final = ("content", "reasoning_content")


class ConversationBuilder:
    """Collects a conversation; successive parts of one role become one message."""

    def __init__(self) -> None:
        # texts as lists of their pieces: joined once, so that many pieces cost what their text does
        self._made: Messages = []

    @property
    def messages(self) -> Messages:
        """The messages so far."""
        return [
            {key: "\n".join(v) if key in _IN_PIECES else v for key, v in turn.items()}
            for turn in self._made
        ]

    def add_text(self, role: str, content: str) -> None:
        """Add text to the message of ``role``, a new one if another role spoke last."""
        _append(self._turn(role)["content"], content)

    def add_reasoning(self, thought: str) -> None:
        """Add reasoning to the assistant's message."""
        _append(self._turn("assistant").setdefault("reasoning_content", []), thought)

    def add_call(self, key: str, name: str, arguments: CallArguments) -> None:
        """Add a tool call to the assistant's message."""
        function = {"name": name, "arguments": arguments}
        calls = self._turn("assistant").setdefault("tool_calls", [])
        calls.append({"type": "function", "function": function, "id": key})

    def add_result(self, key: str, content: str) -> None:
        """Add the result of the call ``key``."""
        self._made.append({"role": "tool", "content": [content], "tool_call_id": key})

    def _turn(self, role: str) -> dict[str, Any]:
        if not self._made or self._made[-1]["role"] != role:
            self._made.append({"role": role, "content": []})
        return self._made[-1]


def _append(pieces: list[str], piece: str) -> None:
    """An empty first piece is dropped, so that nothing separates it from the next."""
    if pieces == [""]:
        pieces.clear()
    pieces.append(piece)


def with_system(system: str | None, messages: Messages) -> Messages:
    """One system message in front: many templates know no second one."""
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        system = f"{system}\n{messages[0]['content']}"
        messages = messages[1:]
    return [{"role": "system", "content": system}, *messages]


def arguments(value: Any, name: str) -> CallArguments:
    """The arguments of an earlier call, given as JSON text. What is cut, or no object, is text:
    models write such, and answers have had it. Raises RequestError unless it is a string."""
    raw = text(value, name)
    try:
        found = json.loads(raw) if raw.strip() else {}
    except (ValueError, RecursionError):
        return raw
    return found if isinstance(found, dict) else raw


def content(value: Any, name: str, may_miss: bool = False) -> str:
    """The text of a string or of text parts. Raises RequestError, NotAvailable (400)."""
    if value is None:
        if not may_miss:
            reject(f"{name} is missing", name)
        return ""
    if isinstance(value, str):
        return text(value, name)
    expect(value, list, name, "a string or an array of parts")
    return "\n".join(_part(part, f"{name}[{i}]") for i, part in enumerate(value))


def _part(value: Any, name: str) -> str:
    if isinstance(value, str):
        return text(value, name)
    expect(value, dict, name, "an object")
    kind = value.get("type")
    if kind in ("text", "input_text", "output_text"):
        return text(value.get("text"), f"{name}.text")
    if kind == "refusal":
        return text(value.get("refusal"), f"{name}.refusal")
    if not isinstance(kind, str):
        reject(f"{name}.type must be a string, not {preview(kind)}", f"{name}.type")
    raise NotAvailable(
        f"{name}: content of type {preview(kind)} is not available on this server; text is",
        param=f"{name}.type",
    )
