"""Items of OpenAI's responses, and how they become turns: messages, calls, results, reasoning.

Knows input items; knows no other field of a body.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from annotated_types import Len
from pydantic import BeforeValidator, Field

from asyncllm.api.common import json_body
from asyncllm.api.common.conversation import (
    MAX_MESSAGES,
    ConversationBuilder,
    Messages,
    PartsContent,
    PastArguments,
    text_of,
)
from asyncllm.api.common.custom_tool import INPUT
from asyncllm.api.common.other_fields import OF_ANSWERS
from asyncllm.api.common.request_model import Items, RequestModel, TaggedUnion, UnicodeStr
from asyncllm.api.common.validation import reject
from asyncllm.api.responses.tools import ClientTool

_OF_CALLS = {name: why for name, why in OF_ANSWERS.items() if name != "namespace"}


class SpeakerItem(RequestModel):
    ignored: ClassVar = OF_ANSWERS
    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer"]
    content: PartsContent


class AssistantItem(RequestModel):
    ignored: ClassVar = OF_ANSWERS
    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: PartsContent = ""


class CallItem(RequestModel):
    ignored: ClassVar = _OF_CALLS
    type: Literal["function_call"]
    call_id: UnicodeStr
    name: UnicodeStr
    namespace: UnicodeStr = ""
    arguments: PastArguments


class CustomCallItem(RequestModel):
    ignored: ClassVar = _OF_CALLS
    type: Literal["custom_tool_call"]
    call_id: UnicodeStr
    name: UnicodeStr
    namespace: UnicodeStr = ""
    input: UnicodeStr


class CompactionItem(RequestModel):
    """What only its maker can read."""

    ignored: ClassVar = OF_ANSWERS
    type: Literal["compaction", "compaction_summary"]
    encrypted_content: UnicodeStr


class ResultItem(RequestModel):
    ignored: ClassVar = {**OF_ANSWERS, "name": "its call has it"}
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: UnicodeStr
    output: PartsContent


class ReasoningText(RequestModel):
    ignored: ClassVar = {"type": "its place says it"}
    text: UnicodeStr


class ReasoningItem(RequestModel):
    ignored: ClassVar = {**OF_ANSWERS, "encrypted_content": "only its maker can read it"}
    type: Literal["reasoning"]
    content: Items[ReasoningText] = Field(default_factory=list)
    summary: Items[ReasoningText] = Field(default_factory=list)


_MessageItem = Annotated[SpeakerItem | AssistantItem, TaggedUnion(key="role")]
Item = Annotated[
    _MessageItem | CallItem | CustomCallItem | ResultItem | ReasoningItem | CompactionItem,
    TaggedUnion(other="items of type {} are not available"),
]


def _bounded(value: object) -> object:
    """Refuse arguments that take long to parse, before any of them is."""
    if isinstance(value, list):
        texts = [item.get("arguments") for item in value if isinstance(item, dict)]
        json_body.check_nested(
            (each for each in texts if isinstance(each, str)), "input: arguments of calls", "input"
        )
    return value


Input = Annotated[
    UnicodeStr | Annotated[Items[Item], Len(1, MAX_MESSAGES)],
    TaggedUnion("a string or an array of items"),
    BeforeValidator(_bounded),
]


def input_messages(given: str | Sequence[Item]) -> Messages:
    """The new turns in template form, but for the names of calls (``ResponsesTools.told``).
    Raises RequestError (400)."""
    builder = ConversationBuilder()
    if isinstance(given, str):
        builder.add_text("user", given)
        return builder.messages
    for item in given:
        match item:
            case SpeakerItem() | AssistantItem():
                role = "system" if item.role == "developer" else item.role
                builder.add_text(role, text_of(item.content))
            case CallItem():
                tool = ClientTool(item.name, item.namespace)
                builder.add_call(item.call_id, item.name, item.arguments, tool=tool)
            case CustomCallItem():
                tool = ClientTool(item.name, item.namespace, custom=True)
                builder.add_call(item.call_id, item.name, {INPUT: item.input}, tool=tool)
            case CompactionItem():
                pass
            case ResultItem():
                builder.add_result(item.call_id, text_of(item.output))
            case ReasoningItem():
                thought = "\n".join(each.text for each in item.content)
                if thought := thought or "\n".join(each.text for each in item.summary):
                    builder.add_reasoning(thought)
    if not builder.messages:
        reject("input: items of reasoning and compaction without text are no conversation", "input")
    return builder.messages
