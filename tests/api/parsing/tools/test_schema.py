"""Forced calls: schemas whose references hold, spellings that the parsers read back."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.tools import FORMATS, deepseek
from asyncllm.api.parsing.tools.call_grammar import CALL_TEXTS, spelling
from asyncllm.api.parsing.tools.schema import call_schema
from asyncllm.errors import RequestError

from .answers import parse_whole

TREE = {
    "type": "object",
    "properties": {
        "root": {"$ref": "#/$defs/node"},
        "again": {"$ref": "#"},
        "example": {"$ref": "#/$defs/node"},
    },
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "next": {"$ref": "#/$defs/node"},
                "$ref": {"type": "string", "enum": ["#/$defs/node"]},
                "first": {"$ref": "#/properties/root"},
            },
        }
    },
}
TOOLS = [
    Tool("tree", TREE),
    Tool("old", {"properties": {"x": {"$ref": "#/definitions/n"}}, "definitions": {"n": {"type": "integer"}}}),
    Tool("bare"),
]  # fmt: skip


@pytest.mark.parametrize("choice", [None, "tree"])
def test_references_mean_what_they_meant(choice: str | None) -> None:
    told = jsonschema.Draft202012Validator(call_schema(TOOLS, choice, parallel=False))
    node = {"next": {"next": {}, "$ref": "#/$defs/node"}, "first": {"first": {}}}
    for arguments, fits in (
        ({"root": node, "again": {"again": {"example": node}}}, True),
        ({"root": {"next": 1}}, False),
        ({"root": {"first": {"first": 1}}}, False),
        ({"root": {"$ref": "#/$defs/n"}}, False),
        ({"again": {"again": {"other": 1}}}, False),
        ({"example": 1}, False),
    ):
        assert told.is_valid({"name": "tree", "arguments": arguments}) == fits, arguments
    if choice is None:
        assert told.is_valid({"name": "old", "arguments": {"x": 1}})
        assert not told.is_valid({"name": "old", "arguments": {"x": "1"}})


def test_the_shape_of_forced_calls() -> None:
    one = call_schema([TOOLS[2]], parallel=False)
    assert one == {
        "$id": "http://tool0/",
        "type": "object",
        "properties": {
            "name": {"const": "bare"},
            "arguments": {"$id": "arguments", "type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    assert call_schema([TOOLS[2]]) == {"type": "array", "minItems": 1, "maxItems": 8, "items": one}
    assert call_schema(TOOLS, "bare") == one
    several = call_schema(TOOLS)
    assert [c["properties"]["name"]["const"] for c in several["items"]["anyOf"]] == [
        tool.name for tool in TOOLS
    ]


@pytest.mark.parametrize(
    ("parameters", "closed"),
    [
        ({"properties": {"a": {}}}, True),
        ({"type": "object", "properties": {}}, True),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"a": {}}}}}, True),
        ({"type": "object", "anyOf": [{"properties": {"a": {}}}]}, True),
        ({"type": "object"}, False),  # any arguments
        ({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}, False),
        ({"properties": {"a": {}}, "unevaluatedProperties": True}, False),
        ({"properties": {"a": {}}, "minProperties": 2}, False),
    ],
)
def test_arguments_that_a_tool_names_are_all(parameters: dict[str, Any], closed: bool) -> None:
    schema = call_schema([Tool("f", parameters)], "f")
    told = jsonschema.Draft202012Validator(schema)
    assert told.is_valid({"name": "f", "arguments": {"a": "x", "b": "y"}}) != closed


def test_arguments_that_must_come_may_come() -> None:
    parameters = {"properties": {"a": {"type": "null"}}, "required": ["b", "a"]}
    told = jsonschema.Draft202012Validator(call_schema([Tool("f", parameters)], "f"))
    assert told.is_valid({"name": "f", "arguments": {"a": None, "b": 1}})
    assert not told.is_valid({"name": "f", "arguments": {"a": None, "b": 1, "c": 1}})


def test_a_choice_that_is_none_is_the_clients_fault() -> None:
    with pytest.raises(RequestError, match="no tool 'nope'"):
        call_schema(TOOLS, "nope")
    with pytest.raises(RequestError, match="no tools"):
        call_schema([])


XML = {
    "json": '{"a": "b"}',
    "qwen_xml": "<parameter=a>\nb\n</parameter>",
    "glm_xml": "<arg_key>a</arg_key><arg_value>b</arg_value>",
}


@pytest.mark.parametrize("template", ["", "[ARGS]", "```json"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_guided_calls_are_read_back(format_name: str, template: str) -> None:
    tools = [Tool("one", {"type": "object"}), Tool("two", {"type": "object"})]
    call = CALL_TEXTS[spelling(format_name, template)]
    assert call.begin.startswith(call.trigger)
    written = [f"{call.begun(tool.name)}{XML[call.style]}{call.end}" for tool in tools]
    text = call.opens + call.between.join(written) + call.closes
    parsed = parse_whole(format_name, text, tools)
    assert [(c.name, json.loads(c.arguments)) for c in parsed.calls] == [
        ("one", {"a": "b"}),
        ("two", {"a": "b"}),
    ]
    assert parsed.content == ""
    assert parsed.complete


def test_variants_follow_the_template() -> None:
    assert CALL_TEXTS[spelling("mistral")].opens == "[TOOL_CALLS] ["
    assert CALL_TEXTS[spelling("mistral", "..[ARGS]..")].begun("f") == "[TOOL_CALLS]f[ARGS]"
    assert "```json" in CALL_TEXTS[spelling("deepseekv3")].begin
    assert "```json" not in CALL_TEXTS[spelling("deepseekv3", deepseek.CALL)].begin
    assert '\\"' in CALL_TEXTS[spelling("hermes")].begun('say "hi"')


def test_forced_json_is_read_by_its_own_parser() -> None:
    tools = [Tool("f")]
    call = '{"name": "f", "arguments": {"a": [1]}}'
    for text, num_calls in ((call, 1), (f"[{call}]", 1), (f"[{call}, {call}]", 2)):
        parsed = parse_whole("json", text, tools)
        assert [c.arguments for c in parsed.calls] == ['{"a": [1]}'] * num_calls
        assert (parsed.content, parsed.complete) == ("", True)
