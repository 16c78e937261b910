"""Tools that take free text, which OpenAI calls custom, offered as functions of one argument.

Knows what such a tool is and what its calls mean; knows no route's JSON.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Annotated, Final, Literal, Self

from annotated_types import MinLen
from pydantic import model_validator

from asyncllm.api.common.request_model import RequestModel, UnicodeStr, refuse
from asyncllm.api.common.response_format import GrammarText
from asyncllm.api.common.tool_request import ToolName
from asyncllm.api.parsing.events import Tool

# escapes, classes (the last may lack its end), and other text of a regular expression
_NO_PARENTHESES: Final = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]?|[^()\\\[]+", re.DOTALL)
INPUT: Final = "input"  # the argument that holds the free text
_ADVICE: Final = "The value of `input` is handed to the tool as it is."


class TextInput(RequestModel):
    type: Literal["text"]


class InputGrammar(RequestModel):
    """What the free text must fit."""

    syntax: Literal["lark", "regex"]
    definition: Annotated[GrammarText, MinLen(1)]

    @model_validator(mode="after")
    def _closed(self) -> Self:
        """An expression becomes a group of another one, which it must not close."""
        if self.syntax == "regex" and _closes_more_than_it_opens(self.definition):
            refuse(".definition: the regular expression has an unmatched )", ".definition")
        return self


def _closes_more_than_it_opens(expression: str) -> bool:
    """A look at parentheses only; the rest is checked where the grammar is compiled."""
    steps = {"(": 1, ")": -1}
    depths = accumulate(steps.get(char, 0) for char in _NO_PARENTHESES.sub("", expression))
    return min(depths, default=0) < 0


class FreeTextFields(RequestModel):
    """What all routes say of such a tool, which may have a ``grammar``."""

    name: ToolName
    description: UnicodeStr = ""

    @property
    def grammar(self) -> InputGrammar | None:
        """What the text is to fit."""
        return None

    @property
    def tool(self) -> Tool:
        """A function of one argument, which fits the grammar in every call."""
        return _as_function(self.name, self.description, self.grammar)


def _as_function(name: str, description: str, grammar: InputGrammar | None) -> Tool:
    lines, inner, lark = [description], {"type": "string"}, ""
    if grammar is not None and grammar.syntax == "regex":
        inner["pattern"] = f"^(?:{grammar.definition})$"
    elif grammar is not None:
        lark = grammar.definition
        lines.append(f"`input` is a text of this grammar (Lark):\n{lark}")
    schema = {
        "type": "object",
        "properties": {INPUT: inner},
        "required": [INPUT],
        "additionalProperties": False,
    }
    described = "\n".join(line for line in [*lines, _ADVICE] if line)
    return Tool(name, schema, described, grammar is not None, lark, custom=True)


def input_of(arguments: str) -> str:
    """The free text in the arguments of a call; "": they are cut, or hold none."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return ""
    given = found.get(INPUT, "") if isinstance(found, dict) else ""
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
