"""Serves a few HTTP pages in processes that serve no requests.

Knows neither actors nor the server; it is given the answers.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from functools import partial

from aiohttp import web

from asyncllm.actors.access import Access, AccessControl
from asyncllm.actors.connection import (
    ConnectionWatcher,
    Handler,
    HttpListeners,
    check_expectation,
)
from asyncllm.api.common import errors
from asyncllm.config import Config
from asyncllm.errors import RequestError
from asyncllm.server.launch import tls_context

TEXT, JSON = "text/plain; version=0.0.4; charset=utf-8", "application/json"
SHUTDOWN_S = 1.0  # for open connections when it is closed
Page = Callable[[], tuple[int, str, bytes]]  # status, type and body of an answer


class StatusPages:
    """Serves a socket until it is closed.

    Args:
        pages: page by path.
        config: who may read them, and the limits of connections.
        elsewhere: says where to send other requests.
    """

    def __init__(self, pages: Mapping[str, Page], config: Config, elsewhere: str) -> None:
        self._tls, self._elsewhere = tls_context(config), elsewhere
        self._gate = AccessControl(Access(keys=config.api_key, origins=config.cors_allow_origins))
        app = web.Application()
        for path, page in pages.items():
            app.router.add_get(path, partial(_show, page))
        self._listeners = HttpListeners(
            app,
            self._guard,
            _refusal,
            lookout=ConnectionWatcher(),
            shutdown_s=SHUTDOWN_S,
            keepalive_timeout=config.keep_alive_timeout,
            max_line_size=config.max_header_size,
            max_field_size=config.max_header_size,
            max_headers=config.max_headers,
        )

    async def open(self, sock: socket.socket) -> None:
        """Start listening and answering."""
        await self._listeners.open([sock], self._tls)

    async def close(self) -> None:
        """Close all connections."""
        await self._listeners.close()

    async def _guard(self, handler: Handler, request: web.Request) -> web.StreamResponse:
        response: web.StreamResponse | None = self._gate.preflight(request)
        if response is None:
            try:
                check_expectation(request)
                self._gate.check(request)
                response = await handler(request)
            except RequestError as error:
                response = _refusal(error)
            except web.HTTPNotFound:
                what = f"there is nothing at {request.path}: {self._elsewhere}"
                response = _refusal(errors.UnknownPath(what))
        self._gate.mark(request, response)
        return response


async def _show(page: Page, _: web.Request) -> web.Response:
    status, kind, body = page()
    return web.Response(status=status, headers={"Content-Type": kind}, body=body)


def _refusal(error: RequestError) -> web.Response:
    return web.json_response(text=json.dumps(errors.body(error)), status=error.status)
