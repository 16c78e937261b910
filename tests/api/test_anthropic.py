"""/v1/messages: bodies to requests, answers and events as Anthropic's clients read them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asyncllm.api import anthropic, anthropic_reply, errors
from asyncllm.api.anthropic_reply import MessageReply
from asyncllm.api.errors import NotAvailable
from asyncllm.api.generation import Generation
from asyncllm.core.request import Reason
from asyncllm.errors import ModelNotFound, RequestError
from tests.api.test_replies import News, answer
from tests.api.test_requests import SERVED

HI = [{"role": "user", "content": "hi"}]


def request(**body: Any) -> Generation:
    return anthropic.messages({"messages": HI, "max_tokens": 5} | body, SERVED)


def chat(generation: Generation) -> dict[str, Any]:
    (prompt,) = generation.prompts
    assert prompt.chat is not None
    whole: dict[str, Any] = json.loads(prompt.chat)
    return whole


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
    got = chat(request(messages=turns, system=text("be", "brief")))
    assert got["messages"] == [
        {"role": "system", "content": "be\nbrief"},
        {"role": "user", "content": "a\nb\nc"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    assert got["kwargs"] == {"add_generation_prompt": True}
    assert chat(request(system="s"))["messages"][0] == {"role": "system", "content": "s"}


def test_an_assistant_turn_at_the_end_is_continued() -> None:
    got = chat(request(messages=[*HI, {"role": "assistant", "content": "Well"}]))
    assert got["kwargs"] == {"add_generation_prompt": False, "continue_final_message": True}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"system": 5}, "system"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_bad_values(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        request(**body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("tools", [{"name": "f", "input_schema": {}}], []),
        ("tool_choice", {"type": "auto"}, {"type": "none"}),
        ("thinking", {"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}),
        ("mcp_servers", [{}], []),
        ("output_config", {"format": {"type": "json_schema"}}, {"effort": "high"}),
    ],
)
def test_what_is_not_available(field: str, value: Any, neutral: Any) -> None:
    with pytest.raises(NotAvailable):
        request(**{field: value})
    request(**{field: neutral})
    image = {"type": "image", "source": {}}
    with pytest.raises(NotAvailable):
        request(messages=[{"role": "user", "content": [image]}])


def test_names() -> None:
    request(model="org/m")
    with pytest.raises(ModelNotFound):
        request(model="claude")
    with pytest.raises(ModelNotFound):
        anthropic.count({"messages": HI, "model": "claude"}, SERVED)


def test_counting_sees_the_same_prompt() -> None:
    body = {"messages": HI, "system": "s"}
    assert anthropic.count(body, SERVED) == request(**body).prompts[0].chat


# -- answers -----------------------------------------------------------------------------------


def reply(reason: Reason = Reason.STOP, stop: str = "", **body: Any) -> MessageReply:
    made = MessageReply(answer(request(**body), [b"hello"]))
    (choice,) = made.answer.choices
    choice.reason, choice.stop = reason, stop
    return made


def events(raw: bytes) -> list[dict[str, Any]]:
    """Decoded events; the event line must name the type."""
    *parts, rest = raw.decode().split("\n\n")
    assert rest == ""
    found = []
    for part in parts:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def test_stream() -> None:
    made = reply(Reason.LENGTH)
    (choice,) = made.answer.choices
    raw = made.opening()
    choice.reason = None
    for piece in ('a"\n', "", "é"):
        news = News(piece, b"\0\0\0\0")
        choice.take(news)
        raw += made.piece(choice, news) + made.settle()
    choice.reason, choice.cached_len = Reason.LENGTH, 2
    raw += made.end(choice) + made.closing()
    start, *middle, delta, stop = events(raw)
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
    assert delta == {
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
    assert [e["type"] for e in events(raw)] == ["message_start", "message_delta", "message_stop"]


@pytest.mark.parametrize(
    ("reason", "stop", "expected"),
    [
        (Reason.STOP, "", ("end_turn", None)),
        (Reason.LENGTH, "", ("max_tokens", None)),
        (Reason.STOP, "###", ("stop_sequence", "###")),
    ],
)
def test_whole(reason: Reason, stop: str, expected: tuple[str, str | None]) -> None:
    made = reply(reason, stop)
    assert json.loads(made.whole())["content"] == []
    made.answer.choices[0].take(News("hey", b"\0\0\0\0"))
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
        error = errors.from_status(status, "m", "")
        expected = {"type": "error", "error": {"type": kind, "message": "m"}}
        assert anthropic_reply.error_body(error) == expected
    assert events(reply().error(error)) == [expected]
