"""Tools that take free text, which OpenAI calls custom, offered as functions of one argument.

Knows what such a tool is and what its calls mean; knows no route's JSON.
"""

from __future__ import annotations

import json
from typing import Annotated, Final, Literal

from annotated_types import MinLen

from asyncllm.api.common.model import RequestModel
from asyncllm.api.common.response_format import GrammarText
from asyncllm.api.parsing.tools import Tool

INPUT: Final = "input"  # the argument that holds the free text
_ADVICE: Final = "The value of `input` is handed to the tool as it is."


class TextInput(RequestModel):
    type: Literal["text"]


class InputGrammar(RequestModel):
    """What the free text must fit."""

    syntax: Literal["lark", "regex"]
    definition: Annotated[GrammarText, MinLen(1)]


def as_function(name: str, description: str, grammar: InputGrammar | None) -> Tool:
    """A function of one argument, which fits ``grammar`` in every call."""
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
    return Tool(name, schema, described, grammar is not None, lark)


def input_of(arguments: str) -> str:
    """The free text in the arguments of a call; "": they are cut, or hold none."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return ""
    given = found.get(INPUT, "") if isinstance(found, dict) else ""
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
