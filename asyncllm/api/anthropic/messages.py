"""Anthropic's messages to turns in template form: text, thinking, calls and results.

Knows content blocks; knows no other field of a body.
"""

from __future__ import annotations

from typing import Any, Final

from asyncllm.api.common.conversation import MAX_MESSAGES, ConversationBuilder, Messages
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.validation import expect, preview, reject, text

ROLES: Final = ("user", "assistant", "system")


def conversation(value: Any, name: str) -> Messages:
    """The messages in template form; neighbours of one role are one turn, as Anthropic has it.

    Raises:
        RequestError: 400. NotAvailable: 400, blocks that are neither text, thinking nor calls.
    """
    if not value:
        reject(f"{name} must hold at least one message", name)
    if len(value) > MAX_MESSAGES:
        reject(f"{name}: {len(value)} messages, at most {MAX_MESSAGES}", name)
    builder = ConversationBuilder()
    for i, message in enumerate(value):
        at = f"{name}[{i}]"
        expect(message, dict, at, "an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            reject(f"{at}.role: {preview(role)} is not one of {', '.join(ROLES)}", f"{at}.role")
        if isinstance(content, str):
            builder.add_text(role, text(content, f"{at}.content"))
            continue
        expect(content, list, f"{at}.content", "a string or an array of blocks")
        if not content:
            builder.add_text(role, "")
        for j, block in enumerate(content):
            _block(builder, role, block, f"{at}.content[{j}]")
    return builder.messages


def content_text(value: Any, name: str) -> str:
    """The text of a string or of text blocks. Raises RequestError or NotAvailable."""
    if isinstance(value, str):
        return text(value, name)
    expect(value, list, name, "a string or an array of blocks")
    return "\n".join(_text(block, f"{name}[{i}]") for i, block in enumerate(value))


def _block(builder: ConversationBuilder, role: str, value: Any, name: str) -> None:
    match role, _kind(value, name):
        case "assistant", "thinking":
            builder.add_reasoning(text(value.get("thinking"), f"{name}.thinking"))
        case "assistant", "redacted_thinking":
            text(value.get("data"), f"{name}.data")  # nobody here can read it
        case "assistant", "tool_use":
            given = expect(value.get("input"), dict, f"{name}.input", "an object")
            called = text(value.get("name"), f"{name}.name")
            builder.add_call(text(value.get("id"), f"{name}.id"), called, given)
        case "user", "tool_result":
            builder.add_result(
                text(value.get("tool_use_id"), f"{name}.tool_use_id"), _result(value, name)
            )
        case _:
            builder.add_text(role, _text(value, name))


def _result(value: dict[str, Any], name: str) -> str:
    """What a tool gave; an error says that it is one."""
    content = value.get("content")
    given = "" if content is None else content_text(content, f"{name}.content")
    failed = value.get("is_error")
    if failed is not None and expect(failed, bool, f"{name}.is_error", "true or false"):
        return f"Error: {given}"
    return given


def _text(value: Any, name: str) -> str:
    kind = _kind(value, name)
    if kind == "text":
        return text(value.get("text"), f"{name}.text")
    raise NotAvailable(
        f"{name}: a block of type {preview(kind)} is not available here on this server; text is",
        param=f"{name}.type",
    )


def _kind(value: Any, name: str) -> str:
    expect(value, dict, name, "an object")
    kind = value.get("type")
    if not isinstance(kind, str):
        reject(f"{name}.type must be a string, not {preview(kind)}", f"{name}.type")
    return kind
