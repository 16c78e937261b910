"""Writes terminals: JSON strings, keys and numbers, in the notation of the engine."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import inf
from typing import Final

from asyncllm.constrain.grammars import numbers, regex
from asyncllm.constrain.grammars.atoms import Const, Number, String, StringForm
from asyncllm.constrain.grammars.formats import FORMATS
from asyncllm.constrain.grammars.jsontext import scalar, string
from asyncllm.constrain.grammars.regex import code_text
from asyncllm.constrain.grammars.rules import Expr, Term, ends, times

# a character of a string that is held to no pattern: any spelling of one that UTF-8 can hold
_HALVES: Final = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HEX: Final = r"\\u(?:[0-9abcefABCEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2})"
FREE: Final = rf'(?:[^"\\\x00-\x1F]|\\["\\\x2Fbfnrt]|{_HEX}|{_HALVES})'
# spelled one way, so that patterns and excluded texts mean what they say
PLAIN: Final = regex.quoted(regex.ALL)
NEVER: Final = r"[^\x00-\x{10FFFF}]"


@lru_cache(4096)
def _parsed(form: StringForm) -> Expr:
    match form.kind:
        case "pattern":
            return regex.searched(regex.parse(form.text))
        case "format":
            return regex.full(regex.parse(FORMATS[form.text]))
        case _:
            return regex.literal(form.text)


def is_plain(atom: String) -> bool:
    """Some string is of this form, as far as one look shows."""
    forms = list(atom.forms)
    bounded = (atom.low, atom.high) != (0, inf)
    return not forms or (
        len(forms) == 1 and not bounded and forms[0].holds and ends(_parsed(forms[0]))
    )


def raw_form(form: StringForm) -> str:
    """A terminal of the texts of a form. Raises RequestError: the pattern cannot be kept."""
    return f"/{regex.raw(_parsed(form))}/"


def _raw_form(form: StringForm) -> str:
    return f"{'' if form.holds else '~'}{raw_form(form)}"


def _json_form(form: StringForm) -> str:
    if form.kind == "text":
        inner = text_expression(string(form.text)[1:-1])
    else:
        inner = regex.quoted(_parsed(form))
    return f'{"" if form.holds else "~"}/"{inner}"/'


def text_expression(text: str) -> str:
    """An expression of exactly ``text``."""
    return "".join(code_text(ord(char)) for char in text)


def text_term(text: str) -> Term:
    """A terminal of exactly ``text``."""
    return Term(f"/{text_expression(text)}/")


def apart(i: int, count: int) -> str:
    """What makes the keys of one of ``count`` kinds differ from those of all others:
    their length."""
    return f' & /"(?:{PLAIN}{{{count}}})*{PLAIN}{{{i}}}"/'


def string_term(atom: String) -> str:
    """JSON strings; a terminal."""
    count = times(atom.low, atom.high)
    if not atom.forms:
        return f'/"{FREE}{count}"/'
    parts = [_json_form(form) for form in sorted(atom.forms, key=lambda f: (not f.holds, f.text))]
    if count != "*" or not all(form.holds for form in atom.forms):
        parts.append(f'/"{PLAIN}{count}"/')
    return " & ".join(parts)


def raw_term(atom: String) -> str:
    """Strings as they are, without quotes; a terminal."""
    return " & ".join(
        (*map(_raw_form, atom.forms), f"/{regex.ALL.text}{times(atom.low, atom.high)}/")
    )


def key_term(
    names: Iterable[str],
    patterns: Iterable[tuple[str, bool]],
    more: Iterable[StringForm],
    quoted: bool = True,
) -> str:
    """Keys but ``names`` that match some patterns, and do not match others; a terminal."""
    parts = [f'/"{PLAIN}*"/' if quoted else f"/{regex.ALL.text}*/"]
    spelled = map(string, names) if quoted else names
    if excluded := "|".join(map(text_expression, spelled)):
        parts.append(f"~/(?:{excluded})/")
    forms = (*(StringForm("pattern", pattern, holds) for pattern, holds in patterns), *more)
    return " & ".join((*parts, *((_json_form if quoted else _raw_form)(form) for form in forms)))


def number_term(atom: Number) -> str:
    """JSON numbers; a terminal."""
    text = numbers.numbers(atom.low, atom.high, atom.integer)
    if atom.fractional:
        text += r" & ~/-?[0-9]+(?:\.0+)?/ & ~/.*[eE].*/"
    # a reader rounds to double precision, and must not round to what is out of bounds
    ends = (atom.low[0], atom.low[1]), (atom.high[0], not atom.high[1])
    near = any(is_open and value not in (0, inf, -inf) for value, is_open in ends)
    if not atom.integer and (near or atom.fractional or atom.excluded):
        text += r" & /-?(?:[0-9]{1,9}(?:\.[0-9]{1,6})?|[0-9]{1,15})/"
    for value in sorted(atom.excluded):
        text += f" & ~/{numbers.spellings(value)}/"
    return text


def const_term(values: Iterable[Const]) -> str:
    """One of some values that are no arrays or objects; a terminal."""
    return f"/{'|'.join(text_expression(scalar(const.value)) for const in values)}/"
