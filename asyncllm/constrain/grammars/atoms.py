"""The possible values of a JSON value as alternatives of one kind each, and their intersection.

Knows no schemas: what stands inside a value is told as a set of numbers, each of which is a schema
that must hold (:mod:`asyncllm.constrain.grammars.schema`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor
from typing import Final

from asyncllm.plain import Json

Schemas = frozenset[int]  # all of them hold
FREE: Final[Schemas] = frozenset()


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
    low: Fraction | None = None
    high: Fraction | None = None
    low_open: bool = False
    high_open: bool = False
    integer: bool = False
    fractional: bool = False  # no integer
    excluded: frozenset[Fraction] = frozenset()


@dataclass(frozen=True, slots=True)
class Form:
    """What a string must match, or must not: a pattern, a format, or just itself."""

    kind: str  # pattern, format, text
    text: str
    holds: bool = True


@dataclass(frozen=True, slots=True)
class String:
    """``lark``: a grammar in Lark's notation, of which the text is."""

    low: int = 0
    high: int | None = None
    forms: frozenset[Form] = frozenset()
    lark: str = ""


@dataclass(frozen=True, slots=True)
class Array:
    """The first items by place, all others by ``rest``.

    Attributes:
        said: some schema spoke of all items.
        opposite: as in Layer, of any of the schemas.
    """

    prefix: tuple[Schemas, ...] = ()
    rest: Schemas = FREE
    low: int = 0
    high: int | None = None
    said: bool = False
    opposite: bool = False


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
class Object:
    layers: tuple[Layer, ...] = ()
    required: tuple[str, ...] = ()
    low: int = 0
    high: int | None = None
    names: Schemas = FREE


Atom = Const | Number | String | Array | Object


def common(one: Atom, other: Atom) -> Atom | None:
    """What is of both, neither of which is a Const; None: surely nothing."""
    match one, other:
        case Number(), Number():
            return _numbers(one, other)
        case String(), String():
            low, high = max(one.low, other.low), _least(one.high, other.high)
            if high is not None and low > high:
                return None
            return String(low, high, one.forms | other.forms, one.lark or other.lark)
        case Array(), Array():
            return _arrays(one, other)
        case Object(), Object():
            low, high = max(one.low, other.low), _least(one.high, other.high)
            if high is not None and low > high:
                return None
            layers = dict.fromkeys((*one.layers, *other.layers))
            required = dict.fromkeys((*one.required, *other.required))
            return Object(tuple(layers), tuple(required), low, high, one.names | other.names)
        case _:
            return None


def _least(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


def _numbers(one: Number, other: Number) -> Number | None:
    low, low_open = one.low, one.low_open
    if other.low is not None and (low is None or other.low >= low):
        low_open = other.low_open or (low_open and low == other.low)
        low = other.low
    high, high_open = one.high, one.high_open
    if other.high is not None and (high is None or other.high <= high):
        high_open = other.high_open or (high_open and high == other.high)
        high = other.high
    integer, fractional = one.integer or other.integer, one.fractional or other.fractional
    if integer and fractional:
        return None
    if integer and low is not None:
        low, low_open = Fraction(floor(low) + 1 if low_open else ceil(low)), False
    if integer and high is not None:
        high, high_open = Fraction(ceil(high) - 1 if high_open else floor(high)), False
    is_open = low_open or high_open
    if low is not None and high is not None and (low > high or (low == high and is_open)):
        return None
    excluded = one.excluded | other.excluded
    return Number(low, high, low_open, high_open, integer, fractional, excluded)


def _arrays(one: Array, other: Array) -> Array | None:
    low, high = max(one.low, other.low), _least(one.high, other.high)
    if high is not None and low > high:
        return None
    size = max(len(one.prefix), len(other.prefix))
    prefix = tuple(_item(one, i) | _item(other, i) for i in range(size))
    opposite = one.opposite or other.opposite
    return Array(prefix, one.rest | other.rest, low, high, one.said or other.said, opposite)


def _item(array: Array, i: int) -> Schemas:
    return array.prefix[i] if i < len(array.prefix) else array.rest


def bounded(atom: Atom, low: int | None, high: int | None) -> Atom | None:
    """A string, an array or an object with a length."""
    assert isinstance(atom, String | Array | Object)
    return common(atom, replace(type(atom)(), low=low or 0, high=high))


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
