"""Parses request bodies as JSON, with their cost bounded beforehand.

``json.loads`` holds the interpreter lock until it is done, so that no thread helps: what it may be
asked for is counted first, in a few passes over the bytes that run at memory speed. Knows JSON;
knows no field.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import isinf
from typing import Final, NoReturn

from asyncllm.api.common.validation import preview, reject

# 4,096 messages of one text part each come to 12,290 arrays and objects and 32,770 strings
MAX_CONTAINERS: Final = 1 << 14
MAX_STRINGS: Final = 1 << 17
MIN_VALUES: Final = 3 << 16  # where the context is shorter than half of it
MAX_DEPTH: Final = 128
MAX_DIGITS: Final = 400  # of an integer: reading one takes the square of its length

_STRUCTURE: Final = b"[]{},"
_NOT_STRUCTURE: Final = bytes(set(range(256)) - set(_STRUCTURE))
_DIGITS: Final = bytes(ord("1") if byte in b"0123456789" else ord(" ") for byte in range(256))
_LONG: Final = b"1" * (MAX_DIGITS + 1)
_STEP: Final = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def most_values(max_len: int) -> int:
    """Values a body may have where a request has ``max_len`` tokens: a prompt of ids must fit."""
    return max(MIN_VALUES, 2 * max_len)


def load(raw: bytes, max_values: int = MIN_VALUES) -> dict[str, object]:
    """The JSON object of a request body.

    Args:
        max_values: elements of all arrays and objects together.

    Raises:
        RequestError: 400, it is something else, or too much of it.
    """
    _check(raw, max_values, "the body")
    try:
        # JSON is UTF-8; given bytes, json.loads would try UTF-16 and UTF-32 too, which
        # _check cannot read
        value = json.loads(
            raw.decode("utf-8-sig"), parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        reject("the body is nested too deeply")
    except ValueError as error:
        reject(f"the body is not valid JSON: {error}")
    if not isinstance(value, dict):
        reject(f"the body must be a JSON object, not {preview(value)}")
    return value


def check_nested(texts: Iterable[str], what: str, name: str) -> None:
    """Raises RequestError where parsing all of these JSON texts could take long.

    Some may be no JSON, such as arguments that are cut.

    Args:
        what: they are, for the message.
    """
    each = [text.encode(errors="surrogatepass") for text in texts]
    # a string that is open at the end of one would turn those behind it inside out
    closed = [raw + b'"' if _plain(raw).count(b'"') % 2 else raw for raw in each]
    _check(b"\n".join(closed), MIN_VALUES, what, name, closed)


def _plain(raw: bytes) -> bytes:
    """Without quotes that are text."""
    # Without pairs of backslashes, a backslash before a quote means that the quote is text.
    return raw.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in raw else raw


def _check(
    raw: bytes, max_values: int, what: str, name: str | None = None, texts: Sequence[bytes] = ()
) -> None:
    """Raises RequestError where parsing could take long.

    Text that is not JSON may be counted wrongly, but never as less than the parser reads of it.

    Args:
        texts: what ``raw`` consists of, where some may have brackets that nothing closes.
    """
    few = raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH
    if few and len(raw) <= min(MAX_CONTAINERS, max_values) and _LONG not in raw.translate(_DIGITS):
        return  # too little of anything
    plain = _plain(raw)
    strings = plain.count(b'"') // 2
    if strings > MAX_STRINGS:
        _too_many(what, strings, "strings", MAX_STRINGS, name)
    outside = b"".join(plain.split(b'"')[::2])
    structure = outside.translate(None, _NOT_STRUCTURE)
    containers = structure.count(b"[") + structure.count(b"{")
    if containers > MAX_CONTAINERS:
        _too_many(what, containers, "arrays and objects", MAX_CONTAINERS, name)
    values = structure.count(b",") + containers
    if values > max_values:
        _too_many(what, values, "values", max_values, name)
    brackets = structure.translate(None, b",")
    if len(brackets) <= 2 * containers:  # else there is one that closes nothing
        depth = max(accumulate(map(_STEP.__getitem__, brackets)), default=0)
        if depth > MAX_DEPTH and len(texts) > 1:
            for text in texts:
                _check(text, max_values, what, name)
        elif depth > MAX_DEPTH:
            _too_many(what, depth, "levels", MAX_DEPTH, name)
    if _LONG in outside.translate(_DIGITS):
        reject(f"{what}: a number has more than {MAX_DIGITS} digits", name)


def _too_many(what: str, number: int, of: str, most: int, name: str | None) -> NoReturn:
    reject(f"{what}: {number:,} {of}, at most {most:,} in one request", name)


def _finite(text: str) -> float:
    value = float(text)
    if isinf(value):
        reject(f"the body holds the number {text[:40]}, beyond double precision")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
