"""What is read from a chat template, and what is said in its place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.tools import FORMATS, deepseek
from asyncllm.api.parsing.tools.call_grammar import spelling, written
from asyncllm.api.parsing.tools.detect import (
    LIST,
    detect_format,
    system_text,
    template_tells_results,
    template_uses_tools,
    tools_in_system,
)

from .answers import parse_whole

ESCAPED = deepseek.CALL.replace(deepseek.BAR, "\\uff5c").replace(deepseek.SPACE, "\\u2581")


@pytest.mark.parametrize(("template", "format_name"), [
    ("{{ '<tool_call>\\n{\"name\": ' }}", "qwen25"),
    ("{{ '<tool_call>\\n<function=' }}<parameter=x>", "qwen3_coder"),
    ("{{ '<tool_call>' + tc.name }}<arg_key>", "glm47"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3"),
    ('<|eot_id|>{"name": function name, "parameters": dictionary}', "llama3"),
    (deepseek.CALL, "deepseekv3"),
    (ESCAPED, "deepseekv3"),
    ("<|tool_calls_section_begin|><|tool_call_begin|>", "kimi_k2"),
    ("<|channel|>commentary to=functions.", "gpt_oss"),
    ("<|tool|>{{ message['tools'] }}<|/tool|>", "phi4"),
    ("<|im_start|>{{ message.content }}<|im_end|>", None),
    ("{# <tool_call> #}", None),
])  # fmt: skip
def test_detect_format(template: str, format_name: str | None) -> None:
    assert detect_format(template) == format_name


@pytest.mark.parametrize(("template", "uses"), [
    ("{% if tools %}x{% endif %}", True),
    ("{%- if not tools is defined %}x{% endif %}", True),
    ("{{ tools | tojson }}", True),
    ("{%- for tool in tools %}{% endfor %}", True),
    ("{{ 'the tools you have' }} tools", False),
    ("{% if message.tools %}{% endif %}{{ builtin_tools }}", False),
    ("{# tools #}{{ messages }}", False),
    ("", False),
])  # fmt: skip
def test_template_uses_tools(template: str, uses: bool) -> None:
    assert template_uses_tools(template) is uses


@pytest.mark.parametrize(("template", "in_system", "results"), [
    ("{% if 'tools' in message %}{{ message['tools'] }}{% endif %}", True, False),
    ("{{ message.tools }}", True, False),
    ("{{ tools }}{% if message['role'] == 'tool' %}{% endif %}", False, True),
    ("message['tools'] == 'tool' {# {{ message.tools }} #}", False, False),
    ("{% if message.role == \"tool\" %}", False, True),
])  # fmt: skip
def test_where_a_template_takes_tools_and_results(
    template: str, in_system: bool, results: bool
) -> None:
    assert tools_in_system(template) is in_system
    assert template_tells_results(template) is results


@pytest.mark.parametrize("template", ["", "[ARGS]", deepseek.CALL])
@pytest.mark.parametrize("format_name", FORMATS)
def test_the_system_text_shows_calls_of_the_models_format(format_name: str, template: str) -> None:
    text, _ = system_text([Tool("f")], spelling(format_name, template))
    example = text.split("</tools>\n")[1]
    calls = parse_whole(format_name, example, [Tool("NAME")]).calls
    assert {(call.name, call.arguments) for call in calls} == {("NAME", '{"KEY": "VALUE"}')}


@pytest.mark.parametrize("template", ["", "[ARGS]", deepseek.CALL])
@pytest.mark.parametrize("format_name", FORMATS)
def test_what_is_written_is_read_back(format_name: str, template: str) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("f", {"a": "é <b>\n", "n": [1, {"x": None}], "s": "5"}),
        ("g", {"a": "b"}),
    ]
    tools = [Tool(name, {"properties": {"s": {"type": "string"}}}) for name, _ in calls]
    parsed = parse_whole(format_name, written(spelling(format_name, template), calls), tools)
    assert [(c.name, json.loads(c.arguments)) for c in parsed.calls] == calls
    assert (parsed.content, parsed.complete) == ("", True)


def test_the_system_text_lists_tools_and_shows_a_call_that_is_read() -> None:
    tool = Tool("f", {"type": "object"}, description="does é")
    text, told = system_text([tool, Tool("g")])
    assert text.split("<tools>\n")[1].split("\n</tools>")[0] == LIST
    listed = told.splitlines()
    assert [json.loads(line)["function"]["name"] for line in listed] == ["f", "g"]
    assert json.loads(listed[0])["function"] == {
        "name": "f",
        "description": "does é",
        "parameters": {"type": "object"},
    }
    (call,) = parse_whole("hermes", text, [tool]).calls
    assert (call.name, call.arguments) == ("NAME", '{"KEY": "VALUE"}')
