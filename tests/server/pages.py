"""Status pages that tests read."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asyncllm.server.status import StatusPages


@asynccontextmanager
async def opened(pages: StatusPages) -> AsyncIterator[int]:
    """The port on which they are served."""
    sock = socket.create_server(("127.0.0.1", 0))
    await pages.open(sock)
    try:
        yield int(sock.getsockname()[1])
    finally:
        await pages.close()
