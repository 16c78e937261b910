"""Finds the channel of another server by asking its HTTP port."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import cache

import aiohttp

from asyncllm.actors.channel import Channel
from asyncllm.actors.transport import netloc
from asyncllm.config.roles import MOST_PORT

AGAIN_S = (0.2, 2.0)  # first and longest wait before asking again
ASK_S = 3.0  # for its answer
MOST_ANSWER = 1 << 10  # bytes of the answer
JOIN_S = 5.0  # for a connection; then the HTTP port is asked again

log = logging.getLogger(__name__)


async def find_channel(host: str, port: int, what: str) -> int:
    """The port of a server's channel, as soon as the server answers on its HTTP port.

    The answer is not trusted: whoever listens there must know the cluster's secret.

    Args:
        what: name of the server and the options for its address, for the log.
    """
    there = netloc(host, port)
    wait_s, said = AGAIN_S[0], False
    while True:
        for scheme in ("http", "https"):
            with suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
                return await _ask(f"{scheme}://{there}/cluster")
        if not said:
            log.info("no answer from %s yet: %s", there, what)
            said = True
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, AGAIN_S[1])


class PeerConnector:
    """Keeps a connection to another server for as long as this process lives.

    Its owner forwards the channel's events, and calls :meth:`look` at the start. Whenever the
    server does not connect, or has left, its HTTP port is asked again: it may have restarted with
    its channel at another port.

    Args:
        channel: of this process.
        server: host and HTTP port of the other one.
        what: see :func:`find_channel`.
        spawn: starts a coroutine beside the caller.

    Attributes:
        where: address of its channel; "": not known.
        peer: its peer number while it is connected; else 0.
    """

    def __init__(
        self,
        channel: Channel,
        server: tuple[str, int],
        what: str,
        spawn: Callable[[Coroutine[None, None, None]], object],
    ) -> None:
        self._channel, self._server, self._what, self._spawn = channel, server, what, spawn
        self._came = asyncio.Event()
        self._looking = False
        self.where, self.peer = "", 0

    def look(self) -> None:
        """Find it, however long it takes."""
        if not self._looking:
            self._looking = True
            self._spawn(self._find())

    async def _find(self) -> None:
        while not self.peer:
            port = await find_channel(*self._server, self._what)
            self.where = self._channel.dial(self._server[0], port)
            with suppress(TimeoutError):
                async with asyncio.timeout(JOIN_S):
                    await self._came.wait()
            if not self.peer:
                self._forget()
        self._looking = False

    def _forget(self) -> None:
        self._channel.forget(self.where)
        self.where = ""

    def joined(self, peer: int, where: str) -> bool:
        """A peer has connected; returns whether it is this one."""
        if where != self.where or not where:
            return False
        self.peer = peer
        self._came.set()
        return True

    def left(self, peer: int) -> bool:
        """A peer has left; returns whether it is this one, and if so looks for it again."""
        if peer != self.peer or not peer:
            return False
        self.peer = 0
        self._came.clear()
        self._forget()
        self.look()
        return True


@cache
def _unchecked() -> ssl.SSLContext:
    """TLS without checks, and so without the machine's certificates: reading these would hold the
    loop for 25 ms at every attempt."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def _ask(url: str) -> int:
    """The port that ``/cluster`` returns. Raises ClientError, TimeoutError, OSError, ValueError or
    KeyError."""
    timeout = aiohttp.ClientTimeout(total=ASK_S)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(url, ssl=_unchecked(), allow_redirects=False) as reply,
    ):
        told = json.loads(await reply.content.read(MOST_ANSWER))
        port = told["port"] if isinstance(told, dict) else 0
        if type(port) is not int or not 0 < port <= MOST_PORT:
            raise ValueError(f"{url} tells no port")
        return port
