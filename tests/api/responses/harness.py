"""Requests and answers of /v1/responses, for its tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asyncllm.api.parsing.output_parser import Dialect
from asyncllm.api.responses import request as responses
from asyncllm.api.responses.reply import ResponseReply
from asyncllm.api.responses.request import ResponsesRequest
from asyncllm.api.responses.store import ResponseStore
from asyncllm.codec import i32
from tests.api.harness import SCHEMA, SERVED, Case, answer, delta, ending

TOOLS = [{"type": "function", "name": "weather", "description": "of a city", "parameters": SCHEMA}]


def ask(memory: ResponseStore | None = None, **body: Any) -> ResponsesRequest:
    served = replace(SERVED, dialect=body.pop("dialect", SERVED.dialect))
    return responses.read({"input": "hi"} | body, served, memory or ResponseStore())


def parted(
    case: Case, pieces: list[str], store: ResponseStore, **body: Any
) -> tuple[ResponseReply, bytes]:
    """A reply that has taken an answer, one token for each piece, and what a stream says."""
    calls, thoughts, *_, reason = case
    dialect = Dialect(calls=calls or "hermes", lists_tools=True, reasoning=thoughts)
    asked = ask(store, dialect=dialect, **(({"tools": TOOLS} if calls else {}) | body))
    made = ResponseReply(answer(asked.generation, [b"hello"]), asked, store)
    made.answer.accept(0, i32([]), "")
    (choice,) = made.answer.choices
    raw = made.opening()
    for piece in pieces:
        news = delta(piece, i32([65]), (piece,))
        choice.take(news)
        raw += (
            made.piece(choice, news.text, len(news.ids)) if made.answer.generation.stream else b""
        )
    choice.end(ending(reason), 1, "")
    return made, raw
