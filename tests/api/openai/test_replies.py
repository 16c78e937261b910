"""OpenAI's answers, byte by byte where a client looks at bytes."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from asyncllm.api.openai import request as openai
from asyncllm.api.openai.chat_reply import ChatReply
from asyncllm.api.openai.completion_reply import CompletionReply
from asyncllm.codec import i32
from asyncllm.core.request import FinishReason
from asyncllm.errors import RequestError
from asyncllm.records import Logprobs
from tests.api.harness import (
    BYTES_SERVED,
    VOCAB,
    answer,
    delta,
    end,
    events,
    floats,
    spell,
    take,
)


def completion(prompts: list[bytes] = [b"hi"], **body: Any) -> CompletionReply:  # noqa: B006
    texts = [p.decode() for p in prompts]
    return CompletionReply(
        answer(openai.completion({"prompt": texts} | body, BYTES_SERVED), prompts)
    )


def chat(**body: Any) -> ChatReply:
    messages = [{"role": "user", "content": "hi"}]
    return ChatReply(answer(openai.chat({"messages": messages} | body, BYTES_SERVED), [b"hi"]))


def test_chat_stream_bytes() -> None:
    reply = chat(stream=True)
    head = (
        'data: {"id":"id-1","object":"chat.completion.chunk","created":7,"model":"m\\"1",'
        '"choices":[{"index":0,"delta":'
    )
    tail = ',"logprobs":null,"finish_reason":%s}]}\n\n'
    assert reply.opening().decode() == head + '{"role":"assistant","content":""}' + tail % "null"
    got = take(reply, delta('é"\n\\☃', i32([1, 2]))).decode()
    assert got == head + '{"content":"é\\"\\n\\\\☃"}' + tail % "null"
    assert take(reply, delta("", i32([3]))) == b""
    assert end(reply).decode() == head + "{}" + tail % '"stop"'
    assert reply.closing() == b"data: [DONE]\n\n"


def test_a_lone_surrogate_does_not_break_the_stream() -> None:
    assert b'"content":"?"' in take(chat(stream=True), delta("\ud800", i32([1])))


def test_usage_chunk_only_when_asked() -> None:
    reply = chat(stream=True, stream_options={"include_usage": True})
    chunks = events(reply.opening() + take(reply, delta("a", i32([1]))) + end(reply))
    assert [c["usage"] for c in chunks] == [None] * 3
    reply.answer.choices[0].cached_len = 1
    last, done = reply.closing().split(b"\n\n")[:2]
    assert done == b"data: [DONE]"
    final = json.loads(last[6:])
    assert final["choices"] == []
    assert final["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 1,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


@pytest.mark.parametrize("make", [chat, completion])
def test_continuous_usage(make: Callable[..., Any]) -> None:
    reply = make(stream=True, stream_options={"continuous_usage_stats": True})
    chunks = events(take(reply, delta("a", i32([1]))) + take(reply, delta("b", i32([2, 3]))))
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 3]


def test_completion_stream_bytes() -> None:
    reply = completion(stream=True)
    head = (
        'data: {"id":"id-1","object":"text_completion","created":7,"model":"m\\"1",'
        '"choices":[{"index":0,"text":'
    )
    assert reply.opening() == b""
    got = take(reply, delta("x", i32([1]))).decode()
    assert got == head + '"x","logprobs":null,"finish_reason":null}]}\n\n'
    got = end(reply, FinishReason.LENGTH).decode()
    assert got == head + '"","logprobs":null,"finish_reason":"length"}]}\n\n'


def test_echo_goes_first_once_per_choice() -> None:
    reply = completion([b"hi", b"yo"], stream=True, echo=True)
    early = events(take(reply, delta("x", i32([1])), 1))  # before prompt 0 was accepted
    assert [c["choices"][0]["text"] for c in early] == ["yo", "x"]
    assert [c["choices"][0]["text"] for c in events(reply.opening())] == ["hi"]
    assert len(events(take(reply, delta("z", i32([1]))))) == 1


def test_completion_logprobs_of_prompt_and_text() -> None:
    reply = completion([b"hi!"], echo=True, logprobs=1)
    scores = Logprobs(1, floats(-1, -2), i32([ord("i"), ord("?")]), floats(-1, -0.5))
    # two columns came for one that was asked for: another row of the step wanted two
    wide = Logprobs(2, floats(-0.5, float("-inf")), i32(list(b"aAcb")), floats(-0.5, -3, -0.25, -4))
    news = delta("ab", i32(list(b"ab")), ("a", "b"), wide, scores)
    take(reply, news)
    end(reply)
    (choice,) = json.loads(reply.whole())["choices"]
    assert choice["text"] == "hi!ab"
    assert choice["logprobs"] == {
        "tokens": ["h", "i", "!", "a", "b"],
        "token_logprobs": [None, -1.0, -2.0, -0.5, -9999.0],
        "top_logprobs": [
            None,
            {"i": -1.0},
            {"?": -0.5, "!": -2.0},
            {"a": -0.5},
            {"c": -0.25, "b": -9999.0},
        ],
        "text_offset": [0, 1, 2, 3, 4],
    }


def test_streamed_echo_waits_for_the_prompts_scores() -> None:
    reply = completion(stream=True, echo=True, logprobs=0)
    assert reply.opening() == b""
    scores = Logprobs(chosen=floats(-1))
    out = events(take(reply, delta("a", i32([97]), ("a",), floats(-0.5), scores)))
    assert [c["choices"][0]["logprobs"]["token_logprobs"] for c in out] == [[None, -1.0], [-0.5]]
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in out] == [[0, 1], [2]]


def test_echo_of_a_truncated_prompt_is_what_was_used() -> None:
    reply = completion([b"hello"], echo=True)
    reply.answer.prompts = [array("i")]
    reply.answer.accept(0, i32(list(b"lo")), "", 3)
    take(reply, delta("!", i32([33]), ("!",)))
    end(reply)
    body = json.loads(reply.whole())
    assert body["choices"][0]["text"] == "lo!"
    assert body["usage"]["prompt_tokens"] == 2


def test_echo_of_nothing_more() -> None:
    """max_tokens 0: the prompt and its scores, no token."""
    reply = completion(stream=True, echo=True, logprobs=0, max_tokens=0)
    out = take(reply, delta("", prompt=Logprobs(chosen=floats(-1)))) + end(
        reply, FinishReason.LENGTH
    )
    texts = [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in events(out)]
    assert texts == [("hi", None), ("", "length")]


def test_bytes_of_unfinished_characters() -> None:
    snow = list("☃".encode())
    reply = chat(logprobs=True)
    take(reply, delta("", i32(snow[:1]), ("",), floats(-1)))
    take(reply, delta("☃", i32(snow[1:]), ("", "☃"), floats(-1, -1)))
    end(reply)
    (choice,) = json.loads(reply.whole())["choices"]
    content = choice["logprobs"]["content"]
    assert choice["message"] == {"role": "assistant", "content": "☃", "refusal": None}
    assert [c["token"] for c in content] == ["bytes:\\xe2", "bytes:\\x98", "bytes:\\x83"]
    assert [c["bytes"] for c in content] == [[0xE2], [0x98], [0x83]]
    assert all(c["top_logprobs"] == [] for c in content)


def test_token_ids_of_completions() -> None:
    whole = completion([b"hi", b"yo"], return_token_ids=True)
    for index in (0, 1):
        take(whole, delta("ab", i32([97, 98]), ("a", "b")), index)
        end(whole, index=index)
    choices = json.loads(whole.whole())["choices"]
    assert [c["prompt_token_ids"] for c in choices] == [list(b"hi"), list(b"yo")]
    assert [c["token_ids"] for c in choices] == [[97, 98], [97, 98]]

    reply = completion(stream=True, return_token_ids=True)
    news = (delta("", i32([97]), ("",)), delta("ab", i32([98]), ("b",)))
    chunks = [c["choices"][0] for each in news for c in events(take(reply, each))]
    assert [(c["text"], c["token_ids"], c["prompt_token_ids"]) for c in chunks] == [
        ("", [97], list(b"hi")),
        ("ab", [98], None),
    ]


def test_token_ids_of_chats() -> None:
    whole = chat(return_token_ids=True)
    take(whole, delta("ab", i32([97, 98]), ("a", "b")))
    end(whole)
    body = json.loads(whole.whole())
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == (list(b"hi"), [97, 98])

    reply = chat(stream=True, return_token_ids=True, logprobs=True)
    (role,) = events(reply.opening())
    assert role["prompt_token_ids"] == list(b"hi")
    (chunk,) = events(take(reply, delta("a", i32([97]), ("a",), floats(-1))))
    assert chunk["choices"][0]["token_ids"] == [97]
    assert [c["token"] for c in chunk["choices"][0]["logprobs"]["content"]] == ["a"]


def test_tokens_may_be_named_by_their_ids() -> None:
    wide = Logprobs(1, floats(-0.5), i32([98]), floats(-0.25))
    reply = completion(logprobs=1, return_tokens_as_token_ids=True)
    take(reply, delta("a", i32([97]), ("a",), wide))
    end(reply)
    (choice,) = json.loads(reply.whole())["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:97"]
    assert choice["logprobs"]["top_logprobs"] == [{"token_id:98": -0.25, "token_id:97": -0.5}]
    assert choice["logprobs"]["text_offset"] == [0]
    other = chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
    take(other, delta("a", i32([97]), ("a",), wide))
    end(other)
    (choice,) = json.loads(other.whole())["choices"]
    (entry,) = choice["logprobs"]["content"]
    assert (entry["token"], entry["top_logprobs"][0]["token"]) == ("token_id:97", "token_id:98")


def test_text_offsets_count_characters() -> None:
    reply = completion(logprobs=0)
    ids = list("é☃a".encode())
    take(reply, delta("é☃a", i32(ids), tuple(spell(ids)), floats(*[-1.0] * len(ids))))
    end(reply)
    (choice,) = json.loads(reply.whole())["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 2]


def test_alternatives_with_the_same_text_are_all_told() -> None:
    """The text is the chosen token's, or the best one's; the others are told by their ids."""
    reply = completion(logprobs=5)
    reply.answer.vocab = replace(VOCAB, piece=lambda t: b"x" if t < 5 else b"y" if t < 8 else b"")
    top = [2, 1, 6, 9, 7], [1, 6, 7, 8, 9]
    values = floats(-1, -2, -3, -4, -5, -1, -2, -3, -4, -5)
    scores = Logprobs(5, floats(-1, -9), i32([*top[0], *top[1]]), values)
    take(reply, delta("xy", i32([2, 5]), ("x", "y"), scores))
    end(reply)
    (choice,) = json.loads(reply.whole())["choices"]
    assert choice["logprobs"]["top_logprobs"] == [
        {"x": -1, "token_id:1": -2, "y": -3, "": -4, "token_id:7": -5},
        {"x": -1, "token_id:6": -2, "token_id:7": -3, "": -4, "token_id:9": -5, "y": -9},
    ]


def test_usage_counts_a_prompt_once_for_its_choices() -> None:
    reply = completion([b"hi", b"there"], n=2)
    for i in range(4):
        take(reply, delta("x", i32([1])), i)
        reply.answer.choices[i].cached_len = i
        end(reply, index=i)
    body = json.loads(reply.whole())
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_errors_in_streams() -> None:
    error = RequestError("no", param="p", code="c")
    data = b'data: {"error":{"message":"no","type":"invalid_request_error","param":"p","code":"c"}}\n\n'
    assert chat(stream=True).error(error) == data
