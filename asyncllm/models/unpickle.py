"""The process that reads pickled weights, and how to ask it for slices of their tensors.

A pickle is a program. torch.load(weights_only=True) only runs code that makes tensors; to protect
the server from a flaw in it, a separate process runs it: without secrets, without permission to
write files, and with bounded memory; it dies with its parent. Files are memory-mapped if torch
supports it.

    parent -> process: a line of JSON: ["open", path], ["read", path, key, [[start, stop], ..]] or
        ["close", path]
    process -> parent: a line of JSON: [true, what it found] or [false, why it cannot]; the values
        of a read follow its line

Run as ``python -m asyncllm.models.unpickle SOCKET PARENT``.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from asyncllm.environment import bare_environment, python_command
from asyncllm.errors import StartupError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MEMORY = 256 << 20  # allowed besides its libraries and twice the file's size
MAX_LINE = 64 << 20  # bytes of an answer
WRAPPED = ("module", "model", "state_dict")  # keys under which the tensors may be nested
PR_SET_PDEATHSIG = 1

FoundTensors = dict[str, tuple[str, tuple[int, ...]]]  # by name: kind and shape


class Pickles:
    """Pickled weight files, read by a process that is started when the first is opened.

    Methods may be called from any thread; one at a time is served.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._lines: BufferedReader | None = None

    def open(self, path: Path) -> FoundTensors:
        """The tensors of a file.

        Raises:
            StartupError: it holds more than tensors, or cannot be read.
        """
        with self._lock:
            found = self._ask(path, ["open", str(path)])
        return {name: (kind, tuple(shape)) for name, kind, shape in found}

    def read(self, path: Path, key: str, index: Sequence[slice], kind: str) -> Tensor:
        """A slice of a tensor of a file that is open. Raises StartupError."""
        cuts = [[cut.start, cut.stop] for cut in index]
        out = torch.empty([stop - start for start, stop in cuts], dtype=DTYPES[kind])
        with self._lock:
            self._ask(path, ["read", str(path), key, cuts])
            assert self._lines is not None
            place = out.reshape(-1).view(torch.uint8).numpy().data
            if self._lines.readinto(place) != out.nbytes:
                raise self._died(path)
        return out

    def forget(self, path: Path) -> None:
        """Close a file."""
        with self._lock:
            self._ask(path, ["close", str(path)])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, path: Path, what: list[object]) -> list[tuple[str, str, list[int]]]:
        if self._process is None:
            self._start()
        assert self._sock is not None
        assert self._lines is not None
        try:
            self._sock.sendall(json.dumps(what).encode() + b"\n")
            line = self._lines.readline(MAX_LINE)
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            raise self._died(path)
        good, found = json.loads(line)
        if not good:
            raise StartupError(f"{path} {found}")
        told: list[tuple[str, str, list[int]]] = found
        return told

    def _start(self) -> None:
        self._sock, theirs = socket.socketpair()
        self._lines = self._sock.makefile("rb")
        fd = str(theirs.fileno())
        with theirs:
            # a separate session: a terminal's Ctrl-C is only for rank 0
            self._process = subprocess.Popen(
                python_command("-W", "ignore", "-m", __name__, fd, str(os.getpid())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env=bare_environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
                pass_fds=[theirs.fileno()],
            )

    def _died(self, path: Path) -> StartupError:
        code = self._end()
        return StartupError(f"{path} cannot be read: the process that tried ended with {code}")

    def _end(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        assert self._sock is not None
        assert self._lines is not None
        ended = process.poll()
        process.kill()
        self._lines.close()
        self._sock.close()
        code = process.wait()
        return code if ended is None else ended


# -- in the process ------------------------------------------------------------------------------


class _BadPickle(Exception):
    """A fault of a file, as the end of a sentence that begins with its name."""


def tensors_of(path: str) -> dict[str, Tensor]:
    """By name, the tensors that a file holds. Raises _Refused."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        _bound(2 * size + MEMORY)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError:
        raise _BadPickle(f"wants more memory than twice its size and {MEMORY >> 20} MiB") from None
    except Exception as error:  # an untrusted file may make torch raise anything
        raise _BadPickle(_why(error)) from None
    return _named(found)


def _why(error: Exception) -> str:
    """One line."""
    text = str(error)
    if "alloc" in text.lower() and "memory" in text.lower():
        return f"wants more memory than twice its size and {MEMORY >> 20} MiB"
    if "weights_only" in text.lower() or "weights only" in text.lower():
        found = re.search(r"(?:GLOBAL|class)\W+(\w+\.[\w.]+)", text)
        return f"is refused: it holds more than tensors{f' ({found[1][:100]})' if found else ''}"
    first = text.strip().partition("\n")[0][:200]
    return f"cannot be read: {type(error).__name__}{first and f': {first}'}"


def _named(found: object) -> dict[str, Tensor]:
    for _ in range(2):
        if not isinstance(found, Mapping):
            break
        named = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
        if named:
            return _checked(named)
        found = next((found[name] for name in WRAPPED if name in found), None)
    raise _BadPickle("holds no tensors by name")


def _checked(named: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in named.items():
        if not _is_plain(tensor):
            raise _BadPickle(f"is refused: {name[:200]!r} is no plain tensor")
        if tensor.dtype not in DTYPES.values():
            raise _BadPickle(f"is refused: {name[:200]!r} has type {tensor.dtype}")
    return named


def _is_plain(tensor: Tensor) -> bool:
    """Whether all its elements are directly in the file's memory."""
    strange = tensor.is_nested or tensor.is_quantized or tensor.is_neg()
    if strange or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _bound(more: int) -> None:
    """Let this process take ``more`` bytes than it has now."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = now + more if hard == resource.RLIM_INFINITY else min(now + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))


class _PickleServer:
    """What the parent asks for."""

    def __init__(self) -> None:
        self._open: dict[str, dict[str, Tensor]] = {}
        self._kinds = {dtype: kind for kind, dtype in DTYPES.items()}

    def open(self, path: str) -> list[object]:
        self._open[path] = found = tensors_of(path)
        return [[name, self._kinds[t.dtype], list(t.shape)] for name, t in found.items()]

    def read(self, path: str, key: str, cuts: list[list[int]]) -> Tensor:
        part = self._open[path][key][tuple(slice(*cut) for cut in cuts)]
        return part.detach().contiguous().reshape(-1).view(torch.uint8)

    def close(self, path: str) -> list[object]:
        self._open.pop(path, None)
        return []


def main() -> None:
    """Serve the parent until it closes the connection."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the whole service; we end with our parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # nothing can be written to a file
    if os.getppid() != int(sys.argv[2]):
        return
    sock, served = socket.socket(fileno=int(sys.argv[1])), _PickleServer()
    with sock, sock.makefile("rb") as lines:
        for line in lines:
            what, *args = json.loads(line)
            try:
                if what == "read":
                    values = served.read(*args)
                    sock.sendall(b"[true, []]\n")
                    sock.sendall(values.numpy().data)
                    continue
                reply = [True, served.open(*args) if what == "open" else served.close(*args)]
            except _BadPickle as why:
                reply = [False, str(why)]
            except Exception as error:  # torch knows more kinds of tensors than we
                reply = [False, _why(error)]
            sock.sendall(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
