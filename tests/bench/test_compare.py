"""Two servers in turns: who is sent what and when, and what is made of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import compare, loads, serve
from bench.figures import Figures
from bench.mkmodel import write_model
from tests.bench.fake_server import FakeServer, fake_server
from tests.conftest import TINY

SCRIPT = Path(__file__).parents[2] / "bench" / "compare.py"
SMALL = "--n 3 --conc 2 --inp 8 --out 3 --procs 1 --warmup 1"


def figures(rate: float, ttft: float, **changes: Any) -> Figures:
    ms = {"p50": ttft, "p90": ttft, "p99": ttft, "max": ttft}
    whole: Figures = {
        "ok": 3, "errors": {}, "short": 0, "out_tok_s": rate, "total_tok_s": rate, "req_s": 1.0,
        "prefix_hit": None, "ttft_ms": ms, "tpot_ms": ms, "itl_ms": ms, "e2e_ms": ms,
    }  # fmt: skip
    return whole | changes


async def compared(*argv: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCRIPT), *argv,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def between_fakes(
    theirs: tuple[str, ...], *argv: str
) -> tuple[int, str, str, FakeServer, FakeServer]:
    async def scene() -> tuple[int, str, str, FakeServer, FakeServer]:
        async with fake_server() as a, fake_server(*theirs) as b:
            code, out, err = await compared("--ours", a.url, "--theirs", f"{b.url}/", *argv)
            return code, out, err, a, b

    return asyncio.run(scene())


def test_both_get_the_same_prompts_and_no_prompt_comes_twice(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    words = ["--loads", f"one={SMALL},two={SMALL} --rate 500", "--sla", "ttft=60000,e2e=0.000001"]
    code, out, err, ours, theirs = between_fakes((), *words, "--json", str(file))
    assert code == 0, err
    assert len(ours.bodies) == 3 * 2 * 4
    assert sorted(map(str, ours.bodies)) == sorted(map(str, theirs.bodies))
    prompts = {tuple(body["prompt"]) for body in ours.bodies}
    assert len(prompts) == len(ours.bodies)
    assert {body["model"] for body in ours.bodies} == {"fake"}
    found = json.loads(file.read_text())
    assert {len(rounds) for rounds in found["rounds"].values()} == {3}
    for rounds in found["rounds"].values():
        seeds = [[one[side]["work"]["seed"] for side in compare.SIDES] for one in rounds]
        assert all(a == b for a, b in seeds)
    one = found["ratios"]["one"]["out_tok_s"]
    assert 0 < one["least"] <= one["ratio"] <= one["greatest"]
    (lost,) = [line for line in out.splitlines() if line.startswith("two") and "goodput" in line]
    assert lost.split()[2:] == ["0.00", "0.00", "-", "-", "..", "-", "-"]  # nobody keeps 1 ns
    told = [line.split(", ")[1:] for line in err.splitlines() if line.startswith("round")]
    turns = [(side, load.partition(":")[0]) for side, load in told]
    assert turns == [(s, load) for load in ("one", "two") for s in compare.SIDES] * 3


def test_a_repeated_comparison_has_other_prompts_unless_its_seed_is_given() -> None:
    def seed(*argv: str) -> int:
        a = compare.parser().parse_args(["--ours", "http://a", "--theirs", "http://b", *argv])
        compare.check(a)
        return int(a.seed)

    assert seed() != seed()
    assert seed("--seed", "5") == 5


def test_bad_answers_end_it_with_what_there_is() -> None:
    good = ("good",) * 8
    code, out, err, _, _ = between_fakes((*good, "refused"), "--loads", f"x={SMALL} --warmup 0")
    assert code == 2
    assert "theirs, x: " in err
    assert "too busy" in err
    assert "{'http 429': 1}, 0 short answers" in err
    assert out.splitlines()[1].split()[:2] == ["x", "out_tok_s"]  # of the rounds before


def test_ratios_are_of_rounds_and_have_a_spread() -> None:
    rounds = [
        {"ours": figures(100, 20, start_s=3.0), "theirs": figures(50, 10)},
        {"ours": figures(90, 10, start_s=3.0), "theirs": figures(60, 20)},
        {"ours": figures(120, 15, start_s=3.0), "theirs": figures(100, 10)},
        {"ours": figures(1, 1)},  # its other half never came
    ]
    found = compare.ratios(rounds)
    assert found["out_tok_s"] == {
        "ours": 100, "theirs": 60, "ratio": 1.5, "least": 1.2, "greatest": 2.0, "ahead": "ours",
    }  # fmt: skip
    assert found["ttft_ms p50"] == {
        "ours": 15, "theirs": 10, "ratio": 1.5, "least": 0.5, "greatest": 2.0, "ahead": "-",
    }  # fmt: skip
    assert "start_s" not in found  # theirs ran already
    assert compare.ratios([{"ours": figures(1, 2), "theirs": figures(1, 1)}])["ttft_ms p99"][
        "ahead"
    ] == "theirs"  # fmt: skip
    zero = {"ours": figures(5, 1), "theirs": figures(0, 1)}
    assert compare.ratios([zero])["out_tok_s"]["ratio"] is None
    assert compare.ratios([zero])["out_tok_s"]["ahead"] == "ours"
    assert compare.ratios([]) == {}
    header, first, *_ = compare.table({"burst": rounds}).splitlines()
    assert header.split() == [
        "load", "figure", "ours", "theirs", "ours/theirs", "least", "..", "greatest", "ahead",
    ]  # fmt: skip
    assert first.split() == [
        "burst", "out_tok_s", "100.00", "60.00", "1.500", "1.200", "..", "2.000", "ours",
    ]  # fmt: skip


def test_a_command_is_started_for_each_of_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def server(*args: Any) -> Iterator[serve.Started | float]:
        seen.append(f"start {args[0]}")
        yield serve.Started(1.5, 0) if len(args) == 2 else 1.5
        seen.append("stop")

    def run(url: str, options: str, seed: int, *more: str) -> Figures:
        seen.append(options)
        return figures(1, 1)

    monkeypatch.setattr(serve, "server", server)
    monkeypatch.setattr(compare, "foreign", server)
    monkeypatch.setattr(compare, "model_of", lambda url: "m")
    monkeypatch.setattr(loads, "run", run)
    words = ["--ours", "asyncllm --tp 2", "--theirs", "other --port {port}", "--rounds", "2"]
    assert compare.main([*words, "--loads", "rate8,a=--n 1"]) == 0
    each = [loads.LOADS["rate8"], "--n 1", "stop"]
    assert seen == ["start asyncllm --tp 2", *each, "start other --port {port}", *each] * 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--theirs", "vllm serve x"], "--theirs vllm serve x: {port} must be in the command"),
        (["--theirs", ""], "--theirs is empty"),
        (["--theirs", "http://a/"], "http://a twice"),
        (["--theirs", "http://b", "--loads", "nope"], "--loads nope: one of lat1, conc8"),
        (["--theirs", "http://b", "--loads", "lat1,lat1"], "--loads lat1 comes twice"),
        (["--theirs", "http://b", "--vocab", "900"], "--vocab 900 leaves no ids"),
        (["--theirs", "http://b", "--loads", "x=--n 1 --shared 9 --inp 8"], "--shared 9"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_load(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["--ours", "http://a", *argv]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(7)", "ended with exit code 7"),
        ("import threading; threading.Event().wait()", "no answer within 0 s"),
    ],
)
def test_a_command_that_does_not_answer_is_named(code: str, message: str, free_port: int) -> None:
    command = f"{sys.executable} -c '{code}' {{port}}"
    late = 60.0 if "exit" in message else 0.0
    with (
        pytest.raises(serve.BenchError, match=message),
        compare.foreign(command, free_port, late),
    ):
        pass


def test_a_server_that_is_not_there_is_named(free_port: int) -> None:
    url = f"http://127.0.0.1:{free_port}"
    with pytest.raises(serve.BenchError, match=f"{url}/v1/models: .*refused"):
        compare.model_of(url)


@pytest.mark.slow
def test_two_servers_are_started_and_compared(tmp_path: Path) -> None:
    write_model({**TINY, "vocab_size": 1200}, tmp_path / "model")
    options = f"--model_dir {tmp_path / 'model'} --device cpu --max_total_token_num 4096"
    words = ["--ours", f"asyncllm {options} --max_req_total_len 1024", "--theirs"]
    words += [f"{sys.executable} -m asyncllm {options} --max_req_total_len 1024 --port {{port}}"]
    words += ["--loads", f"x={SMALL}", "--rounds", "1", "--vocab", "1200"]
    code, out, err = asyncio.run(compared(*words, "--json", str(tmp_path / "out.json")))
    assert code == 0, err
    found = json.loads((tmp_path / "out.json").read_text())
    for side in compare.SIDES:
        assert found["rounds"]["x"][0][side]["output_tokens"] == 9
    assert found["ratios"]["x"]["start_s"]["ratio"] > 0
    assert out.splitlines()[1].split()[0] == "x"
    assert processes_naming(tmp_path) == []


def processes_naming(path: Path) -> list[str]:
    """Command lines of running processes that have ``path`` in them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(file.read_bytes().decode(errors="replace"))
    return [line for line in found if str(path) in line]
