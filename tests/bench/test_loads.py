"""All loads in one server: each is kept as soon as it is over, whatever becomes of the others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import loads, serve
from bench.figures import SHARES, TIMES, Figures


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started, and which loads ran with which seed; one of n=3 has answers that failed."""
    found: list[str] = []

    @contextmanager
    def server(arguments: str, url: str) -> Iterator[serve.Started]:
        found.append(arguments)
        yield serve.Started(1.5, os.getpid())
        found.append("stopped")

    def bench(a: Any, pid: int) -> Figures:
        assert pid == os.getpid()
        if a.n == 4:
            raise KeyboardInterrupt
        found.append(f"{a.n} from {a.seed}")
        errors = {"http 429": 1} if a.n == 3 else {}
        times = {name: dict.fromkeys(SHARES, 7.5) for name in TIMES}
        rates = {"out_tok_s": 100.0 + a.n, "wall_s": 2.0, "cpu_us": 20.5}
        return {"errors": errors, "short": 0, "first_error": "busy", **times, **rates}

    monkeypatch.setattr(serve, "server", server)
    monkeypatch.setattr(serve, "bench", bench)
    return found


def test_a_failed_load_costs_no_other(
    seen: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "all.jsonl"
    words = ["--server", "--tp 2", "--seed", "5", "--json", str(file)]
    assert loads.main([*words, "--loads", "lat1,bad=--n 3,mine=--n 7"]) == 2
    assert seen == [
        "--tp 2",
        "16 from 5",
        f"3 from {5 + (1 << 16)}",
        f"7 from {5 + (2 << 16)}",
        "stopped",
    ]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["load"], line["out_tok_s"]) for line in lines] == [
        ("lat1", 116.0),
        ("mine", 107.0),
    ]
    said = capsys.readouterr()
    head, first, second = said.out.splitlines()
    assert head.split()[:2] == ["load", "tok/s"]
    assert first.split()[:3] == ["lat1", "116.00", "7.50"]
    assert second.split()[-2:] == ["20.50", "2.00"]
    assert "bad: --n 3: {'http 429': 1}, 0 short answers (the first: busy)" in said.err


def test_an_interrupted_run_shows_what_it_has(
    seen: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "all.jsonl"
    with pytest.raises(KeyboardInterrupt):
        loads.main(["--server", "", "--loads", "a=--n 2,b=--n 4", "--json", str(file)])
    assert len(file.read_text().splitlines()) == 1
    assert capsys.readouterr().out.splitlines()[1].startswith("a ")


def test_an_unknown_load_starts_no_server(
    seen: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert loads.main(["--server", "", "--loads", "lat2"]) == 2
    assert not seen
    assert "--loads lat2: one of lat1" in capsys.readouterr().err
