"""Chat messages: checked, and brought to the one form chat templates expect.

Content becomes a string, roles lower case, tool-call arguments objects. Knows OpenAI's message
shapes; knows neither templates nor tokens.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any, Final

from asyncllm.api import jsonbody
from asyncllm.api.errors import NotAvailable
from asyncllm.api.fields import bad, show, text, typed

MAX_MESSAGES: Final = 4096
OTHER_NAMES: Final = {"developer": "system", "function": "tool"}  # of roles
ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# variables of templates that other fields of a request set
OWN_VARIABLES: Final = frozenset(
    {"add_generation_prompt", "continue_final_message", "documents", "messages", "tools"}
)
# what clients say to every model, whether its template knows it or not
USUAL_VARIABLES: Final = frozenset({"enable_thinking", "reasoning_effort", "thinking"})


def messages(value: Any, name: str) -> list[dict[str, Any]]:
    """The conversation in template form. Raises RequestError for a message that is none."""
    if not value:
        bad(f"{name} must hold at least one message", name)
    if len(value) > MAX_MESSAGES:
        bad(f"{name}: {len(value)} messages, at most {MAX_MESSAGES}", name)
    jsonbody.check_nested(_arguments(value), f"{name}: arguments of tool calls", name)
    return [_message(m, f"{name}[{i}]") for i, m in enumerate(value)]


def template_kwargs(value: Any, name: str) -> dict[str, Any]:
    """Extra variables of the chat template; which there may be is for :func:`check_variables`."""
    kwargs = dict(value)
    # two families of templates, two names of one switch
    for one, other in (("thinking", "enable_thinking"), ("enable_thinking", "thinking")):
        if one in kwargs:
            kwargs.setdefault(other, kwargs[one])
    return kwargs


def settable(variables: Collection[str]) -> list[str]:
    """Those that requests may set, of the variables of a template; sorted."""
    return sorted(USUAL_VARIABLES.union(variables) - OWN_VARIABLES)


def check_variables(kwargs: dict[str, Any], variables: Collection[str], name: str) -> None:
    """Raises RequestError for a name that is no variable of the template, or not to be set."""
    known = settable(variables)
    for key in kwargs:
        if key not in known:
            bad(f"{name}: {show(key)} is not one of {', '.join(known)}", name)


def pack(
    conversation: list[dict[str, Any]], tools: list[Any] | None, kwargs: dict[str, Any]
) -> bytes:
    """The ``chat`` field of a Tokenize message. Raises RequestError for lone surrogates."""
    whole = {"messages": conversation, "tools": tools, "kwargs": kwargs}
    try:
        return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        bad("messages: not valid Unicode (a lone surrogate)", "messages")
    except RecursionError:
        bad("messages: nested too deeply", "messages")


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
    typed(value, dict, name, "an object")
    role = value.get("role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        bad(f"{name}.role: {show(role)} is not one of {', '.join(ROLES)}", f"{name}.role")
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
        typed(calls, list, f"{name}.tool_calls", "an array")
        out["tool_calls"] = [_call(c, f"{name}.tool_calls[{i}]") for i, c in enumerate(calls)]
    elif old is not None:
        out["tool_calls"] = [_call({"function": old}, name, "function_call")]
    return out


def content(value: Any, name: str, may_miss: bool = False) -> str:
    """The text of a string or of text parts. Raises RequestError, NotAvailable (400)."""
    if value is None:
        if not may_miss:
            bad(f"{name} is missing", name)
        return ""
    if isinstance(value, str):
        return text(value, name)
    typed(value, list, name, "a string or an array of parts")
    return "\n".join(_part(part, f"{name}[{i}]") for i, part in enumerate(value))


def _part(value: Any, name: str) -> str:
    if isinstance(value, str):
        return text(value, name)
    typed(value, dict, name, "an object")
    kind = value.get("type")
    if kind in ("text", "input_text", "output_text"):
        return text(value.get("text"), f"{name}.text")
    if kind == "refusal":
        return text(value.get("refusal"), f"{name}.refusal")
    if not isinstance(kind, str):
        bad(f"{name}.type must be a string, not {show(kind)}", f"{name}.type")
    raise NotAvailable(
        f"{name}: content of type {show(kind)} is not available on this server; text is",
        param=f"{name}.type",
    )


def _call(value: Any, name: str, inner: str = "function") -> dict[str, Any]:
    """A tool call of an earlier turn; templates want its arguments as an object."""
    typed(value, dict, name, "an object")
    at = f"{name}.{inner}"
    function = typed(value.get("function"), dict, at, "an object")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            bad(f"{at}.arguments is not JSON", f"{at}.arguments")
    typed(arguments, dict, f"{at}.arguments", "an object, as JSON")
    called = text(function.get("name"), f"{at}.name")
    out: dict[str, Any] = {
        "type": "function",
        "function": {"name": called, "arguments": arguments},
    }
    if value.get("id") is not None:
        out["id"] = text(value["id"], f"{name}.id")
    return out
