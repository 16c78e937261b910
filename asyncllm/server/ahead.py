"""Has a helper process compile this node's kernels while rank 0 imports, reads and allocates.

Knows how the helper starts and ends; what it does is :mod:`asyncllm.server.compile_kernels`.
Imports no torch, so that the helper can start before rank 0 has imported it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from types import TracebackType
from typing import Self

from asyncllm.environment import child_environment
from asyncllm.server import signals

logger = logging.getLogger(__name__)


class Ahead:
    """The helper. A context manager: at the end of the block it is gone, whatever it was doing."""

    def __init__(self) -> None:
        with signals.for_child():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "asyncllm.server.compile_kernels", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=child_environment(OMP_NUM_THREADS="1"),
            )

    @property
    def pid(self) -> int:
        """Of the helper."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give("")
        self._process.kill()
        self._process.wait()

    def give(self, job: str) -> None:
        """Say what is to be compiled, once; "": nothing is, and the helper ends."""
        pipe = self._process.stdin
        assert pipe is not None
        if not pipe.closed:
            with contextlib.suppress(BrokenPipeError), pipe:  # its end is seen in ``wait``
                pipe.write(job.encode())

    def wait(self) -> None:
        """Until the helper has ended. Without it the warm-up compiles, one kernel at a time."""
        if code := self._process.wait():
            logger.warning(
                "kernels were not compiled ahead (exit code %d): the start takes longer", code
            )
