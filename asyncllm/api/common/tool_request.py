"""The tools of a request, whether one must be called, and how they get into the prompt.

Knows the protocols' tool objects and template messages; knows neither templates nor answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated, Any, Final

from pydantic import AfterValidator, WithJsonSchema

from asyncllm.api.common.conversation import Messages
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.model import AnyObject, UnicodeStr, refuse
from asyncllm.api.common.validation import expect, preview, reject, text
from asyncllm.api.parsing.output_parser import Dialect
from asyncllm.api.parsing.tools import Tool, system_text, written

MAX_TOOLS: Final = 128
MAX_TOOLS_CHARS: Final = 256 << 10  # of their JSON
MAX_NAME: Final = 128
NAME: Final = f"[A-Za-z0-9_.:/-]{{1,{MAX_NAME}}}"
MODES: Final = ("none", "auto", "required")
ALLOWED_MODES: Final = ("auto", "required")

Tools = tuple[Tool, ...]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are to be called.

    Args:
        mode: one of MODES, or "named" with a ``name``.
        allowed: the only tools that count; None: all.
        parallel: False: one call at most.
    """

    mode: str
    name: str = ""
    allowed: tuple[str, ...] | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """What a request offers; no ``tools`` where none may be called."""

    choice: ToolChoice
    tools: Tools = ()

    @property
    def forced(self) -> bool:
        """There must be a call."""
        return self.choice.mode in ("required", "named")

    @property
    def template_tools(self) -> list[dict[str, Any]]:
        """The tools as templates want them."""
        return [template_form(tool) for tool in self.tools]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolLayout:
    """Where a protocol's tool objects keep what.

    Args:
        kind: the ``type`` of functions.
        untyped: ``type`` may be missing.
        inner: the object inside that holds the rest; "": it is the same one.
        schema: the name of the arguments' schema.
        needs_schema: it must be there.
    """

    kind: str = "function"
    untyped: bool = False
    inner: str = ""
    schema: str = "parameters"
    needs_schema: bool = False


CHAT: Final = ToolLayout(inner="function")
FLAT: Final = ToolLayout()
OLD: Final = ToolLayout(untyped=True)


def _tool_name(value: str) -> str:
    if not re.fullmatch(NAME, value):
        refuse(f": {preview(value)} is not 1 to {MAX_NAME} letters, digits or _-.:/")
    return value


def _object_schema(value: AnyObject) -> AnyObject:
    if value.get("type", "object") != "object":
        refuse(f".type: {preview(value['type'])} is not object", ".type")
    return value


ToolName = Annotated[
    UnicodeStr,
    AfterValidator(_tool_name),
    WithJsonSchema({"type": "string", "pattern": f"^{NAME}$"}),
]
ToolSchema = Annotated[
    AnyObject,
    AfterValidator(_object_schema),
    WithJsonSchema({"type": "object", "properties": {"type": {"enum": ["object"]}}}),
]


def as_offered(tools: Sequence[Tool], at: str = "") -> None:
    """Refuse tools that are too many words together, or of which two have one name.

    Args:
        at: where in a tool its name is.
    """
    try:
        size = len(json.dumps([template_form(tool) for tool in tools], ensure_ascii=False))
    except RecursionError:
        refuse(": nested too deeply")
    if size > MAX_TOOLS_CHARS:
        refuse(f": {size} characters of JSON, at most {MAX_TOOLS_CHARS}")
    taken: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in taken:
            refuse(f"[{i}]: there is another tool {preview(tool.name)}", f"[{i}]{at}.name")
        taken.add(tool.name)


def tools(value: Any, name: str) -> Tools:
    """Tools of OpenAI's chat. Raises RequestError, NotAvailable (400)."""
    return _tools(value, name, CHAT)


def flat_tools(value: Any, name: str) -> Tools:
    """Tools of OpenAI's responses. Raises RequestError, NotAvailable (400)."""
    return _tools(value, name, FLAT)


def functions(value: Any, name: str) -> Tools:
    """``functions``, the older name of OpenAI's tools. Raises RequestError, NotAvailable (400)."""
    return _tools(value, name, OLD)


def choice(value: Any, name: str) -> ToolChoice:
    """``tool_choice`` of OpenAI's chat. Raises RequestError, NotAvailable (400)."""
    return _choice(value, name, "function", "allowed_tools")


def flat_choice(value: Any, name: str) -> ToolChoice:
    """``tool_choice`` of OpenAI's responses. Raises RequestError, NotAvailable (400)."""
    return _choice(value, name, "", "")


def function_call(value: Any, name: str) -> ToolChoice:
    """``function_call``, the older name of OpenAI's ``tool_choice``. Raises RequestError (400)."""
    if isinstance(value, dict):
        return ToolChoice("named", text(value.get("name"), f"{name}.name"))
    if value not in ("none", "auto"):
        reject(f"{name}: {preview(value)} is not one of none, auto, or an object", name)
    return ToolChoice(value)


def resolve(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool = True
) -> ToolRequest:
    """Both together. Raises RequestError where a call is wanted that no tool allows."""
    if choice is None:
        choice = ToolChoice("auto" if tools else "none")
    choice = replace(choice, parallel=parallel and choice.parallel)
    made = tuple(tools or ())
    names = {tool.name for tool in made}
    if choice.mode in ("required", "named") and not made:
        reject("tool_choice: there are no tools", "tool_choice")
    for name in (choice.name,) if choice.mode == "named" else choice.allowed or ():
        if name not in names:
            reject(f"tool_choice: there is no tool {preview(name)}", "tool_choice")
    if choice.mode == "none":
        return ToolRequest(choice)
    if choice.allowed is not None:
        made = tuple(tool for tool in made if tool.name in choice.allowed)
    return ToolRequest(choice, made)


def template_form(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates expect it."""
    described = {"description": tool.description} if tool.description else {}
    function = {"name": tool.name, **described, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def with_tools_in_prompt(
    messages: Messages, request: ToolRequest, dialect: Dialect
) -> tuple[Messages, list[Any] | None]:
    """The conversation and the tools for the chat template.

    A template that does not know tools gets them in the system message, and calls of earlier turns
    as the model writes them; results too are text, unless the template has turns for them.
    """
    if dialect.lists_tools:
        return messages, request.template_tools or None
    out = _plain(messages, dialect)
    if not request.tools:
        return out, None
    system = out.pop(0) if out[0]["role"] == "system" else {"role": "system", "content": ""}
    if dialect.tools_in_system:
        packed = json.dumps([template_form(tool)["function"] for tool in request.tools])
        return [{**system, "tools": packed}, *out], None
    lines = system_text(request.tools, dialect.spelling or dialect.calls)
    return [{**system, "content": f"{system['content']}\n\n{lines}".lstrip()}, *out], None


def _plain(messages: Messages, dialect: Dialect) -> Messages:
    """Calls as text of the assistant, results as turns of the user; neighbours are one turn."""
    out: Messages = []
    for results, group in groupby(messages, key=lambda turn: turn["role"] == "tool"):
        if results and not dialect.tells_results:
            lines = [f"<tool_response>\n{turn['content']}\n</tool_response>" for turn in group]
            out.append({"role": "user", "content": "\n".join(lines)})
        else:
            out += (_without_calls(turn, dialect) for turn in group)
    return out


def _without_calls(turn: dict[str, Any], dialect: Dialect) -> dict[str, Any]:
    if not (calls := turn.get("tool_calls")):
        return turn
    written_calls = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    lines = [turn["content"], written(dialect.spelling or dialect.calls, written_calls)]
    rest = {key: value for key, value in turn.items() if key != "tool_calls"}
    return rest | {"content": "\n".join(line for line in lines if line)}


def function_tool(value: Any, name: str) -> Tool:
    """A function of OpenAI's responses. Raises RequestError, NotAvailable (400)."""
    return _tool(value, name, FLAT)


def check_size(tools: Sequence[Tool], name: str) -> None:
    """Refuse tools that are too many, or too long together. Raises RequestError (400)."""
    if len(tools) > MAX_TOOLS:
        reject(f"{name}: {len(tools)} tools, at most {MAX_TOOLS}", name)
    try:
        size = len(json.dumps([template_form(tool) for tool in tools], ensure_ascii=False))
    except RecursionError:
        reject(f"{name}: nested too deeply", name)
    if size > MAX_TOOLS_CHARS:
        reject(f"{name}: {size} characters of JSON, at most {MAX_TOOLS_CHARS}", name)


def _tools(value: Any, name: str, layout: ToolLayout) -> Tools:
    if len(value) > MAX_TOOLS:
        reject(f"{name}: {len(value)} tools, at most {MAX_TOOLS}", name)
    found = tuple(_tool(tool, f"{name}[{i}]", layout) for i, tool in enumerate(value))
    check_size(found, name)
    taken: set[str] = set()
    for i, tool in enumerate(found):
        if tool.name in taken:
            at = _inside(f"{name}[{i}]", layout)
            reject(f"{name}[{i}]: there is another tool {preview(tool.name)}", f"{at}.name")
        taken.add(tool.name)
    return found


def _inside(name: str, layout: ToolLayout) -> str:
    return f"{name}.{layout.inner}" if layout.inner else name


def _tool(value: Any, name: str, layout: ToolLayout) -> Tool:
    expect(value, dict, name, "an object")
    kind = value.get("type")
    if kind != layout.kind and not (kind is None and layout.untyped):
        if not isinstance(kind, str):
            reject(f"{name}.type must be a string, not {preview(kind)}", f"{name}.type")
        raise NotAvailable(
            f"{name}: tools of type {preview(kind)} are not available on this server; functions"
            f" ({layout.kind}) are",
            param=f"{name}.type",
        )
    at = _inside(name, layout)
    function = expect(value.get(layout.inner), dict, at, "an object") if layout.inner else value
    called = text(function.get("name"), f"{at}.name")
    if not re.fullmatch(NAME, called):
        reject(
            f"{at}.name: {preview(called)} is not 1 to {MAX_NAME} letters, digits or _-.:/",
            f"{at}.name",
        )
    description = function.get("description")
    at_schema = f"{at}.{layout.schema}"
    parameters = function.get(layout.schema)
    if parameters is None:
        if layout.needs_schema:
            reject(f"{at_schema} is missing", at_schema)
        parameters = {"type": "object", "properties": {}}
    expect(parameters, dict, at_schema, "an object")
    if parameters.get("type", "object") != "object":
        reject(
            f"{at_schema}.type: {preview(parameters['type'])} is not object", f"{at_schema}.type"
        )
    strict = function.get("strict")
    return Tool(
        called,
        parameters,
        "" if description is None else text(description, f"{at}.description"),
        strict is not None and expect(strict, bool, f"{at}.strict", "true or false"),
    )


def _choice(value: Any, name: str, inner: str, inner_allowed: str) -> ToolChoice:
    """OpenAI's choice, which has the name or the allowed tools in an object ``inner``."""
    if isinstance(value, str):
        if value not in MODES:
            reject(f"{name}: {preview(value)} is not one of {', '.join(MODES)}", name)
        return ToolChoice(value)
    expect(value, dict, name, f"one of {', '.join(MODES)}, or an object")
    kind = value.get("type")
    if kind == "function":
        return ToolChoice("named", _name(value, name, inner))
    if kind == "allowed_tools":
        at = f"{name}.{inner_allowed}" if inner_allowed else name
        if inner_allowed:
            value = expect(value.get(inner_allowed), dict, at, "an object")
        mode = value.get("mode")
        if mode not in ALLOWED_MODES:
            reject(
                f"{at}.mode: {preview(mode)} is not one of {', '.join(ALLOWED_MODES)}", f"{at}.mode"
            )
        given = expect(value.get("tools"), list, f"{at}.tools", "an array")
        if not given:
            reject(f"{at}.tools must hold at least one tool", f"{at}.tools")
        names = (_named(each, f"{at}.tools[{i}]", inner) for i, each in enumerate(given))
        return ToolChoice(mode, allowed=tuple(names))
    if not isinstance(kind, str):
        reject(f"{name}.type must be a string, not {preview(kind)}", f"{name}.type")
    raise NotAvailable(
        f"{name}: {preview(kind)} is not available on this server; function and allowed_tools are",
        param=f"{name}.type",
    )


def _named(value: Any, name: str, inner: str) -> str:
    """One of the allowed tools."""
    expect(value, dict, name, "an object")
    if value.get("type") != "function":
        reject(f"{name}.type: {preview(value.get('type'))} is not function", f"{name}.type")
    return _name(value, name, inner)


def _name(value: dict[str, Any], name: str, inner: str) -> str:
    at = f"{name}.{inner}" if inner else name
    function = expect(value.get(inner), dict, at, "an object") if inner else value
    return text(function.get("name"), f"{at}.name")
