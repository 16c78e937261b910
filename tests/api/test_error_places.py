"""An error names the field that is wrong: every value of a body is made wrong, one by one."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.common.conversation import parsed_arguments
from asyncllm.api.common.errors import from_failure
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.openai import request as openai
from asyncllm.api.tgi import request as tgi
from asyncllm.errors import RequestError, RequestFault, ServerBusy
from asyncllm.records import Failure
from tests.api.harness import HI, SERVED, chat_request
from tests.api.responses.harness import ask

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "description": "d", "enum": ["x", "y z"]}},
    "required": ["a"],
}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
FLAT = {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA}
RULES = {"syntax": "regex", "definition": "a+"}
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"},
        {"role": "assistant", "content": "c", "reasoning_content": "r", "tool_calls": [
            {"id": "i", "type": "function", "function": {"name": "f", "arguments": {"a": ["x"]}}}]},
        {"role": "tool", "tool_call_id": "i", "content": "res"},
    ],
    "tools": [
        {"type": "function", "function": FUNCTION},
        {"type": "custom", "custom": {"name": "g", "description": "d",
                                      "format": {"type": "grammar", "grammar": RULES}}},
    ],
    "tool_choice": "auto", "stop": ["x", "y"], "logit_bias": {"5": 1.5}, "n": 2, "max_tokens": 5,
    "stream": True, "stream_options": {"include_usage": True}, "metadata": {"k": "v"}, "user": "u",
    "prediction": {"type": "content", "content": [{"type": "text", "text": "p"}]},
    "chat_template_kwargs": {"enable_thinking": {"x": "y"}}, "stop_token_ids": [5],
}  # fmt: skip
FORM = {"name": "n", "description": "d", "strict": True, "schema": SCHEMA}
MESSAGES: dict[str, Any] = {
    "max_tokens": 5,
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "x"},
            {"type": "tool_use", "id": "i", "name": "f", "input": {"a": "x", "b c": [{"d": "e"}]}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "i", "content": "r"}]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA,
               "input_examples": [{"a": "x"}, {"b": {"7": ["d"]}}]}],
    "tool_choice": {"type": "auto"}, "stop_sequences": ["x"], "metadata": {"user_id": "u"},
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
}  # fmt: skip
RESPONSES: dict[str, Any] = {
    "instructions": "i",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "function_call", "call_id": "c", "name": "h", "namespace": "ns",
         "arguments": {"a": "x"}},
        {"type": "function_call_output", "call_id": "c", "output": "o"},
        {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": "o"},
    ],
    "tools": [
        FLAT, {"type": "custom", "name": "g", "format": {"type": "grammar", **RULES}},
        {"type": "namespace", "name": "ns", "tools": [{**FLAT, "name": "h"}]},
    ],
    "metadata": {"k": "v"}, "reasoning": {"effort": "low"},
    "text": {"format": {"type": "json_schema", **FORM}},
}  # fmt: skip
SAMPLING = {"temperature": 0.5, "stop_sequences": ["a", [1, 2]], "max_new_tokens": 3,
            "logit_bias": {"3": 1}, "seed": 3, "top_k": 3}  # fmt: skip
COMPLETION = {"prompt": [[1, 2]], "max_tokens": 3, "logprobs": 2, "stop": "x", "seed": 3}
BODIES: dict[str, tuple[Callable[[dict[str, Any]], object], dict[str, Any]]] = {
    "chat": (lambda body: openai.chat(body, SERVED), CHAT),
    "form": (lambda body: openai.chat(body, SERVED),
             {"messages": HI, "response_format": {"type": "json_schema", "json_schema": FORM}}),
    "choice": (lambda body: openai.chat(body, SERVED),
               {"messages": HI, "structured_outputs": {"choice": ["a", "b"]}}),
    "completion": (lambda body: openai.completion(body, SERVED), COMPLETION),
    "messages": (lambda body: anthropic.messages(body, SERVED), MESSAGES),
    "responses": (lambda body: ask(**body), RESPONSES),
    "native": (lambda body: lightllm.generate(body, SERVED, stream=False),
               {"inputs": "x", "parameters": {**SAMPLING, "guided_json": SCHEMA}}),
    "tgi": (lambda body: tgi.generate(body, SERVED, stream=False),
            {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": SCHEMA}, "stop": ["x"]}}),
}  # fmt: skip
HALF = "\ud800"
WRONG = (f"x{HALF}", {"a": HALF}, [HALF], {HALF: 1}, 5, 1.5, "str", "", [], {}, [5], -1, 10**30)


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*place, key))


def name_of(place: tuple[Any, ...]) -> str:
    name = ""
    for part in place:
        if isinstance(part, int) or part.isdecimal():
            name += f"[{part}]"
        elif part.isidentifier():
            name += f".{part}" if name else part
        else:
            name += f"[{json.dumps(part)}]"
    return name


def refused(route: str) -> Iterator[tuple[str, Any, RequestError]]:
    """(name, wrong value, error) for each value that is refused in a place."""
    read, good = BODIES[route]
    good = json.loads(json.dumps(good))  # nothing in it is there twice
    read(good)
    for place, wrong in product(list(places(good)), WRONG):
        body = copy.deepcopy(good)
        inner = body
        for part in place[:-1]:
            inner = inner[part]
        inner[place[-1]] = wrong
        try:
            read(body)
        except RequestError as error:
            yield name_of(place), wrong, error


@pytest.mark.parametrize("route", BODIES)
def test_an_error_names_the_field_that_is_wrong(route: str) -> None:
    """Or one around it, or in it."""
    number = 0
    for name, wrong, error in refused(route):
        number, told = number + 1, error.param or "?"
        assert error.status in (400, 404), (name, wrong)
        assert name.startswith(told) or told.startswith(name), (name, wrong, error.message)
        assert re.split(r"[.\[]", told)[0] in error.message, (name, error.message)
    assert number > 50


@pytest.mark.parametrize("body", [{"functions": []}, {"functions": [FUNCTION]}])
def test_the_older_choice_of_a_function_is_named(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^function_call: there (are|is) no ") as caught:
        chat_request(**body, function_call={"name": "g"})
    assert caught.value.param == "function_call"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_of_tokens_that_was_sent_is_named(name: str) -> None:
    with pytest.raises(RequestError, match=f"^min_tokens: 5 is more than {name} 3$"):
        chat_request(**{name: 3}, min_tokens=5)


def test_half_a_character_in_arguments_that_a_model_wrote_is_text() -> None:
    """As what is cut is: the next request of an agent must not fail by it."""
    said = '{"a": "\\ud83d"}'
    assert parsed_arguments(said) == said
    call = {"type": "function_call", "call_id": "i", "name": "f", "arguments": said}
    ask(input=[call, {"type": "function_call_output", "call_id": "i", "output": "x"}])


STRICT = [{"type": "function", "function": FUNCTION}]
FORMATTED = {"type": "json_schema", "json_schema": FORM}
CHAT_FIELDS = ("messages", "max_tokens")


def _of_chat(body: dict[str, Any]) -> Any:
    return openai.chat({"messages": HI, **body}, SERVED)


def _of_completion(body: dict[str, Any]) -> Any:
    return openai.completion({"prompt": "x", **body}, SERVED)


def _of_parameters(parameters: dict[str, Any]) -> Any:
    body = {"inputs": "x", "parameters": parameters}
    return lightllm.generate(body, SERVED, stream=False)


@pytest.mark.parametrize(
    ("read", "body", "named"),
    [
        (_of_chat, {"response_format": FORMATTED}, (*CHAT_FIELDS, "response_format")),
        (_of_chat, {"guided_choice": ["a"]}, (*CHAT_FIELDS, "guided_choice")),
        (_of_chat, {"structured_outputs": {"regex": "a"}}, (*CHAT_FIELDS, "structured_outputs")),
        (_of_chat, {"tools": STRICT}, (*CHAT_FIELDS, "tools")),
        (_of_chat, {"tools": STRICT, "tool_choice": "required"}, (*CHAT_FIELDS, "tools")),
        (_of_chat, {"functions": [FUNCTION], "function_call": {"name": "f"}}, (*CHAT_FIELDS, "functions")),
        (_of_chat, {"max_completion_tokens": 9, "guided_regex": "a"}, ("messages", "max_completion_tokens", "guided_regex")),
        (_of_completion, {"guided_grammar": "json"}, ("prompt", "max_tokens", "guided_grammar")),
        (lambda body: ask(**body).generation, {"text": {"format": {"type": "json_object"}}}, ("input", "max_output_tokens", "text.format")),
        (lambda body: ask(**body).generation, {"tools": [{**FLAT, "strict": True}]}, ("input", "max_output_tokens", "tools")),
        (_of_parameters, {"regular_constraint": "a"}, ("inputs", "parameters.max_new_tokens", "parameters.regular_constraint")),
        (lambda body: tgi.generate({"inputs": "x", "parameters": body}, SERVED, stream=False).generation,
         {"grammar": {"type": "regex", "value": "a"}}, ("inputs", "parameters.max_new_tokens", "parameters.grammar")),
    ],
)  # fmt: skip
def test_what_fails_behind_http_names_the_routes_field(
    read: Callable[[dict[str, Any]], Any], body: dict[str, Any], named: tuple[str, ...]
) -> None:
    fields = read(body).fields
    failures = [Failure("no", param=name) for name in ("prompt", "max_tokens", "grammar")]
    assert tuple(from_failure(failure, fields).param for failure in failures) == named


def test_what_is_not_the_clients_names_no_field() -> None:
    assert from_failure(Failure("no")).param is None
    assert from_failure(Failure("no", param="prediction")).param == "prediction"
    assert Failure.of(RequestError("no"), "grammar").param == "grammar"
    assert Failure.of(RequestError("no", param="prompt"), "grammar").param == "prompt"
    assert [Failure.of(e, "grammar").param for e in (ServerBusy("no"), RequestFault())] == ["", ""]
