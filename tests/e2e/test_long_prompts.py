"""Streams that begin with something of each token of a long prompt, which a thread renders."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any
from unittest.mock import patch

from asyncllm.actors.exchange import ChunkedWriter, Exchange, ExchangesAside
from asyncllm.api.common import answer
from asyncllm.api.openai.completion_reply import CompletionReply
from tests.e2e.fake_server import Server
from tests.e2e.test_api import CHAT, COMPLETIONS, HI, live

NATIVE = "/generate_stream"
IDS = [104, 105, 97, 98]
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "echo": (COMPLETIONS, {"prompt": IDS, "echo": True, "max_tokens": 3}),
    "echo without an answer": (COMPLETIONS, {"prompt": "hi", "echo": True, "max_tokens": 0}),
    "scores": (COMPLETIONS, {"prompt": IDS, "echo": True, "logprobs": 2, "max_tokens": 3}),
    "only scores": (COMPLETIONS, {"prompt": IDS, "echo": True, "logprobs": 1, "max_tokens": 0}),
    "choices": (COMPLETIONS, {"prompt": [IDS, [99]], "n": 2, "echo": True, "logprobs": 0, "max_tokens": 4}),
    "ids": (COMPLETIONS, {"prompt": IDS, "return_token_ids": True, "max_tokens": 3}),
    "ids of a chat": (CHAT, {"messages": HI, "return_token_ids": True, "n": 2}),
    "native": (NATIVE, {"inputs": "hihi", "parameters": {"prompt_logprobs": 2, "max_new_tokens": 3}}),
}  # fmt: skip


def news_of(raw: bytes) -> dict[str, list[Any]]:
    """The events of each choice, in order, without what differs from answer to answer."""
    out: dict[str, list[Any]] = {}
    for line in raw.decode().split("\n"):
        if line.startswith("data:") and not line.endswith("[DONE]"):
            event = json.loads(line[5:])
            for name in ("id", "created"):
                event.pop(name, None)
            choices = event.get("choices") or [{}]
            out.setdefault(str(choices[0].get("index")), []).append(event)
    return out


async def quiet(server: Server) -> None:
    while not server.front.holds().startswith("0 requests, 0 choices"):
        await server.post("/tokens", {"text": "x"})


@live()
async def test_a_stream_is_the_same_if_a_thread_renders_its_beginning(server: Server) -> None:
    real, aside = ExchangesAside.begin, list[Exchange]()

    def begin(self: ExchangesAside, exchange: Exchange) -> None:
        aside.append(exchange)
        real(self, exchange)

    for name, (path, body) in BODIES.items():
        asked = body if path == NATIVE else body | {"stream": True}
        plain = news_of(await server.stream(path, asked))
        with patch.object(answer, "LONG", 0), patch.object(ExchangesAside, "begin", begin):
            aside.clear()
            assert news_of(await server.stream(path, asked)) == plain, name
        assert aside, name
    await quiet(server)


@live()
async def test_news_waits_for_a_beginning_that_is_being_rendered(server: Server) -> None:
    """Others are served meanwhile; a client that leaves ends its request."""
    real, (path, body) = CompletionReply._echo, BODIES["scores"]
    for leaves in (False, True):
        begun, goes_on = threading.Event(), threading.Event()

        def echo(reply: CompletionReply, choice: Any) -> bytes:
            begun.set()  # noqa: B023
            assert goes_on.wait(20)  # noqa: B023
            return real(reply, choice)

        with patch.object(answer, "LONG", 0), patch.object(CompletionReply, "_echo", echo):
            asked = asyncio.create_task(server.stream(path, body | {"stream": True}))
            assert await asyncio.to_thread(begun.wait, 20)
            status, other = await server.post(CHAT, {"messages": HI})
            assert (status, other["choices"][0]["message"]["content"]) == (200, "abc")
            if leaves:
                asked.cancel()
                await server.model.until(lambda: bool(server.model.aborted))
            goes_on.set()
            if not leaves:
                assert b"[DONE]" in await asked
        await quiet(server)
        assert not server.front._aside._late


@live()
async def test_a_fault_in_a_thread_costs_its_request_only(server: Server) -> None:
    path, body = BODIES["scores"]
    with patch.object(answer, "LONG", 0), patch.object(CompletionReply, "_echo", None):
        async with server.http.post(server.url + path, json=body | {"stream": True}) as told:
            assert "internal_error" in await told.text(), "before the headers or as an event"
    status, _ = await server.post(CHAT, {"messages": HI})
    assert status == 200
    await quiet(server)


class Transport:
    """Of a client that has read nothing yet."""

    def __init__(self) -> None:
        self.unsent = 0

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, data: bytes) -> None:
        self.unsent += len(data)


def test_a_client_may_take_its_time_for_a_large_event() -> None:
    """The next one comes before that has gone over a slow line."""
    transport = Transport()
    writer = ChunkedWriter(transport, False)  # type: ignore[arg-type]
    writer.write(b"x" * 5000)
    assert (writer.unsent, writer.behind) == (5000, 0)
    for _ in range(3):
        writer.write(b"y" * 10)
    assert writer.behind == 30
