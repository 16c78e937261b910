"""Loads by name, and one run of a load in a server: what the benchmarks that compare servers share."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from bench import serve
from bench.figures import Figures

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


def run(url: str, options: str, seed: int, *more: str) -> Figures:
    """A load of ``bench/serve.py`` with ``more`` options.

    Raises:
        BenchError: some answers were not good, or had another length than asked.
    """
    words = [*shlex.split(options), *more, "--url", url, "--seed", str(seed)]
    figures = serve.bench(serve.parser().parse_args(words))
    if figures["errors"] or figures["short"]:
        first = f" (the first: {said})" if (said := figures.get("first_error")) else ""
        failed = f"{figures['errors']}, {figures['short']} short answers"
        raise serve.BenchError(f"{options}: {failed}{first}")
    return figures
