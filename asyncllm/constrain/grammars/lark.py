"""Reads grammars in Lark's notation into rules that can be part of other grammars.

What ``%ignore`` names may follow each terminal; the caller says how terminals are spelled. Knows no
engine but for its notation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Final

from asyncllm.constrain.grammars import regex
from asyncllm.constrain.grammars.ebnf import NotationReader
from asyncllm.constrain.grammars.regex import ALL, ANY, MAX_COUNT, code_text, literal
from asyncllm.constrain.grammars.rules import (
    EMPTY,
    Chars,
    Expr,
    Repeat,
    RuleRef,
    Rules,
    alt,
    finite,
    parts,
    rebuilt,
    seq,
)
from asyncllm.errors import RequestError

MAX_RULES: Final = 1000
MAX_DEPTH: Final = 50  # of terminals that name others
MAX_PARTS: Final = 100_000  # of all terminals together, with those that they name written out

_SKIP: Final = re.compile(r"(?:\s|//[^\n]*|\#[^\n]*)*")
_HEAD: Final = re.compile(r"[!?]{0,2}(_?[A-Za-z]\w*)(\{[^}\n]*\})?(?:\.-?\d+)?[ \t]*:")
_NAME: Final = re.compile(r"_?[A-Za-z]\w*")
_ALIAS: Final = re.compile(r"->\s*\w+")
_TIMES: Final = re.compile(r"~\s*(\d{1,9})(?:\s*\.\.\s*(\d{1,9}))?")
_TEXT: Final = re.compile(r'"((?:[^"\\\n]|\\.)*)"(i?)')
_REGEX: Final = re.compile(r"/((?:[^/\\\n]|\\.)+)/([a-z]*)")
_RANGE: Final = re.compile(r'"((?:[^"\\]|\\.)+)"\s*\.\.\s*"((?:[^"\\]|\\.)+)"')
_IMPORT: Final = re.compile(r"%import\s+common\s*\.\s*(\w+)(?:\s*->\s*(\w+))?")
_IMPORTS: Final = re.compile(r"%import\s+common\s*\(([\w\s,]+)\)")
_NUMBER: Final = r"(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+"
COMMON: Final = {
    "DIGIT": "[0-9]", "HEXDIGIT": "[0-9a-fA-F]", "INT": "[0-9]+", "SIGNED_INT": "[+-]?[0-9]+",
    "DECIMAL": r"[0-9]+\.[0-9]*|\.[0-9]+", "FLOAT": _NUMBER, "SIGNED_FLOAT": f"[+-]?(?:{_NUMBER})",
    "NUMBER": f"{_NUMBER}|[0-9]+", "SIGNED_NUMBER": f"[+-]?(?:{_NUMBER}|[0-9]+)",
    "ESCAPED_STRING": r'"(?:[^"\\\n]|\\[^\n])*"', "LCASE_LETTER": "[a-z]", "UCASE_LETTER": "[A-Z]",
    "LETTER": "[A-Za-z]", "WORD": "[A-Za-z]+", "CNAME": "[_A-Za-z][_A-Za-z0-9]*",
    "WS_INLINE": r"[ \t]+", "WS": r"[ \t\f\r\n]+", "CR": r"\r", "LF": r"\n",
    "NEWLINE": r"(?:\r?\n)+", "SH_COMMENT": r"#[^\n]*", "CPP_COMMENT": r"//[^\n]*",
    "SQL_COMMENT": r"--[^\n]*", "C_COMMENT": r"/\*(?:[^*]|\*+[^*/])*\*+/",
}  # fmt: skip


def read(source: str, name: str, spell: Callable[[Expr], Expr]) -> tuple[Rules, RuleRef]:
    """The rules of a grammar, each with ``name`` before its own, and the one of ``start``.

    Args:
        spell: a terminal, which may match nothing at all, as part of a rule.

    Raises:
        RequestError: it is malformed, has what cannot be enforced, or no text matches it.
    """
    reader = _LarkReader(source)
    reader.statements()
    made = _LarkRules(reader, name, spell).rules()
    if not (kept := finite(made, f"{name}start")):
        raise RequestError("no text matches the Lark grammar: start never ends")
    return kept, RuleRef(f"{name}start")


class _LarkReader(NotationReader):
    """Collects rules and terminals; texts and expressions in rules are terminals without a name."""

    notation, skipped = "Lark", _SKIP

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.defined: Rules = {}
        self.ignored: list[Expr] = []

    def statements(self) -> None:
        """Read all of them. Raises RequestError."""
        while char := self.peek():
            if char == "%":
                self._directive()
            elif found := _HEAD.match(self.source, self.at):
                if found[2]:
                    self.fail(f"has the template {found[1]}, which is not available,")
                self.at = found.end()
                self._define(found[1], self.alternatives())
            else:
                self.fail(f"has {self.source[self.at : self.at + 20]!r} instead of a rule")

    def item(self) -> Expr | None:
        if _HEAD.match(self.source, self.at) or self.peek() in ("]", "%"):
            return None
        if found := _ALIAS.match(self.source, self.at):
            self.at = found.end()
            return None
        item = self._single(self.peek())
        while self.peek() and not _HEAD.match(self.source, self.at):
            if found := _TIMES.match(self.source, self.at):
                self.at = found.end()
                low, high = int(found[1]), int(found[2] or found[1])
                if not low <= high <= MAX_COUNT:
                    self.fail(f"has the repetition {found[0]}: bounds rise, up to {MAX_COUNT},")
                item = Repeat(item, low, high)
            elif bounds := self.bounds():
                item = Repeat(item, *bounds)
            else:
                break
        return item

    def _single(self, char: str) -> Expr:
        if char == "(":
            self.at += 1
            return self.closed()
        if char == "[":
            self.at += 1
            inner = self.alternatives()
            if self.peek() != "]":
                self.fail("has an unclosed [")
            self.at += 1
            return Repeat(inner, 0, 1)
        if found := _RANGE.match(self.source, self.at):
            ends = [self.unescaped(found[1]), self.unescaped(found[2])]
            if any(len(end) != 1 for end in ends) or ends[0] > ends[1]:
                self.fail(f"has the range {found[0]}, which is none,")
            self.at = found.end()
            low, high = map(ord, ends)
            special = frozenset(code for code in ALL.special if low <= code <= high)
            return self._nameless(Chars(f"[{code_text(low)}-{code_text(high)}]", special))
        if found := _TEXT.match(self.source, self.at):
            if not found[1]:
                self.fail("has an empty text")
            text = literal(self.unescaped(found[1]))
            self.at = found.end()
            return self._nameless(_in_any_case(text) if found[2] else text)
        if found := _REGEX.match(self.source, self.at):
            if wrong := set(found[2]) - {"i", "s"}:
                self.fail(f"has the flag {min(wrong)}, which cannot be enforced,")
            inner = regex.full(regex.parse(found[1].replace("\\/", "/")))
            self.at = found.end()
            if "s" in found[2]:
                inner = mapped(inner, lambda char: ALL if char is ANY else char)
            return self._nameless(_in_any_case(inner) if "i" in found[2] else inner)
        if found := _NAME.match(self.source, self.at):
            self.at = found.end()
            if super().peek() in ("{", ":"):
                self.fail(f"uses {found[0]} as a template, which is not available,")
            return RuleRef(found[0])
        self.fail(f"has {char!r}, which means nothing here,")

    def _directive(self) -> None:
        if found := _IMPORT.match(self.source, self.at):
            names = {found[2] or found[1]: found[1]}
        elif found := _IMPORTS.match(self.source, self.at):
            names = {name.strip(): name.strip() for name in found[1].split(",")}
        elif self.source.startswith("%ignore", self.at):
            self.at += len("%ignore")
            self.ignored.append(self.alternatives())
            return
        else:
            what = self.source[self.at :].split("\n")[0][:60]
            self.fail(f"has {what!r}: only %ignore and %import common.NAME are available,")
        for name, known in names.items():
            if known not in COMMON:
                self.fail(f"imports {known!r}, which is not one of {', '.join(COMMON)},")
            self._define(name, self._nameless(regex.parse(COMMON[known])))
        self.at = found.end()

    def _define(self, name: str, node: Expr) -> None:
        if name in self.defined:
            self.fail(f"has a second {name}")
        if len(self.defined) >= MAX_RULES:
            self.fail(f"has more than {MAX_RULES} rules and terminals")
        self.defined[name] = node

    def _nameless(self, node: Expr) -> RuleRef:
        name = f"TERMINAL {len(self.defined)}"
        self._define(name, node)
        return RuleRef(name)


class _LarkRules:
    """Makes rules of what was read: one for each rule and for each terminal that rules name."""

    def __init__(self, reader: _LarkReader, name: str, spell: Callable[[Expr], Expr]) -> None:
        self._reader, self._name, self._spell = reader, name, spell
        self._terminals: dict[str, Expr] = {}
        self._num_parts = 0
        self._made: Rules = {}

    def rules(self) -> Rules:
        """Raises RequestError."""
        defined, ignored = self._reader.defined, self._reader.ignored
        if "start" not in defined:
            raise RequestError("the Lark grammar has no rule start")
        skipped = f"{self._name}ignored"
        texts = alt(*(self._terminal(node, ()) for node in ignored))
        self._made[skipped] = Repeat(self._spell(texts)) if ignored else EMPTY
        for name, node in defined.items():
            if not _is_terminal(name):
                self._made[self._name + name] = self._rule(node)
        start = f"{self._name}start"
        self._made[start] = seq(RuleRef(skipped), self._made[start])
        return self._made

    def _rule(self, node: Expr) -> Expr:
        if not isinstance(node, RuleRef):
            return rebuilt(node, self._rule)
        name, made = node.name, self._name + node.name
        if _is_terminal(name) and made not in self._made:
            spelled = self._spell(self._named(name, ()))
            self._made[made] = seq(spelled, RuleRef(f"{self._name}ignored"))
        elif not _is_terminal(name) and name not in self._reader.defined:
            raise RequestError(f"the Lark grammar has no rule {name}, which is used")
        return RuleRef(made)

    def _named(self, name: str, path: tuple[str, ...]) -> Expr:
        """A terminal, with those that it names written out."""
        if name in path:
            raise RequestError(f"the Lark grammar has the terminal {name}, which names itself")
        if len(path) > MAX_DEPTH:
            raise RequestError(f"the Lark grammar has terminals more than {MAX_DEPTH} deep")
        if (known := self._terminals.get(name)) is None:
            if name not in self._reader.defined:
                raise RequestError(f"the Lark grammar has no terminal {name}, which is used")
            known = self._terminal(self._reader.defined[name], (*path, name))
            self._num_parts += sum(1 for _ in islice(parts(known), MAX_PARTS))
            if self._num_parts >= MAX_PARTS:
                raise RequestError(f"the Lark grammar has terminals of over {MAX_PARTS} parts")
            self._terminals[name] = known
        return known

    def _terminal(self, node: Expr, path: tuple[str, ...]) -> Expr:
        if isinstance(node, RuleRef):
            if not _is_terminal(node.name):
                raise RequestError(f"the Lark grammar has a terminal with the rule {node.name}")
            return self._named(node.name, path)
        return rebuilt(node, lambda each: self._terminal(each, path))


def _is_terminal(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _in_any_case(node: Expr) -> Expr:
    return mapped(node, lambda char: replace(char, any_case=True))


def mapped(node: Expr, call: Callable[[Chars], Expr]) -> Expr:
    """An expression with other parts in the place of characters."""
    if isinstance(node, Chars):
        return call(node)
    return rebuilt(node, lambda item: mapped(item, call))
