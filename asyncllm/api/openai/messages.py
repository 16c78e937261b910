"""Validates chat messages and converts them to the form that chat templates expect.

Content becomes a string, roles lower case, tool-call arguments objects. Knows OpenAI's message
shapes; knows neither templates nor tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from asyncllm.api.common import conversation, json_body
from asyncllm.api.common.conversation import MAX_MESSAGES, content
from asyncllm.api.common.validation import expect, preview, reject, text

OTHER_NAMES: Final = {"developer": "system", "function": "tool"}  # of roles
ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def messages(value: Any, name: str) -> list[dict[str, Any]]:
    """The conversation in template form. Raises RequestError for an invalid message."""
    if not value:
        reject(f"{name} must hold at least one message", name)
    if len(value) > MAX_MESSAGES:
        reject(f"{name}: {len(value)} messages, at most {MAX_MESSAGES}", name)
    json_body.check_nested(_arguments(value), f"{name}: arguments of tool calls", name)
    return [_message(m, f"{name}[{i}]") for i, m in enumerate(value)]


def template_kwargs(value: Any, name: str) -> dict[str, Any]:
    """Extra variables of the chat template; see :func:`prepare.check_variables`."""
    kwargs = dict(value)
    # two families of templates, two names of one switch
    for one, other in (("thinking", "enable_thinking"), ("enable_thinking", "thinking")):
        if one in kwargs:
            kwargs.setdefault(other, kwargs[one])
    return kwargs


def _arguments(messages: list[Any]) -> Iterator[str]:
    """Every call's arguments that are JSON text, in the order in which they will be parsed."""
    for message in messages:
        if not isinstance(message, dict):
            continue
        calls = message.get("tool_calls")
        calls = calls if isinstance(calls, list) and calls else [message]
        for call in calls:
            if isinstance(call, dict):
                for key in ("function", "function_call"):
                    function = call.get(key)
                    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                        yield function["arguments"]


def _message(value: Any, name: str) -> dict[str, Any]:
    expect(value, dict, name, "an object")
    role = value.get("role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        reject(f"{name}.role: {preview(role)} is not one of {', '.join(ROLES)}", f"{name}.role")
    role = OTHER_NAMES.get(role.lower(), role.lower())
    out: dict[str, Any] = {"role": role}
    calls, old = value.get("tool_calls"), value.get("function_call")
    out["content"] = content(value.get("content"), f"{name}.content", role == "assistant")
    for key in ("name", "tool_call_id"):
        if value.get(key) is not None:
            out[key] = text(value[key], f"{name}.{key}")
    thoughts = (value.get("reasoning_content"), value.get("reasoning"))
    thought = next((given for given in thoughts if given not in (None, "")), None)
    if thought is not None:
        out["reasoning_content"] = text(thought, f"{name}.reasoning_content")
    if calls is not None and calls != []:
        expect(calls, list, f"{name}.tool_calls", "an array")
        out["tool_calls"] = [_call(c, f"{name}.tool_calls[{i}]") for i, c in enumerate(calls)]
    elif old is not None:
        out["tool_calls"] = [_call({"function": old}, name, "function_call")]
    return out


def _call(value: Any, name: str, inner: str = "function") -> dict[str, Any]:
    """A tool call of an earlier turn; templates want its arguments as an object."""
    expect(value, dict, name, "an object")
    at = f"{name}.{inner}"
    function = expect(value.get("function"), dict, at, "an object")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = conversation.arguments(arguments, f"{at}.arguments")
    else:
        expect(arguments, dict, f"{at}.arguments", "an object, as JSON")
    called = text(function.get("name"), f"{at}.name")
    out: dict[str, Any] = {
        "type": "function",
        "function": {"name": called, "arguments": arguments},
    }
    if value.get("id") is not None:
        out["id"] = text(value["id"], f"{name}.id")
    return out
