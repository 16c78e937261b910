"""Fields that other servers and SDKs have are honoured, refused by name, or in a table of docs/api.md
of those that cannot matter: none is ignored silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.openai import request as openai
from asyncllm.api.openapi import field_docs
from tests.api.harness import HI, SERVED, chat_request, completion_request

FIELDS = json.loads((Path(__file__).parents[2] / "data" / "published_fields.json").read_text())
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
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(NotAvailable) as caught:
        message_request(**body)
    assert (caught.value.param, caught.value.code) == (param, "not_available")
    assert body.popitem()[0] in caught.value.message
