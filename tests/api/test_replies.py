"""Answers in each protocol's words, byte by byte where a client looks at bytes."""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from asyncllm.api import errors, lightllm, openai, openapi, sse
from asyncllm.api.answer import Answer, Choice, Vocab
from asyncllm.api.generation import Generation, Served
from asyncllm.api.lightllm_reply import NativeReply
from asyncllm.api.openai_reply import ChatReply, CompletionReply
from asyncllm.codec import i32
from asyncllm.core.request import Reason
from asyncllm.errors import RequestError
from asyncllm.messages import Delta
from asyncllm.records import Failure, Logprobs

SERVED = Served(
    name='m"1', listed=('m"1',), accepted=frozenset(), max_len=64, vocab_size=256, created=0
)
VOCAB = Vocab(
    piece=lambda t: bytes([t]),
    decode=lambda ids: bytes(list(ids)).decode("utf-8", "replace"),
    spell=lambda ids: spell(ids),
    special=frozenset({0}),
)


def spell(ids: Sequence[int]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(bytes([i])) for i in ids]


def delta(
    text: str,
    ids: array[int] | None = None,
    pieces: tuple[str, ...] = (),
    logprobs: array[float] | Logprobs | None = None,
    prompt: Logprobs | None = None,
) -> Delta:
    """New tokens; ``logprobs`` may be those of the chosen ones alone."""
    if isinstance(logprobs, array):
        logprobs = Logprobs(chosen=logprobs)
    return Delta(1, text, i32([]) if ids is None else ids, pieces, logprobs, prompt)


def floats(*values: float) -> array[float]:
    return array("f", values)


def answer(generation: Generation, prompts: list[bytes]) -> Answer:
    n = generation.n
    wants = generation.params.logprobs, generation.params.prompt_logprobs
    choices = [Choice(index=i, prompt_idx=i // n, wants=wants) for i in range(n * len(prompts))]
    ids = [array("i", list(p)) for p in prompts]
    return Answer(generation, "id-1", 7, SERVED.name, VOCAB, choices, ids)


def completion(prompts: list[bytes] = [b"hi"], **body: Any) -> CompletionReply:  # noqa: B006
    texts = [p.decode() for p in prompts]
    return CompletionReply(answer(openai.completion({"prompt": texts} | body, SERVED), prompts))


def chat(**body: Any) -> ChatReply:
    messages = [{"role": "user", "content": "hi"}]
    return ChatReply(answer(openai.chat({"messages": messages} | body, SERVED), [b"hi"]))


def native(stream: bool = True, **parameters: Any) -> NativeReply:
    body = {"inputs": "hi", "parameters": parameters}
    return NativeReply(answer(lightllm.generate(body, SERVED, stream=stream), [b"hi"]))


def take(reply: Any, news: Delta, index: int = 0) -> bytes:
    choice = reply.answer.choices[index]
    choice.take(news)
    out: bytes = reply.piece(choice, news) if reply.answer.generation.stream else b""
    return out


def end(reply: Any, reason: Reason = Reason.STOP, index: int = 0) -> bytes:
    choice = reply.answer.choices[index]
    choice.reason = reason
    out: bytes = reply.end(choice) if reply.answer.generation.stream else b""
    return out


def events(data: bytes) -> list[Any]:
    *parts, rest = data.split(b"\n\n")
    assert rest == b""
    return [json.loads(part.removeprefix(b"data: ")) for part in parts]


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
    got = end(reply, Reason.LENGTH).decode()
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
    out = take(reply, delta("", prompt=Logprobs(chosen=floats(-1)))) + end(reply, Reason.LENGTH)
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


# -- LightLLM ----------------------------------------------------------------------------------


def parsed(data: bytes) -> list[Any]:
    *parts, rest = data.split(b"\n\n")
    assert rest == b""
    assert all(p.startswith(b"data:{") for p in parts)
    return [json.loads(p[5:]) for p in parts]


def test_native_stream_one_event_per_token() -> None:
    reply = native()
    out = take(reply, delta("ab", i32(list(b"ab")), ("a", "b"), floats(-0.5, -1)))
    out += reply.settle()
    out += take(reply, delta("", i32([0]), ("",), floats(-2)))
    out += end(reply)
    assert reply.closing() == b""
    first, second, last = parsed(out)
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
    out = take(reply, delta("a", i32([97]), ("a",), floats(-1))) + reply.settle() + end(reply)
    token, last = parsed(out)
    assert not token["finished"]
    assert (last["token"]["id"], last["token"]["text"], last["finished"]) == (-1, "", True)
    assert last["token"]["count_output_tokens"] == 1
    assert (last["token"]["logprob"], last["token"]["logprobs"]) == (None, None)


@pytest.mark.parametrize("text", ['"', "\\", "\n", "\x00", "\u2028", "é", "😀"])
def test_native_events_are_json_whatever_the_text(text: str) -> None:
    reply = native()
    out = take(reply, delta(text, i32([255]), (text,), floats(-1e-7))) + end(reply)
    (event,) = parsed(out)
    assert (event["token"]["text"], event["generated_text"]) == (text, text)
    assert event["token"]["logprob"] == -1e-7
    assert event["token"]["logprobs"]["255"]["decoded_token"] == "bytes:\\xff"


def test_native_stream_brings_the_prompts_scores_once() -> None:
    reply = native(prompt_logprobs=0)
    scores = Logprobs(chosen=floats(-1))
    out = take(reply, delta("a", i32([97]), ("a",), floats(-1), prompt=scores)) + reply.settle()
    out += take(reply, delta("b", i32([98]), ("b",), floats(-1))) + end(reply)
    first, second = parsed(out)
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
    assert [e["token"]["text"] for e in parsed(out)] == ["", "", "☃!"]
    assert parsed(out)[-1]["generated_text"] == "☃!"


def test_native_whole_lists_for_more_choices() -> None:
    reply = native(stream=False, n=2, return_details=True, prompt_logprobs=1)
    scores = Logprobs(1, floats(-1), i32([ord("o")]), floats(-0.5))
    for i in range(2):
        take(
            reply,
            delta("a", i32([97]), ("a",), Logprobs(1, floats(-1), i32([98]), floats(-0.5)), scores),
            i,
        )
        end(reply, Reason.LENGTH, i)
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
            end(reply, Reason.LENGTH, i)
        schema = openapi.document(SERVED, secured=False)["components"]["schemas"]["Native"]
        jsonschema.validate(json.loads(reply.whole()), schema)


# -- errors ------------------------------------------------------------------------------------


def test_errors_in_streams() -> None:
    error = RequestError("no", param="p", code="c")
    data = b' {"error":{"message":"no","type":"invalid_request_error","param":"p","code":"c"}}\n\n'
    assert chat(stream=True).error(error) == b"data:" + data
    assert native().error(error) == b"data:" + data[1:]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "context_length_exceeded", (400, "invalid_request_error", "context_length_exceeded")),
        (400, "", (400, "invalid_request_error", "invalid_value")),
        (429, "", (429, "rate_limit_error", "rate_limit_exceeded")),
        (500, "", (500, "server_error", "internal_error")),
        (503, "", (503, "server_error", "service_unavailable")),
        (0, "", (500, "server_error", "internal_error")),
    ],
)
def test_errors_from_behind(status: int, code: str, expected: tuple[int, str, str | None]) -> None:
    error = errors.from_failure(Failure("x", code, status))
    assert (error.status, error.type, error.code) == expected


def test_templates_need_their_mark_once() -> None:
    with pytest.raises(ValueError, match="once"):
        sse.template({"a": "M", "b": "M"}, "M")
    with pytest.raises(ValueError, match="once"):
        sse.template({"a": "x"}, "M")


LINES = "a\x85b\u2028c\u2029d\x0b\x0c\x1c\x1d\x1e\r\n é\\u0085"


def test_no_character_of_a_text_ends_a_line() -> None:
    for data in (
        sse.event({"text": LINES, LINES: [LINES]}),
        sse.event({"text": LINES}, b"data:"),
        b"".join([b"data: ", sse.escaped(LINES), b"\n\n"]),
        sse.escaped(LINES).join(sse.template({"a": LINES, "b": "M"}, "M")),
        sse.escaped(LINES).join(sse.holes({"a": "M", "b": "M", "c": LINES}, "M")),
    ):
        line, empty = data.decode().splitlines()
        assert empty == ""
        said = json.loads(line.partition(":")[2])
        texts = said.values() if isinstance(said, dict) else [said]
        assert all(text in (LINES, [LINES]) for text in texts)
