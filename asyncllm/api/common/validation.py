"""Tables of request fields: name, type, range, default and meaning,
and how a JSON value is checked.

The tables of all protocols are made of these; docs are generated from the same declarations. Knows
JSON values; knows no route and no tokenizer.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from asyncllm.api.common.errors import NotAvailable
from asyncllm.errors import RequestError

Kind = Literal["integer", "number", "boolean", "string", "object", "array", "any"]
Body = Mapping[str, Any]

MAX_N: Final = 16
MAX_LOGPROBS: Final = 20
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of a JSON body.

    Args:
        kind: the JSON type; "integer" takes 3.0 as well, no kind takes a string for a number.
        default: what absence and null mean.
        low, high: inclusive limits of a number; ``above`` makes ``low`` exclusive.
        choices: the only strings allowed, if any.
        to: the field of SamplingParams that the value goes to unchanged, if there is one.
        required: absence and null are errors.
        parse: checks and converts a structured value (value, name) -> result.
    """

    name: str
    kind: Kind
    doc: str
    default: Any = None
    low: float | None = None
    high: float | None = None
    above: bool = False
    choices: tuple[str, ...] = ()
    to: str = ""
    required: bool = False
    parse: Callable[[Any, str], Any] | None = None

    def read(self, body: Body, at: str = "") -> Any:
        """The checked value; ``at`` goes before the name in errors. Raises RequestError (400)."""
        value = body.get(self.name)
        if value is None:
            if self.required:
                reject(f"{at}{self.name} is missing", at + self.name)
            return self.default
        return self.check(value, at + self.name)

    def check(self, value: Any, name: str) -> Any:
        """``value`` as its Python type. Raises RequestError naming ``name``."""
        match self.kind:
            case "integer" | "number":
                value = number(value, name, integer=self.kind == "integer")
                self._check_range(value, name)
            case "boolean":
                expect(value, bool, name, "true or false")
            case "string":
                text(value, name)
                if self.choices and value not in self.choices:
                    reject(
                        f"{name}: {preview(value)} is not one of {', '.join(self.choices)}", name
                    )
            case "object":
                expect(value, dict, name, "an object")
            case "array":
                expect(value, list, name, "an array")
            case "any":
                pass
        return value if self.parse is None else self.parse(value, name)

    def limits(self) -> str:
        """The range in words, e.g. ``(0, 10]``; "" where there is none."""
        if self.low is None and self.high is None:
            return ", ".join(self.choices)
        left = "(" if self.above or self.low is None else "["
        low = "-inf" if self.low is None else f"{self.low:g}"
        if self.high is None:
            return f"{left}{low}, inf)"
        high = f"{self.high:g}" if abs(self.high) < 1e6 else f"{int(self.high)}"
        return f"{left}{low}, {high}]"

    def _check_range(self, value: float, name: str) -> None:
        low, high = self.low, self.high
        if low is not None and (value < low or (self.above and value == low)):
            reject(f"{name}: {preview(value)} is not in {self.limits()}", name)
        if high is not None and value > high:
            reject(f"{name}: {preview(value)} is not in {self.limits()}", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsupportedField:
    """A known field whose use cannot be honoured; only ``neutral`` values and null pass."""

    name: str
    doc: str
    neutral: tuple[Any, ...] = ()

    def check(self, body: Body, at: str = "") -> None:
        """Raises NotAvailable when the field asks for something."""
        value = body.get(self.name)
        if value is None or any(value == v and type(value) is type(v) for v in self.neutral):
            return
        name = at + self.name
        raise NotAvailable(f"{name}: {self.doc} is not available on this server", param=name)


def read(
    table: Sequence[Field], body: Body, at: str = "", silent: Body | None = None
) -> dict[str, Any]:
    """Every field of the table, by name.

    Args:
        silent: what absence and null mean, where it is not the field's default.

    Raises:
        RequestError: for the first bad value.
    """
    values = {field.name: field.read(body, at) for field in table}
    known = {} if silent is None else silent
    return values | {n: known[n] for n in values.keys() & known.keys() if body.get(n) is None}


def sampling(table: Sequence[Field], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that go to SamplingParams unchanged, by its field names."""
    return {f.to: values[f.name] for f in table if f.to and values[f.name] is not None}


def refuse(table: Sequence[UnsupportedField], body: Body, at: str = "") -> None:
    """Raises NotAvailable for the first field that asks for what is not there."""
    for field in table:
        field.check(body, at)


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


def expect(value: Any, kind: type, name: str, what: str) -> Any:
    """``value`` if it is of ``kind``. Raises RequestError naming ``what`` it must be."""
    if not isinstance(value, kind):
        reject(f"{name} must be {what}, not {preview(value)}", name)
    return value


def number(value: Any, name: str, *, integer: bool = False) -> Any:
    """A finite number; with ``integer`` an int (3.0 counts)."""
    what = "an integer" if integer else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        reject(f"{name} must be {what}, not {preview(value)}", name)
    if isinstance(value, float) and not math.isfinite(value):
        reject(f"{name} must be {what}, not {value}", name)
    if integer and isinstance(value, float):
        if not value.is_integer():
            reject(f"{name} must be an integer, not {value}", name)
        return int(value)
    if not integer and isinstance(value, int):
        # beyond every range anyway, but an int can be too large for a float
        return float(min(max(value, -(2**53)), 2**53))
    return value


def text(value: Any, name: str) -> str:
    """A string without lone surrogates, which no tokenizer can encode."""
    if not isinstance(value, str):
        reject(f"{name} must be a string, not {preview(value)}", name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reject(f"{name} is not valid Unicode: lone surrogate at character {error.start}", name)
    return value


def token_id(value: Any, name: str) -> int:
    """A token id; the vocabulary's end is checked where the vocabulary is known."""
    value = number(value, name, integer=True)
    if not 0 <= value <= MAX_INT32:
        reject(f"{name}: {preview(value)} is not a token id (0 .. vocabulary size - 1)", name)
    return int(value)


def token_ids(value: Any, name: str) -> array[int]:
    """A prompt of token ids as a column of int32."""
    try:
        column = array("i", value)
    except (TypeError, OverflowError):
        column = array("i", [token_id(v, name) for v in value])
    if bool in set(map(type, value)):
        reject(f"{name} must be token ids, not {preview(value)}", name)
    if column and min(column) < 0:
        reject(f"{name}: {min(column)} is not a token id (0 .. vocabulary size - 1)", name)
    return column


def stop_strings(value: Any, name: str) -> tuple[str, ...]:
    """One string or a list of them, within the limits."""
    items = [value] if isinstance(value, str) else expect(value, list, name, "a string or an array")
    if len(items) > MAX_STOP:
        reject(f"{name}: {len(items)} stop strings, at most {MAX_STOP}", name)
    for item in items:
        if not text(item, name):
            reject(f"{name}: an empty string cannot stop anything", name)
        if len(item) > MAX_STOP_CHARS:
            reject(f"{name}: {len(item)} characters, at most {MAX_STOP_CHARS}", name)
    return tuple(items)


def stop_ids(value: Any, name: str) -> tuple[int, ...]:
    """A list of token ids that end the text."""
    expect(value, list, name, "an array of token ids")
    if len(value) > MAX_STOP_IDS:
        reject(f"{name}: {len(value)} ids, at most {MAX_STOP_IDS}", name)
    return tuple(token_id(v, name) for v in value)


def allowed_ids(value: Any, name: str) -> tuple[int, ...]:
    """A list of the only token ids that may come; an empty one means all."""
    expect(value, list, name, "an array of token ids")
    if len(value) > MAX_ALLOWED:
        reject(f"{name}: {len(value)} ids, at most {MAX_ALLOWED}", name)
    return tuple(token_id(v, name) for v in value)


def length_penalty(value: Any, name: str) -> tuple[int, float] | None:
    """``[start, factor]``; None where the factor is 1 and so changes nothing."""
    if not isinstance(value, list) or len(value) != 2:
        reject(f"{name} must be [start, factor], not {preview(value)}", name)
    start, factor = number(value[0], f"{name}[0]", integer=True), number(value[1], f"{name}[1]")
    if not 0 <= start <= MAX_INT32:
        reject(f"{name}[0]: {preview(start)} is not in [0, {MAX_INT32}]", name)
    if not 1 <= factor <= MAX_DECAY:
        reject(f"{name}[1]: {preview(factor)} is not in [1, {MAX_DECAY:g}]", name)
    return (start, float(factor)) if factor > 1 else None


def logit_bias(value: Any, name: str) -> tuple[tuple[int, float], ...]:
    """``{"token id": bias}`` as pairs."""
    if len(value) > MAX_BIAS:
        reject(f"{name}: {len(value)} entries, at most {MAX_BIAS}", name)
    pairs = []
    for key, raw in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            reject(f"{name}: {preview(key)} is not a token id", name)
        bias = number(raw, f"{name}[{key}]")
        if not -100 <= bias <= 100:
            reject(f"{name}[{key}]: {preview(raw)} is not in [-100, 100]", name)
        pairs.append((token_id(int(key), name), bias))
    return tuple(pairs)
