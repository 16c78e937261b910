"""LightLLM's native answers, byte by byte where a client looks at bytes."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.lightllm.reply import NativeReply
from asyncllm.api.openapi import document as openapi
from asyncllm.codec import i32
from asyncllm.core.request import FinishReason
from asyncllm.errors import RequestError
from asyncllm.records import Logprobs
from tests.api.harness import (
    BYTES_SERVED,
    answer,
    delta,
    end,
    floats,
    native_events,
    take,
)


def native(stream: bool = True, **parameters: Any) -> NativeReply:
    body = {"inputs": "hi", "parameters": parameters}
    return NativeReply(answer(lightllm.generate(body, BYTES_SERVED, stream=stream), [b"hi"]))


def test_native_stream_one_event_per_token() -> None:
    reply = native()
    out = take(reply, delta("ab", i32(list(b"ab")), ("a", "b"), floats(-0.5, -1)))
    out += reply.flush_held()
    out += take(reply, delta("", i32([0]), ("",), floats(-2)))
    out += end(reply)
    assert reply.closing() == b""
    first, second, last = native_events(out)
    assert out.startswith(b'data:{"token":{"id":97,"text":"a","logprob":-0.5,"special":false,')
    scored = {"97": {"logprob": -0.5, "rank": None, "decoded_token": "a"}}
    assert first == {
        "token": {"id": 97, "text": "a", "logprob": -0.5, "special": False,
                  "count_output_tokens": 1, "prompt_tokens": 2, "logprobs": scored},
        "generated_text": None, "finished": False, "finish_reason": None, "details": None,
        "input_usage": {"input_text_tokens": 2, "input_audio_tokens": 0, "input_image_tokens": 0},
    }  # fmt: skip
    assert (second["token"]["text"], second["finished"]) == ("b", False)
    assert (last["token"]["id"], last["token"]["special"]) == (0, True)
    assert (last["finished"], last["finish_reason"]) == (True, "stop")
    assert last["generated_text"] == "ab"


def test_native_end_that_comes_alone_has_no_token() -> None:
    reply = native()
    out = take(reply, delta("a", i32([97]), ("a",), floats(-1))) + reply.flush_held() + end(reply)
    token, last = native_events(out)
    assert not token["finished"]
    assert (last["token"]["id"], last["token"]["text"], last["finished"]) == (-1, "", True)
    assert last["token"]["count_output_tokens"] == 1
    assert (last["token"]["logprob"], last["token"]["logprobs"]) == (None, None)


@pytest.mark.parametrize("text", ['"', "\\", "\n", "\x00", "\u2028", "é", "😀"])
def test_native_events_are_json_whatever_the_text(text: str) -> None:
    reply = native()
    out = take(reply, delta(text, i32([255]), (text,), floats(-1e-7))) + end(reply)
    (event,) = native_events(out)
    assert (event["token"]["text"], event["generated_text"]) == (text, text)
    assert event["token"]["logprob"] == -1e-7
    assert event["token"]["logprobs"]["255"]["decoded_token"] == "bytes:\\xff"


def test_native_stream_brings_the_prompts_scores_once() -> None:
    reply = native(prompt_logprobs=0)
    scores = Logprobs(chosen=floats(-1))
    out = take(reply, delta("a", i32([97]), ("a",), floats(-1), prompt=scores)) + reply.flush_held()
    out += take(reply, delta("b", i32([98]), ("b",), floats(-1))) + end(reply)
    first, second = native_events(out)
    assert first["prompt_token_ids"] == list(b"hi")
    own = {"105": {"logprob": -1.0, "rank": None, "decoded_token": "i"}}
    assert first["prompt_logprobs"] == [None, own]
    assert "prompt_logprobs" not in second


def test_native_texts_join_to_the_whole_text() -> None:
    reply = native()
    snow = list("☃".encode())
    out = take(reply, delta("", i32(snow[:2]), ("", "\ufffd"), floats(-1, -1)))
    out += take(reply, delta("☃", i32(snow[2:]), ("☃",), floats(-1)))
    out += take(reply, delta("!"))  # text that a stop string's beginning held back
    out += end(reply)
    assert [e["token"]["text"] for e in native_events(out)] == ["", "", "☃!"]
    assert native_events(out)[-1]["generated_text"] == "☃!"


def test_native_whole_lists_for_more_choices() -> None:
    reply = native(stream=False, n=2, return_details=True, prompt_logprobs=1)
    scores = Logprobs(1, floats(-1), i32([ord("o")]), floats(-0.5))
    for i in range(2):
        take(
            reply,
            delta("a", i32([97]), ("a",), Logprobs(1, floats(-1), i32([98]), floats(-0.5)), scores),
            i,
        )
        end(reply, FinishReason.LENGTH, i)
    body = json.loads(reply.whole())
    assert body["generated_text"] == ["a", "a"]
    assert (body["count_output_tokens"], body["finish_reason"]) == ([1, 1], ["length"] * 2)
    assert body["prompt_tokens"] == 2
    token = {"id": 97, "text": "a", "logprob": -1.0, "cumlogprob": -1.0, "special": False,
             "count_output_tokens": 1, "prompt_tokens": 2, "prompt_cache_len": 0}  # fmt: skip
    assert body["tokens"] == [[token], [token]]
    assert body["logprobs"] == [[{"97": {"logprob": -1, "rank": None, "decoded_token": "a"}}]] * 2
    assert body["prompt_token_ids"] == list(b"hi")
    assert body["prompt_logprobs"] == [
        None,
        {
            "105": {"logprob": -1.0, "rank": None, "decoded_token": "i"},
            "111": {"logprob": -0.5, "rank": 1, "decoded_token": "o"},
        },
    ]


def test_native_details_join_to_the_text_and_sum_up() -> None:
    reply = native(stream=False, return_details=True)
    snow = list("☃".encode())
    take(reply, delta("a", i32([97]), ("a",), floats(-1)))
    take(reply, delta("☃", i32(snow), ("", "", "☃"), floats(-1, -2, -0.5)))
    end(reply)
    body = json.loads(reply.whole())
    assert [t["text"] for t in body["tokens"]] == ["a", "", "", "☃"]
    assert [t["cumlogprob"] for t in body["tokens"]] == [-1, -2, -4, -4.5]
    assert [t["count_output_tokens"] for t in body["tokens"]] == [1, 2, 3, 4]
    assert [list(m) for m in body["logprobs"]] == [["97"], *([str(i)] for i in snow)]
    plain = native(stream=False)
    take(plain, delta("a", i32([97]), ("a",), floats(-1)))
    end(plain)
    body = json.loads(plain.whole())
    assert "tokens" not in body
    assert body["logprobs"] == [{"97": {"logprob": -1, "rank": None, "decoded_token": "a"}}]


def test_native_answers_are_as_the_document_says() -> None:
    for n in (1, 2):
        reply = native(stream=False, n=n, return_details=True, prompt_logprobs=0)
        for i in range(n):
            take(
                reply,
                delta("a", i32([97]), ("a",), floats(-1), prompt=Logprobs(chosen=floats(-1))),
                i,
            )
            end(reply, FinishReason.LENGTH, i)
        schema = openapi.document(BYTES_SERVED, secured=False)["components"]["schemas"]["Native"]
        jsonschema.validate(json.loads(reply.whole()), schema)


def test_errors_in_streams() -> None:
    error = RequestError("no", param="p", code="c")
    data = (
        b'data:{"error":{"message":"no","type":"invalid_request_error","param":"p","code":"c"}}\n\n'
    )
    assert native().error(error) == data
