"""What one client's requests do to the others: a plain stream and /liveness while an attack is sent.

    report = server.run(under_attack(server, attack))

``attack(session)`` is a coroutine function that sends what it likes through an aiohttp session whose base is
the server's URL, and returns when it is over. Meanwhile a plain stream runs (started again if it ends)
and /liveness is asked ten times a second. :func:`check` holds a report to the bounds of all attacks.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.e2e.process import Server, stream_text
from tests.speed import slowness

Attack = Callable[[aiohttp.ClientSession], Awaitable[Any]]

# at nominal speed (tests/speed.py), whose worst moment during the attack stretches them
CALLBACK_S = 0.1  # of CPU time: at most 0.03 here, without the limits 0.3 and more
LIVENESS_S = 2.0  # of wall time, on cores that are shared
GAP_S = 4.0
LONGEST = re.compile(r'^asyncllm_callback_cpu_seconds_max\{actor="(\w+)"\} (\S+)$', re.MULTILINE)


@dataclass(slots=True)
class Report:
    """Seconds.

    Attributes:
        usual_gap_s: longest time between two events of the stream before the attack.
        gap_s, liveness_s: the longest during the attack.
        callbacks_s: CPU time of each actor's longest callback on rank 0 during the attack; HTTP
            handlers are the frontend's.
        slowness: how many times longer than it should Python took on this machine at the worst of
            many moments of the attack.
        result: what the attack returned.
    """

    usual_gap_s: float = 0.0
    gap_s: float = 0.0
    liveness_s: float = 0.0
    num_events: int = 0
    slowness: float = 1.0
    callbacks_s: dict[str, float] = field(default_factory=dict)
    result: Any = None

    @property
    def longest_s(self) -> float:
        return max(self.callbacks_s.values())


class _Clock:
    """The longest time between two ticks."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._last, self.longest, self.count = time.perf_counter(), 0.0, 0

    def tick(self) -> None:
        now = time.perf_counter()
        self.longest, self._last = max(self.longest, now - self._last), now
        self.count += 1


async def under_attack(
    server: Server, attack: Attack, *, headers: dict[str, str] | None = None
) -> Report:
    """Run ``attack`` beside a plain stream.

    Args:
        headers: of the plain stream's requests and the scrapes.
    """
    report, events, answers = Report(), _Clock(), _Clock()
    async with (
        aiohttp.ClientSession(headers=headers) as own,
        aiohttp.ClientSession(server.url) as foreign,
    ):
        plain = asyncio.create_task(_stream(own, server, events))
        pings = asyncio.create_task(_ping(own, server, answers, report))
        try:
            await _until(plain, lambda: events.count >= 3)
            events.restart()
            await _until(plain, lambda: events.count >= 8)
            report.usual_gap_s = events.longest
            await _callbacks(own, server)
            events.restart()
            answers.restart()
            report.result = await attack(foreign)
            events.tick()  # what has not come yet counts
            answers.tick()
            report.gap_s, report.num_events = events.longest, events.count
            report.liveness_s = answers.longest
            report.callbacks_s = await _callbacks(own, server)
        finally:
            for task in (plain, pings):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
    return report


def check(report: Report) -> None:
    """The bounds of every attack."""
    slow = report.slowness
    assert report.longest_s <= CALLBACK_S * slow, report
    assert report.liveness_s <= LIVENESS_S * slow, report
    assert report.gap_s <= max(GAP_S * slow, 10 * report.usual_gap_s), report


async def _stream(session: aiohttp.ClientSession, server: Server, events: _Clock) -> None:
    body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}
    while True:
        async for _ in stream_text(session, server.url + "/v1/completions", body):
            events.tick()


async def _ping(
    session: aiohttp.ClientSession, server: Server, answers: _Clock, report: Report
) -> None:
    while True:
        report.slowness = max(report.slowness, slowness(tries=1))
        async with session.get(server.url + "/liveness") as reply:
            assert reply.status == 200
        answers.tick()
        await asyncio.sleep(0.1)


async def _until(task: asyncio.Task[None], condition: Callable[[], bool]) -> None:
    while not condition():
        assert not task.done(), task
        await asyncio.sleep(0.02)


async def _callbacks(session: aiohttp.ClientSession, server: Server) -> dict[str, float]:
    """What the last scrape has been followed by; the next one begins anew."""
    async with session.get(server.url + "/metrics") as reply:
        return {actor: float(value) for actor, value in LONGEST.findall(await reply.text())}
