"""Bodies: what is no JSON object, and what would take long to parse, is refused."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.common import json_body
from asyncllm.api.common.conversation import ConversationBuilder
from asyncllm.api.common.json_body import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_STRINGS,
    MIN_VALUES,
    load,
    most_values,
)
from asyncllm.api.common.request import ServedModel
from asyncllm.api.openai import request as openai
from asyncllm.api.responses import request as responses
from asyncllm.errors import RequestError
from tests.speed import quickest

SIZE = 4 << 20  # the least default of --max_body_size
LONGEST_S = 0.1  # at rest 0.04 at most; without limits ten times as long


def filled(head: bytes, item: bytes, tail: bytes, number: int = SIZE) -> bytes:
    """A body of about SIZE bytes, or with ``number`` items."""
    number = min(number, (SIZE - len(head) - len(tail)) // (len(item) + 1))
    return head + b",".join([item] * number) + tail


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1]", b"5", b'{"temperature": NaN}', b'{"a": Infinity}', b'{"a": \xff}',
     b'{"a": -1E+999}', b'{"a": ' + b"1" * 350 + b".0}", b'{"a": ' + b"9" * 220 + b"e99}",
     b'{"a": ' + b"9" * 5000 + b"}", b'{"a":' * 100_000, b"{" + b"]" * 100_000, '{"a": 1}'.encode("utf-16"),
     b'"' * 999_999, b"\\" * 999_999, b'{"a": "\\"}'],
)  # fmt: skip
def test_bodies_that_are_no_json_objects(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        load(raw)
    assert caught.value.status == 400
    assert len(caught.value.message) < 300


def test_a_byte_order_mark_is_no_fault() -> None:
    assert load(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("raw", "refusal"),
    [
        (filled(b'{"x":[', b"[]", b"]}"), "arrays and objects, at most 16,384"),
        (filled(b'{"x":[', b"{}", b"]}"), "arrays and objects"),
        (filled(b'{"prompt":[', b"1", b"]}"), "values, at most 196,608"),
        (filled(b'{"prompt":[', b"1e300", b"]}"), "values"),
        (filled(b'{"prompt":[', b"null", b"]}"), "values"),
        (filled(b'{"prompt":[', b'""', b"]}"), "strings, at most 131,072"),
        (b'{"x":' + b"[" * 129 + b"]" * 129 + b"}", "130 levels, at most 128"),
        (filled(b'{"x":[', b"7" * (MAX_DIGITS + 1), b"]}"), "more than 400 digits"),
    ],
    ids=["arrays", "objects", "ids", "floats", "null", "strings", "depth", "digits"],
)
def test_what_takes_long_is_refused_before_it_is_parsed(
    raw: bytes, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(json_body.json, "loads", parse)
    with pytest.raises(RequestError) as caught:
        load(raw)
    assert refusal in caught.value.message


@pytest.mark.parametrize(
    "raw",
    [
        filled(b'{"x":[', b"[]", b"]}", MAX_CONTAINERS - 2),
        filled(b'{"x":[', b'{"a":{}}', b"]}", MAX_CONTAINERS // 2 - 1),
        filled(b'{"prompt":[', b"49151", b"]}", MIN_VALUES - 2),
        filled(b'{"prompt":[', b"1e300", b"]}", MIN_VALUES - 2),
        filled(b'{"prompt":[', b'"\\n\\u00e9"', b"]}", MAX_STRINGS - 1),
        filled(b'{"x":[', b"7" * MAX_DIGITS, b"]}"),
        b'{"x":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}",
        b'{"x":"' + b"," * (SIZE - 8) + b'"}',
        b'{"x":"' + b"[" * (SIZE - 8) + b'"}',
        b'{"x":"' + b"\\\\" * (SIZE // 2 - 4) + b'"}',
        b'{"x":"' + b'\\"' * (SIZE // 2 - 4) + b'"}',
        b'{"x":"' + b"\\u00e9" * (SIZE // 6 - 2) + b'"}',
    ],
    ids=["arrays", "objects", "ids", "floats", "strings", "digits", "depth", "commas", "brackets",
         "backslashes", "quotes", "escapes"],
)  # fmt: skip
def test_what_passes_is_parsed_in_a_short_time(raw: bytes) -> None:
    gc.disable()
    took = quickest(lambda: load(raw), LONGEST_S)
    gc.enable()
    assert took < LONGEST_S


def test_a_prompt_of_ids_fits_whatever_the_context() -> None:
    ids = list(range(300_000))
    raw = json.dumps({"prompt": ids}).encode()
    with pytest.raises(RequestError, match=r"300,001 values, at most 196,608"):
        load(raw, most_values(90_000))
    assert load(raw, most_values(300_000)) == {"prompt": ids}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\[]{},:\n\u00e9', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text('a"\\,[', max_size=4), inner, max_size=4)
    ),
    max_leaves=30,
)


def num_values(value: Any) -> int:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max(len(value) - 1, 0) + sum(num_values(v) for v in inner)
    return 0


@given(st.dictionaries(st.text('a"\\,[', max_size=4), PLAIN, max_size=4), st.booleans())
def test_text_is_not_taken_for_structure(body: dict[str, Any], ascii_only: bool) -> None:
    """The bound is exact: commas and containers outside of strings, and no others."""
    raw = json.dumps(body, ensure_ascii=ascii_only).encode()
    number = num_values(body)
    assert load(raw, number) == body
    with pytest.raises(RequestError, match="values, at most"):
        load(raw, number - 1)


# -- what checked bodies cost ------------------------------------------------------------------------

SERVED = ServedModel(
    name="m", listed=("m",), accepted=frozenset(), max_len=8192, vocab_size=50_000, created=0
)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def calls(arguments: str, number: int) -> dict[str, Any]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "assistant", "tool_calls": [call] * number}, user("x")]}


TEXTS = [{"type": "text", "text": "x" * 50}] * 16_000
RESULTS = [{"type": "tool_result", "tool_use_id": "a", "content": "x" * 20}] * 16_000
ITEM_CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"a": [1, 2]}'}


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (openai.chat, {"messages": [user("x" * 950)] * 4096}),
        (openai.chat, {"messages": [user([{"type": "text", "text": "x" * 900}])] * 4096}),
        (openai.chat, {"messages": [user(TEXTS)]}),
        (openai.chat, {"messages": [user(["x"] * 100_000)]}),
        (openai.chat, calls('{"a": [1, 2]}', 8_000)),
        (openai.chat, calls('{"a": [' + "[]," * 16_000 + "[]]}", 1)),
        (openai.chat, calls('{"a": "' + "[]," * 1_000_000 + '"}', 1)),
        (openai.completion, {"prompt": [49_151] * 196_000}),
        (openai.completion, {"prompt": [[4915] * 700] * 256}),
        (openai.completion, {"prompt": "\u00e9" * (2 << 20)}),
        (anthropic.messages, {"max_tokens": 5, "messages": [user("x" * 950)] * 4096}),
        (anthropic.messages, {"max_tokens": 5, "messages": [user(TEXTS)]}),
        (anthropic.messages, {"max_tokens": 5, "messages": [user(RESULTS)]}),
        (lambda b, s: responses.read(b, s, responses.ResponseStore()), {"input": [user("x" * 950)] * 4096}),
        (
            lambda b, s: responses.read(b, s, responses.ResponseStore()),
            {"input": [user("x"), *[ITEM_CALL] * 4000, user("y")]},
        ),
    ],
    ids=["messages", "parts", "one of parts", "strings", "calls", "arguments", "quoted", "ids",
         "prompts", "text", "Anthropic", "blocks", "results", "Responses", "items"],
)  # fmt: skip
def test_checked_bodies_cost_little(
    parse: Callable[[dict[str, Any], ServedModel], object], body: dict[str, Any]
) -> None:
    raw = json.dumps(body, ensure_ascii=False).encode()
    assert len(raw) < SIZE + 1000
    loaded = load(raw)
    gc.disable()
    took = quickest(lambda: parse(loaded, SERVED), LONGEST_S)
    gc.enable()
    assert took < LONGEST_S


@pytest.mark.parametrize(
    "arguments",
    [
        ["[" + "[]," * 16_384 + "[]]"],
        ['{"a": [[], []]}'] * 6_000,
        ['{"a": ' + "[" * 128 + "]" * 128 + "}"],
        ['{"a": ' + "1" * 401 + "}"],
        ['{"a": 1}', '{"', "[" + "[]," * 40_000 + "[]]"],
    ],
    ids=["one", "together", "depth", "digits", "after what is no JSON"],
)
def test_json_in_strings_has_a_bound_of_its_own(arguments: list[str]) -> None:
    """All of a request's arguments together; the parser would meet them one by one."""
    each = [{"function": {"name": "f", "arguments": text}} for text in arguments]
    for message in (
        {"role": "assistant", "tool_calls": each},
        *({"role": "assistant", "function_call": e["function"]} for e in each[: len(each) == 1]),
    ):
        with pytest.raises(RequestError, match="arguments"):
            openai.chat({"messages": [message, user("x")]}, SERVED)
    items = [ITEM_CALL | {"arguments": text} for text in arguments]
    if len(arguments) < 4000:
        with pytest.raises(RequestError, match="arguments"):
            responses.read({"input": [*items, user("x")]}, SERVED, responses.ResponseStore())


def test_pieces_of_turns_are_joined_as_before() -> None:
    builder = ConversationBuilder()
    for role, content in (
        ("user", ""),
        ("user", "a"),
        ("user", ""),
        ("user", "b"),
        ("assistant", ""),
    ):
        builder.add_text(role, content)
    builder.add_reasoning("t")
    builder.add_reasoning("u")
    builder.add_result("k", "r")
    assert builder.messages == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "", "reasoning_content": "t\nu"},
        {"role": "tool", "content": "r", "tool_call_id": "k"},
    ]
