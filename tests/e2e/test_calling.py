"""Tool calls and reasoning as clients see them: scripted answers over a real socket."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from asyncllm.api.parsing.output_parser import Dialect
from asyncllm.api.parsing.reasoning import prompt_state
from asyncllm.codec import i32
from asyncllm.core.request import FinishReason
from asyncllm.messages import Accepted, Tokenize
from tests.api.harness import ARGS, CALL, SCHEMA, THINK, TOOLS, WEATHER, called, joined
from tests.e2e.fake_server import Server
from tests.e2e.test_api import CHAT, HI, live

# format of calls, of reasoning, the end of the prompt; the answer; content, reasoning, calls
Script = tuple[str, str, str, str, str | None, str | None, list[tuple[str, str]]]
SCRIPTS: dict[str, Script] = {
    "hermes": ("hermes", "", "", f"ok <tool_call>{CALL}</tool_call>", "ok", None, [WEATHER]),
    "llama3": ("llama3", "", "", f"{CALL}; {CALL}", None, None, [WEATHER] * 2),
    "mistral": ("mistral", "", "", f"[TOOL_CALLS][{CALL}]", None, None, [WEATHER]),
    "glm47": ("glm47", "glm45", "<think>", "hm</think><tool_call>weather<arg_key>city</arg_key>"
              "<arg_value>Ü</arg_value></tool_call>", None, "hm", [("weather", '{"city": "Ü"}')]),
    "qwen3": ("qwen25", "qwen3", "assistant\n", f"{THINK}<tool_call>{CALL}</tool_call>", None,
              "well <tool_call>", [WEATHER]),
    "harmony": ("gpt_oss", "gpt-oss", "<|start|>assistant", "<|channel|>analysis<|message|>hm<|end|>"
                f"<|start|>assistant<|channel|>commentary to=functions.weather<|message|>{ARGS}",
                None, "hm", [WEATHER]),
}  # fmt: skip


def script(server: Server, head: str, text: str, reason: FinishReason = FinishReason.STOP) -> None:
    """Answer every request with ``text``, a byte at a time."""

    def answer(msg: Tokenize) -> None:
        begins = ""
        if msg.reasoning:
            begins = prompt_state(msg.reasoning, head + msg.continued, msg.continued)
        server.model.front.tell(Accepted(msg.rids[0], i32([1, 1]), begins))
        params, raw = msg.params, text.encode()
        for rid in msg.rids:
            held = b""
            for i, byte in enumerate(raw):
                held += bytes([byte])
                try:
                    shown, held = held.decode(), b""
                except UnicodeDecodeError:
                    shown = ""
                server.model.delta(rid, [byte], params, text=shown, first=i)
            server.model.finish(rid, 2, len(raw), reason)

    server.model.answer = answer  # type: ignore[method-assign]


async def formats(server: Server, case: Script) -> None:
    calls, thoughts, head, text, content, reasoning, found = case
    dialect = Dialect(calls=calls, lists_tools=True, reasoning=thoughts)
    server.front.served = replace(server.front.served, dialect=dialect)
    script(server, head, text)
    asked: dict[str, Any] = {"messages": HI, "tools": TOOLS, "n": 2}
    status, body = await server.post(CHAT, asked)
    assert status == 200
    for choice in body["choices"]:
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == content
        assert choice["message"].get("reasoning_content") == reasoning
        assert called(choice["message"]["tool_calls"]) == found
    ids = [call["id"] for choice in body["choices"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == len(ids) == 2 * len(found)
    streamed = await server.chunks(CHAT, asked | {"stream_options": {"include_usage": True}})
    usage = streamed.pop()["usage"]
    assert usage == body["usage"]
    assert usage["completion_tokens"] == 2 * len(text.encode())
    if thoughts:
        assert usage["completion_tokens_details"]["reasoning_tokens"] >= 2 * len(reasoning or "")
    for index in range(2):
        own = [c for c in streamed if c["choices"][0]["index"] == index]
        assert own[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        message = joined(own)
        assert message["content"] == (content or "")
        assert message["reasoning"] == (reasoning or "")
        assert called(message["tool_calls"]) == found
        assert own[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert server.model.asked[0].shown == server.model.asked[1].shown != ()


@pytest.mark.parametrize("case", SCRIPTS.values(), ids=SCRIPTS)
def test_formats(case: Script) -> None:
    live()(formats)(case=case)


@live()
async def test_a_call_that_is_cut(server: Server) -> None:
    script(server, "", '<tool_call>{"name": "weather", "arguments": {"city', FinishReason.LENGTH)
    asked = {"messages": HI, "tools": TOOLS, "logprobs": True}
    _, body = await server.post(CHAT, asked)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length"
    assert called(choice["message"]["tool_calls"]) == [("weather", '{"city')]
    assert len(choice["logprobs"]["content"]) == body["usage"]["completion_tokens"]
    chunks = await server.chunks(CHAT, asked)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    scored = [c["choices"][0]["logprobs"] for c in chunks]
    told = [entry for each in scored if each is not None for entry in each["content"]]
    assert told == choice["logprobs"]["content"]


@live()
async def test_without_tools_marks_are_text(server: Server) -> None:
    text = f"<think>a</think><tool_call>{CALL}</tool_call>"
    script(server, "", text)
    _, body = await server.post(CHAT, {"messages": HI, "tools": TOOLS, "tool_choice": "none"})
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert "completion_tokens_details" not in body["usage"]
    assert server.model.asked[0].shown == ()


@live()
async def test_a_turn_with_calls_comes_back_to_the_template(server: Server) -> None:
    script(server, "", f"<tool_call>{CALL}</tool_call>")
    _, first = await server.post(CHAT, {"messages": HI, "tools": TOOLS})
    message = first["choices"][0]["message"]
    result = {"role": "tool", "content": "12", "tool_call_id": message["tool_calls"][0]["id"]}
    again = {"messages": [*HI, message, result], "tools": TOOLS}
    for lists_tools in (False, True):
        dialect = Dialect(lists_tools=lists_tools)
        server.front.served = replace(server.front.served, dialect=dialect)
        status, _ = await server.post(CHAT, again)
        assert status == 200
    assert server.model.asked[-1].chat is not None
    _, assistant, answered = json.loads(server.model.asked[-1].chat)["messages"]
    assert assistant["tool_calls"][0]["function"] == json.loads(CALL)
    assert answered == result
    assert server.model.asked[-2].chat is not None
    roles = [m["role"] for m in json.loads(server.model.asked[-2].chat)["messages"]]
    assert roles == ["system", "user", "assistant", "user"]


MESSAGE_TOOLS = [{"name": "weather", "input_schema": SCHEMA}]
FLAT_TOOLS = [{"type": "function", "name": "weather", "parameters": SCHEMA}]


@live()
async def test_tools_of_a_template_without_them_in_every_protocol(server: Server) -> None:
    server.front.served = replace(server.front.served, dialect=Dialect())
    script(server, "", f"ok <tool_call>{CALL}</tool_call>")
    _, chat = await server.post(CHAT, {"messages": HI, "tools": TOOLS})
    _, message = await server.post(
        "/v1/messages", {"messages": HI, "tools": MESSAGE_TOOLS, "max_tokens": 9}
    )
    _, response = await server.post("/v1/responses", {"input": "hi", "tools": FLAT_TOOLS})
    assert called(chat["choices"][0]["message"]["tool_calls"]) == [WEATHER]
    text, use = message["content"]
    assert (text["text"], use["name"], use["input"]) == ("ok", "weather", json.loads(ARGS))
    assert message["stop_reason"] == "tool_use"
    said, call = response["output"]
    assert (said["content"][0]["text"], call["name"], call["arguments"]) == ("ok", *WEATHER)
    assert len(server.model.asked) == 3
    for asked in server.model.asked:
        assert asked.chat is not None
        prompt = json.loads(asked.chat)
        assert prompt["tools"] is None
        assert prompt["messages"][0]["role"] == "system"
        assert '{"name": "weather"' in prompt["messages"][0]["listed"]
        assert asked.shown == ("<tool_call>", "</tool_call>")
    # the results go back as text too
    script(server, "", "warm")
    await server.post("/v1/responses", {
        "previous_response_id": response["id"],
        "input": [{"type": "function_call_output", "call_id": call["call_id"], "output": "12"}],
    })  # fmt: skip
    turns = json.loads(server.model.asked[-1].chat or b"")["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[1]["content"].startswith("ok\n<tool_call>\n")
    assert turns[2]["content"] == "<tool_response>\n12\n</tool_response>"
