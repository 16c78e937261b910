"""Fields that constrain the output: a JSON schema, a regular expression, a grammar.

Knows the fields' JSON values and limits; what a schema or grammar means is checked where it is
compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import PlainValidator

from asyncllm.api.common import validation
from asyncllm.api.common.model import AnyObject, refuse
from asyncllm.api.common.validation import Field, UnsupportedField, expect, preview, reject

MAX_CHARS: Final = 65_536
MAX_CHOICES: Final = 1024

Grammar = tuple[str, str]  # kind, text: see SamplingParams.grammar


def _of_object(value: object) -> Grammar:
    if not isinstance(value, dict):
        refuse(f" must be an object, not {preview(value)}")
    try:
        # its order is that of the output; ASCII, since a string may hold half a character
        text = json.dumps(value)
    except RecursionError:
        refuse(" is nested too deeply")
    if len(text) > MAX_CHARS:
        refuse(f": {len(text)} characters, at most {MAX_CHARS}")
    return "schema", text


SchemaObject = Annotated[Grammar, PlainValidator(_of_object, json_schema_input_type=AnyObject)]


def schema(value: Any, name: str) -> Grammar | None:
    """A JSON schema, as JSON or as a string of it; "" means none."""
    if value == "":
        return None
    what = "a JSON schema: an object, or a string of one"
    try:
        if isinstance(value, str):
            text = _limited(validation.text(value, name), name)
            expect(json.loads(text), dict, name, what)
        else:
            # its order is that of the output; ASCII, since a string may hold half a character
            text = _limited(json.dumps(expect(value, dict, name, what)), name)
    except RecursionError:
        reject(f"{name} is nested too deeply", name)
    except ValueError as error:
        reject(f"{name} is not valid JSON: {error}", name)
    return "schema", text


def regex(value: str, name: str) -> Grammar | None:
    """A regular expression that the whole output matches; "" means none."""
    return ("regex", _limited(value, name)) if value else None


def ebnf(value: str, name: str) -> Grammar | None:
    """Rules in EBNF, the first of which is ``root``; "" is none,
    "json" LightLLM's any JSON object."""
    if value == "json":
        return "json", ""
    return ("ebnf", _limited(value, name)) if value else None


def choice(value: Any, name: str) -> Grammar | None:
    """A list of strings, one of which is the output; an empty list means none."""
    expect(value, list, name, "an array of strings")
    if len(value) > MAX_CHOICES:
        reject(f"{name}: {len(value)} choices, at most {MAX_CHOICES}", name)
    for i, item in enumerate(value):
        if not validation.text(item, f"{name}[{i}]") or "\0" in item:
            reject(f"{name}[{i}]: an output cannot be empty or hold NUL", name)
    return ("choice", _limited(json.dumps(value, ensure_ascii=False), name)) if value else None


def structured(value: Mapping[str, Any], name: str) -> Grammar | None:
    """vLLM's ``structured_outputs``: one of its keys gives the output's form."""
    at = f"{name}."
    validation.refuse(_STRUCTURED_UNAVAILABLE, value, at)
    found = validation.read(STRUCTURED, value, at)
    found["json_object"] = ("json", "") if found["json_object"] else None
    return only(found, tuple(found), at)


def response_format(value: Mapping[str, Any], name: str) -> Grammar | None:
    """OpenAI's: {"type": "text" | "json_object" | "json_schema", "json_schema":
    {"schema": ...}}. The schema may also stand in it as ``schema`` or ``value``, as llama.cpp and
    huggingface_hub have it."""
    beside = [key for key in ("schema", "value") if value.get(key) is not None]
    if len(beside) == 2 or (beside and value.get("json_schema") is not None):
        reject(f"{name} has several schemas", name)
    match kind := value.get("type"):
        case "text" if beside:
            reject(f"{name}.{beside[0]} needs the type json_schema or json_object", name)
        case "text":
            return None
        case "json_object" | "json_schema" if beside:
            at = f"{name}.{beside[0]}"
            return schema(expect(value[beside[0]], dict, at, "an object"), at)
        case "json_object" if value.get("json_schema") is None:
            return "json", ""
        case "json_object" | "json_schema":
            inner = f"{name}.json_schema"
            holder = expect(value.get("json_schema"), dict, inner, "an object")
            expect(holder.get("schema"), dict, f"{inner}.schema", "an object")
            return schema(holder["schema"], f"{inner}.schema")
        case _:
            known = "text, json_object, json_schema"
            reject(f"{name}.type: {preview(kind)} is not one of {known}", f"{name}.type")


def only(values: Mapping[str, Any], names: Sequence[str], at: str = "") -> Grammar | None:
    """The grammar of a body, which may have one. Raises RequestError when there are several."""
    found = [name for name in names if values[name] is not None]
    if len(found) > 1:
        reject(f"{at}{found[0]} and {at}{found[1]} exclude each other", at + found[1])
    return values[found[0]] if found else None


def without_tokens(form: Grammar | None, allowed: Sequence[int], name: str) -> None:
    """Raises RequestError where a grammar and a list of allowed tokens would both restrict."""
    if form is not None and allowed:
        reject(f"{name} and a grammar exclude each other (a forced call is one too)", name)


STRUCTURED: Final = (
    Field(name="json", kind="any", parse=schema, doc="a JSON schema"),
    Field(name="json_object", kind="boolean", doc="any JSON object"),
    Field(name="regex", kind="string", parse=regex, doc="a regular expression"),
    Field(name="choice", kind="array", parse=choice, doc="a list of strings"),
    Field(name="grammar", kind="string", parse=ebnf, doc="rules in EBNF"),
)
_STRUCTURED_UNAVAILABLE: Final = (
    UnsupportedField(name="structural_tag", doc="a structural tag"),
    UnsupportedField(name="whitespace_pattern", doc="a pattern for white space"),
    UnsupportedField(
        name="disable_additional_properties", neutral=(False,), doc="closing open objects"
    ),
)


def _limited(text: str, name: str) -> str:
    if len(text) > MAX_CHARS:
        reject(f"{name}: {len(text)} characters, at most {MAX_CHARS}", name)
    return text
