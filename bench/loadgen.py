"""Load on an OpenAI-compatible /v1/completions server, as one line of JSON: the yardstick.

    python bench/loadgen.py --url http://127.0.0.1:8000 --n 512 --conc 256 --inp 1024 --out 512

Server-neutral: every server gets the same bytes. Prompts are token ids, and each request asks for
exactly ``--out`` tokens (ignore_eos), so output tokens are known and checked against ``usage``.
Client work is spread over processes, so that the client is not what is measured.
``bench/serve.py`` can do more; the figures that are compared over time come from here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from bench.common import (
    Load,
    Record,
    completion_body,
    in_turn,
    percentile,
    poisson_arrivals,
    random_prompts,
    run_processes,
    split_load,
)

P50_P90_P99 = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
P50_P99_MAX = {"p50": 0.5, "p99": 0.99, "max": 1.0}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--url", default="http://127.0.0.1:8000")
    p.add_argument("--model", default="default")
    p.add_argument("--n", type=int, default=256, help="requests")
    p.add_argument("--conc", type=int, default=64, help="requests in flight, over all processes")
    p.add_argument(
        "--rate", type=float, default=0, help="requests/s, Poisson; 0 = closed loop at --conc"
    )
    p.add_argument("--inp", type=int, default=1024, help="prompt tokens")
    p.add_argument("--out", type=int, default=256, help="output tokens")
    p.add_argument("--shared", type=int, default=0, help="prompt tokens that all requests share")
    p.add_argument("--vocab", type=int, default=128000, help="prompt ids are in [1000, VOCAB)")
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--top_p", type=float, default=1.0)
    p.add_argument("--procs", type=int, default=6, help="client processes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--timeout", type=float, default=300, help="seconds, per request")
    p.add_argument("--tag", default="", help="copied into the result")
    return p


def run(a: argparse.Namespace) -> list[Record]:
    """Send the whole load."""
    num_procs = max(1, min(a.procs, a.n if a.rate else a.conc))
    prompts = random_prompts([a.inp] * a.n, a.vocab, a.seed, a.shared)
    sampling = {"temperature": a.temperature, "top_p": a.top_p}
    bodies = [completion_body(a.model, prompt, a.out, **sampling) for prompt in prompts]
    arrivals = poisson_arrivals(a.n, a.rate, a.seed + 1) if a.rate else None
    load = Load(in_turn(a.url, len(bodies)), bodies, arrivals, a.conc, a.timeout)
    return run_processes(split_load(load, num_procs, exact=False))


def result(a: argparse.Namespace, records: Sequence[Record]) -> dict[str, Any]:
    """The figures of one run; rates are over the time from the first request to the last answer."""
    good = [r for r in records if r.ok]
    errors = [r.error for r in records if r.kind]
    wall = max(r.end for r in records) - min(r.start for r in records)
    num_tokens = sum(r.num_tokens for r in good)
    return {
        **{name: getattr(a, name) for name in ("tag", "n", "conc", "rate", "inp", "out", "shared")},
        "ok": len(good),
        "errors": len(errors),
        "wall_s": round(wall, 3),
        "out_tok_s": round(num_tokens / wall, 1),
        "total_tok_s": round((num_tokens + a.inp * len(good)) / wall, 1),
        "req_s": round(len(good) / wall, 3),
        "short": sum(r.num_tokens != a.out for r in good),
        "ttft_ms": _ms([r.ttft_s for r in good], P50_P90_P99, 1),
        "tpot_ms": _ms([r.tpot_s for r in good], P50_P90_P99, 2),
        "itl_ms": _ms([gap for r in good for gap in r.gaps_s], P50_P99_MAX, 2),
        "err0": errors[:1],
    }


def _ms(seconds: Sequence[float], shares: dict[str, float], digits: int) -> dict[str, float | None]:
    if not seconds:  # NaN is not JSON
        return dict.fromkeys(shares)
    return {k: round(1e3 * percentile(seconds, share), digits) for k, share in shares.items()}


def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    figures = result(a, run(a))
    print(json.dumps(figures), flush=True)
    return 1 if figures["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
