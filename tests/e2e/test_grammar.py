"""Constrained output of a running server on the embedded model."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest

from tests.e2e.process import Server, stream_text, wait_until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
STRICT = {
    "type": "json_schema",
    "json_schema": {"name": "person", "strict": True, "schema": SCHEMA},
}
PERSON = [{"role": "user", "content": "Describe a person as JSON."}]


def chat(server: Server, **body: Any) -> tuple[str, str]:
    """(content, finish_reason)"""
    given = {"messages": PERSON, "temperature": 0, "max_tokens": 200, **body}
    (choice,) = server.post(CHAT, given)["choices"]
    return choice["message"]["content"], choice["finish_reason"]


def refusal(server: Server, path: str, body: dict[str, Any]) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(path, body)
    with caught.value as reply:
        return reply.code, reply.read().decode()


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_json_schema_is_kept(server: Server, temperature: float) -> None:
    for seed in range(3):
        text, reason = chat(server, response_format=STRICT, temperature=temperature, seed=seed)
        jsonschema.validate(json.loads(text), SCHEMA)
        assert reason == "stop"


def test_native_json_schema(server: Server) -> None:
    for form in (SCHEMA, json.dumps(SCHEMA)):
        parameters = {"guided_json": form, "max_new_tokens": 200}
        reply = server.post("/generate", {"inputs": "A person:", "parameters": parameters})
        jsonschema.validate(json.loads(reply["generated_text"][0]), SCHEMA)
        assert reply["finish_reason"] == "stop"


def test_regex_and_ebnf(server: Server) -> None:
    text, reason = chat(server, guided_regex=r"(yes|no), [A-Z][a-z]{2,5}\.")
    assert re.fullmatch(r"(yes|no), [A-Z][a-z]{2,5}\.", text)
    assert reason == "stop"
    grammar = 'root ::= item ("+" item){1, 3}\nitem ::= "x" | "é" | "(" root ")"'
    text, reason = chat(server, guided_grammar=grammar, temperature=1, seed=3)
    assert re.fullmatch(r"[xé()+]+", text)
    assert reason == "stop"
    parameters = {"regular_constraint": "[0-9]{3}-[0-9]{2}", "max_new_tokens": 20}
    reply = server.post("/generate", {"inputs": "The number is ", "parameters": parameters})
    assert re.fullmatch("[0-9]{3}-[0-9]{2}", reply["generated_text"][0])


def test_one_of_some_choices(server: Server) -> None:
    some = ["green", 'a "quoted" one', "größer"]
    for form in ({"guided_choice": some}, {"structured_outputs": {"choice": some}}):
        text, reason = chat(server, **form, temperature=2, seed=1)
        assert (text in some, reason) == (True, "stop")


def test_json_object_parses(server: Server) -> None:
    messages = [{"role": "user", "content": 'Reply with this JSON object: {"a": 1}'}]
    text, reason = chat(server, messages=messages, response_format={"type": "json_object"})
    assert (json.loads(text), reason) == ({"a": 1}, "stop")
    text, reason = chat(server, response_format={"type": "json_object"}, max_tokens=3)
    assert (text[0], reason) == ("{", "length")


def test_max_tokens_at_the_last_token_is_still_a_stop(server: Server) -> None:
    body = {"prompt": "x", "guided_regex": "[a-z]{3}!", "temperature": 0}
    whole = server.post(COMPLETIONS, {**body, "max_tokens": 50})
    used = whole["usage"]["completion_tokens"]
    assert whole["choices"][0]["finish_reason"] == "stop"
    exact = server.post(COMPLETIONS, {**body, "max_tokens": used})
    assert exact["choices"] == whole["choices"]
    short = server.post(COMPLETIONS, {**body, "max_tokens": used - 1})
    assert short["choices"][0]["finish_reason"] == "length"


def test_stop_strings_penalties_bias_and_least_length_still_work(server: Server) -> None:
    body = {"guided_regex": "(ab){1,40}", "min_tokens": 5, "presence_penalty": 1.0, "stop": "baba"}
    text, reason = chat(server, **body)
    assert (text, reason) == ("a", "stop")
    text, reason = chat(server, guided_regex="a|b", min_tokens=5, logit_bias={"7": 10.0})
    assert (text in ("a", "b"), reason) == (True, "stop")


def test_log_probabilities_are_those_of_the_model(server: Server) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0, "logprobs": 1}
    free = server.post(COMPLETIONS, body)["choices"][0]["logprobs"]
    forced = server.post(COMPLETIONS, {**body, "guided_regex": "QQQ"})["choices"][0]["logprobs"]
    assert forced["token_logprobs"][0] < -5
    best = max(free["top_logprobs"][0].values())
    assert max(forced["top_logprobs"][0].values()) == pytest.approx(best, abs=1e-4)


def test_choices_of_one_prompt_follow_the_grammar_each_for_itself(server: Server) -> None:
    body = {"prompt": "A word: ", "n": 4, "temperature": 2.0, "seed": 1, "max_tokens": 30}
    reply = server.post(COMPLETIONS, {**body, "guided_regex": "[a-z]{4,9}!"})
    texts = [choice["text"] for choice in reply["choices"]]
    assert all(re.fullmatch("[a-z]{4,9}!", text) for text in texts)
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("body", "told"),
    [({"guided_regex": "(("}, "regular expression"), ({"guided_grammar": "root ::= x"}, "EBNF"),
     ({"guided_json": {"type": "foo"}}, "unknown type"),
     ({"guided_json": {"uniqueItems": True}}, "uniqueItems"),
     ({"guided_json": "{"}, "not valid JSON"), ({"guided_regex": ""}, "guided_regex is empty")],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_grammar_is_a_400_and_nobody_else_notices(
    server: Server, body: dict[str, Any], told: str, stream: bool
) -> None:
    request = {"prompt": "x", "max_tokens": 5, "stream": stream, **body}
    status, text = refusal(server, COMPLETIONS, request)
    assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")
    assert told in text
    assert server.metric("asyncllm_kv_slots_used") == 0


def test_constrained_and_free_streams_share_the_steps(server: Server) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": f"Number {i}: ", "max_tokens": 12, "temperature": 0.8, "seed": i}
        for i in range(8)
    ]
    for body in bodies[::2]:
        body["guided_regex"] = "[a-z ]{9,60}[.]"

    async def one(session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
        parts = [c async for c in stream_text(session, server.url + COMPLETIONS, body)]
        return "".join(c["choices"][0]["text"] for c in parts if c["choices"])

    async def everything() -> list[str]:
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(one(session, body) for body in bodies))

    streamed = server.run(everything())
    for body, text in zip(bodies, streamed, strict=True):
        assert server.post(COMPLETIONS, body)["choices"][0]["text"] == text, "stream == whole"
        if "guided_regex" in body:
            assert re.fullmatch(r"[a-z ]{0,60}[.]?", text)


def test_an_aborted_one_leaves_nothing(server: Server) -> None:
    async def leave() -> None:
        body = {"prompt": "x", "max_tokens": 2000, "guided_regex": "[a-z]*", "ignore_eos": True}
        async with aiohttp.ClientSession() as session:
            async for _ in stream_text(session, server.url + COMPLETIONS, body):
                return

    server.run(leave())
    assert wait_until(lambda: server.metric("asyncllm_kv_slots_used") == 0, 20)


def test_a_frontend_of_another_process_and_constrained_output_off(
    demo_dir: Path, tmp_path: Path
) -> None:
    with Server(demo_dir, tmp_path / "two", "--httpserver_workers", "2") as two:
        for i in range(8):  # new connections: both processes get some
            reply = two.post(COMPLETIONS, {"prompt": "x", "guided_regex": f"v{i}[a-z]"})
            assert re.fullmatch(f"v{i}[a-z]", reply["choices"][0]["text"])
            assert refusal(two, COMPLETIONS, {"prompt": "x", "guided_regex": f"({i}"})[0] == 400
    with Server(demo_dir, tmp_path / "off", "--output_constraint_mode", "none") as off:
        status, text = refusal(off, COMPLETIONS, {"prompt": "x", "guided_regex": "a"})
        assert (status, "--output_constraint_mode" in text) == (400, True)
        assert off.post(COMPLETIONS, {"prompt": "x", "max_tokens": 2})["choices"]


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Berlin"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("strict", [False, True])
def test_calls_of_strict_tools_fit_even_where_the_model_begins_them_wrong(
    server: Server, strict: bool
) -> None:
    history = []
    for city in ("Oslo", "Rome", "Lima", "Bonn"):
        history.append({"role": "user", "content": f"Weather in {city}?"})
        history.append({"role": "assistant", "content": "Sure <tool_call>oops"})
    history.append({"role": "user", "content": "Weather in Cairo?"})
    function = {"name": "get_weather", "strict": strict, "parameters": WEATHER}
    tools = [{"type": "function", "function": function}]
    body = {"messages": history, "tools": tools, "temperature": 0, "max_tokens": 80}
    (choice,) = server.post(CHAT, body)["choices"]
    calls = choice["message"].get("tool_calls", [])
    assert len(calls) == strict, "it says oops unless it must not"
    for call in calls:
        jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER)
    assert choice["finish_reason"] == ("tool_calls" if strict else "stop")
