"""Tools in requests: checked, chosen, told in the prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from asyncllm.api.common import tool_request
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.request import GenerationRequest
from asyncllm.api.openai import request as openai
from asyncllm.api.parsing.output_parser import Dialect, dialect_of
from asyncllm.api.parsing.reasoning import detect_format
from asyncllm.api.parsing.tools import deepseek
from asyncllm.errors import RequestError
from tests.api.harness import FUNCTION, HI, SCHEMA, SERVED, TOOLS, chat_request, rendered

CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Ü"}'},
}
HISTORY = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "12", "tool_call_id": "c1"},
    {"role": "tool", "content": "13", "tool_call_id": "c1"},
    {"role": "user", "content": "so?"},
]


def chat(dialect: Dialect, **body: Any) -> GenerationRequest:
    return openai.chat({"messages": HI} | body, replace(SERVED, dialect=dialect))


def test_a_template_that_lists_tools_gets_them_and_the_history_as_it_is() -> None:
    dialect = Dialect(calls="llama3", lists_tools=True)
    got = chat(dialect, tools=TOOLS, messages=HISTORY)
    prompt = rendered(got)
    assert prompt["tools"] == TOOLS
    assert [m["role"] for m in prompt["messages"]] == [m["role"] for m in HISTORY]
    assert prompt["messages"][2]["tool_calls"][0]["function"]["arguments"] == {"city": "Ü"}
    assert got.output_options is not None
    assert (got.output_options.calls, [t.name for t in got.output_options.tools]) == (
        "llama3",
        ["weather"],
    )
    assert got.output_options.shown == ("<|python_tag|>",)


def test_any_other_gets_them_in_the_system_message_and_the_history_as_text() -> None:
    got = chat(Dialect(), tools=TOOLS, messages=HISTORY)
    prompt = rendered(got)
    assert prompt["tools"] is None
    system, user, assistant, results, more = prompt["messages"]
    assert system["content"].startswith("be brief\n\n")
    assert json.dumps(FUNCTION) in system["listed"]
    assert user == HISTORY[1]
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ü"}}\n</tool_call>'
    assert assistant == {"role": "assistant", "content": f"{written}\n{written}"}
    shown = "<tool_response>\n12\n</tool_response>\n<tool_response>\n13\n</tool_response>"
    assert results == {"role": "user", "content": shown}
    assert more == HISTORY[-1]
    assert got.output_options is not None
    assert got.output_options.calls == "hermes"
    alone = rendered(chat(Dialect(), tools=TOOLS))["messages"]
    assert [m["role"] for m in alone] == ["system", "user"]


DEEPSEEK = Dialect(calls="deepseekv3", tells_results=True)
PHI = Dialect(calls="phi4", tools_in_system=True, tells_results=True)


def test_calls_are_told_as_the_model_writes_them_where_the_template_shows_that() -> None:
    got = chat(DEEPSEEK, tools=TOOLS, messages=HISTORY)
    system, _, assistant, *results, more = rendered(got)["messages"]
    assert json.dumps(FUNCTION) in system["listed"]
    one = f'{deepseek.CALL}function{deepseek.SEP}weather\n```json\n{{"city": "Ü"}}\n```{deepseek.CALL_END}'
    written = f"{deepseek.CALLS}{one}\n{one}{deepseek.CALLS_END}"
    assert assistant == {"role": "assistant", "content": written}
    assert [(turn["role"], turn["content"]) for turn in results] == [("tool", "12"), ("tool", "13")]
    assert more == HISTORY[-1]
    assert got.output_options is not None
    assert (got.output_options.calls, deepseek.CALLS in got.output_options.shown) == (
        "deepseekv3",
        True,
    )


@pytest.mark.parametrize("turns", [HISTORY, HISTORY[1:]])
def test_tools_of_the_system_message(turns: list[dict[str, Any]]) -> None:
    prompt = rendered(chat(PHI, tools=TOOLS, messages=turns))
    assert prompt["tools"] is None
    system, _, assistant, *results, _ = prompt["messages"]
    assert (system["role"], json.loads(system["tools"])) == ("system", [FUNCTION])
    assert system["content"] == ("be brief" if turns is HISTORY else "")
    call = '{"name": "weather", "arguments": {"city": "Ü"}}'
    assert assistant["content"] == f"<|tool_call|>[{call}, {call}]<|/tool_call|>"
    assert [turn["role"] for turn in results] == ["tool", "tool"]


@pytest.mark.parametrize("dialect", [Dialect(), Dialect(lists_tools=True), DEEPSEEK, PHI])
@pytest.mark.parametrize(
    "body", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}, {"tool_choice": "auto"}]
)
def test_without_tools_nothing_is_told_and_nothing_looked_for(
    dialect: Dialect, body: dict[str, Any]
) -> None:
    got = chat(dialect, **body)
    assert (rendered(got)["tools"], rendered(got)["messages"]) == (None, HI)
    assert got.output_options is None


def test_reasoning_is_looked_for_where_the_model_reasons() -> None:
    got = chat(Dialect(reasoning="think"), separate_reasoning=False)
    assert got.output_options is not None
    assert (
        got.output_options.calls,
        got.output_options.reasoning,
        got.output_options.separate,
    ) == ("", "think", False)
    assert got.output_options.shown == ("<think>", "</think>")
    turns = [*HI, {"role": "assistant", "content": "<think>so"}]
    going_on = chat(
        Dialect(reasoning="think"), messages=turns, continue_final_message=True
    ).output_options
    assert going_on is not None
    assert going_on.continued == "<think>so"


def function(**more: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f"} | more}]


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": function(name=None)}, "tools[0].function.name"),
        ({"tools": function(name="a b")}, "tools[0].function.name"),
        ({"tools": function(name="a" * 129)}, "tools[0].function.name"),
        ({"tools": function(parameters=[])}, "tools[0].function.parameters"),
        ({"tools": function(parameters={"type": "string"})}, "tools[0].function.parameters.type"),
        ({"tools": function(description=1)}, "tools[0].function.description"),
        ({"tools": function() * 2}, "tools[1].function.name"),
        ({"tools": function() * 129}, "tools"),
        ({"tools": function(description="a" * tool_request.MAX_TOOLS_CHARS)}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"tool_choice": {}}, "tool_choice.function"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS}, "tool_choice.allowed_tools"),
        ({"tool_choice": allowed("none"), "tools": TOOLS}, "tool_choice.allowed_tools.mode"),
        ({"tool_choice": allowed("auto"), "tools": TOOLS}, "tool_choice.allowed_tools.tools"),
        ({"tool_choice": allowed("auto", "g"), "tools": TOOLS}, "tool_choice"),
        ({"tools": function(strict="yes")}, "tools[0].function.strict"),
        ({"functions": [{"name": "a b"}]}, "functions[0].name"),
        ({"functions": [FUNCTION], "tools": TOOLS}, "functions"),
        ({"functions": [FUNCTION], "function_call": "required"}, "function_call"),
        ({"functions": [FUNCTION], "function_call": {}}, "function_call.name"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
)  # fmt: skip
def test_bad_tools_are_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(Dialect(), **body)
    assert caught.value.param == param
    assert not isinstance(caught.value, NotAvailable)


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "web_search"}]},
        {"tools": TOOLS, "tool_choice": {"type": "hosted", "hosted": {"name": "x"}}},
    ],
)
def test_tools_that_are_not_functions_are_not_available(body: dict[str, Any]) -> None:
    with pytest.raises(NotAvailable, match="not available on this server"):
        chat(Dialect(), **body)


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("body", "kind", "parallel"),
    [
        ({"tool_choice": "required"}, "array", True),
        ({"tool_choice": "required", "parallel_tool_calls": False}, "object", False),
        ({"tool_choice": NAMED}, "object", True),
        ({"tool_choice": NAMED, "response_format": {"type": "json_object"}}, "object", True),
    ],
)
def test_a_grammar_forces_calls(body: dict[str, Any], kind: str, parallel: bool) -> None:
    dialect = Dialect(calls="llama3", lists_tools=True, reasoning="think")
    got = chat(dialect, tools=TOOLS, **body)
    assert got.params.grammar is not None
    name, text = got.params.grammar
    assert (name, json.loads(text)["type"]) == ("schema", kind)
    assert got.output_options is not None
    assert (got.output_options.calls, got.output_options.reasoning) == ("json", "think")
    assert got.output_options.parallel is parallel
    assert rendered(got)["tools"] == TOOLS
    assert rendered(got)["kwargs"] == {"add_generation_prompt": True}


def test_long_tools_can_be_forced() -> None:
    tools = function(description="a" * 90_000, parameters=SCHEMA | {"title": "a" * 90_000})
    got = chat(Dialect(), tools=tools, tool_choice="required")
    assert got.params.grammar is not None


def test_calls_of_strict_tools_are_held_to_their_parameters() -> None:
    tools = [{"type": "function", "function": FUNCTION | {"strict": True}}, *function(name="other")]
    got = chat(Dialect(lists_tools=True), tools=tools)
    assert got.params.grammar is not None
    kind, text = got.params.grammar
    trigger, _, forms = text.partition("\n")
    assert (kind, trigger) == ("calls", "<tool_call>")
    assert [(f["schema"], f["end"]) for f in json.loads(forms)] == [
        (SCHEMA | {"unevaluatedProperties": False}, "}"),
        ({"type": "object"}, "}"),
    ]
    assert got.output_options is not None
    assert got.output_options.calls == "hermes"
    assert chat(Dialect(), tools=TOOLS).params.grammar is None
    form = {"type": "json_object"}
    assert chat(Dialect(), tools=tools, response_format=form).params.grammar == ("json", "")


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_tools_that_are_not_allowed_are_not_told(mode: str) -> None:
    other = function(name="other")
    got = chat(Dialect(lists_tools=True), tools=TOOLS + other, tool_choice=allowed(mode, "weather"))
    assert rendered(got)["tools"] == TOOLS
    assert got.output_options is not None
    assert [tool.name for tool in got.output_options.tools] == ["weather"]
    assert (got.params.grammar is not None) is (mode == "required")


@pytest.mark.parametrize("choice", [None, "auto", {"name": "weather"}])
def test_functions_are_tools(choice: Any) -> None:
    history = [
        HI[0],
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "weather", "content": "12"},
    ]
    got = chat(
        Dialect(lists_tools=True), functions=[FUNCTION], function_call=choice, messages=history
    )
    prompt = rendered(got)
    assert prompt["tools"] == TOOLS
    (call,) = prompt["messages"][1]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": {"city": "Ü"}}
    assert prompt["messages"][2] == {"role": "tool", "name": "weather", "content": "12"}
    assert got.functions
    assert (got.params.grammar is not None) is isinstance(choice, dict)
    assert got.output_options is not None
    assert not got.output_options.parallel
    none = chat(Dialect(lists_tools=True), functions=[FUNCTION], function_call="none")
    assert none.output_options is None


def test_no_effort_is_no_thinking() -> None:
    dialect = Dialect(reasoning="think")
    assert rendered(chat(dialect, reasoning_effort="none"))["kwargs"]["enable_thinking"] is False
    got = rendered(chat(dialect, reasoning_effort="high"))["kwargs"]
    assert got == {"reasoning_effort": "high", "add_generation_prompt": True}
    kwargs = {"enable_thinking": True}
    asked = chat(dialect, reasoning_effort="none", chat_template_kwargs=kwargs)
    assert rendered(asked)["kwargs"]["enable_thinking"] is True


def test_calls_cannot_be_continued() -> None:
    with pytest.raises(RequestError, match="results must follow"):
        chat(Dialect(), messages=HISTORY[:3], continue_final_message=True)


def test_a_form_leaves_reasoning_to_the_template_and_a_list_of_tokens_leaves_none() -> None:
    dialect = Dialect(reasoning="think")
    got = chat(dialect, response_format={"type": "json_object"}, max_thinking_tokens=7)
    assert got.output_options is not None
    assert (got.output_options.reasoning, got.params.max_thinking_tokens) == ("think", 7)
    assert rendered(got)["kwargs"] == {"add_generation_prompt": True}
    assert rendered(chat(dialect, allowed_token_ids=[1]))["kwargs"]["enable_thinking"] is False
    with pytest.raises(RequestError, match="exclude each other"):
        chat(dialect, allowed_token_ids=[1], max_thinking_tokens=7)


OWN = "{% if message['role'] == 'tool' %}" + deepseek.CALL + "```json"
LISTING = "{% for t in tools %}{{ t | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    ("templates", "flags", "expected"),
    [
        ({}, (), Dialect()),
        ({"default": "{{ messages }}<tool_call>"}, (), Dialect(calls="qwen25")),
        ({"default": OWN}, (), DEEPSEEK),
        ({"default": OWN}, ("hermes",), Dialect()),
        ({"default": "<|tool|>{{ message['tools'] }}<|/tool|>"}, (), PHI),
        ({"default": LISTING}, (), Dialect(lists_tools=True)),
        ({"default": LISTING + "[TOOL_CALLS]"}, (),
         Dialect(calls="mistral", spelling="mistral list", lists_tools=True)),
        ({"default": LISTING + "[TOOL_CALLS][ARGS]"}, (), Dialect(calls="mistral", lists_tools=True)),
        ({"default": "{{ messages }}", "tool_use": LISTING + "<arg_key>"}, (),
         Dialect(calls="glm47", lists_tools=True)),
        ({"default": "{{ messages }}"}, ("llama3", "qwen3"), Dialect(calls="llama3", reasoning="qwen3")),
        ({"default": "<think></think>"}, (), Dialect(reasoning="think")),
    ],
)  # fmt: skip
def test_dialect_of_a_template(
    templates: dict[str, str], flags: tuple[str, ...], expected: Dialect
) -> None:
    assert dialect_of(templates, *flags) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", None),
        ("{# <think> </think> #}{{ messages }}", None),
        ("{% if x %}<think>{% endif %}", None),
        ("<think>\n\n</think>", "think"),
        ("<\uff5cUser\uff5c><think></think>", "deepseek-r1"),
        ("<\\uff5cUser\\uff5c><think></think>", "deepseek-r1"),
        ("{{ content.split('</think>')[-1] }}", "think"),
        ("{{ '[THINK]' + thinking + '[/THINK]' }}", "mistral"),
        ("◁think▷◁/think▷", "kimi_k2"),
        ("<think></think><|tool_calls_section_begin|>", "kimi_k2"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "gpt-oss"),
    ],
)
def test_reasoning_of_a_template(template: str, expected: str | None) -> None:
    assert detect_format(template) == expected


def test_a_name_needs_no_type() -> None:
    """As text-generation-inference and huggingface_hub have it."""
    untyped = {"function": {"name": TOOLS[0]["function"]["name"]}}  # type: ignore[index]
    asked = [
        chat_request(tools=TOOLS, tool_choice=choice).params.grammar
        for choice in (untyped, {"type": "function", **untyped})
    ]
    assert asked[0] == asked[1]
    assert asked[0] is not None
