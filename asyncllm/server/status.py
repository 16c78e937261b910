"""HTTP of a node that serves no requests: /health and /metrics.

Knows neither actors nor the server; it is told what to answer.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable

from aiohttp import web

from asyncllm.actors.access import Access, AccessControl
from asyncllm.actors.connection import Handler
from asyncllm.api.common import errors
from asyncllm.errors import RequestError

TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Status:
    """Serves a socket until it is closed.

    Args:
        healthy: whether the node does its work.
        exposition: its metrics in Prometheus' text format.
        access: who may ask for these.
    """

    def __init__(
        self, healthy: Callable[[], bool], exposition: Callable[[], bytes], access: Access
    ) -> None:
        self._healthy, self._exposition = healthy, exposition
        self._gate = AccessControl(access)
        self._tls: ssl.SSLContext | None = access.tls
        app = web.Application(middlewares=[self._admit])
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def open(self, sock: socket.socket) -> None:
        """Listen, and answer from now on."""
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
            there = "this node answers /health and /metrics; requests go to node 0"
            return _refusal(errors.UnknownPath(f"there is nothing at {request.path}: {there}"))

    async def _health(self, request: web.Request) -> web.Response:
        ok = self._healthy()
        return web.json_response({"message": "Ok" if ok else "Error"}, status=200 if ok else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._exposition(), headers={"Content-Type": TEXT})


def _refusal(error: RequestError) -> web.Response:
    return web.json_response(text=json.dumps(errors.body(error)), status=error.status)
