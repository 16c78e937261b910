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


def test_a_template_is_filled_where_its_marks_are() -> None:
    made = sse.ChunkTemplate({"a": sse.MARK, "b": ["%s", sse.MARK], sse.MARK: 2}, b"data:")
    assert made.fill(b"0", b"null", b'"k"') == b'data:{"a":0,"b":["%s",null],"k":2}\n\n'
    assert made.text("é") == 'data:{"a":"é","b":["%s","é"],"é":2}\n\n'.encode()
    with pytest.raises(TypeError, match="not enough"):
        made.fill(b"0")


LINES = "a\x85b\u2028c\u2029d\x0b\x0c\x1c\x1d\x1e\r\n é\\u0085"


def test_no_character_of_a_text_ends_a_line() -> None:
    for data in (
        sse.event({"text": LINES, LINES: [LINES]}),
        sse.event({"text": LINES}, b"data:"),
        b"".join([b"data: ", sse.escaped(LINES), b"\n\n"]),
        sse.ChunkTemplate({"a": LINES, "b": sse.MARK}).text(LINES),
        sse.ChunkTemplate({"a": sse.MARK, "b": sse.MARK, "c": LINES}).text(LINES),
    ):
        line, empty = data.decode().splitlines()
        assert empty == ""
        said = json.loads(line.partition(":")[2])
        texts = said.values() if isinstance(said, dict) else [said]
        assert all(text in (LINES, [LINES]) for text in texts)


def test_long_arrays_are_written_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is done in a short time, and other threads run between them."""
    rows: list[object] = [{"t": "é\u2028", "p": [None, -0.5], "o": {}} for _ in range(1000)]
    values: list[object] = [
        {"a": rows, "é": "x", "e": [], "n": None, "o": {"inner": [[list(range(600))], {}]}},
        [[rows, 1], "b"],
        list(range(sse.SLICE)),
        list(range(sse.SLICE + 1)),
        {"usage": {"n": 1}, "choices": [{"text": "a"}]},
        [],
    ]
    whole = [sse.dumps(value).encode() for value in values]
    longest: list[int] = []
    real = json.dumps

    def watched(value: object, **options: object) -> str:
        longest.append(len(value) if isinstance(value, list) else 1)
        return real(value, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(json, "dumps", watched)
    assert [sse.body(value) for value in values] == whole
    assert max(longest) == sse.SLICE
