"""Converts items of OpenAI's responses to the messages of chat templates.

Knows input items; knows no other field of a body.
"""

from __future__ import annotations

from typing import Any, Final

from asyncllm.api.common import conversation, json_body
from asyncllm.api.common.conversation import ConversationBuilder, Messages
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.validation import expect, preview, reject, text
from asyncllm.api.responses.tools import INPUT

ROLES: Final = ("user", "assistant", "system", "developer")


def input_messages(value: Any, name: str) -> Messages:
    """The new turns in template form. Raises RequestError, NotAvailable (400)."""
    builder = ConversationBuilder()
    if isinstance(value, str):
        builder.add_text("user", text(value, name))
        return builder.messages
    expect(value, list, name, "a string or an array of items")
    if not value:
        reject(f"{name} must hold at least one item", name)
    if len(value) > conversation.MAX_MESSAGES:
        reject(f"{name}: {len(value)} items, at most {conversation.MAX_MESSAGES}", name)
    texts = (item.get("arguments") for item in value if isinstance(item, dict))
    json_body.check_nested(
        (each for each in texts if isinstance(each, str)), f"{name}: arguments of calls", name
    )
    for i, item in enumerate(value):
        _item(builder, expect(item, dict, f"{name}[{i}]", "an object"), f"{name}[{i}]")
    if not builder.messages:
        reject(f"{name}: items of reasoning and compaction without text are no conversation", name)
    return builder.messages


def _item(builder: ConversationBuilder, item: dict[str, Any], name: str) -> None:
    kind = item.get("type", "message")
    if not isinstance(kind, str):
        reject(f"{name}.type must be a string, not {preview(kind)}", f"{name}.type")
    match kind:
        case "message":
            role = item.get("role")
            if role not in ROLES:
                reject(
                    f"{name}.role: {preview(role)} is not one of {', '.join(ROLES)}", f"{name}.role"
                )
            messages = conversation.content(
                item.get("content"), f"{name}.content", role == "assistant"
            )
            builder.add_text("system" if role == "developer" else role, messages)
        case "function_call":
            builder.add_call(
                text(item.get("call_id"), f"{name}.call_id"),
                text(item.get("name"), f"{name}.name"),
                conversation.arguments(item.get("arguments"), f"{name}.arguments"),
            )
        case "function_call_output" | "custom_tool_call_output":
            key = text(item.get("call_id"), f"{name}.call_id")
            builder.add_result(key, conversation.content(item.get("output"), f"{name}.output"))
        case "custom_tool_call":
            given = {INPUT: text(item.get("input"), f"{name}.input")}
            called = text(item.get("name"), f"{name}.name")
            builder.add_call(text(item.get("call_id"), f"{name}.call_id"), called, given)
        case "compaction" | "compaction_summary":
            text(item.get("encrypted_content"), f"{name}.encrypted_content")  # not for us to read
        case "reasoning":
            thought = _texts(item, "content", name) or _texts(item, "summary", name)
            if thought:
                builder.add_reasoning(thought)
        case _:
            raise NotAvailable(
                f"{name}: items of type {preview(kind)} are not available on this server; message,"
                " function_call, custom_tool_call, their outputs, reasoning and compaction are",
                param=f"{name}.type",
            )


def _texts(item: dict[str, Any], key: str, name: str) -> str:
    """The texts of a list of parts, which may be missing."""
    at, parts = f"{name}.{key}", item.get(key)
    if parts is None:
        return ""
    return "\n".join(
        text(expect(part, dict, f"{at}[{i}]", "an object").get("text"), f"{at}[{i}].text")
        for i, part in enumerate(expect(parts, list, at, "an array"))
    )
