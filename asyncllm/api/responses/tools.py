"""Tools of OpenAI's responses: functions, those in namespaces, custom ones, and hosted ones.

A function in a namespace and a custom tool are offered as functions; hosted tools run at OpenAI and
cannot be. Knows the JSON of tools and of the choice between them; knows no other field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from asyncllm.api.common import tool_request
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.tool_request import ToolChoice
from asyncllm.api.common.validation import expect, preview, reject, text
from asyncllm.api.parsing.tools import Tool

# what they run is not here; some have names with a date behind
HOSTED: Final = (
    "web_search", "web_search_preview", "file_search", "code_interpreter", "image_generation",
    "computer", "computer_use_preview", "local_shell", "shell", "apply_patch", "mcp", "tool_search",
)  # fmt: skip
INPUT: Final = "input"  # the argument that holds a custom tool's free text
_ADVICE: Final = "The value of `input` is handed to the tool as it is."


@dataclass(frozen=True, slots=True)
class Offered:
    """A tool as the client knows it.

    Attributes:
        name: without its namespace.
        namespace: "": it is in none.
        custom: it takes free text.
    """

    name: str
    namespace: str = ""
    custom: bool = False


@dataclass(frozen=True, slots=True)
class ResponsesTools:
    """What ``tools`` says.

    Attributes:
        offered: what the model may call.
        by_name: of these, how the client calls them, by the name that the model is told.
        hosted: types of tools that run elsewhere.
        echo: the field as it comes back.
    """

    offered: tuple[Tool, ...] = ()
    by_name: Mapping[str, Offered] = field(default_factory=dict)
    hosted: tuple[str, ...] = ()
    echo: tuple[dict[str, Any], ...] = ()

    def named(self, name: str, namespace: str = "") -> str:
        """What the model is told for the client's ``name``; it itself if there is no such tool."""
        for told, tool in self.by_name.items():
            if tool.name == name and namespace in ("", tool.namespace):
                return told
        return name


def responses_tools(value: Any, name: str) -> ResponsesTools:
    """Raises RequestError, NotAvailable (400)."""
    by_name: dict[str, Offered] = {}
    made: list[Tool] = []
    hosted: list[str] = []
    for at, given, namespace in _flat(value, name):
        kind = given.get("type")
        if _is_hosted(kind):
            hosted.append(str(kind))
            continue
        custom = kind == "custom"
        tool = tool_request.function_tool(_as_function(given, at) if custom else given, at)
        told = tool.name
        if told in by_name and namespace:
            told = f"{namespace}.{told}"
        if told in by_name:
            reject(f"{at}: there is another tool {preview(told)}", f"{at}.name")
        by_name[told] = Offered(tool.name, namespace, custom)
        made.append(Tool(told, tool.parameters, tool.description, tool.strict))
    tool_request.check_size(made, name)
    echo = tuple(_echoed(tool) for tool in value)
    return ResponsesTools(tuple(made), by_name, tuple(dict.fromkeys(hosted)), echo)


def responses_choice(value: Any, tools: ResponsesTools, name: str) -> ToolChoice | None:
    """``tool_choice``, by the names that the model is told. Raises RequestError, NotAvailable."""
    if value is None:
        return None
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        listed = value.get("tools")
        if isinstance(listed, list) and all(isinstance(each, dict) for each in listed):
            ours = [
                _plain(each, tools, f"{name}.tools[{i}]")
                for i, each in enumerate(listed)
                if not _is_hosted(each.get("type"))
            ]
            if listed and not ours and value.get("mode") == "auto":
                return ToolChoice("none")
            value = {**value, "tools": ours}
    elif isinstance(value, dict) and value.get("type") in ("custom", "function"):
        value = _plain(value, tools, name)
    choice = tool_request.flat_choice(value, name)
    if choice.mode not in ("auto", "none") and tools.hosted:
        raise NotAvailable(
            f"tools of type {', '.join(tools.hosted)} are not available on this server; they are"
            f" left out only where the model need not call any (tool_choice auto)",
            param="tools",
        )
    return choice


def input_of(arguments: str) -> str:
    """The free text in the arguments of a custom tool's call."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return ""
    given = found.get(INPUT, "") if isinstance(found, dict) else ""
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def _flat(value: Sequence[Any], name: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(place, tool, namespace) of each."""
    for i, given in enumerate(value):
        at = f"{name}[{i}]"
        expect(given, dict, at, "an object")
        if given.get("type") != "namespace":
            yield at, given, ""
            continue
        namespace = text(given.get("name"), f"{at}.name")
        inner = expect(given.get("tools"), list, f"{at}.tools", "an array")
        for j, tool in enumerate(inner):
            yield f"{at}.tools[{j}]", expect(tool, dict, f"{at}.tools[{j}]", "an object"), namespace


def _is_hosted(kind: object) -> bool:
    if not isinstance(kind, str):
        return False
    return any(kind == each or kind.startswith((f"{each}_20", f"{each}-20")) for each in HOSTED)


def _as_function(given: dict[str, Any], at: str) -> dict[str, Any]:
    """A custom tool as a function of one argument, which has its form where that can be kept."""
    lines = [text(given["description"], f"{at}.description")] if given.get("description") else []
    inner: dict[str, Any] = {"type": "string"}
    strict = False
    form = given.get("format")
    if form is not None and expect(form, dict, f"{at}.format", "an object").get("type") != "text":
        syntax = form.get("syntax")
        rules = text(form.get("definition"), f"{at}.format.definition")
        if form.get("type") != "grammar" or syntax not in ("lark", "regex"):
            known = "text, or a grammar with the syntax lark or regex"
            reject(f"{at}.format is not {known}", f"{at}.format")
        if syntax == "regex":
            inner["pattern"], strict = f"^(?:{rules})$", True
        else:
            lines.append(f"`input` is a text of this grammar (Lark):\n{rules}")
    schema = {
        "type": "object",
        "properties": {INPUT: inner},
        "required": [INPUT],
        "additionalProperties": False,
    }
    described = "\n".join([*lines, _ADVICE])
    function = {"type": "function", "name": given.get("name"), "description": described}
    return function | {"parameters": schema, "strict": strict}


def _plain(given: dict[str, Any], tools: ResponsesTools, at: str) -> dict[str, Any]:
    """A choice of one tool, as of a function of the name that the model is told."""
    namespace = given.get("namespace")
    within = "" if namespace is None else text(namespace, f"{at}.namespace")
    kind = given.get("type")
    named = tools.named(text(given.get("name"), f"{at}.name"), within)
    return {"type": "function" if kind == "custom" else kind, "name": named}


def _echoed(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("type") != "function":
        return given
    schema = given.get("parameters")
    return {
        "type": "function",
        "name": given["name"],
        "description": given.get("description"),
        "parameters": {"type": "object", "properties": {}} if schema is None else schema,
        "strict": bool(given.get("strict")),
    }
