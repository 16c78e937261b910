"""Processes that are started before rank 0 knows what they are for."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from asyncllm import cli, rank
from asyncllm.environment import API_KEY, child_environment
from asyncllm.server import early_ranks, launch
from asyncllm.server.early_ranks import MOST, EarlyRanks
from asyncllm.server.launch import Boot, Children
from tests.server.test_launch import boot

WAIT_S = 20.0  # only what fails takes so long

Spawned = list[tuple[subprocess.Popen[bytes], tuple[str, ...]]]


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> Spawned:
    """Processes that wait on standard input, in the place of ranks, with their words."""
    seen: Spawned = []

    def spawn(num_threads: int, fds: Sequence[int], *words: str) -> subprocess.Popen[bytes]:
        seen.append((subprocess.Popen(["cat"], stdin=subprocess.PIPE), words))
        return seen[-1][0]

    monkeypatch.setattr(early_ranks, "spawn", spawn)
    return seen


@pytest.mark.parametrize("cuda", [False, True])
def test_they_are_taken_in_order_and_those_left_over_are_killed(
    spawned: Spawned, cuda: bool
) -> None:
    with EarlyRanks(3, cuda=cuda) as early:
        assert [words[1:] for _, words in spawned] == [(str(i),) * cuda for i in (1, 2, 3)]
        first = early.take()
        assert first is spawned[0][0]
    assert [process.poll() for process, _ in spawned] == [None, -9, -9]
    assert first is not None
    first.communicate()
    assert first.returncode == 0


def test_a_number_that_is_refused_later_does_not_fill_the_machine(spawned: Spawned) -> None:
    with EarlyRanks(60_000, cuda=False):
        assert len(spawned) == MOST


def test_http_workers_wait_for_their_boot_while_rank_0_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spawned: list[subprocess.Popen[bytes]] = []
    given: list[tuple[int, ...]] = []

    def spawn(num_threads: int, fds: Sequence[int], *words: str) -> subprocess.Popen[bytes]:
        assert not words, "they end their requests before they end with rank 0"
        given.append(tuple(fds))
        spawned.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        return spawned[-1]

    monkeypatch.setattr(launch, "spawn", spawn)

    async def go() -> None:
        children = Children(lambda *_: None)
        children.prepare_workers(2, replace(boot(), endpoint=0, listen_fd=8, heartbeats_fd=9), 1)
        assert given == [(8, 9)] * 2
        children.start(replace(boot(), endpoint=2), 1)
        assert len(spawned) == 2, "one that waits"
        out = spawned[0].stdout
        assert out is not None
        assert Boot.from_json(out.read().decode()).name == "HTTP worker 1"
        await children.wait(WAIT_S)
        assert spawned[1].poll() is None
        children.kill()
        assert spawned[1].returncode == -9

    asyncio.run(go())
    for process in spawned:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def test_nobody_waits_for_a_child_to_read_what_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads when it has imported, which takes seconds."""
    reads, done = threading.Event(), threading.Event()

    class Pipe(io.BytesIO):
        def write(self, text: Any) -> int:
            assert reads.wait(WAIT_S)
            return super().write(text)

        def close(self) -> None:
            given.append(self.getvalue())
            super().close()
            done.set()

    given: list[bytes] = []
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    pipe, process.stdin = process.stdin, Pipe()
    assert pipe is not None
    monkeypatch.setattr(launch, "spawn", lambda *_: process)

    async def go() -> None:
        children = Children(lambda *_: None)
        children.start(boot(), 1)
        assert given == []
        reads.set()
        assert await asyncio.to_thread(done.wait, WAIT_S)
        children.kill()

    asyncio.run(go())
    pipe.close()
    assert given == [boot().to_json().encode()]


@pytest.mark.parametrize(
    ("words", "others"),
    [
        ("--tp 4", 3),
        ("--tp 4 --dp 2", 3),
        ("", 0),
        ("--tp 4 --check", 0),
        ("--tp 4 --nnodes 2 --node_rank 1 --nccl_host 10.0.0.1", 1),
        ("--tp 2 --nnodes 2 --node_rank 1 --nccl_host 10.0.0.1", 0),
        ("--run_mode pd_master", 0),
        ("--run_mode prefill --tp 2 --pd_master_ip 10.0.0.1", 1),
    ],
)
def test_how_many_there_are(words: str, others: int) -> None:
    assert cli._other_ranks(cli.parse(words.split())) == others


def test_one_that_gets_no_boot_ends_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert rank.child() == 1
    assert capsys.readouterr() == ("", "")


def test_one_learns_the_network_interface_with_its_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot inherit what rank 0 has found out later."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.setenv(name, "")  # restored in the end
        monkeypatch.delenv(name)
    given = replace(boot(), interface="lo", model_dir="/nowhere").to_json()
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    monkeypatch.setattr(rank.log, "setup", lambda *_: None)
    monkeypatch.setattr(rank, "SignalWatcher", lambda *_, **__: None)
    assert rank.child() == 2, "there is no model"
    assert [os.environ[name] for name in names] == ["lo", "=lo"]


def test_no_child_inherits_the_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "secret")
    given: dict[str, Any] = child_environment(OMP_NUM_THREADS="1")
    assert API_KEY not in given
    assert given["OMP_NUM_THREADS"] == "1"
