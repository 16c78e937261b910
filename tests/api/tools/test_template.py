"""What is read from a chat template, and what is said in its place."""

from __future__ import annotations

import json

import pytest

from asyncllm.api.tools import (
    Tool,
    deepseek,
    detect_format,
    parse_whole,
    system_text,
    template_uses_tools,
)

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


def test_the_system_text_lists_tools_and_shows_a_call_that_is_read() -> None:
    tool = Tool("f", {"type": "object"}, description="does é")
    text = system_text([tool, Tool("g")])
    listed = text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line)["function"]["name"] for line in listed] == ["f", "g"]
    assert json.loads(listed[0])["function"] == {
        "name": "f",
        "description": "does é",
        "parameters": {"type": "object"},
    }
    (call,) = parse_whole("hermes", text, [tool]).calls
    assert (call.name, call.arguments) == ("NAME", '{"KEY": "VALUE"}')
