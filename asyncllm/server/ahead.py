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
from pathlib import Path
from types import TracebackType
from typing import Self

from asyncllm.environment import child_environment, triton_cache
from asyncllm.server import signals

STAMPS = "asyncllm"  # folder in Triton's cache

logger = logging.getLogger(__name__)


class Ahead:
    """The helper. A context manager: at the end of the block it is gone, whatever it was doing.

    A stamp in Triton's cache says for which job a helper has ended well, so that no start waits for
    that again. It is a hint: where the cache has been cleaned in part, the warm-up compiles what is
    gone. With a stamp of any job in the cache the helper starts only once it is known to be needed,
    since its imports slow down those of rank 0.
    """

    def __init__(self) -> None:
        self._stamps = triton_cache() / STAMPS
        self._stamp: Path | None = None  # of the job that has been given
        self._process: subprocess.Popen[bytes] | None = None
        if not _has_any(self._stamps):
            self._start()

    @property
    def pid(self) -> int | None:
        """Of the helper; None: it has not been started."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (process := self._process) is not None:
            self._say(process, "")
            process.kill()
            process.wait()

    def give(self, job: str, name: str) -> None:
        """Say what is to be compiled, once.

        Args:
            job: "": nothing is.
            name: of the job: another one for all that makes other kernels. May be a file's name.
        """
        stamp = self._stamps / name
        if job and not stamp.exists():
            self._stamp = stamp
            if self._process is None:
                self._start()
        else:
            job = ""
        if self._process is not None:
            self._say(self._process, job)

    def wait(self) -> None:
        """Until the helper has ended. Without it the warm-up compiles, one kernel at a time."""
        if self._process is None:
            return
        if code := self._process.wait():
            logger.warning(
                "kernels were not compiled ahead (exit code %d): the start takes longer", code
            )
        elif self._stamp is not None:
            with contextlib.suppress(OSError):  # a cache that cannot be written to
                self._stamps.mkdir(parents=True, exist_ok=True)
                self._stamp.touch()

    def _start(self) -> None:
        with signals.for_child():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "asyncllm.server.compile_kernels", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=child_environment(OMP_NUM_THREADS="1"),
            )

    def _say(self, process: subprocess.Popen[bytes], job: str) -> None:
        pipe = process.stdin
        assert pipe is not None
        if not pipe.closed:
            with contextlib.suppress(BrokenPipeError), pipe:  # its end is seen in ``wait``
                pipe.write(job.encode())


def _has_any(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False
