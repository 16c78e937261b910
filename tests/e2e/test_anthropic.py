"""/v1/messages over a real socket, with fake actors behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from asyncllm.actors.access import Access
from asyncllm.core.request import FinishReason
from asyncllm.messages import Finished
from asyncllm.records import Failure, Overflow
from tests.e2e.fake_server import Server
from tests.e2e.test_api import HI, live

MESSAGES = "/v1/messages"


@live()
async def test_message(server: Server) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 2}
    status, got = await server.post(MESSAGES, body)
    assert status == 200
    assert got["id"].startswith("msg_")
    assert got["content"] == [{"type": "text", "text": "ab"}]
    assert got["stop_reason"] == "max_tokens"
    assert got["usage"]["input_tokens"] + got["usage"]["cache_read_input_tokens"] == 2
    raw = await server.stream(MESSAGES, body | {"stream": True})
    names = [line[7:] for line in raw.decode().split("\n") if line.startswith("event: ")]
    assert names == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        *(["content_block_delta"] * (names.count("content_block_delta") - 1)),
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = json.loads(raw.split(b"\n")[1].removeprefix(b"data: "))
    assert start["message"]["usage"]["input_tokens"] == 2


@live()
async def test_the_stop_sequence_is_named(server: Server) -> None:
    server.model.holds = True
    body = {"messages": HI, "max_tokens": 9, "stop_sequences": ["#", "!"]}
    post = asyncio.create_task(server.post(MESSAGES, body))
    await server.model.until(lambda: bool(server.model.asked))
    (asked,) = server.model.asked
    ids = server.model.accept(asked)
    server.model.delta(asked.rids[0], [97], asked.params)
    server.model.finish(asked.rids[0], len(ids), 2, FinishReason.STOP, stop="!")
    _, got = await post
    assert (got["stop_reason"], got["stop_sequence"]) == ("stop_sequence", "!")


@live()
async def test_count_tokens(server: Server) -> None:
    path = f"{MESSAGES}/count_tokens"
    assert await server.post(path, {"messages": HI}) == (200, {"input_tokens": 2})
    server.model.refusal = "the chat template refuses these messages"
    status, got = await server.post(path, {"messages": HI})
    assert (status, got["error"]["type"]) == (400, "invalid_request_error")
    assert "refuses" in got["error"]["message"]


@live(access=Access(keys=("k",)))
async def test_errors_have_anthropics_shape(server: Server) -> None:
    headers = {"x-api-key": "k"}
    for path, body, more, status, kind in (
        (MESSAGES, {"messages": HI}, headers, 400, "invalid_request_error"),
        (MESSAGES, {"messages": HI, "max_tokens": 1}, {}, 401, "authentication_error"),
        (MESSAGES, {"messages": HI, "max_tokens": 1, "model": "claude"}, headers, 404,
         "not_found_error"),
        (f"{MESSAGES}/batches", {}, headers, 404, "not_found_error"),
        (f"{MESSAGES}/count_tokens", {}, headers, 400, "invalid_request_error"),
    ):  # fmt: skip
        got, answer = await server.post(path, body, headers=more)
        assert got == status
        assert (answer["type"], answer["error"]["type"]) == ("error", kind)


@live()
async def test_what_does_not_fit_is_told_in_anthropics_words(server: Server) -> None:
    """Clients that shorten what they send look for them."""
    over = [Overflow(9, 0, 8, "--flag"), Overflow(5, 4, 8, "--flag")]
    failures = [Failure("not for them", "context_length_exceeded", 400, each) for each in over]
    server.model.refuse = lambda msg: Finished(msg.rids[0], FinishReason.ERROR, failures.pop(0))
    told = [await server.post(MESSAGES, {"messages": HI, "max_tokens": 1}) for _ in over]
    assert [(status, got["error"]) for status, got in told] == [
        (400, {"type": "invalid_request_error", "message": message})
        for message in (
            "prompt is too long: 9 tokens > 8 maximum (--flag)",
            "input length and `max_tokens` exceed context limit: 5 + 4 > 8, decrease input length "
            "or `max_tokens` and try again (--flag)",
        )
    ]


@live()
async def test_a_stored_conversation_is_refused_so_that_the_sdk_sends_it(server: Server) -> None:
    body = {"messages": HI, "max_tokens": 1, "thread": {"type": "new"}}
    status, got = await server.post(MESSAGES, body)
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert (status, got["error"]["details"]) == (400, details)
    assert (await server.post(MESSAGES, body | {"thread": None}))[0] == 200
    status, got = await server.post(f"{MESSAGES}/count_tokens", body)
    assert (status, got["error"]["details"]) == (400, details)


@live()
async def test_headers_and_models_as_anthropic_has_them(server: Server) -> None:
    headers = {"anthropic-version": "2023-06-01", "X-Request-Id": "mine"}
    async with server.http.get(server.url + "/v1/models", headers=headers) as response:
        assert response.headers["request-id"] == "mine"
        got = await response.json()
    assert (got["first_id"], got["last_id"], got["has_more"]) == ("tiny", "org/tiny", False)
    one = got["data"][0]
    assert (one["type"], one["id"], one["max_input_tokens"]) == ("model", "tiny", 1000)
    assert one["created_at"] == "2023-11-14T22:13:20Z"
    async with server.http.get(server.url + "/v1/models/org/tiny", headers=headers) as response:
        assert await response.json() == got["data"][1]
    async with server.http.get(server.url + "/v1/models/none", headers=headers) as response:
        assert (response.status, (await response.json())["type"]) == (404, "error")
    async with server.http.get(server.url + "/v1/models") as response:
        assert (await response.json())["object"] == "list"
        assert "request-id" not in response.headers
    async with server.http.post(server.url + MESSAGES, json={}) as response:
        assert response.headers["request-id"] == response.headers["X-Request-Id"]
