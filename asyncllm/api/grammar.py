"""Fields that give the output a form: a JSON schema, a regular expression, a grammar.

Knows the fields' JSON values and limits; what a schema or grammar means is checked where it is
compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from asyncllm.api import fields
from asyncllm.api.fields import bad, show, typed

MAX_CHARS: Final = 65_536

Grammar = tuple[str, str]  # kind, text: see SamplingParams.grammar


def schema(value: Any, name: str) -> Grammar | None:
    """A JSON schema, as JSON or as a string of it; "" is none."""
    if value == "":
        return None
    what = "a JSON schema: an object, or a string of one"
    try:
        if isinstance(value, str):
            text = _limited(fields.text(value, name), name)
            typed(json.loads(text), dict, name, what)
        else:
            # its order is that of the output; ASCII, since a string may hold half a character
            text = _limited(json.dumps(typed(value, dict, name, what)), name)
    except RecursionError:
        bad(f"{name} is nested too deeply", name)
    except ValueError as error:
        bad(f"{name} is not valid JSON: {error}", name)
    return "schema", text


def regex(value: str, name: str) -> Grammar | None:
    """A regular expression that the whole output matches; "" is none."""
    return ("regex", _limited(value, name)) if value else None


def ebnf(value: str, name: str) -> Grammar | None:
    """Rules in EBNF, the first of which is ``root``; "" is none."""
    return ("ebnf", _limited(value, name)) if value else None


def response_format(value: Mapping[str, Any], name: str) -> Grammar | None:
    """OpenAI's: {"type": "text" | "json_object" | "json_schema", "json_schema": {"schema": ...}}."""
    match kind := value.get("type"):
        case "text":
            return None
        case "json_object":
            return "json", ""
        case "json_schema":
            inner = f"{name}.json_schema"
            holder = typed(value.get("json_schema"), dict, inner, "an object")
            typed(holder.get("schema"), dict, f"{inner}.schema", "an object")
            return schema(holder["schema"], f"{inner}.schema")
        case _:
            known = "text, json_object, json_schema"
            bad(f"{name}.type: {show(kind)} is not one of {known}", f"{name}.type")


def only(values: Mapping[str, Any], names: Sequence[str], at: str = "") -> Grammar | None:
    """The grammar of a body, which may have one. Raises RequestError when there are several."""
    found = [name for name in names if values[name] is not None]
    if len(found) > 1:
        bad(f"{at}{found[0]} and {at}{found[1]} exclude each other", at + found[1])
    return values[found[0]] if found else None


def without_tokens(form: Grammar | None, allowed: Sequence[int], name: str) -> None:
    """Raises RequestError where a grammar and a list of allowed tokens would both restrict."""
    if form is not None and allowed:
        bad(f"{name} and a grammar exclude each other (a forced call is one too)", name)


def _limited(text: str, name: str) -> str:
    if len(text) > MAX_CHARS:
        bad(f"{name}: {len(text)} characters, at most {MAX_CHARS}", name)
    return text
