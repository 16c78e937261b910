"""Negates schemas: for ``not``, ``oneOf``, ``if`` and dependencies.

The result is a schema, whose parts may be negated later, when they are needed. It may be narrower
than the exact negation; only schemas of the document are negated, never results of this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from asyncllm.constrain.grammars.document import TYPES, Document
from asyncllm.plain import Json, JsonObject


class _InternalKeyword(str):
    """A keyword of schemas made here: equal to no key of a JSON text, whatever that spells."""

    __slots__ = ()
    __eq__ = object.__eq__
    __hash__ = object.__hash__


VALUES: Final = _InternalKeyword("none of these values")
PATTERN: Final = _InternalKeyword("a string that this does not match")
FRACTION: Final = _InternalKeyword("a number that is no integer")

_LENGTHS: Final = {
    "minLength": ("string", "maxLength", -1), "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1), "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}  # fmt: skip
_BOUNDS: Final = {
    "minimum": "exclusiveMaximum", "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum", "exclusiveMaximum": "minimum",
}  # fmt: skip
# keywords that say nothing about a value
_SILENT: Final = frozenset(
    ("title", "description", "default", "examples", "example", "deprecated", "readOnly",
     "writeOnly", "$comment", "$schema", "$id", "id", "$anchor", "$defs", "definitions", "then",
     "else", "contentEncoding", "contentMediaType", "nullable")
)  # fmt: skip


def negated(schema: Json, document: Document) -> Json | None:
    """A schema of values that do not fit ``schema``. None: there is no such schema."""
    if isinstance(schema, bool):
        return not schema
    if not isinstance(schema, dict):
        return None
    if id(schema) in document.negations:
        return document.negations[id(schema)]
    parts: list[Json] = []
    says = [word for word in schema if word not in _SILENT]
    for word in says:
        parts += _opposites(schema, word, document)
    made: Json = {"anyOf": parts} if parts else None if says else False
    document.negations[id(schema)] = made
    return made


def _opposites(schema: JsonObject, word: str, document: Document) -> Iterator[Json]:
    """Schemas of values that break one keyword."""
    value = schema[word]
    match word:
        case "type":
            told = document.types(schema)
            others: list[Json] = [
                t for t in TYPES if t not in told and not {t, *told} >= {"integer", "number"}
            ]
            yield {"type": others} if others else False
            if "integer" in told and "number" not in told:
                yield {"type": "number", FRACTION: True}
        case "const":
            yield {VALUES: [value]}
        case "enum" if isinstance(value, list):
            yield {VALUES: value}
        case "pattern":
            yield {"type": "string", PATTERN: value}
        case "not":
            yield value
        case "$ref":
            yield {"not": document.target(schema, value)}
        case "anyOf" if isinstance(value, list):
            yield {"allOf": [{"not": part} for part in value]}
        case "allOf" if isinstance(value, list):
            for part in value:
                yield {"not": part}
        case "required" if isinstance(value, list):
            for name in value:
                if not isinstance(name, str):
                    document.fail(schema, "has a required that is no list of names")
                yield {"type": "object", "properties": {name: False}}
        case "properties" if isinstance(value, dict):
            for name, part in value.items():
                if part is not True and part != {}:
                    yield {
                        "type": "object",
                        "required": [name],
                        "properties": {name: {"not": part}},
                    }
        case _ if word in _BOUNDS and not isinstance(value, bool):
            if not isinstance(schema.get(_opened(word)), bool):
                yield {"type": "number", _BOUNDS[word]: value}
        case _ if word in _LENGTHS and isinstance(value, int):
            kind, limit, step = _LENGTHS[word]
            if value + step >= 0:
                yield {"type": kind, limit: value + step}


def _opened(word: str) -> str:
    """Draft 4's keyword that opens a bound."""
    return {"minimum": "exclusiveMinimum", "maximum": "exclusiveMaximum"}.get(word, "")


def dependencies(node: JsonObject, document: Document) -> Iterator[Json]:
    """Each dependency as a schema: without the property, or with what it wants."""
    for word in ("dependentRequired", "dependentSchemas", "dependencies"):
        told = node.get(word, {})
        if not isinstance(told, dict):
            document.fail(node, f"has {word} that is no object")
        for name, wants in told.items():
            then: Json = [wants] if isinstance(wants, str) else wants
            then = {"required": then} if isinstance(then, list) else then
            without: Json = {"properties": {name: False}}
            yield {"anyOf": [without, {"allOf": [{"required": [name]}, then]}]}
