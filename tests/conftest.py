"""Fixtures that more than one test folder uses."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from asyncllm.demo import ensure_demo_model
from asyncllm.environment import cache_dir


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need GPUs are skipped where there are too few."""
    num_gpus = torch.cuda.device_count()
    for item in items:
        for mark, needed in (("gpu", 1), ("multigpu", 2)):
            if item.get_closest_marker(mark) and num_gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))


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


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """Folder of the embedded model, fetched and converted once per machine (about 12 s).

    It is kept in ASYNCLLM_CACHE, else in the checkout's .venv, else in the user's cache.
    """
    venv = Path(__file__).parents[1] / ".venv"
    if "ASYNCLLM_CACHE" not in os.environ and venv.is_dir():
        return ensure_demo_model(venv / "asyncllm-cache")
    return ensure_demo_model(cache_dir())
