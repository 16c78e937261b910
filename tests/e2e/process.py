"""A real server in processes of its own, on the embedded model."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")
START_S = 120.0
END_S = 30.0  # for what another process does at once; only what fails takes so long
LISTENS = "0A"  # TCP_LISTEN in /proc/net/tcp


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server:
    """``python -m asyncllm``; use it as a context manager, which waits until it is ready."""

    def __init__(self, model_dir: Path, log: Path, *args: str) -> None:
        self.host, self.port = "127.0.0.1", free_port()
        self.url = f"http://{self.host}:{self.port}"
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "asyncllm", "--port", str(self.port),
                 "--model_dir", str(model_dir), *args],
                stdout=subprocess.PIPE, stderr=out,
            )  # fmt: skip

    def __enter__(self) -> Server:
        out = self.process.stdout
        assert out is not None
        said = select.select([out], [], [], START_S)[0]
        self.ready = out.readline().decode() if said else ""  # or nothing at its end
        assert "ready" in self.ready, self.text()
        return self

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Instead of ``with server``, where it is not to become ready."""
        try:
            yield
        finally:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def text(self) -> str:
        """What it logged."""
        return self.log.read_text(errors="replace")

    def children(self, module: str = "asyncllm.server.child serve") -> list[int]:
        """Pids of its child processes that run ``module``, in order of start."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = sorted(int(pid) for pid in path.read_text().split())
        return [pid for pid in pids if module in command_line(pid)]

    def first_children(self, count: int) -> list[int]:
        """The same as soon as there are ``count``, while it loads."""
        assert wait_until(lambda: len(self.children()) == count, START_S), self.text()
        return self.children()

    def listeners(self) -> set[tuple[str, int]]:
        """Addresses and ports on which its processes listen, from the kernel's tables."""
        held = set()
        for pid in (self.process.pid, *self.children()):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    held.add(str(fd.readlink()))
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.process.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENS and f"socket:[{fields[9]}]" in held:
                    host, _, port = fields[1].partition(":")
                    words = struct.unpack(f">{len(host) // 8}I", bytes.fromhex(host))
                    packed = struct.pack(f"={len(words)}I", *words)
                    found.add((str(ipaddress.ip_address(packed)), int(port, 16)))
        return found

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM and wait; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as reply:
            return str(reply.read().decode())

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return dict(json.loads(reply.read()))

    def complete(self, ids: list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
        """Greedy completion of token ids; ``logprobs`` shows which tokens came."""
        body = {"prompt": ids, "max_tokens": max_tokens, "temperature": 0, **more}
        return self.post("/v1/completions", body)

    def complete_text(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """Greedy completion of a text."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return self.post("/v1/completions", body)

    def tokens(self, ids: list[int], max_tokens: int, **more: Any) -> list[int]:
        """Ids of a greedy answer, through the native API's details."""
        parameters = {"max_new_tokens": max_tokens, "return_details": True, **more}
        reply = self.post("/generate", {"inputs": ids, "parameters": parameters})
        return [int(token["id"]) for token in reply["tokens"]]

    def metric(self, name: str) -> float:
        for line in self.get("/metrics").splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        raise AssertionError(f"no metric {name}")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(work)


async def stream_text(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """Chunks of a streamed completion, as they come."""
    async with session.post(url, json={**body, "stream": True}) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def command_line(pid: int) -> str:
    """Of a process, "" where there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Any, timeout_s: float) -> bool:
    """Poll for something that another process does."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)  # it shares our cores
    return bool(condition())
