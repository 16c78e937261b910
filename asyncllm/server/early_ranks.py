"""Starts other processes of a node; its ranks already before rank 0 imports torch.

Manages processes only. Does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections import deque
from collections.abc import Collection, Sequence
from typing import Self

from asyncllm.actors.heartbeats import Heartbeats
from asyncllm.environment import child_environment, cores_each, python_command
from asyncllm.server import signals

KILLED_S = 2.0
MOST = 15  # more are started when it is known that they are needed


def spawn(num_threads: int, fds: Sequence[int], *words: str) -> subprocess.Popen[bytes]:
    """A process that imports, and waits for its ``Boot`` on standard input.

    Args:
        fds: that it inherits.
        words: see :mod:`asyncllm.server.child`.
    """
    with signals.for_child():
        return subprocess.Popen(
            python_command("-m", "asyncllm.server.child", "serve", *words),
            stdin=subprocess.PIPE,
            pass_fds=fds,
            env=child_environment(OMP_NUM_THREADS=str(num_threads)),
        )


def kill(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """Kill them and wait a little for their ends."""
    for process in processes:
        process.kill()
    for process in processes:  # one that hangs in a driver is left to the kernel
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILLED_S)


class EarlyRanks:
    """Ranks that wait for their ``Boot``, as a context manager: leaving the block kills those that
    nobody has taken.

    Attributes:
        heartbeats_fd: memory that all processes of the node share (``Heartbeats``).

    Args:
        num: other ranks of this node.
        cuda: each opens its GPU meanwhile.
    """

    def __init__(self, num: int, *, cuda: bool) -> None:
        self.heartbeats_fd = Heartbeats.create()
        parent, threads = str(os.getpid()), cores_each(num + 1)
        self._waiting = deque(
            spawn(threads, [self.heartbeats_fd], parent, *[str(device)] * cuda)
            for device in range(1, min(num, MOST) + 1)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        kill(self._waiting)
        for process in self._waiting:
            assert process.stdin is not None
            process.stdin.close()

    def take(self) -> subprocess.Popen[bytes] | None:
        """The next one, in the order of devices; None: there are no more."""
        return self._waiting.popleft() if self._waiting else None
