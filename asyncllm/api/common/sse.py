"""Server-sent events: framing, and chunk templates around an escaped text.

A chunk's JSON is fixed per request except for the text, so it is made once as prefix and suffix.
Knows bytes; knows no protocol.
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring  # the C function where CPython has it
from typing import Any, Final

from asyncllm.api.common import errors
from asyncllm.errors import RequestError

DONE: Final = b"data: [DONE]\n\n"
MARK: Final = "\ue000text\ue001"  # stands for the text in a chunk template
KEEP_ALIVE: Final = b": keep-alive\n\n"  # a comment, which clients skip


def dumps(value: Any) -> str:
    """Compact JSON, not ASCII-only, in one line."""
    return _one_line(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def body(value: Any) -> bytes:
    """Compact JSON as UTF-8; lone surrogates become "?"."""
    return dumps(value).encode("utf-8", "replace")


def event(value: Any, head: bytes = b"data: ") -> bytes:
    """One event; ``head`` without the space for LightLLM's native stream."""
    return head + body(value) + b"\n\n"


def quoted(text: str) -> str:
    """A JSON string, quotes included, in one line."""
    return _one_line(encode_basestring(text))


def _one_line(text: str) -> str:
    """JSON without U+0085, U+2028 and U+2029 as they are.

    They end no line of an event stream, but clients that split by Unicode's lines, as Python's
    ``splitlines`` does, cut events there. JSON has escapes for all others anyway.
    """
    if text.isascii():
        return text
    text = text.replace("\x85", "\\u0085")
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def escaped(text: str) -> bytes:
    """The same as UTF-8."""
    return quoted(text).encode("utf-8", "replace")


def error_event(error: RequestError, head: bytes = b"data: ") -> bytes:
    """A failure after the headers."""
    return event(errors.body(error), head)


def holes(value: Any, mark: str) -> tuple[bytes, ...]:
    """The event of ``value`` cut at each string ``mark``: ``escaped(text).join`` fills them."""
    parts = dumps(value).split(f'"{mark}"')
    parts[0] = "data: " + parts[0]
    parts[-1] += "\n\n"
    return tuple(part.encode("utf-8", "replace") for part in parts)


def template(value: Any, mark: str, head: bytes = b"data: ") -> tuple[bytes, bytes]:
    """The event of ``value`` cut at the string ``mark``: what goes before and after a text.

    Raises ValueError unless ``mark`` occurs exactly once as a string value.
    """
    before, hole, after = dumps(value).partition(f'"{mark}"')
    if not hole or f'"{mark}"' in after:
        raise ValueError(f"{mark!r} is not in the template once")
    return head + before.encode("utf-8", "replace"), after.encode("utf-8", "replace") + b"\n\n"
