"""A JSON schema as a document: its nodes, their locations, and the targets of references.

Knows which keywords hold schemas; does not know what they mean.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, NoReturn
from urllib.parse import unquote, urldefrag, urljoin

from asyncllm.constrain.grammars.jsontext import MAX_DEPTH
from asyncllm.errors import RequestError
from asyncllm.plain import Json, JsonObject

NAMED: Final = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
)
VALUES: Final = frozenset(("enum", "const", "default", "examples", "example"))
TYPES: Final = ("null", "boolean", "integer", "number", "string", "array", "object")
TRUE: Final = 0
FALSE: Final = 1


class Document:
    """Numbers the schemas of one document. 0 is what always holds, 1 what never does.

    Args:
        root: JSON, as :func:`asyncllm.constrain.grammars.jsontext.load` gives it.

    Raises:
        RequestError: it nests too deeply.
    """

    def __init__(self, root: Json) -> None:
        self.nodes: list[Json] = [True, False]
        self._numbers: dict[int, int] = {}
        self._places: dict[int, str] = {}
        self._bases: dict[int, str] = {}
        self._named: dict[str, Json] = {}  # by URI, with the name behind # if it has one
        self.negations: dict[int, Json] = {}  # of schemas by id(), see negation
        self.anchors: Counter[str] = Counter()  # dynamic ones by name; "": recursive
        self.base = ""
        self._root = root
        told = root.get("$schema") if isinstance(root, dict) else None
        # up to draft 7 a $ref makes a $id beside it mean nothing
        self._alone = isinstance(told, str) and "/draft-0" in told
        self._walk(root, "#", 0, True, "")
        self.root = self.number(root)

    def number(self, node: Json, parent: Json = None) -> int:
        """A schema's number.

        Args:
            parent: where it comes from, if it does not stand in the document itself.

        Raises:
            RequestError: it is not a schema.
        """
        if isinstance(node, bool):
            return FALSE if node is False else TRUE
        if not isinstance(node, dict):
            self.fail(parent, f"has {str(node)[:40]!r} where a schema is meant")
        if (number := self._numbers.get(id(node))) is None:
            number = self._numbers[id(node)] = len(self.nodes)
            self.nodes.append(node)
            if id(node) not in self._places:
                self._places[id(node)] = self._places.get(id(parent), "#")
                self._bases[id(node)] = self._bases.get(id(parent), self.base)
        return number

    def types(self, node: JsonObject) -> tuple[str, ...]:
        """The types that a schema names; all where it names none. Raises RequestError."""
        told = node.get("type", "any")
        told = [told] if isinstance(told, str) else told
        if not isinstance(told, list):
            self.fail(node, "has a type that is neither a string nor a list of them")
        if "any" in told:
            return TYPES
        if bad := [name for name in told if name not in TYPES]:
            self.fail(node, f"has the unknown type {str(bad[0])[:40]!r}")
        return tuple(map(str, told))

    def fail(self, node: Json, why: str) -> NoReturn:
        """Raises RequestError that names the place of ``node``."""
        raise RequestError(f"the JSON schema {why} at {self._places.get(id(node), '#')}")

    def target(self, node: JsonObject, ref: Json) -> Json:
        """What ``ref``, a reference in ``node``, points to. Raises RequestError."""
        if not isinstance(ref, str):
            self.fail(node, "has a $ref that is no string")
        try:
            base = self._bases.get(id(node), self.base)
            uri, name = urldefrag(base + ref if ref.startswith("#") else urljoin(base, ref))
        except ValueError:
            self.fail(node, f"has the $ref {ref[:60]!r}, which is no address,")
        if uri in self._named:
            found = self._named[uri]
        elif uri == self.base:
            found = self._root
        else:
            why = "which is another document: it is not fetched,"
            self.fail(node, f"has the $ref {ref[:60]!r}, {why}")
        if not name:
            return found
        if not name.startswith("/"):
            if (key := f"{uri}#{name}") not in self._named:
                self.fail(node, f"has the $ref {ref[:60]!r}, which points to nothing,")
            return self._named[key]
        for step in name[1:].split("/"):
            part = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and part in found:
                found = found[part]
            elif isinstance(found, list) and (i := _index(part, len(found))) is not None:
                found = found[i]
            else:
                self.fail(node, f"has the $ref {ref[:60]!r}, which points to nothing,")
        return found

    def _walk(self, node: Json, place: str, depth: int, is_schema: bool, base: str) -> None:
        """Remember the places of all schemas; below "properties" keys are names."""
        _check_depth(depth)
        self._places[id(node)] = place
        if isinstance(node, list):
            for i, item in enumerate(node):
                self._walk(item, f"{place}/{i}", depth + 1, is_schema, base)
        if not isinstance(node, dict):
            return
        if is_schema:
            base = self._identify(node, base)
        self._bases[id(node)] = base
        for key, value in node.items():
            if is_schema and key in VALUES:
                _check_values(value)
            elif isinstance(value, dict | list):
                step = key.replace("~", "~0").replace("/", "~1")
                inner = not (is_schema and key in NAMED)
                self._walk(value, f"{place}/{step}", depth + 1, inner, base)

    def _identify(self, node: JsonObject, base: str) -> str:
        """Remember the node's names; the base of addresses in it."""
        for word in ("$id", "id"):
            name = node.get(word)
            if isinstance(name, str) and not ("$ref" in node and (word == "id" or self._alone)):
                try:
                    full = urljoin(base, name)
                    uri, anchor = urldefrag(full)
                except ValueError:
                    continue
                if anchor and name.startswith("#"):
                    self._named.setdefault(f"{base}#{anchor}", node)
                elif uri:
                    if node is self._root:
                        self.base = uri
                    base = uri
                    if self._named.setdefault(uri, node) != node and word == "$id":
                        self.fail(node, f"has a second schema of the $id {name[:60]!r}")
        for word in ("$anchor", "$dynamicAnchor"):
            if isinstance(name := node.get(word), str):
                self.anchors[name] += word == "$dynamicAnchor"
                self._named.setdefault(f"{base}#{name}", node)
        self.anchors[""] += node.get("$recursiveAnchor") is True
        return base


def _index(text: str, most: int) -> int | None:
    """The index that a pointer's step is, below ``most``."""
    if len(text) > 9 or not (text.isascii() and text.isdecimal()):
        return None
    return int(text) if int(text) < most else None


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RequestError(f"the JSON schema is nested more than {MAX_DEPTH} deep")


def _check_values(value: Json, depth: int = 0) -> None:
    _check_depth(depth)
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_values(item, depth + 1)
