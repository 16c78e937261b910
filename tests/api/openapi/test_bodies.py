"""What the document says of bodies is what the models check, for bodies with one place changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest

from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.openai import request as openai
from asyncllm.api.responses import request as responses
from asyncllm.api.responses.store import ResponseStore
from asyncllm.api.tgi import request as tgi
from asyncllm.errors import RequestError
from tests.api.harness import DOC, FUNCTION, HI, SCHEMA, SERVED, TGI, TOOLS

CALL = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
CHAT = {
    "messages": [*HI, {"role": "assistant", "tool_calls": [CALL]}, {"role": "Tool", "content": ["1"]}],
    "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "logit_bias": {"3": 1}, "stop": ["a"], "stop_token_ids": [1], "temperature": 1, "n": 2,
    "exponential_decay_length_penalty": [1, 2.0], "stream": True, "modalities": ["text"],
    "stream_options": {"include_usage": True},
}  # fmt: skip
COMPLETION = {"prompt": [[1, 2]], "guided_json": SCHEMA, "logprobs": 1, "best_of": 1, "suffix": ""}
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "1"},
]
RESPONSE = {
    "input": ITEMS, "tools": [{"type": "function", **FUNCTION}, {"type": "web_search_2026"}],
    "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    "reasoning": {"effort": "low"}, "metadata": {"a": "b"}, "include": ["x"],
}  # fmt: skip
USE = {"type": "tool_use", "id": "i", "name": "f", "input": {}}
MESSAGE = {
    "messages": [
        *HI, {"role": "assistant", "content": [USE]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "i", "content": "1"}]},
    ],
    "max_tokens": 4, "thinking": {"type": "enabled", "budget_tokens": 3, "display": "omitted"},
    "tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "any"},
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}, "mcp_servers": [],
}  # fmt: skip
NATIVE = {"inputs": [1], "parameters": {"stop_sequences": ["a", [1, 2]], "top_k": 3, "n": 1}}
ASKED = {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": SCHEMA}, "stop": "a"}}

Parse = Callable[[dict[str, Any]], object]
ROUTES: list[tuple[str, Parse, dict[str, Any]]] = [
    ("ChatRequest", lambda body: openai.chat(body, SERVED), CHAT),
    ("CompletionRequest", lambda body: openai.completion(body, SERVED), COMPLETION),
    ("ResponseRequest", lambda body: responses.read(body, SERVED, ResponseStore()), RESPONSE),
    ("MessageRequest", lambda body: anthropic.messages(body, SERVED), MESSAGE),
    ("NativeRequest", lambda body: lightllm.generate(body, SERVED, stream=False), NATIVE),
    ("TgiNativeRequest", lambda body: tgi.generate(body, SERVED, stream=False), ASKED),
    ("AbortRequest", lightllm.abort, {"request_id": "x", "abort_all": False}),
]
VALUES = [
    None, True, 0, 3.0, 2.5, -1, 10**30, "", "x", "auto", [], [None], [1], ["a"], {}, {"a": 1},
    {"type": "x"}, {"type": "text"},
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in inner:
            yield from places(each, (*at, key))


def changed(body: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(body)
    inner: Any = made
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return made


def refusal(parse: Parse, body: dict[str, Any]) -> RequestError | None:
    try:
        parse(body)
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize(("name", "parse", "body"), ROUTES, ids=[name for name, *_ in ROUTES])
def test_what_the_document_calls_wrong_is_refused_by_name(
    name: str, parse: Parse, body: dict[str, Any]
) -> None:
    document = TGI if name.startswith("Tgi") else DOC
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    judge = jsonschema.Draft202012Validator(schema)
    assert judge.is_valid(body)
    assert refusal(parse, body) is None
    wrong = 0
    for place in places(body):
        for value in VALUES:
            other = changed(body, place, value)
            error = refusal(parse, other)
            if error is not None:
                assert error.status in (400, 404)
                assert error.param, (place, value, error.message)
                assert error.message
            if not judge.is_valid(other):
                wrong += 1
                assert error is not None, (place, value)
                assert error.message.startswith(error.param.partition("[")[0].partition(".")[0])
    assert wrong > 10
