"""/openapi.json and /docs as the server gives them."""

from __future__ import annotations

import re

from asyncllm.actors.gate import Access
from asyncllm.actors.http import DOC_FILES, SWAGGER, Routes
from tests.e2e.fake_server import Server
from tests.e2e.test_api import live


@live()
async def test_every_route_is_documented(server: Server) -> None:
    status, document = await server.get("/openapi.json")
    assert status == 200
    documented = {
        (path.replace("{id}", "*"), method.upper())
        for path, methods in document["paths"].items()
        for method in methods
    }
    app = Routes(server.front).app()
    served = {
        (re.sub(r"\{.*\}", "*", str(r.resource.canonical)), r.method)
        for r in app.router.routes()
        if r.resource is not None and r.method != "HEAD"
    }
    assert documented <= served
    # a GET with a body, and the files of the page
    assert served - documented == {("/tokens", "GET"), ("/docs/*", "GET")}


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
