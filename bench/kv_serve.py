"""K/V formats, or types of weights, beside each other on one machine: slots, by the plan and by filling
them, and loads.

    python bench/mkmodel.py llama31_8b /tmp/m8b
    python bench/kv_serve.py --server "--model_dir /tmp/m8b"
    python bench/kv_serve.py --server "--model_dir /tmp/m8b" --quant_types none fp8w8a8 --fill 0

For each of ``--modes`` one server is started (none: without --mode), or for each of ``--quant_types``. Each load of ``bench/serve.py``
runs once in every server, with the same requests. Then the K/V are filled with prompts that share
nothing, one token each, until ``--fill`` of the slots are taken; the same prompts again must be found
in the prefix cache, all but their last token: what was filled is really there. All is compared with
the first mode. On an H100 with an 8B model it takes about 2 minutes a mode.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from bench import serve
from bench.common import free_port
from bench.figures import Figures
from bench.loads import LOADS, run

MODES = ("none", "triton_int8kv", "triton_fp8kv")
USUAL = ("burst256", "long12k")
FILLED_AT_ONCE = 16  # requests


def metric(url: str, name: str) -> float:
    """Of all groups together."""
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", name + "{"))
    )


def fill(url: str, share: float, length: int, vocab: int) -> Figures:
    """Takes ``share`` of the slots, and asks for the same once more."""
    slots = metric(url, "asyncllm_kv_slots_total")
    num = max(1, int(share * slots / (length + 1)))
    options = f"--n {num} --conc {FILLED_AT_ONCE} --inp {length} --out 1 --vocab {vocab} --warmup 0"
    run(url, options, seed=77)
    held = metric(url, "asyncllm_kv_slots_used") + metric(url, "asyncllm_kv_slots_cached")
    again = run(url, options, seed=77)
    return {"held": held, "asked": num * length, "found": again["prefix_hit"]}


def measure(a: argparse.Namespace, mode: str, port: int) -> Figures:
    """The figures of one server."""
    url = f"http://127.0.0.1:{port}"
    named = "" if mode == "none" else f" --mode {mode.replace('+', ' ')}"
    if a.quant_types:
        named = f" --quant_type {mode}"
    with serve.server(f"{a.server}{named}", url) as ready:
        found: Figures = {
            "ready_s": round(ready.seconds, 1),
            "slots": metric(url, "asyncllm_kv_slots_total"),
        }
        for name in a.loads:
            found[name] = run(url, f"{LOADS[name]} --vocab {a.vocab}", a.seed)["out_tok_s"]
        if a.fill:
            found["fill"] = fill(url, a.fill, a.fill_len, a.vocab)
    return found


def table(found: dict[str, Figures], loads: Sequence[str]) -> str:
    """For people; ratios to the first mode."""
    first = next(iter(found.values()))
    heads = ["K/V", "ready s", "slots", "x", "held when full", "x", "of it found again"]
    heads += [head for load in loads for head in (f"{load} tok/s", "x")]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for mode, now in found.items():
        cells = [mode, f"{now['ready_s']:g}", *_ratio(now["slots"], first["slots"])]
        if "fill" in now:
            cells += _ratio(now["fill"]["held"], first["fill"]["held"])
            cells.append(f"{now['fill']['found']:.2%}")
        else:
            cells += ["-", "-", "-"]
        for load in loads:
            cells += _ratio(now[load], first[load])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(value: float, base: float) -> list[str]:
    return [f"{value:,.0f}", f"{value / base:.3f}"]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    p.add_argument("--server", required=True, metavar="OPTIONS", help="asyncllm's, but these")
    p.add_argument(
        "--modes", nargs="+", default=MODES, metavar="MODE", help="the first is the base"
    )
    p.add_argument(
        "--quant_types",
        nargs="+",
        metavar="TYPE",
        help="in the place of modes; the first is the base",
    )
    p.add_argument("--loads", nargs="*", choices=LOADS, default=USUAL)
    p.add_argument("--fill", type=float, default=0.97, help="share of the slots; 0: not at all")
    p.add_argument("--fill-len", type=int, default=15000, help="tokens of a prompt that fills")
    p.add_argument("--vocab", type=int, default=128000, help="prompt ids are in [1000, VOCAB)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures here, after each mode"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    a, found = parser().parse_args(argv), dict[str, Figures]()
    try:
        for mode in a.quant_types or a.modes:
            found[mode] = measure(a, mode, free_port())
            sys.stderr.write(f"{mode}: {json.dumps(found[mode])}\n")
            if a.json:
                a.json.write_text(json.dumps(found, indent=1) + "\n")
    except (serve.BenchError, OSError) as error:
        sys.stderr.write(f"kv_serve.py: {error}\n")
        return 2
    finally:
        if found:
            print(table(found, a.loads), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
