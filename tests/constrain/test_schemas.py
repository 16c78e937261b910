"""JSON schemas: whatever is accepted is enforced, and what it allows can come."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.tools.call_grammar import call_forms
from asyncllm.api.parsing.tools.schema import call_schema
from asyncllm.constrain.llguidance_backend import GrammarEngine
from asyncllm.errors import RequestError
from tests.constrain.walks import allowed, byte_grammars, matcher, takes, walk, written

DATA = Path(__file__).parents[1] / "data"
API_SCHEMAS = json.loads((DATA / "api_schemas.json").read_text())
# keyword, description, schema, valid instances, invalid ones
Case = tuple[str, str, dict[str, Any], list[Any], list[Any]]
SUITE: list[Case] = json.loads((DATA / "json_schema_suite.json").read_text())
LEAST_ACCEPTED = 0.75  # of the suite, whose every fourth schema is made of what is refused
LEAST_TAKEN = 0.93  # of the suite's valid instances, which like quoted mailboxes and 1.0


@pytest.fixture(scope="module")
def grammars() -> GrammarEngine:
    return byte_grammars()


def validator(schema: Any) -> Any:
    cls = jsonschema.validators.validator_for(schema)
    return cls(schema, format_checker=cls.FORMAT_CHECKER)


def test_the_suite_of_json_schema(grammars: GrammarEngine) -> None:
    accepted = taken = valid = 0
    wrong = []
    for keyword, what, schema, good, bad in SUITE:
        try:
            at = matcher(grammars, "schema", json.dumps(schema))
        except RequestError:
            continue
        accepted += 1
        check, rng = validator(schema), random.Random(1)
        outs = [out for _ in range(10) if (out := walk(at, rng, 400)) is not None]
        if "\\c" not in json.dumps(schema) and "\\p" not in json.dumps(schema):  # not of Python
            wrong += [(keyword, what, out) for out in outs if not check.is_valid(json.loads(out))]
        wrong += [(keyword, what, v) for v in bad if takes(at, written(v, schema))]
        valid += len(good)
        taken += sum(takes(at, written(value, schema)) for value in good)
    assert wrong == []
    assert accepted / len(SUITE) > LEAST_ACCEPTED
    assert taken / valid > LEAST_TAKEN


@pytest.mark.parametrize("schema", API_SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_random_outputs_are_valid(grammars: GrammarEngine, schema: Any) -> None:
    at = matcher(grammars, "schema", json.dumps(schema))
    rng = random.Random(2)
    outs = [walk(at, rng) for _ in range(10)]
    assert sum(out is not None for out in outs) > 5
    for out in outs:
        if out is not None:
            validator(schema).validate(json.loads(out))


class _Many:
    """hypothesis-jsonschema's way to ask for one element more, of a Hypothesis that has another."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._many = MANY(*args, **kwargs)
        self._many.__enter__()
        self._elements: Iterator[None] = iter(self._many)

    def more(self) -> bool:
        for _ in self._elements:
            return True
        self._many.__exit__(None, None, None)
        return False

    def reject(self) -> None:
        self._many.reject()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hypothesis_jsonschema import _from_schema, from_schema
MANY = _from_schema.cu.many


def test_valid_values_can_come(grammars: GrammarEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(MANY, "more"):
        names = {name: getattr(_from_schema.cu, name) for name in dir(_from_schema.cu)}
        monkeypatch.setattr(_from_schema, "cu", SimpleNamespace(**{**names, "many": _Many}))
    seen, missed = 0, []
    for schema in API_SCHEMAS:
        at, check = matcher(grammars, "schema", json.dumps(schema)), validator(schema)

        values: list[Any] = []

        def keep(value: Any) -> None:
            values.append(value)  # noqa: B023 (it runs before the next turn)

        if any("$ref" in text for text in json.dumps(schema).split('"')):
            continue  # recursive ones it cannot generate
        run = given(from_schema(schema))(keep)
        run = settings(max_examples=20, database=None, deadline=None, phases=[Phase.generate],
                       suppress_health_check=list(HealthCheck))(run)  # fmt: skip
        seed(1)(run)()
        texts = [written(value, schema) for value in values if check.is_valid(value)]
        seen += len(texts)
        missed += [text for text in texts if not takes(at, text)]
    assert seen > 500
    assert len(missed) <= 0.05 * seen, missed[:5]


# -- exact over all of Unicode ------------------------------------------------------------------

TEXT = st.text() | st.text(st.characters(categories=["Cs"]), max_size=1)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def forced(grammars: GrammarEngine, kind: str, text: str) -> str:
    """The only output there is."""
    at = matcher(grammars, kind, text)
    out = b""
    while True:
        (token,) = allowed(at)
        out += bytes([token])
        if at.accept(token):
            return out.decode()


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(ANY)
def test_a_value_that_a_schema_forces_comes_back(value: Any) -> None:
    grammars = byte_grammars()
    for schema in ({"const": value}, {"enum": [value]}):
        assert json.loads(forced(grammars, "schema", json.dumps(schema))) == value
    schema = {"type": "object", "properties": {"a": {"const": value}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    assert json.loads(forced(grammars, "schema", json.dumps(schema))) == {"a": value}


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(TEXT)
def test_names_that_a_schema_forces_come_back(name: str) -> None:
    schema = {"type": "object", "properties": {name: {"const": name}}, "required": [name],
              "additionalProperties": False}  # fmt: skip
    grammars = byte_grammars()
    assert json.loads(forced(grammars, "schema", json.dumps(schema))) == {name: name}
    # as the arguments of a tool: what comes first is white space and the tool's name
    source = call_forms("hermes", [Tool("f", schema, strict=True)])
    at = matcher(grammars, "calls", source)
    spelled = f'\n{{"name": "f", "arguments": {json.dumps({name: name}, ensure_ascii=False)}}}'
    if name.isprintable() and "\\" not in spelled:
        assert takes(at, spelled)
        assert not takes(at, spelled.replace(f'"{name}": ', f'"{name}x": '))


def test_every_character_is_itself(grammars: GrammarEngine) -> None:
    """All of the planes that have characters, and the ends of each of the others, in texts of some
    thousands each."""
    ends = [plane + end for plane in range(0x40000, 0x110000, 0x10000) for end in (0, 0xE000)]
    for first in (*range(0, 0x40000, 0x2000), *ends):
        # two halves side by side would be one character in JSON
        apart = "-" if first in (0xC000, 0xE000) else ""
        text = apart.join(map(chr, range(first, first + 0x2000)))
        at = matcher(grammars, "schema", json.dumps({"const": text}))
        spelled = b"".join(
            (json.dumps(c) if "\ud800" <= c <= "\udfff" else json.dumps(c, ensure_ascii=False))[
                1:-1
            ].encode()
            for c in text
        )
        assert not at.begin(b'"' + spelled[:-1]) or allowed(at) == [spelled[-1]]
        assert not at.accept(spelled[-1])
        assert (allowed(at), at.accept(ord('"'))) == ([ord('"')], True)


@pytest.mark.parametrize(
    ("told", "value"),
    [({"not": {"const": {}}}, {"m": 1}),
     ({"not": {"type": "object", "additionalProperties": False}}, {"m": 1}),
     ({"not": {"type": "object", "patternProperties": {"^a": {"type": "string"}}}}, {"a": 1}),
     ({"$ref": "#/$defs/x"}, {"m": 1}),
     ({"type": "object", "properties": {"m": {"not": {"const": {}}}}}, {"m": {"a": 1}})],
)  # fmt: skip
def test_one_of_knows_more_than_what_can_be_told(
    grammars: GrammarEngine, told: Any, value: Any
) -> None:
    """Opposites are narrower than they should be: values of both schemas are not of one alone."""
    schema = {"oneOf": [{"type": "object"}, told], "$defs": {"x": {"not": {"const": {}}}}}
    assert not validator(schema).is_valid(value)
    try:
        at = matcher(grammars, "schema", json.dumps(schema))
    except RequestError:
        return
    assert not takes(at, json.dumps(value))


# -- strings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [({"type": "string", "maxLength": 2}, ['"\\n\\n"', '"\\u00e9\\""', '"\\ud83d\\ude00é"', '"😀😀"'],
      ['"\n"', '"\0"', '"\t"', '"\\n\\n\\n"', '"""', '"\\ud83d"', '"\\x"']),
     ({"type": "string", "pattern": '^[^a]{2}$'}, ['"\\"\\\\"', '"\\u0000\\n"'], ['"""', '"\\a"', '"\n\n"']),
     ({"type": "string", "pattern": ".", "maxLength": 1}, ['"\\t"', '"x"'], ['"\t"', '"\\\\\\\\"', '""']),
     ({"type": "string", "pattern": "^a+$", "minLength": 2, "maxLength": 3}, ['"aa"', '"aaa"'], ['"a"', '"aaaa"']),
     ({"type": "string", "format": "date", "pattern": "^2"}, ['"2024-02-29"'],
      ['"1999-01-01"', '"2023-02-29"', '"2023-02-31"', '"2023-13-01"', '"2023-04-31"']),
     ({"type": "string", "format": "time"}, ['"23:59:59Z"'], ['"25:00:00Z"', '"24:00:00Z"', '"12:60:00Z"']),
     ({"type": "string", "format": "ipv4", "maxLength": 7}, ['"1.2.3.4"'], ['"1.2.3.256"', '"10.0.0.1"']),
     ({"type": "string", "format": "ipv6"}, ['"::1"', '"1::8"', '"::ffff:1.2.3.4"'], ['"1::2::3"', '"12345::"']),
     ({"type": "string", "pattern": r"^[^\S\n]*x[^\d]$"}, ['" \\tx\\n"', '"xa"'], ['"\\nxa"', '"\\u001cxa"', '"\u00a0xa"', '"x\u0663"', '"x1"']),
     # zod's email (shorter), pydantic's Decimal, a password
     ({"pattern": r"^(?!\.)(?!.*\.\.)([a-z.]*)[a-z]@([a-z]+\.)+[a-z]{2,}$"}, ['"a.b@c.de"'], ['".a@c.de"', '"a..b@c.de"', '"a@c"']),
     ({"pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, ['"-1.5"', '".5"'], ['"+."', '""', '"1.5.1"']),
     ({"pattern": r"^(?=.*[)A-Z])(?=.*(\d|\)))(?:.|\n){3,}$"}, ['"aA1"', '")))"'], ['"aA"', '"aa1"', '"AAA"']),
     ({"type": "string", "format": "x-unknown"}, ['"anything"'], ["1"])],
)  # fmt: skip
def test_strings(grammars: GrammarEngine, schema: Any, good: list[str], bad: list[str]) -> None:
    at = matcher(grammars, "schema", json.dumps(schema))
    assert [text for text in good if not takes(at, text)] == []
    assert [text for text in bad if takes(at, text)] == []


@pytest.mark.parametrize(
    ("gone", "good", "bad"),
    [([1], ["-1", "0", "11"], ["1"]),
     ([0, -2.5], ["2.5", "-2", "0.5"], ["0", "-0", "-0.0", "-2.5", "-2.50"])],
)  # fmt: skip
def test_a_number_that_must_not_come_leaves_that_of_the_other_sign(
    grammars: GrammarEngine, gone: list[float], good: list[str], bad: list[str]
) -> None:
    at = matcher(grammars, "schema", json.dumps({"type": "number", "not": {"enum": gone}}))
    assert [text for text in good if not takes(at, text)] == []
    assert [text for text in bad if takes(at, text)] == []


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 257), (257, 257), (200, 300), (255, 1000), (300, None), (600, 700), (0, 1024)],
)
def test_long_strings_are_counted_to_the_character(
    grammars: GrammarEngine, low: int, high: int | None
) -> None:
    told = {"minLength": low} | ({} if high is None else {"maxLength": high})
    at = matcher(grammars, "schema", json.dumps({"type": "string", **told}))
    for num in {
        0,
        255,
        256,
        257,
        511,
        512,
        513,
        768,
        low - 1,
        low,
        high or 900,
        (high or 900) + 1,
    } - {-1}:
        fits = low <= num <= (num if high is None else high)
        assert takes(at, f'"{chr(92) * 2 * num}"') == fits, num


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [({"type": "array", "uniqueItems": False, "items": {"enum": [1]}}, "[1, 1]", "[2]"),
     ({"type": "integer", "multipleOf": 1}, "7", "7.5"), ({"type": "number", "multipleOf": 1.0}, "7", "7.5"),
     ({"enum": [{"a": 1}], "properties": {"a": {}}, "unevaluatedProperties": False}, '{"a": 1}', "{}"),
     ({"type": "number", "exclusiveMinimum": 10**12}, "1000000000001", "1000000000000"),
     ({"type": "string", "maxLength": 2**53 - 1, "pattern": "^a"}, '"ab"', '"b"'),
     ({"type": "array", "maxItems": 2**53 - 1}, "[1]", "{}"), ({"type": "object", "maxProperties": 2**53 - 1}, '{"a": 1}', "[]"),
     ({"type": "object", "propertyNames": {"maxLength": 2**53 - 1}}, '{"a": 1}', "[]"),
     ({"type": "integer", "multipleOf": 0.5}, "7", "7.5"), ({"type": "integer", "divisibleBy": 1}, "7", "7.5"),
     ({"type": "array", "contains": {"enum": [1]}, "minContains": 0, "items": {"type": "null"}}, "[null]", "[1]"),
     ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"enum": [1]}}}, "1", "2"),
     ({"$ref": "#/$defs/Box%3Cint%3E", "$defs": {"Box<int>": {"enum": [1]}}}, "1", "2")],
    ids=lambda value: json.dumps(value)[:40],
)  # fmt: skip
def test_what_says_nothing_is_not_refused(
    grammars: GrammarEngine, schema: Any, good: str, bad: str
) -> None:
    at = matcher(grammars, "schema", json.dumps(schema))
    assert takes(at, good)
    assert not takes(at, bad)


@pytest.mark.parametrize(
    ("schema", "why"),
    [({"items": {"$ref": "http://example.com/x"}}, "another document: it is not fetched, at #/items"),
     ({"properties": {"a": {"uniqueItems": True}}}, "uniqueItems, which cannot be enforced"),
     ({"type": "integer", "multipleOf": 3}, "multipleOf"), ({"contains": {}}, "contains"),
     ({"format": "regex"}, "has format"), ({"pattern": "(?<=a)b"}, "look-around"),
     ({"pattern": "^(?!a)b|c"}, "look-around"), ({"pattern": "^a(?!b)"}, "look-around"), ({"pattern": "^(?!a"}, "look-around"),
     ({"pattern": "^(?!(?=a)b)c"}, "look-around"),
     ({"type": "string", "const": 1}, "no value at all"), ({"minimum": 3, "maximum": 2, "type": "number"}, "no value"),
     ({"type": "string", "pattern": "^a$", "minLength": 2}, "no value at all"),
     ({"type": "object", "required": ["a"], "additionalProperties": False}, "no value at all"),
     ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no value at all"),
     ({"$ref": "#"}, "refers to itself"), ({"type": 3}, "a type that is neither"),
     ({"not": {"type": "strnig"}}, "unknown type 'strnig' at #/not"), ({"not": {"type": "any"}}, "no value at all"),
     ({"enum": [1, {"a": 1}], "unevaluatedProperties": False}, "unevaluatedProperties, which cannot"),
     ({"anyOf": [{"const": [1]}], "unevaluatedItems": {"type": "string"}}, "unevaluatedItems, which cannot"),
     ({"not": {"required": [1]}}, "required that is no list of names"),
     ({"properties": []}, "properties that are no object"), ({"enum": 3}, "an enum that is no list"),
     ({"minLength": -1}, "minLength -1, which is no count"), ({"anyOf": []}, "anyOf that is no list")],
    ids=lambda value: json.dumps(value)[:40],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_with_its_place(
    grammars: GrammarEngine, capfd: pytest.CaptureFixture[str], schema: Any, why: str
) -> None:
    with pytest.raises(RequestError, match="JSON schema") as caught:
        grammars.build("schema", json.dumps(schema))
    assert why in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_properties_beyond_those_named_come_last_and_end(grammars: GrammarEngine) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}}
    at = matcher(grammars, "schema", json.dumps(schema))
    assert takes(at, '{"b": 1, "a": 2, "z": [], "y": {}}')
    assert not takes(at, '{"a": 1, "b": 2}')
    assert not takes(at, '{"z": 1, "b": 2}')
    assert not takes(at, '{"z": 1, "\\u0062": "no number"}')
    many = ", ".join(f'"x{i}": 0' for i in range(33))
    assert not takes(at, f"{{{many}}}")


def test_keys_that_are_counted_on_differ(grammars: GrammarEngine) -> None:
    at = matcher(grammars, "schema", '{"type": "object", "minProperties": 3}')
    rng = random.Random(0)
    outs = [out for _ in range(20) if (out := walk(at, rng)) is not None]
    assert outs
    assert all(len(json.loads(out)) >= 3 for out in outs)


def test_references_of_forced_calls_hold(grammars: GrammarEngine) -> None:
    kinds = {"a": "integer", "b": "null"}  # of what both tools call by one name
    tools = [
        Tool(name, {"$id": "own"} | {
            "properties": {"example": {"$ref": "#/$defs/x"}, "more": {"$ref": "#"}},
            "$defs": {"x": {"type": kind}},
        })
        for name, kind in kinds.items()
    ]  # fmt: skip
    at = matcher(grammars, "schema", json.dumps(call_schema(tools, parallel=False)))
    for name, value, fits in (
        ("a", 1, True),
        ("b", None, True),
        ("a", None, False),
        ("b", 1, False),
    ):
        call = {"name": name, "arguments": {"example": value, "more": {"example": value}}}
        assert takes(at, json.dumps(call)) == fits


def test_two_schemas_of_one_name_are_refused(grammars: GrammarEngine) -> None:
    schema = {"$defs": {kind: {"$id": "http://a/b", "type": kind} for kind in ("null", "string")}}
    with pytest.raises(
        RequestError, match=r"second schema of the .id 'http://a/b' at #/.defs/string"
    ):
        grammars.build("schema", json.dumps(schema))
