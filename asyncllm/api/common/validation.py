"""Limits of values in requests, and how errors show a value that exceeds one.

Knows JSON values; knows no route and no tokenizer.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, NoReturn, cast

import numpy as np

from asyncllm.errors import RequestError

Body = Mapping[str, Any]

MAX_N: Final = 16
MAX_LOGPROBS: Final = 20
MAX_LOGPROB_IDS: Final = 128
MAX_STOP: Final = 16
MAX_STOP_CHARS: Final = 512
MAX_STOP_IDS: Final = 128
MAX_BIAS: Final = 300
MAX_ALLOWED: Final = 4096
MAX_DECAY: Final = 100.0
MAX_PROMPTS: Final = 256
MAX_INT32: Final = 2**31 - 1
MAX_SEED: Final = 2**63 - 1 - MAX_N  # choice i of n gets seed + i, which is an int64 too
GREEDY_BELOW: Final = 1e-5  # a temperature below it picks the best token


def reject(message: str, param: str | None = None) -> NoReturn:
    """Refuse with 400."""
    raise RequestError(message, param=param, code="invalid_value" if param else "invalid_json")


def preview(value: Any) -> str:
    """A value for an error text, at most 80 characters whatever was sent."""
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, str):
        value = value[:80]
    shown = json.dumps(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def valid_text(value: object, name: str) -> str:
    """A string without lone surrogates, which no tokenizer can encode."""
    if not isinstance(value, str):
        reject(f"{name} must be a string, not {preview(value)}", name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reject(f"{name} is not valid Unicode: lone surrogate at character {error.start}", name)
    return value


def token_ids(value: list[object], name: str) -> array[int]:
    """A prompt of token ids as a column of int32."""
    try:
        column = array("i", cast("list[int]", value))
    except (TypeError, OverflowError):
        column = _column_of_floats(value, name)
    # what is below 2 may be negative, or a boolean
    for i in map(int, np.flatnonzero(np.frombuffer(column, np.int32) < 2)):
        _token_id(value[i], name, i)
    return column


def _column_of_floats(value: list[object], name: str) -> array[int]:
    """Where not all are ints that fit: JSON's 3.0 is a whole number too."""
    with suppress(TypeError, OverflowError):
        numbers = np.frombuffer(array("d", cast("list[float]", value)))
        if ((np.trunc(numbers) == numbers) & (np.abs(numbers) <= MAX_INT32)).all():
            return array("i", numbers.astype(np.int32).tobytes())
    return array("i", [_token_id(each, name, i) for i, each in enumerate(value)])


def _token_id(value: object, name: str, at: int) -> int:
    whole = type(value) is int or (type(value) is float and value.is_integer())
    if not whole:
        reject(f"{name}[{at}] must be an integer, not {preview(value)}", f"{name}[{at}]")
    number = int(cast("int | float", value))
    if not 0 <= number <= MAX_INT32:
        reject(
            f"{name}[{at}]: {preview(value)} is not a token id (0 .. vocabulary size - 1)",
            f"{name}[{at}]",
        )
    return number
