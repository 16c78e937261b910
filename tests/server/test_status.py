"""Pages of processes that serve no requests: who may read them, and what connections may do."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from asyncllm.config import Config
from asyncllm.server.config_server import json_page
from asyncllm.server.status import StatusPages
from tests.actors.test_transport import run
from tests.server.pages import opened

ORIGIN = "https://pages.example"


def serving(**options: Any) -> AbstractAsyncContextManager[int]:
    """The port of a server with these options."""
    page = json_page(b"{}")
    return opened(StatusPages({"/health": page, "/metrics": page}, Config(**options), "go there"))


async def answer(port: int, *lines: str) -> tuple[str, str]:
    """Status line, and headers and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "\r\n".join((*lines, "Host: x", "Connection: close", "", ""))
    writer.write(head.encode(errors="surrogateescape"))
    text = (await reader.read()).decode()
    writer.close()
    status, _, rest = text.partition("\r\n")
    return status, rest


def test_limits_and_access_are_those_of_the_options(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        limits = {"max_header_size": 300, "max_headers": 6, "cors_allow_origins": (ORIGIN,)}
        async with serving(api_key=("k",), **limits) as port:
            assert (await answer(port, "GET /health HTTP/1.1"))[0] == "HTTP/1.1 200 OK"
            status, rest = await answer(port, "GET /metrics HTTP/1.1", f"Origin: {ORIGIN}")
            assert status.startswith("HTTP/1.1 401")
            assert f"Access-Control-Allow-Origin: {ORIGIN}" in rest
            key = "Authorization: Bearer k"
            assert "200" in (await answer(port, "GET /metrics HTTP/1.1", key))[0]
            status, rest = await answer(port, "GET /other HTTP/1.1", key)
            assert status.startswith("HTTP/1.1 404")
            assert "there is nothing at /other: go there" in rest
            asks = "Access-Control-Request-Method: GET"
            assert "204" in (await answer(port, "OPTIONS /metrics HTTP/1.1", asks))[0]
            for more in (["X: " + "a" * 400], [f"X{i}: a" for i in range(7)]):
                status, rest = await answer(port, "GET /health HTTP/1.1", *more)
                assert " 431 " in status
                assert "--max_header" in rest
            status, rest = await answer(port, "GET /health HTTP/1.1", "Expect: \udcff")
            assert " 417 " in status
            assert "is not 100-continue" in rest
            assert "400" in (await answer(port, "what is this"))[0]

    run(go())
    assert "Traceback" not in caplog.text


def test_a_connection_without_a_request_is_closed() -> None:
    async def go() -> None:
        async with serving(keep_alive_timeout=0.1) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b""
            writer.close()

    run(go())
