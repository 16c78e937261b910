"""Fields that other servers and SDKs have are honoured, refused by name, or in a table of docs/api.md
of those that cannot matter: none is ignored silently."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.request_model import parse
from asyncllm.api.openai import request as openai
from asyncllm.api.openapi import field_docs
from asyncllm.errors import RequestError
from tests.api.harness import HI, SERVED, chat_request, completion_request, rendered
from tests.api.responses.harness import ask

DATA = Path(__file__).parents[2] / "data"
FIELDS = json.loads((DATA / "published_fields.json").read_text())
# of objects inside of bodies, by the model that takes them: openai 3.57.0, anthropic 2.14.0
INNER = json.loads((DATA / "published_inner_fields.json").read_text())
TOOL_F = {"type": "function", "name": "f"}
MODELS = {**field_docs.MODELS, "count": anthropic.CountRequest}
BESIDE = {
    "messages": {"thread"},
    "count": {"thread"},
}  # refused for the SDK's sake in another shape


@pytest.mark.parametrize(
    ("route", "source"), [(route, source) for route in FIELDS for source in FIELDS[route]]
)
def test_no_published_field_is_ignored_silently(route: str, source: str) -> None:
    model = MODELS[route]
    known = {field.alias or name for name, field in model.model_fields.items()}
    known |= {*model.refused, *model.ignored, *BESIDE.get(route, ())}
    assert set(FIELDS[route][source].split()) - known == set()


@pytest.mark.parametrize("name", INNER)
def test_no_published_inner_field_is_ignored_silently(name: str) -> None:
    module, _, kind = name.rpartition(".")
    model = getattr(import_module(module), kind)
    known = {field.alias or name for name, field in model.model_fields.items()}
    assert set(INNER[name].split()) - known - {*model.refused, *model.ignored} == set()


@pytest.mark.parametrize("route", FIELDS)
def test_a_field_is_one_of_the_three(route: str) -> None:
    model = MODELS[route]
    names = [*model.model_fields, *model.refused, *model.ignored]
    assert len(names) == len(set(names))


def message_request(**body: Any) -> Any:
    return anthropic.messages({"messages": HI, "max_tokens": 5} | body, SERVED)


@pytest.mark.parametrize("make", [chat_request, completion_request, message_request])
def test_ignored_fields_change_nothing(make: Any) -> None:
    routes = {chat_request: openai.ChatRequest, completion_request: openai.CompletionRequest}
    model = routes.get(make, anthropic.MessageRequest)
    assert model.ignored
    assert make(**dict.fromkeys(model.ignored, "x")) == make()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inference_geo": "us"}, "inference_geo"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
         "context_management.edits[0].type"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}},
         "context_management.edits[0].type"),
        ({"output_config": {"task_budget": {"type": "tokens", "total": 5}}}, "output_config.task_budget"),
        ({"messages": [*HI, {"role": "system", "content": "x", "clear_at": 1}]}, "messages[1].clear_at"),
        ({"tools": [{"name": "f", "input_schema": {}, "allowed_callers": ["code_execution_20260521"]}]},
         "tools[0].allowed_callers"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(NotAvailable) as caught:
        message_request(**body)
    assert (caught.value.param, caught.value.code) == (param, "not_available")
    assert body.popitem()[0] in caught.value.message


FORMS = [
    "guided_json",
    "guided_regex",
    "guided_grammar",
    "guided_choice",
    "guided_json_object",
    "structural_tag",
    "ebnf",
    "regex",
    "guided_whitespace_pattern",
    "structured_outputs",
    "json_schema",
    "grammar",
    "response_format",
    "regular_constraint",
]
HONOURED = {
    "chat": {*FORMS[:4], "structured_outputs", "response_format"},
    "completion": {*FORMS[:4], "structured_outputs", "response_format"},
    "native_parameters": {"guided_json", "guided_grammar", "regular_constraint"},
    "tgi_parameters": {"guided_json", "guided_grammar", "regular_constraint", "grammar"},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "route", ["chat", "completion", "native_parameters", "tgi_parameters", "responses", "messages"]
)
def test_no_servers_name_of_the_outputs_form_is_lost(route: str, name: str) -> None:
    model = MODELS[route]
    if name in HONOURED.get(route, ()):
        assert name in model.model_fields
        assert name not in model.refused
        return
    with pytest.raises(RequestError, match=f"{name}: ") as caught:
        parse(model, {name: {"x": 1}}, SERVED)
    assert (caught.value.param, caught.value.code) == (name, "not_available")


def test_examples_of_a_tools_input_are_told() -> None:
    tool = {
        "name": "f",
        "description": "Does.",
        "input_schema": {},
        "allowed_callers": ["direct", "x"],
    }
    asked = message_request(tools=[tool | {"input_examples": [{"a": "Ü"}, {"b": 1}]}])
    (told,) = asked.output_options.tools
    assert told.description == 'Does.\nInput, for example: {"a":"Ü"}\nInput, for example: {"b":1}'


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "name": "f", "async": True}]}, "tools[0].async"),
        ({"tools": [{"type": "custom", "name": "f", "allowed_callers": ["programmatic"]}]}, "tools[0].allowed_callers"),
        ({"reasoning": {"context": "current_turn"}}, "reasoning.context"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ],
)  # fmt: skip
def test_responses_refuse_inner_fields_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(NotAvailable) as caught:
        ask(**body)
    assert caught.value.param == param
    tools = [{"type": "function", "name": "f", "async": False, "allowed_callers": ["direct"]}]
    reasoning = {"context": "auto", "mode": "standard", "summary": "auto"}
    assert ask(tools=tools, reasoning=reasoning).generation == ask(tools=[TOOL_F]).generation


def test_a_refusal_of_an_earlier_turn_is_its_content() -> None:
    turn = {"role": "assistant", "content": None, "refusal": "no"}
    assert rendered(chat_request(messages=[*HI, turn]))["messages"][1]["content"] == "no"
    with pytest.raises(NotAvailable, match=r"messages\[1\]\.audio"):
        chat_request(messages=[*HI, turn | {"audio": {"id": "x"}}])
