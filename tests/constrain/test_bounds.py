"""What one request may make grammars cost: compiling and each token, on the embedded model's vocabulary."""

from __future__ import annotations

import json
import random
from pathlib import Path
from time import thread_time
from typing import Any

import pytest

from asyncllm.constrain.llguidance_backend import GrammarEngine, TooSlow
from asyncllm.errors import RequestError
from asyncllm.text import ModelTokenizer, load_tokenizer
from tests.constrain.walks import allowed
from tests.speed import within

EOS = 2
# Most is 0.35 and 0.06 on a quiet core; what had no bound took seconds to minutes. A busy neighbour
# costs a lot, so there is room.
COMPILE_S, STEP_S = 2.0, 0.25


@pytest.fixture(scope="module")
def text(demo_dir: Path) -> ModelTokenizer:
    return load_tokenizer(str(demo_dir))


@pytest.fixture(scope="module")
def grammars(text: ModelTokenizer) -> GrammarEngine:
    return GrammarEngine(text.pieces, 49152, (EOS,), text.special)


def objects(number: int, **more: Any) -> dict[str, Any]:
    named = {f"k{i}": {"type": "string"} for i in range(number)}
    return {"type": "object", "properties": named, **more}


HOSTILE: dict[str, tuple[str, Any]] = {
    "1500 optional": ("schema", objects(1500)),
    "1500 required": ("schema", objects(1500, required=[f"k{i}" for i in range(1500)])),
    "counted": ("schema", objects(1000, minProperties=18)),
    "any of all": ("schema", {"allOf": [{"anyOf": [{"required": [f"a{i}{j}"]} for j in range(4)]} for i in range(12)]}),
    "one of many": ("schema", {"oneOf": [{"type": "object", "properties": {f"p{i}": {"type": "integer"}}} for i in range(40)]}),
    "enum": ("schema", {"enum": [f"value{i:05d}" for i in range(4500)], "pattern": "^(a+)+$|v.*"}),
    "patterns": ("schema", {"type": "object", "patternProperties": {f"a.*{c}.*b": {} for c in "abcdef"}}),
    "all patterns": ("schema", {"type": "string", "allOf": [{"pattern": f"{c}.*{c}"} for c in "abcdefghijklmnopqrstuvwxyz"]}),
    "many patterns": ("schema", {"properties": {f"k{i}": {"type": "string", "pattern": f"^a{i}b*$"} for i in range(1200)}}),
    "twice each": ("schema", {"$defs": {**{f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}, "d40": {}}, "$ref": "#/$defs/d0"}),
    "deep": ("schema", '{"items":' * 60 + "{}" + "}" * 60),
    "lengths": ("schema", {"type": "array", "minItems": 900, "maxItems": 900, "items": {"type": "string", "maxLength": 1000000}}),
    "counted keys": ("schema", {"type": "object", "minProperties": 300}),
    "combined patterns": ("schema", {"properties": {f"o{j}": {"patternProperties": {f"^{c}.*{j}": {"type": "string"} for c in "abcdef"}} for j in range(300)}}),
    "objects of one of many": ("schema", {"$defs": {"d": {"type": "object", "properties": {f"a{i}": {} for i in range(3000)}}}, "oneOf": [{"$ref": "#/$defs/d"}] * 1000}),
    "an anchor deep inside": ("regex", "(b" * 98 + "a" * 60_000 + "$" + ")" * 98),
    "nested counts": ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "backtracking": ("regex", "(.*a){30}"),
    "many states": ("regex", "(.*a.{20}){30}"),
    "long text": ("regex", "a" * 65_000),
    "many choices": ("regex", "|".join(f"{i}.*{i}" for i in range(6000))),
    "many stars": ("regex", "(a|b|ab)*" * 5000),
    "nested stars": ("regex", "(" * 90 + "a" + ")*" * 90),
    "stars of stars": ("regex", "a" + "*" * 60_000),
    "ambiguous": ("ebnf", "root ::= s\ns ::= s s | [a-z ]+"),
    "more ambiguous": ("ebnf", "root ::= s\ns ::= t t | [a-z ]\nt ::= s s | s"),
    "empty ones": ("ebnf", 'root ::= ("a"?){5000}'),
    "counts of counts": ("ebnf", 'root ::= ((("a"{1,1000}){1,1000}){1,1000}){1,1000}'),
    "a chain of rules": ("ebnf", "root ::= r0\n" + "".join(f'r{i} ::= r{i + 1} | "a"\n' for i in range(2900)) + 'r2900 ::= "b"'),
    "longer": ("ebnf", "root ::= r0\n" + "".join(f'r{i} ::= r{i + 1} | "a"\n' for i in range(3100)) + 'r3100 ::= "b"'),
    "many optional rules": ("ebnf", "root ::= r0\n" + "".join(f'r{i} ::= r{i + 1}* r{i * 7 % 990} | "x" r{i} "y" | [a-z]\n' for i in range(990)) + "r990 ::= [a-z]"),
    "many words": ("ebnf", "root ::= " + " | ".join(f'"w{i}"' for i in range(6000))),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_compiling_and_following_have_an_end(grammars: GrammarEngine, name: str) -> None:
    kind, source = HOSTILE[name]
    text = source if isinstance(source, str) else json.dumps(source)
    assert len(text) <= 75_000
    rng, slowest, begun = random.Random(0), 0.0, thread_time()
    try:
        compiled = grammars.build(kind, text)
    except RequestError:
        assert within(thread_time() - begun, COMPILE_S)
        return
    assert within(thread_time() - begun, COMPILE_S)
    grammars.keep(kind, text, compiled)
    at = grammars.constrain(kind, text)
    at.start()
    for _ in range(100):
        tokens = allowed(at)
        if (token := rng.choice(tokens)) == EOS:
            break
        begun = thread_time()
        try:
            if at.accept(token):
                break
        except TooSlow:
            break
        finally:
            slowest = max(slowest, thread_time() - begun)
    assert within(slowest, STEP_S)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^(?=.*[A-Z])(?=.*\d)(?!.*password).{8,20}$",
        r"^(?=.*[a-z])(?=.*[A-Z])(?=.*\d)(?=.*[^\w]).{8,128}$",
        r"^(?=.*[a-z])(?=.*[A-Z])(?=.*\d)(?=.*[@$!%*?&])[A-Za-z\d@$!%*?&]{8,32}$",
    ],
)
def test_what_is_usual_for_passwords_is_within_the_bounds(
    grammars: GrammarEngine, text: ModelTokenizer, pattern: str
) -> None:
    """The tokens of a real vocabulary look many characters ahead at once."""
    source = json.dumps({"type": "string", "pattern": pattern})
    grammars.keep("schema", source, grammars.build("schema", source))
    at = grammars.constrain("schema", source)
    at.start()
    for byte in b'"Abc12%xyz0':
        at.accept(text.pieces.index(bytes([byte])))
    assert not at.accept(text.pieces.index(b"1"))
    assert text.pieces.index(b'"') in allowed(at)
