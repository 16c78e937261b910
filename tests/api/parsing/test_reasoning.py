"""Reasoning is parted from content, wherever the stream is cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncllm.api.parsing.events import CallStart, Content, Event, Reasoning, Tool
from asyncllm.api.parsing.reasoning import (
    FORMATS,
    OPENED,
    Splitter,
    make_reasoning,
    prompt_state,
    special_tokens,
    tags,
)
from asyncllm.api.parsing.tools import make_parser
from asyncllm.constrain.reasoning import ReasoningConstraint, ReasoningMarks
from asyncllm.constrain.vocabulary import Vocabulary

EXAMPLES = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=list(HealthCheck),
)
TAGS = {name: ("<think>", "</think>") for name in FORMATS if name != "gpt-oss"}
TAGS["mistral"] = ("[THINK]", "[/THINK]")
PIECES = st.sampled_from([
    "<think>", "</think>", "<thi", "◁think▷", "◁/think▷", "\n", " ", "<|channel|>", "analysis", "final",
    "commentary", "<|message|>", "<|end|>", "<|start|>", "assistant", " to=functions.f", "<|return|>",
    "<|call|>", "<|tool_calls_section_begin|>", "text", "<", "{}", "[THINK]", "[/THINK]", "[TOOL_CALLS]",
])  # fmt: skip
opened = st.sampled_from([True, False, None])


def split(format_name: str, state: bool | None, pieces: list[str]) -> tuple[str, str]:
    parser = make_reasoning(format_name, opened=state)
    events: list[Event] = []
    for piece in pieces:
        events += parser.push(piece)
    events += parser.finish()
    assert all(isinstance(event, Reasoning | Content) and event.text for event in events)
    return (
        "".join(event.text for event in events if isinstance(event, Reasoning)),
        "".join(event.text for event in events if isinstance(event, Content)),
    )


BYTES = Vocabulary([bytes([i]) for i in range(256)], 256)


@pytest.mark.parametrize("format_name", FORMATS)
def test_what_is_forced_ends_reasoning(format_name: str) -> None:
    forced = tags(format_name, frozenset())
    for begin, state in ((b"", True), *((begin, None) for begin in forced.begins)):
        text = (begin + b"hm" + forced.close + b"yes").decode()
        if "◁" not in text:
            assert split(format_name, state, [text]) == ("hm", "yes")


def test_of_two_pairs_the_one_in_the_vocabulary_is_forced() -> None:
    assert tags("kimi_k2", {b"<think>"}).close == b"</think>"
    assert tags("kimi_k2", {"◁think▷".encode()}).close == "◁/think▷".encode()


@pytest.mark.parametrize("format_name", TAGS)
@EXAMPLES
@given(pieces=st.lists(PIECES, max_size=12), state=st.booleans())
def test_the_limit_sees_reasoning_where_the_parser_does(
    format_name: str, pieces: list[str], state: bool
) -> None:
    text = "".join(pieces)
    rules = ReasoningMarks(BYTES, tags(format_name, frozenset()), ())
    constraint = ReasoningConstraint(rules, opened=state, limit=10**6, answer=None)
    for byte in text.encode():
        constraint.accept(byte)
    parser = make_reasoning(format_name, opened=state or None)
    parser.push(text)
    assert constraint.inside == parser.inside


@pytest.mark.parametrize("format_name", FORMATS)
@EXAMPLES
@given(pieces=st.lists(PIECES | st.text(max_size=3), max_size=20), state=opened)
def test_cut_anywhere(format_name: str, pieces: list[str], state: bool | None) -> None:
    text = "".join(pieces)
    whole = split(format_name, state, [text])
    assert split(format_name, state, pieces) == whole
    assert split(format_name, state, list(text)) == whole
    if state is False and format_name != "gpt-oss":
        assert whole == ("", text)


@pytest.mark.parametrize("format_name", TAGS)
@EXAMPLES
@given(thought=st.text(max_size=9), said=st.text(max_size=9), state=opened, cut=st.integers(0, 30))
def test_both_parts_are_found(
    format_name: str, thought: str, said: str, state: bool | None, cut: int
) -> None:
    begin, end = TAGS[format_name]
    answer = f"{'' if state else begin}\n{thought}\n{end}\n\n{said}"
    expected = (thought.strip(" \t\r\n"), said.lstrip(" \t\r\n"))
    if state is False:
        expected = ("", answer)
    assert split(format_name, state, [answer[:cut], answer[cut:]]) == expected


@pytest.mark.parametrize("format_name", TAGS)
def test_without_tags_all_is_content_unless_the_prompt_opened(format_name: str) -> None:
    text = " Hello\n<think> is a tag "
    assert split(format_name, None, [text]) == ("", text)
    assert split(format_name, False, [text]) == ("", text)
    assert split(format_name, True, ["Hello "]) == ("Hello", "")


def test_a_begin_tag_that_repeats_the_prompt_is_not_reasoning() -> None:
    assert split("qwen3", True, ["\n<think>\na</think>b"]) == ("a", "b")


def test_an_empty_think_block_is_nothing() -> None:
    assert split("glm45", None, ["\n<think></think>\nHi"]) == ("", "Hi")


def test_only_the_first_block_is_reasoning() -> None:
    assert split("think", None, ["<think>a</think>b<think>c</think>"]) == ("a", "b<think>c</think>")


def test_a_call_of_mistral_ends_reasoning() -> None:
    pieces = ["[THINK]hm", "[TOOL_", "CALLS]f[ARGS]{}"]
    assert split("mistral", None, pieces) == ("hm", "[TOOL_CALLS]f[ARGS]{}")


def test_kimi_has_two_pairs_of_tags() -> None:
    assert split("kimi_k2", None, ["◁think▷a◁/think▷b"]) == ("a", "b")
    assert split("kimi_k2", None, ["<think>a</think>b"]) == ("a", "b")


HARMONY = (
    "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>commentary<|message|>wait<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>again<|end|>"
    "<|start|>assistant<|channel|>final<|message|>done"
)


def test_special_tokens_are_those_of_the_format() -> None:
    assert set(special_tokens("think")) == {"<think>", "</think>"}
    assert {"◁think▷", "</think>", "<|tool_calls_section_begin|>"} <= set(special_tokens("kimi_k2"))
    assert set(re.findall(r"<[|]\w+[|]>", HARMONY)) <= set(special_tokens("gpt-oss"))


def test_harmony_channels() -> None:
    assert split("gpt-oss", None, [HARMONY]) == ("think\nagain", "wait\ndone")
    assert split("gpt-oss", None, ["plain"]) == ("", "plain")
    assert split("gpt-oss", True, ["a<|end|><|start|>assistant<|channel|>final<|message|>b"]) == (
        "a",
        "b",
    )


def test_harmony_cut_off_shows_no_marks() -> None:
    tokens = re.findall(r"<\|\w+\|>|[^<]+", HARMONY)
    for length in range(len(tokens)):
        reasoning, content = split("gpt-oss", None, tokens[:length])
        assert "channel" not in reasoning + content


@pytest.mark.parametrize(("format_name", "prompt", "state"), [
    ("qwen3", "<|im_start|>assistant\n", "none"),
    ("qwen3", "<|im_start|>assistant\n<think>\n", "open"),
    ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "closed"),
    ("qwen3", "<|im_start|>user\nwhat is <think> for?<|im_end|>\n<|im_start|>assistant\n", "none"),
    ("deepseek-r1", "<\uff5cAssistant\uff5c><think>\n", "open"),
    ("deepseek-r1", "<\uff5cAssistant\uff5c></think>", "closed"),
    ("glm45", "<|assistant|>\n<think></think>", "closed"),
    ("glm45", "<|assistant|>", "none"),
    ("kimi_k2", "<|im_middle|>◁think▷", "open"),
    ("gpt-oss", "<|start|>assistant", "none"),
    ("gpt-oss", "<|start|>assistant<|channel|>analysis<|message|>", "open"),
    ("gpt-oss", "<|start|>assistant<|channel|>final<|message|>", "closed"),
])  # fmt: skip
def test_the_prompt_says_where_the_answer_begins(format_name: str, prompt: str, state: str) -> None:
    assert prompt_state(format_name, prompt) == state


@pytest.mark.parametrize(("continued", "state"), [
    ("I mean", "closed"),
    ("<think>Well", "open"),
    ("<think>a</think>so", "closed"),
    ("", "none"),
])  # fmt: skip
def test_a_continued_answer_says_it_itself(continued: str, state: str) -> None:
    assert prompt_state("qwen3", f"<|im_start|>assistant\n{continued}", continued) == state


def test_a_continued_thought_is_still_one() -> None:
    assert prompt_state("qwen3", "assistant\n<think>\nWell", "Well") == "open"


CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


def everything(splitter: Splitter, pieces: list[str]) -> tuple[str, str, int]:
    events = [event for piece in pieces for event in splitter.push(piece)] + splitter.finish()
    return (
        "".join(event.text for event in events if isinstance(event, Reasoning)),
        "".join(event.text for event in events if isinstance(event, Content)),
        sum(isinstance(event, CallStart) for event in events),
    )


def splitter(reasoning: str, tools: str, prompt: str) -> Splitter:
    state = OPENED.get(prompt_state(reasoning, prompt))
    return Splitter(make_reasoning(reasoning, opened=state), make_parser(tools, [Tool("f")]))


def test_a_call_is_looked_for_in_content_only() -> None:
    text = f"I could {CALL}\n</think>\n\nLet me.\n{CALL}"
    for pieces in ([text], list(text)):
        both = splitter("qwen3", "qwen25", "assistant\n<think>\n")
        assert both.inside
        assert everything(both, pieces) == (f"I could {CALL}", "Let me.", 1)
        assert both.calls[0].complete
        assert not both.inside


def test_a_mark_that_only_calls_begin_with_ends_reasoning() -> None:
    call = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    )
    for pieces in ([f"hm {call}"], list(f"hm {call}")):
        assert everything(splitter("kimi_k2", "kimi_k2", "◁think▷"), pieces) == ("hm", "", 1)


def test_harmony_calls() -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f"
        ' <|constrain|>json<|message|>{"a": "<"}<|call|>'
    )
    for pieces in ([text], list(text)):
        both = splitter("gpt-oss", "gpt_oss", "<|start|>assistant")
        assert everything(both, pieces) == ("hm", "", 1)
        assert both.calls[0].arguments == '{"a": "<"}'
        assert both.calls[0].complete


def test_either_part_may_be_missing() -> None:
    assert everything(Splitter(None, None), ["a", "", "b"]) == ("", "ab", 0)
    assert everything(Splitter(None, make_parser("hermes", [])), [f"a{CALL}"]) == ("", "a", 1)
    only = Splitter(make_reasoning("think", opened=True), None)
    assert everything(only, [f"a</think>{CALL}"]) == ("a", CALL, 0)
    assert only.calls == []
