"""Measure a running OpenAI-compatible server, whichever it is, through /v1/completions.

    python bench/serve.py --n 256 --conc 64 --inp 1024 --out 256 --json a.json --plot a.png
    python bench/serve.py --rate 8 --mix sharegpt-like --sla ttft=200,tpot=20
    python bench/serve.py --server "asyncllm --model_dir /models/x"   # started, measured, stopped
    python bench/serve.py --compare a.json b.json                       # ratios b / a

Prompts are random token ids and every request asks for an exact number of tokens (ignore_eos), so
that all servers do the same work. A table goes to stdout; docs/benchmarking.md explains the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from bench.common import (
    Load,
    Record,
    completion_body,
    in_turn,
    poisson_arrivals,
    random_prompts,
    run_load,
    run_processes,
    split_load,
)
from bench.figures import (
    SHARES,
    TIMES,
    Figures,
    add_sla,
    failure,
    goodput,
    goodput_line,
    requests_table,
    times,
)
from bench.plot import MISSING, Run, available, plot

ROOT = Path(__file__).parents[1]
MIXES = ("fixed", "uniform", "sharegpt-like")
# lognormal: the sigma of log length; the longest is LONGEST times the mean
PROMPT_SIGMA, OUTPUT_SIGMA, SHORTEST, LONGEST = 1.1, 0.9, 4, 8
WORK = (
    "n", "conc", "rate", "mix", "inp", "out", "shared", "heads", "vocab", "temperature", "top_p", "seed",
)  # fmt: skip
WORK_SHOWN = ("n", "conc", "rate", "mix", "inp", "out", "shared")  # above a plot
STOP_S = 60.0


class BenchError(Exception):
    """What the user must change; one line."""


def lengths(mix: str, mean: int, sigma: float, num: int, rng: random.Random) -> list[int]:
    """``num`` token counts around ``mean``.

    "fixed": all ``mean``. "uniform": whole numbers in [mean / 2, 3 mean / 2]. "sharegpt-like":
    lognormal with ``sigma`` and expectation ``mean``, cut to [4, 8 mean]: many short, a long tail.
    """
    if mix == "fixed":
        return [mean] * num
    if mix == "uniform":
        return [rng.randint(max(1, mean // 2), mean + mean // 2) for _ in range(num)]
    mu = math.log(mean) - sigma * sigma / 2
    low, high = min(SHORTEST, mean), LONGEST * mean
    return [min(high, max(low, round(rng.lognormvariate(mu, sigma)))) for _ in range(num)]


def make_load(a: argparse.Namespace) -> Load:
    """Everything that will be sent; a function of the arguments alone."""
    rng = random.Random(a.seed + 2)
    prompt_lens = lengths(a.mix, a.inp, PROMPT_SIGMA, a.n, rng)
    out_lens = lengths(a.mix, a.out, OUTPUT_SIGMA, a.n, rng)
    prompt_lens = [max(a.shared + 1, n) if a.mix != "fixed" else n for n in prompt_lens]
    prompts = random_prompts(prompt_lens, a.vocab, a.seed, a.shared, a.heads)
    sampling = {"temperature": a.temperature, "top_p": a.top_p}
    bodies = [
        completion_body(a.model, prompt, out, **sampling)
        for prompt, out in zip(prompts, out_lens, strict=True)
    ]
    arrivals = poisson_arrivals(a.n, a.rate, a.seed + 1) if a.rate else None
    return Load(in_turn(a.url, a.n), bodies, arrivals, a.conc, a.timeout)


def warm_up(a: argparse.Namespace) -> None:
    """``--warmup`` requests of the same kind with other prompts, not counted.

    Raises:
        BenchError: one of them failed.
    """
    if not a.warmup:
        return
    changed = {"n": a.warmup, "seed": a.seed + 1000, "rate": 0.0, "shared": 0}
    load = make_load(argparse.Namespace(**{**vars(a), **changed}))
    for record in asyncio.run(run_load(load)):
        if not record.ok:
            raise BenchError(f"a warm-up request failed: {record.error or 'no token came'}")


def measure(a: argparse.Namespace) -> list[Record]:
    """Run the load from ``--procs`` processes; records in order of sending."""
    whole = make_load(a)
    parts = split_load(whole, max(1, min(a.procs, a.n if a.rate else a.conc, a.n)))
    return sorted(run_processes(parts), key=lambda record: record.start)


def work(a: argparse.Namespace) -> dict[str, Any]:
    """The options that say what is sent; of --conc and --rate the one that applies."""
    return {name: getattr(a, name) for name in WORK if name != ("conc" if a.rate else "rate")}


def summary(a: argparse.Namespace, records: Sequence[Record]) -> Figures:
    """The figures of one run.

    Rates are over the time from the first request to the last answer, good answers only. A good
    answer has no error, at least one token and the end mark. ``prefix_hit`` is the share of prompt
    tokens that the server says it took from its cache; None: it does not say.
    """
    good = [r for r in records if failure(r) == ""]
    wall = max(r.end for r in records) - min(r.start for r in records)
    num_out, num_prompt = sum(r.num_tokens for r in good), sum(r.prompt_len for r in good)
    figures: Figures = {
        "tag": a.tag,
        "work": work(a),
        "ok": len(good),
        "errors": dict(Counter(kind for r in records if (kind := failure(r)))),
        "first_error": next((r.error for r in records if r.error), ""),
        "short": sum(r.num_tokens != r.asked for r in good),
        "wall_s": round(wall, 3),
        "prompt_tokens": num_prompt,
        "output_tokens": num_out,
        "out_tok_s": round(num_out / wall, 1),
        "total_tok_s": round((num_out + num_prompt) / wall, 1),
        "req_s": round(len(good) / wall, 3),
        "prefix_hit": prefix_hit(good),
    }
    return figures | times(good) | goodput(a.sla, records, wall)


def prefix_hit(records: Sequence[Record]) -> float | None:
    hits = lookups = 0
    for record in records:
        usage = record.usage or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached is not None:
            hits += cached
            lookups += usage.get("prompt_tokens", record.prompt_len)
    return round(hits / lookups, 4) if lookups else None


def table(figures: Figures) -> str:
    """The figures for people."""
    sent = " ".join(f"{k}={v}" for k, v in figures["work"].items())
    lines = [f"{figures['tag']}: {sent}" if figures["tag"] else sent, ""]
    if "start_s" in figures:
        lines.append(f"server ready after    {figures['start_s']:>10.1f} s")
    if "cpu_us" in figures:
        lines.append(f"CPU of the server     {figures['cpu_us']:>10.1f} us per output token")
    lines.append(f"answers               {figures['ok']:>10} in {figures['wall_s']:.1f} s")
    lines += [f"  failed, {kind:<12} {count:>10}" for kind, count in figures["errors"].items()]
    if figures["first_error"]:
        lines.append(f"  the first: {figures['first_error']}")
    if figures["short"]:
        lines.append(f"  of another length than asked {figures['short']:>3}")
    lines.append(f"output                {figures['out_tok_s']:>10.1f} tok/s")
    lines.append(f"prompt and output     {figures['total_tok_s']:>10.1f} tok/s")
    lines.append(f"requests              {figures['req_s']:>10.3f} /s")
    if (hit := figures["prefix_hit"]) is not None:
        lines.append(f"from the prefix cache {hit:>10.1%} of prompt tokens")
    if "sla" in figures:
        lines.append(f"goodput               {goodput_line(figures)}")
    lines += ["", "ms    " + "".join(f"{name:>10}" for name in SHARES)]
    lines += [
        f"{label:<6}" + "".join(f"{number(v):>10}" for v in figures[name].values())
        for name, label in TIMES.items()
    ]
    return "\n".join(lines)


def compare(first: Figures, second: Figures) -> str:
    """Both runs beside each other, with the ratio second / first."""
    lines = []
    if first["work"] != second["work"]:
        names = [k for k in WORK if first["work"].get(k) != second["work"].get(k)]
        lines.append(f"not the same work: {', '.join(names)} differ")
    lines.append(f"{'':<14}{'a':>12}{'b':>12}{'b / a':>9}")
    a, b = flat(first), flat(second)
    for name in (name for name in a if name in b):
        x, y = a[name], b[name]
        ratio = "-" if x is None or y is None or x == 0 else f"{y / x:.3f}"
        lines.append(f"{name:<14}{number(x):>12}{number(y):>12}{ratio:>9}")
    return "\n".join(lines)


def flat(figures: Figures) -> dict[str, float | None]:
    """The figures that can be compared, times as "ttft_ms p50"."""
    names = ("ok", "out_tok_s", "total_tok_s", "req_s", "goodput_req_s", "prefix_hit", "start_s")
    out: dict[str, float | None] = {n: figures[n] for n in names if n in figures}
    for name in TIMES:
        out |= {f"{name} {share}": value for share, value in figures[name].items()}
    return out


def number(value: float | None) -> str:
    """For a column; "-" where there is none."""
    return "-" if value is None else f"{value:g}" if isinstance(value, int) else f"{value:.2f}"


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def running(
    command: Sequence[str], environment: dict[str, str], stdout: int
) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the time of the block; what it started goes with it, also after SIGTERM."""
    before = signal.signal(signal.SIGTERM, _leave)
    process = subprocess.Popen(command, env=environment, stdout=stdout, start_new_session=True)
    try:
        yield process
    finally:
        signal.signal(signal.SIGTERM, before)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):  # there is nothing left of its session
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


class Started(NamedTuple):
    """A server that is ready."""

    seconds: float  # that it took
    pid: int  # of its first process


@contextlib.contextmanager
def server(arguments: str, url: str) -> Iterator[Started]:
    """An asyncllm server with ``arguments`` on ``url`` for the time of the block.

    Its log goes to this process's stderr.

    Raises:
        BenchError: it ended before it was ready.
    """
    where = urlsplit(url)
    listen = ["--host", where.hostname or "127.0.0.1", "--port", str(where.port or 80)]
    words = shlex.split(arguments)
    command = [sys.executable, "-m", "asyncllm", *words[words[:1] == ["asyncllm"] :], *listen]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    begin = time.perf_counter()
    with running(command, environment, subprocess.PIPE) as process:
        assert process.stdout is not None
        if b"ready" not in process.stdout.readline():  # its one line, or the end of its output
            raise BenchError(f"the server ended with exit code {process.wait(STOP_S)}")
        yield Started(time.perf_counter() - begin, process.pid)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = p.add_argument
    add("--url", default="http://127.0.0.1:8000", help="several, with commas: in turn")
    add("--model", default="default", help="name sent with every request")
    add("--n", type=positive, default=256, help="requests")
    add("--conc", type=positive, default=64, help="closed loop: requests in flight")
    add("--rate", type=float, default=0.0, help="requests/s, Poisson, instead of the closed loop")
    add("--inp", type=positive, default=1024, help="prompt tokens; their mean in a mix")
    add("--out", type=positive, default=256, help="output tokens; their mean in a mix")
    add("--mix", choices=MIXES, default="fixed", help="how lengths are drawn")
    add("--shared", type=int, default=0, help="prompt tokens that all requests begin with")
    add("--heads", type=positive, default=1, help="such beginnings, one drawn for each request")
    add("--vocab", type=positive, default=128000, help="prompt ids are in [1000, VOCAB)")
    add("--temperature", type=float, default=0.0)
    add("--top_p", type=float, default=1.0)
    add("--seed", type=int, default=0, help="of lengths, prompts and arrivals")
    add("--warmup", type=int, default=4, help="requests before, not counted")
    add("--procs", type=positive, default=6, help="client processes")
    add("--timeout", type=float, default=300.0, help="seconds, per request")
    add_sla(p)
    add("--tag", default="", help="copied into the result")
    add("--json", type=Path, metavar="FILE", help="write figures and every request here")
    add("--plot", type=Path, metavar="FILE", help="write a PNG here (needs matplotlib)")
    add("--server", metavar="COMMAND", help='"asyncllm ..." to start at --url and stop afterwards')
    add(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="compare two --json files, no load",
    )
    return p


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def check(a: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before any load.

    Raises:
        BenchError: options that contradict each other, or no matplotlib for ``--plot``.
    """
    if a.mix == "fixed" and a.shared > a.inp:
        raise BenchError(f"--shared {a.shared} is more than --inp {a.inp}")
    if a.vocab <= 1000:
        raise BenchError(f"--vocab {a.vocab} leaves no ids: prompts are drawn from [1000, VOCAB)")
    if a.rate < 0:
        raise BenchError(f"--rate {a.rate:g} is negative")
    if a.plot and not available():
        raise BenchError(MISSING)


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process so far, of user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bench(a: argparse.Namespace, pid: int = 0) -> Figures:
    """Warm up, run the load, write the files; the figures.

    Args:
        pid: of the server's first process, for ``cpu_us``: its CPU time per output token; 0: that
            of ``--server``, if any.

    Raises:
        BenchError: the server did not start, or failed a warm-up request.
    """
    with contextlib.ExitStack() as stack:
        ready = None
        if a.server is not None:
            ready = stack.enter_context(server(a.server, a.url))
            pid = ready.pid
        warm_up(a)
        before = cpu_s(pid) if pid else 0.0
        records = measure(a)
        spent = cpu_s(pid) - before if pid else 0.0
    figures = summary(a, records)
    if pid and figures["output_tokens"]:
        figures["cpu_us"] = round(1e6 * spent / figures["output_tokens"], 1)
    if ready is not None:
        figures["start_s"] = round(ready.seconds, 2)
    requests = requests_table(records, a.sla)
    if a.json:
        a.json.write_text(json.dumps({**figures, "requests": requests}, indent=1) + "\n")
    if a.plot:
        shown = " ".join(f"{k}={v}" for k, v in work(a).items() if k in WORK_SHOWN)
        title = f"{a.tag} {shown}\n{figures['out_tok_s']} output tok/s".strip()
        if a.sla:
            title += f", goodput {goodput_line(figures).strip()}"
        gaps = [1e3 * gap for r in records for gap in r.gaps_s]
        plot(a.plot, title, {"": Run(requests, gaps, figures["wall_s"])}, a.sla)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    try:
        if a.compare:
            first, second = (json.loads(path.read_text()) for path in a.compare)
            print(compare(first, second))
            return 0
        check(a)
        figures = bench(a)
    except (BenchError, OSError) as error:
        sys.stderr.write(f"serve.py: {error}\n")
        return 2
    print(table(figures), flush=True)
    return 1 if figures["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
