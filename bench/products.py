"""Time of the products of mixed steps by their number of rows: which sizes of graphs pay.

    python bench/products.py --rows 512,528,576,1024,1040,1088 [--json FILE]

torch.mm in bf16 with the shapes of one layer of Llama-3.1-8B, weights in turn from copies that no
cache holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.kernels import in_turn_us, randn

SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = ",".join(map(str, [*range(64, 1152, 16), *range(1152, 2368, 64)]))
COPIES_BYTES = 200e6  # more than any L2


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--rows", default=ROWS)
    p.add_argument("--json", type=Path, metavar="FILE")
    a = p.parse_args(argv)
    weights = {}
    for name, (n_out, n_in) in SHAPES.items():
        copies = max(2, round(COPIES_BYTES / (2 * n_out * n_in)) + 1)
        weights[name] = [randn(n_out, n_in) for _ in range(copies)]
    found: dict[int, dict[str, float]] = {}
    print("rows  " + "".join(f"{name:>10}" for name in SHAPES) + "  layer us  us a row")
    for num in map(int, a.rows.split(",")):
        us = found[num] = {}
        for name, (n_out, n_in) in SHAPES.items():
            x, out = randn(num, n_in), randn(num, n_out)
            calls = [partial(torch.mm, x, weight.t(), out=out) for weight in weights[name]]
            us[name] = round(in_turn_us(calls, quick=True), 1)
        total = sum(us.values())
        cells = "".join(f"{value:>10.1f}" for value in us.values())
        print(f"{num:<6}{cells}{total:>10.1f}{total / num:>10.3f}", flush=True)
    if a.json:
        a.json.write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
