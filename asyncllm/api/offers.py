"""The tools a request offers, whether one must be called, and how the prompt tells of them.

Knows OpenAI's tool objects and template messages; knows neither templates nor answers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

from asyncllm.api.errors import NotAvailable
from asyncllm.api.fields import bad, show, text, typed
from asyncllm.api.parts import Dialect
from asyncllm.api.tools import Tool, system_text

MAX_TOOLS: Final = 128
MAX_TOOLS_CHARS: Final = 256 << 10  # of their JSON
MAX_NAME: Final = 128
NAME: Final = f"[A-Za-z0-9_.:/-]{{1,{MAX_NAME}}}"
MODES: Final = ("none", "auto", "required")

Turns = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whether tools are to be called: ``mode`` is one of MODES, or "named" with a ``name``."""

    mode: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a request offers.

    Args:
        tools: none where none may be called.
        listed: the same as templates want them.
    """

    wanted: Wanted
    tools: tuple[Tool, ...] = ()
    listed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def forced(self) -> bool:
        """There must be a call."""
        return self.wanted.mode in ("required", "named")


def tools(value: Any, name: str) -> list[dict[str, Any]]:
    """Tools in the form templates expect. Raises RequestError, NotAvailable (400)."""
    if len(value) > MAX_TOOLS:
        bad(f"{name}: {len(value)} tools, at most {MAX_TOOLS}", name)
    found = [_tool(tool, f"{name}[{i}]") for i, tool in enumerate(value)]
    try:
        size = len(json.dumps(found, ensure_ascii=False))
    except RecursionError:
        bad(f"{name}: nested too deeply", name)
    if size > MAX_TOOLS_CHARS:
        bad(f"{name}: {size} characters of JSON, at most {MAX_TOOLS_CHARS}", name)
    names = [tool["function"]["name"] for tool in found]
    for i, each in enumerate(names):
        if each in names[:i]:
            bad(f"{name}[{i}]: there is another tool {show(each)}", f"{name}[{i}].function.name")
    return found


def choice(value: Any, name: str) -> Wanted:
    """``tool_choice``. Raises RequestError, NotAvailable (400)."""
    if isinstance(value, str):
        if value not in MODES:
            bad(f"{name}: {show(value)} is not one of {', '.join(MODES)}", name)
        return Wanted(value)
    typed(value, dict, name, f"one of {', '.join(MODES)}, or an object")
    if (kind := value.get("type")) != "function":
        if not isinstance(kind, str):
            bad(f"{name}.type must be a string, not {show(kind)}", f"{name}.type")
        raise NotAvailable(
            f"{name}: {show(kind)} is not available on this server; function is",
            param=f"{name}.type",
        )
    function = typed(value.get("function"), dict, f"{name}.function", "an object")
    return Wanted("named", text(function.get("name"), f"{name}.function.name"))


def offer(listed: list[dict[str, Any]] | None, wanted: Wanted | None) -> Offer:
    """Both together. Raises RequestError where a call is wanted that no tool allows."""
    if wanted is None:
        wanted = Wanted("auto" if listed else "none")
    made = tuple(
        Tool(f["name"], f["parameters"], f.get("description", ""))
        for f in (tool["function"] for tool in listed or ())
    )
    if wanted.mode in ("required", "named") and not made:
        bad("tool_choice: there are no tools", "tool_choice")
    if wanted.mode == "named" and wanted.name not in {tool.name for tool in made}:
        bad(f"tool_choice: there is no tool {show(wanted.name)}", "tool_choice")
    if wanted.mode == "none" or not made:
        return Offer(wanted)
    return Offer(wanted, made, listed or [])


def told(turns: Turns, offered: Offer, dialect: Dialect) -> tuple[Turns, list[Any] | None]:
    """The conversation and the tools for the chat template.

    A template that does not know tools gets them in the system message, and calls and results of
    earlier turns as text, all in hermes format.
    """
    if dialect.lists_tools:
        return turns, offered.listed or None
    out = _plain(turns)
    if offered.tools:
        lines = system_text(offered.tools)
        if out[0]["role"] == "system":
            first = {**out[0], "content": f"{out[0]['content']}\n\n{lines}".lstrip()}
            return [first, *out[1:]], None
        out.insert(0, {"role": "system", "content": lines})
    return out, None


def _plain(turns: Turns) -> Turns:
    """Calls as text of the assistant, results as turns of the user; neighbours are one turn."""
    out: Turns = []
    answers = False  # the last turn is of results
    for turn in turns:
        if turn["role"] == "tool":
            text = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if answers:
                out[-1]["content"] += "\n" + text
            else:
                out.append({"role": "user", "content": text})
            answers = True
            continue
        answers = False
        if calls := turn.get("tool_calls"):
            turn = {key: value for key, value in turn.items() if key != "tool_calls"}
            lines = [turn["content"], *(_written(call["function"]) for call in calls)]
            turn["content"] = "\n".join(line for line in lines if line)
        out.append(turn)
    return out


def _written(function: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"


def _tool(value: Any, name: str) -> dict[str, Any]:
    typed(value, dict, name, "an object")
    if (kind := value.get("type")) != "function":
        if not isinstance(kind, str):
            bad(f"{name}.type must be a string, not {show(kind)}", f"{name}.type")
        raise NotAvailable(
            f"{name}: tools of type {show(kind)} are not available on this server; functions are",
            param=f"{name}.type",
        )
    function = typed(value.get("function"), dict, f"{name}.function", "an object")
    at = f"{name}.function"
    called = text(function.get("name"), f"{at}.name")
    if not re.fullmatch(NAME, called):
        bad(
            f"{at}.name: {show(called)} is not 1 to {MAX_NAME} letters, digits or _-.:/",
            f"{at}.name",
        )
    out: dict[str, Any] = {"name": called}
    if (description := function.get("description")) is not None:
        out["description"] = text(description, f"{at}.description")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    out["parameters"] = typed(parameters, dict, f"{at}.parameters", "an object")
    if parameters.get("type", "object") != "object":
        bad(
            f"{at}.parameters.type: {show(parameters['type'])} is not object",
            f"{at}.parameters.type",
        )
    return {"type": "function", "function": out}
