"""Custom tools in chat completions: offered, forced, answered, streamed, and in earlier turns."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asyncllm.core.request import LARK, FinishReason
from asyncllm.errors import RequestError
from tests.api.harness import CALL, HI, TOOLS, chat_request, events, feed, rendered, reply
from tests.speed import quickest

PATCH = {"type": "custom", "custom": {"name": "patch", "description": "Edits files."}}
NAMED = {"type": "custom", "custom": {"name": "patch"}}
TEXT = 'a "b"\n'
WRITTEN = f'<tool_call>{{"name": "patch", "arguments": {json.dumps({"input": TEXT})}}}</tool_call>'


def formed(syntax: str, definition: str) -> dict[str, Any]:
    grammar = {"syntax": syntax, "definition": definition}
    return {"type": "custom", "custom": {"name": "patch", "format": {"type": "grammar", "grammar": grammar}}}  # fmt: skip


@pytest.mark.parametrize(
    ("syntax", "definition", "key", "kept"),
    [("regex", "[a-z]+", "pattern", "^(?:[a-z]+)$"), ("lark", 'start: "*"', LARK, 'start: "*"')],
)
def test_a_format_holds_under_auto(syntax: str, definition: str, key: str, kept: str) -> None:
    grammar = chat_request(tools=[formed(syntax, definition)]).params.grammar
    assert grammar is not None
    kind, text = grammar
    assert kind == "calls"
    schema = json.loads(text.partition("\n")[2])[0]["schema"]
    assert schema["properties"]["input"][key] == kept


@pytest.mark.parametrize("definition", ["a)|(?:b", "a)(?:b", "a)", "[)])", "\\\\)", "[]a)|(?:b]"])
def test_an_expression_does_not_end_its_group(definition: str) -> None:
    assert chat_request(tools=[formed("regex", r"(a|[)]\))")])
    with pytest.raises(RequestError) as caught:
        chat_request(tools=[formed("regex", definition)])
    assert caught.value.param == "tools[0].custom.format.grammar.definition"


@pytest.mark.parametrize(
    "choice",
    [NAMED, {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}],
)
def test_a_choice_forces_a_custom_tool(choice: dict[str, Any]) -> None:
    grammar = chat_request(tools=[*TOOLS, PATCH], tool_choice=choice).params.grammar
    assert grammar is not None
    assert ('"patch"' in grammar[1], '"weather"' in grammar[1]) == (True, False)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (NAMED | {"custom": {"name": "weather"}}, 'no custom tool "weather"'),
        ({"type": "function", "function": {"name": "patch"}}, 'no function "patch"'),
        ({"type": "function", "function": {"name": "Patch"}}, 'no function "Patch"'),
    ],
)
@pytest.mark.parametrize("mode", ["named", "auto", "required"])
def test_a_choice_takes_tools_of_its_own_kind_only(
    choice: dict[str, Any], message: str, mode: str
) -> None:
    if mode != "named":
        choice = {
            "type": "allowed_tools",
            "allowed_tools": {"mode": mode, "tools": [NAMED, choice]},
        }
    told = f'{message}; the tools are: function "weather", custom tool "patch"$'
    with pytest.raises(RequestError, match=told) as caught:
        chat_request(tools=[*TOOLS, PATCH], tool_choice=choice)
    assert (caught.value.param, caught.value.status) == ("tool_choice", 400)


def test_brackets_without_an_end_are_read_once() -> None:
    tools = [formed("regex", "[" * 20_000)]
    assert quickest(lambda: chat_request(tools=tools), 2, 3) < 2, "it took 12 s"


def test_a_choice_allows_as_many_tools_as_there_may_be() -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED] * 129}}
    with pytest.raises(RequestError, match="129 entries, at most 128"):
        chat_request(tools=[*TOOLS, PATCH], tool_choice=choice)


def test_of_many_tools_an_error_names_some() -> None:
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(12)]
    with pytest.raises(RequestError, match=r'function "f9" and 2 more$'):
        chat_request(tools=tools, tool_choice=NAMED)


def test_calls_of_both_kinds_come_back_as_they_were_offered() -> None:
    text = f"<tool_call>{CALL}</tool_call>\n{WRITTEN}"
    made = reply("hermes", "", tools=[*TOOLS, PATCH])
    feed(made, [text], FinishReason.STOP)
    (choice,) = json.loads(made.whole())["choices"]
    weather, patch = choice["message"]["tool_calls"]
    assert (weather["type"], weather["function"]["name"]) == ("function", "weather")
    assert patch == {
        "id": patch["id"],
        "type": "custom",
        "custom": {"name": "patch", "input": TEXT},
    }
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("more", [{}, {"logprobs": True}])
def test_free_text_is_streamed_behind_the_name(more: dict[str, Any]) -> None:
    made = reply("hermes", "", tools=[*TOOLS, PATCH], stream=True, **more)
    chunks = events(
        feed(made, list(f"<tool_call>{CALL}</tool_call>\n{WRITTEN}"), FinishReason.STOP)
    )
    told = [
        call
        for chunk in chunks
        for call in chunk["choices"][0]["delta"].get("tool_calls", [])
        if call["index"] == 1
    ]
    assert [call["custom"] for call in told] == [{"name": "patch", "input": ""}, {"input": TEXT}]
    assert (told[0]["type"], "id" in told[0], set(told[1])) == (
        "custom", True, {"index", "custom"},
    )  # fmt: skip
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_earlier_calls_of_custom_tools_are_told_as_they_were_made() -> None:
    call = {"id": "c", "type": "custom", "custom": {"name": "patch", "input": TEXT}}
    asked = chat_request(
        messages=[
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "done"},
        ],
        tools=[PATCH],
    )
    messages = rendered(asked)["messages"]
    assert json.dumps("patch") in json.dumps(messages).replace('\\"', '"')
    assert "done" in json.dumps(messages[-1])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "custom"}]}, "tools[0].custom"),
        ({"tools": [{"type": "custom", "custom": []}]}, "tools[0].custom"),
        ({"tools": [{"type": "custom", "custom": {"name": "a b"}}]}, "tools[0].custom.name"),
        ({"tools": [PATCH, PATCH]}, "tools[1].custom.name"),
        ({"tools": [TOOLS[0], {"type": "custom", "custom": {"name": "weather"}}]}, "tools[1].custom.name"),
        ({"tools": [formed("peg", "x")]}, "tools[0].custom.format.grammar.syntax"),
        ({"tools": [formed("lark", "")]}, "tools[0].custom.format.grammar.definition"),
        ({"tools": [{"type": "custom", "custom": {"name": "p", "format": {"type": "json"}}}]}, "tools[0].custom.format.type"),
        ({"tools": [{"type": "custom", "custom": {"name": "p", "format": "text"}}]}, "tools[0].custom.format"),
        ({"tools": [PATCH], "tool_choice": {"type": "custom"}}, "tool_choice.custom"),
        ({"tools": TOOLS, "tool_choice": NAMED}, "tool_choice"),
        *(
            ({"messages": [*HI, {"role": "assistant", "tool_calls": [call]}]}, f"messages[1].tool_calls[0]{at}")
            for call, at in (
                ({}, ".function"),
                ({"custom": None}, ".custom"),
                ({"custom": {"name": "p"}}, ".custom.input"),
                ({"custom": {"name": "p", "input": {}}}, ".custom.input"),
                ({"custom": {"name": "p", "input": "\ud800"}}, ".custom.input"),
            )
        ),
    ],
)  # fmt: skip
def test_bad_custom_tools_are_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat_request(**body)
    assert (caught.value.param, caught.value.status) == (param, 400)
