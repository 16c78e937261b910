"""What strangers may send to an open port: no traceback, no stall, one error object."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import gzip
import io
import json
import logging
import os
import re
import resource
import socket
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import product
from time import process_time
from typing import Any

import aiohttp
import brotli
import pytest

from asyncllm.actors import connection
from asyncllm.actors.exchange import resolve
from asyncllm.actors.request_body import zstd
from tests.e2e.fake_server import Server
from tests.e2e.test_api import CHAT, COMPLETIONS, live, served
from tests.speed import within

BODY = json.dumps({"prompt": "x"}).encode()


@pytest.fixture(autouse=True)
def no_noise(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a client sends is worth a line of the log, let alone a traceback."""
    yield
    assert [r.getMessage() for r in caplog.records if r.levelno > logging.INFO] == []


async def sent(server: Server, *parts: bytes) -> bytes:
    """The answer to bytes, up to the connection's end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.02)
    try:
        return await reader.read()
    finally:
        writer.close()


def error_of(answer: bytes, status: int) -> dict[str, Any]:
    """The error object of a raw answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1.[01] %d " % status, head), answer
    assert b"\r\nx-request-id: " in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


@asynccontextmanager
async def longest_gap(most_s: float) -> AsyncIterator[None]:
    """The loop gets its turns meanwhile: between two of them all threads together compute for less
    than ``most_s``. Seconds of a clock would be those of other processes too, and a look for garbage
    among all that earlier tests have left takes longer than anything here."""
    gaps = [0.0]

    async def tick() -> None:
        last = process_time()
        while True:
            await asyncio.sleep(0.002)
            gaps.append(process_time() - last)
            last = process_time()

    gc.collect()
    gc.freeze()
    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        gc.unfreeze()
        ticking.cancel()
    assert within(max(gaps), most_s), sorted(gaps)[-5:]


# -- encodings -----------------------------------------------------------------------------------


BROTLI_BOMB = brotli.compress(bytes(1 << 24), quality=5)


def wide_zstd(data: bytes) -> bytes:
    """A frame that wants 16 MiB of whoever reads it."""
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 24})
    return packer.compress(data) + packer.flush()


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("GZIP ", gzip.compress),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("zstd", zstd.compress),
        ("br", brotli.compress),
        ("identity", bytes),
    ],
)
def test_encoded_bodies(encoding: str, pack: Any, chunked: bool) -> None:
    @live()
    async def test(server: Server) -> None:
        async def parts() -> AsyncIterator[bytes]:
            for byte in pack(BODY):
                yield bytes([byte])

        data: Any = parts() if chunked else pack(BODY)
        headers = {"Content-Encoding": encoding}
        url = server.url + COMPLETIONS
        async with server.http.post(url, data=data, headers=headers) as response:
            assert response.status == 200

    test()


@pytest.mark.parametrize(
    ("encoding", "data", "status", "said"),
    [
        ("gzip", b"no gzip", 400, "it is not gzip, as Content-Encoding says"),
        ("gzip", gzip.compress(BODY, mtime=0)[:-1], 400, "its gzip data has no end"),
        ("gzip", gzip.compress(BODY, mtime=0) + b"more", 400, "something follows the end"),
        ("deflate", b"\xff\xff\xff", 400, "it is not deflate"),
        ("zstd", b"no zstd", 400, "it is not zstd, as Content-Encoding says"),
        ("zstd", zstd.compress(BODY)[:-1], 400, "its zstd data has no end"),
        ("zstd", zstd.compress(BODY) + b"more", 400, "something follows the end"),
        ("zstd", wide_zstd(BODY), 400, "it is not zstd, as Content-Encoding says"),
        ("br", BODY, 400, "it is not br, as Content-Encoding says"),
        ("br", brotli.compress(BODY)[:-1], 400, "its br data has no end"),
        ("br", brotli.compress(BODY) + b"more", 400, "it is not br"),
        ("lzma", BODY, 415, "'lzma' is not one of gzip, x-gzip, deflate, zstd, br"),
        ("gzip, gzip", BODY, 415, "'gzip, gzip' is not one of"),
    ],
)
def test_wrong_encodings(encoding: str, data: bytes, status: int, said: str) -> None:
    @live()
    async def test(server: Server) -> None:
        for path in (COMPLETIONS, "/tokens", "/abort_request"):
            url, headers = server.url + path, {"Content-Encoding": encoding}
            async with server.http.post(url, data=data, headers=headers) as response:
                assert response.status == status
                assert said in (await response.json())["error"]["message"]
        assert server.model.asked == []

    test()


@live()
async def test_a_bomb_is_not_unpacked(server: Server) -> None:
    packer = zlib.compressobj(wbits=31)
    gzipped = b"".join(packer.compress(bytes(1 << 24)) for _ in range(16)) + packer.flush()
    bombs = {"gzip": gzipped, "zstd": zstd.compress(bytes(1 << 28)), "br": BROTLI_BOMB}
    assert max(map(len, bombs.values())) < 2 << 20
    async with longest_gap(0.2):
        for chunked, (encoding, bomb) in product((None, True), bombs.items()):
            headers = {"Content-Encoding": encoding}
            async with server.http.post(
                server.url + CHAT, data=bomb, headers=headers, chunked=chunked
            ) as response:
                assert response.status == 413
                message = (await response.json())["error"]["message"]
                assert message == "the body is larger than 4194304 bytes (--max_body_size)"


@live()
async def test_large_bodies_leave_the_loop_its_turns(server: Server) -> None:
    arrays = b'{"prompt":"x","y":[' + b"[]," * 1_300_000 + b"[]]}"
    ids = b'{"prompt":[' + b"1," * 2_000_000 + b"1]}"
    chat = json.dumps({"messages": [{"role": "user", "content": "x" * 950}] * 4096}).encode()
    async with longest_gap(0.2):
        for data, status in ((arrays, 400), (ids, 400), (chat, 200)):
            async with server.http.post(
                server.url + (CHAT if data is chat else COMPLETIONS), data=io.BytesIO(data)
            ) as response:
                assert response.status == status, await response.text()


# -- HTTP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"hello\r\n\r\n", 400, "invalid_http"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_http"),  # TLS
        (b"GET / HTTP/9.9\r\n\r\n", 400, "invalid_http"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "invalid_http"),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: \0\r\n\r\n", 400, "invalid_http"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400, "invalid_http"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "invalid_http"),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
            "invalid_http",
        ),
        (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 9000), 431, "header_too_large"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n" % (b"x" * 9000), 431, "header_too_large"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n%s\r\n" % (b"X: 1\r\n" * 200), 431, "header_too_large"),
        (
            b"POST /tokens HTTP/1.1\r\nHost: x\r\nExpect: foo\r\nContent-Length: 9\r\n\r\n",
            417,
            "expectation_failed",
        ),
        (b"GET /nope HTTP/1.1\r\nHost: x\r\nExpect: foo\r\n\r\n", 417, "expectation_failed"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nExpect: \xff\r\n\r\n", 417, "expectation_failed"),
    ],
)
def test_what_is_no_http_gets_the_error_object(data: bytes, status: int, code: str) -> None:
    @live()
    async def test(server: Server) -> None:
        error = error_of(await sent(server, data), status)
        assert error["code"] == code
        assert len(error["message"]) < 400
        if status == 431:
            assert "128 headers (--max_headers)" in error["message"]
            assert "8192 bytes (--max_header_size)" in error["message"]
        assert await server.get("/health") == (200, {"message": "Ok"})

    test()


@live(body_s=0.2)
async def test_a_body_in_broken_chunks_never_comes(server: Server) -> None:
    for path, status in (("/tokens", 408), ("/liveness", 200), (COMPLETIONS, 408)):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n"
        writer.write(head.encode())
        await asyncio.sleep(0.02)
        writer.write(b"zz\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 %d " % status)
        writer.close()


@live()
async def test_expect_100_continue(server: Server) -> None:
    url = server.url + COMPLETIONS
    async with server.http.post(url, data=BODY, expect100=True) as response:
        assert response.status == 200


@live(idle_s=0.3)
async def test_idle_connections_are_closed(server: Server) -> None:
    assert await sent(server) == b""
    answer = await sent(server, b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.endswith(b'{"status":"ok"}')
    assert await sent(server, b"GET /liveness HT") == b""


@live(max_header=100, max_headers=16)
async def test_limits_of_headers(server: Server) -> None:
    error = error_of(await sent(server, b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % (b"x" * 101)), 431)
    assert "100 bytes (--max_header_size)" in error["message"]
    many = b"GET / HTTP/1.1\r\n%s\r\n" % (b"Host: x\r\n" + b"X: 1\r\n" * 16)
    assert "16 headers (--max_headers)" in error_of(await sent(server, many), 431)["message"]


# -- clients that leave ----------------------------------------------------------------------------


def request_bytes(body: bytes, more: str = "") -> bytes:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


@live()
async def test_a_client_that_leaves_just_before_the_headers(server: Server) -> None:
    server.model.holds = True
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request_bytes(body))
    await server.model.until(lambda: bool(server.model.asked))
    (exchange,) = server.front._exchanges
    assert server.front._listeners is not None
    (link,) = server.front._listeners._lookout._running
    assert link.transport is not None
    resolve(exchange.accepted)  # the handler will be woken, and find the connection closing
    link.transport.abort()
    await server.model.until(lambda: bool(server.model.aborted))
    assert (await served(server)).status == 499
    writer.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ahead", ["requests", "a body"])
def test_a_client_that_sends_ahead_and_leaves_is_noticed(
    ahead: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LOOK_S", 0.1)

    @live()
    async def test(server: Server) -> None:
        server.model.holds = True
        body = json.dumps({"prompt": "x", "stream": stream}).encode()
        more = (
            request_bytes(body) * 3000 if ahead == "requests" else request_bytes(b"x" * (4 << 20))
        )
        sock = socket.create_connection(("127.0.0.1", server.port), 20)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        sending = asyncio.create_task(loop.sock_sendall(sock, request_bytes(body) + more))
        await server.model.until(lambda: bool(server.model.asked))
        server.model.accept(server.model.asked[0])
        await asyncio.sleep(0.05)
        assert server.model.aborted == []
        async with asyncio.timeout(20):
            await sending  # it is read on, whoever runs
            assert server.model.aborted == []
            sock.close()
            await server.model.until(lambda: bool(server.model.aborted))
        assert len(server.model.asked) == 1  # nothing of what it sent ahead is begun

    test()


@live()
async def test_what_is_sent_ahead_in_reason_is_answered(server: Server) -> None:
    one = b"GET /liveness HTTP/1.1\r\nHost: x\r\n"
    answer = await sent(server, (one + b"\r\n") * 299 + one + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 300


# -- descriptors -----------------------------------------------------------------------------------


def test_exhausted_descriptors_are_told_and_survived(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "LOOK_S", 0.02)

    @live()
    async def test(server: Server) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        client, held = socket.socket(), []
        client.setblocking(False)
        assert (await server.get("/liveness"))[0] == 200
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard)
        )
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", server.port))
            assert await loop.sock_recv(client, 1) == b""  # it is closed at once
            await asyncio.sleep(0.2)
            assert (await server.get("/liveness"))[0] == 200  # others live on
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in held:
                os.close(fd)
        client.close()
        async with aiohttp.ClientSession() as http, http.get(server.url + "/liveness") as response:
            assert response.status == 200

    test()
    told = [r for r in caplog.records if r.levelno > logging.INFO]
    assert [r.getMessage() for r in told] == [
        f"new connections are closed at once: {os.strerror(errno.EMFILE)} (ulimit -n)"
    ]
    caplog.clear()


def test_the_log_is_told_of_descriptors_again_after_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]

    def fails(fd: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(connection.os, "dup", fails)
    monkeypatch.setattr(connection, "monotonic", lambda: now[0])
    lookout, counts = connection.ConnectionWatcher(), []
    for now[0] in (0.0, 1.0, 59.0, 60.0, 61.0, 120.0):
        lookout._look_for_descriptors()
        counts.append(len(caplog.records))
    assert counts == [1, 1, 1, 2, 2, 3]
    caplog.clear()
