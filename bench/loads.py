"""All loads by name, once each, in one asyncllm server that is started for it: a table.

    python bench/loads.py --server "--model_dir /tmp/m8b" --json bf16.jsonl

Every load has prompts of its own. Its figures are written when it ends, a line of JSON each, and the
table at the end, whatever ends it; an 8B model on an H200 takes about 200 s.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from bench import serve
from bench.common import free_port
from bench.figures import Figures

# of prompts, lengths, arrivals and the warm-up of a load, which takes several
SEEDS = 1 << 16
# options of serve.py
LOADS = {
    "lat1": "--n 16 --conc 1 --procs 1 --inp 128 --out 128",
    "conc8": "--n 48 --conc 8 --inp 512 --out 256",
    "conc64": "--n 256 --conc 64 --inp 512 --out 256",
    "burst256": "--n 512 --conc 256 --inp 1024 --out 256",
    "sampled256": "--n 512 --conc 256 --inp 1024 --out 256 --temperature 1 --top_p 0.9",
    "rate8": "--n 256 --rate 8 --inp 1024 --out 256",
    "rate16": "--n 512 --rate 16 --inp 1024 --out 256",
    "shared": "--n 512 --conc 128 --inp 2048 --shared 1536 --out 128",
    "long12k": "--n 24 --conc 8 --inp 12000 --out 256",
}


def chosen(words: Iterable[str], option: str) -> dict[str, str]:
    """Options of each load that ``words`` name; a word is NAME, or NAME=OPTIONS for an own load.

    Raises:
        BenchError: a name that is not in the table, or comes twice.
    """
    loads: dict[str, str] = {}
    for word in words:
        name, given, options = word.partition("=")
        if not given and name not in LOADS:
            raise serve.BenchError(f"{option} {name}: one of {', '.join(LOADS)}, or NAME=OPTIONS")
        if name in loads:
            raise serve.BenchError(f"{option} {name} comes twice")
        loads[name] = options if given else LOADS[name]
    return loads


def run(url: str, options: str, seed: int, *more: str, pid: int = 0) -> Figures:
    """A load of ``bench/serve.py`` with ``more`` options.

    Args:
        pid: see ``serve.bench``.

    Raises:
        BenchError: some answers were not good, or had another length than asked.
    """
    words = [*shlex.split(options), *more, "--url", url, "--seed", str(seed)]
    figures = serve.bench(serve.parser().parse_args(words), pid)
    if figures["errors"] or figures["short"]:
        first = f" (the first: {said})" if (said := figures.get("first_error")) else ""
        failed = f"{figures['errors']}, {figures['short']} short answers"
        raise serve.BenchError(f"{options}: {failed}{first}")
    return figures


COLUMNS = {
    "tok/s": ("out_tok_s", ""),
    "TTFT p50": ("ttft_ms", "p50"),
    "p99": ("ttft_ms", "p99"),
    "TPOT p50": ("tpot_ms", "p50"),
    " p99": ("tpot_ms", "p99"),
    "ITL p50": ("itl_ms", "p50"),
    "  p99": ("itl_ms", "p99"),
    "max": ("itl_ms", "max"),
    "CPU us": ("cpu_us", ""),
    "s": ("wall_s", ""),
}


def table(found: Mapping[str, Figures]) -> str:
    """For people; times in milliseconds, CPU of the server's first process per output token."""
    lines = [f"{'load':<12}" + "".join(f"{name:>10}" for name in COLUMNS)]
    for load, figures in found.items():
        cells = [figures[key][part] if part else figures.get(key) for key, part in COLUMNS.values()]
        lines.append(f"{load:<12}" + "".join(f"{serve.number(cell):>10}" for cell in cells))
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = p.add_argument
    add("--server", required=True, metavar="OPTIONS", help="of asyncllm, but host and port")
    add(
        "--loads",
        default=",".join(LOADS),
        metavar="NAME,...",
        help="of the table, or NAME=OPTIONS of serve.py",
    )
    add("--vocab", type=serve.positive, default=128000, help="prompt ids are in [1000, VOCAB)")
    add("--seed", type=int, help="of the first load; without it, another one each time")
    add("--json", type=Path, metavar="FILE", help="append a line for each load")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    a, found, failed = parser().parse_args(argv), dict[str, Figures](), False
    try:
        todo = chosen(a.loads.split(","), "--loads")
        seed = random.SystemRandom().randrange(1 << 32) if a.seed is None else a.seed
        url = f"http://127.0.0.1:{free_port()}"
        with serve.server(a.server, url) as ready:
            sys.stderr.write(f"ready after {ready.seconds:.1f} s, seeds from {seed}\n")
            for i, (name, options) in enumerate(todo.items()):
                words = "--vocab", str(a.vocab)
                try:
                    figures = run(url, options, seed + SEEDS * i, *words, pid=ready.pid)
                except serve.BenchError as error:
                    sys.stderr.write(f"loads.py: {name}: {error}\n")
                    failed = True
                    continue
                found[name] = figures
                sys.stderr.write(f"{name}: {figures['out_tok_s']} output tok/s\n")
                if a.json:
                    line = {"load": name, "server": a.server, "start_s": ready.seconds, **figures}
                    with a.json.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    except (serve.BenchError, OSError) as error:
        sys.stderr.write(f"loads.py: {error}\n")
        failed = True
    finally:
        if found:
            print(table(found), flush=True)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
