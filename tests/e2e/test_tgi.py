"""--use_tgi_api over HTTP, as huggingface_hub's client sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, constants
from huggingface_hub.errors import OverloadedError, ValidationError

from tests.e2e.fake_server import Server
from tests.e2e.test_api import HI, live


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client refuses even our own address when the environment says to stay off line."""
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)


def client(server: Server) -> AsyncInferenceClient:
    return AsyncInferenceClient(server.url, token="none")


@live(tgi=True)
async def test_a_client_gets_text_and_details(server: Server) -> None:
    async with client(server) as hub:
        assert await hub.text_generation("hi", max_new_tokens=3) == "abc"
        got = await hub.text_generation(
            "hi", max_new_tokens=2, details=True, decoder_input_details=True, top_n_tokens=2,
            temperature=0.5, seed=3, best_of=2, stop=["x"], truncate=9, return_full_text=True,
        )  # fmt: skip
        assert got.generated_text == "hiab"
        assert (got.details.finish_reason, got.details.generated_tokens) == ("length", 2)
        assert [t.text for t in got.details.prefill] == ["h", "i"]
        assert [(t.text, t.logprob) for t in got.details.tokens] == [("a", -0.25), ("b", -0.5)]
        assert [[t["text"] for t in best] for best in got.details.top_tokens] == [
            ["a", "b"],
            ["b", "c"],
        ]
        assert [s.seed for s in got.details.best_of_sequences] == [4]
        asked = server.model.asked[-1]
        assert (len(asked.rids), asked.truncate) == (2, 9)
        assert asked.params.stop == ("x",)


@live(tgi=True)
async def test_a_client_gets_a_stream(server: Server) -> None:
    async with client(server) as hub:
        stream = await hub.text_generation("hi", max_new_tokens=3, stream=True, details=True)
        events = [event async for event in stream]
        assert [(e.index, e.token.text) for e in events] == [(1, "a"), (2, "b"), (3, "c")]
        assert [e.generated_text for e in events] == [None, None, "abc"]
        assert events[-1].details is not None
        assert (events[-1].details.finish_reason, events[-1].details.input_length) == ("length", 2)


@live(tgi=True, max_running=0, max_waiting=1)
async def test_a_client_understands_errors(server: Server) -> None:
    async with client(server) as hub:
        with pytest.raises(ValidationError, match="typical decoding is not available"):
            await hub.text_generation("hi", typical_p=0.5)
        server.model.holds = True
        waiting = server.system.loop.create_task(hub.text_generation("hi"))
        await server.model.until(lambda: bool(server.model.asked))
        with pytest.raises(OverloadedError, match="try again"):
            await hub.text_generation("hi")
        server.model.answer(server.model.asked[0])
        assert await waiting == "abc"


@live(tgi=True)
async def test_the_routes_and_the_document_go_together(server: Server) -> None:
    body: dict[str, Any] = {"inputs": "hi", "parameters": {"max_new_tokens": 1}}
    assert (await server.post("/generate", body))[1]["generated_text"] == "a"
    assert [a["generated_text"] for a in (await server.post("/", body))[1]] == ["a"]
    status, told = await server.post("/generate", {})
    assert (status, told) == (400, {"error": "inputs is missing", "error_type": "validation"})
    raw = await server.stream("/generate_stream", body)
    assert json.loads(raw.removeprefix(b"data:"))["generated_text"] == "a"
    # other routes are as ever
    status, told = await server.post("/v1/completions", {"prompt": 5})
    assert (status, told["error"]["type"]) == (400, "invalid_request_error")
    _, document = await server.get("/openapi.json")
    answers = document["paths"]["/generate"]["post"]["responses"]
    refs = {s: a["content"]["application/json"]["schema"]["$ref"] for s, a in answers.items()}
    assert refs["200"].endswith("/Tgi")
    assert {ref.rpartition("/")[2] for s, ref in refs.items() if s != "200"} == {"TgiError"}


@live(tgi=True)
async def test_openais_routes_have_a_fingerprint_there(server: Server) -> None:
    _, chat = await server.post("/v1/chat/completions", {"messages": HI})
    assert chat["system_fingerprint"].startswith("asyncllm-")
    chunks = await server.chunks("/v1/completions", {"prompt": "x"})
    assert {chunk["system_fingerprint"] for chunk in chunks} == {chat["system_fingerprint"]}
