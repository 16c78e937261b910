"""What models write that is not quite the format, and what is made of it."""

from __future__ import annotations

import json
import re

import pytest

from asyncllm.api.parsing.events import Arguments, CallEnd, CallStart, Content, Tool
from asyncllm.api.parsing.output_parser import OutputOptions
from asyncllm.api.parsing.tools import FORMATS, deepseek, make_parser, special_tokens
from asyncllm.api.parsing.tools.call_grammar import CALL_TEXTS, spelling
from tests.speed import quickest

from .answers import parse_whole

TOOLS = [
    Tool("f", {"properties": {"s": {"type": "string"}, "i": {"type": "integer"}}}),
    Tool("g", {}),
]


def calls(format_name: str, text: str) -> list[tuple[str, str, bool]]:
    parsed = parse_whole(format_name, text, TOOLS)
    return [(c.name, c.arguments, c.complete) for c in parsed.calls]


def content(format_name: str, text: str) -> str:
    return parse_whole(format_name, text, TOOLS).content


def test_arguments_stream_while_they_come() -> None:
    p = make_parser("hermes", TOOLS, lambda: "0" * 24)
    assert p.push('Hi <tool_call>{"name": "f", "arguments"') == [Content("Hi")]
    assert p.push(': {"s": "a b') == [
        CallStart(0, "call_" + "0" * 24, "f"),
        Arguments(0, '{"s": "a b'),
    ]
    assert p.push("\\") == []
    assert p.push("u00") == []
    assert p.push("e9") == [Arguments(0, "\\u00e9")]
    assert p.push('"}') == [Arguments(0, '"}'), CallEnd(0, True)]
    assert p.push("}</tool_call>") == []
    assert p.finish() == []


def test_a_string_of_a_tag_format_streams_while_it_comes() -> None:
    p = make_parser("qwen3_coder", TOOLS)
    start, head = p.push("<tool_call><function=f><parameter=s>\n")
    assert (start.name, head) == ("f", Arguments(0, '{"s": '))
    assert p.push("one\n") == [Arguments(0, '"one')]
    assert p.push("two\n</para") == [Arguments(0, "\\ntwo")]
    assert p.push('meter_"') == [Arguments(0, '\\n</parameter_\\"')]
    assert p.push("</parameter></function></tool_call>") == [Arguments(0, '"}'), CallEnd(0, True)]


@pytest.mark.parametrize("call", [
    '{"name": "f"}',
    '{"name": "f", "arguments": null}',
    '{"name": "f", "arguments": ""}',
    '{"name": "f", "arguments": {}}',
    '{"arguments": "{}", "name": "f"}',
    '{"type": "function", "name": "\\u0066", "parameters": {}}',
])  # fmt: skip
def test_no_arguments_are_an_empty_object(call: str) -> None:
    assert calls("hermes", f"<tool_call>{call}</tool_call>") == [("f", "{}", True)]


def test_arguments_in_a_string_are_what_it_holds() -> None:
    text = '<tool_call>{"name": "f", "arguments": "{\\"s\\": \\"\\\\u00e9\\"}"}</tool_call>'
    assert calls("hermes", text) == [("f", '{"s": "\\u00e9"}', True)]


@pytest.mark.parametrize(("written", "meant"), [
    ('{"s": "a\nb\tc\x00"}', "a\nb\tc\x00"),
    ('{"s": "\\d+\\\'"}', "\\d+\\'"),
    ('{"s": "C:\\users"}', "C:\\users"),
    ('{"s": "\\ud83d\\ude00"}', "😀"),
])  # fmt: skip
def test_strings_are_repaired(written: str, meant: str) -> None:
    ((_, arguments, complete),) = calls("kimi_k2", kimi("f:0", written))
    assert complete
    assert json.loads(arguments) == {"s": meant}


@pytest.mark.parametrize("call", [
    "no json", '{"name": "f", "arguments": [1]}', '{"name": "", "arguments": {}}', '{"arguments": {}}',
    '{"name": "f\\ud800", "arguments": {}}', '{"name": "f", "arguments": "\\"x\\""}', "{}", "",
    '{"name": ["f"]}', "[" * 200, '{"name": "f", "x": NaN}',
])  # fmt: skip
def test_a_malformed_call_is_content(call: str) -> None:
    text = f" a <tool_call>{call}</tool_call> b"
    parsed = parse_whole("hermes", text, TOOLS)
    assert (parsed.content, parsed.calls) == (text, ())


def test_a_call_that_breaks_is_not_complete_and_the_rest_is_content() -> None:
    text = 'a <tool_call>{"name": "f", "arguments": {"s": 1, oops}}</tool_call> b'
    parsed = parse_whole("hermes", text, TOOLS)
    assert parsed.content == "a oops}}</tool_call> b"
    assert [(c.arguments, c.complete) for c in parsed.calls] == [('{"s": 1, ', False)]
    assert not parsed.complete


def test_a_malformed_call_does_not_hide_the_next() -> None:
    text = '<tool_call>{"name": <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert content("hermes", text) == '<tool_call>{"name":'
    assert calls("hermes", text) == [("f", "{}", True)]


def test_missing_end_marks_are_forgiven() -> None:
    for tail in ("", "}", "}}", "},]\n", ", }"):
        text = f'<tool_call>{{"name": "f", "arguments": {{"i": 1}}{tail}\n</tool_call> on'
        assert calls("hermes", text) == [("f", '{"i": 1}', True)]
        assert content("hermes", text) == "on"
    text = '<tool_call>{"name": "f", "arguments": {"i": 1}}, oops</tool_call>'
    assert calls("hermes", text) == [("f", '{"i": 1}', True)]
    assert content("hermes", text) == ", oops</tool_call>"
    text = kimi("f:0", "{}").replace("<|tool_call_end|>", "")
    assert parse_whole("kimi_k2", text, TOOLS).complete


def test_finish_reason() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"s": "x"}}</tool_call>'
    whole = text.index("}") + 1
    for parallel in (True, False):
        for length in range(2 * len(text) + 1):
            p = OutputOptions(calls="hermes", tools=tuple(TOOLS), parallel=parallel).parser("none")
            p.take((text * 2)[:length], (), 1)
            p.finish()
            assert p.finish_reason("length") == "length"
            second_is_cut = text.index('{"s"') < length - len(text) < whole
            is_whole = length >= whole and not (parallel and second_is_cut)
            assert p.finish_reason("stop") == ("tool_calls" if is_whole else "stop"), length


def test_unknown_names_are_passed_on_where_a_mark_says_it_is_a_call() -> None:
    assert calls("hermes", '<tool_call>{"name": "h", "arguments": {}}</tool_call>')
    assert calls("llama3", '<|python_tag|>{"name": "h", "parameters": {}}')
    bare = '{"name": "h", "parameters": {}}'
    assert content("llama3", bare) == bare
    assert calls("llama3", '{"name": "f", "parameters": {}}')


@pytest.mark.parametrize("text", [
    '{"name": "f"}', '{"name": "f", "age": 3, "parameters": {}}', "{}", "{{", '{"a": {"name": "f"}}',
    "<|python_tag|>search.call(query=1)", '[{"a": 1}]',
])  # fmt: skip
def test_json_that_is_no_call_stays_content(text: str) -> None:
    assert content("llama3", text) == text


def test_a_semicolon_counts_only_between_calls() -> None:
    call = '{"name": "f", "parameters": {}}'
    assert content("llama3", f"{call}; {call}") == ""
    assert content("llama3", f"{call}; done") == "; done"
    assert len(calls("llama3", f"{call};{call} ; {call}")) == 3


def test_mistral_ids() -> None:
    text = "[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{}[TOOL_CALLS]g{}[TOOL_CALLS]g[CALL_ID]abcDEF123[ARGS]{}"
    ids = [c.id for c in parse_whole("mistral", text, TOOLS, lambda: "0123456789ab" * 2).calls]
    assert ids == ["abcDEF123", "012345678", "012345678"]


def test_kimi_ids() -> None:
    inner = "".join(kimi(head, "{}", section=False) for head in ("functions.f:3", "f:3", "g", "f"))
    text = f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"
    ids = [c.id for c in parse_whole("kimi_k2", text, TOOLS).calls]
    assert ids == ["functions.f:3", "functions.f:4", "functions.g:2", "functions.f:5"]
    assert calls("kimi_k2", text)[2] == ("g", "{}", True)


def kimi(head: str, arguments: str, *, section: bool = True) -> str:
    call = f"<|tool_call_begin|>{head}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
    return f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>" if section else call


def test_a_section_without_calls_is_content() -> None:
    for format_name, text in (
        ("kimi_k2", "<|tool_calls_section_begin|><|tool_calls_section_end|>"),
        ("deepseekv3", deepseek.CALLS + deepseek.CALLS_END),
        ("mistral", "[TOOL_CALLS] []"),
    ):
        assert content(format_name, text) == text


def test_qwen3_coder_without_the_outer_tag() -> None:
    text = "so:\n<function=f><parameter=i>5</parameter></function>"
    assert calls("qwen3_coder", text) == [("f", '{"i": 5}', True)]
    assert content("qwen3_coder", text) == "so:"
    assert calls("qwen3_coder", f"{text}\n</tool_call>") == [("f", '{"i": 5}', True)]
    assert content("qwen3_coder", f"{text}\n</tool_call>") == "so:"


def test_a_parameter_that_the_stream_cuts_is_not_made_json() -> None:
    text = "<tool_call><function=f><parameter=s>rm -rf /tmp"
    assert calls("qwen3_coder", text) == [("f", '{"s": "rm -rf /tmp', False)]
    text += "</function>"  # which may be part of the value, and more of it to come
    assert calls("qwen3_coder", text) == [("f", '{"s": "rm -rf /tmp</function>', False)]
    assert calls("qwen3_coder", f"{text}</tool_call>") == [("f", '{"s": "rm -rf /tmp"}', True)]


@pytest.mark.parametrize("format_name", ["llama3", "json"])
def test_json_that_is_no_call_is_read_once(format_name: str) -> None:
    inside = '{"name": "f", "parameters": {}}'
    text = '{"arguments": ' * 95 + f'{{"a": [{inside}, ' + "1," * 20_000
    assert quickest(lambda: parse_whole(format_name, text, [Tool("f")]), 1, 3) < 1, "it took 4 s"
    found = parse_whole(format_name, text, [Tool("f")])
    assert (found.content, found.calls) == (text, ())
    assert parse_whole(format_name, f'{{"a": {inside}}}', [Tool("f")]).calls, "as it always was"


@pytest.mark.parametrize("number", ["1e999", "-1" + "0" * 5000])
def test_a_number_that_readers_do_not_take_breaks_a_call(number: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {{"n": {number}}}}}</tool_call>'
    assert calls("hermes", text) == [("f", '{"n": ', False)]
    assert calls("hermes", text.replace(number, "1e9")) == [("f", '{"n": 1e9}', True)]


@pytest.mark.parametrize(("schema", "written", "value"), [
    ({"type": "string"}, "5", "5"),
    ({"type": "string"}, "null", "null"),
    ({"type": "integer"}, "5", 5),
    ({"type": "integer"}, "5.0", 5.0),
    ({"type": "integer"}, "5.5", "5.5"),
    ({"type": "integer"}, "five", "five"),
    ({"type": "number"}, "5", 5),
    ({"type": "number"}, "1e999", "1e999"),
    ({"type": "integer"}, "1" * 400, "1" * 400),
    ({"type": "array"}, "[" * 200 + "]" * 200, "[" * 200 + "]" * 200),
    ({"type": "array"}, "[" * 100 + "]" * 100, json.loads("[" * 100 + "]" * 100)),
    ({"type": "number"}, "NaN", "NaN"),
    ({"type": "boolean"}, "True", True),
    ({"type": "boolean"}, "false", False),
    ({"type": "boolean"}, "1", "1"),
    ({"type": "array"}, '["a", {"b": 1}]', ["a", {"b": 1}]),
    ({"type": "object"}, "{oops", "{oops"),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": ["string", "null"]}, "x", "x"),
    ({"type": ["string", "null"]}, "5", "5"),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "5", 5),
    ({"$ref": "#/$defs/n"}, "7", 7),
    ({"enum": [1, 2]}, "2", 2),
    ({"enum": ["1", "2"]}, "2", "2"),
    ({"const": True}, "true", True),
    ({}, "5", 5),
    ({}, '"quoted"', '"quoted"'),
    ({}, "plain", "plain"),
    ({"type": 3}, "5", 5),
    ({"$ref": "#/properties/x"}, "5", 5),
])  # fmt: skip
def test_values_get_the_type_of_the_schema(schema: object, written: str, value: object) -> None:
    tool = Tool("f", {"properties": {"x": schema}, "$defs": {"n": {"type": "integer"}}})
    for format_name, text in (
        ("qwen3_coder", f"<tool_call><function=f><parameter=x>{written}</parameter></function></tool_call>"),
        ("glm47", f"<tool_call>f<arg_key>x</arg_key><arg_value>{written}</arg_value></tool_call>"),
    ):  # fmt: skip
        (call,) = parse_whole(format_name, text, [tool]).calls
        got = json.loads(call.arguments)
        assert got == {"x": value}
        assert type(got["x"]) is type(value)


def test_long_arguments_take_linear_time() -> None:
    """A second copy of the text per push would take minutes."""
    p = make_parser("hermes", TOOLS)
    p.push('<tool_call>{"name": "f", "arguments": {"s": "')
    for _ in range(100_000):
        p.push("abcdefgh")
    assert len(p._scan.buf) < 100
    p.push('"}}</tool_call>')
    p.finish()
    assert p.calls[0].complete
    assert len(p.calls[0].arguments) == 800_000 + len('{"s": ""}')


@pytest.mark.parametrize("format_name", FORMATS)
def test_special_tokens_are_those_of_the_spelling(format_name: str) -> None:
    call = CALL_TEXTS[spelling(format_name)]
    text = "".join([call.opens, call.begun(TOOLS[0].name), call.end, call.closes])
    marks = set(re.findall(r"<[|/\uff5c]?[\w\u2581]+[|\uff5c]?>|\[[A-Z_]+\]", text))
    assert marks <= set(special_tokens(format_name)) | {"</function>"}
