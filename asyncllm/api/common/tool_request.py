"""The tools a request offers, whether one must be called, and how the prompt describes them.

Knows the protocols' tool objects and template messages; knows neither templates nor answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Annotated, Any, Final, Literal, NoReturn

from pydantic import AfterValidator, Field, WithJsonSchema

from asyncllm.api.common.conversation import Messages
from asyncllm.api.common.request_model import (
    AnyObject,
    Items,
    RequestModel,
    ToldObject,
    UnicodeStr,
    refuse,
)
from asyncllm.api.common.validation import preview, reject
from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.output_parser import Dialect
from asyncllm.api.parsing.tools.call_grammar import written
from asyncllm.api.parsing.tools.detect import system_text

MAX_TOOLS: Final = 128
MAX_TOOLS_CHARS: Final = 256 << 10  # of their JSON
MAX_NAME: Final = 128
MAX_TOLD: Final = 10  # tools that an error text names
NAME: Final = f"[A-Za-z0-9_.:/-]{{1,{MAX_NAME}}}"
ChoiceMode = Literal["none", "auto", "required"]

Tools = tuple[Tool, ...]


@dataclass(frozen=True, slots=True)
class ToolRef:
    """A tool as a choice names it: by its kind, too."""

    name: str
    custom: bool = False

    def __str__(self) -> str:
        return f"{'custom tool' if self.custom else 'function'} {preview(self.name)}"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are to be called.

    Args:
        mode: a ChoiceMode, or "named": the one in ``tools`` must be.
        tools: the only ones that count; None: all.
        parallel: False: one call at most.
    """

    mode: str
    tools: tuple[ToolRef, ...] | None = None
    parallel: bool = True

    @property
    def name(self) -> str | None:
        """The tool that must be called, if it is only one."""
        return self.tools[0].name if self.mode == "named" and self.tools else None


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
    def template_tools(self) -> list[dict[str, object]]:
        """The tools as templates want them."""
        return [template_form(tool) for tool in self.tools]


def _tool_name(value: str) -> str:
    if not re.fullmatch(NAME, value):
        refuse(f": {preview(value)} is not 1 to {MAX_NAME} letters, digits or _-.:/")
    return value


def _object_schema(value: AnyObject) -> AnyObject:
    if value.get("type", "object") != "object":
        refuse(f".type: {preview(value['type'])} is not object", ".type")
    return value


def _of_anything() -> AnyObject:
    return {"type": "object", "properties": {}}


ToolName = Annotated[
    UnicodeStr,
    AfterValidator(_tool_name),
    WithJsonSchema({"type": "string", "pattern": f"^{NAME}$"}),
]
ToolSchema = Annotated[
    ToldObject,
    AfterValidator(_object_schema),
    WithJsonSchema({"type": "object", "properties": {"type": {"enum": ["object"]}}}),
]


def _direct(value: list[str]) -> list[str]:
    if "direct" not in value:
        refuse(
            ": calls by programs are not available on this server, direct ones are",
            code="not_available",
        )
    return value


Callers = Annotated[Items[UnicodeStr], AfterValidator(_direct)]


class FunctionTool(RequestModel):
    """What the model may call, in OpenAI's words."""

    name: ToolName
    description: UnicodeStr = ""
    parameters: ToolSchema = Field(default_factory=_of_anything)
    strict: bool = False

    @property
    def tool(self) -> Tool:
        return Tool(self.name, self.parameters, self.description, self.strict)


def too_much(tools: Sequence[Tool]) -> str:
    """What is wrong with the number and the length of tools; "": nothing."""
    if not tools:
        return ""
    if len(tools) > MAX_TOOLS:
        return f": {len(tools)} tools, at most {MAX_TOOLS}"
    try:
        size = len(json.dumps([template_form(tool) for tool in tools], ensure_ascii=False))
    except RecursionError:
        return ": nested too deeply"
    return (
        f": {size} characters of JSON, at most {MAX_TOOLS_CHARS}" if size > MAX_TOOLS_CHARS else ""
    )


def as_offered(tools: Sequence[Tool], at: Sequence[str] = ()) -> None:
    """Refuse tools that are too many words together, or of which two have one name.

    Args:
        at: for each tool, where in it its name is; (): at its top.
    """
    if why := too_much(tools):
        refuse(why)
    taken: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in taken:
            where = at[i] if at else ""
            refuse(f"[{i}]: there is another tool {preview(tool.name)}", f"[{i}]{where}.name")
        taken.add(tool.name)


def resolve(
    tools: Sequence[Tool] | None,
    choice: ToolChoice | None,
    parallel: bool = True,
    name: str = "tool_choice",
) -> ToolRequest:
    """Both together. Raises RequestError, with ``name`` for the choice, where a call is wanted that
    no tool allows."""
    if choice is None:
        choice = ToolChoice("auto" if tools else "none")
    choice = replace(choice, parallel=parallel and choice.parallel)
    made = tuple(tools or ())
    if choice.mode in ("required", "named") and not made:
        reject(f"{name}: there are no tools", name)
    refs = {ToolRef(tool.name, tool.custom): tool for tool in made}
    for ref in choice.tools or ():
        if ref not in refs:
            refuse_choice(ref, refs, name)
    if choice.mode == "none":
        return ToolRequest(choice)
    if choice.tools is not None and choice.mode != "named":
        made = tuple(tool for ref, tool in refs.items() if ref in choice.tools)
    return ToolRequest(choice, made)


def refuse_choice(wanted: object, refs: Collection[ToolRef], name: str = "tool_choice") -> NoReturn:
    """Refuse a choice of a tool that is not one of ``refs``."""
    told = ", ".join(map(str, islice(refs, MAX_TOLD))) or "none"
    more = f" and {len(refs) - MAX_TOLD} more" if len(refs) > MAX_TOLD else ""
    reject(f"{name}: there is no {wanted}; the tools are: {told}{more}", name)


def template_form(tool: Tool) -> dict[str, object]:
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
    told, listed = system_text(request.tools, dialect.call_text)
    content = f"{system['content']}\n\n{told}".lstrip()
    return [{**system, "content": content, "listed": listed}, *out], None


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


def _without_calls(turn: dict[str, Any], dialect: Dialect) -> dict[str, object]:
    if not (calls := turn.get("tool_calls")):
        return turn
    written_calls = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    lines = [turn["content"], written(dialect.call_text, written_calls)]
    rest = {key: value for key, value in turn.items() if key != "tool_calls"}
    return rest | {"content": "\n".join(line for line in lines if line)}
