"""Grammars with the embedded model's vocabulary: what can come, what is refused, what is kept."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from asyncllm.api.common.response_format import choice
from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.tools import FORMATS, make_parser, special_tokens
from asyncllm.api.parsing.tools.call_grammar import CALL_TEXTS, call_forms, spelling
from asyncllm.constrain import llguidance_backend as engine
from asyncllm.constrain.llguidance_backend import GrammarEngine, Matcher, TooSlow
from asyncllm.errors import RequestError, ServerBusy
from asyncllm.text import ModelTokenizer, load_tokenizer
from tests.constrain import walks

VOCAB = 49152
EOS = 2


@pytest.fixture(scope="module")
def text(demo_dir: Path) -> ModelTokenizer:
    return load_tokenizer(str(demo_dir))


@pytest.fixture(scope="module")
def pieces(text: ModelTokenizer) -> list[bytes]:
    return [b"" if i in text.special else piece for i, piece in enumerate(text.pieces)]


@pytest.fixture
def grammars(pieces: list[bytes]) -> GrammarEngine:
    return GrammarEngine(pieces, VOCAB, (EOS,))


def start(grammars: GrammarEngine, kind: str, source: str) -> Matcher:
    grammars.keep(kind, source, grammars.build(kind, source))
    matcher = grammars.constrain(kind, source)
    matcher.start()
    return matcher


def allowed(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), bitorder="little")
    return list(np.flatnonzero(bits).tolist())


def follow(
    matcher: Matcher, pieces: list[bytes], choose: Callable[[list[int]], int], most: int = 4000
) -> tuple[bytes, bool]:
    """(output, whether it is whole) of a model that likes what ``choose`` takes."""
    out = b""
    for _ in range(most):
        token = choose(allowed(matcher))
        if token == EOS:
            return out, True
        out += pieces[token]
        if matcher.accept(token):
            return out, True
    return out, False


def liking(pieces: list[bytes], pattern: bytes) -> Callable[[list[int]], int]:
    """A model that chooses the longest piece matching ``pattern`` wherever it can."""
    loved = re.compile(pattern)

    def choose(tokens: list[int]) -> int:
        good = [t for t in tokens if loved.fullmatch(pieces[t])]
        # else what ends soonest, so that only the loved pieces can go on without end
        ends = [t for t in tokens if re.fullmatch(rb'[\]}",: ]+|"', pieces[t])]
        return max(good or ends or tokens, key=lambda t: (len(pieces[t]), t))

    return choose


SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer"},
    {"type": "number"},
    {"type": "integer", "minimum": 3},
    {"type": "number", "exclusiveMinimum": 0.5},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
    {"type": "object", "properties": {"[0-9]*": {"type": "integer"}, "b": {"enum": ["[0-9]*", 1]}},
     "required": ["[0-9]*", "b"]},
    {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"],
     "$defs": {"n": {"anyOf": [{"type": "null"}, {"type": "number"}]}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
@pytest.mark.parametrize("loved", [rb"[0-9]+", rb"\s+"], ids=["digits", "blanks"])
def test_no_number_and_no_white_space_goes_on_for_ever(
    grammars: GrammarEngine, pieces: list[bytes], schema: dict[str, Any], loved: bytes
) -> None:
    matcher = start(grammars, "schema", json.dumps(schema))
    out, whole = follow(matcher, pieces, liking(pieces, loved), 300)
    assert whole, out[:200]
    jsonschema.validate(json.loads(out), schema)


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
@pytest.mark.parametrize("seed", range(3))
def test_random_outputs_are_valid(
    grammars: GrammarEngine, pieces: list[bytes], schema: dict[str, Any], seed: int
) -> None:
    matcher = start(grammars, "schema", json.dumps(schema))
    out, whole = follow(matcher, pieces, random.Random(seed).choice)
    assert whole
    jsonschema.validate(json.loads(out), schema)


@pytest.mark.parametrize(
    "schema",
    [*SCHEMAS, {"type": "object"}, {"const": {"a": [1, {"b": "c, d: e"}], "f": {}}},
     {"properties": {"a": {"enum": [[1, 2], {"x": [None, True]}]}}, "required": ["a"], "additionalProperties": False},
     {"prefixItems": [True, {"type": "object", "patternProperties": {"^x": {"type": "array"}}}], "minItems": 3}],
    ids=json.dumps,
)  # fmt: skip
def test_compact_json_has_no_white_space(
    grammars: GrammarEngine, pieces: list[bytes], schema: dict[str, Any]
) -> None:
    matcher = start(grammars, "compact", json.dumps(schema))
    ends = [t for t in range(VOCAB) if pieces[t] and pieces[t].strip(b' ]}"') == b""]
    rng, num = random.Random(3), 0

    def choose(tokens: list[int]) -> int:
        nonlocal num
        num += 1
        soon = [t for t in tokens if t in ends or t == EOS]
        return rng.choice(soon if num > 40 and soon else tokens)

    out, whole = follow(matcher, pieces, choose)
    assert whole
    value = json.loads(out)
    jsonschema.validate(value, schema)
    blank = re.sub(rb'"(\\.|[^"\\])*"', b"", out)
    assert not re.search(rb"\s", blank), out


def test_numbers_are_finite(grammars: GrammarEngine, pieces: list[bytes]) -> None:
    matcher = start(grammars, "schema", '{"type": "number"}')
    out, _ = follow(matcher, pieces, liking(pieces, rb"[0-9]+|[eE]|\."), 300)
    assert math.isfinite(float(out))


def test_json_is_an_object(grammars: GrammarEngine, pieces: list[bytes]) -> None:
    matcher = start(grammars, "json", "")
    assert all(pieces[t].startswith(b"{") for t in allowed(matcher))


def test_regex_ends_as_soon_as_nothing_else_can_follow(
    grammars: GrammarEngine, text: ModelTokenizer, pieces: list[bytes]
) -> None:
    matcher = start(grammars, "regex", r"(yes|no)!")
    ids = list(text.encode("yes!", False))
    assert [matcher.accept(i) for i in ids] == [False] * (len(ids) - 1) + [True]
    matcher = start(grammars, "regex", r"a+")
    (a,) = text.encode("a", False)
    assert not matcher.accept(a)
    assert EOS in allowed(matcher)
    assert matcher.accept(EOS)


CHOICES = ["a", "ab", 'q"\\', "line\nbreak\t\x01", "ü😀", "[x]|(y)"]


@pytest.mark.parametrize("wanted", CHOICES)
def test_each_choice_can_come_as_it_is(
    grammars: GrammarEngine, pieces: list[bytes], text: ModelTokenizer, wanted: str
) -> None:
    form = choice(CHOICES)
    assert form is not None
    likes = iter(text.encode(wanted, False))
    out, whole = follow(start(grammars, *form), pieces, lambda some: next(likes, EOS))
    assert (out.decode(), whole) == (wanted, True)
    out, whole = follow(start(grammars, *form), pieces, random.Random(1).choice)
    assert (out.decode() in CHOICES, whole) == (True, True)


def test_characters_may_be_cut_by_tokens(grammars: GrammarEngine, pieces: list[bytes]) -> None:
    matcher = start(grammars, "ebnf", 'root ::= "😀é" | "漢字"')
    out, whole = follow(matcher, pieces, lambda tokens: min(tokens, key=lambda t: len(pieces[t])))
    assert whole
    assert out.decode() in ("😀é", "漢字")


def test_a_token_against_the_grammar_is_an_error(
    grammars: GrammarEngine, text: ModelTokenizer
) -> None:
    matcher = start(grammars, "regex", "a")
    with pytest.raises(RequestError, match="does not continue"):
        matcher.accept(text.encode("b", False)[0])


def test_special_tokens_and_ids_beyond_the_tokenizer_never_come(
    text: ModelTokenizer, pieces: list[bytes]
) -> None:
    wide = GrammarEngine(pieces, VOCAB + 45, (EOS,))
    matcher = start(wide, "regex", r"(.|\n)*")
    some = set(allowed(matcher))
    assert max(some) < VOCAB
    assert some & text.special == {EOS}
    assert len(matcher.mask()) == 4 * -(-(VOCAB + 45) // 32)


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [("regex", "((", "unclosed parenthesis"), ("regex", "a{2,1}", "out of order"), ("regex", "a**", "repeats a repetition"),
     ("regex", r"a\bc", "word boundaries"), ("regex", "(?=a)b", "look-around"),
     ("regex", "a^b", "an anchor inside"), ("regex", "[^\\s\\S]", "no text at all"),
     ("ebnf", "root ::= foo", 'no rule for "foo"'), ("ebnf", 'x ::= "a"', "no rule root"),
     ("ebnf", 'root ::= "a" root', "never ends"), ("ebnf", 'root ::= "a', "closing quote in line 1"),
     ("ebnf", "root ::= (", "unclosed parenthesis"), ("ebnf", "root ::= $", "means nothing"),
     ("schema", '{"type": "foo"}', "unknown type 'foo' at #"), ("schema", "{", "not valid JSON"),
     ("schema", '{"$ref": "#/nope"}', "nope"),
     ("schema", '{"items": {"$ref": "http://a.b/c"}}', "another document: it is not fetched, at #/items"),
     ("schema", '{"properties": {"a": {"multipleOf": 3}}}', "multipleOf, which cannot be enforced"),
     ("schema", '{"type": "string", "enum": [1]}', "no value at all fits"),
     ("schema", '{"minimum": 1e999}', "beyond double precision"),
     ("schema", '{"const": 1e-99999999999999999999}', "beyond double precision"),
     ("schema", '{"allOf": [{}], "$ref": "#/allOf/' + "1" * 5000 + '"}', "points to nothing"),
     ("schema", json.dumps({f"a{i}": {"$ref": f"#/a{i + 1}"} for i in range(2000)} | {"a2000": {}, "$ref": "#/a0"}),
      "references are nested too deeply"),
     ("regex", "a{12345678901}", "'{12345678901}' beyond"), ("ebnf", 'root ::= "a"{1,12345678901}', "beyond"),
     ("schema", '{"items":' * 70 + "{}" + "}" * 70, "nested more than 64"),
     ("schema", '{"a":' * 20_000 + "{}" + "}" * 20_000, "nested more than 64")],
)  # fmt: skip
def test_what_cannot_be_compiled_says_why(
    grammars: GrammarEngine, kind: str, source: str, message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        grammars.build(kind, source)
    assert caught.value.status == 400
    assert "x{" not in caught.value.message, "nothing of what the engine was told"


def test_names_and_values_are_no_keywords(grammars: GrammarEngine) -> None:
    schema = {"type": "object", "properties": {"not": {"enum": ["if"]}}, "default": {"if": 1}}
    grammars.build("schema", json.dumps(schema))


def test_the_least_used_grammar_makes_room(grammars: GrammarEngine, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "MAX_KEPT", 2)
    for source in ("a", "b"):
        start(grammars, "regex", source)
    grammars.constrain("regex", "a")
    start(grammars, "regex", "c")
    assert [("regex", s) in grammars for s in "abc"] == [True, False, True]
    assert len(grammars) == 2
    with pytest.raises(ServerBusy):
        grammars.constrain("regex", "b")


# -- calls -------------------------------------------------------------------------------------

TOOLS = [
    Tool("weather", {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
                     "required": ["city"], "additionalProperties": False}, strict=True),
    Tool("other", {"uniqueItems": True}),
]  # fmt: skip
# with the template that tells a variant
SPELLINGS = {spelling(name, text): text for name in FORMATS for text in ("x", "[ARGS]", "")}


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_calls_are_read_back_by_the_parser_of_their_format(
    spelled: str, pieces: list[bytes]
) -> None:
    name = {"mistral list": "mistral", "deepseekv31": "deepseekv3"}.get(spelled, spelled)
    # marks are special tokens of their own, as models of the format may have them
    marks = special_tokens(name)
    texts = [*pieces, *(mark.encode() for mark in marks)]
    special = range(len(pieces), len(texts))
    grammars = GrammarEngine(texts, len(texts), (EOS,), special, marks)
    source = call_forms(spelled, TOOLS)
    matcher = start(grammars, "calls", source)
    mark = source.partition("\n")[0]
    random_token = random.Random(7)
    names, answers = set(), []
    for _ in range(60):
        if "weather" in names and len(names) + len(answers) > 3:
            break
        matcher.restart()
        written, whole = follow(matcher, texts, lambda ids: random_token.choice(ids), 400)
        if not whole:
            continue  # an object of the other tool that goes on and on
        answer = CALL_TEXTS[spelled].opens + mark + written.decode("utf-8", "replace")
        answers.append(answer)
        parser = make_parser(name, TOOLS)
        parser.push(answer)
        parser.finish()
        (call,) = parser.calls
        names.add(call.name)
        assert call.complete
        if call.name == "weather":
            jsonschema.validate(json.loads(call.arguments), dict(TOOLS[0].parameters))
    assert "weather" in names


def test_what_a_token_of_the_mark_brings_along(grammars: GrammarEngine) -> None:
    matcher = start(grammars, "calls", call_forms("hermes", TOOLS))
    matcher.restart()
    assert matcher.begin(b'\n{"name": "wea')
    assert not matcher.begin(b"!")
    matcher.restart()
    assert not matcher.begin(b"no")


def test_parameters_that_cannot_be_enforced_are_refused(grammars: GrammarEngine) -> None:
    unique = Tool("f", {"properties": {"a": {"type": "array", "uniqueItems": True}}}, strict=True)
    with pytest.raises(RequestError, match="uniqueItems"):
        grammars.build("calls", call_forms("hermes", [unique]))


def test_outputs_go_on_where_the_states_that_they_share_are_used_up(monkeypatch: Any) -> None:
    """Each of these takes 300 of them."""
    monkeypatch.setattr(engine, "MAX_STATES_BYTES", 350 * engine.STATE_BYTES)
    grammars = walks.byte_grammars()
    key = "regex", "|".join(f"({char}x){{0,150}}!" for char in "abcd")
    rows = [walks.matcher(grammars, *key) for _ in "abcd"]
    first = grammars.constrain(*key)._beginning
    for _ in range(149):
        for at, char in zip(rows, b"abcd", strict=True):
            assert not at.accept(char)
            assert not at.accept(ord("x"))
            assert set(walks.allowed(at)) == {char, ord("!")}
    assert [at.accept(ord("!")) for at in rows] == [True] * 4
    assert grammars.constrain(*key)._beginning is not first, "they have been used up"
    assert walks.takes(grammars.constrain(*key), "axax!")


def test_an_output_that_takes_more_states_than_there_are_ends_alone(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "MAX_STATES_BYTES", 350 * engine.STATE_BYTES)
    grammars = walks.byte_grammars()
    key = "schema", '{"type": "string", "pattern": "^(ab|c){0,2000}$"}'
    at, beside = (walks.matcher(grammars, *key) for _ in range(2))
    with pytest.raises(TooSlow):
        list(map(at.accept, b'"' + b"ab" * 1000))
    assert not any(map(beside.accept, b'"abc'))
    assert beside.accept(ord('"'))
    assert walks.takes(grammars.constrain(*key), '"abc"')


def test_a_grammar_gets_more_states_where_an_output_needs_them(monkeypatch: Any) -> None:
    """Each character that is counted takes one."""
    grammars = walks.byte_grammars()
    key = "regex", "[a-z ]{1,3500}"
    at = walks.matcher(grammars, *key)
    few = grammars._kept[key].num_bytes
    assert not any(map(at.accept, b"a" * 3499))
    assert walks.takes(grammars.constrain(*key), "b" * 3499)
    grown = grammars._kept[key].num_bytes
    assert few < grown < 2 * engine.MAX_STATES_BYTES
    walks.matcher(grammars, "regex", "c")
    monkeypatch.setattr(engine, "MAX_KEPT_BYTES", grown)
    grammars.constrain("regex", "c")
    assert key not in grammars, "what it has grown to counts"


def test_a_grammar_that_is_asked_for_is_not_the_next_to_go(monkeypatch: Any) -> None:
    grammars = walks.byte_grammars()
    monkeypatch.setattr(engine, "MAX_KEPT", 2)
    for text in "ab":
        walks.matcher(grammars, "regex", text)
    assert ("regex", "a") in grammars
    walks.matcher(grammars, "regex", "c")
    assert walks.takes(grammars.constrain("regex", "a"), "a")


def test_an_output_that_takes_too_much_work_ends_alone(monkeypatch: Any) -> None:
    """That limit, too, is one of what all who follow a grammar share."""
    monkeypatch.setattr(engine, "MAX_STEP_FUEL", 50_000)
    grammars = walks.byte_grammars()
    pattern = r"^(?=.*[A-Z])(?=.*\d)(?!.*password).{8,20}$"
    key = "schema", json.dumps({"type": "string", "pattern": pattern})
    at, beside = (walks.matcher(grammars, *key) for _ in range(2))
    with pytest.raises(TooSlow):
        list(map(at.accept, b'"Apassword'))
    assert not any(map(beside.accept, b'"Abcdefg1'))
    assert walks.takes(grammars.constrain(*key), '"Abcdefg1"')


def test_calls_go_on_where_states_are_used_up(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "MAX_STATES_BYTES", 350 * engine.STATE_BYTES)
    grammars = walks.byte_grammars()
    key = "regex", "|".join(f"({char}x){{0,150}}!" for char in "abcd")
    at, other = (walks.matcher(grammars, *key) for _ in range(2))
    for char in b"abcd":
        other.restart()
        list(map(other.accept, bytes([char, ord("x")]) * 140))
    at.restart()
    assert at.begin(b"ax" * 140)
    assert not at.accept(ord("a"))
    at.restart()
    assert not at.begin(b"ay")


def test_the_memory_of_kept_grammars_is_bounded(monkeypatch: Any) -> None:
    grammars = walks.byte_grammars()
    large = "regex", "([a-z]{3,9}|x[a-y]+z){1,5000}" + "a" * 10_000
    keys = [large, ("regex", "a"), ("regex", "b")]
    running, *_ = [walks.matcher(grammars, *key) for key in keys]
    taken = [grammars._kept[key].num_bytes for key in keys]
    assert taken[0] > 2 * taken[1]
    monkeypatch.setattr(engine, "MAX_KEPT_BYTES", sum(taken))
    walks.matcher(grammars, "regex", "c")
    assert [key in grammars for key in keys] == [False, True, True], "the least used has gone"
    assert not any(map(running.accept, b"abc")), "what is followed goes on"
    monkeypatch.setattr(engine, "MAX_KEPT_BYTES", 0)
    assert walks.takes(walks.matcher(grammars, "regex", "d"), "d")
    assert len(grammars) == 1, "the newest is kept, whatever it takes"


def test_what_is_known_of_terminals_is_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "MAX_TERMINAL_BYTES", 10 * engine.STATE_BYTES)
    grammars = walks.byte_grammars()
    schemas = ({"const": char * 11, "pattern": f"^{char}*$"} for char in "abcd")
    for schema in schemas:
        grammars.build("schema", json.dumps(schema))
    assert len(grammars._terminals) < 4


def test_what_is_known_of_terminals_outlives_a_value_that_takes_too_much(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "MAX_STATES", 400)
    grammars = walks.byte_grammars()
    told = {"pattern": "^(ab|c){0,2000}$"}
    with pytest.raises(RequestError, match="too many states"):
        grammars.build("schema", json.dumps({"const": "ab" * 900, **told}))
    grammars.build("schema", json.dumps({"const": "ab", **told}))


def test_a_limit_is_no_answer_to_whether_a_value_fits(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "MAX_STATES", 400)
    schema = {"const": "ab" * 900, "pattern": "^(ab|c){0,2000}$"}
    with pytest.raises(RequestError, match="too many states"):
        walks.byte_grammars().build("schema", json.dumps(schema))
