"""The same loads against two OpenAI-compatible servers, in turns; ratios with their spread.

    python bench/compare.py --ours http://127.0.0.1:8000 --theirs http://127.0.0.1:8001
    python bench/compare.py --ours "asyncllm --model_dir /tmp/m8b" \\
        --theirs "vllm serve /tmp/m8b --port {port}" --loads lat1,burst256 --sla ttft=200,tpot=12

A server is a URL, or a command that is started for its turn and stopped after it: one that begins
with "asyncllm" is this source tree's, any other takes its port from ``{port}``. Runs take turns
(ours, theirs, ours, theirs, ...): load by load where both servers run already, else all loads of a
server that has been started. Both get the same prompts in a round, which no other round has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from bench import loads, serve
from bench.common import free_port
from bench.figures import Figures, add_sla

SIDES = ("ours", "theirs")
USUAL = "lat1,burst256"
# figures of the table; the file has all
SHOWN = (
    "start_s", "out_tok_s", "req_s", "goodput_req_s", "ttft_ms p50", "ttft_ms p99", "tpot_ms p50",
    "tpot_ms p99", "itl_ms p99", "e2e_ms p50",
)  # fmt: skip
MORE_IS_BETTER = {"ok", "out_tok_s", "total_tok_s", "req_s", "goodput_req_s", "prefix_hit"}
SEEDS = 1 << 16  # between runs: a run takes several, of prompts, lengths, arrivals and its warm-up
POLL_S, ASK_S = 0.2, 5.0
STDERR = 2
Round = dict[str, Figures]  # figures of one load in one round, by side


def is_url(server: str) -> bool:
    return server.startswith(("http://", "https://"))


def model_of(url: str) -> str:
    """The name of the first model of a server.

    Raises:
        BenchError: it does not answer, or its answer is no list of models.
    """
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=ASK_S) as reply:
            return str(json.load(reply)["data"][0]["id"])
    except (OSError, HTTPException) as error:
        raise serve.BenchError(f"{url}/v1/models: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise serve.BenchError(f"{url}/v1/models names no model") from None


@contextlib.contextmanager
def foreign(command: str, port: int, timeout_s: float) -> Iterator[float]:
    """Any server that listens on ``port``, for the time of the block; the seconds until it answered.

    It answers when ``/v1/models`` does. Its output goes to this process's stderr.

    Raises:
        BenchError: it ended before, or did not answer in time.
    """
    words = [word.replace("{port}", str(port)) for word in shlex.split(command)]
    begin = time.perf_counter()
    with serve.running(words, {**os.environ}, STDERR) as process:
        while True:
            with contextlib.suppress(serve.BenchError):
                model_of(f"http://127.0.0.1:{port}")
                break
            if (code := process.poll()) is not None:
                raise serve.BenchError(f"{command}: it ended with exit code {code}")
            if time.perf_counter() - begin > timeout_s:
                raise serve.BenchError(f"{command}: no answer within {timeout_s:g} s")
            time.sleep(POLL_S)
        yield time.perf_counter() - begin


@contextlib.contextmanager
def opened(server: str, timeout_s: float) -> Iterator[tuple[str, float | None]]:
    """Its URL, and the seconds that it took to start where it had to, for the time of the block."""
    if is_url(server):
        yield server.rstrip("/"), None
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    if shlex.split(server)[0] == "asyncllm":
        with serve.server(server, url) as ready:
            yield url, ready.seconds
        return
    with foreign(server, port, timeout_s) as start_s:
        yield url, start_s


def turn(a: argparse.Namespace, side: str, names: Sequence[str], number: int) -> dict[str, Figures]:
    """Some loads, once each, in the server of one side.

    Raises:
        BenchError: the server did not start, or some answers were not good.
    """
    found: dict[str, Figures] = {}
    with opened(getattr(a, side), a.start_timeout) as (url, start_s):
        model = model_of(url)
        more = ["--vocab", str(a.vocab), "--model", model]
        if a.sla:
            more += ["--sla", ",".join(f"{name}={limit:g}" for name, limit in a.sla.items())]
        for name in names:
            run = number * len(a.loads) + [*a.loads].index(name)
            try:
                figures = loads.run(url, a.loads[name], a.seed + SEEDS * run, *more)
            except serve.BenchError as error:
                raise serve.BenchError(f"{side}, {name}: {error}") from None
            found[name] = figures | ({} if start_s is None else {"start_s": round(start_s, 2)})
            rate = figures["out_tok_s"]
            sys.stderr.write(f"round {number + 1}, {side}, {name}: {rate} output tok/s\n")
    return found


def measure(a: argparse.Namespace, rounds: Mapping[str, list[Round]]) -> None:
    """All turns; ``rounds`` (by load) is filled as they end, and ``--json`` is kept up to date.

    Raises:
        BenchError: what the user must change.
    """
    started = not (is_url(a.ours) and is_url(a.theirs))
    groups = [[*a.loads]] if started else [[name] for name in a.loads]
    for number in range(a.rounds):
        for names in groups:
            for name in names:
                rounds[name].append({})
            for side in SIDES:
                for name, figures in turn(a, side, names, number).items():
                    rounds[name][-1][side] = figures
                if a.json:
                    a.json.write_text(json.dumps(content(a, rounds), indent=1) + "\n")


def ratios(rounds: Sequence[Round]) -> dict[str, Figures]:
    """Of each figure of a load: both medians, and the median, least and greatest ratio of a round.

    The ratio is ours / theirs within a round; None where theirs was 0 in one. "ahead" is the side
    that was better in every round, "-" where neither was. Rounds without both sides are left out,
    and figures that a side did not measure in one of them.
    """
    both = [[serve.flat(one[side]) for side in SIDES] for one in rounds if len(one) == len(SIDES)]
    out: dict[str, Figures] = {}
    for name in both[0][0] if both else ():
        pairs = [(ours.get(name), theirs.get(name)) for ours, theirs in both]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        if len(known) < len(pairs):
            continue
        each = [x / y for x, y in known if y]
        three = (statistics.median(each), min(each), max(each)) if len(each) == len(known) else None
        spread = [round(one, 4) for one in three] if three else [None] * 3
        out[name] = {
            "ours": statistics.median(x for x, _ in known),
            "theirs": statistics.median(y for _, y in known),
            **dict(zip(("ratio", "least", "greatest"), spread, strict=True)),
            "ahead": ahead(name, known),
        }
    return out


def ahead(name: str, pairs: Sequence[tuple[float, float]]) -> str:
    """The side whose figure was the better one in each pair; "-": neither was."""
    more, less = all(x > y for x, y in pairs), all(x < y for x, y in pairs)
    if not more and not less:
        return "-"
    return SIDES[more != (name in MORE_IS_BETTER)]


def content(a: argparse.Namespace, rounds: Mapping[str, Sequence[Round]]) -> dict[str, Any]:
    """Everything, for the file."""
    return {
        "ours": a.ours,
        "theirs": a.theirs,
        "seed": a.seed,
        "vocab": a.vocab,
        "sla": a.sla,
        "loads": a.loads,
        "ratios": {name: ratios(found) for name, found in rounds.items()},
        "rounds": rounds,
    }


def table(rounds: Mapping[str, Sequence[Round]]) -> str:
    """For people."""
    width = max(map(len, [*rounds, "load"])) + 2
    lines = [
        f"{'load':<{width}}{'figure':<15}{'ours':>12}{'theirs':>12}{'ours/theirs':>13}"
        f"{'least .. greatest':>20}  ahead"
    ]
    for load, found in rounds.items():
        for name, one in ratios(found).items():
            if name in SHOWN:
                ratio, low, high = (
                    "-" if one[key] is None else f"{one[key]:.3f}"
                    for key in ("ratio", "least", "greatest")
                )
                lines.append(
                    f"{load:<{width}}{name:<15}{one['ours']:>12.2f}{one['theirs']:>12.2f}"
                    f"{ratio:>13}{f'{low} .. {high}':>20}  {one['ahead']}"
                )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = p.add_argument
    add("--ours", required=True, metavar="URL|COMMAND")
    add("--theirs", required=True, metavar="URL|COMMAND", help="of a command: {port} is its port")
    add(
        "--loads",
        default=USUAL,
        metavar="NAME,...",
        help=f"of {', '.join(loads.LOADS)}, or NAME=OPTIONS of serve.py",
    )
    add("--rounds", type=serve.positive, default=3)
    add("--vocab", type=serve.positive, default=128000, help="prompt ids are in [1000, VOCAB)")
    add("--seed", type=int, help="of all prompts; without it, another one each time")
    add("--start-timeout", type=float, default=600.0, help="seconds until a command answers")
    add("--json", type=Path, metavar="FILE", help="write all figures here, after each turn")
    add_sla(p)
    return p


def check(a: argparse.Namespace) -> None:
    """Refuse what cannot be compared, before any load; ``a.loads`` becomes options by name.

    Raises:
        BenchError: what the user must change.
    """
    a.loads = loads.chosen(a.loads.split(","), "--loads")
    for options in a.loads.values():
        serve.check(serve.parser().parse_args([*shlex.split(options), "--vocab", str(a.vocab)]))
    if is_url(a.ours) and a.ours.rstrip("/") == a.theirs.rstrip("/"):
        raise serve.BenchError(f"{a.ours} twice: the second run would find the first one's prompts")
    for side in SIDES:
        words = shlex.split(getattr(a, side))
        if not words:
            raise serve.BenchError(f"--{side} is empty: a URL or a command")
        if not is_url(words[0]) and words[0] != "asyncllm" and "{port}" not in getattr(a, side):
            raise serve.BenchError(f"--{side} {getattr(a, side)}: {{port}} must be in the command")
    if a.seed is None:
        a.seed = random.SystemRandom().randrange(1 << 32)


def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    rounds: dict[str, list[Round]] = {}
    try:
        check(a)
        sys.stderr.write(f"--seed {a.seed}\n")
        rounds |= {name: [] for name in a.loads}
        measure(a, rounds)
    except (serve.BenchError, OSError) as error:
        sys.stderr.write(f"compare.py: {error}\n")
        return 2
    finally:
        if any(len(one) == len(SIDES) for found in rounds.values() for one in found):
            print(table(rounds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
