"""Many clients at once, and clients that leave: nothing is lost, nothing leaks."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import aiohttp

from tests.e2e.process import Server, stream_text, wait_until

STREAMS = 64


async def one(
    session: aiohttp.ClientSession, server: Server, prompt: list[int], leave_after: float | None
) -> int:
    """Chunks with text of one stream; the client leaves in the midst of it if told to."""
    body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    count = 0

    async def read() -> None:
        nonlocal count
        async for chunk in stream_text(session, f"{server.url}/v1/completions", body):
            count += bool(chunk["choices"])

    with suppress(TimeoutError):
        async with asyncio.timeout(leave_after):
            await read()
    return count


def run(server: Server, prose: list[int], leave: list[float | None]) -> list[int]:
    async def all_of_them() -> list[int]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            jobs = (
                one(session, server, prose[i * 20 : i * 20 + 10 + i % 40], leave[i])
                for i in range(STREAMS)
            )
            return list(await asyncio.gather(*jobs))

    return asyncio.run(all_of_them())


def idle(server: Server) -> bool:
    return (
        server.metric("asyncllm_kv_slots_used") == 0
        and server.metric("asyncllm_requests_running") == 0
        and server.metric("asyncllm_requests_waiting") == 0
    )


def test_64_streams_end_and_leave_nothing(server: Server, prose: list[int]) -> None:
    counts = run(server, prose, [None] * STREAMS)
    assert all(counts)
    assert wait_until(lambda: idle(server), 10)


def test_abort_storm_leaves_nothing(server: Server, prose: list[int]) -> None:
    rng = random.Random(0)
    leave = [rng.random() * 3 if i % 2 else None for i in range(STREAMS)]
    counts = run(server, prose, leave)
    assert all(count for i, count in enumerate(counts) if leave[i] is None)
    assert wait_until(lambda: idle(server), 10)
    assert server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2})["choices"]
