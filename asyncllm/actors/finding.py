"""Where the channel of another server is: its HTTP port tells."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from contextlib import suppress

import aiohttp

from asyncllm.actors.transport import netloc

AGAIN_S = (0.2, 2.0)  # first and longest wait before it is asked again
ASK_S = 3.0  # for its answer
MOST_ANSWER = 1 << 10  # bytes of it

log = logging.getLogger(__name__)


async def find_channel(host: str, port: int, what: str) -> int:
    """The port of a server's channel, as soon as the server answers on its HTTP port.

    What it says is not trusted: whoever is there must know the secret of the cluster.

    Args:
        what: it is, and which options say where, for the log.
    """
    there = netloc(host, port)
    wait_s, said = AGAIN_S[0], False
    while True:
        for scheme in ("http", "https"):
            with suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
                return await _ask(f"{scheme}://{there}/cluster")
        if not said:
            log.info("nobody answers at %s yet: %s", there, what)
            said = True
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, AGAIN_S[1])


async def _ask(url: str) -> int:
    """The port that ``/cluster`` tells. Raises ClientError, TimeoutError, OSError, ValueError or
    KeyError."""
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    timeout = aiohttp.ClientTimeout(total=ASK_S)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(url, ssl=unchecked, allow_redirects=False) as reply,
    ):
        told = json.loads(await reply.content.read(MOST_ANSWER))
        port = told["port"] if isinstance(told, dict) else 0
        if type(port) is not int or not 0 < port < 1 << 16:
            raise ValueError(f"{url} tells no port")
        return port
