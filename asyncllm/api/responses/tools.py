"""Tools of OpenAI's responses: functions, those in namespaces, custom ones, and hosted ones.

A function in a namespace and a custom tool are offered as functions; hosted tools run at OpenAI and
cannot be. Knows the JSON of tools and of the choice between them; knows no other field.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Final, Literal

from annotated_types import Len
from pydantic import WithJsonSchema

from asyncllm.api.common import tool_request
from asyncllm.api.common.conversation import Messages
from asyncllm.api.common.custom_tool import FreeTextFields, InputGrammar, TextInput
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.other_fields import LATE_TOOLS
from asyncllm.api.common.request_model import (
    Items,
    RequestModel,
    TaggedUnion,
    Unavailable,
    UnicodeStr,
)
from asyncllm.api.common.tool_request import (
    MAX_TOOLS,
    Callers,
    ChoiceMode,
    FunctionTool,
    ToolChoice,
    ToolRef,
)
from asyncllm.api.common.validation import preview, reject
from asyncllm.api.parsing.events import Tool

# what they run is not here; some have names with a date behind
HOSTED: Final = (
    "web_search", "web_search_preview", "file_search", "code_interpreter", "image_generation",
    "computer", "computer_use_preview", "local_shell", "shell", "apply_patch", "mcp", "tool_search",
)  # fmt: skip
# bounded, since an answer's header names them
_HOSTED_KIND: Final = re.compile(f"^({'|'.join(HOSTED)})([_-]20[0-9_-]{{0,16}})?$")


def _undated(kind: str) -> str:
    found = _HOSTED_KIND.fullmatch(kind)
    return found[1] if found else kind


_KNOWN = TaggedUnion(other="tools of type {} are not available", fold=_undated)


_ASYNC: Final = {"async": Unavailable("calling tools in the background", False)}


class FlatTool(FunctionTool):
    refused: ClassVar = _ASYNC
    ignored: ClassVar = {**LATE_TOOLS, "output_schema": "results come as they are"}
    type: Literal["function"]
    allowed_callers: Callers | None = None


class GrammarInput(InputGrammar):
    type: Literal["grammar"]


class FreeTextTool(FreeTextFields):
    refused: ClassVar = _ASYNC
    ignored: ClassVar = LATE_TOOLS
    type: Literal["custom"]
    allowed_callers: Callers | None = None
    format: Annotated[TextInput | GrammarInput, TaggedUnion()] | None = None

    @property
    def grammar(self) -> InputGrammar | None:
        return self.format if isinstance(self.format, GrammarInput) else None


class HostedTool(RequestModel):
    kinds: ClassVar = HOSTED
    type: Annotated[
        str,
        WithJsonSchema({"type": "string", "pattern": _HOSTED_KIND.pattern}),
    ]


_InnerTool = Annotated[FlatTool | FreeTextTool | HostedTool, _KNOWN]


class NamespaceTool(RequestModel):
    ignored: ClassVar = {"description": "its tools are told by themselves"}
    type: Literal["namespace"]
    name: UnicodeStr
    tools: Items[_InnerTool]


_AnyTool = Annotated[FlatTool | FreeTextTool | NamespaceTool | HostedTool, _KNOWN]
FlatTools = Items[_AnyTool]


class FlatNamed(RequestModel):
    type: Literal["function", "custom"]
    name: UnicodeStr
    namespace: UnicodeStr = ""


class FlatAllowed(RequestModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        Items[Annotated[FlatNamed | HostedTool, TaggedUnion(fold=_undated)]], Len(1, MAX_TOOLS)
    ]


FlatChoice = Annotated[
    ChoiceMode | FlatNamed | FlatAllowed,
    TaggedUnion("one of none, auto, required, or an object", other="{} is not available"),
]


@dataclass(frozen=True, slots=True)
class ClientTool:
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
    """

    offered: tuple[Tool, ...] = ()
    by_name: Mapping[str, ClientTool] = field(default_factory=dict)
    hosted: tuple[str, ...] = ()

    def ref(self, given: FlatNamed) -> ToolRef:
        """The tool that a choice names, by the name that the model is told.

        Without a namespace, one that has none comes first. Raises RequestError (400) where there is
        no such tool.
        """
        wanted = ToolRef(given.name, given.type == "custom")
        told = self._told(ClientTool(given.name, given.namespace, wanted.custom))
        if told is None:
            inside = f" in namespace {preview(given.namespace)}" if given.namespace else ""
            refs = [ToolRef(told, tool.custom) for told, tool in self.by_name.items()]
            tool_request.refuse_choice(f"{wanted}{inside}", refs)
        return ToolRef(told, wanted.custom)

    def client_tool(self, told: str) -> ClientTool:
        """A called tool as the client knows it."""
        return self.by_name.get(told, ClientTool(told))

    def told(self, messages: Messages) -> Messages:
        """The conversation with earlier calls by the names that the model is told.

        One of a namespace whose tools are not offered any more gets a name that none of these has.
        """
        return [
            turn | {"tool_calls": list(map(self._told_call, turn["tool_calls"]))}
            if "tool_calls" in turn
            else turn
            for turn in messages
        ]

    def _told_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        tool = function.pop("tool")
        if (name := self._told(tool)) is None:
            taken = tool.namespace and tool.name in self.by_name
            name = f"{tool.namespace}.{tool.name}" if taken else tool.name
        return call | {"function": function | {"name": name}}

    def _told(self, wanted: ClientTool) -> str | None:
        """The name that the model is told of a tool; None: there is no such tool."""
        fitting = [
            (bool(tool.namespace), i, told)
            for i, (told, tool) in enumerate(self.by_name.items())
            if (tool.name, tool.custom) == (wanted.name, wanted.custom)
            and wanted.namespace in ("", tool.namespace)
        ]
        return min(fitting)[-1] if fitting else None


def responses_tools(given: Sequence[_AnyTool]) -> ResponsesTools:
    """Raises RequestError (400) where two have one name, or they are too long together."""
    by_name: dict[str, ClientTool] = {}
    made: list[Tool] = []
    hosted: list[str] = []
    plain = {each.name for each in given if isinstance(each, FlatTool | FreeTextTool)}
    for at, each, namespace in _flat(given):
        if isinstance(each, HostedTool):
            hosted.append(each.type)
            continue
        tool = each.tool
        told = tool.name
        if namespace and (told in by_name or told in plain):
            told = f"{namespace}.{told}"
        if told in by_name:
            reject(f"{at}: there is another tool {preview(told)}", f"{at}.name")
        by_name[told] = ClientTool(tool.name, namespace, isinstance(each, FreeTextTool))
        made.append(tool if told == tool.name else replace(tool, name=told))
    if len(omitted := tuple(dict.fromkeys(hosted))) > MAX_TOOLS:
        reject(
            f"tools: {len(omitted)} types of tools that run elsewhere, at most {MAX_TOOLS}", "tools"
        )
    if why := tool_request.too_much(made):
        reject(f"tools{why}", "tools")
    return ResponsesTools(tuple(made), by_name, omitted)


def responses_choice(
    given: ChoiceMode | FlatNamed | FlatAllowed | None, tools: ResponsesTools
) -> ToolChoice | None:
    """``tool_choice``, by the names that the model is told. Raises RequestError, NotAvailable."""
    match given:
        case None | "auto" | "none":
            return None if given is None else ToolChoice(given)
        case FlatNamed():
            choice = ToolChoice("named", (tools.ref(given),))
        case FlatAllowed():
            ours = [each for each in given.tools if isinstance(each, FlatNamed)]
            if not ours and given.mode == "auto":
                return ToolChoice("none")
            if not ours:
                at = "tool_choice.tools"
                reject(f"{at} must hold at least one tool that this server offers", at)
            choice = ToolChoice(given.mode, tuple(map(tools.ref, ours)))
        case mode:
            choice = ToolChoice(mode)
    if choice.mode != "auto" and tools.hosted:
        raise NotAvailable(
            f"tools of type {', '.join(tools.hosted)} are not available on this server; they are"
            f" left out only where the model need not call any (tool_choice auto)",
            param="tools",
        )
    return choice


def echoed(given: dict[str, object]) -> dict[str, object]:
    """A tool of a checked request as the answer repeats it."""
    if given["type"] != "function":
        return given
    schema = given.get("parameters")
    return {
        "type": "function",
        "name": given["name"],
        "description": given.get("description"),
        "parameters": {"type": "object", "properties": {}} if schema is None else schema,
        "strict": bool(given.get("strict")),
    }


def _flat(given: Sequence[_AnyTool]) -> Iterator[tuple[str, _InnerTool, str]]:
    """(place, tool, namespace) of each."""
    for i, each in enumerate(given):
        if not isinstance(each, NamespaceTool):
            yield f"tools[{i}]", each, ""
            continue
        for j, tool in enumerate(each.tools):
            yield f"tools[{i}].tools[{j}]", tool, each.name
