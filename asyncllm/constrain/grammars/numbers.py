"""Terminals of the numbers between two bounds, in JSON's notation.

Every number that is allowed is finite in double precision and has a limited length: a model might
otherwise generate digits without end.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor, inf
from typing import Final

from asyncllm.constrain.grammars.atoms import Bound

INTEGER_DIGITS: Final = 39  # 128 bits
FRACTION_DIGITS: Final = 20

_INTEGER: Final = f"(?:0|[1-9][0-9]{{0,{INTEGER_DIGITS - 1}}})"
_PLACES: Final = f"(?:\\.[0-9]{{1,{FRACTION_DIGITS}}})?"
# With an exponent the digits before the point are one or 17, so that the largest is finite; where 0
# is out of bounds the smallest is above 0.
_ONE: Final = f"[1-9]{_PLACES}[eE]"
_MANY: Final = f"(?:0|[1-9][0-9]{{0,16}}){_PLACES}[eE]"
_MOST: Final = "7976931348623157"  # after 1. and before e308
_LARGEST: Final = (
    "1(?:\\.(?:"
    + "|".join(f"{_MOST[:i]}[0-{int(digit) - 1}][0-9]{{0,16}}" for i, digit in enumerate(_MOST))
    + f"|{_MOST}))?[eE]\\+?308"
)
_TINY: Final = (  # in (0, 1)
    f"(?:{_ONE}-(?:0{{0,2}}[1-9]|0?[1-9][0-9]|[12][0-9][0-9]|3[01][0-9]|32[0-3])|[5-9][eE]-324)"
)
_HUGE: Final = (  # >= 1e16
    f"(?:{_ONE}\\+?(?:1[6-9]|[2-9][0-9]|[12][0-9][0-9]|30[0-7])|{_LARGEST})"
)
_ANY: Final = (
    f"(?:{_INTEGER}{_PLACES}"
    f"|{_MANY}(?:-[0-9]{{1,3}}|\\+?(?:[0-9]{{1,2}}|[01][0-9][0-9]|2[0-8][0-9]))|{_HUGE})"
)


def numbers(low: Bound, high: Bound, integer: bool) -> str:
    """A terminal of the numbers between two bounds."""
    if not integer and high[0] == inf and low in ((-inf, True), (0, False)):
        return f"/{'' if low[0] == 0 else '-?'}{_ANY}/"
    found = []
    if high > (0, False):
        found.append(_unsigned(max(low, (0, False)), high, integer))
    if low < (0, False):
        least = max((-high[0], not high[1]), (0, True))
        found.append(f"/-/ {_unsigned(least, (-low[0], not low[1]), integer)}")
    return f"({' | '.join(found)})"


def _unsigned(low: Bound, high: Bound, integer: bool) -> str:
    """A terminal of numbers without a sign; 0 <= low."""
    found = f"/{_INTEGER}{'' if integer else _PLACES}/"
    if low > (0, False):
        found += f" & {_above(low, integer)}"
    if high[0] != inf:
        found += f" & ~{_above(high, integer)}"
    if not integer and low[0] == 0 and high[0] >= 1:
        found += f" | /{_TINY}/"
    if not integer and low[0] < 10**16 and high[0] == inf:
        found += f" | /{_HUGE}/"
    return f"({found})"


def _above(bound: Bound, integer: bool) -> str:
    """A terminal of what, written without sign and exponent, keeps a lower bound; of an upper one
    it is what does not keep it."""
    whole, places = _digits(bound[0])
    longer = f"[1-9][0-9]{{{len(whole)},}}"
    as_long = [f"{begun}[0-9]{{{rest}}}" for begun, rest in _greater(whole)]
    if integer:
        return f"/{'|'.join([longer, *as_long, *(() if bound[1] else (whole,))])}/"
    found = [f"(?:{'|'.join([longer, *as_long])})(?:\\.[0-9]+)?"]
    found += [f"{whole}\\.{begun}[0-9]*" for begun, _ in _greater(places)]
    if bound[1]:
        found.append(f"{whole}\\.{places}0*[1-9][0-9]*")
    else:
        found.append(f"{whole}\\.{places}[0-9]*" if places else f"{whole}(?:\\.[0-9]+)?")
    return f"/{'|'.join(found)}/"


def _digits(value: Fraction | float) -> tuple[str, str]:
    """Those before and behind the point, as far as they can be written."""
    whole, rest = divmod(Fraction(value), 1)
    places = str(floor(rest * 10**FRACTION_DIGITS)).rjust(FRACTION_DIGITS, "0")
    return str(min(whole, 10**INTEGER_DIGITS)), places.rstrip("0")


def _greater(digits: str) -> list[tuple[str, int]]:
    """How greater numbers of as many digits begin, and how many digits follow."""
    return [
        (f"{digits[:i]}[{int(digit) + 1}-9]", len(digits) - i - 1)
        for i, digit in enumerate(digits)
        if digit != "9"
    ]


def spellings(value: Fraction) -> str:
    """An expression of what has the value, and perhaps of more."""
    whole, places = _digits(abs(value))
    plain = f"{whole}\\.{places}0*" if places else f"{whole}(?:\\.0+)?"
    sign = "-" if value < 0 else "-?" if value == 0 else ""
    return f"(?:{sign}{plain}|.*[eE].*)"
