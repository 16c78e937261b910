"""Resolves JSON schemas: the alternatives that satisfy a set of schemas at once.

Keywords are enforced, or refused with their position; none that has a meaning is ignored. If a
schema cannot be represented exactly, the result may be narrower, never wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from math import inf
from typing import Final

from asyncllm.constrain.grammars import negation, regex
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
    common,
    kind_of,
    number,
    same,
)
from asyncllm.constrain.grammars.document import FALSE, TRUE, TYPES, Document
from asyncllm.constrain.grammars.formats import FORMATS, UNENFORCED
from asyncllm.constrain.grammars.jsontext import dump
from asyncllm.constrain.grammars.terms import raw_form
from asyncllm.core.request import LARK
from asyncllm.errors import RequestError
from asyncllm.plain import Json, JsonObject, T, typed

MAX_LENGTH: Final = 1 << 28  # no output is as long: a greater maximum is none
MAX_WORK: Final = 10_000  # combinations of alternatives that are looked at

Matches = Callable[[str, str], bool]


class SchemaResolver:
    """Alternatives of one document's schemas.

    Args:
        matches: whether a text is all of the form of a terminal; raises RequestError.
        check_time: raises RequestError once all this has taken too long.
    """

    def __init__(
        self, document: Document, matches: Matches, check_time: Callable[[], None]
    ) -> None:
        self.document, self._matches, self._check_time = document, matches, check_time
        self._known: dict[Schemas, tuple[Atom, ...]] = {}
        self._alone: dict[int, tuple[Atom, ...]] = {}
        self._open: set[int] = set()
        self._narrowed: set[int] = set()  # by id, the oneOf nodes whose parts overlap
        self._looked: set[Schemas] = set()
        self._work = MAX_WORK
        self._anything = self._of_types(TYPES, {})

    def atoms(self, schemas: Schemas) -> tuple[Atom, ...]:
        """What fits all of ``schemas``. (): nothing does. Raises RequestError."""
        if (known := self._known.get(schemas)) is not None:
            return known
        found = self._anything
        for one in sorted(schemas):
            part = self._alternatives(one)
            found = part if found is self._anything else self._both(found, part)
        if schemas in self._looked:
            return found  # it is being looked at further up, and may be empty
        self._looked.add(schemas)
        found = tuple(atom for atom in found if not self._is_empty(atom))
        self._looked.discard(schemas)
        self._known[schemas] = found
        return found

    def fits(self, value: Json, schemas: Schemas) -> bool:
        """Whether a value fits all of ``schemas``."""
        return any(self._fits(value, atom) for atom in self.atoms(schemas))

    def of_key(self, key: str, layers: Iterable[Layer]) -> Schemas:
        """What must hold for the property ``key``."""
        found: set[int] = set()
        for layer in layers:
            named = [schemas for name, schemas in layer.named if name == key]
            named += [s for pattern, s in layer.patterns if self.matches_pattern(key, pattern)]
            if not named and layer.others is not None:
                named = [layer.others]
            found.update(*named)
        return frozenset(found)

    def matches_pattern(self, text: str, pattern: str) -> bool:
        return self._matches(raw_form(StringForm("pattern", pattern)), text)

    # -- one schema ----------------------------------------------------------------------------

    def _alternatives(self, schema: int) -> tuple[Atom, ...]:
        if (known := self._alone.get(schema)) is not None:
            return known
        node = self.document.nodes[schema]
        if schema == TRUE:
            return self._anything
        if schema == FALSE:
            return ()
        assert isinstance(node, dict), node
        if schema in self._open:
            self.document.fail(node, "refers to itself")
        self._open.add(schema)
        found = self._own(node)
        for part in self._applied(node):
            found = self._both(found, part)
        found = tuple(self._closed(node, atom) for atom in found)
        self._open.discard(schema)
        self._alone[schema] = found
        return found

    def _of(self, node: Json, parent: Json) -> tuple[Atom, ...]:
        """What fits a schema that stands in ``parent``, or was made of it."""
        return self._alternatives(self.document.number(node, parent))

    def _set(self, node: Json, parent: Json) -> Schemas:
        one = self.document.number(node, parent)
        return FREE if one == TRUE else frozenset((one,))

    def _said(
        self, node: JsonObject, word: str, kind: type[T], what: str, default: Json = None
    ) -> T:
        """The value of a keyword, which is of a type, in words ``what``."""
        value = node.get(word, default)
        if not isinstance(value, kind):
            self.document.fail(node, f"has {what}")
        return value

    def _own(self, node: JsonObject) -> tuple[Atom, ...]:
        """What the keywords say that hold no schemas for the same value."""
        free = self._of_types(self.document.types(node), node)
        values = self._said(node, "enum", list, "an enum that is no list", [])
        if "const" in node:
            values = [v for v in values if same(v, node["const"])] if values else [node["const"]]
        if "const" not in node and "enum" not in node:
            return free
        texts = {dump(value): value for value in values}
        return tuple(
            Const(text, value)
            for text, value in texts.items()
            if any(self._fits(value, atom) for atom in free)
        )

    def _of_types(self, types: Iterable[str], node: JsonObject) -> tuple[Atom, ...]:
        found: list[Atom | None] = []
        gone = typed(node.get(negation.VALUES, []), list)
        if "null" in types:
            found.append(Const("null", None))
        if "boolean" in types:
            found += [Const("true", True), Const("false", False)]
        found = [c for c in found if isinstance(c, Const) and not _among(c.value, gone)]
        if "number" in types or "integer" in types:
            found.append(self._numeric(node, "number" not in types, gone))
        if "string" in types:
            found.append(self._string(node, gone))
        if "array" in types and not any(isinstance(value, list) for value in gone):
            found.append(self._array(node))
        if "object" in types and not any(isinstance(value, dict) for value in gone):
            found.append(self._object(node))
        return tuple(atom for atom in found if atom is not None)

    def _refuse(self, node: JsonObject, *words: str) -> None:
        for word in words:
            if word in node:
                self.document.fail(
                    node, f"has {word}, which cannot be enforced: leave it out; it stands"
                )

    def _count(self, node: JsonObject, word: str) -> int | None:
        value = node.get(word)
        if value is None:
            return None
        if kind_of(value) != "integer" or number(value) < 0:
            self.document.fail(node, f"has {word} {str(value)[:40]}, which is no count,")
        return int(number(value))

    def _bound(self, node: JsonObject, word: str, absent: float) -> Fraction | float:
        value = node.get(word)
        if value is None or isinstance(value, bool):
            return absent
        if kind_of(value) not in ("integer", "number"):
            self.document.fail(node, f"has {word} {str(value)[:40]!r}, which is no number,")
        return number(value)

    def _numeric(self, node: JsonObject, integer: bool, gone: Iterable[Json]) -> Atom | None:
        for word in ("multipleOf", "divisibleBy"):
            step = self._bound(node, word, inf)
            integer = integer or step == 1
            # integers are multiples of what divides 1
            if step != inf and not (integer and step > 0 and Fraction(1 / step).denominator == 1):
                self._refuse(node, word)
        low = max(
            (self._bound(node, "minimum", -inf), node.get("exclusiveMinimum") is True),
            (self._bound(node, "exclusiveMinimum", -inf), True),
        )
        high = min(
            (self._bound(node, "maximum", inf), node.get("exclusiveMaximum") is not True),
            (self._bound(node, "exclusiveMaximum", inf), False),
        )
        numbers = frozenset(number(v) for v in gone if kind_of(v) in ("integer", "number"))
        told = Number(low, high, integer, negation.FRACTION in node, numbers)
        return common(told, Number())

    def _string(self, node: JsonObject, gone: Iterable[Json]) -> Atom | None:
        forms = {StringForm("text", value, False) for value in gone if isinstance(value, str)}
        for word in ("pattern", negation.PATTERN):
            if word in node:
                text = self._said(node, word, str, f"a {word} that is no string")
                parts = regex.conjuncts(text) if word == "pattern" else [(text, False)]
                forms |= {self._pattern(node, "a pattern", part, holds) for part, holds in parts}
        if (text := self._said(node, "format", str, "a format that is no string", "")) in FORMATS:
            forms.add(StringForm("format", text))
        elif text in UNENFORCED:
            self._refuse(node, "format")
        lark = node.get(LARK)
        return self._sized(
            node,
            "Length",
            String(forms=frozenset(forms), lark=lark if isinstance(lark, str) else ""),
        )

    def _pattern(self, node: JsonObject, what: str, text: str, holds: bool = True) -> StringForm:
        form = StringForm("pattern", text, holds)
        try:
            raw_form(form)
        except RequestError as error:
            self.document.fail(node, f"has {what} that cannot be kept ({error.message})")
        return form

    def _sized(self, node: JsonObject, what: str, atom: String | Array | Object) -> Atom | None:
        """``atom`` as long as minLength, maxItems and the like have it."""
        low, high = (self._count(node, f"{end}{what}") for end in ("min", "max"))
        most = inf if high is None or high >= MAX_LENGTH else high
        return common(atom, type(atom)(low or 0, most))

    def _array(self, node: JsonObject) -> Atom | None:
        most = self._count(node, "maxItems")
        if node.get("uniqueItems") and (most is None or most > 1):
            self._refuse(node, "uniqueItems")
        if self._count(node, "minContains") != 0 or "maxContains" in node:
            self._refuse(node, "contains")
        prefix = self._said(node, "prefixItems", list, "prefixItems that are no list", [])
        rest = node.get("items")
        if isinstance(rest, list):
            prefix, rest = rest, node.get("additionalItems")
        array = Array(
            prefix=tuple(self._set(item, node) for item in prefix),
            rest=FREE if rest is None else self._set(rest, node),
            said=rest is not None,
        )
        return self._sized(node, "Items", array)

    def _object(self, node: JsonObject) -> Atom | None:
        required = node.get("required", [])
        if isinstance(required, bool):
            required = []  # draft 3: of a property
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self.document.fail(node, "has a required that is no list of names")
        named, patterns = (
            tuple(
                (name, self._set(value, node))
                for name, value in self._said(
                    node, word, dict, "properties that are no object", {}
                ).items()
            )
            for word in ("properties", "patternProperties")
        )
        for pattern, _ in patterns:
            self._pattern(node, "patternProperties", pattern)
        others = node.get("additionalProperties")
        told = Layer(named, patterns, None if others is None else self._set(others, node))
        made = Object(
            layers=() if told == Layer() else (told,),
            required=tuple(map(str, required)),
            names=self._set(node.get("propertyNames", True), node),
        )
        return self._sized(node, "Properties", made)

    # -- schemas for the same value ---------------------------------------------------------------

    def _applied(self, node: JsonObject) -> Iterator[tuple[Atom, ...]]:
        self._refuse(node, "extends", "disallow")
        for word in ("$ref", "$dynamicRef", "$recursiveRef"):
            if word not in node:
                continue
            ref = node[word]
            # with one anchor of the name in the document there is nothing to choose from
            if word != "$ref" and self.document.anchors[str(ref).rpartition("#")[2]] > 1:
                self._refuse(node, word)
            yield self._of(self.document.target(node, ref), node)
        for one in self._list(node, "allOf"):
            yield self._alternatives(one)
        if "anyOf" in node:
            yield self._any(self._list(node, "anyOf"))
        if "oneOf" in node:
            yield self._one(node, self._list(node, "oneOf"))
        if "not" in node:
            yield self._not(node["not"], node)
        if "if" in node and ("then" in node or "else" in node):
            yield self._if(node)
        for made in negation.dependencies(node, self.document):
            yield self._of(made, node)

    def _list(self, node: JsonObject, word: str) -> list[int]:
        parts = node.get(word, [])
        if not isinstance(parts, list) or (word in node and not parts):
            self.document.fail(node, f"has {word} that is no list of schemas")
        return [self.document.number(part, node) for part in parts]

    def _any(self, schemas: Iterable[int]) -> tuple[Atom, ...]:
        found: dict[Atom, None] = {}
        for one in schemas:
            found |= dict.fromkeys(self._alternatives(one))
        self._spend(len(found))
        return tuple(found)

    def _one(self, node: JsonObject, schemas: list[int]) -> tuple[Atom, ...]:
        """Exactly one: of those that overlap, each without the others."""
        parts = [self._alternatives(one) for one in schemas]
        # what is told narrower than it is may overlap unseen
        narrow = [self._is_narrow(self.document.nodes[one]) for one in schemas]
        found: dict[Atom, None] = {}
        for i, part in enumerate(parts):
            for j, other in enumerate(parts):
                if i != j and (narrow[j] or not self._apart(part, other)):
                    self._narrowed.add(id(node))
                    part = self._both(part, self._not(self.document.nodes[schemas[j]], node))
            found |= dict.fromkeys(part)
        return tuple(found)

    def _is_narrow(self, schema: Json) -> bool:
        """Whether ``schema``, or what it refers to, contains a negation."""
        self._check_time()
        waiting, seen = [schema], set[int]()
        while waiting:
            one = waiting.pop()
            if not isinstance(one, dict | list) or id(one) in seen:
                continue
            seen.add(id(one))
            if id(one) in self._narrowed or "not" in one or "if" in one:
                return True
            waiting += one.values() if isinstance(one, dict) else one
            if isinstance(one, dict) and isinstance(ref := one.get("$ref"), str):
                waiting.append(self.document.target(one, ref))
        return False

    def _apart(self, one: tuple[Atom, ...], other: tuple[Atom, ...]) -> bool:
        return all(self._is_empty(atom) for atom in self._both(one, other))

    def _not(self, schema: Json, node: JsonObject) -> tuple[Atom, ...]:
        made = negation.negated(schema, self.document)
        if made is None:
            self.document.fail(
                node,
                "has a schema that must not hold (not, oneOf or if), which cannot be enforced,",
            )
        return tuple(map(_opposite, self._of(made, node)))

    def _if(self, node: JsonObject) -> tuple[Atom, ...]:
        yes, no = (self._of(node.get(word, True), node) for word in ("then", "else"))
        then = self._both(self._of(node["if"], node), yes)
        otherwise = self._both(self._not(node["if"], node), no)
        return tuple(dict.fromkeys(then + otherwise))

    def _closed(self, node: JsonObject, atom: Atom) -> Atom:
        """``unevaluated*`` speak of what no schema for the same value has spoken of."""
        if isinstance(atom, Const):
            self._check_closed(node, atom.value)
        if isinstance(atom, Object) and "unevaluatedProperties" in node:
            layers = [layer for layer in atom.layers if not layer.opposite]
            if any(layer.others is not None for layer in layers):
                return atom
            spoken = Layer(
                tuple((name, FREE) for layer in layers for name, _ in layer.named),
                tuple((pattern, FREE) for layer in layers for pattern, _ in layer.patterns),
                self._set(node["unevaluatedProperties"], node),
            )
            return replace(atom, layers=(*atom.layers, spoken))
        if isinstance(atom, Array) and "unevaluatedItems" in node:
            rest = self._set(node["unevaluatedItems"], node)
            if atom.opposite:  # nobody knows any more who spoke of which
                return replace(
                    atom,
                    prefix=tuple(p | rest for p in atom.prefix),
                    rest=atom.rest | rest,
                    said=True,
                )
            return atom if atom.said else replace(atom, rest=atom.rest | rest, said=True)
        return atom

    def _check_closed(self, node: JsonObject, value: Json) -> None:
        """Refuse a value of which it is not known what has been spoken of."""
        if isinstance(value, list) and value and not isinstance(node.get("items"), bool | dict):
            self._refuse(node, "unevaluatedItems")
        if isinstance(value, dict) and "additionalProperties" not in node:
            named = node.get("properties")
            if not value.keys() <= (named.keys() if isinstance(named, dict) else set()):
                self._refuse(node, "unevaluatedProperties")

    # -- alternatives -------------------------------------------------------------------------

    def _spend(self, work: int) -> None:
        self._check_time()
        self._work -= work
        if self._work < 0:
            raise RequestError(
                "the JSON schema combines too many alternatives (anyOf, oneOf, if): simplify it"
            )

    def _both(self, one: tuple[Atom, ...], other: tuple[Atom, ...]) -> tuple[Atom, ...]:
        if one == self._anything:
            return other
        if other == self._anything:
            return one
        self._spend(len(one) * len(other))
        found: dict[Atom, None] = {}
        for a in one:
            for b in other:
                if isinstance(a, Const) or isinstance(b, Const):
                    made = self._with_const(a, b)
                else:
                    made = common(a, b)
                if made is not None:
                    found[made] = None
        return tuple(found)

    def _with_const(self, one: Atom, other: Atom) -> Atom | None:
        const, free = (one, other) if isinstance(one, Const) else (other, one)
        assert isinstance(const, Const)
        return const if self._fits(const.value, free) else None

    def _is_empty(self, atom: Atom) -> bool:
        """Whether surely nothing fits; of objects and arrays,
        as far as what they must hold says."""
        match atom:
            case Object():
                if len(atom.required) > atom.high:
                    return True
                return any(not self.atoms(self.of_key(name, atom.layers)) for name in atom.required)
            case Array():
                needed = range(min(atom.low, len(atom.prefix) + 1))
                return any(not self.atoms(atom.item(i)) for i in needed)
            case _:
                return False

    def _fits(self, value: Json, atom: Atom) -> bool:
        match atom:
            case Const():
                return same(value, atom.value)
            case Number():
                return kind_of(value) in ("integer", "number") and atom.holds(number(value))
            case _ if isinstance(value, str | list | dict):
                return atom.low <= len(value) <= atom.high and self._inside(value, atom)
            case _:
                return False

    def _inside(self, value: Json, atom: Atom) -> bool:
        match atom, value:
            case String(), str():
                return all(self._has_form(value, form) for form in atom.forms)
            case Array(), list():
                return all(self.fits(item, atom.item(i)) for i, item in enumerate(value))
            case Object(), dict():
                return all(name in value for name in atom.required) and all(
                    self.fits(item, self.of_key(key, atom.layers)) and self.fits(key, atom.names)
                    for key, item in value.items()
                )
            case _:
                return False

    def _has_form(self, value: str, form: StringForm) -> bool:
        if form.kind == "text":
            return (value == form.text) == form.holds
        positive = StringForm(form.kind, form.text)
        return self._matches(raw_form(positive), value) == form.holds


def _opposite(atom: Atom) -> Atom:
    match atom:
        case Object():
            return replace(atom, layers=tuple(replace(la, opposite=True) for la in atom.layers))
        case Array():
            return replace(atom, opposite=True)
        case _:
            return atom


def _among(value: Json, values: Iterable[Json]) -> bool:
    return any(same(value, other) for other in values)
