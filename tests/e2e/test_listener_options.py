"""Options of keys and sockets, observed on a server started with them, in all of its processes."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.process import Server

KEYS = "sk-file-one", "sk-file-two", "sk-variable"
OPTIONS = {
    "max_body_size": "2000",
    "body_timeout": "0.5",
    "max_header_size": "500",
    "max_headers": "20",
    "keep_alive_timeout": "0.5",
    "httpserver_workers": "2",
}


@pytest.fixture(scope="module")
def doors(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("doors")
    (folder / "keys").write_text(f"# two\n{KEYS[0]}\n{KEYS[1]}\n")
    (folder / "keys").chmod(0o600)
    given = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASYNCLLM_API_KEY", KEYS[2])
        server = Server(tiny_dir, folder / "log", "--api_key_file", str(folder / "keys"), *given)
    with server as running:
        yield running


def ask(server: Server, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    method = "GET" if body is None else "POST"
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request(method, path, body, {"x-api-key": KEYS[0], **headers})
        with connection.getresponse() as reply:
            return reply.status, reply.read().decode()


def test_keys_of_a_file_and_a_variable(doors: Server) -> None:
    for _ in range(6):  # whichever process takes it
        for key in KEYS:
            assert ask(doors, "/v1/models", **{"x-api-key": key})[0] == 200
        for key in ("", "# two", "sk-file"):
            assert ask(doors, "/v1/models", **{"x-api-key": key})[0] == 401


def test_keys_are_seen_nowhere(doors: Server) -> None:
    children = doors.children()
    assert len(children) >= 1
    for pid in (doors.process.pid, *children):
        assert b"sk-" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    for pid in children:
        assert b"sk-" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert "sk-" not in doors.text()
    info = json.loads(ask(doors, "/get_server_info")[1])
    assert "sk-" not in json.dumps(info)
    assert "api_key" not in info


def test_limits_of_bodies_and_headers(doors: Server) -> None:
    info = json.loads(ask(doors, "/get_server_info")[1])
    for name, value in OPTIONS.items():
        assert info[name] == float(value)
    status, told = ask(doors, "/tokens", b" " * 2001)
    assert status == 413
    assert "larger than 2000 bytes (--max_body_size)" in told
    assert ask(doors, "/tokens", b'{"text": "x"}' + b" " * 1900)[0] == 200
    status, told = ask(doors, "/health", X="x" * 501)
    assert status == 431
    assert "500 bytes (--max_header_size)" in told
    status, told = ask(doors, "/health", **{f"X-{i}": "x" for i in range(20)})
    assert status == 431
    assert "20 headers (--max_headers)" in told


def test_times_of_bodies_and_connections(doors: Server) -> None:
    head = (
        f"POST /tokens HTTP/1.1\r\nHost: x\r\nx-api-key: {KEYS[0]}\r\nContent-Length: 9\r\n\r\n{{"
    )
    for sent, want in ((b"", b""), (head.encode(), b"HTTP/1.1 408 ")):
        with socket.create_connection(("127.0.0.1", doors.port), 20) as sock:
            begun = time.monotonic()
            sock.sendall(sent)
            assert sock.recv(13) == want
            assert 0.4 < time.monotonic() - begun < 5
