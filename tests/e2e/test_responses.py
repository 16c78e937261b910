"""/v1/responses over a real socket, with fake actors behind."""

from __future__ import annotations

import json

from tests.e2e.fake_server import Server
from tests.e2e.test_api import HI, live

RESPONSES = "/v1/responses"


@live()
async def test_a_conversation_over_two_requests(server: Server) -> None:
    status, first = await server.post(RESPONSES, {"input": "hi", "max_output_tokens": 2})
    assert (status, first["status"]) == (200, "incomplete")
    assert first["id"].startswith("resp_")
    assert first["output"][0]["content"][0]["text"] == "ab"
    body = {"input": "more", "previous_response_id": first["id"], "max_output_tokens": 1}
    raw = await server.stream(RESPONSES, body | {"stream": True})
    last = json.loads(raw.strip().rpartition(b"\ndata: ")[2])
    assert last["type"] == "response.incomplete"
    asked = json.loads(server.model.asked[-1].chat or b"")
    assert [m["content"] for m in asked["messages"]] == ["hi", "ab", "more"]
    for known in (first, last["response"]):
        assert await server.get(f"{RESPONSES}/{known['id']}") == (200, known)
    status, _ = await server.post(RESPONSES, body | {"store": False})
    assert status == 200


@live()
async def test_counting_input(server: Server) -> None:
    path = f"{RESPONSES}/input_tokens"
    _, first = await server.post(RESPONSES, {"input": "hi", "max_output_tokens": 2})
    body = {"input": "more", "previous_response_id": first["id"], "instructions": "Be brief."}
    # of the fake tokenizer: bytes of the last message
    counted = {"object": "response.input_tokens", "input_tokens": 4}
    assert await server.post(path, body) == (200, counted)
    for bad, param in (({}, "input"), ({"input": "a", "personality": "friendly"}, "personality")):
        status, got = await server.post(path, bad)
        assert (status, got["error"]["param"]) == (400, param)
    server.model.refusal = "too long"
    for route, body, param in (
        (path, {"input": "a"}, "input"),
        ("/tokenize", {"prompt": "a"}, "prompt"),
        ("/tokenize", {"messages": HI}, "messages"),
    ):
        status, got = await server.post(route, body)
        assert (status, got["error"]["param"]) == (400, param)


@live()
async def test_forgetting(server: Server) -> None:
    _, first = await server.post(RESPONSES, {"input": "hi"})
    url = f"{RESPONSES}/{first['id']}"
    async with server.http.delete(server.url + url) as response:
        gone = {"id": first["id"], "object": "response", "deleted": True}
        assert (response.status, await response.json()) == (200, gone)
    assert (await server.get(url))[0] == 404
    body = {"input": "more", "previous_response_id": first["id"]}
    status, error = await server.post(RESPONSES, body)
    assert (status, error["error"]["code"]) == (400, "previous_response_not_found")
    _, unstored = await server.post(RESPONSES, {"input": "hi", "store": False})
    assert (await server.get(f"{RESPONSES}/{unstored['id']}"))[0] == 404
