"""Server-sent events: framing, and templates of chunks that differ in a few values only.

Knows bytes; knows no protocol.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from json.encoder import encode_basestring  # the C function where CPython has it
from typing import Final

from asyncllm.api.common import errors
from asyncllm.errors import RequestError

DONE: Final = b"data: [DONE]\n\n"
MARK: Final = "\ue000text\ue001"  # a hole in a ChunkTemplate
SLICE: Final = 256  # elements of an array that become JSON at once
KEEP_ALIVE: Final = b": keep-alive\n\n"  # a comment, which clients skip


def dumps(value: object) -> str:
    """Compact JSON, not ASCII-only, in one line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text if text.isascii() else _one_line(text)


def body(value: object) -> bytes:
    """Compact JSON as UTF-8; lone surrogates become "?".

    Long arrays are written in slices: ``json.dumps`` lets no other thread run until it is done.
    """
    if _has_long_array(value):
        return b"".join(part.encode("utf-8", "replace") for part in _slices(value))
    return dumps(value).encode("utf-8", "replace")


def _has_long_array(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_long_array, value.values()))
    return isinstance(value, list) and (len(value) > SLICE or any(map(_has_long_array, value)))


def _slices(value: object) -> Iterator[str]:
    """The text of ``dumps`` in parts."""
    if isinstance(value, dict) and value:
        for i, (name, inner) in enumerate(value.items()):
            yield f"{',' if i else '{'}{dumps(name)}:"
            yield from _slices(inner)
        yield "}"
    elif isinstance(value, list) and len(value) > SLICE:
        for i in range(0, len(value), SLICE):
            yield ("," if i else "[") + dumps(value[i : i + SLICE])[1:-1]
        yield "]"
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield "," if i else "["
            yield from _slices(inner)
        yield "]"
    else:
        yield dumps(value)


def head(name: str) -> bytes:
    """What goes before the JSON of an event with a name."""
    return b"event: " + name.encode() + b"\ndata: "


def event(value: object, head: bytes = b"data: ") -> bytes:
    """One event; ``head`` without the space for LightLLM's native stream."""
    return head + body(value) + b"\n\n"


def quoted(text: str) -> str:
    """A JSON string, quotes included, in one line."""
    text = encode_basestring(text)
    return text if text.isascii() else _one_line(text)


def _one_line(text: str) -> str:
    """JSON without U+0085, U+2028 and U+2029 as they are.

    They end no line of an event stream, but clients that split by Unicode's lines, as Python's
    ``splitlines`` does, cut events there. JSON has escapes for all others anyway.
    """
    text = text.replace("\x85", "\\u0085")
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def escaped(text: str) -> bytes:
    """The same as UTF-8."""
    return quoted(text).encode("utf-8", "replace")


def error_event(error: RequestError, head: bytes = b"data: ") -> bytes:
    """A failure after the headers."""
    return event(errors.body(error), head)


class ChunkTemplate:
    """An event made once, whose holes are filled for each chunk.

    Args:
        value: its JSON; every string MARK in it is a hole.
        head: what goes before the JSON.
    """

    def __init__(self, value: object, head: bytes = b"data: ") -> None:
        first, *rest = dumps(value).encode("utf-8", "replace").split(f'"{MARK}"'.encode())
        assert rest, "a template without a hole"
        self._parts = [head + first, *rest]
        self._parts[-1] += b"\n\n"
        self._format = b"%b".join(part.replace(b"%", b"%%") for part in self._parts)

    def text(self, text: str) -> bytes:
        """The event with ``text`` in every hole."""
        return escaped(text).join(self._parts)

    def fill(self, *values: bytes) -> bytes:
        """The event with one JSON value for each hole."""
        return self._format % values
