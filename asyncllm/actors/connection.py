"""HTTP connections: invalid HTTP, disconnecting clients, running out of descriptors.

Knows aiohttp's connections; knows neither routes nor bodies.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from socket import socket
from time import monotonic
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from asyncllm.api.common import validation
from asyncllm.api.common.errors import HeaderTooLarge, Unexpected
from asyncllm.errors import RequestError, RequestFault

BACKLOG: Final = 2048  # connections that wait to be accepted
LINGER_S: Final = 2.0  # to drain a body after the answer, so that the client can read the answer
LOOK_S: Final = 0.5  # between two checks of the connections
COMPLAIN_S: Final = 60.0  # between two lines of the log about descriptors

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ErrorAnswer = Callable[[RequestError], web.Response]


def check_expectation(request: web.Request) -> None:
    """Raises Unexpected. aiohttp would answer in text, which cannot hold every byte of a header."""
    expected = request.headers.get("Expect", "")
    if expected and expected.lower() != "100-continue":
        raise Unexpected(f"Expect: {validation.preview(expected)} is not 100-continue")


class Connection(web.RequestHandler):
    """One client's connection.

    Args:
        answer: makes the response if parsing the request failed.
    """

    __slots__ = ("_answer",)

    def __init__(self, manager: web.Server, *, answer: ErrorAnswer, **options: Any) -> None:
        super().__init__(manager, **options)
        self._answer = answer

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to bytes that are not HTTP, and to failures outside every route."""
        if isinstance(exc, ConnectionError):
            raise exc  # the client left: there is nobody to answer
        if request.writer.output_size > 0:
            raise ConnectionError("a response has begun already")
        error: RequestError
        if isinstance(exc, LineTooLong) or (message or "").startswith("Too many headers"):
            error = HeaderTooLarge(
                f"more than {self.max_headers} headers (--max_headers), or a request line or header"
                f" of more than {self.max_line_size} bytes (--max_header_size)"
            )
        elif isinstance(exc, HttpProcessingError):
            said = (message or exc.message).partition("\n")[0].rstrip(":")
            error = RequestError(f"this is not valid HTTP: {said[:200]}", code="invalid_http")
        else:
            log.error("%s %s failed", request.method, request.path, exc_info=exc)
            error = RequestFault()
        response = self._answer(error)
        response.force_close()
        return response

    def log_exception(self, *args: object, **kw: object) -> None:
        """Handles errors caused by clients: answers them, unless the client has gone."""
        harmless = HttpProcessingError, web.RequestPayloadError, ConnectionError
        if not isinstance(kw.get("exc_info"), harmless):
            super().log_exception(*args, **kw)


class HttpListeners:
    """The listening sockets of one application and their connections.

    Args:
        app: its routes; a client that leaves cancels its handler.
        guard: called with every request and the application's own handler.
        answer: makes the response if parsing the request failed.
        lookout: checks the connections while serving.
        shutdown_s: seconds for open connections at the end.
        options: for aiohttp's connections: timeouts and limits of headers.
    """

    def __init__(
        self,
        app: web.Application,
        guard: Callable[[Handler, web.Request], Awaitable[web.StreamResponse]],
        answer: ErrorAnswer,
        *,
        lookout: ConnectionWatcher,
        shutdown_s: float,
        **options: Any,
    ) -> None:
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=shutdown_s)
        self._guard, self._answer, self._options = guard, answer, options
        self._listening: list[asyncio.Server] = []
        self._lookout = lookout

    async def open(self, sockets: Sequence[socket], tls: ssl.SSLContext | None) -> None:
        """Start serving: listen on the bound sockets."""
        await self._runner.setup()
        server, loop = self._runner.server, asyncio.get_running_loop()
        assert server is not None
        # wraps the whole application instead of being middleware: Expect headers are
        # answered before those
        server.request_handler = partial(self._guard, server.request_handler)

        def connect() -> Connection:
            return Connection(
                server,
                answer=self._answer,
                loop=loop,
                access_log=None,
                auto_decompress=False,  # see request_body.py
                lingering_time=LINGER_S,
                **self._options,
            )

        for sock in sockets:
            self._listening.append(
                await loop.create_server(connect, sock=sock, ssl=tls, backlog=BACKLOG)
            )
        self._lookout.start()

    async def close(self) -> None:
        """Stop listening, and let the connections end."""
        self._lookout.stop()
        for server in self._listening:
            server.close()
        await self._runner.cleanup()


class ConnectionWatcher:
    """Checks the connections periodically.

    A connection is not read while too much is waiting to be handled: pipelined requests, or the
    body of the next one. Then its end is not noticed either, since it comes after everything that
    the client sent before, and its request would keep running. So a connection that is still not
    read at the second check, while a request of it runs, is read to its end: the data is dropped,
    and the connection is closed after the answer.
    """

    def __init__(self) -> None:
        self._running: dict[web.RequestHandler, bool] = {}  # not read at the last look?
        self._timer: asyncio.TimerHandle | None = None
        self._complained_at = -COMPLAIN_S

    def start(self) -> None:
        """Start checking."""
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def stop(self) -> None:
        """Stop checking."""
        if self._timer is not None:
            self._timer.cancel()

    def add(self, request: web.Request) -> None:
        """A request whose body has been read will run for a while."""
        self._running[request.protocol] = False

    def remove(self, request: web.Request) -> None:
        """It has ended."""
        self._running.pop(request.protocol, None)

    def _look(self) -> None:
        for connection, was_stuck in self._running.items():
            transport = connection.transport
            stuck = transport is not None and not transport.is_reading()
            if stuck and was_stuck and transport is not None:
                log.debug("a client sent too much ahead: its connection ends with this request")
                connection.close()
                transport.resume_reading()
            self._running[connection] = stuck
        self._look_for_descriptors()
        self.start()

    def _look_for_descriptors(self) -> None:
        """libuv silently closes connections for which there is no descriptor; log it."""
        try:
            os.close(os.dup(0))
        except OSError as error:
            if monotonic() - self._complained_at >= COMPLAIN_S:
                self._complained_at = monotonic()
                log.error("new connections are closed at once: %s (ulimit -n)", error.strerror)
