"""Events and errors as every protocol has them."""

from __future__ import annotations

import json

import pytest

from asyncllm.api.common import errors, sse
from asyncllm.records import Failure


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "context_length_exceeded", (400, "invalid_request_error", "context_length_exceeded")),
        (400, "", (400, "invalid_request_error", "invalid_value")),
        (429, "", (429, "rate_limit_error", "rate_limit_exceeded")),
        (500, "", (500, "server_error", "internal_error")),
        (503, "", (503, "server_error", "service_unavailable")),
        (0, "", (500, "server_error", "internal_error")),
    ],
)
def test_errors_from_behind(status: int, code: str, expected: tuple[int, str, str | None]) -> None:
    error = errors.from_failure(Failure("x", code, status))
    assert (error.status, error.type, error.code) == expected


def test_templates_need_their_mark_once() -> None:
    with pytest.raises(ValueError, match="once"):
        sse.template({"a": "M", "b": "M"}, "M")
    with pytest.raises(ValueError, match="once"):
        sse.template({"a": "x"}, "M")


LINES = "a\x85b\u2028c\u2029d\x0b\x0c\x1c\x1d\x1e\r\n é\\u0085"


def test_no_character_of_a_text_ends_a_line() -> None:
    for data in (
        sse.event({"text": LINES, LINES: [LINES]}),
        sse.event({"text": LINES}, b"data:"),
        b"".join([b"data: ", sse.escaped(LINES), b"\n\n"]),
        sse.escaped(LINES).join(sse.template({"a": LINES, "b": "M"}, "M")),
        sse.escaped(LINES).join(sse.holes({"a": "M", "b": "M", "c": LINES}, "M")),
    ):
        line, empty = data.decode().splitlines()
        assert empty == ""
        said = json.loads(line.partition(":")[2])
        texts = said.values() if isinstance(said, dict) else [said]
        assert all(text in (LINES, [LINES]) for text in texts)
