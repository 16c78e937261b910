"""EBNF: what rules say is what can come, whatever follows what."""

from __future__ import annotations

import pytest

from asyncllm.constrain.llguidance_backend import GrammarEngine
from tests.constrain.walks import byte_grammars, matcher, takes


@pytest.fixture(scope="module")
def grammars() -> GrammarEngine:
    return byte_grammars()


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [('root ::= [a-z]+ "abc"', ["xabc", "abcabc", "aabc"], ["abc", "x", "xab"]),
     ('root ::= [a-z]* "1" | [a-f]* "2"', ["1", "z1", "a1", "a2"], ["z2", "12"]),
     ('root ::= expr\nexpr ::= expr [-+*/] expr | "(" expr ")" | [0-9]+', ["1+2*(3-4)", "7", "((1))"], ["1+", "()", "12(3)"]),
     ("root ::= s\ns ::= s s | [a-z ]+", ["a", "two words"], ["", "A"]),
     ('root ::= list\nlist ::= item | list "," item\nitem ::= [a-z]+ # one\n', ["a", "a,b,cd"], ["a,", ",a"]),
     ('root ::= "" | "(" root ")" root', ["", "()", "(())()"], ["(", ")(", "(()"]),
     ('root ::= a b\na ::= "x" | "x" "y"\nb ::= "y" | "z"', ["xy", "xz", "xyy", "xyz"], ["x", "xyzz"]),
     ('root ::= ("a" | "b"){2,3} "c"?\n', ["ab", "aba", "abc"], ["a", "abab", "abcc"]),
     (r'root ::= "\"\\\n\t\x41\u00e9\U0001F600é" [^\n\]"]', ['"\\\n\tAé😀éx'], ['"\\\n\tAé😀é]']),
     ('root ::= x{2} | y+\nx ::= "a"\ny ::= x "b"', ["aa", "ab", "abab"], ["a", "aab"]),
     ('root ::=\n  "a" |\n  ( "b"\n    | "c" )\nother ::= root', ["a", "b", "c"], ["", "d"]),
     ('root ::= "a" never | "b"\nnever ::= "x" never', ["b"], ["a", "ax"]),
     ('root ::= .{2}', ["ab", "é\n"], ["a", "abc"])],
)  # fmt: skip
def test_rules(grammars: GrammarEngine, source: str, good: list[str], bad: list[str]) -> None:
    at = matcher(grammars, "ebnf", source)
    assert [text for text in good if not takes(at, text)] == []
    assert [text for text in bad if takes(at, text)] == []


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [(r"(yes|no)!?", ["yes", "no!"], ["yes!!", ""]), (r"^a.c$", ["abc", "aéc"], ["a\nc", "abcd"]),
     (r"[\w.-]+@\d{2}", ["a.b-c@12"], ["é@12", "a@1"]), (r"[\s\S]*", ["", "\x1f\né"], []),
     (r"\u0041\x42\cJ[\]\\]", ["AB\n]", "AB\n\\"], ["AB\n["]), (r"(?:a|)b??c{2,}", ["acc", "bccc", "cc"], ["ac"]),
     (r"\p{Lu}\P{Lu}", ["Éa"], ["éa", "ÉÉ"]), (r"[^]", ["\n", "😀"], [""]), (r"a|^b|c$", ["a", "b", "c"], ["ab"])],
)  # fmt: skip
def test_regular_expressions(
    grammars: GrammarEngine, source: str, good: list[str], bad: list[str]
) -> None:
    at = matcher(grammars, "regex", source)
    assert [text for text in good if not takes(at, text)] == []
    assert [text for text in bad if takes(at, text)] == []
