"""The simulation of loads; tests/actors/test_pacing.py has what it shows."""

from __future__ import annotations

import pytest

from bench import simulate


def test_runs_of_one_seed_are_equal_and_make_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--seeds",
        "2",
        "--loads",
        "a=--n 6 --conc 2 --inp 64 --out 8,b=--n 4 --rate 20 --out 4",
    ]
    tables = []
    for _ in range(2):
        assert simulate.main(words) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    head, a, b = tables[0].splitlines()
    assert head.split()[:2] == ["load", "tok/s"]
    assert a.split()[0] == "a"
    assert b.split()[0] == "b"
    assert 4.2 < float(a.split()[6]) < 5  # ITL p50: a step of two rows


def test_an_unknown_load_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--loads", "lat2"]) == 2
    assert "--loads lat2: one of lat1" in capsys.readouterr().err
