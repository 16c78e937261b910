"""Chat answers with reasoning and tool calls: a stream cut anywhere says what the whole says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncllm.codec import i32
from asyncllm.core.request import FinishReason
from asyncllm.errors import RequestError
from tests.api.harness import (
    ARGS,
    CALL,
    CASES,
    THINK,
    TOOLS,
    WEATHER,
    Case,
    called,
    chat_request,
    delta,
    ending,
    events,
    feed,
    joined,
    reply,
)
from tests.api.parsing.tools.answers import EXAMPLES


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_whole_answer(case: Case) -> None:
    calls, thoughts, text, content, reasoning, found, reason = case
    made = reply(calls, thoughts)
    feed(made, [text], ending(reason))
    body = json.loads(made.whole())
    (choice,) = body["choices"]
    message = choice["message"]
    assert message["content"] == content
    assert choice["finish_reason"] == reason
    assert called(message.get("tool_calls", [])) == found
    ids = [call["id"] for call in message.get("tool_calls", [])]
    assert len(set(ids)) == len(ids)
    assert all(call.keys() == {"id", "type", "function"} for call in message.get("tool_calls", []))
    assert ("reasoning" in message) == bool(thoughts)
    assert message.get("reasoning") == message.get("reasoning_content") == reasoning
    assert ("completion_tokens_details" in body["usage"]) == bool(thoughts)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("more", [{}, {"logprobs": True}, {"stream_options": {"continuous_usage_stats": True}}])  # fmt: skip
@EXAMPLES
@given(data=st.data())
def test_a_stream_cut_anywhere_says_the_same(
    case: Case, more: dict[str, Any], data: st.DataObject
) -> None:
    calls, thoughts, text, content, reasoning, found, reason = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    made = reply(calls, thoughts, stream=True, **more)
    chunks = events(feed(made, pieces, ending(reason)))
    last = chunks.pop()["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({}, reason)
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    message = joined(chunks)
    assert message["content"] == (content or "")
    assert message["reasoning"] == message["reasoning_content"] == (reasoning or "")
    assert called(message["tool_calls"]) == found
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    scored = sum(len(each["content"]) for each in told if each is not None)
    assert scored == (len(pieces) if "logprobs" in more else 0)


def test_the_bytes_of_chunks() -> None:
    made = reply("hermes", "think", stream=True)
    got = feed(made, ["<think>", "é", "</think>", 'a"', f"<tool_call>{CALL}"], FinishReason.LENGTH)
    head = (
        'data: {"id":"id-1","object":"chat.completion.chunk","created":7,"model":"m\\"1",'
        '"choices":[{"index":0,"delta":'
    )
    tail = ',"logprobs":null,"finish_reason":null}]}'
    thought, content, start, arguments, _, _ = got.decode().split("\n\n")
    assert thought == head + '{"reasoning":"é","reasoning_content":"é"}' + tail
    assert content == head + '{"content":"a\\""}' + tail
    call_id = made.answer.choices[0].output.calls[0].id  # type: ignore[union-attr]
    called = f'{{"index":0,"id":"{call_id}","type":"function","function":{{"name":"weather","arguments":""}}}}'
    assert start == head + f'{{"tool_calls":[{called}]}}' + tail
    told = f'{{"index":0,"function":{{"arguments":{json.dumps(ARGS, ensure_ascii=False)}}}}}'
    assert arguments == head + f'{{"tool_calls":[{told}]}}' + tail


def test_without_parallel_calls_only_the_first_is_told() -> None:
    text = f"<tool_call>{CALL}</tool_call> <tool_call>{CALL}</tool_call>"
    made = reply("hermes", "", parallel_tool_calls=False)
    feed(made, list(text), FinishReason.STOP)
    (choice,) = json.loads(made.whole())["choices"]
    assert called(choice["message"]["tool_calls"]) == [WEATHER]
    assert choice["finish_reason"] == "tool_calls"
    streamed = reply("hermes", "", parallel_tool_calls=False, stream=True)
    chunks = events(feed(streamed, list(text), FinishReason.STOP))
    assert called(joined(chunks)["tool_calls"]) == [WEATHER]


def test_each_choice_has_its_own_parts() -> None:
    made = reply("hermes", "", n=2)
    feed(made, list("no"), FinishReason.STOP, 1)
    feed(made, list(f"<tool_call>{CALL}</tool_call>"), FinishReason.STOP, 0)
    first, second = json.loads(made.whole())["choices"]
    assert called(first["message"]["tool_calls"]) == [WEATHER]
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "stop")
    assert second["message"] == {"role": "assistant", "content": "no", "refusal": None}


@pytest.mark.parametrize(
    ("choice", "text", "found", "reason"),
    [
        ("required", f"[{CALL}, {CALL}]", [WEATHER] * 2, "tool_calls"),
        ("required", f"[{CALL}, {CALL}", [WEATHER] * 2, "length"),
        ({"type": "function", "function": {"name": "weather"}}, CALL, [WEATHER], "tool_calls"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls(
    choice: Any, text: str, found: list[tuple[str, str]], reason: str, stream: bool
) -> None:
    made = reply("hermes", "think", tool_choice=choice, head="<think>", stream=stream)
    out = feed(made, list(f"hm</think>{text}"), ending(reason))
    if stream:
        chunks = events(out)
        assert called(joined(chunks)["tool_calls"]) == found
        assert chunks[-1]["choices"][0]["finish_reason"] == reason
        return
    (told,) = json.loads(made.whole())["choices"]
    assert called(told["message"]["tool_calls"]) == found
    assert (told["message"]["content"], told["finish_reason"]) == (None, reason)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_in_the_content(stream: bool) -> None:
    made = reply("hermes", "think", separate_reasoning=False, stream=stream)
    text = f"{THINK}Yes <tool_call>{CALL}</tool_call>"
    out = feed(made, list(text), FinishReason.STOP)
    if stream:
        message = joined(events(out))
        assert message["reasoning"] == ""
    else:
        message = json.loads(made.whole())["choices"][0]["message"]
        assert message["reasoning"] is None
    assert message["content"] == "well <tool_call>\n\nYes"
    assert called(message["tool_calls"]) == [WEATHER]


@pytest.mark.parametrize(
    ("head", "continued", "text", "reasoning", "content"),
    [
        ("<think>\n", "", "hm</think>a", "hm", "a"),
        ("<think>\n\n</think>\n\n", "", "<think>hm</think>a", None, "<think>hm</think>a"),
        ("assistant\n", "", "<think>hm</think>a", "hm", "a"),
        ("assistant\n", "<think>well", " hm</think>a", "hm", "a"),
        ("assistant\n", "so ", "<think>hm</think>a", None, "<think>hm</think>a"),
    ],
)
def test_the_prompt_says_where_the_answer_begins(
    head: str, continued: str, text: str, reasoning: str | None, content: str
) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": continued}]
    body = {"messages": turns, "continue_final_message": True} if continued else {}
    made = reply("", "think", head=head, **body)
    feed(made, list(text), FinishReason.STOP)
    message = json.loads(made.whole())["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (reasoning, content)


@pytest.mark.parametrize("together", [False, True])
def test_tokens_of_reasoning_are_counted_however_they_come(together: bool) -> None:
    pieces = ["hm", "", " well", "</think>", "a", "b"]
    made = reply("", "think", head="<think>", stream=True)
    if together:
        (choice,) = made.answer.choices
        choice.take(delta("".join(pieces), i32([65] * 6), tuple(pieces)))
        choice.end(FinishReason.STOP, 1, "")
    else:
        feed(made, pieces, FinishReason.STOP)
    usage = made.answer.usage()
    assert usage["completion_tokens"] == 6
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}


def test_guessed_tokens_are_in_the_usage_of_all_choices() -> None:
    made = reply("", "think", head="<think>")
    (choice,) = made.answer.choices
    choice.end(FinishReason.STOP, 1, "", (5, 3))
    assert made.answer.usage()["completion_tokens_details"] == {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": 3,
        "rejected_prediction_tokens": 2,
    }


def test_a_prediction_is_a_hint_whose_use_is_in_the_usage() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for content, text in (("x", "x"), ("", ""), (parts, "a\nb")):
        predicted = {"type": "content", "content": content}
        asked = chat_request(prediction=predicted, n=2, logprobs=True, tools=TOOLS)
        assert asked.prediction == text
        assert replace(asked, prediction=None) == chat_request(n=2, logprobs=True, tools=TOOLS)
        made = reply("hermes", "", prediction=predicted)
        assert made.answer.usage()["completion_tokens_details"] == {
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        }
    assert chat_request(prediction=None).prediction is None


@pytest.mark.parametrize(
    ("prediction", "at"),
    [
        ("x", ""),
        ({}, ".type"),
        ({"type": "text", "content": "x"}, ".type"),
        ({"type": "content"}, ".content"),
        ({"type": "content", "content": None}, ".content"),
        ({"type": "content", "content": "\ud800"}, ".content"),
        ({"type": "content", "content": [{"type": "image_url"}]}, ".content[0].type"),
        ({"type": "content", "content": [{"type": "text"}]}, ".content[0].text"),
    ],
)
def test_bad_predictions_are_refused_by_name(prediction: Any, at: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat_request(prediction=prediction)
    assert (caught.value.param, caught.value.status) == (f"prediction{at}", 400)


@pytest.mark.parametrize("flows", [True, False])
def test_reasoning_in_one_piece(flows: bool) -> None:
    text = "<think>one two</think>Yes"
    made = reply("", "think", stream=True, stream_reasoning=flows)
    deltas = [c["choices"][0]["delta"] for c in events(feed(made, list(text), FinishReason.STOP))]
    thoughts = [delta["reasoning"] for delta in deltas if "reasoning" in delta]
    assert "".join(thoughts) == "one two"
    assert (len(thoughts) == 1) is not flows
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes"
    cut = reply("", "think", stream=True, stream_reasoning=flows)
    deltas = [
        c["choices"][0]["delta"] for c in events(feed(cut, list("<think>one"), FinishReason.LENGTH))
    ]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "one"


def test_a_call_of_a_function() -> None:
    text, asked = f"<tool_call>{CALL}</tool_call>", {"functions": [TOOLS[0]["function"]]}
    made = reply("", "qwen3", **asked)
    feed(made, [text], FinishReason.STOP)
    (choice,) = json.loads(made.whole())["choices"]
    assert choice["finish_reason"] == "function_call"
    call = {"name": "weather", "arguments": ARGS}
    assert (choice["message"]["function_call"], "tool_calls" in choice["message"]) == (call, False)
    made = reply("", "qwen3", stream=True, **asked)
    chunks = [c["choices"][0] for c in events(feed(made, list(text), FinishReason.STOP))]
    told = [c["delta"]["function_call"] for c in chunks if "function_call" in c["delta"]]
    assert told[0] == {"name": "weather", "arguments": ""}
    assert "".join(each["arguments"] for each in told) == ARGS
    assert chunks[-1]["finish_reason"] == "function_call"
