"""/v1/responses: bodies, the memory of earlier responses, answers and typed events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asyncllm.api import errors, responses
from asyncllm.api.errors import NotAvailable, UnknownPath
from asyncllm.api.responses import Asked, Store, Stored
from asyncllm.api.responses_reply import ResponseReply
from asyncllm.core.request import Reason
from asyncllm.errors import ModelNotFound, RequestError
from tests.api.test_anthropic import chat, events
from tests.api.test_replies import News, answer
from tests.api.test_requests import SERVED


def ask(memory: Store | None = None, **body: Any) -> Asked:
    return responses.read({"input": "hi"} | body, SERVED, memory or Store())


def test_parameters() -> None:
    got = ask(temperature=0.5, top_p=0.9, max_output_tokens=7, stream=True, metadata={"a": "b"},
              text={"format": {"type": "text"}}, user="u", unknown=1)  # fmt: skip
    params = got.generation.params
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.5, 0.9, 7)
    assert got.generation.stream
    assert (got.echo["metadata"], got.echo["store"]) == ({"a": "b"}, True)
    assert chat(got.generation)["messages"] == [{"role": "user", "content": "hi"}]
    effort = chat(ask(reasoning={"effort": "low"}).generation)["kwargs"]["reasoning_effort"]
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
    assert chat(got.generation)["messages"] == [
        {"role": "system", "content": "be kind\nbe brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert got.turns[0] == {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": 5}]}, "input[0].type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"store": "yes"}, "store"),
        ({"metadata": {"a": 1}}, 'metadata["a"]'),
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
        {"tools": [{"type": "function", "name": "f"}]},
        {"tool_choice": "required"},
        {"text": {"format": {"type": "json_object"}}},
        {"text": {"verbosity": "low"}},
        {"background": True},
        {"truncation": "auto"},
        {"top_logprobs": 1},
        {"include": ["message.output_text.logprobs"]},
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
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


# -- memory ------------------------------------------------------------------------------------


def turn(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_a_conversation_goes_on_without_its_instructions() -> None:
    store = Store()
    store.put("r1", responses.answered(ask(input="one", instructions="shout"), "ONE", b"{}"))
    got = ask(store, input="two", previous_response_id="r1", instructions="whisper")
    assert chat(got.generation)["messages"] == [
        {"role": "system", "content": "whisper"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ONE"},
        {"role": "user", "content": "two"},
    ]
    assert len(store.turns("r1")) == 2


def test_the_least_recently_used_is_forgotten() -> None:
    store = Store(most=2)
    for key in ("a", "b"):
        store.put(key, Stored(turn(key), key.encode()))
    store.turns("a")
    store.put("c", Stored(turn("c"), b"c"))
    assert (store.body("a"), store.body("c")) == (b"a", b"c")
    with pytest.raises(RequestError) as caught:
        store.turns("b")
    assert caught.value.code == "previous_response_not_found"
    store.delete("a")
    for forget in (store.body, store.delete):
        with pytest.raises(UnknownPath):
            forget("a")
    store.delete("c")
    assert (len(store), store.num_bytes) == (0, 0)


def test_memory_is_bounded_in_bytes() -> None:
    store = Store(most_bytes=10_000)
    for i in range(20):
        store.put(str(i), Stored(turn("x" * 500), b"y" * 500))
        assert store.num_bytes <= 10_000
    assert 5 < len(store) < 10
    store.put("huge", Stored(turn("x" * 20_000), b""))
    assert len(store) == 0


# -- answers -----------------------------------------------------------------------------------


def reply(memory: Store, reason: Reason = Reason.STOP, **body: Any) -> ResponseReply:
    asked = ask(memory, **body)
    made = ResponseReply(answer(asked.generation, [b"hello"]), asked, memory)
    made.answer.choices[0].reason = reason
    return made


@pytest.mark.parametrize(
    ("reason", "status"), [(Reason.STOP, "completed"), (Reason.LENGTH, "incomplete")]
)
def test_stream(reason: Reason, status: str) -> None:
    store = Store()
    made = reply(store, reason, stream=True)
    (choice,) = made.answer.choices
    raw = made.opening()
    for piece in ('a"\n', "", "é"):
        news = News(piece, b"\0\0\0\0")
        choice.take(news)
        raw += made.piece(choice, news) + made.settle()
    choice.cached_len = 2
    raw += made.end(choice) + made.closing()
    got = events(raw)
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
    details = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert last["incomplete_details"] == details
    assert json.loads(store.body("id-1")) == last
    assert store.turns("id-1")[-1] == {"role": "assistant", "content": 'a"\né'}


def test_whole_is_stored_only_if_it_may_be() -> None:
    for keep in (True, False):
        store = Store()
        made = reply(store, store=keep, instructions="i", metadata={"k": "v"})
        got = json.loads(made.whole())
        assert (got["instructions"], got["metadata"], got["store"]) == ("i", {"k": "v"}, keep)
        assert len(store) == keep


def test_a_failure_ends_the_stream() -> None:
    made = reply(Store())
    (event,) = events(made.error(errors.ServerFault("broken")))
    assert event["type"] == "response.failed"
    assert event["response"]["status"] == "failed"
    assert event["response"]["error"] == {"code": "server_error", "message": "broken"}
