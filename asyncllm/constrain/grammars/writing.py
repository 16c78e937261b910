"""Writes the rules of the JSON texts that satisfy a schema.

Terminals are JSON's own tokens, so it is always clear where one ends; the rules alone decide what
may follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from asyncllm.constrain.grammars import lark, regex, terms
from asyncllm.constrain.grammars.atoms import (
    FREE,
    Array,
    Atom,
    Const,
    Layer,
    Number,
    Object,
    Schemas,
    String,
    StringForm,
)
from asyncllm.constrain.grammars.document import Document
from asyncllm.constrain.grammars.jsontext import load, string
from asyncllm.constrain.grammars.rules import (
    EMPTY,
    NOTHING,
    Expr,
    Repeat,
    RuleRef,
    Rules,
    Term,
    alt,
    finite,
    seq,
    times,
    written,
)
from asyncllm.constrain.grammars.schema import Matches, SchemaResolver
from asyncllm.errors import RequestError
from asyncllm.plain import Json

MAX_RULES: Final = 6_000
MAX_OTHERS: Final = 32  # properties beyond those that a schema names: a model may like them
PIECE: Final = 256  # characters that are counted at once, of long strings
MAX_PATTERNS: Final = 6  # that keys may match in any combination


@dataclass(frozen=True, slots=True)
class JsonPunctuation:
    """JSON's own marks."""

    comma: Expr
    colon: Expr
    open: Expr
    close: Expr
    begin: Expr
    end: Expr


_BRACKETS: Final = (r"/\x{7B}/", r"/\x{7D}/", r"/\x{5B}/", r"/\x{5D}/")
# White space is not optional: a model that likes it would never stop.
TIGHT: Final = JsonPunctuation(*map(Term, ("/, /", "/: /", *_BRACKETS)))
COMPACT: Final = JsonPunctuation(*map(Term, ("/,/", "/:/", *_BRACKETS)))
# One at most: models write calls as they have learnt to, and go on better behind them.
LOOSE: Final = JsonPunctuation(
    *map(Term, (r"/,[ \n]?/", r"/:[ \n]?/", r"/\x{7B}[ \n]?/", r"/[ \n]?\x{7D}/",
                r"/\x{5B}[ \n]?/", r"/[ \n]?\x{5D}/"))
)  # fmt: skip


class FeasibilityChecks:
    """What the engine is asked.

    Attributes:
        matches: whether a text is all of the form of a terminal.
        some: whether a terminal matches any text at all.
        check_time: raises RequestError once all this has taken too long.
    """

    def __init__(
        self, matches: Matches, some: Callable[[str], bool], check_time: Callable[[], None]
    ) -> None:
        self.matches, self.some, self.check_time = matches, some, check_time


def schema_grammar(text: str, possible: FeasibilityChecks, marks: JsonPunctuation = TIGHT) -> str:
    """The engine's grammar of the JSON texts that fit a schema.

    Raises:
        RequestError: the schema is malformed, cannot be enforced, or nothing fits it.
    """
    writer = RuleWriter(text, possible, marks=marks)
    return written(writer.finished(writer.value(frozenset((writer.document.root,)))), writer.root)


class RuleWriter:
    """Collects the rules that values need.

    Args:
        text: the schema, JSON.
        name: begins the names of all rules.
    """

    def __init__(
        self, text: str, possible: FeasibilityChecks, name: str = "", marks: JsonPunctuation = TIGHT
    ) -> None:
        self.marks = marks
        self.document = Document(load(text))
        self.meaning = SchemaResolver(self.document, possible.matches, possible.check_time)
        self._some, self._check_time = possible.some, possible.check_time
        self._name, self.root = name, f"{name}root"
        self.rules: Rules = {}
        self._values: dict[Schemas, str] = {}
        self._waiting: list[Schemas] = []
        self._terms: dict[str, Expr] = {}

    def value(self, schemas: Schemas) -> RuleRef:
        """A rule of the values that fit ``schemas``."""
        schemas = schemas - {0}
        if (name := self._values.get(schemas)) is None:
            name = self._values[schemas] = f"{self._name}v{len(self._values)}"
            self._waiting.append(schemas)
        return RuleRef(name)

    def finished(self, root: Expr) -> Rules:
        """The rules that ``root`` needs, with itself. Raises RequestError: it cannot be."""
        self.rules[self.root] = root
        while self._waiting:
            self._check_time()
            schemas = self._waiting.pop()
            self.rules[self._values[schemas]] = self.any_of(self.meaning.atoms(schemas))
        rules = finite(self.rules, self.root)
        if not rules:
            raise RequestError("no value at all fits the JSON schema")
        return rules

    def any_of(self, atoms: Iterable[Atom]) -> Expr:
        """A value of one of some alternatives."""
        found: list[Expr] = []
        plain: list[Const] = []
        for atom in atoms:
            match atom:
                case Const() if isinstance(atom.value, dict | list):
                    found.append(self._const(atom.value))
                case Const():
                    plain.append(atom)
                case Number():
                    found.append(self.term(terms.number_term(atom)))
                case String():
                    found.append(self._string(atom))
                case Array():
                    found.append(self._array(atom))
                case Object():
                    found.append(self._object(atom))
        if plain:
            found.insert(0, Term(terms.const_term(plain)))
        return alt(*found)

    def term(self, text: str) -> Expr:
        """A terminal, if anything matches it."""
        if (known := self._terms.get(text)) is None:
            known = self._terms[text] = Term(text) if self._some(text) else NOTHING
        return known

    def rule(self, node: Expr) -> RuleRef:
        """A separate rule."""
        self._check_time()
        if len(self.rules) >= MAX_RULES:
            raise RequestError(f"the JSON schema needs more than {MAX_RULES} rules: simplify it")
        name = f"{self._name}x{len(self.rules)}"
        self.rules[name] = node
        return RuleRef(name)

    def _string(self, atom: String) -> Expr:
        if atom.lark:
            quote = terms.text_term('"')
            return seq(quote, self.lark(atom.lark, _by_characters), quote)
        ends = [end for end in (atom.low, atom.high) if end != inf]
        if not atom.forms and max(ends) > PIECE:
            return _long_string(atom.low, atom.high)
        text = terms.string_term(atom)
        return Term(text) if terms.is_plain(atom) else self.term(text)

    def lark(self, grammar: str, spell: Callable[[Expr], Expr]) -> Expr:
        """The texts of a grammar in Lark's notation.

        Args:
            spell: a terminal of the grammar as part of a rule.
        """
        rules, start = lark.read(grammar, f"{self._name}l{len(self.rules)} ", spell)
        self.rules |= rules
        return start

    def _const(self, value: Json) -> Expr:
        """A value in the tokens that other alternatives have too."""
        match value:
            case dict():
                pairs = [self._pair(string(key), self._const(item)) for key, item in value.items()]
                return seq(self.marks.open, *_joined(pairs, self.marks.comma), self.marks.close)
            case list():
                items = [self._const(item) for item in value]
                return seq(self.marks.begin, *_joined(items, self.marks.comma), self.marks.end)
            case _:
                return Term(terms.const_term((Const("", value),)))

    def _pair(self, key: str, value: Expr) -> Expr:
        return seq(terms.text_term(key), self.marks.colon, value)

    # -- arrays ---------------------------------------------------------------------------------

    def _array(self, atom: Array) -> Expr:
        high = atom.high
        for i in range(len(atom.prefix) + 1):
            if not self.meaning.atoms(atom.item(i)):  # none fits here
                high = min(high, i)
                break
        if high < atom.low:
            return NOTHING
        size = int(min(len(atom.prefix), high))
        tail = self._rest(atom, size, high)
        for i in reversed(range(size)):
            item = (*((self.marks.comma,) if i else ()), self.value(atom.prefix[i]))
            more = seq(*item, tail)
            tail = self.rule(alt(EMPTY, more) if i >= atom.low else more)
        return seq(self.marks.begin, tail, self.marks.end)

    def _rest(self, atom: Array, size: int, high: float) -> Expr:
        """Items after the first ``size``."""
        low, most = max(atom.low - size, 0), high - size
        if most <= 0:
            return EMPTY
        item = self.value(atom.rest)
        more = seq(self.marks.comma, item)
        if size:
            return Repeat(more, low, most)
        some = seq(item, Repeat(more, max(low - 1, 0), most - 1))
        return some if low else alt(EMPTY, some)

    # -- objects --------------------------------------------------------------------------------

    def _object(self, atom: Object) -> Expr:
        fields = self.fields(atom)
        if any(needed and not self.meaning.atoms(schemas) for _, schemas, needed in fields):
            return NOTHING
        keys = list(self.others(atom, [name for name, _, _ in fields]))
        pairs = [
            (self._pair(string(name), self.value(schemas)), needed)
            for name, schemas, needed in fields
            if self.meaning.atoms(schemas)
        ]

        def other(more: str) -> Expr:
            spelled = [(self.term(text + more) if more else Term(text), s) for text, s in keys]
            return alt(*(seq(key, self.marks.colon, self.value(s)) for key, s in spelled))

        most: float = MAX_OTHERS if pairs else inf
        told = self._told(atom)
        if told and not any(isinstance(key, String) for key in self.meaning.atoms(atom.names)):
            most = len(told)
        inner = self.pairs(atom, pairs, other if keys else None, self.marks.comma, most)
        return seq(self.marks.open, inner, self.marks.close)

    def fields(self, atom: Object) -> list[tuple[str, Schemas, bool]]:
        """Properties with a name: name, what must hold for the value, whether it must be there."""
        said: dict[str, list[Schemas]] = {}
        for layer in atom.layers:
            for name, schemas in layer.named:
                said.setdefault(name, []).append(schemas)
        closed = [({name for name, _ in la.named}, la.others) for la in atom.layers if la.others]
        names = dict.fromkeys(said)
        simple = not any(layer.patterns for layer in atom.layers)
        if atom.names and atom.low > 1:  # names that are counted on must differ: they get an order
            names |= dict.fromkeys(self._told(atom))
        names |= dict.fromkeys(atom.required)
        needed = set(atom.required)
        found = []
        for name in names:
            if simple:
                others = (held for known, held in closed if name not in known)
                schemas = FREE.union(*said.get(name, ()), *others)
            else:
                schemas = self.meaning.of_key(name, atom.layers)
            if atom.names and not self.meaning.fits(name, atom.names):
                schemas = frozenset((1,))
            found.append((name, schemas, name in needed))
        return found

    def _told(self, atom: Object) -> list[str]:
        """Names that propertyNames lists."""
        keys = self.meaning.atoms(atom.names) if atom.names else ()
        return [k.value for k in keys if isinstance(k, Const) and isinstance(k.value, str)]

    def others(
        self, atom: Object, names: Sequence[str], quoted: bool = True
    ) -> Iterator[tuple[str, Schemas]]:
        """Properties without a name: terminals of keys, and what must hold for values."""
        patterns = list(dict.fromkeys(p for layer in atom.layers for p, _ in layer.patterns))
        if len(patterns) > MAX_PATTERNS:
            raise RequestError(
                f"the JSON schema has an object with {len(patterns)} patternProperties, at most"
                f" {MAX_PATTERNS} can be enforced"
            )
        forms: list[tuple[StringForm, ...]] = [()]
        told: dict[Schemas, list[str]] = {}
        for name in self._told(atom):
            if name not in names:
                told.setdefault(self.meaning.of_key(name, atom.layers), []).append(name)
        for schemas, some in told.items():
            if self.meaning.atoms(schemas):
                spelled = map(string, some) if quoted else some
                yield f"/{'|'.join(map(terms.text_expression, spelled))}/", schemas
        if atom.names:
            keys = [key for key in self.meaning.atoms(atom.names) if isinstance(key, String)]
            forms = [
                (*key.forms, StringForm("pattern", f"^[^]{times(key.low, key.high)}$"))
                for key in keys
            ]
        for which in range(2 ** len(patterns)):
            held = [(pattern, bool(which >> i & 1)) for i, pattern in enumerate(patterns)]
            matched = {pattern for pattern, holds in held if holds}
            schemas = FREE.union(*(_of_others(layer, matched) for layer in atom.layers))
            if not self.meaning.atoms(schemas):
                continue
            for more in forms:
                text = terms.key_term(names, held, more, quoted)
                if self._some(text):
                    yield text, schemas

    def pairs(
        self,
        atom: Object,
        pairs: Sequence[tuple[Expr, bool]],
        other: Callable[[str], Expr] | None,
        comma: Expr,
        most: float = MAX_OTHERS,
    ) -> Expr:
        """Pairs by order, each at most once, then others; counted as far as needed.

        Args:
            pairs: each with whether it must be there.
            other: a pair beyond them, whose key is restricted by the rest of a terminal.
            most: others beyond those that are counted on.
        """
        low, high = atom.low, atom.high
        top = max(low, 1) if high == inf else int(high)
        most_pairs = min(top, len(pairs))
        if len(pairs) * (most_pairs + 1) > MAX_RULES or top > MAX_RULES:
            raise RequestError(
                f"the JSON schema counts {len(pairs)} properties up to {top}: too many rules"
            )
        tails: list[Expr] = [EMPTY if count >= low else NOTHING for count in range(most_pairs + 1)]
        if other is not None:
            tails = self._tails(atom, most_pairs, other, comma, most)
        for pair, needed in reversed(pairs):
            new: list[Expr] = []
            for count in range(most_pairs + 1):
                begun = min(count + 1, top) if high == inf else count + 1
                choices = [] if needed or tails[count] == NOTHING else [tails[count]]
                if begun <= most_pairs and tails[begun] != NOTHING:
                    choices.insert(0, seq(*((comma,) if count else ()), pair, tails[begun]))
                new.append(self.rule(alt(*choices)) if choices else NOTHING)
            tails = new
        return tails[0]

    def _tails(
        self, atom: Object, most_pairs: int, other: Callable[[str], Expr], comma: Expr, most: float
    ) -> list[Expr]:
        """What may follow the pairs with a name, by how many there have been."""
        free = self.rule(other(""))
        more = seq(comma, free)
        tails: list[Expr] = []
        for count in range(most_pairs + 1):
            missing = max(atom.low - count, 0)
            room = most if atom.high == inf else atom.high - count - missing
            parts: list[Expr] = []
            for i in range(missing):
                # keys that are counted on must differ: their lengths do
                one = free if missing == 1 else other(terms.apart(i, missing))
                parts += [comma, one] if count + i else [one]
            if count + missing:
                tails.append(seq(*parts, Repeat(more, 0, max(room, 0))))
            else:
                some = seq(free, Repeat(more, 0, room - 1))
                tails.append(alt(EMPTY, some) if room > 0 else EMPTY)
        return tails


def _long_string(low: int, high: float) -> Expr:
    """A string, counted by pieces: a terminal that counts to n has more than n states."""
    piece = Term(f"/{terms.FREE}{{{PIECE}}}/")

    def after(num: int, *parts: Expr) -> Expr:
        return seq(Repeat(piece, num, num), *parts)

    def end(least: int, most: float) -> Expr:
        return Term(f'/{terms.FREE}{times(least, most)}"/')

    first, least = divmod(low, PIECE)
    room = high - first * PIECE
    if room == inf or room < PIECE:
        return seq(terms.text_term('"'), after(first, end(least, room)))
    more, last = divmod(int(room), PIECE)
    ends = [end(least, PIECE - 1), after(more, end(0, last))]
    if more > 1:
        ends.append(seq(Repeat(piece, 1, more - 1), end(0, PIECE - 1)))
    return seq(terms.text_term('"'), after(first, alt(*ends)))


def _of_others(layer: Layer, matched: set[str]) -> Schemas:
    """What a layer says of a key without a name that matches just these patterns."""
    held = [schemas for pattern, schemas in layer.patterns if pattern in matched]
    if held:
        return FREE.union(*held)
    return layer.others or FREE


def _by_characters(terminal: Expr) -> Expr:
    """In a JSON string. Character by character, since what begins with a backslash may end one
    terminal or begin the next."""
    return lark.mapped(terminal, lambda char: Term(f"/{regex.quoted(char)}/"))


def _joined(parts: list[Expr], comma: Expr) -> Iterator[Expr]:
    for i, part in enumerate(parts):
        if i:
            yield comma
        yield part
