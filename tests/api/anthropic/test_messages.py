"""/v1/messages: bodies to requests, answers and events as Anthropic's clients read them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from asyncllm.api.anthropic import reply as anthropic_reply
from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.anthropic.reply import MessageReply
from asyncllm.api.common import errors
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.request import GenerationRequest
from asyncllm.api.parsing.output_parser import Dialect
from asyncllm.codec import i32
from asyncllm.core.request import FinishReason
from asyncllm.errors import ModelNotFound, RequestError
from asyncllm.records import Failure
from tests.api.harness import (
    CASES,
    DOC,
    SCHEMA,
    SERVED,
    Case,
    answer,
    delta,
    ending,
    rendered,
    typed_events,
)
from tests.api.harness import TOOLS as OFFERED
from tests.speed import quickest

HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"name": "weather", "description": "of a city", "input_schema": SCHEMA, "strict": None}]
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Ü"}}
THINK = {"type": "enabled", "budget_tokens": 1024}
FORMAT = {"type": "json_schema", "schema": {"type": "object"}}


def request(dialect: Dialect = SERVED.dialect, **body: Any) -> GenerationRequest:
    asked = {"messages": HI, "max_tokens": 5} | body
    return anthropic.messages(asked, replace(SERVED, dialect=dialect))


def result(key: str = "t1", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": key} | more


def text(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": t, "cache_control": {"type": "ephemeral"}} for t in texts]


def test_parameters() -> None:
    got = request(temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["a", "b"], stream=True,
                  metadata={"user_id": "x"}, unknown=1)  # fmt: skip
    params = got.params
    assert (params.max_new_tokens, params.temperature, params.top_p, params.top_k) == (
        5,
        0.5,
        0.9,
        7,
    )
    assert params.stop == ("a", "b")
    assert (got.stream, got.n, got.seeded, got.add_special_tokens) == (True, 1, False, False)
    assert request(top_k=0).params.top_k == -1
    assert request(temperature=0).params.temperature == 0.0


def test_conversation() -> None:
    turns = [
        {"role": "user", "content": text("a", "b")},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    got = rendered(request(messages=turns, system=text("be", "brief")))
    assert got["messages"] == [
        {"role": "system", "content": "be\nbrief"},
        {"role": "user", "content": "a\nb\nc"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    assert got["kwargs"] == {"add_generation_prompt": True}
    assert rendered(request(system="s"))["messages"][0] == {"role": "system", "content": "s"}


def test_an_assistant_turn_at_the_end_is_continued() -> None:
    got = rendered(request(messages=[*HI, {"role": "assistant", "content": "Well"}]))
    assert got["kwargs"] == {"add_generation_prompt": False, "continue_final_message": True}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
         "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "user", "content": [result(is_error=1)]}]},
         "messages[0].content[0].is_error"),
        ({"messages": [{"role": "assistant", "content": [{**USE, "input": "x"}]}]},
         "messages[0].content[0].input"),
        ({"messages": [*HI, {"role": "assistant", "content": [USE]}]}, "messages"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "f g", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools[1].name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
         "tool_choice.disable_parallel_tool_use"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "some"}}, "thinking.display"),
        ({"output_config": {"format": FORMAT}, "output_format": FORMAT}, "output_format"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
        ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"system": 5}, "system"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stream": "yes"}, "stream"),
    ],
)  # fmt: skip
def test_bad_values(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        request(**body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        {"mcp_servers": [{}]},
        {"container": "c"},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": [USE]}]},
        {"messages": [{"role": "assistant", "content": [result()]}]},
        {"messages": [{"role": "user", "content": [result(content=[{"type": "image"}])]}]},
        {"system": [{"type": "thinking", "thinking": "x"}]},
    ],
)
def test_what_is_not_available(body: dict[str, Any]) -> None:
    with pytest.raises(NotAvailable):
        request(**body)


# -- tools and thinking ------------------------------------------------------------------------

LISTS = Dialect(calls="hermes", lists_tools=True, reasoning="think")
HISTORY = [
    {"role": "user", "content": "warm?"},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "redacted_thinking", "data": "secret"},
            {"type": "text", "text": "Let me see."},
            USE,
            {**USE, "id": "t2"},
        ],
    },
    {
        "role": "user",
        "content": [
            result(content="12"),
            result("t2", content=text("no", "sun"), is_error=True),
            {"type": "text", "text": "so?", "cache_control": {"type": "ephemeral"}},
        ],
    },
]


def test_a_turn_of_hidden_reasoning_alone_is_an_empty_one() -> None:
    hidden = {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}
    empty = {"role": "assistant", "content": []}
    for turns in ([hidden], [hidden, {"role": "user", "content": "a"}]):
        told = [rendered(request(messages=[m, *turns[1:]])) for m in (hidden, empty)]
        assert told[0] == told[1]


def test_tools_in_the_prompt() -> None:
    got = rendered(request(LISTS, tools=TOOLS, messages=HISTORY))
    assert got["tools"] == OFFERED
    _, blocks, one, two, more = got["messages"]
    calls = [
        {
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Ü"}},
            "id": key,
        }
        for key in ("t1", "t2")
    ]
    assert blocks == {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "hm",
        "tool_calls": calls,
    }
    assert one == {"role": "tool", "content": "12", "tool_call_id": "t1"}
    assert two == {"role": "tool", "content": "Error: no\nsun", "tool_call_id": "t2"}
    assert more == {"role": "user", "content": "so?"}
    unlisted = rendered(request(Dialect(), tools=TOOLS, system="be brief", messages=HISTORY))
    assert unlisted["tools"] is None
    system, _, blocks, results, more = unlisted["messages"]
    assert system["content"].startswith("be brief\n\n")
    assert json.dumps(OFFERED[0]["function"]) in system["listed"]
    assert blocks["content"].startswith('Let me see.\n<tool_call>\n{"name": "weather"')
    assert results["content"].count("<tool_response>") == 2
    assert more == {"role": "user", "content": "so?"}


@pytest.mark.parametrize(
    ("choice", "kind", "parallel"),
    [
        ({"type": "auto"}, "", True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "", False),
        ({"type": "any"}, "array", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "object", False),
        ({"type": "tool", "name": "weather"}, "object", True),
    ],
)
def test_tool_choice(choice: dict[str, Any], kind: str, parallel: bool) -> None:
    got = request(LISTS, tools=TOOLS, tool_choice=choice)
    assert got.output_options is not None
    assert (got.output_options.calls, got.output_options.parallel) == (
        "json" if kind else "hermes",
        parallel,
    )
    form = got.params.grammar
    assert ("" if form is None else json.loads(form[1])["type"]) == kind
    none = request(LISTS, tools=TOOLS, tool_choice={"type": "none"})
    assert none.output_options is not None
    assert (rendered(none)["tools"], none.output_options.calls) == (None, "")


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("all", [1, 1, 1]),
        ({"type": "all"}, [1, 1, 1]),
        ({"type": "thinking_turns", "value": 2}, [0, 1, 1]),
        ({"type": "thinking_turns", "value": 9}, [1, 1, 1]),
        (None, [0, 0, 1]),
    ],
)
def test_thinking_of_earlier_turns_is_cleared(keep: Any, kept: list[int]) -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    said = {"role": "assistant", "content": [thought, *text("ok")]}
    turns = [*HI, said, *HI, said, *HI, said, *HI]
    edit = {"type": "clear_thinking_20251015", "keep": keep}
    got = rendered(request(messages=turns, context_management={"edits": [edit]}))["messages"]
    assert ["reasoning_content" in turn for turn in got[1::2]] == kept
    assert [turn["content"] for turn in got] == ["hi", "ok"] * 3 + ["hi"]
    assert len(rendered(request(messages=turns, context_management={}))["messages"]) == 7


def test_edits_are_applied_at_once() -> None:
    edits = [{"type": "clear_thinking_20251015"}] * 4000
    turns = [*HI, {"role": "assistant", "content": "a"}] * 2000 + HI
    management = {"edits": edits}
    took = quickest(lambda: request(messages=turns, context_management=management), 2, 3)
    assert took < 2, "it took 7 s"


def test_thinking() -> None:
    got = request(LISTS, thinking=THINK)
    assert got.params.max_thinking_tokens == 1024
    assert rendered(got)["kwargs"]["enable_thinking"] is True
    off = request(LISTS, thinking={"type": "disabled"})
    assert rendered(off)["kwargs"]["enable_thinking"] is False
    free = request(LISTS, thinking={"type": "adaptive", "display": "omitted"})
    assert rendered(free)["kwargs"]["enable_thinking"] is True
    assert free.params.max_thinking_tokens is None
    assert free.output_options is not None
    assert free.output_options.hidden
    assert "enable_thinking" not in rendered(request(LISTS))["kwargs"]


def test_output_format() -> None:
    for body in ({"output_format": FORMAT}, {"output_config": {"format": FORMAT, "effort": "low"}}):
        got = request(LISTS, thinking={"type": "adaptive"}, **body)
        assert got.params.grammar == ("schema", json.dumps(FORMAT["schema"]))
        assert rendered(got)["kwargs"]["enable_thinking"] is True
    assert rendered(got)["kwargs"]["reasoning_effort"] == "low"


def test_what_claude_code_sends() -> None:
    short = {"type": "ephemeral"}
    request(
        LISTS,
        system=[{"type": "text", "text": "You are ...", "cache_control": short | {"ttl": "1h"}}],
        tools=[{**TOOLS[0], "name": f"t{i}", "cache_control": short} for i in range(60)],
        metadata={"user_id": "user_1"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        thinking={"type": "enabled", "budget_tokens": 31999},
        stream=True,
    )


def test_what_claude_code_tells_billing_is_no_prompt() -> None:
    """It is another for each request, so that nothing behind it would be in the prefix cache."""
    header = "x-anthropic-billing-header: cc_version=2.1.197.595; cc_entrypoint=sdk-cli;"
    prompts = [
        rendered(request(system=system))["messages"][0]
        for system in (
            text(header, "Be brief."),
            text(f"{header}\nBe brief."),
            f"{header}\nBe brief.",
            "Be brief.",
        )
    ]
    assert prompts == [{"role": "system", "content": "Be brief."}] * 4
    assert rendered(request(system=text(header)))["messages"] == HI
    later = text("Be brief.", header)
    assert header in rendered(request(system=later))["messages"][0]["content"]


def test_names() -> None:
    request(model="org/m")
    with pytest.raises(ModelNotFound):
        request(model="claude")
    with pytest.raises(ModelNotFound):
        anthropic.count({"messages": HI, "model": "claude"}, SERVED)


def test_counting_sees_the_same_prompt() -> None:
    for body in ({"system": "s"}, {"tools": TOOLS, "thinking": THINK}, {"output_format": FORMAT}):
        whole = {"messages": HI} | body
        served = replace(SERVED, dialect=LISTS)
        assert anthropic.count(whole, served) == request(LISTS, **whole).prompts[0].chat


# -- answers -----------------------------------------------------------------------------------


def reply(reason: FinishReason = FinishReason.STOP, stop: str = "", **body: Any) -> MessageReply:
    made = MessageReply(answer(request(**body), [b"hello"]))
    (choice,) = made.answer.choices
    choice.reason, choice.stop = reason, stop
    return made


def test_stream() -> None:
    made = reply(FinishReason.LENGTH)
    (choice,) = made.answer.choices
    raw = made.opening()
    choice.reason = None
    for piece in ('a"\n', "", "é"):
        news = delta(piece, i32([0]))
        choice.take(news)
        raw += made.piece(choice, news.text, len(news.ids)) + made.flush_held()
    choice.reason, choice.cached_len = FinishReason.LENGTH, 2
    raw += made.end(choice) + made.closing()
    start, *middle, last, stop = typed_events(raw)
    assert start == {
        "type": "message_start",
        "message": {
            "id": "id-1",
            "type": "message",
            "role": "assistant",
            "model": 'm"1',
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "input_tokens": 5,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 0,
            },
        },
    }
    assert middle == [
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": ""},
        },
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": 'a"\n'},
        },
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "é"}},
        {"type": "content_block_stop", "index": 0},
    ]
    assert last == {
        "type": "message_delta",
        "delta": {"stop_reason": "max_tokens", "stop_sequence": None},
        "usage": {
            "input_tokens": 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": 3,
        },
    }
    assert stop == {"type": "message_stop"}


def test_a_stream_without_text_has_no_block() -> None:
    made = reply()
    raw = made.opening() + made.end(made.answer.choices[0]) + made.closing()
    assert [e["type"] for e in typed_events(raw)] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize(
    ("reason", "stop", "expected"),
    [
        (FinishReason.STOP, "", ("end_turn", None)),
        (FinishReason.LENGTH, "", ("max_tokens", None)),
        (FinishReason.ABORT, "", ("max_tokens", None)),  # not end_turn: it is not whole
        (FinishReason.STOP, "###", ("stop_sequence", "###")),
    ],
)
def test_whole(reason: FinishReason, stop: str, expected: tuple[str, str | None]) -> None:
    made = reply(reason, stop)
    assert json.loads(made.whole())["content"] == []
    made.answer.choices[0].take(delta("hey", i32([0])))
    got = json.loads(made.whole())
    assert got["content"] == [{"type": "text", "text": "hey"}]
    assert (got["stop_reason"], got["stop_sequence"]) == expected
    assert (got["usage"]["input_tokens"], got["usage"]["output_tokens"]) == (5, 1)
    assert (got["type"], got["role"]) == ("message", "assistant")


def test_errors() -> None:
    for status, kind in (
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ):
        error = errors.from_failure(Failure("m", status=status))
        expected = {"type": "error", "error": {"type": kind, "message": "m"}}
        assert anthropic_reply.error_body(error) == expected
    assert typed_events(reply().error(error)) == [expected]


# -- answers in blocks -------------------------------------------------------------------------


def parted(case: Case, pieces: list[str], **body: Any) -> tuple[MessageReply, bytes]:
    """A reply that has taken an answer, one token for each piece, and what a stream says."""
    calls, thoughts, *_, reason = case
    dialect = Dialect(calls=calls or "hermes", lists_tools=True, reasoning=thoughts)
    asked = ({"tools": TOOLS} if calls else {}) | body
    made = MessageReply(answer(request(dialect, **asked), [b"hello"]))
    made.answer.accept(0, b"", "")
    (choice,) = made.answer.choices
    raw = made.opening()
    for piece in pieces:
        news = delta(piece, i32([65]), (piece,))
        choice.take(news)
        raw += (
            made.piece(choice, news.text, len(news.ids)) if made.answer.generation.stream else b""
        )
    choice.end(ending(reason), 1, "")
    return made, raw


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answers_are_as_the_document_says(case: Case) -> None:
    message, _ = parted(case, [case[2]])
    jsonschema.validate(json.loads(message.whole()), DOC["components"]["schemas"]["Message"])


def blocks(raw: bytes) -> list[dict[str, Any]]:
    """Blocks made of their deltas, as clients make them."""
    found: list[dict[str, Any]] = []
    is_open, pieces = False, ""
    for event in typed_events(raw):
        match event["type"]:
            case "content_block_start":
                assert (event["index"], is_open) == (len(found), False)
                found.append(event["content_block"])
                is_open = True
                pieces = ""
            case "content_block_delta":
                assert (event["index"], is_open) == (len(found) - 1, True)
                match event["delta"]:
                    case {"type": "text_delta", "text": text}:
                        found[-1]["text"] += text
                    case {"type": "thinking_delta", "thinking": text}:
                        found[-1]["thinking"] += text
                    case {"type": "signature_delta", "signature": text}:
                        found[-1]["signature"] = text
                    case {"type": "input_json_delta", "partial_json": text}:
                        assert found[-1]["input"] == {}
                        pieces += text
                    case delta:
                        raise AssertionError(delta)
            case "content_block_stop":
                assert (event["index"], is_open) == (len(found) - 1, True)
                is_open = False
                if found[-1]["type"] == "tool_use":
                    found[-1]["input"] = pieces
    assert not is_open
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks(case: Case) -> None:
    _, _, whole_text, content, reasoning, calls, reason = case
    made, raw = parted(case, list(whole_text), stream=True)
    raw += made.end(made.answer.choices[0]) + made.closing()
    told = typed_events(raw)[-2]
    streamed = blocks(raw)
    assert [b["thinking"] for b in streamed if b["type"] == "thinking"] == [reasoning] * bool(
        reasoning
    )
    assert "".join(b["text"] for b in streamed if b["type"] == "text") == (content or "")
    uses = [b for b in streamed if b["type"] == "tool_use"]
    assert [(b["name"], b["input"]) for b in uses] == calls
    expected = {"tool_calls": "tool_use", "stop": "end_turn", "length": "max_tokens"}[reason]
    assert told["delta"]["stop_reason"] == expected
    assert len({b["id"] for b in uses}) == len(uses)
    made, _ = parted(case, [whole_text])
    whole = json.loads(made.whole())
    assert whole["stop_reason"] == expected
    assert [b["type"] for b in whole["content"]] == [
        b["type"] for b in streamed if b["type"] != "tool_use" or reason == "tool_calls"
    ]
    for block, other in zip(whole["content"], streamed, strict=False):
        if block["type"] == "tool_use":
            assert (block["name"], block["input"]) == (other["name"], json.loads(other["input"]))
        else:
            assert block == other
    if reasoning:
        assert told["usage"]["output_tokens_details"]["thinking_tokens"] >= len(reasoning)
        hidden, _ = parted(case, [whole_text], thinking={"type": "adaptive", "display": "omitted"})
        types = [b["type"] for b in json.loads(hidden.whole())["content"]]
        assert types == [b["type"] for b in whole["content"] if b["type"] != "thinking"]
