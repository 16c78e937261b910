"""Converts Anthropic's messages to the messages of chat templates.

Knows content blocks; knows no other field of a body.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, Literal

from asyncllm.api.common.conversation import ConversationBuilder, Messages
from asyncllm.api.common.other_fields import CACHE_CONTROL, OF_ANSWERS
from asyncllm.api.common.request_model import (
    Items,
    RequestModel,
    TaggedUnion,
    ToldObject,
    Unavailable,
    UnicodeStr,
)

BILLING: Final = "x-anthropic-billing-header:"
_KIND: Final = TaggedUnion(other="a block of type {} is not available")
_SAID: Final = TaggedUnion("a string or an array of blocks")
_OF_CALLS: Final = {key: OF_ANSWERS[key] for key in ("caller", "toolset_name")} | CACHE_CONTROL


class TextBlock(RequestModel):
    ignored: ClassVar = {**CACHE_CONTROL, "citations": "the text stands for itself"}
    type: Literal["text"]
    text: UnicodeStr


class ThinkingBlock(RequestModel):
    ignored: ClassVar = {"signature": "reasoning is not checked"}
    type: Literal["thinking"]
    thinking: UnicodeStr


class RedactedThinking(RequestModel):
    """Reasoning that nobody here can read."""

    type: Literal["redacted_thinking"]
    data: UnicodeStr


class ToolUse(RequestModel):
    ignored: ClassVar = _OF_CALLS
    type: Literal["tool_use"]
    id: UnicodeStr
    name: UnicodeStr
    input: ToldObject


TextContent = Annotated[UnicodeStr | Items[Annotated[TextBlock, _KIND]], _SAID]


class ToolResult(RequestModel):
    ignored: ClassVar = _OF_CALLS
    type: Literal["tool_result"]
    tool_use_id: UnicodeStr
    content: TextContent = ""
    is_error: bool = False


_UserBlock = Annotated[TextBlock | ToolResult, _KIND]
_AssistantBlock = Annotated[TextBlock | ThinkingBlock | RedactedThinking | ToolUse, _KIND]


class SystemMessage(RequestModel):
    refused: ClassVar = {
        "clear_at": Unavailable("clearing a message later"),
        "output_config": Unavailable("options of one message", {}),
    }
    role: Literal["system"]
    content: TextContent


class UserMessage(RequestModel):
    role: Literal["user"]
    content: Annotated[UnicodeStr | Items[_UserBlock], _SAID]


class AssistantMessage(RequestModel):
    role: Literal["assistant"]
    content: Annotated[UnicodeStr | Items[_AssistantBlock], _SAID]


InputMessage = Annotated[UserMessage | AssistantMessage | SystemMessage, TaggedUnion(key="role")]


def conversation(given: Sequence[UserMessage | AssistantMessage | SystemMessage]) -> Messages:
    """The messages in template form; neighbours of one role are one turn, as Anthropic has it."""
    builder = ConversationBuilder()
    for message in given:
        role, content = message.role, message.content
        if isinstance(content, str) or all(isinstance(b, RedactedThinking) for b in content):
            builder.add_text(role, content if isinstance(content, str) else "")
            continue
        for block in content:
            match block:
                case RedactedThinking():
                    pass
                case TextBlock():
                    builder.add_text(role, block.text)
                case ThinkingBlock():
                    builder.add_reasoning(block.thinking)
                case ToolUse():
                    builder.add_call(block.id, block.name, block.input)
                case ToolResult():
                    given_back = text_of(block.content)
                    failed = "Error: " if block.is_error else ""
                    builder.add_result(block.tool_use_id, failed + given_back)
    return builder.messages


def with_recent_thoughts(turns: Messages, most: int) -> Messages:
    """The conversation with the reasoning of the last ``most`` turns that have any."""
    thoughts = [i for i, turn in enumerate(turns) if "reasoning_content" in turn]
    gone = set(thoughts[:-most])
    return [
        {key: value for key, value in turn.items() if i not in gone or key != "reasoning_content"}
        for i, turn in enumerate(turns)
    ]


def system_text(content: str | Sequence[TextBlock]) -> str:
    """The text of the system prompt, without what Claude Code tells Anthropic's billing: that is
    another for each request, so that no prompt would share its beginning with one before."""
    if isinstance(content, str):
        content = [TextBlock(type="text", text=content)]
    if content and content[0].text.startswith(BILLING):
        first = content[0].text.partition("\n")[2].strip()
        content = [*([TextBlock(type="text", text=first)] if first else []), *content[1:]]
    return text_of(content)


def text_of(content: str | Sequence[TextBlock]) -> str:
    """The text of a string or of text blocks."""
    if isinstance(content, str):
        return content
    return "\n".join(block.text for block in content)
