"""What a failing server names as the cause, whatever it hears of first."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from asyncllm.server.culprit import Culprit
from asyncllm.server.launch import Boot, Children

WAIT_S = 20.0
BROKEN, KILLED = "rank 1 ended with exit code 1", "node 1: rank 3 ended with exit code -9"


class Failed(list[tuple[int, str]]):
    """What a server was told to end with."""

    def __call__(self, code: int, why: str) -> None:
        self.append((code, why))


def test_a_process_whose_collective_failed_is_no_cause_if_one_is_known() -> None:
    async def go() -> None:
        failed = Failed()
        culprit = Culprit(WAIT_S, failed)
        culprit.suspect(BROKEN)
        waiting = asyncio.create_task(culprit.wait())  # a rank here whose own collective failed
        await asyncio.sleep(0)
        assert not failed
        culprit.found(1, KILLED)
        culprit.suspect("rank 2 ended with exit code 1")
        await waiting
        assert culprit.why == KILLED
        assert failed == [(1, KILLED)]

    asyncio.run(go())


@pytest.mark.parametrize("suspects", [[BROKEN, "another"], []])
def test_without_a_better_one_the_first_suspect_is_named(suspects: list[str]) -> None:
    async def go() -> None:
        failed = Failed()
        culprit = Culprit(0.01, failed)
        for suspect in suspects:
            culprit.suspect(suspect)
        await culprit.wait()
        assert culprit.why == (BROKEN if suspects else "")
        if suspects:
            culprit._not_found()  # the timer, which may be late
        assert failed == ([(1, BROKEN)] if suspects else [])

    asyncio.run(go())


def test_of_children_that_have_ended_together_the_killed_one_comes_first() -> None:
    ended = []
    for code in ("sys.exit(1)", "os.kill(os.getpid(), 9)"):
        process = subprocess.Popen([sys.executable, "-c", f"import os, sys; {code}"])
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        ended.append(process)

    async def go() -> list[int]:
        seen: list[int] = []
        children = Children(lambda _boot, _pid, code: seen.append(code))
        boot: Boot = None  # type: ignore[assignment]  # nobody looks at it
        for process in ended:
            children.adopt(boot, process)
        await children.wait(WAIT_S)
        return seen

    assert asyncio.run(go()) == [-9, 1]
