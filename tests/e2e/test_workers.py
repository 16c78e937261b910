"""HTTP workers and those whose streams they carry, when a process dies."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.process import END_S, Server, alive, wait_until

SMALL = ("--device", "cpu", "--max_total_token_num", "4096", "--httpserver_workers", "2")
TP2 = (*SMALL, "--tp", "2", "--data_type", "fp32")


class Stream:
    """A streamed answer that would take long, of a process that can be chosen."""

    def __init__(self, server: Server, *, stopped: int, path: str = "/v1/completions") -> None:
        """``stopped``: sleeps while the connection is made, so that another process takes it."""
        body: dict[str, Any] = {"max_tokens": 2000, "ignore_eos": True, "stream": True}
        body |= {"messages": [{"role": "user", "content": "Hi"}], "model": "default"}
        if path == "/v1/completions":
            body["prompt"] = "Hi"
            del body["messages"]
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        try:
            # right after the start the other one may not listen yet
            assert wait_until(lambda: self._connected(server, stopped), END_S)
            self._connection.request("POST", path, json.dumps(body))
            self._reply = self._connection.getresponse()
            assert self._reply.status == 200, self._reply.read()
            assert self._reply.readline()
        except BaseException:
            self.close()
            raise

    def _connected(self, server: Server, stopped: int) -> bool:
        self._connection.close()
        os.kill(stopped, signal.SIGSTOP)
        try:
            self._connection.connect()
            port = self._connection.sock.getsockname()[1]
            return wait_until(lambda: _holder(server, port) not in (0, stopped), 1)
        finally:
            os.kill(stopped, signal.SIGCONT)

    def lines(self) -> list[bytes]:
        """Some more of it."""
        return [self._reply.readline() for _ in range(6)]

    def rest(self) -> bytes:
        """All that comes until the connection ends."""
        try:
            return self._reply.read()
        except http.client.IncompleteRead as cut:
            return cut.partial + b"<cut>"
        except ConnectionError:
            return b"<cut>"

    def close(self) -> None:
        self._connection.close()


def _holder(server: Server, port: int) -> int:
    """Pid of the process that has accepted the connection from ``port``; 0: none has."""
    table = Path(f"/proc/{server.process.pid}/net/tcp").read_text()
    rows = [row.split() for row in table.splitlines()[1:]]
    ends = f":{server.port:04X}", f":{port:04X}"
    inodes = [r[9] for r in rows if (r[1][-5:], r[2][-5:]) == ends]
    for pid in (server.process.pid, *server.children()):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            if str(fd.readlink()) in [f"socket:[{inode}]" for inode in inodes]:
                return pid
    return 0


@contextmanager
def streams(*opened: Stream) -> Iterator[None]:
    try:
        yield
    finally:
        for stream in opened:
            stream.close()


def test_a_dead_or_hung_worker_is_replaced_a_few_times(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *SMALL, "--dead_after", "3") as server:
        (worker,) = server.children()
        ours, theirs = (
            Stream(server, stopped=worker),
            Stream(server, stopped=server.process.pid),
        )
        with streams(ours, theirs):
            assert server.metric("asyncllm_requests_running") == 2
            os.kill(worker, signal.SIGKILL)
            assert theirs.rest().endswith(b"<cut>")
            assert wait_until(lambda: server.metric("asyncllm_requests_running") == 1, 5)
            assert ours.lines()  # goes on
        assert wait_until(lambda: server.metric("asyncllm_kv_slots_used") == 0, 5)
        assert wait_until(lambda: "HTTP worker 2 serves" in server.text(), END_S), server.text()
        with streams(again := Stream(server, stopped=server.process.pid)):
            assert again.lines()
        (second,) = server.children()
        os.kill(second, signal.SIGSTOP)
        words = "HTTP worker 2 has been silent for "
        assert wait_until(lambda: words in server.text() and not alive(second), END_S)
        for i in (3, 4):
            words = f"HTTP worker {i} replaces it"
            assert wait_until(lambda: words in server.text(), END_S), server.text()  # noqa: B023
            (child,) = server.children()
            os.kill(child, signal.SIGKILL)
        assert server.process.wait(END_S) == 1
    assert "the 4th HTTP worker within a minute: stopping the server" in server.text()
    assert "Traceback" not in server.text()


def test_a_worker_dies_while_the_server_drains(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *SMALL) as server:
        (worker,) = server.children()
        with streams(Stream(server, stopped=server.process.pid)):
            server.process.send_signal(signal.SIGTERM)
            assert wait_until(lambda: "draining" in server.text(), END_S)
            os.kill(worker, signal.SIGKILL)
            assert server.process.wait(END_S) == 0


def test_streams_end_with_an_error_when_a_rank_dies(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *TP2) as server:
        rank, worker = server.children()
        ours = Stream(server, stopped=worker, path="/v1/messages")
        theirs = Stream(server, stopped=server.process.pid)
        whole = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {"prompt": "Hi", "max_tokens": 2000, "ignore_eos": True}
        with streams(ours, theirs):
            whole.request("POST", "/v1/completions", json.dumps(body))
            assert wait_until(lambda: server.metric("asyncllm_requests_running") == 3, END_S)
            os.kill(rank, signal.SIGKILL)
            assert b"event: error\ndata: " in ours.rest()
            assert b'"code":"server_failed"' in theirs.rest()
            reply = whole.getresponse()
            assert reply.status == 503
            assert json.loads(reply.read())["error"]["code"] == "server_failed"
            whole.close()
        assert server.process.wait(END_S) == 1
        assert wait_until(lambda: not alive(worker), END_S)
    assert f"rank 1 (pid {rank}) ended with exit code -9: stopping the server" in server.text()


def test_streams_of_a_worker_end_with_an_error_when_rank_0_is_killed(
    demo_dir: Path, tmp_path: Path
) -> None:
    with Server(demo_dir, tmp_path / "log", *SMALL) as server:
        (worker,) = server.children()
        with streams(theirs := Stream(server, stopped=server.process.pid)):
            server.process.kill()
            assert b'"code":"server_failed"' in theirs.rest()
        assert wait_until(lambda: not alive(worker), END_S)
    assert "HTTP worker 1 ends: rank 0 has gone" in server.text()
