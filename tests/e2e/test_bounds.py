"""No request may hurt another: attacks on a running server, beside a plain stream."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.bounds import check, under_attack
from tests.e2e.process import Server

COMPLETIONS = "/v1/completions"
AMBIGUOUS = "root ::= s\ns ::= s s | [a-z ]+"


async def post(session: aiohttp.ClientSession, path: str, **body: Any) -> tuple[int, str]:
    async with session.post(path, json=body) as reply:
        return reply.status, await reply.text()


@pytest.mark.parametrize("tp", [1, 2])
def test_ambiguous_grammars(demo_dir: Path, tmp_path: Path, tp: int) -> None:
    async def attack(session: aiohttp.ClientSession) -> list[tuple[int, str]]:
        body = {"prompt": "x", "n": 16, "max_tokens": 100, "guided_grammar": AMBIGUOUS}
        return await asyncio.gather(*(post(session, COMPLETIONS, **body) for _ in range(3)))

    options = ("--tp", str(tp), "--constraint_time_limit", "0.1")
    with Server(demo_dir, tmp_path / "log", *options) as server:
        report = server.run(under_attack(server, attack))
    check(report)
    for status, text in report.result:
        assert status == 400
        assert "--constraint_time_limit" in text
