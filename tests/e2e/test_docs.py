"""/openapi.json and /docs as the server gives them."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html import unescape

from asyncllm.actors.access import Access
from asyncllm.actors.http import DOC_FILES, SWAGGER, HttpRoutes
from asyncllm.api.openapi import welcome
from asyncllm.api.openapi.welcome import curl_line
from tests.e2e.fake_server import SERVED, Server
from tests.e2e.test_api import CHAT, live


@live()
async def test_every_route_is_documented(server: Server) -> None:
    status, document = await server.get("/openapi.json")
    assert status == 200
    documented = {
        (path.replace("{id}", "*"), method.upper())
        for path, methods in document["paths"].items()
        for method in methods
    }
    app = HttpRoutes(server.front).app()
    served = {
        (re.sub(r"\{.*\}", "*", str(r.resource.canonical)), r.method)
        for r in app.router.routes()
        if r.resource is not None and r.method != "HEAD"
    }
    assert documented <= served
    # a GET with a body, the files of the page, the page at the front, and what SageMaker asks for
    others = {("/tokens", "GET"), ("/docs/*", "GET"), ("/", "GET"), ("/invocations", "POST")}
    slashed = {(path.rstrip("/"), method) for path, method in served if path[1:].endswith("/")}
    plain = {(path, method) for path, method in served if not path[1:].endswith("/")}
    assert plain - documented == others
    assert slashed <= plain


@live()
async def test_swagger_ui_needs_nothing_from_elsewhere(server: Server) -> None:
    async with server.http.get(server.url + "/docs") as response:
        assert response.status == 200
        assert response.content_type == "text/html"
        page = await response.text()
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(links) == 4
    for link in links:
        if link.startswith("data:"):
            continue
        async with server.http.get(f"{server.url}/{link}") as response:
            assert response.status == 200
            assert response.headers["Content-Security-Policy"].startswith("default-src 'self'")
            assert len(await response.read()) > 50
    for path in ("/docs/nope", "/docs/LICENSE", "/docs/..%2Fhttp.py", "/docs/"):
        assert (await server.get(path))[0] == 404
    assert all((SWAGGER / file).exists() for file in (*DOC_FILES, "LICENSE", "NOTICE"))


@live(access=Access(keys=("k",)))
async def test_a_secured_server_says_so(server: Server) -> None:
    for path in ("/openapi.json", "/docs", "/docs/start.js"):
        assert (await server.get(path))[0] == 401
    headers = {"Authorization": "Bearer k"}
    async with server.http.get(server.url + "/openapi.json", headers=headers) as response:
        assert "bearer" in (await response.json())["components"]["securitySchemes"]


@live()
async def test_the_front_page(server: Server) -> None:
    html = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
    async with server.http.get(server.url + "/", headers=html) as response:
        assert (response.status, response.content_type) == (200, "text/html")
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
        page = await response.text()
    for link in re.findall(r'href="(/[^"]*)"', page):
        async with server.http.get(server.url + link) as response:
            assert response.status == 200, link
    assert {"/docs", "/metrics", "/v1/models"} <= set(re.findall(r'href="([^"]+)"', page))
    assert "src=" not in page
    assert "//" not in page.replace(server.url, "")
    async with server.http.get(server.url + "/", headers={"Accept": "*/*"}) as response:
        assert response.content_type == "text/plain"
        plain = await response.text()
    for told in (page, plain):
        assert "tiny" in told
        assert "org/tiny" in told
    (line,) = (line for line in plain.splitlines() if line.startswith("curl "))
    assert line in unescape(page)
    _, _, url, *_, body = shlex.split(line)
    assert url == server.url + CHAT
    assert (await server.stream(CHAT, json.loads(body))).endswith(b"data: [DONE]\n\n")
    async with server.http.get(
        server.url + "/", headers={"Accept": "application/json"}
    ) as response:
        assert (await response.json())["models"] == ["tiny", "org/tiny"]


@live(tgi=True)
async def test_the_front_page_stands_beside_tgi(server: Server) -> None:
    async with server.http.get(server.url + "/") as response:
        assert (response.status, response.content_type) == (200, "text/plain")
    status, answer = await server.post("/", {"inputs": "x", "parameters": {"max_new_tokens": 1}})
    assert (status, answer[0]["generated_text"]) == (200, "a")


@live()
async def test_the_front_page_repeats_no_strange_host(server: Server) -> None:
    for accept in ("text/html", "*/*"):
        headers = {"Host": "x'$(id)<script>", "Accept": accept}
        async with server.http.get(server.url + "/", headers=headers) as response:
            assert response.status == 200
            told = await response.text()
            assert "script>" not in told.replace("<!doctype", "")
            assert "http://HOST/v1/chat/completions" in told


@live(access=Access(keys=("k",)))
async def test_the_front_page_is_for_those_with_a_key(server: Server) -> None:
    async with server.http.get(server.url + "/", headers={"Accept": "text/html"}) as response:
        assert response.status == 401
        assert "tiny" not in await response.text()
    async with server.http.get(server.url + "/", headers={"x-api-key": "k"}) as response:
        assert "-H 'Authorization: Bearer KEY'" in await response.text()


def test_names_are_quoted_for_shells_and_pages() -> None:
    served = replace(SERVED, name="a'b<c>", listed=("a'b<c>",))
    line = curl_line("http://x", served.name, secured=False)
    assert json.loads(shlex.split(line)[-1])["model"] == "a'b<c>"
    page = welcome.page(served, "http://x", secured=False)
    assert "<c>" not in page
    assert line in unescape(page)
