"""A /v1/completions server that answers by script: what its clients count can be checked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

CACHED = 3


class FakeServer:
    """Keeps every body it got. ``kinds`` says what the i-th request gets; then all are good."""

    def __init__(self, kinds: tuple[str, ...] = ()) -> None:
        self.kinds = list(kinds)
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = self._now = 0
        self.url = ""

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        kind = self.kinds.pop(0) if self.kinds else "good"
        if kind == "refused":
            return web.json_response({"error": {"message": "too busy"}}, status=429)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        num = body["max_tokens"] - (kind == "short")
        for i in range(0 if kind == "silent" else num):
            await response.write(event({"choices": [{"index": 0, "text": f"w{i}"}]}))
            await asyncio.sleep(0)
            if kind == "cut" and i == 1:
                self._now -= 1
                return response
            if kind == "fails" and i == 1:
                await response.write(event({"error": {"message": "lost the device"}}))
        usage = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": num,
            "prompt_tokens_details": {"cached_tokens": CACHED},
        }
        await response.write(event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        self._now -= 1
        return response


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@asynccontextmanager
async def fake_server(*kinds: str) -> AsyncIterator[FakeServer]:
    fake = FakeServer(kinds)
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/v1/models", fake.models)
    app.router.add_post("/v1/completions", fake.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()
