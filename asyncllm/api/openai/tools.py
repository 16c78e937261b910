"""Tools of /v1/chat/completions, and the choice between them.

Knows OpenAI's objects; what an offer means is in :mod:`asyncllm.api.common.tool_request`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import AfterValidator, Field

from asyncllm.api.common.model import Items, RequestModel, UnicodeStr, Variants
from asyncllm.api.common.tool_request import (
    MAX_TOOLS,
    ChoiceMode,
    FunctionTool,
    ToolChoice,
    as_offered,
)


class ChatTool(RequestModel):
    type: Literal["function"]
    function: FunctionTool


class OldFunction(FunctionTool):
    type: Literal["function"] = "function"


class FunctionName(RequestModel):
    name: UnicodeStr


class NamedFunction(RequestModel):
    type: Literal["function"] = "function"  # TGI's clients leave it out
    function: FunctionName


class AllowedTools(RequestModel):
    mode: Literal["auto", "required"]
    tools: Annotated[Items[NamedFunction], MinLen(1)]


class AllowedChoice(RequestModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _tools(tools: list[ChatTool]) -> list[ChatTool]:
    as_offered([each.function.tool for each in tools], ".function")
    return tools


def _functions(functions: list[OldFunction]) -> list[OldFunction]:
    as_offered([each.tool for each in functions])
    return functions


_KNOWN = Variants(other="tools of type {} are not available")
ChatTools = Annotated[
    Items[Annotated[ChatTool, _KNOWN]], Field(max_length=MAX_TOOLS), AfterValidator(_tools)
]
Functions = Annotated[
    Items[Annotated[OldFunction, _KNOWN]], Field(max_length=MAX_TOOLS), AfterValidator(_functions)
]
ChatChoice = Annotated[
    ChoiceMode | NamedFunction | AllowedChoice,
    Variants("one of none, auto, required, or an object", other="{} is not available"),
]
FunctionCall = Annotated[
    Literal["none", "auto"] | FunctionName, Variants("one of none, auto, or an object")
]


def tool_choice(
    given: ChoiceMode | NamedFunction | AllowedChoice | FunctionName | None,
) -> ToolChoice | None:
    """What ``tool_choice`` or ``function_call`` asks for."""
    match given:
        case None:
            return None
        case NamedFunction():
            return ToolChoice("named", given.function.name)
        case FunctionName():
            return ToolChoice("named", given.name)
        case AllowedChoice():
            allowed = given.allowed_tools
            names = tuple(each.function.name for each in allowed.tools)
            return ToolChoice(allowed.mode, allowed=names)
        case mode:
            return ToolChoice(mode)
