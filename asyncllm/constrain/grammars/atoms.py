"""The possible values of a JSON value as alternatives of one kind each, and their intersection.

Knows no schemas: the content of a value is described by a set of numbers, each of which stands for
a schema that must hold (:mod:`asyncllm.constrain.grammars.schema`).
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, inf
from typing import Final

from asyncllm.plain import Json

Schemas = frozenset[int]  # all of them hold
FREE: Final[Schemas] = frozenset()
# A value, and for a lower bound whether it is out, for an upper one whether it is in: so the
# greater of two lower bounds is the narrower one, and the smaller of two upper ones.
Bound = tuple[Fraction | float, bool]


@dataclass(frozen=True, slots=True)
class Const:
    """Exactly one value, as JSON text that :func:`dump` writes."""

    text: str
    value: Json

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@dataclass(frozen=True, slots=True)
class Number:
    low: Bound = (-inf, True)
    high: Bound = (inf, False)
    integer: bool = False
    fractional: bool = False  # no integer
    excluded: frozenset[Fraction] = frozenset()

    def holds(self, value: Fraction) -> bool:
        """Whether ``value`` is one of them."""
        if (self.integer if value.denominator != 1 else self.fractional) or value in self.excluded:
            return False
        return self.low <= (value, False) and (value, True) <= self.high


@dataclass(frozen=True, slots=True)
class StringForm:
    """What a string must match, or must not: a pattern, a format, or just itself."""

    kind: str  # pattern, format, text
    text: str
    holds: bool = True


@dataclass(frozen=True, slots=True)
class Sized:
    """What has a length: from ``low`` to ``high``."""

    low: int = 0
    high: float = inf


@dataclass(frozen=True, slots=True)
class String(Sized):
    """``lark``: a grammar in Lark's notation, of which the text is."""

    forms: frozenset[StringForm] = frozenset()
    lark: str = ""


@dataclass(frozen=True, slots=True)
class Array(Sized):
    """The first items by place, all others by ``rest``.

    Attributes:
        said: some schema spoke of all items.
        opposite: as in Layer, of any of the schemas.
    """

    prefix: tuple[Schemas, ...] = ()
    rest: Schemas = FREE
    said: bool = False
    opposite: bool = False

    def item(self, i: int) -> Schemas:
        """What must hold for item ``i``."""
        return self.prefix[i] if i < len(self.prefix) else self.rest


@dataclass(frozen=True, slots=True)
class Layer:
    """What one schema says of an object's properties.

    Attributes:
        others: None: it says nothing.
        opposite: it comes from a schema that must not hold, which counts for no ``unevaluated*``.
    """

    named: tuple[tuple[str, Schemas], ...] = ()
    patterns: tuple[tuple[str, Schemas], ...] = ()
    others: Schemas | None = None
    opposite: bool = False


@dataclass(frozen=True, slots=True)
class Object(Sized):
    layers: tuple[Layer, ...] = ()
    required: tuple[str, ...] = ()
    names: Schemas = FREE


Atom = Const | Number | String | Array | Object


def common(one: Atom, other: Atom) -> Atom | None:
    """What is of both, neither of which is a Const; None: surely nothing."""
    if isinstance(one, Number) and isinstance(other, Number):
        return _numbers(one, other)
    if not (isinstance(one, Sized) and isinstance(other, Sized)):
        return None
    low, high = max(one.low, other.low), min(one.high, other.high)
    if low > high:
        return None
    match one, other:
        case String(), String():
            return String(low, high, one.forms | other.forms, one.lark or other.lark)
        case Array(), Array():
            size = max(len(one.prefix), len(other.prefix))
            prefix = tuple(one.item(i) | other.item(i) for i in range(size))
            said, opposite = one.said or other.said, one.opposite or other.opposite
            return Array(low, high, prefix, one.rest | other.rest, said, opposite)
        case Object(), Object():
            layers = tuple(dict.fromkeys(one.layers + other.layers))
            required = tuple(dict.fromkeys(one.required + other.required))
            return Object(low, high, layers, required, one.names | other.names)
        case _:
            return None


def _numbers(one: Number, other: Number) -> Number | None:
    low, high = max(one.low, other.low), min(one.high, other.high)
    integer, fractional = one.integer or other.integer, one.fractional or other.fractional
    if integer and isinstance(low[0], Fraction):
        low = Fraction(floor(low[0]) + 1 if low[1] else ceil(low[0])), False
    if integer and isinstance(high[0], Fraction):
        high = Fraction(floor(high[0]) if high[1] else ceil(high[0]) - 1), True
    out = low[1] or not high[1]
    if (integer and fractional) or low[0] > high[0] or (low[0] == high[0] and out):
        return None
    return Number(low, high, integer, fractional, one.excluded | other.excluded)


def number(value: Json) -> Fraction:
    """The exact value of what :func:`kind_of` calls a number or an integer."""
    assert isinstance(value, int | Decimal), value
    return Fraction(value)


def kind_of(value: Json) -> str:
    """The JSON type of a value; a number is an integer by its value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case Decimal():
            return "integer" if value == value.to_integral_value() else "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def same(one: Json, other: Json) -> bool:
    """Equal as JSON Schema has it: 1 is 1.0, but not true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
