"""Fields that give the output a form: what they become, their limits, and that one excludes others."""

from __future__ import annotations

from typing import Any

import pytest

from asyncllm.api.common import response_format
from asyncllm.errors import RequestError
from tests.api.harness import chat_request, completion_request, native_request

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}
TEXT = '{"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}}'


@pytest.mark.parametrize(
    ("body", "want"),
    [({}, None),
     ({"response_format": {"type": "text"}}, None),
     ({"response_format": {"type": "json_object"}}, ("json", "")),
     ({"response_format": {"type": "json_schema", "json_schema": {
         "name": "x", "strict": True, "schema": SCHEMA}}}, ("schema", TEXT)),
     ({"response_format": {"type": "json_object", "schema": SCHEMA}}, ("schema", TEXT)),
     ({"response_format": {"type": "json_object", "value": SCHEMA}}, ("schema", TEXT)),
     ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, ("schema", TEXT)),
     ({"response_format": {"type": "json_object", "json_schema": {"schema": SCHEMA}}},
      ("schema", TEXT)),
     ({"guided_json": SCHEMA}, ("schema", TEXT)),
     ({"guided_json": TEXT}, ("schema", TEXT)),
     ({"guided_json": {}}, ("schema", "{}")),
     ({"guided_regex": "a+"}, ("regex", "a+")),
     ({"guided_choice": ["a", 'b"\\\n']}, ("choice", '["a", "b\\"\\\\\\n"]')),
     ({"structured_outputs": {"choice": ["ü😀"]}}, ("choice", '["ü😀"]')),
     ({"structured_outputs": {"json": SCHEMA}}, ("schema", TEXT)),
     ({"structured_outputs": {"json_object": True}}, ("json", "")),
     ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
      ("compact", '{"type": "object"}')),
     ({"structured_outputs": {"json": TEXT, "disable_any_whitespace": True, "disable_fallback": True}},
      ("compact", TEXT)),
     ({"structured_outputs": {"regex": "a", "disable_any_whitespace": False, "_backend": None}},
      ("regex", "a")),
     ({"structured_outputs": {"json_object": False, "regex": "a"}}, ("regex", "a")),
     ({"structured_outputs": {"grammar": 'root ::= "a"'}}, ("ebnf", 'root ::= "a"')),
     ({"guided_grammar": 'root ::= "a"'}, ("ebnf", 'root ::= "a"')),
     ({"guided_regex": None, "guided_grammar": None, "response_format": {"type": "json_object"}},
      ("json", ""))],
)  # fmt: skip
def test_openai_fields(body: dict[str, Any], want: Any) -> None:
    assert chat_request(**body).params.grammar == want
    assert completion_request(**body).params.grammar == want


@pytest.mark.parametrize(
    ("parameters", "want"),
    [({"regular_constraint": "a+"}, ("regex", "a+")), ({"guided_json": SCHEMA}, ("schema", TEXT)),
     ({"guided_grammar": 'root ::= "a"'}, ("ebnf", 'root ::= "a"')), ({"guided_json": ""}, None),
     ({"guided_grammar": "json"}, ("json", ""))],
)  # fmt: skip
def test_native_fields(parameters: dict[str, Any], want: Any) -> None:
    assert native_request(**parameters).params.grammar == want


@pytest.mark.parametrize(
    ("body", "param"),
    [({"response_format": {"type": "xml"}}, "response_format.type"),
     ({"response_format": {}}, "response_format.type"),
     ({"response_format": "json_object"}, "response_format"),
     ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
     ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
      "response_format.json_schema.schema"),
     ({"response_format": {"type": "json_object", "schema": "x"}}, "response_format.schema"),
     ({"response_format": {"type": "text", "schema": {}}}, "response_format"),
     ({"response_format": {"type": "json_object", "schema": {}, "value": {}}}, "response_format"),
     ({"guided_json": [1]}, "guided_json"),
     ({"guided_json": "\ud800"}, "guided_json"),
     ({"guided_regex": 3}, "guided_regex"),
     ({"guided_regex": "a", "guided_grammar": 'root ::= "a"'}, "guided_grammar"),
     ({"guided_choice": "a"}, "guided_choice"), ({"guided_choice": [""]}, "guided_choice[0]"),
     ({"guided_choice": ["a", 1]}, "guided_choice[1]"), ({"guided_choice": ["\0"]}, "guided_choice[0]"),
     ({"guided_choice": ["a"] * 1025}, "guided_choice"),
     ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
     ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
     ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
     ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
      "structured_outputs.disable_any_whitespace"),
     ({"structured_outputs": {"json": {}, "whitespace_pattern": " ?"}},
      "structured_outputs.whitespace_pattern"),
     ({"structured_outputs": {"json": {}, "disable_additional_properties": True}},
      "structured_outputs.disable_additional_properties"),
     ({"guided_json_object": True}, "guided_json_object"),
     ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "structured_outputs"),
     ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json")],
)  # fmt: skip
def test_bad_values(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat_request(**body)
    assert caught.value.status == 400
    assert caught.value.param == param


def test_sizes_are_limited_and_named() -> None:
    most = response_format.MAX_CHARS
    assert completion_request(guided_regex="a" * most).params.grammar == ("regex", "a" * most)
    for name in ("guided_regex", "guided_grammar", "guided_json"):
        with pytest.raises(RequestError, match=f"{name}: {most + 1} characters, at most {most}"):
            completion_request(**{name: "a" * (most + 1)})
    big = {"type": "json_schema", "json_schema": {"schema": {"title": "x" * most}}}
    with pytest.raises(RequestError, match=f"at most {most}"):
        chat_request(response_format=big)


def test_native_fields_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="exclude each other"):
        native_request(regular_constraint="a", guided_json={})
