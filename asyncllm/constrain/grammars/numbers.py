"""Regular expressions of the numbers between two bounds, in JSON's notation.

Every number that can come is finite in double precision, and ends: a model that likes digits would
go on with them.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor
from typing import Final

INTEGER_DIGITS: Final = 39  # 128 bits
FRACTION_DIGITS: Final = 20

_DIGITS: Final = f"[0-9]{{0,{INTEGER_DIGITS - 1}}}"
_SHORT: Final = f"(?:0|[1-9]{_DIGITS})(?:\\.[0-9]{{1,{FRACTION_DIGITS}}})?"
# With an exponent the digits before the point are one or 17, so that the largest is finite; where 0
# is out of bounds the smallest is above 0.
_ONE: Final = f"[1-9](?:\\.[0-9]{{1,{FRACTION_DIGITS}}})?[eE]"
_MANY: Final = f"(?:0|[1-9][0-9]{{0,16}})(?:\\.[0-9]{{1,{FRACTION_DIGITS}}})?[eE]"
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
    f"(?:{_SHORT}|{_MANY}(?:-[0-9]{{1,3}}|\\+?(?:[0-9]{{1,2}}|[01][0-9][0-9]|2[0-8][0-9]))|{_HUGE})"
)
_NOTHING: Final = "[^\\x00-\\x{10FFFF}]"

Bound = Fraction | None


def integers(low: Bound, high: Bound) -> str:
    """Integers from ``low`` to ``high``; an expression of the engine. None: as far as digits go."""
    most = 10**INTEGER_DIGITS - 1
    first = -most if low is None else max(ceil(low), -most)
    last = most if high is None else min(floor(high), most)
    parts = []
    if first < 0:
        inner = _naturals(max(1, -last), -first)
        parts += [f"-{inner}"] if first <= min(last, -1) else []
    if last >= max(first, 0):
        parts.append(_naturals(max(first, 0), last))
    return _any_of(parts)


def numbers(low: Bound, low_open: bool, high: Bound, high_open: bool) -> str:
    """Numbers between two bounds; a terminal of the engine. None: no number is."""
    if low is None and high is None:
        return f"/-?{_ANY}/"
    parts = []
    if low == 0 and high is None and not low_open:
        return f"/{_ANY}/"
    if high is None or high > 0 or (high == 0 and not high_open):
        begin = low if low is not None and low >= 0 else Fraction(0)
        open_ = low_open if low is not None and low >= 0 else False
        parts.append(_decimals(begin, open_, high, high_open))
        parts += _exponents(begin, high)
    if low is None or low < 0:
        begin = -high if high is not None and high <= 0 else Fraction(0)
        open_ = high_open if high is not None and high <= 0 else True
        end = None if low is None else -low
        below = [_decimals(begin, open_, end, low_open), *_exponents(begin, end)]
        parts.append(f"-{_any_of(below)}")
    return f"/{_any_of(parts)}/ & /-?(?:{_SHORT}|{_ONE}[-+]?[0-9]{{1,3}})/"


def _exponents(begin: Fraction, end: Bound) -> list[str]:
    """What is surely between, written with an exponent."""
    found = []
    if begin == 0 and (end is None or end >= 1):
        found.append(_TINY)
    if end is None and begin < 10**16:
        found.append(_HUGE)
    return found


def _any_of(parts: list[str]) -> str:
    return f"(?:{'|'.join(parts)})" if parts else _NOTHING


def _naturals(first: int, last: int) -> str:
    """Integers without a sign; 0 <= first <= last."""
    if first > last:
        return _NOTHING
    parts = []
    if first == 0:
        parts.append("0")
        first = 1
    whole: list[int] = []  # lengths of which all numbers are in
    for length in range(len(str(first)), len(str(last)) + 1):
        low, high = max(first, 10 ** (length - 1)), min(last, 10**length - 1)
        if low > high:
            continue
        if (low, high) == (10 ** (length - 1), 10**length - 1):
            whole.append(length)
        else:
            parts.append(_same_length(str(low), str(high)))
    if whole:
        parts.append(f"[1-9][0-9]{{{whole[0] - 1},{whole[-1] - 1}}}")
    return _any_of(parts)


def _same_length(low: str, high: str) -> str:
    """Numbers of as many digits as both have, between them."""
    if not low:
        return ""
    rest = len(low) - 1
    free = f"[0-9]{{{rest}}}" if rest else ""
    if low[0] == high[0]:
        return low[0] + _same_length(low[1:], high[1:])
    parts = []
    first, last = int(low[0]), int(high[0])
    if low[1:].strip("0"):
        parts.append(low[0] + _same_length(low[1:], "9" * rest))
        first += 1
    if high[1:].strip("9"):
        parts.append(high[0] + _same_length("0" * rest, high[1:]))
        last -= 1
    if first <= last:
        parts.append(f"[{first}-{last}]{free}")
    return _any_of(parts)


def _decimals(low: Fraction, low_open: bool, high: Bound, high_open: bool) -> str:
    """Numbers without sign and exponent between bounds; 0 <= low."""
    begin, after = divmod(low, 1)
    if high is None:
        parts = [f"{begin}{_fraction(_places(after), low_open, None, False)}"]
        parts.append(f"{_naturals(begin + 1, 10**INTEGER_DIGITS - 1)}(?:\\.[0-9]+)?")
        return _any_of(parts)
    if high < low:
        return _NOTHING
    end, before = divmod(high, 1)
    if begin == end:
        return f"{begin}{_fraction(_places(after), low_open, _places(before), high_open)}"
    parts = [f"{begin}{_fraction(_places(after), low_open, None, False)}"]
    parts.append(f"{end}{_fraction('', False, _places(before), high_open)}")
    if begin + 1 < end:
        parts.append(f"{_naturals(begin + 1, end - 1)}(?:\\.[0-9]+)?")
    return _any_of(parts)


def _places(fraction: Fraction) -> str:
    """Digits after the point, as far as they can be written."""
    digits = str(floor(fraction * 10**FRACTION_DIGITS)).rjust(FRACTION_DIGITS, "0")
    return digits.rstrip("0")


def _fraction(low: str, low_open: bool, high: str | None, high_open: bool) -> str:
    """What may follow an integer, so that the digits are between two others."""
    parts = []
    whole = not low and not low_open
    if high is not None:
        whole = whole and (bool(high) or not high_open)
    if whole:
        parts.append("")
    inner = _between(low, low_open, high, high_open)
    if inner is not None:
        parts.append(f"\\.{inner}")
    return _any_of(parts)


def _between(low: str, low_open: bool, high: str | None, high_open: bool) -> str | None:
    """One digit or more, as a fraction between two fractions; None: there are none."""
    parts = []
    first, last = int(low[:1] or 0), 9 if high is None else int(high[:1] or 0)
    for digit in range(first, last + 1):
        at_low, at_high = digit == first, high is not None and digit == last
        if not (at_low or at_high):
            continue
        rest_low, rest_open = (low[1:], low_open) if at_low else ("", False)
        rest_high, rest_high_open = (high[1:], high_open) if at_high and high else ("", high_open)
        if not at_high:
            tail_high: str | None = None
        else:
            tail_high = rest_high
        parts += _tails(str(digit), rest_low, rest_open, tail_high, rest_high_open)
    inner = [first + 1, last if high is None else last - 1]
    if inner[0] <= inner[1]:
        parts.append(f"[{inner[0]}-{inner[1]}][0-9]*")
    return _any_of(parts) if parts else None


def _tails(digit: str, low: str, low_open: bool, high: str | None, high_open: bool) -> list[str]:
    """Expressions that begin with ``digit``, behind which bounds are still to be kept."""
    if not low and not low_open and high is None:
        return [f"{digit}[0-9]*"]
    if not low and high is None:  # not zero
        return [f"{digit}0*[1-9][0-9]*"]
    if high == "" and not low:
        return [] if low_open or high_open else [f"{digit}0*"]
    if high == "":
        return []
    parts = []
    if not low and not low_open:
        parts.append(digit)
    inner = _between(low, low_open, high, high_open)
    if inner is not None:
        parts.append(f"{digit}{inner}")
    return parts


def spellings(value: Fraction) -> str:
    """An expression of what has the value, and perhaps of more."""
    if value == 0:
        return r"-?0(?:\.0+)?(?:[eE].*)?"
    sign = "-?" if value > 0 else ""
    plain = _decimals(abs(value), False, abs(value), False)
    return f"(?:{'-' if value < 0 else sign}{plain}|.*[eE].*)"
