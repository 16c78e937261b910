"""OpenAI's SDK with strict response types against BASE_URL and MODEL; exits 1 if a check fails.

``_strict_response_validation`` makes the SDK refuse any answer and any event that its own types do
not describe, which it does not do by default. Only where the types of ``/v1/completions`` forbid
the null that OpenAI itself sends (``finish_reason`` of a chunk that is not the last, the
log-probability of a prompt's first token) the check goes without.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

from checks import run_all
from openai import APIStatusError, OpenAI

client, lenient = (
    OpenAI(
        base_url=os.environ["BASE_URL"],
        api_key="x",
        _strict_response_validation=strict,
        max_retries=0,
        timeout=180,
    )
    for strict in (True, False)
)
MODEL = os.environ["MODEL"]
HI = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["c", "f"]},
            },
            "required": ["city"],
        },
    },
}
OSLO = {"messages": [{"role": "user", "content": "Weather in Oslo?"}], "tools": [TOOL]}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}


def chat(**kw: Any) -> Any:
    return client.chat.completions.create(
        **{"model": MODEL, "messages": HI, "temperature": 0, "max_tokens": 4} | kw
    )


def complete(sdk: OpenAI = client, **kw: Any) -> Any:
    return sdk.completions.create(
        **{"model": MODEL, "prompt": "Hello", "temperature": 0, "max_tokens": 4} | kw
    )


def respond(**kw: Any) -> Any:
    return client.responses.create(**{"model": MODEL, "input": "Hi", "max_output_tokens": 16} | kw)


def ends(chunks: Any, count: int = 1) -> list[str]:
    """The finish reasons of a stream, exactly one for each of ``count`` choices."""
    found = {}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.finish_reason:
                assert choice.index not in found, "two ends of a choice"
                found[choice.index] = choice.finish_reason
    assert sorted(found) == list(range(count)), found
    return list(found.values())


def usage_last() -> Any:
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage
    assert not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    return chunks[-1].usage.total_tokens


def usage_always() -> Any:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c.usage.completion_tokens for c in chat(stream=True, stream_options=options)]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    return counts


def streamed_logprobs() -> Any:
    found = []
    for chunk in chat(stream=True, logprobs=True, top_logprobs=2):
        for choice in chunk.choices:
            found += choice.logprobs.content if choice.logprobs else []
    assert len(found) == 4
    assert all(len(token.top_logprobs) == 2 for token in found)
    return [token.token for token in found]


def forced_call(stream: bool, choice: Any) -> str:
    kw = OSLO | {"tool_choice": choice, "max_tokens": 128}
    if stream:
        name = text = ""
        for chunk in chat(stream=True, **kw):
            for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
                name += call.function.name or ""
                text += call.function.arguments or ""
    else:
        (found,) = chat(**kw).choices
        assert found.finish_reason == "tool_calls", found
        name, text = (
            getattr(found.message.tool_calls[0].function, x) for x in ("name", "arguments")
        )
    assert name == "get_weather", name
    assert isinstance(json.loads(text)["city"], str), text
    return text


def predicted() -> str:
    """The answer is the same; the usage says how much of the prediction was tried."""
    answer = chat(max_tokens=24)
    text = answer.choices[0].message.content
    again = chat(max_tokens=24, prediction={"type": "content", "content": text})
    assert again.choices[0].message.content == text, again
    details = again.usage.completion_tokens_details
    return f"{details.accepted_prediction_tokens} and {details.rejected_prediction_tokens}"


def custom_call() -> str:
    grammar = {"syntax": "regex", "definition": "[a-z]{2,5}"}
    custom = {"name": "shell", "format": {"type": "grammar", "grammar": grammar}}
    choice = {"type": "custom", "custom": {"name": "shell"}}
    asked = {"tools": [TOOL, {"type": "custom", "custom": custom}], "tool_choice": choice}
    (call,) = chat(**asked, max_tokens=64).choices[0].message.tool_calls
    assert (call.type, call.custom.name) == ("custom", "shell"), call
    text = call.custom.input
    assert re.fullmatch("[a-z]{2,5}", text), text
    return str(text)


def valid_json(text: str, keys: tuple[str, ...] = ()) -> str:
    assert all(key in json.loads(text) for key in keys), text
    return text


def refused(status: int, ask: Callable[..., Any] = chat, **kw: Any) -> str:
    found: Any = None
    try:
        ask(**kw)
    except APIStatusError as error:
        found = error
    assert found, "not refused"
    assert found.status_code == status, found
    assert found.body["message"], found.body
    return str(found.body["message"])


def response_events() -> str:
    events = [event.type for event in respond(stream=True)]
    assert events[0] == "response.created", events
    assert events[-1] in ("response.completed", "response.incomplete"), events
    return str(events[-1])


FLAT = [{"type": "function", **TOOL["function"]}]
NAMED = {"type": "function", "name": "get_weather"}


def response_call(choice: Any) -> Any:
    """A forced call; its result is told by both ways to go on."""
    asked = {"input": "Weather in Oslo?", "tools": FLAT, "tool_choice": choice}
    found = respond(**asked, max_output_tokens=128, parallel_tool_calls=False)
    (call,) = found.output
    assert (call.type, call.name, found.status) == ("function_call", "get_weather", "completed")
    assert isinstance(json.loads(call.arguments)["city"], str), call
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12"}
    respond(previous_response_id=found.id, input=[result], tools=FLAT)
    asked = {"role": "user", "content": "Weather in Oslo?"}
    respond(store=False, input=[asked, *found.output, result], tools=FLAT)
    return call.arguments


def response_call_events() -> str:
    events = list(
        respond(
            input="Weather in Oslo?",
            tools=FLAT,
            tool_choice="required",
            max_output_tokens=128,
            parallel_tool_calls=False,
            stream=True,
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    told = "".join(e.delta for e in events if e.type.endswith("arguments.delta"))
    (done,) = [e for e in events if e.type.endswith("arguments.done")]
    assert told == done.arguments == events[-1].response.output[0].arguments, told
    return told


def remembered() -> str:
    first = respond()
    second = respond(previous_response_id=first.id)
    assert client.responses.retrieve(second.id).id == second.id
    client.responses.delete(first.id)
    return str(second.output_text)


CHECKS: dict[str, Callable[[], Any]] = {
    "models": lambda: client.models.list().data[0].id,
    "model": lambda: client.models.retrieve(MODEL).id,
    "chat": lambda: chat().choices[0].message.content,
    "chat stream": lambda: ends(chat(stream=True)),
    "chat stream usage": usage_last,
    "chat stream usage in every chunk": usage_always,
    "chat logprobs": lambda: (
        chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content[0].top_logprobs
    ),
    "chat stream logprobs": streamed_logprobs,
    "chat n": lambda: [len(c.message.content) for c in chat(n=2, temperature=1, seed=1).choices],
    "chat stream n": lambda: ends(chat(n=2, temperature=1, seed=1, stream=True), 2),
    "chat stop": lambda: chat(stop=["!"], max_tokens=64).choices[0].finish_reason,
    "chat logit_bias": lambda: chat(logit_bias={"28": -100}).choices[0].message.content,
    "chat json_object": lambda: valid_json(
        chat(max_tokens=200, response_format={"type": "json_object"}).choices[0].message.content
    ),
    "chat json_schema": lambda: valid_json(
        chat(max_tokens=64, response_format=FORMAT).choices[0].message.content, ("ok",)
    ),
    "completion": lambda: complete().choices[0].text,
    "completion stream": lambda: ends(complete(lenient, stream=True)),
    "completion logprobs": lambda: complete(logprobs=2).choices[0].logprobs.tokens,
    "completion echo": lambda: (
        complete(lenient, echo=True, logprobs=1).choices[0].logprobs.token_logprobs
    ),
    "completion batch": lambda: len(complete(prompt=["A", "B"]).choices),
    "completion batch stream": lambda: ends(complete(lenient, prompt=["A", "B"], stream=True), 2),
    "tools auto": lambda: chat(**OSLO, max_tokens=64).choices[0].finish_reason,
    "tools auto stream": lambda: ends(chat(**OSLO, max_tokens=64, stream=True)),
    "tools none": lambda: chat(**OSLO, tool_choice="none").choices[0].message.content,
    "tools required": lambda: forced_call(False, "required"),
    "tools required stream": lambda: forced_call(True, "required"),
    "tools named": lambda: forced_call(
        False, {"type": "function", "function": {"name": "get_weather"}}
    ),
    "tools custom": custom_call,
    "chat prediction": predicted,
    "response": lambda: respond().output_text,
    "response stream": response_events,
    "response chain": remembered,
    "response tools required": lambda: response_call("required"),
    "response tools named": lambda: response_call(NAMED),
    "response tools stream": response_call_events,
    "response json_schema": lambda: valid_json(
        respond(
            max_output_tokens=64,
            text={"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
        ).output_text,
        ("ok",),
    ),
    "response logprobs": lambda: (
        respond(include=["message.output_text.logprobs"], top_logprobs=2)
        .output[0]
        .content[0]
        .logprobs[0]
    ),
    "refuses max_tokens": lambda: refused(400, max_tokens=-1),
    "refuses a custom tool in place of a function": lambda: refused(
        400, **OSLO, tool_choice={"type": "custom", "custom": {"name": "get_weather"}}
    ),
    "refuses n": lambda: refused(400, n=100000),
    "refuses what is too long": lambda: refused(
        400, messages=[{"role": "user", "content": "word " * 20000}]
    ),
    "refuses a model": lambda: refused(404, model="another"),
    "refuses a completion's logprobs": lambda: refused(400, complete, logprobs=-1),
}

run_all(CHECKS)
