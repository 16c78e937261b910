"""Lark grammars of tools: what they allow inside a call's JSON and between tags, what is refused."""

from __future__ import annotations

import json
import random
import re

import pytest

from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.tools.call_grammar import call_forms
from asyncllm.api.parsing.tools.schema import call_schema
from asyncllm.errors import RequestError
from tests.constrain.walks import byte_grammars, matcher, takes, walk

GRAMMARS = byte_grammars()
# as Codex sends it
PATCH = """start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""
SUMS = """?start: sum          // of products
?sum: product | sum "+" product -> add
product: atom ("*" atom)*
atom: NUMBER | "-" atom | "(" sum ")"
NUMBER.2: DIGIT~1..3 ["." DIGIT+]
%import common (DIGIT, WS_INLINE)
%ignore WS_INLINE   # anywhere
"""
SELECT = """start: "select"i NAME ("," NAME)* [where]
where: "where"i NAME OP VALUE
OP: "=" | "<" ">"?
NAME: LETTER (LETTER | "_")*
LETTER: "a".."z" | "A".."Z"
VALUE: /"[^"\\\\]*"/ | /\\d+/
%ignore /[ \\n]+/
"""
CASES = [
    (PATCH, ["*** Begin Patch\n*** Add File: a b.py\n+x = \"1\"\n+\n*** Update File: é\\.py\n"
             "*** Move to: c\n@@\n-old\\\n+new\n*** End of File\n*** End Patch",
             "*** Begin Patch\n*** Delete File: /\n*** End Patch\n"],
     ["*** Begin Patch\n*** End Patch", "*** Begin Patch\n*** Add File: \n+\n*** End Patch", "ls"]),
    (SUMS, ["1+22*(3 + 4.5)", " 1", "--1 "], ["1234", "1+", "(1", "1.", ""]),
    (SELECT, ["SELECT a, b_c\nwhere x <> \"é\"", "select a", "Select a where b=12"],
     ["select", "select 1", "where a=1", "select a where b=x"]),
    ("start: /a.b/s /x[0-9]/i", ["a\nbx1", "aébX2"], ["abx1", "a\nbx"]),
    (r'start: /as\s[^b\n]./i "\n\"c"i', ["aS\tc\\\n\"C", "As A_\n\"c"], ["as\tBx\n\"c", "as\ta\n\n\"c"]),
]  # fmt: skip


def tool(grammar: str) -> Tool:
    schema = {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
        "additionalProperties": False,
    }
    return Tool("t", schema, strict=True, lark=grammar)


def call(text: str) -> str:
    return f'{{"name": "t", "arguments": {json.dumps({"input": text}, ensure_ascii=False)}}}'


@pytest.mark.parametrize(("grammar", "good", "bad"), CASES)
def test_forced_calls_hold_texts_of_the_grammar(
    grammar: str, good: list[str], bad: list[str]
) -> None:
    at = matcher(GRAMMARS, "schema", json.dumps(call_schema([tool(grammar)], "t")))
    assert [text for text in good if not takes(at, call(text))] == []
    assert [text for text in bad if takes(at, call(text))] == []


@pytest.mark.parametrize(("grammar", "good", "bad"), CASES)
@pytest.mark.parametrize("style", ["hermes", "qwen3_coder", "glm47"])
def test_calls_among_text_do_too(grammar: str, good: list[str], bad: list[str], style: str) -> None:
    at = matcher(GRAMMARS, "calls", call_forms(style, [tool(grammar)]))
    begin, end = {
        "hermes": ("\n", ""),
        "qwen3_coder": ("\n<function=t>\n<parameter=input>\n", "\n</parameter>\n</function>"),
        "glm47": ("t<arg_key>input</arg_key><arg_value>", "</arg_value></tool_call>"),
    }[style]
    told = call if style == "hermes" else str
    assert [text for text in good if not takes(at, begin + told(text) + end)] == []
    assert [text for text in bad if takes(at, begin + told(text) + end)] == []


def test_what_comes_by_chance_can_be_read_back() -> None:
    at = matcher(GRAMMARS, "schema", json.dumps(call_schema([tool(SELECT)], "t")))
    name = r"[a-zA-Z][a-zA-Z_]*\s*"
    query = re.compile(
        rf"""\s*(?i:select)\s*{name}(,\s*{name})*"""
        rf"""((?i:where)\s*{name}(=|<>?)\s*("[^"\\]*"|\d+)\s*)?"""
    )
    rng, found = random.Random(1), 0
    for _ in range(40):
        if out := walk(at, rng, 300, 60):
            found += 1
            text = json.loads(out)["arguments"]["input"]
            assert query.fullmatch(text), text
    assert found > 5


@pytest.mark.parametrize(
    ("grammar", "told"),
    [
        ("begin: A\nA: /a/", "no rule start"),
        ('start: other', "no rule other"),
        ("start: A", "no terminal A"),
        ("start: A\nA: B\nB: A", "names itself"),
        ("start: A\nA: x\nx: /a/", "terminal with the rule x"),
        ("start: start /a/", "start never ends"),
        ('start: "a"\nstart: "b"', "second start in line 2"),
        ('start: ("a"', "unclosed parenthesis in line 1"),
        ('start: ["a"', r"unclosed \["),
        ('start: ""', "empty text"),
        (r'start: "\q"', "unknown escape"),
        ("start: /a/m", "flag m"),
        ("start: /(?=a)b/", "cannot be enforced"),
        ("start: x{A}\nA: /a/", "template"),
        ("x{y}: y\nstart: /a/", "template"),
        ("%import common.NOPE\nstart: NOPE", "'NOPE', which is not one of"),
        ("%import python.NAME\nstart: NAME", "only %ignore and %import"),
        ('start: "a"~5..2', "bounds rise"),
        ('start: "b".."a"', "range"),
        ("start: ;", "means nothing"),
        ("= a", "instead of a rule"),
        ("start: A\n" + "\n".join(f"A{i}: A{i + 1}" for i in range(99)) + "\nA99: /a/\nA: A0",
         "terminals more than 50 deep"),
        ("start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(20)) + "\nA20: /a/",
         "terminals of over 100000 parts"),
        ("\n".join(f'{"start" if i == 0 else f"r{i}"}: /a/' for i in range(600)), "more than 1000"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(grammar: str, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        GRAMMARS.build("schema", json.dumps(call_schema([tool(grammar)], "t")))
