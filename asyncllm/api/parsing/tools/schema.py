"""JSON schemas of tools: an argument's type, and the schema of a forced call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.json_stream import escaped, loads
from asyncllm.core.request import LARK
from asyncllm.errors import RequestError

TYPES: Final = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
MAX_CALLS: Final = 8  # that are forced at once: a model that repeats itself comes to an end
_COMBINED: Final = frozenset({"$ref", "anyOf", "oneOf", "allOf"})
# keywords that allow further properties, or count them
_OPEN: Final = frozenset({"additionalProperties", "unevaluatedProperties", "minProperties"})
_JSON_TYPE: Final[Mapping[type, str]] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    dict: "object",
    list: "array",
}


def argument_types(tool: Tool | None, key: str) -> frozenset[str]:
    """JSON types that a tool's schema allows for an argument; all of them if it does not say."""
    root = {} if tool is None else tool.parameters
    found: set[str] = set()
    for schema in _branches(root, root):
        properties = schema.get("properties")
        if isinstance(properties, Mapping) and key in properties:
            found |= _types(properties[key], root)
    return frozenset(found) or TYPES


def argument_json(text: str, types: frozenset[str]) -> str:
    """The JSON text of a value that a model wrote without quotes.

    JSON of a type in ``types`` stays as it is, any other text becomes a string. ``True``,
    ``False``, ``None`` are understood as Python means them.
    """
    quoted = f'"{escaped(text)}"'
    if types == {"string"}:
        return quoted
    bare = text.strip()
    python = {"True": "true", "False": "false", "None": "null"}
    bare = python.get(bare, bare)
    try:
        value = loads(bare)
        bare.encode()
    except ValueError:
        return quoted
    kind = _JSON_TYPE[type(value)]
    fits = kind in types or (kind == "integer" and "number" in types)
    fits = fits or (kind == "number" and "integer" in types and value == int(value))
    # a quoted string is meant as one unless quotes may be part of a string
    if fits and (kind != "string" or "string" not in types):
        return bare
    return quoted


def call_schema(
    tools: Sequence[Tool], choice: str | None = None, parallel: bool = True
) -> dict[str, object]:
    """The JSON schema of forced calls: ``{"name": .., "arguments": ..}`` or a list of them.

    Args:
        tools: all there are.
        choice: the name of the one that must be called, once; None: at least one of all.
        parallel: more than one call is allowed, so the calls are a list.

    Raises:
        RequestError: ``choice`` is not a tool, or there are no tools.
    """
    chosen = [tool for tool in tools if choice is None or tool.name == choice]
    if not chosen:
        raise RequestError(
            f"tool_choice: there is no tool {choice!r}"
            if tools
            else "tool_choice: there are no tools",
            param="tool_choice",
        )
    calls = [_call(tool, i) for i, tool in enumerate(chosen)]
    one: dict[str, object] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if parallel and choice is None:
        return {"type": "array", "minItems": 1, "maxItems": MAX_CALLS, "items": one}
    return one


def arguments_schema(tool: Tool) -> dict[str, object]:
    """The JSON schema of a tool's arguments: always an object's.

    Where the tool names its arguments and does not say whether there may be others, there are none:
    models like to go on with some of their own.
    """
    schema = dict(tool.parameters)
    if _COMBINED.isdisjoint(schema) and "type" not in schema:
        schema["type"] = "object"
    if _OPEN.isdisjoint(schema) and not (_COMBINED | {"properties"}).isdisjoint(schema):
        named, required = schema.get("properties", {}), schema.get("required")
        if isinstance(named, Mapping) and isinstance(required, list):
            others = {name: True for name in required if isinstance(name, str)}
            schema["properties"] = {**named, **{k: v for k, v in others.items() if k not in named}}
        schema["unevaluatedProperties"] = False
    if tool.lark:
        named = schema["properties"]
        schema["properties"] = {name: {**named[name], LARK: tool.lark} for name in named}
    return schema


def _call(tool: Tool, number: int) -> dict[str, object]:
    """A call of ``tool``, with addresses of its own: references in its schema still hold."""
    return {
        "$id": f"http://tool{number}/",
        "type": "object",
        "properties": {
            "name": {"const": tool.name},
            "arguments": {"$id": "arguments", **arguments_schema(tool)},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _types(schema: Any, root: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for branch in _branches(schema, root):
        kind = branch.get("type")
        if kind is not None:
            found |= {k for k in (kind if isinstance(kind, list) else [kind]) if isinstance(k, str)}
        elif isinstance(values := branch.get("enum"), list):
            found |= {_JSON_TYPE.get(type(value), "string") for value in values}
        elif "const" in branch:
            found.add(_JSON_TYPE.get(type(branch["const"]), "string"))
    return found & TYPES


def _branches(schema: object, root: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """The schema, what it refers to, and its alternatives, each once."""
    waiting, seen = [schema], set[int]()
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, Mapping) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema
        ref = schema.get("$ref")
        if isinstance(ref, str) and ref.startswith("#"):
            waiting.append(_pointed(ref, root))
        for word in ("anyOf", "oneOf", "allOf"):
            if isinstance(parts := schema.get(word), list):
                waiting += parts


def _pointed(ref: str, root: Mapping[str, object]) -> object:
    node: object = root
    for step in ref.removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        node = node.get(name) if isinstance(node, Mapping) else None
    return node
