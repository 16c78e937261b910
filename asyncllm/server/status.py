"""Serves a few HTTP pages in processes that serve no requests.

Knows neither actors nor the server; it is given the answers.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable, Mapping
from functools import partial

from aiohttp import web

from asyncllm.actors.access import Access, AccessControl
from asyncllm.actors.connection import Handler
from asyncllm.api.common import errors
from asyncllm.errors import RequestError

TEXT, JSON = "text/plain; version=0.0.4; charset=utf-8", "application/json"
Page = Callable[[], tuple[int, str, bytes]]  # status, type and body of an answer


class StatusPages:
    """Serves a socket until it is closed.

    Args:
        pages: page by path.
        access: who may read them.
        elsewhere: says where to send other requests.
    """

    def __init__(self, pages: Mapping[str, Page], access: Access, elsewhere: str) -> None:
        self._gate, self._elsewhere = AccessControl(access), elsewhere
        self._tls: ssl.SSLContext | None = access.tls
        app = web.Application(middlewares=[self._admit])
        for path, page in pages.items():
            app.router.add_get(path, partial(_show, page))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def open(self, sock: socket.socket) -> None:
        """Start listening and answering."""
        await self._runner.setup()
        await web.SockSite(self._runner, sock, ssl_context=self._tls).start()

    async def close(self) -> None:
        """Close all connections."""
        await self._runner.cleanup()

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._gate.check(request)
            return await handler(request)
        except RequestError as error:
            return _refusal(error)
        except web.HTTPNotFound:
            what = f"there is nothing at {request.path}: {self._elsewhere}"
            return _refusal(errors.UnknownPath(what))


async def _show(page: Page, _: web.Request) -> web.Response:
    status, kind, body = page()
    return web.Response(status=status, headers={"Content-Type": kind}, body=body)


def _refusal(error: RequestError) -> web.Response:
    return web.json_response(text=json.dumps(errors.body(error)), status=error.status)
