"""Anthropic's SDK with strict types against a running server: ROOT_URL, MODEL. Exits 1 on a fault."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from anthropic import Anthropic, APIStatusError
from checks import run_all
from pydantic import create_model

MODEL = os.environ["MODEL"]
client = Anthropic(
    base_url=os.environ["ROOT_URL"],
    api_key="key",
    _strict_response_validation=True,
    max_retries=0,
    timeout=300,
)
OSLO = [{"role": "user", "content": "Weather in Oslo?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
CACHE = {"cache_control": {"type": "ephemeral"}}
TOOL = {"name": "get_weather", "description": "of a city", "input_schema": CITY} | CACHE
FORMAT = {
    "type": "json_schema",
    "schema": {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    },
}


def body(**kw: Any) -> dict[str, Any]:
    greedy = {"extra_body": {"temperature": 0}}  # the SDK has no parameter for it any more
    return {"model": MODEL, "messages": OSLO, "max_tokens": 128} | greedy | kw


def ask(**kw: Any) -> Any:
    return client.messages.create(**body(**kw))


def stream(**kw: Any) -> Any:
    """The message that the SDK puts together."""
    with client.messages.stream(**body(**kw)) as events:
        kinds = [event.type for event in events]
        assert kinds[0] == "message_start", kinds
        assert kinds[-1] == "message_stop", kinds
        assert kinds.count("content_block_start") == kinds.count("content_block_stop"), kinds
        return events.get_final_message()


def call(get: Callable[..., Any], **choice: Any) -> Any:
    message = get(tools=[TOOL], tool_choice=choice)
    assert message.stop_reason == "tool_use", message
    use = next(block for block in message.content if block.type == "tool_use")
    assert use.name == "get_weather", use
    assert isinstance(use.input["city"], str), use
    return use


def result() -> str:
    use = call(ask, type="any")
    told = {"type": "tool_result", "tool_use_id": use.id, "is_error": True}
    text = [{"type": "text", "text": "no sensor"} | CACHE]
    turns = [
        *OSLO,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [told | {"content": text}]},
    ]
    return str(ask(messages=turns, tools=[TOOL], max_tokens=8).content)


def counted() -> int:
    same = {"tools": [TOOL], "system": [{"type": "text", "text": "Be brief."} | CACHE]}
    count = client.messages.count_tokens(model=MODEL, messages=OSLO, **same).input_tokens
    usage = ask(**same, max_tokens=1).usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens, usage
    return int(count)


def agent() -> str:
    """What Claude Code and its like send."""
    message = client.beta.messages.create(
        **body(max_tokens=8),
        betas=["interleaved-thinking-2025-05-14"],
        system=[{"type": "text", "text": "You are an agent."} | CACHE],
        tools=[TOOL | {"name": f"tool_{i}"} for i in range(40)],
        metadata={"user_id": "user"},
        context_management={"edits": []},
        thinking={"type": "adaptive"},
    )
    return str(message.stop_reason)


def refused(status: int, **kw: Any) -> str:
    found: Any = None
    try:
        ask(**kw)
    except APIStatusError as error:
        found = error
    assert found, "not refused"
    assert found.status_code == status, found
    assert found.body["type"] == "error", found.body
    return str(found.body["error"]["message"])


CHECKS: dict[str, Callable[[], Any]] = {
    "message": lambda: ask(max_tokens=8).content[0].text,
    "stream": lambda: stream(max_tokens=8).stop_reason,
    "stop sequence": lambda: ask(stop_sequences=["e"]).stop_sequence,
    "tool": lambda: call(ask, type="tool", name="get_weather").input,
    "tool stream": lambda: call(stream, type="tool", name="get_weather").input,
    "any tool": lambda: call(ask, type="any").input,
    "any tool stream": lambda: call(stream, type="any", disable_parallel_tool_use=True).input,
    "tools auto": lambda: stream(tools=[TOOL | {"strict": True}], max_tokens=16).stop_reason,
    "tool result": result,
    "output format": lambda: ask(output_config={"format": FORMAT}).content[0].text,
    "parse": lambda: (
        client.messages.parse(
            **body(output_format=create_model("Ok", ok=(bool, ...)))
        ).parsed_output
    ),
    "thinking": lambda: (
        (
            ask(
                thinking={"type": "enabled", "budget_tokens": 1024},
                max_tokens=1100,
                stop_sequences=["e"],
            )
        ).stop_reason
    ),
    "count_tokens": counted,
    "agent": agent,
    "refuses a tool": lambda: refused(400, tools=[TOOL | {"name": "a b"}]),
    "refuses a model": lambda: refused(404, model="another"),
}

run_all(CHECKS)
