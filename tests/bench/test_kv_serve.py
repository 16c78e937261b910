"""Servers with each format of K/V: what they are asked for, and what is made of the figures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench import kv_serve, serve
from bench.kv_serve import Figures


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of the servers that stand-ins were started with; 8 bits have twice the slots."""
    seen: list[str] = []

    @contextmanager
    def server(arguments: str, url: str) -> Iterator[serve.Started]:
        seen.append(arguments)
        yield serve.Started(1.5, os.getpid())

    def bench(a: Any, pid: int) -> Figures:
        again = a.out == 1 and f"{a.n} again" in seen
        seen.append(f"{a.n} again" if a.out == 1 else f"load of {a.n}")
        speed = 150.0 if any("int8" in word for word in seen) else 100.0
        hit = 0.999 if again else 0.0
        return {"errors": {}, "short": 0, "out_tok_s": speed, "prefix_hit": hit}

    def metric(url: str, name: str) -> float:
        slots = 2000.0 if any("int8" in word for word in seen) else 1000.0
        return {"total": slots, "used": 0, "cached": 0.9 * slots}[name.rpartition("_")[2]]

    monkeypatch.setattr(kv_serve, "metric", metric)
    monkeypatch.setattr(serve, "server", server)
    monkeypatch.setattr(serve, "bench", bench)
    return seen


def test_slots_are_filled_and_found_again(
    started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--server", "--tp 2", "--modes", "none", "triton_int8kv+triton_flashdecoding"]
    assert kv_serve.main([*words, "--fill", "0.9", "--fill-len", "99"]) == 0
    loads = ["load of 512", "load of 24"]
    assert started == [
        "--tp 2", *loads, "9 again", "9 again",
        "--tp 2 --mode triton_int8kv triton_flashdecoding", *loads, "18 again", "18 again",
    ]  # fmt: skip
    head, _, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("| K/V | ready s | slots | x | held when full | x | of it found again |")
    assert (
        first == "| none | 1.5 | 1,000 | 1.000 | 900 | 1.000 | 99.90% | 100 | 1.000 | 100 | 1.000 |"
    )
    assert second.endswith(
        "| 1.5 | 2,000 | 2.000 | 1,800 | 2.000 | 99.90% | 150 | 1.500 | 150 | 1.500 |"
    )


def test_bad_answers_end_it(
    started: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "bench", lambda a, pid: {"errors": {"timeout": 3}, "short": 0})
    assert kv_serve.main(["--server", "", "--modes", "none"]) == 2
    assert "{'timeout': 3}, 0 short answers" in capsys.readouterr().err
