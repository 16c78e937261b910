"""Reads regular expressions as JSON Schema means them (ECMA-262), and writes them for the engine.

Knows their syntax, and how a JSON string spells what they match; knows no schemas and no engine.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from math import inf
from operator import itemgetter
from typing import Final, NoReturn

from asyncllm.constrain.grammars.rules import (
    EMPTY,
    NOTHING,
    Alt,
    Anchor,
    Chars,
    Expr,
    Repeat,
    Seq,
    alt,
    in_case,
    seq,
    times,
)
from asyncllm.errors import RequestError

# by whether what matches begins where the text begins, and whether it ends where that ends
ByPlace = dict[tuple[bool, bool], Expr]
_ANYWHERE: Final = (False, False)

MAX_DEPTH: Final = 100
MAX_COUNT: Final = 1 << 20
MAX_NODES: Final = 100_000
MAX_REPEATS: Final = 2_000  # the engine takes long over many

# what a JSON string cannot hold as it is, and how it spells it: one way each, that of json.dumps
SHORT: Final = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 0x22: '"', 0x5C: "\\"}
SPECIAL: Final = frozenset((*range(32), 0x22, 0x5C))
_NOT_PLAIN: Final = r'["\\\x00-\x1F]'
_SPELLED: Final = {
    code: rf"\\{re.escape(SHORT[code])}" if code in SHORT else rf"\\u00{code:02x}"
    for code in sorted(SPECIAL)
}
_ALL_SPELLED: Final = r'\\(?:["\\bfnrt]|u00(?:0[0-7be-f]|1[0-9a-f]))'


ANY: Final = Chars(r"[^\n\r\x{2028}\x{2029}]", SPECIAL - {10, 13})
ALL: Final = Chars(r"[\x00-\x{10FFFF}]", SPECIAL)

# Dialects differ in what lies beyond ASCII. A class takes what is in it everywhere, its opposite
# what is in it nowhere, so that every validator agrees.
_CLASSES: Final = {
    "d": Chars("[0-9]"),
    "w": Chars("[0-9A-Za-z_]"),
    "s": Chars(r"[ \t\n\r\x0B\x0C]", frozenset((9, 10, 11, 12, 13))),
    "D": Chars(r"[^\p{Nd}]", SPECIAL),
    "W": Chars(r"[^\w]", SPECIAL),
    "S": Chars(r"[^\s\x{FEFF}\x1C-\x1F]", SPECIAL - {9, 10, 11, 12, 13, 28, 29, 30, 31}),
}
_CONTROLS: Final = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_HEX: Final = re.compile(
    r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}|U([0-9A-Fa-f]{8})|c([A-Za-z])"
)
_TIMES: Final = {"*": (0, inf), "+": (1, inf), "?": (0, 1)}
_BRACES: Final = re.compile(r"\{([0-9]+)(?:(,)([0-9]*))?\}")
_GROUP: Final = re.compile(r"\?(?::|P?<[A-Za-z_]\w*>)")
_MARKS: Final = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]?|[()|]", re.DOTALL)
_PROPERTY: Final = re.compile(r"([pP])\{([A-Za-z_=]+)\}")
_WITHOUT_SPECIAL: Final = frozenset(
    ("Alphabetic", "Lowercase", "Uppercase", "ID_Start", "ID_Continue", "Emoji")
)
_LONG: Final = {
    "Letter": "L", "Lowercase_Letter": "Ll", "Uppercase_Letter": "Lu", "Mark": "M", "Number": "N",
    "Decimal_Number": "Nd", "Punctuation": "P", "Symbol": "S", "Separator": "Z", "Other": "C",
    "Control": "Cc",
}  # fmt: skip


def code_text(code: int) -> str:
    """A code point as the engine's expressions and classes spell it."""
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:X}}}"


def literal(text: str) -> Expr:
    """Matches ``text``, which holds no half characters."""
    return seq(*(_one(ord(char)) for char in text))


def _one(code: int) -> Chars:
    return Chars(f"[{code_text(code)}]", SPECIAL & {code})


def parse(source: str) -> Expr:
    """What an expression means.

    Raises:
        RequestError: it is malformed, or holds what cannot be enforced (look-around, references,
            word boundaries, flags).
    """
    return _RegexParser(source).whole()


def class_at(source: str, at: int) -> tuple[Expr, int]:
    """The class whose ``[`` is before ``at``, and where it ends. Raises RequestError."""
    parser = _RegexParser(source, at)
    return parser.bracket(), parser.at


def escape_at(source: str, at: int) -> tuple[int, int]:
    """The character whose backslash is before ``at``, and where it ends.
    Raises RequestError."""
    parser = _RegexParser(source, at)
    found = parser.escaped()
    if not isinstance(found, int):
        parser.fail("has a class where one character is meant")
    return found, parser.at


def conjuncts(source: str) -> list[tuple[str, bool]]:
    """Patterns that a text must match, or must not (False), to match ``source``: each look-ahead
    right behind a ``^`` that begins it is one of its own."""
    found: list[tuple[str, bool]] = []
    begun, depth, leads = 1, 0, source.startswith("^")
    for mark in _MARKS.finditer(source, 1):
        if mark[0] == "|" and depth == 0:
            return [(source, True)]
        if mark[0] == "(":
            ahead = source.startswith(("?=", "?!"), mark.end()) and mark.start() == begun
            leads &= depth > 0 or ahead
            depth += 1
        elif mark[0] == ")":
            depth -= 1
            if depth == 0 and leads:
                found.append((f"^(?:{source[begun + 3 : mark.start()]})", source[begun + 2] == "="))
                begun = mark.end()
    return [*found, (f"^{source[begun:]}", True)] if found and depth == 0 else [(source, True)]


def full(node: Expr) -> Expr:
    """``node`` without its anchors: all of the text must match."""
    return alt(*_placed(node).values())


def searched(node: Expr) -> Expr:
    """What holds a match of ``node`` anywhere, as JSON Schema's ``pattern`` means it."""
    rest = Repeat(ALL)
    return alt(
        *(
            seq(*(() if begins else (rest,)), inner, *(() if ends else (rest,)))
            for (begins, ends), inner in _placed(node).items()
        )
    )


def raw(node: Expr) -> str:
    """The engine's expression."""
    return _written(node, quoted=False)


def quoted(node: Expr) -> str:
    """The engine's expression of the text between the quotes of a JSON string."""
    return _written(node, quoted=True)


@dataclass(slots=True)
class _Class:
    """A class that is being read."""

    parts: list[str] = field(default_factory=list)
    special: set[int] = field(default_factory=set)
    joined: list[Chars] = field(default_factory=list)  # classes that are a part of it

    def add(self, low: int, high: int) -> None:
        self.special.update(code for code in SPECIAL if low <= code <= high)
        for first, last in ((low, min(high, 0xD7FF)), (max(low, 0xE000), high)):
            if first <= last:
                ends = (code_text(first), code_text(last))
                self.parts.append(ends[0] if first == last else "-".join(ends))

    def done(self, negated: bool) -> Expr:
        if any({_CLASSES[name], _CLASSES[name.upper()]} <= {*self.joined} for name in "dws"):
            return NOTHING if negated else ALL
        for each in map(_widest, self.joined) if negated else self.joined:
            self.parts.append(each.text)
            self.special |= each.special
        if not self.parts:
            return ALL if negated else NOTHING
        inner = "".join(self.parts)
        if negated:
            return Chars(f"[^{inner}]", SPECIAL - self.special)
        return Chars(f"[{inner}]", frozenset(self.special))


def _widest(chars: Chars) -> Chars:
    """What is in a class in any dialect: what is not in its opposite."""
    for name in _CLASSES:
        if chars is _CLASSES[name]:
            outside = _CLASSES[name.swapcase()]
            return Chars(f"[^{outside.text}]", SPECIAL - outside.special)
    return chars


class PatternReader:
    """Reads alternatives of repeated items from a text; its kinds say what an item is."""

    counts = _BRACES

    def __init__(self, source: str, at: int = 0) -> None:
        self.source, self.at, self.depth = source, at, 0

    def fail(self, why: str) -> NoReturn:
        """Raises RequestError."""
        raise NotImplementedError

    def peek(self) -> str:
        """The next character that means something; "" at the end."""
        return self.source[self.at : self.at + 1]

    def item(self) -> Expr | None:
        """The next item and how often it may repeat; None: the sequence is over."""
        raise NotImplementedError

    def alternatives(self) -> Expr:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"is nested more than {MAX_DEPTH} deep")
        found = [self.sequence()]
        while self.peek() == "|":
            self.at += 1
            found.append(self.sequence())
        self.depth -= 1
        return alt(*found)

    def sequence(self) -> Expr:
        items: list[Expr] = []
        while (char := self.peek()) and char not in "|)":
            if (item := self.item()) is None:
                break
            items.append(item)
        return seq(*items)

    def closed(self) -> Expr:
        """The inside of parentheses, after the first."""
        inner = self.alternatives()
        if self.peek() != ")":
            self.fail("has an unclosed parenthesis")
        self.at += 1
        return inner

    def bounds(self) -> tuple[int, float] | None:
        """How often what was read before may come; None: that is not said."""
        if simple := _TIMES.get(self.peek()):
            self.at += 1
            return simple
        if found := self.counts.match(self.source, self.at):
            self.at = found.end()
            if any(len(digits or "") > 9 for digits in found.group(1, 3)):
                self.fail(f"has the repetition {_short(found[0])} beyond {MAX_COUNT}")
            low = int(found[1])
            high = int(found[3]) if found[3] else inf if found[2] else low
            if low > high:
                self.fail(f"has the repetition {found[0]} with bounds out of order")
            if max(count for count in (low, high) if count != inf) > MAX_COUNT:
                self.fail(f"has the repetition {found[0]} beyond {MAX_COUNT}")
            return low, high
        return None


class _RegexParser(PatternReader):
    def __init__(self, source: str, at: int = 0) -> None:
        super().__init__(source, at)
        self.nodes = self.repeats = 0

    def fail(self, why: str) -> NoReturn:
        raise RequestError(f"the regular expression {_short(self.source)} {why}")

    def whole(self) -> Expr:
        node = self.alternatives()
        if self.at < len(self.source):
            self.fail(f"has an unmatched ) at character {self.at}")
        return node

    def item(self) -> Expr:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self.fail(f"has more than {MAX_NODES} parts")
        return self.repeated(self.atom())

    def repeated(self, item: Expr) -> Expr:
        if bounds := self.bounds():
            if isinstance(item, Anchor):
                self.fail("repeats an anchor")
            self.repeats += 1
            if self.repeats > MAX_REPEATS:
                self.fail(f"has more than {MAX_REPEATS} repetitions")
            item = Repeat(item, *bounds)
            if self.peek() == "?":  # the shortest match first: the same texts
                self.at += 1
            if self.bounds():
                self.fail(f"repeats a repetition at character {self.at - 1}")
        return item

    def atom(self) -> Expr:
        char = self.source[self.at]
        self.at += 1
        match char:
            case "(":
                return self.group()
            case "[":
                return self.bracket()
            case "\\":
                return self.escape()
            case ".":
                return ANY
            case "^" | "$":
                return Anchor(char)
            case "*" | "+" | "?":
                self.fail(f"has {char} at character {self.at - 1} with nothing to repeat")
            case _:
                return self.char(ord(char))

    def char(self, code: int) -> Expr:
        return NOTHING if 0xD800 <= code <= 0xDFFF else _one(code)

    def group(self) -> Expr:
        if self.peek() == "?":
            found = _GROUP.match(self.source, self.at)
            if found is None:
                self.fail(
                    f"has (? at character {self.at - 1}: look-around and flags cannot be enforced"
                )
            self.at = found.end()
        return self.closed()

    def escape(self) -> Expr:
        char = self.peek()
        if char in ("b", "B", "k") or (char.isdigit() and char != "0"):
            self.fail(f"has \\{char}: word boundaries and references cannot be enforced")
        if char in ("A", "z", "Z"):
            self.at += 1
            return Anchor("^" if char == "A" else "$")
        found = self.escaped()
        return self.char(found) if isinstance(found, int) else found

    def escaped(self) -> int | Chars:
        """What follows a backslash, in or out of a class."""
        char = self.peek()
        if not char:
            self.fail("ends with a backslash")
        if char in _CLASSES:
            self.at += 1
            return _CLASSES[char]
        if found := _PROPERTY.match(self.source, self.at):
            self.at = found.end()
            return self.property(found[1] == "P", found[2])
        if found := _HEX.match(self.source, self.at):
            self.at = found.end()
            if found[5]:
                return ord(found[5]) % 32
            return self.paired(int(found[1] or found[2] or found[3] or found[4], 16))
        self.at += 1
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char.isascii() and char.isalnum():
            self.fail(f"has \\{char}, which is unknown")
        return ord(char)

    def paired(self, code: int) -> int:
        """A character that is written as two halves."""
        if code > 0x10FFFF:
            self.fail(f"has the character {code:#x}, which is none")
        low = _HEX.match(self.source, self.at + 1) if self.peek() == "\\" else None
        if 0xD800 <= code <= 0xDBFF and low and low[2] and 0xDC00 <= int(low[2], 16) <= 0xDFFF:
            self.at = low.end()
            return 0x10000 + ((code - 0xD800) << 10) + int(low[2], 16) - 0xDC00
        return code

    def property(self, negated: bool, name: str) -> Chars:
        key, _, value = name.rpartition("=")
        if key in ("", "gc", "General_Category"):
            value = _LONG.get(value, value)
            inside = {c for c in SPECIAL if unicodedata.category(chr(c)).startswith(value)}
            known = value in _WITHOUT_SPECIAL or value in {c for v in _LONG.values() for c in v[:1]}
            known |= len(value) == 2 and value[0] in "LMNPSZC" and value[1].islower()
        else:
            inside = set()
            known = key in ("sc", "Script", "scx", "Script_Extensions")
            known &= value not in ("Common", "Zyyy", "Inherited", "Zinh")
        if not known:
            self.fail(f"has \\p{{{name}}}, which is unknown")
        special = SPECIAL - inside if negated else frozenset(inside)
        return Chars(f"[\\{'P' if negated else 'p'}{{{name}}}]", special)

    def bracket(self) -> Expr:
        found = _Class()
        negated = self.peek() == "^"
        self.at += negated
        while (char := self.peek()) != "]":
            if not char:
                self.fail("has an unclosed [")
            low = self.member()
            if isinstance(low, int) and self.source[self.at : self.at + 1] == "-":
                if self.source[self.at + 1 : self.at + 2] in ("]", ""):
                    found.add(low, low)
                    continue
                self.at += 1
                high = self.member()
                if isinstance(high, int):
                    if low > high:
                        self.fail("has a range that is out of order")
                    found.add(low, high)
                    continue
                found.add(ord("-"), ord("-"))
                found.add(low, low)
                low = high
            if isinstance(low, int):
                found.add(low, low)
            else:
                found.joined.append(low)
        self.at += 1
        return found.done(negated)

    def member(self) -> int | Chars:
        char = self.source[self.at : self.at + 1]
        if not char:
            self.fail("has an unclosed [")
        self.at += 1
        if char != "\\":
            return ord(char)
        if self.peek() == "b":
            self.at += 1
            return 8
        return self.escaped()


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:97] + "...")


def _placed(node: Expr) -> ByPlace:
    """``node`` without its anchors, by what they say; the node itself where it has none."""
    if isinstance(node, Anchor):
        return {(node.at == "^", node.at == "$"): EMPTY}
    if not isinstance(node, Seq | Alt | Repeat):
        return {_ANYWHERE: node}
    items = list(map(_placed, node.items))
    kept = [_is_kept(item, made) for item, made in zip(node.items, items, strict=True)]
    if all(kept):
        return {_ANYWHERE: node}
    match node:
        case Seq():
            found: list[ByPlace] = []
            for is_kept, run in groupby(zip(kept, items, node.items, strict=True), itemgetter(0)):
                some = list(run)
                if is_kept:
                    found.append({_ANYWHERE: seq(*(item for _, _, item in some))})
                else:
                    found += (made for _, made, _ in some)
            return reduce(_followed, found)
        case Alt():
            return _gathered(pair for made in items for pair in made.items())
        case Repeat(low=0, high=1):
            return _gathered([(_ANYWHERE, EMPTY), *items[0].items()])
        case Repeat(low=1, high=1):
            return items[0]
        case Repeat():
            raise RequestError("the regular expression repeats an anchor, which cannot be enforced")


def _is_kept(node: Expr, made: ByPlace) -> bool:
    return made.get(_ANYWHERE) is node


def _followed(one: ByPlace, other: ByPlace) -> ByPlace:
    """One after the other; nothing stands before the beginning, or behind the end."""
    found = []
    for (begins, ended), head in one.items():
        for (begun, ends), tail in other.items():
            if (begun and head != EMPTY) or (ended and tail != EMPTY):
                raise RequestError(
                    "the regular expression has an anchor inside, which cannot be enforced"
                )
            inner = seq(*(part for part in (head, tail) if part != EMPTY))
            found.append(((begins or begun, ended or ends), inner))
    return _gathered(found)


def _gathered(found: Iterable[tuple[tuple[bool, bool], Expr]]) -> ByPlace:
    # by identity, since to compare whole expressions takes long
    alternatives: dict[tuple[bool, bool], dict[int, Expr]] = {}
    for place, inner in found:
        inner = EMPTY if inner == EMPTY else inner
        alternatives.setdefault(place, {})[id(inner)] = inner
    return {place: alt(*inners.values()) for place, inners in alternatives.items()}


def _written(node: Expr, quoted: bool) -> str:
    match node:
        case Chars():
            return _chars(node) if quoted else in_case(node, node.text)
        case Seq():
            return "".join(_written(item, quoted) for item in node.items)
        case Alt(items=()):
            return r"[^\x00-\x{10FFFF}]"
        case Alt():
            return f"(?:{'|'.join(_written(item, quoted) for item in node.items)})"
        case Repeat():
            return f"(?:{_written(node.item, quoted)}){times(node.low, node.high)}"
        case _:
            raise AssertionError(node)


def _chars(node: Chars) -> str:
    if not node.special:
        return in_case(node, node.text)
    spelled = _ALL_SPELLED
    if node.special != SPECIAL:
        spelled = "|".join(_SPELLED[code] for code in sorted(node.special))
    return f"(?:{in_case(node, f'[{node.text}--{_NOT_PLAIN}]')}|{spelled})"
