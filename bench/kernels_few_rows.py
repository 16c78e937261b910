"""Products of few rows with quantised weights, one by one: how to build and to divide them.

    python bench/kernels_few_rows.py [--only int4|fp8|wide] [--rows 1 8] [--seconds S] [--out FILE]

Each product of a layer of Llama-3.1-8B alone, in a CUDA graph that goes through several weights, so
that no cache helps: every configuration with every number of parts that its inputs are divided into.
Beside them, as the limit, a kernel that only reads as many bytes. Results are compared with the
reference (the first of each product) or with those of the first configuration; one that is wrong is
not shown. The last lines are the fastest of each product, what a rule for the number of parts
(``num_parts``) makes of each configuration, and shares of the speed of a copy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.engine import quant_torch
from asyncllm.engine.quant_cuda import KernelThresholds, pack_quant
from asyncllm.kernels import autotune
from asyncllm.kernels.autotune import num_sms
from asyncllm.kernels.early import begun, launched_early, let_next, waited
from asyncllm.kernels.quant import parts as division
from asyncllm.kernels.quant.four_bits import FourBitsConfig
from asyncllm.kernels.quant.product import ProductConfig
from asyncllm.kernels.quant.wide import WideConfig
from asyncllm.models.quantization import QuantKind
from bench.kernels import BOUND, in_turn_us, measure_ceiling, randn
from bench.kernels_quant import (
    EXACT,
    FAR_BYTES,
    PRODUCTS,
    THREADS,
    Layer,
    chain_calls,
    distance,
    fused_calls,
    make_weight,
    tuned_calls,
)

Call = Callable[[], object]
KIND: dict[str, QuantKind] = {"int4": "int4_group", "fp8": "fp8_channel", "wide": "fp8_channel"}
PARTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
MOST = 1100  # programs: eight to a multiprocessor


CONFIGS: dict[str, list[Any]] = {
    "int4": [
        *[FourBitsConfig(8, 64, 2, stages, 4) for stages in (3, 4)],
        *[FourBitsConfig(8, 64, 2, 3, 4, early) for early in (128, 256, 512)],
        *[FourBitsConfig(8, 64, 2, 4, 4, early) for early in (128, 256)],
        *[FourBitsConfig(8, 128, 4, 4, 4, early) for early in (0, 256)],
        *[FourBitsConfig(8, 128, 4, 5, 2, early) for early in (256, 1024)],
        *[FourBitsConfig(16, 64, 2, stages, 4) for stages in (3, 4)],
        *[FourBitsConfig(16, 64, 2, 4, 4, 256), FourBitsConfig(16, 128, 4, 4, 4)],
    ],
    "fp8": [
        ProductConfig(16, 64, 256, 4, 4, 1),
        *[ProductConfig(16, 64, 256, 4, 4, per_sm, False, 256) for per_sm in (1, 2)],
        *[ProductConfig(16, 64, 256, 4, 4, 2, False, early) for early in (128, 512)],
        ProductConfig(16, 64, 128, 4, 8, 2, False, 256),
    ],
    "wide": [
        *[WideConfig(8, 64, 128, 4, 5, 3, early) for early in (0, 128, 256)],
        *[WideConfig(8, 64, 256, 4, 3, 4, early) for early in (0, 256)],
    ],
}


@triton.jit
def _read_kernel(words_ptr, out_ptr, num_words, share, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One number of what program i reads, ``share`` words from i * share on; four blocks are on
    their way at once. EARLY 1: begins early and reads when the kernel before has ended; 2: reads
    while that one still runs."""
    if EARLY == 2:
        let_next(True, EARLY)
    else:
        begun(EARLY)
    first = tl.program_id(0).to(tl.int64) * share
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for begin in tl.range(0, share, 4 * BLOCK):
        for block in tl.static_range(4):
            place = begin + block * BLOCK + at
            live = (place < share) & (first + place < num_words)
            total += tl.load(words_ptr + first + place, mask=live, other=0)
    if EARLY == 2:
        waited(EARLY)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def read_calls(num_bytes: int, programs: int, early: int) -> list[Call]:
    """Of the kernel that only reads: as many weights as no cache holds."""
    words = num_bytes // 4
    out = torch.empty(programs, dtype=torch.int32, device="cuda")
    share = triton.cdiv(triton.cdiv(words, programs), 64) * 64
    calls: list[Call] = []
    for _ in range(-(-FAR_BYTES // num_bytes)):
        held = torch.ones(words, dtype=torch.int32, device="cuda")
        calls.append(
            partial(
                _read_kernel[(programs,)],
                held,
                out,
                words,
                share,
                BLOCK=4096,
                EARLY=early,
                num_warps=8,
                **launched_early(early, held),
            )
        )
    return calls


def per_call_us(calls: list[Call]) -> float:
    """Median in graphs so long that their own launch does not count."""
    return in_turn_us(calls, True, max(1, 40 // len(calls)))


def limits(sizes: dict[str, int]) -> dict[str, float]:
    """The least microseconds in which so many bytes were read behind the kernel before, with every
    way to do it shown."""
    least = {}
    for name, num_bytes in sizes.items():
        cells = []
        for programs in (num_sms(torch.device("cuda", 0)) * n for n in (1, 2, 4, 8)):
            for early in (0, 1, 2):
                us = per_call_us(read_calls(num_bytes, programs, early))
                cells.append(
                    (
                        us + 1e6 * (early == 2),
                        f"{programs}{('', ' early', ' ahead')[early]}: {us:.2f}",
                    )
                )
                torch.cuda.empty_cache()
        least[name] = min(cells)[0]
        print(f"  only read {name:8} {num_bytes / 1e6:6.1f} MB, us by programs:", end=" ")
        print("  ".join(text for _, text in cells), flush=True)
    return least


def short(config: Any) -> str:
    return ",".join(str(int(value)) for value in dataclasses.astuple(config))


class Tried:
    """Microseconds of a kind's products by number of rows, configuration and parts."""

    def __init__(self, name: str, rows: list[int]) -> None:
        self.name, self.rows = name, rows
        self.us: dict[tuple[int, str, Any, int], float] = {}
        self.by_rule: dict[tuple[int, str, Any], int] = {}
        self.in_layer: dict[tuple[int, Any], float] = {}
        kind = KIND[name]
        weights, self.wanted = {}, {}
        self.x = {k: randn(max(rows), k) for _, k in PRODUCTS.values()}
        for product, (n, k) in PRODUCTS.items():
            made = make_weight(kind, n, k)
            first = pack_quant(made)
            copies = [
                dataclasses.replace(first, data=first.data.clone())
                for _ in range(1, -(-FAR_BYTES // first.nbytes))
            ]
            weights[product] = [first, *copies]
            bits = {"int4": None, "fp8": made, "wide": None}[name]
            matrix = quant_torch.dequantize(made)
            for num_rows in rows:
                x = self.x[k][:num_rows]
                if bits is None:
                    self.wanted[num_rows, product] = x.float() @ matrix.t()
                else:
                    self.wanted[num_rows, product] = quant_torch.quant_linear(x.float(), made)
            del matrix
        self.layer = Layer(kind, weights)

    def calls(self, product: str, num_rows: int, config: Any) -> tuple[list[Call], Tensor]:
        k = PRODUCTS[product][1]
        return tuned_calls(self.layer, product, self.x[k][:num_rows].contiguous(), config)

    def build(self, config: Any) -> str | None:
        """Why there is no such kernel."""
        torch.cuda.set_device(0)
        try:
            self.calls("out", self.rows[0], config)[0][0]()
        except (OutOfResources, triton.CompilationError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {str(error)[:90]}"
        return None

    def build_all(self, configs: list[Any]) -> list[str | None]:
        """Compiles all in parallel, with divided inputs and without; why there is no such kernel."""
        rule, found = division.num_parts, []
        for parts in (1, 2):
            division.num_parts = lambda *_, parts=parts, **__: parts  # type: ignore[assignment]
            with ThreadPoolExecutor(THREADS) as pool:
                found = list(pool.map(self.build, configs))
        division.num_parts = rule
        torch.cuda.synchronize()
        return found

    def layer_us(self, num_rows: int, config: Any) -> float:
        """Microseconds of a layer without attention, if this were the tuned configuration."""
        key = {"int4": "int4", "fp8": "fp8", "wide": "wide fp8"}[self.name]
        key += " 8" if num_rows <= 8 else " 16"
        table = autotune._read(torch.cuda.get_device_name()).setdefault("quant", {})
        before = table.get(key)
        table[key] = dataclasses.asdict(config)
        ways = KernelThresholds(EXACT if self.name == "wide" else 0, EXACT)
        make = fused_calls if self.name == "fp8" else chain_calls
        calls = [call for turn in range(6) for call in make(self.layer, num_rows, ways, turn)]
        us = per_call_us(calls) * len(calls) / 6
        table.pop(key)
        if before is not None:
            table[key] = before
        return us

    def measure(self, config: Any) -> None:
        for num_rows in self.rows:
            if (num_rows > 8) != (self.name == "int4" and config.rows > 8):
                continue
            self.in_layer[num_rows, config] = self.layer_us(num_rows, config)
            for product, (n, k) in PRODUCTS.items():
                step = getattr(config, "block_k", 256)
                tiles, steps = triton.cdiv(n, config.block_n), triton.cdiv(k, step)
                device = torch.device("cuda", 0)
                tile_size = config.block_n * config.rows
                early = config.early > 0
                ruled = division.num_parts(
                    tiles, tile_size, steps, config.per_sm, device, early=early
                )
                self.by_rule[num_rows, product, config] = ruled
                rule = division.num_parts
                wanted = self.wanted[num_rows, product]
                for parts in sorted({*PARTS, ruled}):
                    if parts > 1 and (parts > steps or tiles * parts > MOST):
                        continue
                    division.num_parts = lambda *_, parts=parts, **__: parts  # type: ignore[assignment]
                    try:
                        calls, out = self.calls(product, num_rows, config)
                        us = per_call_us(calls)
                    finally:
                        division.num_parts = rule
                    error = distance(wanted, out)
                    if not error <= BOUND:
                        print(f"{short(config)} {product} x {parts}: wrong by {error:.1e}")
                        continue
                    self.us[num_rows, product, config, parts] = us

    def show(self, bytes_per_s: float) -> None:
        for num_rows in sorted({num_rows for num_rows, *_ in self.us}):
            total, all_bytes = 0.0, 0
            print(f"\n{self.name}, {num_rows} rows: fastest of each product")
            for product in PRODUCTS:
                num_bytes = self.layer.weights[product][0].nbytes
                found = sorted(
                    (us, short(config), parts)
                    for (m, name, config, parts), us in self.us.items()
                    if (m, name) == (num_rows, product)
                )
                shown = "  ".join(f"{us:.2f} ({c} x{parts})" for us, c, parts in found[:5])
                print(f"  {product:8} copy {num_bytes / bytes_per_s * 1e6:5.2f}  {shown}")
                total, all_bytes = total + found[0][0], all_bytes + num_bytes
            share = all_bytes / bytes_per_s * 1e6 / total
            print(f"  sum of the fastest {total:.1f} us, {share:.0%} of copy")
            table = []
            for config in {config for m, _, config, _ in self.us if m == num_rows}:
                sums, cells, by_rule = 0.0, [], 0.0
                for product in PRODUCTS:
                    times = {
                        parts: us
                        for (m, name, c, parts), us in self.us.items()
                        if (m, name, c) == (num_rows, product, config)
                    }
                    if not times:
                        sums = float("inf")
                        continue
                    best = min(times, key=lambda parts: times[parts])
                    sums += times[best]
                    ruled = self.by_rule[num_rows, product, config]
                    by_rule += times.get(ruled, float("inf"))
                    cells.append(
                        f"{product} x{best} {times[best]:.2f} (x{ruled} {times.get(ruled, 0):.2f})"
                    )
                layer = self.in_layer[num_rows, config]
                table.append((by_rule, sums, layer, short(config), "  ".join(cells)))
            print("  configuration: best parts, by rule, a layer without attention")
            for by_rule, sums, layer, config, cells in sorted(table):
                print(f"  {config:24} {sums:6.1f} {by_rule:6.1f} {layer:6.1f}: {cells}")
        sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=[*CONFIGS], action="append")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--seconds", type=float, default=100, help="when to stop measuring")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    begin = time.monotonic()
    ceiling = measure_ceiling(True)
    print(f"{torch.cuda.get_device_name()}, copy {ceiling.bytes_per_s / 1e12:.2f} TB/s", flush=True)
    numbers: dict[str, float] = {}
    shown_limits: set[str] = set()
    for name in options.only or CONFIGS:
        tried = Tried(name, options.rows)
        sizes = {product: held[0].nbytes for product, held in tried.layer.weights.items()}
        if KIND[name] not in shown_limits:
            shown_limits.add(KIND[name])
            least = limits(sizes)
            total = sum(least.values())
            share = sum(sizes.values()) / ceiling.bytes_per_s * 1e6 / total
            print(f"  {KIND[name]}: reading alone {total:.1f} us, {share:.0%} of copy", flush=True)
        refused = tried.build_all(CONFIGS[name])
        print(f"  built after {time.monotonic() - begin:.0f} s", flush=True)
        for config, why in zip(CONFIGS[name], refused, strict=True):
            if why is not None:
                print(f"{name} {short(config)}: {why}")
            elif time.monotonic() - begin > options.seconds:
                print(f"{name} {short(config)}: not tried, time is over")
            else:
                tried.measure(config)
        tried.show(ceiling.bytes_per_s)
        for (num_rows, product, config, parts), us in tried.us.items():
            numbers[f"{name} {num_rows} {product} {short(config)} x{parts}"] = round(us, 3)
        del tried
        torch.cuda.empty_cache()
        print(f"{time.monotonic() - begin:.0f} s", flush=True)
    if options.out:
        options.out.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
