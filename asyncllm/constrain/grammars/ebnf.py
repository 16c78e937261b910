"""Reads EBNF (GBNF, as llama.cpp and xgrammar write it) into rules over single characters.

Every terminal is one character of a class, so there is only one way to split text into terminals,
and the parser alone decides what matches. Knows only the engine's notation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import inf
from typing import ClassVar, Final, NoReturn

from asyncllm.constrain.grammars.regex import ALL, PatternReader, class_at, escape_at, literal
from asyncllm.constrain.grammars.rules import (
    EMPTY,
    Alt,
    Expr,
    Repeat,
    RuleRef,
    Rules,
    Seq,
    alt,
    finite,
    seq,
    written,
)
from asyncllm.errors import RequestError

MAX_RULES: Final = 3000
MAX_REPEATS: Final = 8

_SKIP: Final = re.compile(r"(?:\s|#[^\n]*)*")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_DEFINES: Final = re.compile(r"(?:\s|#[^\n]*)*::=")
_TEXT: Final = re.compile(r'"((?:[^"\\\n]|\\.)*)"' r"|'((?:[^'\\\n]|\\.)*)'")
_COUNT: Final = re.compile(r"\{\s*([0-9]+)\s*(?:(,)\s*([0-9]*)\s*)?\}")


def to_lark(source: str) -> str:
    """The engine's grammar of EBNF rules, of which ``root`` is the whole output.

    Raises:
        RequestError: they are malformed, or no text matches them.
    """
    rules = _EbnfReader(source).rules()
    if "root" not in rules:
        raise RequestError("the EBNF grammar has no rule root")
    rules = finite({name: _flat(name, rule) for name, rule in rules.items()}, "root")
    if not rules:
        raise RequestError("no text matches the EBNF grammar: root never ends")
    return written(rules, "root")


class NotationReader(PatternReader):
    """Reads a grammar of several lines.

    Attributes:
        notation: its name, for errors.
        skipped: what means nothing between two items.
    """

    notation: ClassVar[str]
    skipped: ClassVar[re.Pattern[str]]

    def fail(self, why: str) -> NoReturn:
        line = self.source.count("\n", 0, self.at) + 1
        raise RequestError(f"the {self.notation} grammar {why} in line {line}")

    def peek(self) -> str:
        found = self.skipped.match(self.source, self.at)
        self.at = found.end() if found else self.at
        return super().peek()

    def unescaped(self, inside: str) -> str:
        """The text that is written between quotes."""
        made, at = "", 0
        while at < len(inside):
            char = inside[at]
            at += 1
            if char == "\\":
                try:
                    code, at = escape_at(inside, at)
                except RequestError as error:
                    self.fail(f"has a text with an unknown escape ({error.message})")
                char = chr(code)
            if "\ud800" <= char <= "\udfff":
                self.fail("has half a character in a text")
            made += char
        return made


class _EbnfReader(NotationReader):
    counts, notation, skipped = _COUNT, "EBNF", _SKIP

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.refs: list[tuple[str, int]] = []  # rules that are used, and where

    def rules(self) -> Rules:
        found: Rules = {}
        while self.peek():
            name = _NAME.match(self.source, self.at)
            if name is None or not (defines := _DEFINES.match(self.source, name.end())):
                self.fail(f"has {self.source[self.at : self.at + 20]!r} instead of a rule")
            if name[0] in found:
                self.fail(f"has a second rule {name[0]}")
            if len(found) == MAX_RULES:
                self.fail(f"has more than {MAX_RULES} rules")
            self.at = defines.end()
            found[name[0]] = self.alternatives()
        for ref, at in self.refs:
            if ref not in found:
                self.at = at
                self.fail(f'has no rule for "{ref}", which is used')
        return found

    def item(self) -> Expr | None:
        item = self.single(self.peek())
        times = 0
        while item is not None and (bounds := self.bounds()):
            item = Repeat(item, *bounds)
            times += 1
            if times > MAX_REPEATS:
                self.fail(f"repeats a repetition more than {MAX_REPEATS} times")
        return item

    def single(self, char: str) -> Expr | None:
        """None: the next rule begins here."""
        if name := _NAME.match(self.source, self.at):
            if _DEFINES.match(self.source, name.end()):
                return None
            self.refs.append((name[0], self.at))
            self.at = name.end()
            return RuleRef(name[0])
        if text := _TEXT.match(self.source, self.at):
            self.at = text.end()
            return literal(self.unescaped(text[1] or text[2] or ""))
        self.at += 1
        match char:
            case '"' | "'":
                self.fail("has a text without its closing quote")
            case "[":
                node, self.at = class_at(self.source, self.at)
                return node
            case ".":
                return ALL
            case "(":
                if self.peek() == "=":
                    self.fail("has a look-ahead, which cannot be enforced,")
                return self.closed()
            case _:
                self.fail(f"has {char!r}, which means nothing,")


def _flat(name: str, rule: Expr) -> Expr:
    """``rule`` without direct recursion at its edges, which parsers are slow at: the same texts.

    Of X = A X | X C | X M X | B, what comes is Y (M Y)*, where Y = A* B C*.
    """
    me = RuleRef(name)
    heads: list[Expr] = []
    tails: list[Expr] = []
    middles: list[Expr] = []
    bases: list[Expr] = []
    for one in _alternatives(rule):
        items = list(one.items) if isinstance(one, Seq) else [one]
        if items == [me]:
            continue
        if len(items) > 1 and items[0] == me and items[-1] == me:
            middles.append(seq(*items[1:-1]))
        elif items and items[-1] == me:
            heads.append(seq(*items[:-1]))
        elif items and items[0] == me:
            tails.append(seq(*items[1:]))
        else:
            bases.append(one)
    if not (heads or tails or middles):
        return rule
    base = alt(*bases)
    if heads or tails:
        base = seq(_many(heads), base, _many(tails))
    if not middles:
        return base
    endless = isinstance(base, Repeat) and base.low <= 1 and base.high == inf
    if endless and all(middle == EMPTY for middle in middles):
        return base  # one after the other are one
    return seq(base, Repeat(seq(alt(*middles), base)))


def _many(parts: list[Expr]) -> Expr:
    return Repeat(alt(*parts)) if parts else EMPTY


def _alternatives(rule: Expr) -> Iterator[Expr]:
    if isinstance(rule, Alt):
        for item in rule.items:
            yield from _alternatives(item)
    else:
        yield rule
