"""No request may hurt another: attacks on a running server, beside a plain stream."""

from __future__ import annotations

import asyncio
import io
import json
import time
import zlib
from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e.bounds import check, under_attack
from tests.e2e.process import Server, alive

COMPLETIONS = "/v1/completions"
AMBIGUOUS = "root ::= s\ns ::= s s | [a-z ]+"
WORSE = "root ::= s\ns ::= t t | [a-z ]\nt ::= s s | s"  # the work grows with the output


async def post(session: aiohttp.ClientSession, path: str, **body: Any) -> tuple[int, str]:
    async with session.post(path, json=body) as reply:
        return reply.status, await reply.text()


def test_ambiguous_grammars(server: Server) -> None:
    ambiguous(server, 6)


def test_ambiguous_grammars_on_two_ranks(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", "--tp", "2") as server:
        ambiguous(server, 2)


def ambiguous(server: Server, choices: int) -> None:
    async def attack(session: aiohttp.ClientSession) -> list[tuple[int, str]]:
        body = {"prompt": "x", "n": choices, "max_tokens": 40}
        return await asyncio.gather(
            *(post(session, COMPLETIONS, **body, guided_grammar=g) for g in (AMBIGUOUS, WORSE))
        )

    report = server.run(under_attack(server, attack))
    check(report)
    (status, text), (worse, error) = report.result
    assert status == 200
    for choice in json.loads(text)["choices"]:
        assert set(choice["text"]) <= set("abcdefghijklmnopqrstuvwxyz ")
    assert worse == 400
    assert "too ambiguous to be followed" in error or "--constraint_time_limit" in error


async def send(session: aiohttp.ClientSession, path: str, data: bytes, **headers: str) -> int:
    async with session.post(path, data=io.BytesIO(data), headers=headers) as reply:
        await reply.read()
        return reply.status


def chat_of(number: int, content: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}] * number}).encode()


def test_counting_tokens(server: Server) -> None:
    """Texts that are too long are refused at once; those that are not leave others their turn."""

    async def attack(session: aiohttp.ClientSession) -> tuple[list[int], float]:
        body = json.dumps({"text": "hello world " * 2_500_000}).encode()
        long = json.dumps({"text": "hello world " * 300_000}).encode()
        allowed = json.dumps({"text": "hello world " * 10_000}).encode()
        chat = json.dumps(
            {"max_tokens": 1, "messages": [{"role": "user", "content": "a " * 500_000}]}
        )
        codes = [await send(session, "/tokens", body), await send(session, "/tokens", long)]
        codes.append(await send(session, "/v1/messages/count_tokens", chat.encode()))
        begun = time.perf_counter()
        counts = [send(session, "/tokens", allowed) for _ in range(8)]
        codes += await asyncio.gather(*counts)
        codes.append(await send(session, "/tokens", b'{"text": "hi"}'))
        return codes, time.perf_counter() - begun

    report = server.run(under_attack(server, attack))
    codes, took = report.result
    assert codes == [413, 400, 400, *[200] * 9]
    assert took < 20 * report.slowness
    check(report)


def test_bodies(server: Server) -> None:
    """What the parser would hold the interpreter lock for, and what unpacks to a lot."""
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(16)) + packer.flush()
    arrays = b'{"prompt": "x", "max_tokens": 1, "x": [' + b"[]," * 1_390_000 + b"[]]}"
    ids = b'{"prompt": [' + b"1," * 2_000_000 + b"1]}"
    allowed = b'{"prompt": [' + b"49151," * 190_000 + b"1]}"
    calls = [{"function": {"name": "f", "arguments": '{"a": [' + "[]," * 1_300_000 + "[]]}"}}]
    nested = json.dumps({"messages": [{"role": "assistant", "tool_calls": calls}]}).encode()

    async def attack(session: aiohttp.ClientSession) -> list[int]:
        chat = "/v1/chat/completions"
        codes = [await send(session, COMPLETIONS, bytes(28 << 20))]
        codes.append(await send(session, COMPLETIONS, bomb, **{"Content-Encoding": "gzip"}))
        for body in (arrays, ids, allowed):
            codes.append(await send(session, COMPLETIONS, body))  # noqa: PERF401
        codes.append(await send(session, chat, nested))
        chats = [send(session, chat, chat_of(4096, "x" * 950)) for _ in range(4)]
        return [*codes, *await asyncio.gather(*chats)]

    report = server.run(under_attack(server, attack))
    assert report.result == [413, 413, *[400] * 8]
    check(report)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def with_template(model_dir: Path, folder: Path, template: str) -> Path:
    """The same model with another chat template."""
    folder.mkdir()
    for file in model_dir.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_templates_that_loop_on_a_message(tiny_dir: Path, tmp_path: Path) -> None:
    """One client's hang for 2 s each; another one's chat has its turn between them."""
    source = (
        f"{{% if messages[0].content == 'loop' %}}{LOOP}{{% endif %}}{{{{ messages[0].content }}}}"
    )
    model_dir = with_template(tiny_dir, tmp_path / "model", source)

    def chat(content: str) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "model": "model",
        }

    async def attack(session: aiohttp.ClientSession) -> list[tuple[int, str]]:
        asked = [
            post(session, "/v1/chat/completions", **chat("loop")),
            post(session, "/v1/messages/count_tokens", **chat("loop")),
            post(session, "/v1/chat/completions", **chat("Hi")),
        ]
        return await asyncio.gather(*asked)

    with Server(model_dir, tmp_path / "log") as server:
        report = server.run(under_attack(server, attack))
        check(report)
        (helper,) = server.children("asyncllm.templates")
        assert server.stop() == 0
        assert not alive(helper)
    (status, text), counted, good = report.result
    assert good[0] == 200
    assert (status, "in 2 s" in text) == (400, True)
    # it has waited for the other two: on a loaded machine longer than a count waits
    assert (counted[0], "in 2 s" in counted[1]) == (400, True) or (
        (counted[0], "within 5 s" in counted[1]) == (503, True)
    ), counted


def test_large_schemas_and_deep_grammars(server: Server) -> None:
    """They are compiled in a time that is bounded, and nobody's small one waits for long."""

    def of(prefix: str) -> dict[str, Any]:
        fields = {f"{prefix}{i}": {"type": "string"} for i in range(1500)}
        return {"guided_json": {"type": "object", "properties": fields}}

    async def attack(session: aiohttp.ClientSession) -> tuple[list[tuple[int, str]], float]:
        body = {"prompt": "x", "max_tokens": 2}
        large = [post(session, COMPLETIONS, **body, **of(name)) for name in "kq"]
        rules = [f'r{i} ::= "a" r{i + 1} | "b"' for i in range(2500)]
        chain = "\n".join(["root ::= r0", *rules, 'r2500 ::= "x"'])
        deep = post(session, COMPLETIONS, **body, guided_grammar=chain)
        tasks = [asyncio.create_task(work) for work in (*large, deep)]
        begun = time.perf_counter()
        small = await post(session, COMPLETIONS, **body, guided_regex="[a-z]{5}")
        waited = time.perf_counter() - begun
        return [small, *await asyncio.gather(*tasks)], waited

    report = server.run(under_attack(server, attack))
    answers, waited = report.result
    assert [status for status, _ in answers] == [200] * 4, answers
    assert waited < 8 * report.slowness
    check(report)
