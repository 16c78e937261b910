"""Rules of tool calls: what comes before the arguments, the arguments, what comes after.

Arguments are JSON, or stand between tags one by one, as some formats have it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from asyncllm.constrain.grammars import regex, terms
from asyncllm.constrain.grammars.atoms import (
    Atom,
    Const,
    Number,
    Object,
    Schemas,
    String,
    StringForm,
)
from asyncllm.constrain.grammars.rules import (
    EMPTY,
    Alt,
    Expr,
    Repeat,
    Seq,
    Term,
    alt,
    finite,
    seq,
    written,
)
from asyncllm.constrain.grammars.writing import LOOSE, FeasibilityChecks, RuleWriter
from asyncllm.plain import JsonObject, typed


@dataclass(frozen=True, slots=True)
class _Tags:
    """How a format writes an argument: the text before its name, after it, and after its value."""

    begin: str
    named: str
    end: str
    between: str
    inside: tuple[str, ...]  # would end a value too soon


_STYLES: Final = {
    "qwen_xml": _Tags("<parameter=", ">\n", "\n</parameter>", "\n",
                      ("</parameter>", "</function>", "<parameter=")),
    "glm_xml": _Tags("<arg_key>", "</arg_key><arg_value>", "</arg_value>", "",
                     ("</arg_value>", "</tool_call>")),
}  # fmt: skip
_KEY: Final = "/[A-Za-z_][0-9A-Za-z_]{0,63}/"
# a text without quotes that reads as JSON would be taken for it
_READS_AS_JSON: Final = (
    r"~/\s*(?:[\x{5B}\x{7B}\x22\-0-9](?s:.*)|[Tt]rue|[Ff]alse|null|None|NaN|Infinity)\s*/"
)
_COMBINED: Final = frozenset(("$ref", "anyOf", "oneOf", "allOf"))


def calls_grammar(forms: Sequence[JsonObject], possible: FeasibilityChecks) -> str:
    """The engine's grammar of one of several calls, after their mark.

    Args:
        forms: each with ``begin`` (white space that it begins with may differ), ``schema``,
            ``style``, ``end``.

    Raises:
        RequestError: a schema is malformed, cannot be enforced, or no object fits it.
    """
    calls: list[Expr] = []
    rules: dict[str, Expr] = {}
    for i, form in enumerate(forms):
        writer = RuleWriter(json.dumps(form["schema"]), possible, f"f{i}", LOOSE)
        begin, end = typed(form["begin"], str), typed(form["end"], str)
        parts = [_text(begin.lstrip()), _arguments(writer, typed(form["style"], str)), _text(end)]
        if begin != begin.lstrip():
            parts.insert(0, Repeat(Term(r"/[ \n]/"), 0, 2))
        made = writer.finished(seq(*parts))
        rules |= made
        calls.append(made[writer.root])
    rules["root"] = alt(*calls)
    return written(finite(rules, "root"), "root")


def _text(text: str) -> Expr:
    """A text in single characters: where tags share a beginning, none hides another."""
    return seq(*(terms.text_term(char) for char in text))


def _arguments(writer: RuleWriter, style: str) -> Expr:
    root = frozenset((writer.document.root,))
    atoms = [atom for atom in writer.meaning.atoms(root) if _is_object(atom)]
    if style not in _STYLES:
        return writer.any_of(atoms)
    tags = _STYLES[style]
    return alt(*(_tagged(writer, atom, tags) for atom in atoms))


def _is_object(atom: Atom) -> bool:
    return isinstance(atom, Object) or (isinstance(atom, Const) and isinstance(atom.value, dict))


def _tagged(writer: RuleWriter, atom: Atom, tags: _Tags) -> Expr:
    """Arguments between tags."""
    comma = _text(tags.between)
    if isinstance(atom, Const):
        pairs = [
            (_argument(writer, terms.text_term(key), (Const("", value),), tags), True)
            for key, value in typed(atom.value, dict).items()
        ]
        return writer.pairs(Object(), pairs, None, comma)
    assert isinstance(atom, Object)
    fields = writer.fields(atom)
    pairs = []
    for name, schemas, needed in fields:
        values = writer.meaning.atoms(schemas)
        if values or needed:
            key, is_text = terms.text_term(name), _is_text(writer, schemas)
            pairs.append((_argument(writer, key, values, tags, is_text), needed))
    keys = list(writer.others(atom, [name for name, _, _ in fields], quoted=False))

    def other(more: str) -> Expr:
        assert not more, "keys between tags are not counted on"
        return alt(
            *(
                _argument(
                    writer, writer.term(f"{text} & {_KEY}"), writer.meaning.atoms(schemas), tags
                )
                for text, schemas in keys
            )
        )

    return writer.pairs(atom, pairs, other if keys else None, comma)


def _is_text(writer: RuleWriter, schemas: Schemas) -> bool:
    """Whether a parser takes every value for a string: it looks at types only."""
    nodes = writer.document.nodes
    told = [
        node for one in (writer.document.root, *schemas) if isinstance(node := nodes[one], dict)
    ]
    if len(told) != 2 or any(_COMBINED & node.keys() for node in told):
        return False
    return told[1].get("type") == "string"


def _argument(
    writer: RuleWriter, key: Expr, values: Iterable[Atom], tags: _Tags, is_text: bool = False
) -> Expr:
    return seq(_text(tags.begin), key, _text(tags.named), _value(writer, values, tags, is_text))


def _value(writer: RuleWriter, values: Iterable[Atom], tags: _Tags, is_text: bool) -> Expr:
    """A value and its end tag; both are one terminal unless it is an array or an object."""
    end = f"/{terms.text_expression(tags.end)}/"
    found: list[Expr] = []
    for atom in values:
        match atom:
            case Const() if isinstance(atom.value, str):
                only = String(forms=frozenset((StringForm("text", atom.value),)))
                found.append(writer.term(f"({_raw(only, tags, is_text)}) {end}"))
            case String() if atom.lark:
                text = writer.lark(atom.lark, partial(_terminal, tags))
                found.append(seq(text, _text(tags.end)))
            case String():
                found.append(writer.term(f"({_raw(atom, tags, is_text)}) {end}"))
            case Const() if not isinstance(atom.value, dict | list):
                found.append(Term(f"{terms.const_term((atom,))} {end}"))
            case Number():
                found.append(writer.term(f"({terms.number_term(atom)}) {end}"))
            case _:
                found.append(seq(writer.any_of((atom,)), _text(tags.end)))
    return alt(*found)


def _terminal(tags: _Tags, node: Expr) -> Expr:
    """One of a Lark grammar, as it is; the engine has no empty ones."""
    term = Term(f"/{regex.raw(node)}/ & /(?s:.+)/ & {_without_tags(tags)}")
    return alt(EMPTY, term) if _may_be_empty(node) else term


def _may_be_empty(node: Expr) -> bool:
    match node:
        case Seq():
            return all(map(_may_be_empty, node.items))
        case Alt():
            return any(map(_may_be_empty, node.items))
        case Repeat():
            return node.low == 0 or _may_be_empty(node.item)
        case _:
            return False


def _without_tags(tags: _Tags) -> str:
    """A terminal of what contains no tag."""
    inside = "|".join(map(terms.text_expression, tags.inside))
    return f"~/(?s:.*)(?:{inside})(?s:.*)/"


def _raw(atom: String, tags: _Tags, is_text: bool) -> str:
    """Strings that contain no tag, and are not read as another type."""
    parts = [terms.raw_term(atom), _without_tags(tags)]
    if not is_text:
        parts.append(_READS_AS_JSON)
    return " & ".join(parts)
