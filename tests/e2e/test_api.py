"""The HTTP face as clients see it: a real socket, a real client, fake actors behind."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import aiohttp
import pytest
import uvloop

from asyncllm.api.common import sse
from asyncllm.api.common.answer import Answer, Choice
from asyncllm.api.lightllm.reply import NativeReply
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.messages import (
    FRONTEND_SHIFT,
    Drain,
    Drained,
    Finished,
    RequestServed,
    Started,
    Tokenize,
)
from asyncllm.records import AnsweredRequest, Failure
from tests.e2e.fake_server import EOS, Server, serving

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def live(**limits: Any) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., None]]:
    """Runs an async test against a server made with ``limits``."""

    def wrap(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**arguments: Any) -> None:
            async def main() -> None:
                async with asyncio.timeout(30), serving(**limits) as server:
                    await test(server, **arguments)

            uvloop.run(main())

        del run.__dict__["__wrapped__"]  # pytest would take ``server`` for a fixture
        return run

    return wrap


async def http1(server: Server, head: str, body: Any) -> bytes:
    """A request by hand, on a connection that the server ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    raw = json.dumps(body).encode()
    writer.write(f"{head}\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
    try:
        return await reader.read()
    finally:
        writer.close()


async def served(server: Server) -> AnsweredRequest:
    """The newest answer for text that the watchdog was told of."""
    await server.post("/tokens", {"text": "x"})  # one more turn of the loop's actors
    return next(a for a in reversed(answered(server)) if a.reason)


def answered(server: Server) -> list[AnsweredRequest]:
    """All that the watchdog was told of."""
    told = [m.answers for m in server.watchdog.got if isinstance(m, RequestServed)]
    return [answer for answers in told for answer in answers]


# -- routes ------------------------------------------------------------------------------------


@live()
async def test_small_routes(server: Server) -> None:
    assert await server.get("/health") == (200, {"message": "Ok"})
    assert await server.get("/healthz") == (200, {"message": "Ok"})
    for path in ("/liveness", "/readiness"):
        assert await server.get(path) == (200, {"status": "ok"})
        assert await server.post(path, {}) == (200, {"status": "ok"})
    assert await server.get("/get_model_name") == (200, {"model_name": "tiny"})
    assert await server.post("/get_model_name", {}) == (200, {"model_name": "tiny"})
    async with server.http.head(server.url + "/health") as response:
        assert response.status == 200
    load = {"current_load": 0.25, "logical_max_load": 0.75, "dynamic_max_load": 0.75}
    assert await server.get("/token_load") == (200, load)
    server.watchdog.groups = 2
    lists = {name: [share, share] for name, share in load.items()}
    assert await server.get("/token_load") == (200, lists)
    server.watchdog.groups = 1
    server.watchdog.load = replace(server.watchdog.load, sliding_used=5, sliding_total=10)
    load |= {"sliding_load": 0.5, "current_load": 0.5}
    assert await server.get("/token_load") == (200, load), "the fuller space"
    async with server.http.get(server.url + "/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert await response.text() == "# TYPE x gauge\nx 1\n"


@live()
async def test_models(server: Server) -> None:
    status, models = await server.get("/v1/models")
    assert (status, models["object"]) == (200, "list")
    assert [m["id"] for m in models["data"]] == ["tiny", "org/tiny"]
    assert models["data"][0]["max_model_len"] == 1000
    assert (await server.get("/v1/models/org/tiny"))[1] == models["data"][1]
    status, error = await server.get("/v1/models/gpt")
    assert (status, error["error"]["code"]) == (404, "model_not_found")


@live()
async def test_tokens(server: Server) -> None:
    assert await server.post("/tokens", {"text": "héy"}) == (200, {"ntokens": 5})
    body = {"text": "hey", "parameters": {"add_special_tokens": False}}
    async with server.http.get(server.url + "/tokens", json=body) as response:
        assert await response.json() == {"ntokens": 3}


@live()
async def test_tokenize_and_detokenize(server: Server) -> None:
    told = {"count": 3, "max_model_len": 1000, "tokens": [EOS, 104, 105], "token_strs": None}
    assert await server.post("/tokenize", {"prompt": "hi"}) == (200, told)
    body = {"prompt": "hi", "add_special_tokens": False, "return_token_strs": True}
    status, got = await server.post("/tokenize", body)
    assert (status, got["tokens"], got["token_strs"]) == (200, [104, 105], ["h", "i"])
    status, got = await server.post("/tokenize", {"messages": HI, "model": "tiny"})
    assert (status, got["count"]) == (200, 2)
    assert await server.post("/detokenize", {"tokens": [104, 105]}) == (200, {"prompt": "hi"})
    for path, bad, status in (
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "x", "messages": HI}, 400),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404),
        ("/detokenize", {"tokens": [9999]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [1] * 1001}, 400),
        ("/detokenize", {"tokens": "hi"}, 400),
    ):
        assert (await server.post(path, bad))[0] == status, (path, bad)


@live()
async def test_other_servers_small_routes(server: Server) -> None:
    for path in ("/ping", "/version", "/ping/", "/v1/models/", "/health/", "/v1/models/org/tiny/"):
        async with server.http.get(server.url + path) as response:
            assert response.status == 200, path
    assert (await server.get("/v1/models//"))[0] == 404
    for path, body, kind in (
        ("/invocations", {"messages": HI}, "chat.completion"),
        ("/invocations", {"prompt": "x"}, "text_completion"),
        (f"{CHAT}/", {"messages": HI}, "chat.completion"),
        (f"{COMPLETIONS}/", {"prompt": "x", "model": ""}, "text_completion"),
    ):
        status, got = await server.post(path, body)
        assert (status, got.get("object")) == (200, kind), path
    status, got = await server.post("/generate/", {"inputs": "x"})
    assert (status, bool(got["generated_text"])) == (200, True)
    assert (await server.post("/v1/messages/", {}))[1]["type"] == "error"


@live(query_s=0.05)
async def test_silent_actors_are_503(server: Server) -> None:
    server.model.counts = server.watchdog.answers = False
    for status, body in (
        await server.get("/metrics"),
        await server.get("/token_load"),
        await server.post("/tokens", {"text": "x"}),
    ):
        assert (status, body["error"]["code"]) == (503, "service_unavailable")
    server.watchdog.answers = True
    while (await server.get("/token_load"))[0] != 200:
        pass  # it may have been late on a busy machine


def test_doors_open_with_started() -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving(start=False) as server:
            early = asyncio.create_task(server.get("/health"))
            await server.model.until(lambda: True)
            assert not server.front.serving
            server.system.ref("frontend").tell(Started())
            await server.opened.wait()
            assert server.front.serving
            assert await early == (200, {"message": "Ok"})

    uvloop.run(main())


@live()
async def test_unknown_paths_and_methods(server: Server) -> None:
    for path in ("/nope", "/v1/nope", "/v1"):
        status, body = await server.get(path)
        assert (status, body["error"]["code"]) == (404, "not_found")
    async with server.http.get(server.url + "/generate") as response:
        body = await response.json()
        assert (response.status, response.headers["Allow"]) == (405, "POST")
        assert body["error"] == {
            "message": "/generate takes POST, not GET",
            "type": "invalid_request_error",
            "param": None,
            "code": "method_not_allowed",
        }
    assert (await server.post("/health", {}))[0] == 405


@live()
async def test_request_id(server: Server) -> None:
    for given, echoed in (("abc-1", True), ("x" * 128, True), ("x" * 129, False), ("", False)):
        headers = {"X-Request-Id": given}
        async with server.http.get(server.url + "/health", headers=headers) as response:
            got = response.headers["X-Request-Id"]
            assert (got == given) is echoed
            assert got
    headers = {"X-Request-Id": "s1"}
    body = {"prompt": "x", "stream": True}
    async with server.http.post(server.url + COMPLETIONS, json=body, headers=headers) as response:
        assert response.headers["X-Request-Id"] == "s1"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        await response.read()


def test_requests_are_logged_by_their_ids(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        async with asyncio.timeout(30), serving() as server:
            for name, body in (("s1", {"prompt": "x", "stream": True}), ("s2", {}), ("", {})):
                headers = {"X-Request-Id": name} if name else {}
                url = server.url + COMPLETIONS
                async with server.http.post(url, json=body, headers=headers) as response:
                    await response.read()
                    assert response.status == (200 if name == "s1" else 400)

    uvloop.run(main())
    found = [r.getMessage() for r in caplog.records if r.name == "asyncllm.actors.http"]
    assert re.fullmatch(r"request s1: /v1/completions 200 cmpl-\w{24}", found[0])
    assert found[1:] == ["request s2: /v1/completions 400 refused"]


# -- text --------------------------------------------------------------------------------------


@live()
async def test_chat(server: Server) -> None:
    status, body = await server.post(CHAT, {"model": "tiny", "messages": HI, "n": 2})
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert [c["message"]["content"] for c in body["choices"]] == ["abc", "abc"]
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    (asked,) = server.model.asked
    assert len(asked.rids) == 2
    assert all(rid >> FRONTEND_SHIFT == 0 for rid in asked.rids)
    assert (asked.text, asked.ids) == (None, None)


@live()
async def test_chat_stream(server: Server) -> None:
    body = {"messages": HI, "n": 2, "stream_options": {"include_usage": True}}
    chunks = await server.chunks(CHAT, body)
    *rest, usage = chunks
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert all(c["usage"] is None for c in rest)
    assert len({c["id"] for c in chunks}) == 1
    for index in range(2):
        mine = [c["choices"][0] for c in rest if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == "abc"
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]


@live()
async def test_completions_batch_in_every_prompt_form(server: Server) -> None:
    for prompt in ("hi", ["hi", "yo"], [104, 105], [[104, 105], [121, 111]]):
        body = {"prompt": prompt, "echo": True, "n": 2, "max_tokens": 1}
        texts = ["hia", "hia", "yoa", "yoa"][: 2 * (len(prompt) if len(str(prompt)) > 10 else 1)]
        status, whole = await server.post(COMPLETIONS, body)
        assert (status, [c["text"] for c in whole["choices"]]) == (200, texts)
        parts = [""] * len(texts)
        ends = []
        for chunk in await server.chunks(COMPLETIONS, body):
            (choice,) = chunk["choices"]
            parts[choice["index"]] += choice["text"]
            ends += [choice["index"]] if choice["finish_reason"] else []
        assert parts == texts
        assert sorted(ends) == list(range(len(texts)))


@live()
async def test_scoring_a_prompt(server: Server) -> None:
    body = {"prompt": [104, 105], "echo": True, "logprobs": 1, "max_tokens": 0}
    status, whole = await server.post(COMPLETIONS, body)
    (choice,) = whole["choices"]
    assert (status, choice["text"], choice["finish_reason"]) == (200, "hi", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25]
    params = server.model.asked[0].params
    assert (params.max_new_tokens, params.prompt_logprobs) == (0, 1)


@live()
async def test_a_long_answer_is_rendered_beside_the_loop(server: Server) -> None:
    """With something of each of many tokens it takes seconds; other streams must go on."""
    here, real, aside = threading.get_ident(), sse.body, list[bool]()

    def body(value: object) -> bytes:
        aside.append(threading.get_ident() != here)
        return real(value)

    ids, most = [104] * 600, {"max_tokens": 1}
    native = {"inputs": ids, "parameters": {"max_new_tokens": 390, "prompt_logprobs": 1}}
    long = [
        (COMPLETIONS, {"prompt": ids, "echo": True, "n": 2, **most}),
        (COMPLETIONS, {"prompt": [ids, ids], "return_token_ids": True, **most}),
        (COMPLETIONS, {"prompt": ids, "n": 3, "logprobs": 0, "max_tokens": 390}),
        (CHAT, {"messages": HI, "logprobs": True, "n": 2, "max_tokens": 600}),
        ("/tokenize", {"prompt": "hi"}),
    ]
    short = [
        (COMPLETIONS, {"prompt": ids, "n": 2, **most}),
        (CHAT, {"messages": HI, "n": 2, "max_tokens": 600}),
        ("/generate", native),
    ]
    with patch.object(sse, "body", body):
        for path, asked in long + short:
            status, _ = await server.post(path, asked)
            assert status == 200
    assert aside == [True] * len(long) + [False] * len(short)


@live()
async def test_native(server: Server) -> None:
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 2}}
    for path, more in (("/generate", {}), ("/", {}), ("/", {"stream": False})):
        status, whole = await server.post(path, body | more)
        assert status == 200
        assert whole["generated_text"] == ["ab"]
        assert (whole["count_output_tokens"], whole["prompt_tokens"]) == (2, 2)
    event = (
        'data:{"token":{"id":%d,"text":"%s","logprob":%s,"special":false,"count_output_tokens":%d,'
        '"prompt_tokens":2,"logprobs":{"%d":{"logprob":%s,"rank":null,"decoded_token":"%s"}}},'
        '"generated_text":%s,"finished":%s,"finish_reason":%s,"details":null,"input_usage":'
        '{"input_text_tokens":2,"input_audio_tokens":0,"input_image_tokens":0}}\n\n'
    )
    expected = event % (97, "a", "-0.25", 1, 97, "-0.25", "a", "null", "false", "null")
    expected += event % (98, "b", "-0.5", 2, 98, "-0.5", "b", '"ab"', "true", '"length"')
    assert (await server.stream("/generate_stream", body)).decode() == expected
    assert (await server.stream("/", body | {"stream": True})).decode() == expected


@live()
async def test_a_request_is_aborted_by_its_id(server: Server) -> None:
    model, body = server.model, {"inputs": "hi", "parameters": {"n": 2}}
    model.holds = True
    post = functools.partial(server.post, "/generate", body)
    create = server.system.loop.create_task
    mine = create(post(headers={"X-Request-Id": "a"}))
    await model.until(lambda: len(model.asked) == 1)
    other = create(post(headers={"X-Request-Id": "b"}))
    await model.until(lambda: len(model.asked) == 2)
    for asked in model.asked:
        model.accept(asked)
        model.delta(asked.rids[0], [97], asked.params)
    (first, second), _ = (asked.rids for asked in model.asked)
    assert await server.post("/abort_request", {"request_id": "nobody"}) == (200, {"success": True})
    assert await server.post("/abort_request", {"request_id": "a"}) == (200, {"success": True})
    await model.until(lambda: len(model.aborted) == 2)
    assert model.aborted == [first, second]
    for rid in (first, second):
        model.finish(rid, 2, 0, FinishReason.ABORT)
    status, whole = await mine
    assert (status, whole["generated_text"], whole["finish_reason"]) == (
        200,
        ["a", ""],
        ["abort"] * 2,
    )
    assert not other.done()
    for rid in model.asked[1].rids:
        model.finish(rid, 2, 1)
    assert (await other)[1]["finish_reason"] == ["length"] * 2


@live()
async def test_all_requests_are_aborted_wherever_they_are(server: Server) -> None:
    model = server.model
    model.holds = True
    create = server.system.loop.create_task
    started = create(server.post(COMPLETIONS, {"prompt": "x"}))
    await model.until(lambda: len(model.asked) == 1)
    waiting = create(server.post(COMPLETIONS, {"prompt": "y"}))
    await model.until(lambda: len(model.asked) == 2)
    model.accept(model.asked[0])
    await server.post("/abort_request", {"abort_all": True})
    await model.until(lambda: len(model.aborted) == 2)
    for rid in model.aborted:
        model.finish(rid, 1, 0, FinishReason.ABORT)
    status, whole = await started
    assert (status, whole["choices"][0]["finish_reason"]) == (200, "abort")
    status, told = await waiting
    assert (status, told["error"]["code"]) == (499, "aborted")
    assert "before it began" in told["error"]["message"]


@live()
async def test_an_abort_needs_an_id(server: Server) -> None:
    for body in ({}, {"request_id": ""}, {"request_id": 5}, {"abort_all": "yes"}):
        status, told = await server.post("/abort_request", body)
        assert (status, told["error"]["param"] in ("request_id", "abort_all")) == (400, True)


@live(info={"tp": 1, "version": "9"})
async def test_server_info(server: Server) -> None:
    assert await server.get("/get_server_info") == (200, {"tp": 1, "version": "9"})
    assert await server.post("/get_server_info", {}) == (200, {"tp": 1, "version": "9"})


@live()
async def test_seeds_are_drawn_unless_given(server: Server) -> None:
    for seed in (None, None, 5):
        await server.post(COMPLETIONS, {"prompt": "x", "seed": seed})
    one, two, given = [m.params.seed for m in server.model.asked]
    assert one != two
    assert given == 5
    assert 0 <= max(one, two) < 2**63 - 16


@live()
async def test_served_is_told(server: Server) -> None:
    await server.post(COMPLETIONS, {"prompt": ["hi", "you"], "max_tokens": 2, "n": 2})
    got = await served(server)
    assert (got.route, got.status, got.reason) == (COMPLETIONS, 200, "length")
    assert (got.prompt_len, got.num_tokens) == (5, 8)
    assert 0 <= got.ttft_s <= got.total_s
    assert got.tpot_s >= 0
    await server.post(CHAT, {"messages": 5})
    got = await served(server)
    assert (got.route, got.status, got.reason, got.num_tokens) == (CHAT, 400, "refused", 0)


@live()
async def test_what_the_tokenizer_refuses_was_not_taken_in(server: Server) -> None:
    server.model.refuse = lambda m: Finished(m.rids[0], FinishReason.ERROR, Failure("long"))
    assert (await server.post(COMPLETIONS, {"prompt": ["a", "b"]}))[0] == 400
    got = await served(server)
    assert (got.status, got.reason, got.total_s) == (400, "refused", 0.0)


@live()
async def test_every_answer_is_counted_under_the_path_as_registered(server: Server) -> None:
    for i in range(20):
        assert (await server.get(f"/none/{i}"))[0] == 404
    assert (await server.get("/v1/models/tiny"))[0] == 200
    assert (await server.get(CHAT))[0] == 405
    assert (await server.post(CHAT, {"messages": HI}))[0] == 200
    assert (await served(server)).status == 200
    assert {(a.route, a.status) for a in answered(server)} == {
        ("other", 404),
        ("/v1/models/{name}", 200),
        ("other", 405),
        (CHAT, 200),
    }
    assert len(answered(server)) == 23


@live()
async def test_a_pipelined_flood_does_not_fill_the_watchdogs_mailbox(server: Server) -> None:
    server.watchdog.capacity = 2
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /none HTTP/1.1\r\nHost: x\r\n\r\n" * 300)
    writer.write(b"GET /liveness HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).count(b" 404 ") == 300
    writer.close()
    assert (await server.post(CHAT, {"messages": HI}))[0] == 200
    assert (await served(server)).status == 200
    assert [a.status for a in answered(server)].count(404) == 300


# -- errors ------------------------------------------------------------------------------------


@live()
async def test_bad_requests_are_400_in_one_shape(server: Server) -> None:
    for path, body, param in (
        (CHAT, {"messages": HI, "temperature": 3}, "temperature"),
        (CHAT, {"messages": HI, "n": 100000}, "n"),
        (CHAT, {"messages": HI, "max_tokens": -1, "stream": True}, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of"),
        ("/generate", {"inputs": "x", "parameters": {"top_p": 2}}, "parameters.top_p"),
        ("/generate_stream", {"inputs": "x", "parameters": []}, "parameters"),
        ("/", {"inputs": "x", "stream": "yes"}, "stream"),
        ("/tokens", {}, "text"),
    ):
        status, answer = await server.post(path, body)
        assert status == 400
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert (answer["error"]["type"], answer["error"]["param"]) == (
            "invalid_request_error",
            param,
        )
    status, answer = await server.post(CHAT, {"model": "gpt", "messages": HI})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert server.model.asked == []
    async with server.http.post(server.url + CHAT, data=b"{") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid_json")


@live()
async def test_unreadable_bodies_are_400(server: Server) -> None:
    headers = {"Content-Encoding": "gzip"}
    async with server.http.post(server.url + CHAT, data=b"no gzip", headers=headers) as response:
        assert response.status == 400


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_headers_are_plain(stream: bool) -> None:
    @live()
    async def test(server: Server) -> None:
        def refuse(msg: Tokenize) -> Finished | None:
            bad = msg.text == "bad"
            detail = "This prompt exceeds the context window: 9 prompt tokens, limit 8"
            failure = Failure(detail, "context_length_exceeded", param="prompt")
            error = Finished(msg.rids[0], FinishReason.ERROR, failure)
            return error if bad else None

        server.model.refuse = refuse
        server.model.holds = True
        body = {"prompt": ["good", "bad", "good"], "stream": stream, "n": 2}
        post = asyncio.create_task(server.post(COMPLETIONS, body))
        await server.model.until(lambda: len(server.model.asked) == 3)
        first, second, third = server.model.asked
        server.model.accept(first)
        server.model.answer(second)
        status, answer = await post
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert answer["error"]["param"] == "prompt"
        assert "exceeds the context window" in answer["error"]["message"]
        # the other prompts end too: nothing of this request goes on
        rids = {*first.rids, *second.rids, *third.rids}
        await server.model.until(lambda: rids <= set(server.model.aborted))
        server.model.answer(third)  # late news of a dead request
        server.model.holds = False
        assert (await server.post(COMPLETIONS, {"prompt": "x"}))[0] == 200

    test()


@live()
async def test_headers_come_before_the_first_token(server: Server) -> None:
    server.model.holds = True
    body = {"messages": HI, "stream": True}
    post = asyncio.create_task(server.http.post(server.url + CHAT, json=body))
    await server.model.until(lambda: bool(server.model.asked))
    (asked,) = server.model.asked
    assert not post.done()
    server.model.accept(asked)
    async with await post as response:
        assert response.status == 200
        first = await response.content.readuntil(b"\n\n")
        assert b'"role":"assistant"' in first
        # after the headers an error is an event, and the stream ends without [DONE]
        server.model.fail(asked.rids[0], "it broke", "", 500)
        rest = await response.read()
    error = {"message": "it broke", "type": "server_error", "param": None, "code": "internal_error"}
    assert rest.startswith(b"data: ")
    assert json.loads(rest[6:]) == {"error": error}
    assert (await served(server)).status == 500


@live()
async def test_a_token_that_comes_with_a_failure_is_told_before_it(server: Server) -> None:
    server.model.holds = True
    post = asyncio.create_task(
        server.http.post(server.url + "/generate_stream", json={"inputs": "x"})
    )
    await server.model.until(lambda: bool(server.model.asked))
    (asked,) = server.model.asked
    server.model.accept(asked)
    async with await post as response:
        server.model.delta(asked.rids[0], [97], asked.params)
        server.model.fail(asked.rids[0], "it broke", "", 500)
        events = (await response.text()).split("\n\n")[:-1]
    token, error = (json.loads(event.removeprefix("data:")) for event in events)
    assert (token["token"]["text"], token["finished"]) == ("a", False)
    assert error["error"]["message"] == "it broke"


@pytest.mark.parametrize("fails", [False, True])
def test_a_fault_in_what_a_stream_holds_back_costs_no_other(fails: bool) -> None:
    def faulty(*_: Any) -> bytes:
        raise ValueError("a fault of ours")

    @live()
    async def test(server: Server) -> None:
        server.model.holds = True
        stream = asyncio.create_task(server.stream("/generate_stream", {"inputs": "x"}))
        await server.model.until(lambda: bool(server.model.asked))
        (asked,) = server.model.asked
        server.model.accept(asked)
        while not all(each.pipe for each in server.front._exchanges):  # noqa: ASYNC110
            await asyncio.sleep(0)  # the headers are not out yet
        with patch.object(NativeReply, "_event", faulty):
            server.model.delta(asked.rids[0], [97], asked.params)
            if fails:
                server.model.fail(asked.rids[0], "it broke", "", 500)
            events = (await stream).split(b"\n\n")[:-1]
        assert [json.loads(event[5:])["error"]["code"] for event in events] == ["internal_error"]
        server.model.holds = False
        assert (await server.post("/generate", {"inputs": "x"}))[0] == 200

    test()


@live()
async def test_tokens_before_the_other_prompts_acceptance_are_kept(server: Server) -> None:
    server.model.holds = True
    body = {"prompt": ["a", "b"], "stream": True, "echo": True, "max_tokens": 2}
    chunks = asyncio.create_task(server.chunks(COMPLETIONS, body))
    await server.model.until(lambda: len(server.model.asked) == 2)
    one, two = server.model.asked
    server.model.answer(one)
    server.model.answer(two)
    texts = ["", ""]
    for chunk in await chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["aab", "bab"]


@live(max_body=1000)
async def test_body_limit(server: Server) -> None:
    body = json.dumps({"prompt": "x" * 5000})

    async def parts() -> Any:
        yield body.encode()

    for data in (body, parts()):  # with and without Content-Length
        async with server.http.post(server.url + COMPLETIONS, data=data) as response:
            answer = await response.json()
            assert (response.status, answer["error"]["code"]) == (413, "request_too_large")
            assert "1000 bytes" in answer["error"]["message"]
    assert (await served(server)).status == 413


@live(max_running=1, max_waiting=2)
async def test_too_many_requests(server: Server) -> None:
    server.model.holds = True
    first = asyncio.create_task(server.post(CHAT, {"messages": HI, "n": 2}))
    await server.model.until(lambda: bool(server.model.asked))
    async with server.http.post(server.url + CHAT, json={"messages": HI, "n": 2}) as response:
        answer = (await response.json())["error"]
        assert (response.status, answer["code"]) == (429, "rate_limit_exceeded")
        assert answer["type"] == "rate_limit_error"
        assert "at most 3 may (--running_max_req_size, --max_waiting)" in answer["message"]
        assert 1 <= int(response.headers["Retry-After"]) <= 60
    status, answer = await server.post(CHAT, {"messages": HI, "n": 4})
    assert (status, answer["error"]["param"]) == (400, "n")  # would never fit
    server.model.answer(server.model.asked[0])
    assert (await first)[0] == 200
    server.model.holds = False
    assert (await server.post(CHAT, {"messages": HI, "n": 3}))[0] == 200


@live()
async def test_a_full_tokenizer_is_429(server: Server) -> None:
    server.model.capacity = 2
    server.model.holds = True
    status, answer = await server.post(COMPLETIONS, {"prompt": ["a", "b", "c"]})
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    await server.model.until(lambda: len(server.model.aborted) == 3)
    server.model.holds = False
    assert (await server.post(COMPLETIONS, {"prompt": ["a", "b"]}))[0] == 200


# -- clients that leave or do not read -----------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("accepted", [False, True])
def test_a_client_that_leaves_aborts(stream: bool, accepted: bool) -> None:
    @live()
    async def test(server: Server) -> None:
        server.model.holds = True
        body = {"prompt": ["a", "b"], "n": 2, "stream": stream}
        post = asyncio.create_task(server.http.post(server.url + COMPLETIONS, json=body))
        await server.model.until(lambda: len(server.model.asked) == 2)
        one, two = server.model.asked
        rids = {*one.rids, *two.rids}
        if accepted:
            for msg in (one, two):
                server.model.accept(msg)
            server.model.delta(one.rids[0], [97], SamplingParams())
            server.model.finish(one.rids[0], 1, 1)
            rids.discard(one.rids[0])  # over already
        if stream and accepted:
            response = await post
            await response.content.readuntil(b"\n\n")
            response.close()
        else:
            await server.post("/tokens", {"text": "x"})
            post.cancel()
        await server.model.until(lambda: len(server.model.aborted) >= len(rids))
        assert sorted(server.model.aborted) == sorted(rids)
        server.model.delta(two.rids[0], [97], SamplingParams())  # it is told too late
        server.model.finish(two.rids[0], 1, 1)
        got = await served(server)
        assert (got.status, got.reason) == (499, "abort" if accepted else "refused")

    test()


@live(max_unsent=1 << 16)
async def test_a_client_that_does_not_read_is_dropped(server: Server) -> None:
    server.model.holds = True
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
    raw = json.dumps({"prompt": "a", "stream": True}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw)
    )
    writer.write(raw)
    await server.model.until(lambda: bool(server.model.asked))
    (asked,) = server.model.asked
    server.model.accept(asked)
    sent = 0
    while not server.model.aborted:
        server.model.delta(asked.rids[0], [97], SamplingParams(), text="x" * (1 << 20))
        await server.post("/tokens", {"text": "others are served"})
        sent += 1
        assert sent < 64, "nothing stops a client that does not read"
    assert server.model.aborted == list(asked.rids)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await reader.readexactly(sent << 20)
    writer.close()


@live(flush_s=0.0)
async def test_a_slow_turn_goes_on_with_the_rest(server: Server) -> None:
    """No budget at all: four streams a turn, and each still gets everything."""
    bodies = [server.stream(COMPLETIONS, {"prompt": "a", "stream": True}) for _ in range(20)]
    for data in await asyncio.gather(*bodies):
        assert data.endswith(b'"finish_reason":"length"}]}\n\ndata: [DONE]\n\n')


# -- the wire ------------------------------------------------------------------------------------


@live()
async def test_http_1_0_streams_end_with_the_connection(server: Server) -> None:
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 1}}
    for more in ("", "\r\nConnection: keep-alive"):
        raw = await http1(server, "POST /generate_stream HTTP/1.0" + more, body)
        head, _, rest = raw.partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower()
        assert b"connection: close" in head.lower()
        assert rest.startswith(b"data:{")
        assert rest.endswith(b'"input_image_tokens":0}}\n\n')


@live()
async def test_http_1_1_stream_is_chunked(server: Server) -> None:
    body = {"messages": HI, "stream": True, "max_tokens": 2}
    raw = await http1(server, f"POST {CHAT} HTTP/1.1\r\nConnection: close", body)
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    data = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        part, rest = rest[: int(size, 16)], rest[int(size, 16) :]
        assert rest.startswith(b"\r\n")
        rest = rest[2:]
        if not part:
            break
        assert part.endswith(b"\n\n")  # whole events in each chunk
        data += part
    assert rest == b""
    assert data.endswith(b"data: [DONE]\n\n")
    assert data.count(b"data: ") == 5


@live()
async def test_connections_are_kept_between_streams(server: Server) -> None:
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=connector) as http:
        for _ in range(3):
            body = {"messages": HI, "stream": True}
            async with http.post(server.url + CHAT, json=body) as response:
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
                connection = response.connection
                assert connection is None or connection.transport is not None
        (waiting,) = connector._conns.values()
        assert len(waiting) == 1


# -- the end -------------------------------------------------------------------------------------


@live()
async def test_drain(server: Server) -> None:
    server.model.holds = True
    running = asyncio.create_task(server.post(CHAT, {"messages": HI}))
    await server.model.until(lambda: bool(server.model.asked))
    server.system.ref("frontend").tell(Drain(30.0))
    async with server.http.post(server.url + CHAT, json={"messages": HI}) as response:
        answer = (await response.json())["error"]
        assert (response.status, answer["code"]) == (503, "shutting_down")
        assert response.headers["Connection"] == "close"
        assert "Retry-After" in response.headers
    assert await server.get("/health") == (503, {"message": "Error"})
    assert await server.get("/readiness") == (503, {"status": "not ready"})
    assert (await server.get("/liveness"))[0] == 200
    assert not server.watchdog.drained.is_set()
    server.model.answer(server.model.asked[0])
    assert (await running)[0] == 200
    await server.watchdog.drained.wait()
    drained = [m for m in server.watchdog.got if isinstance(m, Drained)]
    assert drained == [Drained("frontend", 0)]


@live()
async def test_drain_of_an_idle_server(server: Server) -> None:
    server.system.ref("frontend").tell(Drain(30.0))
    await server.watchdog.drained.wait()


def test_stopping_answers_who_still_waits() -> None:
    async def main() -> None:
        async with asyncio.timeout(30), serving() as server:
            server.model.holds = True
            plain = asyncio.create_task(server.post(CHAT, {"messages": HI}))
            body = {"messages": HI, "stream": True}
            stream = asyncio.create_task(server.stream(CHAT, body))
            await server.model.until(lambda: len(server.model.asked) == 2)
            streamed = next(
                m for m in server.model.asked if server.front._by_rid[m.rids[0]][0].streams
            )
            server.model.accept(streamed)
            await server.post("/tokens", {"text": "x"})
            server.system.stop()
            status, answer = await plain
            assert (status, answer["error"]["code"]) == (503, "shutting_down")
            assert b'"code":"shutting_down"' in await stream

    uvloop.run(main())


@live()
async def test_the_servers_own_abort_is_503(server: Server) -> None:
    server.model.holds = True
    post = asyncio.create_task(server.post(CHAT, {"messages": HI}))
    await server.model.until(lambda: bool(server.model.asked))
    (asked,) = server.model.asked
    server.model.accept(asked)
    server.model.finish(asked.rids[0], 2, 0, FinishReason.ABORT)
    assert (await post)[0] == 503


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HI}),
        (COMPLETIONS, {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": HI, "max_tokens": 5}),
        ("/generate_stream", {"inputs": "a"}),
        ("/", {"inputs": "a"}),
    ],
)
def test_streams_survive_clients_that_split_by_unicode_lines(
    path: str, body: dict[str, Any]
) -> None:
    @live()
    async def run(server: Server) -> None:
        text = "one\x85two\u2028three\u2029four é"
        server.model.holds = True
        stream = asyncio.create_task(server.stream(path, body | {"stream": True}))
        await server.model.until(lambda: bool(server.model.asked))
        msg = server.model.asked[0]
        server.model.accept(msg)
        server.model.delta(msg.rids[0], [97], msg.params, text=text)
        server.model.finish(msg.rids[0], 1, 1)
        raw = (await stream).decode()
        assert not {"\x85", "\u2028", "\u2029"} & set(raw)
        assert "one\\u0085two\\u2028three\\u2029four é" in raw

    run()


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Answer, "accept"), (Choice, "take_token"), (Choice, "take"), (Choice, "end")],
)
def test_a_fault_in_one_answer_costs_no_other(kind: type, name: str) -> None:
    real = getattr(kind, name)

    def faulty(*args: Any) -> None:
        real(*args)
        raise ValueError("a fault of ours")

    @live()
    async def test(server: Server) -> None:
        asked = {"prompt": "x", "logprobs": 2 if name == "take" else None}
        with patch.object(kind, name, faulty):
            status, told = await server.post(COMPLETIONS, asked)
            assert (status, told["error"]["code"]) == (500, "internal_error")
            if kind is Choice:
                server.model.holds = True
                stream = asyncio.create_task(server.stream(COMPLETIONS, asked | {"stream": True}))
                await server.model.until(lambda: len(server.model.asked) == 2)
                server.model.accept(server.model.asked[1])
                while not all(each.pipe for each in server.front._exchanges):  # noqa: ASYNC110
                    await asyncio.sleep(0)  # the headers are not out yet
                server.model.holds = False
                server.model.answer(server.model.asked[1])
                assert b'"code":"internal_error"' in await stream
        assert server.front.holds() == "0 requests, 0 choices"
        assert (await server.post(COMPLETIONS, asked))[0] == 200

    test()
