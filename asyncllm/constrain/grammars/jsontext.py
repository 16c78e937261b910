"""Writes JSON text in the style of outputs: ", " and ": ", each character spelled in one way."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Final, NoReturn

from asyncllm.errors import RequestError
from asyncllm.plain import Json

MAX_DEPTH: Final = 64
LARGEST: Final = Decimal("1.7976931348623157e308")
_HALF: Final = re.compile("[\ud800-\udfff]")


def load(text: str) -> Json:
    """The value of a JSON text, with Decimal for numbers that are not written as integers.

    Raises:
        RequestError: it is not JSON, nests too deeply, or has a number that is not finite.
    """
    try:
        value: Json = json.loads(
            text, parse_float=_decimal, parse_int=_integer, parse_constant=_constant
        )
    except RecursionError:
        raise RequestError(f"the JSON schema is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise RequestError(f"the JSON schema is not valid JSON: {error}") from error
    return value


def _decimal(text: str) -> Decimal:
    try:
        value = Decimal(text)
        if abs(value) <= LARGEST and value.adjusted() >= -400:
            return value
    except ArithmeticError:  # an exponent that even Decimal does not have
        pass
    raise RequestError(f"the JSON schema holds the number {text[:40]}, beyond double precision")


def _integer(text: str) -> int:
    if len(text) > 309:
        _decimal(text)
    return int(text)


def _constant(text: str) -> NoReturn:
    raise RequestError(f"the JSON schema holds {text}, which is not JSON")


def string(text: str) -> str:
    """A JSON string; a half character, which UTF-8 does not have, is spelled in hex."""
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", json.dumps(text, ensure_ascii=False))


def scalar(value: Json) -> str:
    """The text of a value that is neither an array nor an object."""
    match value:
        case str():
            return string(value)
        case Decimal():
            return str(value)
        case _:
            return json.dumps(value)


def dump(value: Json) -> str:
    """The text of a value that :func:`load` gave."""
    match value:
        case dict():
            return f"{{{', '.join(f'{string(k)}: {dump(v)}' for k, v in value.items())}}}"
        case list():
            return f"[{', '.join(map(dump, value))}]"
        case _:
            return scalar(value)
