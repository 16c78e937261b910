"""Requests whose answers are compared, and streams to which something happens."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any

import aiohttp

from tests.e2e.process import Server, stream_text

TEXT = "One server or several, the answer is the same, for whoever asks: "
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
CALL_ID = re.compile(r'"call_[0-9a-f]+"')
COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions"
USER = [{"role": "user", "content": "why is that so?"}]

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, {"prompt": TEXT + "a", "temperature": 0}),
    "greedy, long": (COMPLETIONS, {"prompt": TEXT * 12, "temperature": 0, "max_tokens": 60}),
    "one token": (COMPLETIONS, {"prompt": TEXT + "b", "max_tokens": 1, "temperature": 0}),
    "two tokens": (COMPLETIONS, {"prompt": TEXT + "c", "max_tokens": 2, "temperature": 0}),
    "no token": (COMPLETIONS, {"prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 1}),
    "seeded": (COMPLETIONS, {"prompt": TEXT + "d", "seed": 5}),
    "seeded, top k and p": (
        COMPLETIONS,
        {"prompt": TEXT + "e", "seed": 6, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    ),
    "choices": (COMPLETIONS, {"prompt": TEXT + "f", "seed": 7, "n": 3}),
    "two prompts": (COMPLETIONS, {"prompt": [TEXT + "g", TEXT + "h"], "seed": 8, "n": 2}),
    "penalties": (
        COMPLETIONS,
        {"prompt": TEXT + "i", "seed": 9, "presence_penalty": 1.5, "frequency_penalty": 0.5,
         "repetition_penalty": 1.2},
    ),
    "stop strings": (COMPLETIONS, {"prompt": TEXT + "j", "seed": 10, "stop": ["e", "a"]}),
    "stop tokens": (COMPLETIONS, {"prompt": TEXT + "k", "seed": 11, "stop_token_ids": [*range(64)]}),
    "at least": (
        COMPLETIONS,
        {"prompt": TEXT + "l", "seed": 12, "min_tokens": 12, "stop_token_ids": [*range(64)]},
    ),
    "biased": (COMPLETIONS, {"prompt": TEXT + "m", "seed": 13, "logit_bias": {"65": 6, "66": 6}}),
    "log-probabilities": (COMPLETIONS, {"prompt": TEXT + "n", "seed": 14, "logprobs": 3}),
    "of the prompt": (
        COMPLETIONS,
        {"prompt": TEXT * 6, "seed": 15, "echo": True, "logprobs": 2},
    ),
    "chat": (CHATS, {"messages": USER, "seed": 16, "logprobs": True, "top_logprobs": 2}),
    "schema": (
        CHATS,
        {"messages": USER, "seed": 17, "max_tokens": 60,
         "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    ),
    "expression": (COMPLETIONS, {"prompt": TEXT + "o", "seed": 18, "guided_regex": "[ab]{4}c*d"}),
    "a tool": (
        CHATS,
        {"messages": USER, "seed": 19, "max_tokens": 80, "tools": [TOOL], "tool_choice": "required"},
    ),
    "generate": ("/generate", {"inputs": TEXT, "parameters": {"max_new_tokens": 9, "do_sample": False}}),
}  # fmt: skip


def body_of(name: str, **more: Any) -> tuple[str, dict[str, Any]]:
    path, body = REQUESTS[name]
    given = {"max_tokens": 16} | body if path != "/generate" else body
    return path, {**given, **more}


def whole(server: Server, name: str) -> dict[str, Any]:
    """The answer, but for what is new each time, and for what its prefix cache had."""
    reply = server.post(*body_of(name))
    reply.get("usage", {}).pop("prompt_tokens_details", None)
    new = {k: v for k, v in reply.items() if k not in ("id", "created", "system_fingerprint")}
    return dict(json.loads(CALL_ID.sub('"call"', json.dumps(new))))


def alike(got: object, wanted: object, within: float = 1e-4) -> bool:
    """Whether two answers are equal, but for the last digits of log-probabilities, which depend on
    how many ranks and rows there are."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(
            alike(got[key], wanted[key], within) for key in got
        )
    if isinstance(got, list) and isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(partial(alike, within=within), got, wanted))
    if isinstance(got, float) and isinstance(wanted, float):
        return abs(got - wanted) <= within
    return got == wanted


def streamed(server: Server, name: str) -> list[dict[str, Any]]:
    """Its events, those of a choice joined."""
    path, body = body_of(name, stream=True)
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    texts: dict[int, list[Any]] = {}
    with urllib.request.urlopen(request, timeout=120) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                for choice in json.loads(CALL_ID.sub('"call"', line[6:].decode()))["choices"]:
                    parts = texts.setdefault(choice["index"], ["", None])
                    delta = choice.get("delta", {})
                    parts[0] += choice.get("text") or delta.get("content") or ""
                    for call in delta.get("tool_calls") or ():  # however many tokens are in a piece
                        told = call["function"]
                        parts[0] += f"{told.get('name') or ''}{told.get('arguments') or ''}"
                    parts[1] = choice["finish_reason"] or parts[1]
    return [dict(zip(("text", "reason"), texts[i], strict=True)) for i in sorted(texts)]


def long_body(i: int, length: int = 200) -> dict[str, Any]:
    """A seeded request that says something for a while."""
    return {"prompt": f"{i} {TEXT}", "seed": i, "max_tokens": length, "ignore_eos": True}


async def text_of(url: str, body: dict[str, Any], seen: asyncio.Queue[str] | None = None) -> str:
    """What a stream says; ``seen`` gets each piece."""
    out = ""
    async with aiohttp.ClientSession() as session:
        async for event in stream_text(session, url + COMPLETIONS, body):
            if "error" in event:
                return f"error: {event['error']['message']}"
            piece = event["choices"][0]["text"] if event["choices"] else ""
            out += piece
            if seen is not None:
                seen.put_nowait(piece)
    return out


def with_an_accident(
    url: str, bodies: list[dict[str, Any]], accident: Callable[[], None]
) -> list[str]:
    """The texts of streams that had all begun when the accident happened."""

    async def go() -> list[str]:
        queues = [asyncio.Queue[str]() for _ in bodies]
        tasks = [
            asyncio.ensure_future(text_of(url, body, queue))
            for body, queue in zip(bodies, queues, strict=True)
        ]
        try:
            for queue in queues:
                for _ in range(3):
                    await asyncio.wait_for(queue.get(), 60)
            accident()
            return [await asyncio.wait_for(task, 120) for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(go())


def ready(server: Server) -> bool:
    try:
        return bool(server.get("/readiness"))
    except urllib.error.URLError as error:  # it is not, or does not listen yet
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        return False


def refusal(server: Server, name: str) -> tuple[int, str | None, str]:
    """Status, Retry-After and body of a request that is not served."""
    try:
        server.post(*body_of(name))
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Retry-After"], error.read().decode()
    raise AssertionError("it is served")
