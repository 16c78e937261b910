"""Turns of a conversation in template form, made of blocks or items one by one.

Knows what chat templates expect: one turn per role in a row, calls with the assistant's words, each
result a turn. Knows no protocol's JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import PlainValidator

from asyncllm.api.common.other_fields import CACHE_HINT
from asyncllm.api.common.request_model import (
    AnyObject,
    Items,
    RequestModel,
    TaggedUnion,
    UnicodeStr,
    encodable,
    refuse,
    surrogate,
)
from asyncllm.api.common.validation import preview

MAX_MESSAGES: Final = 4096

Messages = list[dict[str, Any]]
CallArguments = dict[str, object] | str  # str: that is no JSON object, as it stands in the answer
_IN_PIECES: Final = ("content", "reasoning_content")


class ConversationBuilder:
    """Gathers a conversation; what one role says in a row is one turn."""

    def __init__(self) -> None:
        # texts as lists of their pieces: joined once, so that many pieces cost what their text does
        self._made: Messages = []

    @property
    def messages(self) -> Messages:
        """What has been gathered so far."""
        return [
            turn
            if turn["role"] == "tool"
            else turn | {key: "\n".join(turn[key]) for key in _IN_PIECES if key in turn}
            for turn in self._made
        ]

    def add_text(self, role: str, content: str) -> None:
        """More of what somebody says."""
        _append(self._turn(role)["content"], content)

    def add_reasoning(self, thought: str) -> None:
        """More of what the assistant thinks."""
        _append(self._turn("assistant").setdefault("reasoning_content", []), thought)

    def add_call(self, key: str, name: str, arguments: CallArguments, **more: object) -> None:
        """The assistant calls a tool. ``more``: what else is to be known of it, for the caller."""
        function = {"name": name, "arguments": arguments, **more}
        calls = self._turn("assistant").setdefault("tool_calls", [])
        calls.append({"type": "function", "function": function, "id": key})

    def add_result(self, key: str, content: str) -> None:
        """What the call ``key`` gave."""
        self._made.append({"role": "tool", "content": content, "tool_call_id": key})

    def _turn(self, role: str) -> dict[str, Any]:
        if not self._made or self._made[-1]["role"] != role:
            self._made.append({"role": role, "content": []})
        return self._made[-1]


def _append(pieces: list[str], piece: str) -> None:
    """Nothing is put between an empty beginning and what follows."""
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


class TextPart(RequestModel):
    ignored: ClassVar = {
        **CACHE_HINT,
        "annotations": "the text stands for itself",
        "logprobs": "the text stands for itself",
    }
    type: Literal["text", "input_text", "output_text"]
    text: UnicodeStr


class RefusalPart(RequestModel):
    type: Literal["refusal"]
    refusal: UnicodeStr


ContentPart = Annotated[
    UnicodeStr | TextPart | RefusalPart, TaggedUnion(other="content of type {} is not available")
]
PartsContent = Annotated[
    UnicodeStr | Items[ContentPart], TaggedUnion("a string or an array of parts")
]


def text_of(content: str | Sequence[str | TextPart | RefusalPart]) -> str:
    """The text of a string or of parts."""
    if isinstance(content, str):
        return content
    return "\n".join([part if isinstance(part, str) else _text_of_part(part) for part in content])


def _text_of_part(part: TextPart | RefusalPart) -> str:
    return part.text if isinstance(part, TextPart) else part.refusal


def parsed_arguments(value: object) -> CallArguments:
    """Those of an earlier call, given as JSON text or as they are; null: none. What is cut, or no
    object, or half a character, is text: models write such, and answers have had it. For
    validators."""
    if value is None or isinstance(value, dict):
        return encodable(value or {})
    if not isinstance(value, str):
        refuse(f" must be an object, as JSON, not {preview(value)}")
    if (why := surrogate(value)) is not None:
        refuse(why)
    try:
        found = json.loads(value) if value.strip() else {}
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict) else value


PastArguments = Annotated[
    CallArguments,
    PlainValidator(parsed_arguments, json_schema_input_type=AnyObject | UnicodeStr | None),
]
