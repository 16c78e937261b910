"""Tools of /v1/chat/completions, and the choice between them.

Knows OpenAI's objects; what an offer means is in :mod:`asyncllm.api.common.tool_request`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Len
from pydantic import AfterValidator, Field

from asyncllm.api.common.custom_tool import FreeTextFields, InputGrammar, TextInput
from asyncllm.api.common.request_model import Items, RequestModel, TaggedUnion, UnicodeStr
from asyncllm.api.common.tool_request import (
    MAX_TOOLS,
    ChoiceMode,
    FunctionTool,
    ToolChoice,
    ToolRef,
    as_offered,
)
from asyncllm.api.parsing.events import Tool


class ChatTool(RequestModel):
    type: Literal["function"]
    function: FunctionTool

    @property
    def tool(self) -> Tool:
        return self.function.tool


class InnerGrammarInput(RequestModel):
    type: Literal["grammar"]
    grammar: InputGrammar


class CustomFunction(FreeTextFields):
    """What the model may call with free text."""

    format: Annotated[TextInput | InnerGrammarInput, TaggedUnion()] | None = None

    @property
    def grammar(self) -> InputGrammar | None:
        return self.format.grammar if isinstance(self.format, InnerGrammarInput) else None


class ChatCustomTool(RequestModel):
    type: Literal["custom"]
    custom: CustomFunction

    @property
    def tool(self) -> Tool:
        return self.custom.tool


class OldFunction(FunctionTool):
    type: Literal["function"] = "function"


class FunctionName(RequestModel):
    name: UnicodeStr

    @property
    def ref(self) -> ToolRef:
        return ToolRef(self.name)


class NamedFunction(RequestModel):
    type: Literal["function"] = "function"  # TGI's clients leave it out
    function: FunctionName

    @property
    def ref(self) -> ToolRef:
        return ToolRef(self.function.name)


class NamedCustom(RequestModel):
    type: Literal["custom"]
    custom: FunctionName

    @property
    def ref(self) -> ToolRef:
        return ToolRef(self.custom.name, custom=True)


class AllowedTools(RequestModel):
    mode: Literal["auto", "required"]
    tools: Annotated[
        Items[Annotated[NamedFunction | NamedCustom, TaggedUnion()]], Len(1, MAX_TOOLS)
    ]


class AllowedChoice(RequestModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _tools(tools: list[ChatTool | ChatCustomTool]) -> list[ChatTool | ChatCustomTool]:
    as_offered([each.tool for each in tools], [f".{each.type}" for each in tools])
    return tools


def _functions(functions: list[OldFunction]) -> list[OldFunction]:
    as_offered([each.tool for each in functions])
    return functions


_KNOWN = TaggedUnion(other="tools of type {} are not available")
ChatTools = Annotated[
    Items[Annotated[ChatTool | ChatCustomTool, _KNOWN]],
    Field(max_length=MAX_TOOLS),
    AfterValidator(_tools),
]
Functions = Annotated[
    Items[Annotated[OldFunction, _KNOWN]], Field(max_length=MAX_TOOLS), AfterValidator(_functions)
]
ChatChoice = Annotated[
    ChoiceMode | NamedFunction | NamedCustom | AllowedChoice,
    TaggedUnion("one of none, auto, required, or an object", other="{} is not available"),
]
FunctionCall = Annotated[
    Literal["none", "auto"] | FunctionName, TaggedUnion("one of none, auto, or an object")
]


def tool_choice(
    given: ChoiceMode | NamedFunction | NamedCustom | AllowedChoice | FunctionName | None,
) -> ToolChoice | None:
    """What ``tool_choice`` or ``function_call`` asks for."""
    match given:
        case None:
            return None
        case NamedFunction() | NamedCustom() | FunctionName():
            return ToolChoice("named", (given.ref,))
        case AllowedChoice():
            allowed = given.allowed_tools
            return ToolChoice(allowed.mode, tuple(each.ref for each in allowed.tools))
        case mode:
            return ToolChoice(mode)
