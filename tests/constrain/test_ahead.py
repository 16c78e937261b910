"""Tokens that are likely to come under a grammar: followed ahead, without a trace in the output."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from asyncllm.constrain import llguidance_backend as engine
from asyncllm.constrain.llguidance_backend import GrammarEngine, Matcher
from asyncllm.constrain.protocol import NO_PATH
from asyncllm.constrain.protocol import Path as Likely
from asyncllm.constrain.spelling import MAX_BYTES, Spelling
from asyncllm.constrain.vocabulary import passes
from asyncllm.errors import RequestError
from asyncllm.text import ModelTokenizer, load_tokenizer

EOS = 2
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "first_name": {"type": "string"},
            "post": {"enum": ["nurse", "baker"]},
            "tags": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        },
        "required": ["first_name", "post", "tags"],
        "additionalProperties": False,
    }
)
ANSWER = '{"first_name": "Ann", "post": "baker", "tags": [12, 7]}'


@pytest.fixture(scope="module")
def text(demo_dir: Path) -> ModelTokenizer:
    return load_tokenizer(str(demo_dir))


@pytest.fixture(scope="module")
def grammars(text: ModelTokenizer) -> GrammarEngine:
    made = GrammarEngine(
        text.pieces, 49152, (EOS,), text.special, (), lambda some: text.encode(some, False)
    )
    made.keep("schema", SCHEMA, made.build("schema", SCHEMA))
    return made


@pytest.fixture(autouse=True)
def _slow_machines_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is followed must not depend on how busy this machine is."""
    monkeypatch.setattr(engine, "AHEAD_S", 60.0)
    monkeypatch.setattr(engine, "QUICK_S", 60.0)


def begin(grammars: GrammarEngine) -> Matcher:
    matcher = grammars.constrain("schema", SCHEMA)
    matcher.start()
    return matcher


def guess(tokens: Sequence[int], rate: float = 0.9, predicted: int = 0) -> Likely:
    chances = [rate ** (i + 1) for i in range(len(tokens))]
    return Likely(list(tokens), chances, num_predicted=predicted)


@pytest.mark.parametrize("seed", range(5))
def test_masks_are_those_of_an_output_that_is_not_followed_ahead(
    grammars: GrammarEngine, text: ModelTokenizer, seed: int
) -> None:
    rng, answer = random.Random(seed), list(text.encode(ANSWER, False))
    plain, ahead = begin(grammars), begin(grammars)
    fast, ended = 0, False
    for at in range(60):
        assert ahead.mask() == plain.mask()
        path = ahead.path
        assert len(path.tokens) == len(path.chances) == len(path.masks)
        assert path.chances == sorted(path.chances, reverse=True)
        may = [t for t in range(49152) if t != EOS and passes(plain.mask(), t)]
        likely = [t for t in (*path.tokens[:1], *answer[at : at + 1]) if passes(plain.mask(), t)]
        token = rng.choice(likely if likely and rng.random() < 0.9 else may)
        foreseen = not ahead.slow(token)
        assert foreseen == (path.tokens[:1] == [token])
        fast += foreseen
        ended = plain.accept(token)
        assert ahead.accept(token) == ended
        if ended:
            break
        if not foreseen:
            tokens = answer[at + 1 : at + 1 + rng.randrange(9)]
            tokens[2:2] = [rng.randrange(49152)] * rng.choice([0, 0, 1])
            ahead.look_ahead(guess(tokens), rng.choice([1, 4, 8]))
    assert fast > 5


def test_what_a_grammar_forces_is_spelled_as_by_the_tokenizer(
    grammars: GrammarEngine, text: ModelTokenizer
) -> None:
    matcher = begin(grammars)
    matcher.look_ahead(NO_PATH, 3)
    names = list(text.encode('{"first_name": "', False))
    assert matcher.path.tokens == names[:3]
    for token in names[:3]:
        assert not matcher.slow(token)
        matcher.accept(token)
    assert matcher.path.tokens == []
    matcher.accept(names[3])
    matcher.look_ahead(NO_PATH, 8)
    assert matcher.path.tokens == names[4:], "what follows is free"
    assert matcher.path.chances[0] > 0.9, "they were right each time"


def test_a_guess_is_followed_up_to_the_first_token_that_is_not_allowed(
    grammars: GrammarEngine, text: ModelTokenizer
) -> None:
    matcher = begin(grammars)
    tokens = list(text.encode(ANSWER, False))
    for token in tokens[:6]:  # a string has begun
        matcher.accept(token)
    newline = text.encode("\n", False)[0]
    matcher.look_ahead(guess([tokens[6], newline, 5]), 8)
    assert matcher.path.tokens == tokens[6:7]
    assert matcher.path.chances == [0.9]
    matcher.accept(tokens[6])
    matcher.accept(tokens[7])
    matcher.look_ahead(guess([5, 5]), 8)
    assert matcher.path.tokens == tokens[8:12], "forced, where the guess is not allowed"
    whole = begin(grammars)
    for token in tokens[:-1]:
        whole.accept(token)
    whole.look_ahead(guess(tokens[-1:]), 8)
    assert whole.path.tokens == [], "nothing comes after the last token"


@pytest.mark.parametrize(("right", "predicted"), [(2, 2), (2, 0), (8, 8)])
def test_a_path_knows_how_much_of_it_was_predicted(
    grammars: GrammarEngine, text: ModelTokenizer, right: int, predicted: int
) -> None:
    matcher = begin(grammars)
    names = list(text.encode('{"first_name": "', False))
    tokens = [*names[:right], *([5] * (8 - right))]
    matcher.look_ahead(guess(tokens[: len(names)], predicted=min(predicted, len(names))), 8)
    assert matcher.path.tokens == names, "the rest is forced"
    for left in range(min(predicted, len(names)), -1, -1):
        assert matcher.path.num_predicted == left
        matcher.accept(
            matcher.path.tokens[0] if matcher.path.tokens else text.encode("A", False)[0]
        )


def test_what_is_forced_is_followed_along_a_guess_without_any_chance(
    grammars: GrammarEngine, text: ModelTokenizer
) -> None:
    matcher = begin(grammars)
    names = list(text.encode('{"first_name": "', False))
    matcher.look_ahead(guess(names[:3], 0.0), 3)
    assert matcher.path.tokens == names[:3]


def test_a_token_that_is_unlikely_or_dear_is_not_followed(
    grammars: GrammarEngine, text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = begin(grammars)
    for token in text.encode('{"first_name": "', False):
        matcher.accept(token)
    name = list(text.encode("Ann Ann Ann", False))
    matcher.look_ahead(guess(name, 0.4), 8)
    assert matcher.path.tokens == name[:2]
    monkeypatch.setattr(engine, "QUICK_S", 0.0)
    matcher.accept(name[0])
    matcher.accept(name[0])
    matcher.look_ahead(guess(name), 8)
    assert matcher.path.tokens == []


def test_a_failure_ahead_is_none_of_the_output(
    grammars: GrammarEngine, text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher, plain = begin(grammars), begin(grammars)
    tokens = list(text.encode(ANSWER, False))

    def fails(*_: object) -> None:
        raise RequestError("too many states")

    with monkeypatch.context() as patch:
        patch.setattr(Matcher, "_allowed", fails)
        matcher.look_ahead(guess(tokens), 8)
    assert matcher.path.tokens == []
    for token in tokens:
        assert matcher.accept(token) == plain.accept(token)
        assert matcher.mask() == plain.mask()


def test_texts_are_spelled_by_their_own_tokens() -> None:
    pieces = [b"\n", b" ", b"a", b"ab", b" ab", b"\xc3", b"\xa9", b'\n"']
    asked = []

    def encode(text: str) -> list[int]:
        """The longest pieces first; a space is put in front, as some tokenizers do."""
        asked.append(text)
        rest, out = (" " + text).encode(), []
        while rest:
            token = max((i for i, p in enumerate(pieces) if rest.startswith(p)), key=lambda i: len(pieces[i]))  # fmt: skip
            out.append(token)
            rest = rest[len(pieces[token]) :]
        return out

    spelling = Spelling(encode, pieces)
    assert spelling.of(b"ab aba") == [3, 4, 2]
    assert spelling.of(b"ab aba") == [3, 4, 2]
    assert len(asked) == 1, "it is kept"
    assert spelling.of(b"a\xc3") == [2], "half a character is left out"
    assert spelling.of(b"\xa9a") == [], "and not begun with"
    long = b"a" * MAX_BYTES
    assert spelling.of(long) == [2] * MAX_BYTES
    assert spelling.of(long + b"b") == [2] * (MAX_BYTES - 1), "the last may be cut off"
    assert Spelling(lambda _: [7], pieces).of(b'"a') == [], "joined with what was put in front"
    assert Spelling(None, pieces).of(b"a") == []
