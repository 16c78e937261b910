"""The OpenAPI document says what the server checks."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from asyncllm.api.common.request_model import RequestModel
from asyncllm.api.openai import request as openai
from asyncllm.api.openapi import document as openapi
from asyncllm.errors import RequestError
from tests.api.harness import CASES, DOC, SERVED, TGI, Case, ending, feed, reply


def refs(value: Any) -> set[str]:
    if isinstance(value, dict):
        found = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return found.union(*map(refs, value.values()))
    return set().union(*map(refs, value)) if isinstance(value, list) else set()


def properties(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = DOC["components"]["schemas"][name]
    assert schema["additionalProperties"] is True
    found: dict[str, Any] = schema["properties"]
    return found


@pytest.mark.parametrize("model", [*openapi.BODIES, *openapi.NATIVE, *openapi.TGI])
def test_every_field_is_there_and_described(model: type[RequestModel]) -> None:
    document = TGI if model in openapi.TGI else DOC
    schema = document["components"]["schemas"][model.__name__]
    assert schema["additionalProperties"] is True
    refused = model.refused
    assert schema["properties"].keys() == {*model.model_fields, *refused, *model.ignored}
    for name, told in schema["properties"].items():
        assert told["description"]
        if name in refused:
            assert told["enum"] == [None, *refused[name].neutral]


def test_ranges_and_nulls() -> None:
    top_p = properties("ChatRequest")["top_p"]
    assert top_p["type"] == ["number", "null"]
    assert (top_p["minimum"], top_p["maximum"], top_p["default"]) == (0, 1, 1.0)
    assert properties("ChatRequest")["repetition_penalty"]["exclusiveMinimum"] == 0
    most = properties("MessageRequest")["max_tokens"]
    assert (most["type"], most["minimum"]) == ("integer", 1)
    schemas = DOC["components"]["schemas"]
    assert schemas["MessageRequest"]["required"] == ["messages", "max_tokens"]
    assert schemas["ChatRequest"]["required"] == ["messages"]
    display = schemas["ThinkingMode"]["properties"]["display"]
    assert display["enum"] == ["summarized", "omitted", None]


def test_token_ids_end_with_the_vocabulary() -> None:
    token = DOC["components"]["schemas"]["Token"]
    assert token == {"type": "integer", "minimum": 0, "maximum": SERVED.vocab_size - 1}


@pytest.mark.parametrize(
    ("message", "fine"),
    [
        ({"role": "User", "content": "a"}, True),
        ({"role": "system", "content": [{"type": "text", "text": "a"}]}, True),
        ({"role": "users", "content": "a"}, False),
        ({"role": "user"}, False),
        ({"role": "user", "content": None}, False),
        ({"role": "Assistant"}, True),
        ({"role": "assistant", "content": None, "reasoning_content": "a"}, True),
        ({"role": "assistant", "reasoning_content": 0}, False),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, True),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, False),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}, False),
    ],
)
def test_messages_are_described_as_they_are_checked(message: Any, fine: bool) -> None:
    def right() -> bool:
        try:
            openai.chat({"messages": [message]}, SERVED)
        except RequestError:
            return False
        return True

    schema = {**properties("ChatRequest")["messages"]["items"], "components": DOC["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(message) is fine
    assert right() is fine


def test_the_document_is_whole() -> None:
    assert json.loads(json.dumps(DOC)) == DOC
    names = {f"#/components/schemas/{name}" for name in DOC["components"]["schemas"]}
    assert refs(DOC) <= names
    ids = [o["operationId"] for path in DOC["paths"].values() for o in path.values()]
    assert len(ids) == len(set(ids))
    links = DOC["paths"]["/v1/responses"]["post"]["responses"]["200"]["links"]
    assert {link["operationId"] for link in links.values()} <= set(ids)


def test_security() -> None:
    assert DOC["paths"]["/health"]["get"]["security"] == []
    assert "401" not in DOC["paths"]["/health"]["get"]["responses"]
    assert "security" not in DOC["paths"]["/metrics"]["get"]
    assert "401" in DOC["paths"]["/metrics"]["get"]["responses"]
    assert DOC["security"] == [{"bearer": []}, {"key": []}]
    open_doc = openapi.document(SERVED, secured=False)
    assert "security" not in open_doc
    assert "401" not in json.dumps(open_doc["paths"])


@pytest.mark.parametrize("route", openapi.ROUTES, ids=lambda r: f"{r.methods[0]} {r.path}")
def test_routes_say_what_comes(route: openapi.Route) -> None:
    for method in route.methods:
        responses = DOC["paths"][route.path][method]["responses"]
        assert responses["200"]["content"]
        assert ("text/event-stream" in responses["200"]["content"]) is route.streams
        assert {str(s) for s in route.fails} <= set(responses)


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "function", "function": {"name": "a-b.c"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"tools": [{"type": "function", "function": {"name": "é"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "null"}}}
            ]
        },
        {"tools": [{"type": "function"}]},
        {"tools": [None]},
        {"tool_choice": "auto"},
        {"tool_choice": "any"},
        {"tool_choice": {"type": "function"}},
    ],
)
def test_tools_are_refused_where_the_document_says_so(body: dict[str, Any]) -> None:
    allowed = True
    try:
        openai.chat({"messages": [{"role": "user", "content": "hi"}]} | body, SERVED)
    except RequestError:
        allowed = False
    (name,) = body
    schema = {**properties("ChatRequest")[name], "components": DOC["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(body[name]) == allowed


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answers_are_as_the_document_says(case: Case) -> None:
    calls, thoughts, text, *_, reason = case
    made = reply(calls, thoughts)
    feed(made, [text], ending(reason))
    schemas = DOC["components"]["schemas"]
    jsonschema.validate(json.loads(made.whole()), schemas["ChatCompletion"])
