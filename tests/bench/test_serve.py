"""serve.py and loadgen.py: lengths, figures, and whole runs against a scripted server."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import figures as figures_of
from bench import loadgen, plot, serve
from bench.common import Record, random_prompts
from tests.bench.fake_server import CACHED, FakeServer, fake_server

BENCH = Path(__file__).parents[2] / "bench"


def options(*argv: str) -> argparse.Namespace:
    return serve.parser().parse_args(argv)


def record(start: float, ttft: float, tpot: float, num: int = 5, **changes: Any) -> Record:
    """A good answer: ``num`` tokens, one a chunk."""
    stamps = [start + ttft + i * tpot for i in range(num)]
    fields: dict[str, Any] = {
        "prompt_len": 10, "asked": num, "stamps": stamps, "done": True, "end": stamps[-1],
        "usage": {"completion_tokens": num, "prompt_tokens": 10}, **changes,
    }  # fmt: skip
    return Record(start, **fields)


def drawn(mix: str, seed: int = 0, num: int = 4000) -> list[int]:
    return serve.lengths(mix, 256, 1.0, num, random.Random(seed))


def test_length_mixes_keep_their_mean_and_bounds() -> None:
    assert drawn("fixed") == [256] * 4000
    uniform = drawn("uniform")
    assert (min(uniform), max(uniform)) == (128, 384)
    assert sum(uniform) / 4000 == pytest.approx(256, rel=0.02)
    tailed = sorted(drawn("sharegpt-like"))
    assert tailed[0] >= 4
    assert tailed[-1] <= 8 * 256
    assert sum(tailed) / 4000 == pytest.approx(256, rel=0.06)
    assert tailed[2000] == pytest.approx(256 * 2.718281828**-0.5, rel=0.1)  # lognormal's median


@pytest.mark.parametrize("mix", ["uniform", "sharegpt-like"])
def test_lengths_follow_the_seed(mix: str) -> None:
    assert drawn(mix, 1) == drawn(mix, 1) != drawn(mix, 2)


def test_the_whole_load_is_a_function_of_the_options() -> None:
    argv = ("--n", "9", "--mix", "sharegpt-like", "--inp", "40", "--shared", "8", "--rate", "5")
    first, again = serve.make_load(options(*argv)), serve.make_load(options(*argv))
    assert first == again
    assert first != serve.make_load(options(*argv, "--seed", "1"))
    prompts = [body["prompt"] for body in first.bodies]
    assert all(len(p) > 8 and p[:8] == prompts[0][:8] for p in prompts)
    assert len({body["max_tokens"] for body in first.bodies}) > 1
    assert first.arrivals is not None
    assert len(first.arrivals) == 9


def test_the_same_fixed_load_as_the_yardstick() -> None:
    """Figures of serve.py and loadgen.py may be compared only if they send the same."""
    load = serve.make_load(options("--n", "3", "--inp", "20", "--shared", "5", "--seed", "7"))
    assert [b["prompt"] for b in load.bodies] == random_prompts([20] * 3, 128000, 7, 5)


def test_summary_counts_good_answers_only() -> None:
    records = [
        record(0.0, 0.1, 0.01),
        record(0.0, 0.3, 0.02, usage={
            "completion_tokens": 5, "prompt_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 4},
        }),
        record(1.0, 0.1, 0.01, asked=6),
        record(1.0, 0.1, 0.01, done=False),
        Record(0.5, 10, 5, kind="http 429", error="429 busy", end=2.0),
        Record(0.5, 10, 5, kind="http 429", error="429 again", end=2.0),
        Record(0.5, 10, 5, done=True, end=2.0),
    ]  # fmt: skip
    figures = serve.summary(options("--sla", "ttft=200,tpot=15"), records)
    assert figures["ok"] == 3
    assert figures["errors"] == {"cut off": 1, "http 429": 2, "no token": 1}
    assert figures["first_error"] == "429 busy"
    assert figures["short"] == 1
    assert figures["wall_s"] == 2.0
    assert figures["out_tok_s"] == 7.5
    assert figures["total_tok_s"] == 22.5
    assert figures["req_s"] == 1.5
    assert figures["prefix_hit"] == 0.4
    assert figures["ttft_ms"] == {"p50": 100.0, "p90": 300.0, "p99": 300.0, "max": 300.0}
    assert figures["tpot_ms"]["max"] == 20.0
    assert figures["e2e_ms"]["max"] == 380.0
    assert figures["goodput_req_s"] == 1.0
    assert figures["sla_share"] == round(2 / 7, 4)
    shown = serve.table(figures)
    assert "429 busy" in shown
    assert "28.6%" in shown


def test_each_limit_of_the_goodput_counts_alone() -> None:
    records = [record(0.0, 0.1, 0.05), record(0.0, 0.5, 0.01)]
    for limit in ("ttft=120", "tpot=20", "e2e=400"):
        assert serve.summary(options("--sla", limit), records)["sla_share"] == 0.5
    assert serve.summary(options("--sla", "ttft=120,tpot=20"), records)["sla_share"] == 0
    assert "sla_share" not in serve.summary(options(), records)


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=x", "ttft=0", "ttft=-1", "ttft=nan", "ttft=inf", "itl=3",
             "ttft=1,ttft=2", "ttft=1,", "TTFT=1"],
)  # fmt: skip
def test_limits_that_are_none_are_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--sla", text)
    assert repr(text.rpartition(",")[2]) in capsys.readouterr().err


def test_a_run_without_a_good_answer_has_figures() -> None:
    figures = serve.summary(options(), [Record(0.0, 1, 1, kind="timeout", error="t", end=1.0)])
    assert figures["ok"] == 0
    assert figures["ttft_ms"]["p50"] is None
    assert figures["prefix_hit"] is None
    json.loads(json.dumps(figures, allow_nan=False))
    serve.table(figures)


def test_compare_shows_ratios_and_warns_of_other_work() -> None:
    a = serve.summary(options(), [record(0.0, 0.1, 0.01), record(0.0, 0.1, 0.01)])
    b = serve.summary(options("--seed", "1"), [record(0.0, 0.2, 0.01), record(0.0, 0.2, 0.01)])
    lines = serve.compare(a, b).splitlines()
    assert lines[0] == "not the same work: seed differ"
    (ttft,) = [line for line in lines if line.startswith("ttft_ms p50")]
    assert ttft.split()[-3:] == ["100.00", "200.00", "2.000"]
    assert not serve.compare(a, a).startswith("not the same")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shared", "9", "--inp", "8"], "--shared 9 is more than --inp 8"),
        (["--vocab", "1000"], "leaves no ids"),
        (["--rate", "-1"], "is negative"),
    ],
)
def test_nonsense_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(serve.BenchError, match=message):
        serve.check(options(*argv))


def test_a_plot_without_matplotlib_is_refused_before_the_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert serve.main(["--plot", "x.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [record(0.1 * i, 0.1 + 0.01 * i, 0.01) for i in range(20)]
    records.append(Record(0.5, 10, 5, kind="http 429", error="429", end=0.6))
    gaps = [1e3 * gap for r in records for gap in r.gaps_s]
    for limits in ({}, {"ttft": 200.0, "e2e": 300.0}):
        run = plot.Run(figures_of.requests_table(records, limits), gaps, 3.0)
        plot.plot(tmp_path / "x.png", "title", {"": run}, limits)
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_goodput_curve_is_goodput_where_limits_are_as_given() -> None:
    records = [record(0.0, 0.05 * i, 0.01) for i in range(1, 9)]
    records.append(record(0.0, 0.01, 0.01, done=False))
    limits = {"ttft": 200.0, "tpot": 20.0}
    run = plot.Run(figures_of.requests_table(records, limits), [], 2.0)
    factors, rates = plot.goodput_curve(run)
    assert factors == pytest.approx([0, 0.5, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0])
    assert rates == [*(0.5 * i for i in range(9)), 4.0]
    for factor in (0.6, 1.1, 1.6):
        scaled = {name: factor * limit for name, limit in limits.items()}
        kept = [rate for at, rate in zip(factors, rates, strict=True) if at <= factor]
        assert figures_of.goodput(scaled, records, 2.0)["goodput_req_s"] == kept[-1]


def test_the_plotted_distribution_reaches_one() -> None:
    assert plot.cumulative([1.0, 2.0, 4.0, 8.0]) == ([1, 2, 4, 8], [0.25, 0.5, 0.75, 1.0])
    rows: list[dict[str, Any]] = [{"ttft_ms": 3.0}, {"ttft_ms": None}, {"ttft_ms": 1.0}]
    assert plot.column(rows, "ttft_ms") == [1.0, 3.0]


def test_the_yardstick_has_its_figures() -> None:
    a = loadgen.parser().parse_args(["--n", "3", "--out", "5", "--inp", "10"])
    assert a.model == "default"
    records = [
        record(0.0, 0.1, 0.01),
        record(0.0, 0.2, 0.02, num=4),
        Record(0.5, 10, 5, kind="http 429", error="429 busy", end=2.0),
    ]
    assert loadgen.result(a, records) == {
        "tag": "", "n": 3, "conc": 64, "rate": 0, "inp": 10, "out": 5, "shared": 0, "ok": 2,
        "errors": 1, "wall_s": 2.0, "out_tok_s": 4.5, "total_tok_s": 14.5, "req_s": 1.0, "short": 1,
        "ttft_ms": {"p50": 200.0, "p90": 200.0, "p99": 200.0},
        "tpot_ms": {"p50": 20.0, "p90": 20.0, "p99": 20.0},
        "itl_ms": {"p50": 10.0, "p99": 20.0, "max": 20.0}, "err0": ["429 busy"],
    }  # fmt: skip
    json.dumps(loadgen.result(a, records[2:]), allow_nan=False)  # no good answer, and yet JSON


def test_what_a_script_started_ends_with_it() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(SystemExit) as left,
        serve.running(command, {}, subprocess.DEVNULL) as process,
    ):
        signal.raise_signal(signal.SIGTERM)
    assert (left.value.code, process.returncode) == (143, -signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


async def run_script(*argv: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def run_against(fake_kinds: tuple[str, ...], script: str, *argv: str) -> tuple[
    tuple[int, str, str], FakeServer
]:  # fmt: skip
    async def scene() -> tuple[tuple[int, str, str], FakeServer]:
        async with fake_server(*fake_kinds) as fake:
            return await run_script(str(BENCH / script), "--url", fake.url, *argv), fake

    return asyncio.run(scene())


@pytest.mark.parametrize("how", [("--conc", "4"), ("--rate", "200")], ids=["closed", "open"])
def test_loadgen_measures_every_request(how: tuple[str, str]) -> None:
    (code, out, err), fake = run_against(
        ("good", "refused"), "loadgen.py", "--n", "9", "--inp", "12", "--out", "4", "--procs", "2",
        "--temperature", "0.5", *how,
    )  # fmt: skip
    figures = json.loads(out)
    assert (figures["ok"], figures["errors"], code) == (8, 1, 1), err
    assert figures["short"] == 0
    assert "too busy" in figures["err0"][0]
    assert len(fake.bodies) == 9
    assert {(len(b["prompt"]), b["max_tokens"], b["temperature"]) for b in fake.bodies} == {
        (12, 4, 0.5)
    }


def test_serve_warms_up_measures_and_writes(tmp_path: Path) -> None:
    (code, out, err), fake = run_against(
        ("good", "good", "short"), "serve.py", "--n", "10", "--inp", "12", "--out", "4",
        "--procs", "2", "--warmup", "2", "--mix", "uniform", "--json", str(tmp_path / "a.json"),
    )  # fmt: skip
    assert code == 0, err
    content = json.loads((tmp_path / "a.json").read_text())
    assert len(fake.bodies) == 12
    assert content["ok"] == 10
    assert content["short"] == 1
    prompt_tokens = sum(len(b["prompt"]) for b in fake.bodies[2:])
    assert content["prompt_tokens"] == prompt_tokens
    assert content["prefix_hit"] == round(10 * CACHED / prompt_tokens, 4)
    assert len(content["requests"]) == 10
    assert "TTFT" in out
    for figures in (serve.compare(content, content), out):
        assert "nan" not in figures


def test_a_failed_warm_up_ends_the_run() -> None:
    (code, _, err), fake = run_against(("refused",), "serve.py", "--n", "3", "--warmup", "1")
    assert code == 2
    assert "too busy" in err
    assert len(fake.bodies) == 1


def test_a_server_that_does_not_start_is_named() -> None:
    code, _, err = asyncio.run(
        run_script(str(BENCH / "serve.py"), "--server", "asyncllm --no_such")
    )
    assert code == 2
    assert "exit code 2" in err


def test_a_server_lives_as_long_as_its_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """test_compare.py starts real ones."""
    seen: list[str] = []

    @contextmanager
    def server(arguments: str, url: str) -> Iterator[serve.Started]:
        seen.append(arguments)
        yield serve.Started(1.5, os.getpid())
        seen.append("stopped")

    def measure(a: argparse.Namespace) -> list[Record]:
        seen.append("measured")
        return [record(0.0, 0.1, 0.01)]

    monkeypatch.setattr(serve, "server", server)
    monkeypatch.setattr(serve, "measure", measure)
    file = tmp_path / "a.json"
    figures = serve.bench(options("--server", "asyncllm --x", "--warmup", "0", "--json", str(file)))
    assert seen == ["asyncllm --x", "measured", "stopped"]
    assert json.loads(file.read_text())["start_s"] == figures["start_s"] == 1.5
    assert "server ready after           1.5 s" in serve.table(figures)
