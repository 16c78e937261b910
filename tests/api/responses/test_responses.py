"""/v1/responses: bodies, the memory of earlier responses, answers and typed events."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from asyncllm.api.common import errors
from asyncllm.api.common.content_blocks import ContentBlock
from asyncllm.api.common.errors import NotAvailable, UnknownPath
from asyncllm.api.parsing.events import Content
from asyncllm.api.parsing.output_parser import Dialect
from asyncllm.api.responses import request as responses
from asyncllm.api.responses.reply import ResponseReply, answered
from asyncllm.api.responses.store import ResponseStore, StoredResponse
from asyncllm.codec import i32
from asyncllm.core.request import FinishReason
from asyncllm.errors import ModelNotFound, RequestError
from asyncllm.records import Logprobs
from tests.api.harness import (
    CASES,
    DOC,
    SCHEMA,
    SERVED,
    Case,
    answer,
    delta,
    floats,
    rendered,
    typed_events,
)
from tests.api.harness import TOOLS as OFFERED
from tests.api.responses.harness import TOOLS, ask, parted

CALLED = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Ü"}'}


def test_what_is_counted_is_the_prompt() -> None:
    store = ResponseStore()
    store.put("resp_1", StoredResponse([{"role": "user", "content": "hi"}], b"{}"))
    body = {"input": "more", "instructions": "Be brief.", "previous_response_id": "resp_1"}
    body |= {"tools": TOOLS, "tool_choice": "required"}
    chat = responses.count(body | {"max_output_tokens": 4}, SERVED, store)
    assert chat == ask(store, **body).generation.prompts[0].chat
    assert [m["content"] for m in json.loads(chat)["messages"][1:]] == ["hi", "more"]


def test_parameters() -> None:
    got = ask(temperature=0.5, top_p=0.9, max_output_tokens=7, stream=True, metadata={"a": "b"},
              text={"format": {"type": "text"}}, user="u", unknown=1)  # fmt: skip
    params = got.generation.params
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.5, 0.9, 7)
    assert got.generation.stream
    assert (got.echo["metadata"], got.echo["store"]) == ({"a": "b"}, True)
    assert rendered(got.generation)["messages"] == [{"role": "user", "content": "hi"}]
    effort = rendered(ask(reasoning={"effort": "low"}).generation)["kwargs"]["reasoning_effort"]
    assert effort == "low"


def test_items() -> None:
    items = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"role": "user", "content": "c"},
    ]  # fmt: skip
    got = ask(input=items, instructions="be kind")
    assert rendered(got.generation)["messages"] == [
        {"role": "system", "content": "be kind\nbe brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert got.messages[0] == {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": 5}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{**CALLED, "arguments": 5}]}, "input[0].arguments"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "f"}]}, "input[0].input"),
        ({"input": [{"type": "compaction"}]}, "input[0].encrypted_content"),
        ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools[0].tools"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]},
            "tools[0].tools[0].name",
        ),
        (
            {"tools": [{"type": "custom", "name": "f", "format": {"type": "grammar"}}]},
            "tools[0].format.syntax",
        ),
        ({"input": [{**CALLED, "call_id": None}]}, "input[0].call_id"),
        ({"input": [CALLED]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{"type": "reasoning", "content": [{}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools[1].name"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS}, "tool_choice.mode"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 21, "include": [responses.LOGPROBS]}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"store": "yes"}, "store"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_bad_values(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(**body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "telepathy"}]},
        {"tools": [*TOOLS, {"type": "web_search"}], "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "file_search"}},
        {"background": True},
        {"truncation": "auto"},
        {"tools": TOOLS, "include": ["message.output_text.logprobs"]},
        {"input": [{"type": "item_reference", "id": "x"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
    ],
)
def test_what_is_not_available(body: dict[str, Any]) -> None:
    with pytest.raises(NotAvailable):
        ask(**body)


def test_neutral_values_pass() -> None:
    ask(tools=[], tool_choice="auto", background=False, truncation="disabled", top_logprobs=0,
        include=["reasoning.encrypted_content"], text={"verbosity": "medium"})  # fmt: skip
    with pytest.raises(ModelNotFound):
        ask(model="gpt")


LISTS = Dialect(calls="hermes", lists_tools=True, reasoning="think")
ITEMS = [
    {"role": "user", "content": "warm?"},
    {"type": "reasoning", "id": "rs_1", "summary": [],
     "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
    CALLED,
    {**CALLED, "call_id": "c2"},
    {"type": "function_call_output", "call_id": "c1", "output": "12"},
    {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "13"}]},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
]  # fmt: skip


def test_items_of_tools_and_reasoning() -> None:
    got = rendered(ask(input=ITEMS, tools=TOOLS, dialect=LISTS).generation)
    assert got["tools"] == OFFERED
    function = {"name": "weather", "arguments": {"city": "Ü"}}
    calls = [{"type": "function", "function": function, "id": key} for key in ("c1", "c2")]
    assert got["messages"] == [
        {"role": "user", "content": "warm?"},
        {"role": "assistant", "content": "ok", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "12", "tool_call_id": "c1"},
        {"role": "tool", "content": "13", "tool_call_id": "c2"},
        {"role": "assistant", "content": "", "reasoning_content": "so"},
    ]
    unlisted = rendered(ask(input=ITEMS[:-1], tools=TOOLS, instructions="be brief").generation)
    assert unlisted["tools"] is None
    system, _, messages, results = unlisted["messages"]
    assert system["content"].startswith("be brief\n\n")
    assert json.dumps(OFFERED[0]["function"]) in system["listed"]
    assert messages["content"].startswith('ok\n<tool_call>\n{"name": "weather"')
    assert results["content"].count("<tool_response>") == 2


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({}, ""),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto",
                          "tools": [{"type": "function", "name": "weather"}]}}, ""),
        ({"tool_choice": "required"}, "array"),
        ({"tool_choice": "required", "parallel_tool_calls": False}, "object"),
        ({"tool_choice": {"type": "function", "name": "weather"}}, "object"),
    ],
)  # fmt: skip
def test_tool_choice(body: dict[str, Any], kind: str) -> None:
    other = {"type": "function", "name": "other", "parameters": None}
    got = ask(tools=[*TOOLS, other], dialect=LISTS, **body)
    assert got.generation.output_options is not None
    assert got.generation.output_options.calls == ("json" if kind else "hermes")
    form = got.generation.params.grammar
    assert ("" if form is None else json.loads(form[1]).get("type", "object")) == kind
    names = [tool["function"]["name"] for tool in rendered(got.generation)["tools"]]
    allowed = isinstance(body.get("tool_choice"), dict) and not kind
    assert names == (["weather"] if allowed else ["weather", "other"])
    assert got.echo["tool_choice"] == body.get("tool_choice", "auto")
    assert [tool["name"] for tool in got.echo["tools"]] == ["weather", "other"]


def test_output_formats() -> None:
    for form, expected in (
        ({"type": "json_object"}, ("json", "")),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA}, ("schema", json.dumps(SCHEMA))),
    ):
        got = ask(text={"format": form}, dialect=LISTS)
        assert got.generation.params.grammar == expected
        assert got.echo["text"] == {"format": form}


# -- memory ------------------------------------------------------------------------------------


def turn(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_a_conversation_goes_on_without_its_instructions() -> None:
    store, messages = ResponseStore(), [ContentBlock(0, Content, pieces=["O", "NE"])]
    store.put("r1", answered(ask(input="one", instructions="shout"), messages, b"{}"))
    got = ask(store, input="two", previous_response_id="r1", instructions="whisper")
    assert rendered(got.generation)["messages"] == [
        {"role": "system", "content": "whisper"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ONE"},
        {"role": "user", "content": "two"},
    ]
    assert len(store.messages("r1")) == 2


def test_the_least_recently_used_is_forgotten() -> None:
    store = ResponseStore(most=2)
    for key in ("a", "b"):
        store.put(key, StoredResponse(turn(key), key.encode()))
    store.messages("a")
    store.put("c", StoredResponse(turn("c"), b"c"))
    assert (store.body("a"), store.body("c")) == (b"a", b"c")
    with pytest.raises(RequestError) as caught:
        store.messages("b")
    assert caught.value.code == "previous_response_not_found"
    store.delete("a")
    for forget in (store.body, store.delete):
        with pytest.raises(UnknownPath):
            forget("a")
    store.delete("c")
    assert (len(store), store.num_bytes) == (0, 0)


def test_memory_is_bounded_in_bytes() -> None:
    store = ResponseStore(most_bytes=10_000)
    for i in range(20):
        store.put(str(i), StoredResponse(turn("x" * 500), b"y" * 500))
        assert store.num_bytes <= 10_000
    assert 5 < len(store) < 10
    store.put("huge", StoredResponse(turn("x" * 20_000), b""))
    assert len(store) == 0


# -- answers -----------------------------------------------------------------------------------


def reply(
    memory: ResponseStore, reason: FinishReason = FinishReason.STOP, **body: Any
) -> ResponseReply:
    asked = ask(memory, **body)
    made = ResponseReply(answer(asked.generation, [b"hello"]), asked, memory)
    made.answer.choices[0].reason = reason
    return made


def test_an_empty_answer_is_an_empty_message() -> None:
    made = reply(ResponseStore())
    (item,) = json.loads(made.whole())["output"]
    got = typed_events(made.end(made.answer.choices[0]) + made.closing())
    assert got[-1]["response"]["output"] == [item]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")


def test_log_probabilities() -> None:
    for include, best in ([responses.LOGPROBS], 0), ([responses.LOGPROBS], 1), ([], 0):
        made = reply(ResponseStore(), stream=True, include=include, top_logprobs=best)
        assert made.answer.generation.params.logprobs == (best if include else -1)
        (choice,) = made.answer.choices
        raw = b""
        for text in "", "a", "b":
            scores = Logprobs(best, floats(-0.5), i32([98] * best), floats(*[-1] * best))
            news = delta(text, i32([97]), (text,), scores)
            choice.take(news)
            raw += made.piece(choice, news.text, len(news.ids))
        got = typed_events(raw + made.end(choice) + made.closing())
        one = {"token": "a", "logprob": -0.5, "bytes": [97]}
        one["top_logprobs"] = [{"token": "b", "logprob": -1.0, "bytes": [98]}] * best
        assert [e["logprobs"] for e in got if "delta" in e] == (
            [[one] * 2, [one]] if include else [[], []]
        )
        (item,) = got[-1]["response"]["output"]
        assert item["content"][0]["logprobs"] == ([one] * 3 if include else [])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answers_are_as_the_document_says(case: Case) -> None:
    response, _ = parted(case, [case[2]], ResponseStore())
    jsonschema.validate(json.loads(response.whole()), DOC["components"]["schemas"]["Response"])


DELTAS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_items_in_answers(case: Case) -> None:
    _, _, text, content, reasoning, calls, reason = case
    store = ResponseStore()
    made, raw = parted(case, list(text), store, stream=True)
    got = typed_events(raw + made.end(made.answer.choices[0]) + made.closing())
    assert [e["sequence_number"] for e in got] == list(range(len(got)))
    response = got[-1]["response"]
    assert response["status"] == ("incomplete" if reason == "length" else "completed")
    for index, item in enumerate(response["output"]):
        own = [e for e in got if e.get("output_index") == index]
        first, *middle, last = own
        assert (first["type"], last["type"]) == (
            "response.output_item.added",
            "response.output_item.done",
        )
        assert (first["item"]["id"], first["item"]["status"]) == (item["id"], "in_progress")
        assert last["item"] == item
        name = DELTAS[item["type"]]
        told = "".join(e["delta"] for e in middle if e["type"] == f"{name}.delta")
        (done,) = [e for e in middle if e["type"] == f"{name}.done"]
        whole = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert told == done.get("text", done.get("arguments")) == whole
        assert {e["item_id"] for e in middle} == {item["id"]}
    made, _ = parted(case, [text], store)
    items = json.loads(made.whole())["output"]
    for item, other in zip(items, response["output"], strict=True):
        assert {**item, "call_id": ""} == {**other, "call_id": ""}
    found = [(i["name"], i["arguments"]) for i in items if i["type"] == "function_call"]
    assert found == calls
    assert "".join(i["content"][0]["text"] for i in items if i["type"] == "message") == (
        content or ""
    )
    (turn,) = store.messages("id-1")[1:] or [{}]
    assert turn.get("reasoning_content") == reasoning
    kept = [] if reason == "length" else [json.loads(arguments) for _, arguments in calls]
    assert [c["function"]["arguments"] for c in turn.get("tool_calls", [])] == kept
    keys = [i["call_id"] for i in response["output"] if i["type"] == "function_call"]
    assert len(set(keys)) == len(calls)


@pytest.mark.parametrize(
    ("reason", "status", "why"),
    [
        (FinishReason.STOP, "completed", None),
        (FinishReason.LENGTH, "incomplete", {"reason": "max_output_tokens"}),
        (FinishReason.ABORT, "incomplete", {"reason": "abort"}),
    ],
)
def test_stream(reason: FinishReason, status: str, why: dict[str, str] | None) -> None:
    store = ResponseStore()
    made = reply(store, reason, stream=True)
    (choice,) = made.answer.choices
    raw = made.opening()
    for piece in ('a"\n', "", "é"):
        news = delta(piece, i32([0]))
        choice.take(news)
        raw += made.piece(choice, news.text, len(news.ids)) + made.flush_held()
    choice.cached_len = 2
    raw += made.end(choice) + made.closing()
    got = typed_events(raw)
    assert [e["sequence_number"] for e in got] == list(range(len(got)))
    assert [e["type"].removeprefix("response.") for e in got] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.delta", "output_text.done", "content_part.done", "output_item.done", status,
    ]  # fmt: skip
    assert [e["delta"] for e in got if "delta" in e] == ['a"\n', "é"]
    assert got[6]["text"] == 'a"\né'
    assert got[0]["response"]["output"] == []
    last = got[-1]["response"]
    assert last["output"] == [got[8]["item"]]
    assert last["output"][0]["content"][0]["text"] == 'a"\né'
    assert (last["status"], last["output"][0]["status"]) == (status, status)
    assert last["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    }
    assert last["incomplete_details"] == why
    assert json.loads(store.body("id-1")) == last
    assert store.messages("id-1")[-1] == {"role": "assistant", "content": 'a"\né'}


def test_whole_is_stored_only_if_it_may_be() -> None:
    for keep in (True, False):
        store = ResponseStore()
        made = reply(store, store=keep, instructions="i", metadata={"k": "v"})
        got = json.loads(made.whole())
        made.keep()
        assert (got["instructions"], got["metadata"], got["store"]) == ("i", {"k": "v"}, keep)
        assert len(store) == keep


def test_a_failure_ends_the_stream() -> None:
    made = reply(ResponseStore())
    (event,) = typed_events(made.error(errors.ServerFault("broken")))
    assert event["type"] == "response.failed"
    assert event["response"]["status"] == "failed"
    assert event["response"]["error"] == {"code": "server_error", "message": "broken"}
