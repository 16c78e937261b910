"""Reads JSON that arrives in pieces: where a value ends, and whether it is valid.

Text is handed on byte for byte, with two repairs of what models get wrong inside strings: a raw
control character is escaped, and a backslash that escapes nothing becomes two. Knows no tool calls.
"""

from __future__ import annotations

import json
import re
from itertools import chain
from math import isinf
from typing import Any, Final, NoReturn

from asyncllm.api.parsing.scanner import Out, Run, Scanner

MAX_DEPTH: Final = 100
_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f]+')
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_OF_NUMBERS: Final = frozenset("-+.eE0123456789")
_HEX: Final = frozenset("0123456789abcdefABCDEF")
_CLOSES: Final = {"{": "}", "[": "]"}


def read_value(s: Scanner, out: Out) -> Run[bool]:
    """Pass one JSON value, handing its text to ``out`` as it comes.

    Returns False, at the first character that cannot be, if the text is no JSON, is cut, is nested
    deeper than MAX_DEPTH, or has a number beyond double precision, which readers take for infinity
    or do not take; what was handed on then is the beginning of a value.
    """
    stack: list[str] = []
    expect = "value"  # or: first value, key, first key, colon, rest
    while True:
        if stack and (space := (yield from s.spaces())):
            out(space)
        c = yield from s.at()
        if expect == "colon" or (expect == "rest" and c == ","):
            if c not in (":", ","):
                return False
            _pass(s, out, 1)
            expect = "key" if c == "," and stack[-1] == "{" else "value"
            continue
        if expect in ("rest", "first key", "first value") and c and c == _CLOSES[stack[-1]]:
            _pass(s, out, 1)
            stack.pop()
        elif expect in ("key", "first key"):
            if not (c == '"' and (yield from read_string(s, out))):
                return False
            expect = "colon"
            continue
        elif expect == "rest":
            return False
        elif c in ("{", "["):
            if len(stack) == MAX_DEPTH:
                return False
            _pass(s, out, 1)
            stack.append(c)
            expect = "first key" if c == "{" else "first value"
            continue
        elif not (yield from _scalar(s, out, c)):
            return False
        if not stack:
            return True
        expect = "rest"


def read_string(s: Scanner, out: Out) -> Run[bool]:
    """Pass a JSON string, which begins here, handing it on repaired; False if it is cut."""
    _pass(s, out, 1)
    while c := (yield from s.at()):
        if plain := _PLAIN.match(s.buf, s.pos):
            _pass(s, out, plain.end() - s.pos)
        elif c == '"':
            _pass(s, out, 1)
            return True
        elif c != "\\":
            out(escaped(c))
            s.pos += 1
        else:
            length = yield from _escape_len(s)
            if length < 0:
                return False
            if length == 0:
                out("\\")
                length = 1
            _pass(s, out, length)
    return False


def escaped(text: str) -> str:
    """Text as the inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def loads(text: str) -> Any:
    """A JSON value as :func:`read_value` has it: no NaN, nothing infinite or too deep.
    Raises ValueError."""
    try:
        value = json.loads(
            text, parse_constant=_refuse, parse_float=_finite, parse_int=_finite_integer
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_too_deep(value):
        raise ValueError("nested too deeply")
    return value


def object_text(text: str) -> str | None:
    """Arguments that came as JSON text of something else than an object.

    ``null`` and an empty string give ``{}``, a string that holds an object gives what it holds.
    """
    try:
        value = loads(text)
        if value is None or value == "":
            return "{}"
        if isinstance(value, str) and isinstance(loads(value), dict):
            value.encode()  # half a surrogate pair cannot be sent
            return value.strip()
    except ValueError:
        pass
    return None


def _pass(s: Scanner, out: Out, length: int) -> None:
    out(s.buf[s.pos : s.pos + length])
    s.pos += length


def _scalar(s: Scanner, out: Out, c: str) -> Run[bool]:
    if c == '"':
        return (yield from read_string(s, out))
    if c in ("t", "f", "n"):
        literal = {"t": "true", "f": "false", "n": "null"}[c]
        if not (yield from s.starts(literal)):
            return False
        _pass(s, out, len(literal))
        return True
    length = 0
    while (d := (yield from s.at(length))) and d in _OF_NUMBERS:
        length += 1
    # at the end of the text more digits could have followed
    if not d or not _NUMBER.fullmatch(s.buf, s.pos, s.pos + length):
        return False
    if isinf(float(s.buf[s.pos : s.pos + length])):
        return False
    _pass(s, out, length)
    return True


def _escape_len(s: Scanner) -> Run[int]:
    """Length of the escape that begins here; 0: none, -1: cut."""
    c = yield from s.at(1)
    if not c:
        return -1
    if c != "u":
        return 2 if c in '"\\/bfnrt' else 0
    for k in range(2, 6):
        d = yield from s.at(k)
        if not d:
            return -1
        if d not in _HEX:
            return 0
    return 6


def _finite(text: str) -> float:
    value = float(text)
    return _refuse(text) if isinf(value) else value


def _finite_integer(text: str) -> int:
    _finite(text)
    return int(text)


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = (
            each.values() if isinstance(each, dict) else each
            for each in level
            if isinstance(each, dict | list)
        )
        level = [*chain.from_iterable(inner)]
    return bool(level)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant[:40]} is no JSON")
