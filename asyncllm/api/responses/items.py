"""Items of OpenAI's responses to turns in template form: messages, calls, results, reasoning.

Knows input items; knows no other field of a body.
"""

from __future__ import annotations

from typing import Any, Final

from asyncllm.api.common import conversation, json_body
from asyncllm.api.common.conversation import Turns, TurnsMaker
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.validation import bad, show, text, typed

ROLES: Final = ("user", "assistant", "system", "developer")


def input_turns(value: Any, name: str) -> Turns:
    """The new turns in template form. Raises RequestError, NotAvailable (400)."""
    maker = TurnsMaker()
    if isinstance(value, str):
        maker.say("user", text(value, name))
        return maker.turns
    typed(value, list, name, "a string or an array of items")
    if not value:
        bad(f"{name} must hold at least one item", name)
    if len(value) > conversation.MAX_MESSAGES:
        bad(f"{name}: {len(value)} items, at most {conversation.MAX_MESSAGES}", name)
    texts = (item.get("arguments") for item in value if isinstance(item, dict))
    json_body.check_nested(
        (each for each in texts if isinstance(each, str)), f"{name}: arguments of calls", name
    )
    for i, item in enumerate(value):
        _item(maker, typed(item, dict, f"{name}[{i}]", "an object"), f"{name}[{i}]")
    if not maker.turns:
        bad(f"{name}: an item of reasoning without text is no conversation", name)
    return maker.turns


def _item(maker: TurnsMaker, item: dict[str, Any], name: str) -> None:
    kind = item.get("type", "message")
    if not isinstance(kind, str):
        bad(f"{name}.type must be a string, not {show(kind)}", f"{name}.type")
    match kind:
        case "message":
            role = item.get("role")
            if role not in ROLES:
                bad(f"{name}.role: {show(role)} is not one of {', '.join(ROLES)}", f"{name}.role")
            said = conversation.content(item.get("content"), f"{name}.content", role == "assistant")
            maker.say("system" if role == "developer" else role, said)
        case "function_call":
            maker.call(
                text(item.get("call_id"), f"{name}.call_id"),
                text(item.get("name"), f"{name}.name"),
                conversation.arguments(item.get("arguments"), f"{name}.arguments"),
            )
        case "function_call_output":
            key = text(item.get("call_id"), f"{name}.call_id")
            maker.result(key, conversation.content(item.get("output"), f"{name}.output"))
        case "reasoning":
            thought = _texts(item, "content", name) or _texts(item, "summary", name)
            if thought:
                maker.think(thought)
        case _:
            raise NotAvailable(
                f"{name}: items of type {show(kind)} are not available on this server; message,"
                " function_call, function_call_output and reasoning are",
                param=f"{name}.type",
            )


def _texts(item: dict[str, Any], key: str, name: str) -> str:
    """The texts of a list of parts, which may be missing."""
    at, parts = f"{name}.{key}", item.get(key)
    if parts is None:
        return ""
    return "\n".join(
        text(typed(part, dict, f"{at}[{i}]", "an object").get("text"), f"{at}[{i}].text")
        for i, part in enumerate(typed(parts, list, at, "an array"))
    )
