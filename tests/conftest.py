"""Fixtures that more than one test folder uses."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def ipc(tmp_path: Path) -> Callable[[int], list[str]]:
    """Makes ZMQ addresses of ``n`` processes in a folder of this test."""
    return lambda n: [f"ipc://{tmp_path}/{i}" for i in range(n)]


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
