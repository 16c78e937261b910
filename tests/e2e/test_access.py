"""Keys, CORS, TLS, keep-alive comments and limits of reading, over a real socket."""

from __future__ import annotations

import asyncio
import logging
import ssl
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from asyncllm import config as options
from asyncllm import rank
from asyncllm.actors.access import Access, AccessControl
from asyncllm.config import Config
from asyncllm.core.request import FinishReason
from asyncllm.errors import StartupError
from asyncllm.server.launch import tls_context
from tests.e2e.fake_server import Server, serving
from tests.e2e.test_api import CHAT, COMPLETIONS, HI, live

KEYS = Access(keys=("key-one", "key-two"))


async def raw(server: Server, request: str) -> bytes:
    """The answer to a request written by hand, up to the connection's end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request.encode())
    try:
        return await reader.read()
    finally:
        writer.close()


async def status(server: Server, path: str, **headers: str) -> int:
    async with server.http.get(server.url + path, headers=headers) as response:
        return response.status


# -- keys --------------------------------------------------------------------------------------


@live(access=KEYS)
async def test_every_route_but_health_wants_a_key(server: Server) -> None:
    for path in ("/health", "/healthz", "/liveness", "/readiness", "/health?x=1", "/health/"):
        assert await status(server, path) == 200
    assert await status(server, "/cluster") == 404  # of servers that others connect to
    for path in ("/v1/models", "/metrics", "/token_load", "/tokens", "/get_model_name", "/",
                 "/generate", "/nope", "/HEALTH", "//health"):  # fmt: skip
        assert await status(server, path) == 401, path
    code, body = await server.post(COMPLETIONS, {"prompt": "x"})
    assert code == 401
    assert body["error"] == {
        "message": "an API key is missing; send Authorization: Bearer KEY",
        "type": "invalid_request_error",
        "param": None,
        "code": "missing_api_key",
    }
    assert server.model.asked == []


@live(access=KEYS)
async def test_a_key_opens_in_either_header(server: Server) -> None:
    for headers in (
        {"Authorization": "Bearer key-one"},
        {"Authorization": "bearer  key-two"},
        {"x-api-key": "key-two"},
        {"Authorization": "Bearer wrong", "x-api-key": "key-one"},
    ):
        assert await status(server, "/v1/models", **headers) == 200
    for headers in (
        {"Authorization": "Bearer key-on"},
        {"Authorization": "Bearer key-one2"},
        {"Authorization": "Bearer "},
        {"Authorization": "key-one"},
        {"Authorization": "Basic key-one"},
        {"x-api-key": "KEY-ONE"},
        {"x-api-key": "k\udce9y"},
        {"Cookie": "x-api-key=key-one"},
    ):
        head = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        head = head.encode("utf-8", "surrogateescape").decode("latin-1")
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n".encode(
                "latin-1"
            )
        )
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 401 "), headers
        assert b"WWW-Authenticate: Bearer" in answer


@live(access=KEYS)
async def test_only_the_target_as_sent_opens(server: Server) -> None:
    """The path is not rebuilt from anything a client may choose."""
    for line, host in (
        ("GET /v1/models HTTP/1.1", "x/health?"),
        ("GET http://x/health HTTP/1.1", "x"),
        ("GET /v1/models?/health HTTP/1.1", "x"),
        ("GET /v1/models#/health HTTP/1.1", "x"),
        ("GET /health/../v1/models HTTP/1.1", "x"),
        ("GET /health;/v1/models HTTP/1.1", "x"),
        ("GET /%68ealth HTTP/1.1", "x"),
    ):
        answer = await raw(server, f"{line}\r\nHost: {host}\r\nConnection: close\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 400 ")), line
        assert b'"data"' not in answer


def test_keys_are_never_shown(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, demo_dir: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    config = Config(api_key=("sk-secret", "sk-other"), check=True, port=1 << 15,
                    model_dir=str(demo_dir), device="cpu")  # fmt: skip
    assert rank.serve(config) == 0
    shown = capsys.readouterr().out
    assert "api_key = 2 given" in shown
    for text in (shown, caplog.text, repr(config), repr(Access(keys=config.api_key))):
        assert "sk-" not in text
    assert options.FLAGS["api_key"].secret


# -- whose request it is ---------------------------------------------------------------------------


def client(access: Access, peer: str = "10.0.0.1", **headers: str | list[str]) -> int:
    pairs = CIMultiDict[str]()
    for name, values in headers.items():
        for value in [values] if isinstance(values, str) else values:
            pairs.add(name.replace("_", "-"), value)
    request = make_mocked_request("POST", "/generate", headers=pairs)
    return AccessControl(access).client(request.clone(remote=peer))


def address(text: str) -> int:
    return client(Access(), text)


def test_a_client_is_its_key_whatever_header_brings_it_and_wherever_it_is() -> None:
    one = client(KEYS, x_api_key="key-one")
    assert one == client(KEYS, "10.0.0.2", Authorization="Bearer key-one")
    assert one == client(KEYS, Authorization="Bearer made-up", x_api_key="key-one")
    assert one == client(KEYS, Authorization="Bearer key-one", x_api_key="key-two")
    assert one != client(KEYS, x_api_key="key-two")


def test_without_keys_a_client_is_its_address_and_nothing_that_it_writes() -> None:
    one = address("10.0.0.1")
    assert one != address("10.0.0.2")
    made_up = {
        "Authorization": "Bearer x",
        "X_Forwarded_For": "1.2.3.4",
        "Forwarded": "for=1.2.3.4",
    }
    assert one == client(Access(), **made_up)
    assert one == address("::ffff:10.0.0.1")
    assert address("2001:db8::1") == address("2001:db8::ffff:1") != address("2001:db8:0:1::1")
    assert 0 <= one < 2**64


PROXIES = Access(proxies=("10.0.0.1", "192.168.0.0/16", "fd00::/8"))


@pytest.mark.parametrize(
    ("headers", "who"),
    [
        ({}, "10.0.0.1"),
        ({"X_Forwarded_For": "1.2.3.4"}, "1.2.3.4"),
        ({"X_Forwarded_For": "9.9.9.9, 1.2.3.4"}, "1.2.3.4"),  # the first is the client's own
        ({"X_Forwarded_For": "9.9.9.9, 1.2.3.4, 192.168.7.7"}, "1.2.3.4"),
        ({"X_Forwarded_For": ["9.9.9.9", "1.2.3.4, 192.168.7.7", "fd00::5"]}, "1.2.3.4"),
        ({"X_Forwarded_For": "1.2.3.4:5678"}, "1.2.3.4"),
        ({"X_Forwarded_For": "192.168.7.7"}, "192.168.7.7"),
        ({"X_Forwarded_For": "1.2.3.4, unknown"}, "10.0.0.1"),
        ({"X_Forwarded_For": "1.2.3.4, unknown, 192.168.7.7"}, "192.168.7.7"),
        ({"Forwarded": "for=9.9.9.9, For=1.2.3.4;proto=https;by=192.168.7.7"}, "1.2.3.4"),
        ({"Forwarded": 'by=x;for="[2001:db8::1]:4711"'}, "2001:db8::1"),
        ({"Forwarded": 'for="9.9.9.9, for=1.2.3.4'}, "1.2.3.4"),  # a quote that the client opened
        ({"Forwarded": "proto=https"}, "10.0.0.1"),
        ({"Forwarded": "for=1.2.3.4", "X_Forwarded_For": "1.2.3.4"}, "1.2.3.4"),
        ({"Forwarded": "for=9.9.9.9", "X_Forwarded_For": "1.2.3.4"}, "10.0.0.1"),
    ],
)
def test_behind_a_trusted_proxy_it_is_the_last_address_that_is_none(
    headers: dict[str, str | list[str]], who: str
) -> None:
    assert client(PROXIES, **headers) == address(who)


def test_what_comes_from_elsewhere_is_not_believed() -> None:
    assert client(PROXIES, "10.0.0.2", X_Forwarded_For="1.2.3.4") == address("10.0.0.2")


@live(max_running=0, max_waiting=4, access=Access(proxies=("127.0.0.1",)))
async def test_one_client_holds_half_of_the_queue_while_another_waits(server: Server) -> None:
    server.model.holds = True

    def ask(who: str) -> asyncio.Task[tuple[int, Any]]:
        headers = {"X-Forwarded-For": who}
        return asyncio.create_task(server.post(CHAT, {"messages": HI}, headers=headers))

    waiting = [ask("1.1.1.1") for _ in range(4)]
    await server.model.until(lambda: len(server.model.asked) == 4)
    waiting.append(ask("2.2.2.2"))
    await server.model.until(lambda: len(server.model.asked) == 5)
    code, answer = await ask("1.1.1.1")
    assert code == 429
    assert "this client has 4 choices waiting" in answer["error"]["message"]
    assert "half of --max_waiting" in answer["error"]["message"]
    assert len({msg.client for msg in server.model.asked}) == 2
    for msg in server.model.asked:
        server.model.answer(msg)
    assert {(await task)[0] for task in waiting} == {200}
    server.model.holds = False
    assert (await ask("1.1.1.1"))[0] == 200


# -- web pages ---------------------------------------------------------------------------------


@live(access=Access(keys=("k",), origins=("https://a.example",)))
async def test_cors(server: Server) -> None:
    ask = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    async with server.http.options(server.url + CHAT, headers=ask) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
        assert response.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
    async with server.http.options(server.url + CHAT) as response:
        assert response.status == 401  # no preflight
    body = {"messages": HI, "stream": True}
    for origin, mine in (("https://a.example", True), ("https://b.example", False)):
        for key, code in (("k", 200), ("no", 401)) if mine else (("k", 403), ("no", 403)):
            headers = {"Origin": origin, "Authorization": f"Bearer {key}"}
            async with server.http.post(server.url + CHAT, json=body, headers=headers) as response:
                assert response.status == code
                assert response.headers["Vary"] == "Origin"
                assert (response.headers.get("Access-Control-Allow-Origin") == origin) is mine


@live(access=Access(origins=("*",)))
async def test_what_is_no_text_is_not_sent_back(server: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    asks = b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: \xff\r\n"
    writer.write(b"OPTIONS / HTTP/1.1\r\nHost: x\r\nOrigin: \xff\r\n%b\r\n" % asks)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 204 ")
    assert b"Allow-Headers" not in head
    writer.close()


@live(access=Access(origins=("*",)))
async def test_cors_for_all(server: Server) -> None:
    async with server.http.get(server.url + "/health", headers={"Origin": "null"}) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]


@live()
async def test_no_cors_unless_asked_for(server: Server) -> None:
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    async with server.http.options(server.url + CHAT, headers=headers) as response:
        assert response.status == 405
        assert not any(name.startswith("Access-Control") for name in response.headers)


# -- TLS ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "30", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return cert, key


def test_streams_over_tls(certificate: tuple[str, str]) -> None:
    cert, key = certificate

    async def main() -> None:
        access = Access(tls=tls_context(Config(ssl_certfile=cert, ssl_keyfile=key)))
        trust = ssl.create_default_context(cafile=cert)
        async with asyncio.timeout(30), serving(access=access) as server:
            await server.opened.wait()
            url = server.url.replace("http:", "https:") + CHAT
            body = {"messages": HI, "stream": True}
            async with server.http.post(url, json=body, ssl=trust) as response:
                assert response.status == 200
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
            with pytest.raises(aiohttp.ClientError):
                await server.get("/health")

    uvloop.run(main())


def test_bad_tls_files_end_the_start(certificate: tuple[str, str], tmp_path: Path) -> None:
    cert, key = certificate
    assert tls_context(Config()) is None
    other = tmp_path / "other"
    other.write_text("no certificate")
    for files in ((str(tmp_path / "absent"), key), (str(other), key), (cert, str(other))):
        with pytest.raises(StartupError, match="--ssl_certfile"):
            tls_context(Config(ssl_certfile=files[0], ssl_keyfile=files[1]))
    with pytest.raises(StartupError, match=r"--ssl_certfile .*other: no PEM certificate chain"):
        rank.serve(Config(ssl_certfile=str(other)))


# -- silence, slowness, size -------------------------------------------------------------------


@live(keep_alive_s=0.03, native_keep_alive=True)
async def test_silent_streams_get_comments(server: Server) -> None:
    server.model.holds = True
    for path, body in (
        (CHAT, {"messages": HI, "stream": True}),
        ("/generate_stream", {"inputs": "x"}),
    ):
        post = asyncio.create_task(server.http.post(server.url + path, json=body))
        await server.model.until(lambda: bool(server.model.asked))
        asked = server.model.asked.pop()
        ids = server.model.accept(asked)
        async with await post as response:
            quiet = b": keep-alive\n\n"
            while (event := await response.content.readuntil(b"\n\n")) != quiet:
                assert event.startswith(b"data:")  # what is sent before the first token
            assert await response.content.readuntil(b"\n\n") == quiet
            params = asked.params
            server.model.delta(asked.rids[0], [97], params)
            server.model.finish(asked.rids[0], len(ids), 1, FinishReason.STOP)
            rest = (await response.read()).replace(quiet, b"")
            assert b'"a"' in rest


@live(keep_alive_s=0.0)
async def test_no_comments_when_off(server: Server) -> None:
    assert b"keep-alive" not in await server.stream(CHAT, {"messages": HI, "stream": True})
    assert not any(e.watch for e in server.front._exchanges)


@live(keep_alive_s=60.0)
async def test_native_streams_get_comments_only_if_asked_for(server: Server) -> None:
    """Some clients of LightLLM raise at them."""
    server.model.holds = True
    for path, body, watched in (
        (CHAT, {"messages": HI, "stream": True}, True),
        ("/generate_stream", {"inputs": "x"}, False),
    ):
        post = asyncio.create_task(server.http.post(server.url + path, json=body))
        await server.model.until(lambda: bool(server.model.asked))
        ids = server.model.accept(asked := server.model.asked.pop())
        async with await post as response:
            (exchange,) = server.front._exchanges
            assert bool(exchange.watch) == watched
            server.model.delta(asked.rids[0], [97], asked.params)
            server.model.finish(asked.rids[0], len(ids), 1, FinishReason.STOP)
            await response.read()


@live(body_s=0.05)
async def test_slow_bodies_are_408(server: Server) -> None:
    answer = await raw(server, f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"request_timeout"' in answer


@pytest.mark.parametrize(
    "head",
    ["X-Big: " + "x" * 9000, "\r\n".join(f"X-{i}: 1" for i in range(200)), "X: \0"],
    ids=["long", "many", "no HTTP"],
)
def test_bad_headers_are_refused_without_noise(head: str, caplog: pytest.LogCaptureFixture) -> None:
    @live()
    async def test(server: Server) -> None:
        answer = await raw(server, f"GET /health HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n")
        assert answer.split(b" ")[1] in (b"400", b"431")
        assert await server.get("/health") == (200, {"message": "Ok"})

    test()
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


# -- forged requests ---------------------------------------------------------------------------


def forged(site: str) -> dict[str, str]:
    return {"Content-Type": "text/plain", "Origin": site}


@live()
async def test_pages_of_other_sites_cannot_post(server: Server) -> None:
    """Browsers send text/plain for any page, and hide only the answer."""
    own = f"127.0.0.1:{server.port}"
    for headers, code in (
        ({}, 200),
        ({"Content-Type": "text/plain"}, 200),  # curl -d, more or less
        ({"Origin": f"http://{own}"}, 200),  # /docs
        ({"Origin": f"http://{own}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        (forged("https://evil.example"), 403),
        (forged("http://127.0.0.1"), 403),
        (forged("http://127.0.0.1:1"), 403),
        (forged(f"http://{own}.evil.example"), 403),
        (forged("null"), 403),  # a sandboxed frame, a file
        (forged(""), 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": f"http://{own}", "Sec-Fetch-Site": "cross-site"}, 403),
    ):
        for path in ("/abort_request", "/tokens", COMPLETIONS):
            data = b'{"abort_all": true, "text": "x", "prompt": "x"}'
            async with server.http.post(server.url + path, data=data, headers=headers) as response:
                assert response.status == code, headers
                if code == 403:
                    error = (await response.json())["error"]
                    assert error["code"] == "origin_not_allowed"
                    assert "(--cors_allow_origins)" in error["message"]
    async with server.http.delete(server.url + "/v1/responses/x", headers=forged("null")) as other:
        assert other.status == 403
    async with server.http.get(server.url + "/health", headers=forged("null")) as other:
        assert other.status == 200


@live()
async def test_a_name_pointed_at_this_machine_makes_no_page_ours(server: Server) -> None:
    for name, code in (
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost", 200),
        ("LOCALHOST", 200),
        ("app.localhost", 200),
        ("127.0.0.1", 200),
        ("[::1]", 200),
    ):
        for port in ("", f":{server.port}"):
            headers = {"Host": name + port, "Origin": f"http://{name.lower()}{port}"}
            async with server.http.post(
                server.url + "/tokens", json={"text": "x"}, headers=headers
            ) as response:
                assert response.status == code, headers


@live(access=Access(origins=("https://a.example", "chrome-extension://abc"), keys=("k",)))
async def test_named_origins_may_post(server: Server) -> None:
    for origin, code in (
        ("https://a.example", 200),
        ("chrome-extension://abc", 200),
        ("https://b.example", 403),
    ):
        headers = forged(origin) | {"x-api-key": "k", "Sec-Fetch-Site": "cross-site"}
        async with server.http.post(
            server.url + "/tokens", data=b'{"text": "x"}', headers=headers
        ) as response:
            assert response.status == code


@live(access=Access(origins=("*",)))
async def test_all_origins_may_post_if_so_wished(server: Server) -> None:
    async with server.http.post(
        server.url + "/tokens", data=b'{"text": "x"}', headers=forged("null")
    ) as response:
        assert response.status == 200
