"""Every format: a stream cut anywhere gives what the whole gives; nothing is lost, nothing raises."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncllm.api.parsing.tools import FORMATS, deepseek

from .answers import EXAMPLES, TOOLS, WRITERS, Answer, answers, conserved, cut, parse, parse_whole

all_writers = pytest.mark.parametrize("writer", WRITERS)
all_formats = pytest.mark.parametrize("format_name", [*FORMATS, "json"])


@all_writers
@EXAMPLES
@given(data=st.data())
def test_what_was_written_is_found_wherever_the_text_is_cut(
    writer: str, data: st.DataObject
) -> None:
    format_name, _ = WRITERS[writer]
    answer: Answer = data.draw(answers(writer))
    whole = parse(format_name, [answer.text])
    content, calls = whole
    assert content == answer.content
    assert [call[1] for call in calls] == [made.name for made in answer.calls]
    for call, made in zip(calls, answer.calls, strict=True):
        assert json.loads(call[2]) == made.arguments
        assert made.text is None or call[2] == made.text
        assert call[3]
    places = data.draw(st.lists(st.integers(0, len(answer.text)), max_size=8))
    assert parse(format_name, cut(answer.text, places)) == whole
    assert parse(format_name, list(answer.text)) == whole
    assert conserved(format_name, answer.text)


@all_writers
@settings(EXAMPLES, max_examples=5)
@given(data=st.data())
def test_an_answer_that_is_cut_off_has_the_beginning_of_its_calls(
    writer: str, data: st.DataObject
) -> None:
    format_name, _ = WRITERS[writer]
    answer: Answer = data.draw(answers(writer))
    all_calls = parse(format_name, [answer.text])[1]
    end = answer.text.rstrip()
    for length in range(len(end)):
        _, calls = parse(format_name, [end[:length]])
        for call, meant in zip(calls, all_calls, strict=False):
            assert call[:2] == meant[:2]
            if call[3]:
                assert call[2] == meant[2]
            else:
                assert meant[2].startswith(call[2]) or "qwen" in writer or "glm" in writer
                with pytest.raises(ValueError, match=r"."):
                    json.loads(call[2])


PIECES = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<tool_call", '{"name": "f", ', '"arguments": ', '"parameters": ',
        '{"a": 1}', '{"a": "x', '"}', "}", "{", "[", "]", ",", ";", ":", '"', "\\", "\\u12", "tru", "1e",
        "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "f", "get_weather", "\n", " ", "```json",
        "```", deepseek.CALLS, deepseek.CALL, deepseek.SEP, deepseek.CALL_END, deepseek.CALLS_END,
        "<function=f>", "<function=", "<parameter=s>", "<parameter=i>\n", "</parameter>", "</function>",
        "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>", "functions.f:0", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
        "<|tool_calls_section_end|>", "<|channel|>", " to=functions.f ", "<|message|>", "<|call|>",
        "<|start|>assistant", "é", "x", "\x00",
    ]
)  # fmt: skip


@all_formats
@EXAMPLES
@given(data=st.data())
def test_garbage_is_not_lost(format_name: str, data: st.DataObject) -> None:
    pieces = data.draw(st.lists(PIECES | st.text(max_size=4), max_size=25))
    text = "".join(pieces)
    whole = parse(format_name, [text])
    assert conserved(format_name, text)
    assert parse(format_name, pieces) == whole
    assert parse(format_name, list(text)) == whole
    for call in whole[1]:
        if call[3]:
            assert isinstance(json.loads(call[2]), dict)


@all_formats
@EXAMPLES
@given(data=st.data())
def test_a_damaged_answer_is_not_lost(format_name: str, data: st.DataObject) -> None:
    writer = data.draw(
        st.sampled_from([w for w, (name, _) in WRITERS.items() if name == format_name])
        if any(name == format_name for name, _ in WRITERS.values())
        else st.just("hermes")
    )
    text = data.draw(answers(writer)).text
    at = data.draw(st.integers(0, len(text)))
    gone = data.draw(st.integers(0, 5))
    damaged = text[:at] + data.draw(PIECES | st.just("")) + text[at + gone :]
    whole = parse(format_name, [damaged])
    assert conserved(format_name, damaged)
    assert parse(format_name, list(damaged)) == whole


def test_no_call_no_change() -> None:
    text = '  \n <tool_call> is a tag, {"a": 1} an object \n'
    for format_name in FORMATS:
        parsed = parse_whole(format_name, text, TOOLS)
        assert (parsed.content, parsed.calls, parsed.complete) == (text, (), False)
