"""How the channel of another server is found: by its HTTP port, whatever answers there."""

from __future__ import annotations

import ssl
import subprocess
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NoReturn

import pytest

from asyncllm.actors import peer_connector
from asyncllm.actors.peer_connector import find_channel
from asyncllm.config import Config
from asyncllm.server.config_server import json_page
from asyncllm.server.status import StatusPages
from tests.actors.test_transport import run
from tests.server.pages import opened


def serving(body: bytes, config: Config | None = None) -> AbstractAsyncContextManager[int]:
    """A server's HTTP port, which answers this at /cluster."""
    return opened(StatusPages({"/cluster": json_page(body)}, config or Config(), "elsewhere"))


@pytest.mark.parametrize("secured", [False, True])
def test_it_is_found_with_and_without_tls(
    secured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody's certificates are read, which would hold the loop at every attempt."""
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    if secured:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-days", "30", "-subj", "/CN=other", "-keyout", key, "-out", cert],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
    config = Config(ssl_certfile=cert, ssl_keyfile=key) if secured else Config()

    def reads(*_: object, **__: object) -> NoReturn:
        raise AssertionError("certificates are read")

    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", reads)

    async def go() -> None:
        async with serving(b'{"port": 9001}', config) as port:
            assert await find_channel("127.0.0.1", port, "it") == 9001

    run(go())


@pytest.mark.parametrize(
    "answer",
    [b"<html>", b'{"port": 0}', b'{"port": 65536}', b'{"port": true}', b'{"port": "9001"}', b"[9]",
     b"{}", b'{"port": 9001' + b" " * 2000 + b"}"],
)  # fmt: skip
def test_another_answer_is_none(answer: bytes) -> None:
    async def go() -> None:
        async with serving(answer) as port:
            with pytest.raises((ValueError, KeyError)):
                await peer_connector._ask(f"http://127.0.0.1:{port}/cluster")

    run(go())
