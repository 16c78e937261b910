"""Starts a helper process that compiles this node's kernels while rank 0 imports and loads.

Manages the helper only; its work is in :mod:`asyncllm.server.compile_kernels`. Does not import
torch, so that the helper can start before rank 0 imports it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
from pathlib import Path
from typing import Self

from asyncllm.environment import child_environment, python_command, triton_cache
from asyncllm.server import signals

STAMPS = "asyncllm"  # folder in Triton's cache

logger = logging.getLogger(__name__)


class CompileHelper:
    """The helper, as a context manager: leaving the block kills it if it is still running.

    A stamp in Triton's cache records each job that a helper has completed, so that later starts do
    not wait for it again. It is a hint: if parts of the cache were removed, the warm-up compiles
    them. If the cache has a stamp of any job, the helper only starts once it is known to be needed,
    since its imports slow down those of rank 0.
    """

    def __init__(self) -> None:
        self._stamps = triton_cache() / STAMPS
        self._stamp: Path | None = None  # of the current job
        self._process: subprocess.Popen[bytes] | None = None
        if not _has_any(self._stamps):
            self._start()

    @property
    def pid(self) -> int | None:
        """The helper's process id; None: not started."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if (process := self._process) is not None:
            self._say(process, "")
            process.kill()
            process.wait()

    def give(self, job: str, name: str) -> None:
        """Send the job, once.

        Args:
            job: "": there is nothing to compile.
            name: of the job: different whenever its kernels differ. Used as a file name.
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
        """Wait until the helper has ended. Without it the warm-up compiles kernels one by one."""
        if self._process is None:
            return
        if code := self._process.wait():
            logger.warning(
                "kernels were not compiled ahead (exit code %d): the start takes longer", code
            )
        elif self._stamp is not None:
            with contextlib.suppress(OSError):  # the cache is not writable
                self._stamps.mkdir(parents=True, exist_ok=True)
                self._stamp.touch()

    def _start(self) -> None:
        with signals.for_child():
            self._process = subprocess.Popen(
                python_command("-m", "asyncllm.server.child", "compile", str(os.getpid())),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env=child_environment(OMP_NUM_THREADS="1"),
            )

    def _say(self, process: subprocess.Popen[bytes], job: str) -> None:
        pipe = process.stdin
        assert pipe is not None
        if not pipe.closed:
            with contextlib.suppress(BrokenPipeError), pipe:  # ``wait`` notices that it has ended
                pipe.write(job.encode())


def _has_any(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False
