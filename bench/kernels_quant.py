"""Time of products with quantised weights on a CUDA device, beside what the device can do.

    python bench/kernels_quant.py [--quick] [--only KIND] [--config FILE] [--out FOLDER]
    python bench/kernels_quant.py --tune [--only KIND] [--seconds S] [--config FILE] [--out FOLDER]

The four products of a layer of Llama-3.1-8B, each in a CUDA graph that goes through several weights,
so that no cache helps. No number is printed while a kernel disagrees with its reference. Ceilings
are those of the same run: bytes of the weights by the speed of a copy, or operations by the speed
of a large product in 16 bits. The last tables have a layer without its attention, norms and activation
included, and the sum of the four products, for each number of rows; ``--out`` gets every number as
JSON, and ``--config`` up to how many rows which kernel is the fastest. ``--tune`` tries configurations of the kernels of a kind
instead, class by class, the likeliest first; the best go into ``--config``, a file of the form of
asyncllm/kernels/configs/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.engine import quant_torch
from asyncllm.engine.ops_cuda import TritonOps
from asyncllm.engine.quant_cuda import KernelThresholds, pack_quant, quant_linear, ways_of
from asyncllm.kernels import autotune
from asyncllm.kernels.gated import gated
from asyncllm.kernels.quant import four_bits as bits
from asyncllm.kernels.quant import product as own
from asyncllm.kernels.quant import wide as widened
from asyncllm.kernels.quant.rows import (
    gated_rows,
    gated_rows_ref,
    quantize_rows,
    quantize_rows_ref,
    rmsnorm_rows,
    rmsnorm_rows_ref,
)
from asyncllm.kernels.rmsnorm import add_rmsnorm
from asyncllm.models.quantization import ROW_FORMS, QuantKind, QuantWeight
from bench.kernels import BOUND, Ceiling, in_turn_us, measure_ceiling, merge_into, randn

PRODUCTS = {
    "qkv": (6144, 4096),
    "out": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096)
KINDS: tuple[QuantKind, ...] = ("fp8_channel", "int4_group", "int8_channel", "fp8_block")
FAR_BYTES = 150_000_000  # of weights that a graph goes through: three times the L2 cache
CHAIN_ROWS = (1, 8, 16, 64, 128, 256)
THREADS = 12
EXACT = 1 << 30
Call = Callable[[], object]
WITHOUT_LIBRARY: set[str] = set()


def make_weight(kind: QuantKind, n: int, k: int) -> QuantWeight:
    """A random one, in the layout of the checkpoint."""
    zeros = None
    if kind == "int4_group":
        data = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = (torch.rand(k // 128, n, device="cuda") / 100).bfloat16()
        zeros = torch.randint(0, 17, scales.shape, device="cuda").bfloat16()
        return QuantWeight(kind, data, scales, zeros, 128, n, k)
    kind8 = torch.int8 if kind == "int8_channel" else torch.float8_e4m3fn
    data, scales = quantize_rows_ref(randn(n, k) / k**0.5, kind8)
    if kind == "fp8_block":
        scales = torch.rand(-(-n // 128), -(-k // 128), device="cuda") / 448
    return QuantWeight(kind, data, scales, zeros, 128 if kind == "fp8_block" else k, n, k)


def median_us(calls: Sequence[Call], quick: bool) -> float:
    """Median time per call, in graphs that are long enough."""
    return in_turn_us(calls, quick, max(1, 12 // len(calls)))


def distance(want: Tensor, got: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def without_library(kinds: Iterable[QuantKind]) -> set[str]:
    """Kinds whose product torch should have, and has not here or not the same."""
    missing = set()
    for kind in kinds:
        held, x = make_weight(kind, 512, 1024), randn(64, 1024)
        want = quant_torch.quant_linear(x.float(), held)
        try:
            error = distance(want, quant_linear(x, pack_quant(held), ways=KernelThresholds(0, 0)))
        except (RuntimeError, ValueError) as refused:
            print(f"{kind}: not by the library: {str(refused)[:200]}")
            missing.add(str(kind))
        else:
            if not error <= BOUND:
                print(f"{kind}: the library's product is {error:.1e} away")
                missing.add(str(kind))
    return missing


def wrong_kernels(kinds: Iterable[QuantKind]) -> list[str]:
    """Names of kernels that differ from their reference, with the error. Prints how far results are
    from products with the weights as they are, in float64."""
    found: list[str] = []

    def compare(name: str, want: Tensor, got: Tensor, bound: float = BOUND) -> None:
        error = distance(want, got)
        if not error <= bound:
            found.append(f"{name}: relative error {error:.1e}")

    x, weight = randn(37, 4096), randn(4096)
    for kind8, blocked in (
        (torch.float8_e4m3fn, False),
        (torch.float8_e4m3fn, True),
        (torch.int8, False),
    ):
        for name, got, want in (
            ("rows", quantize_rows, quantize_rows_ref),
            ("norm", rmsnorm_rows, rmsnorm_rows_ref),
            ("gated", gated_rows, gated_rows_ref),
        ):
            args = {"norm": (weight, 1e-5), "gated": ("silu",)}.get(name, ())
            made, wanted = (f(x, *args, kind8, blocked=blocked) for f in (got, want))
            for part in (0, 1):
                compare(f"{name} {kind8} {blocked}", wanted[part].float(), made[part].float())
    for kind in kinds:
        shown = []
        for num_rows in (1, 8, 13, 30, 60, 120, 250, 700):
            held = make_weight(kind, 1100, 1536)  # whole blocks of 16 only
            held = dataclasses.replace(held, out_features=1088, data=held.data[:1088])
            held = dataclasses.replace(held, scales=_rows_of(held, 1088))
            if held.zeros is not None:
                held = dataclasses.replace(held, zeros=held.zeros[:, :1088].contiguous())
            x = randn(num_rows, 1536)
            packed = pack_quant(held)
            exact = x.double() @ quant_torch.dequantize(held).double().t()
            rounded = quant_torch.quant_linear(x.float(), held)
            for name, ways in (
                ("own", KernelThresholds(0, EXACT)),
                ("library", KernelThresholds(0, 0)),
                ("wide", KernelThresholds(EXACT, EXACT)),
            ):
                unknown = name == "library" and kind in WITHOUT_LIBRARY
                if (kind == "int4_group" and name == "wide") or unknown:
                    continue
                made = quant_linear(x, packed, ways=ways)
                want = exact if name == "wide" else rounded
                compare(f"{kind} {name}, {num_rows} rows", want, made)
                if num_rows in (1, 700):
                    shown.append(f"{name} {num_rows}: {distance(exact, made):.1e}")
        print(f"{kind}, distance from float64: " + "  ".join(shown), flush=True)
    return found


def _rows_of(weight: QuantWeight, n: int) -> Tensor:
    if weight.kind == "int4_group":
        return weight.scales[:, :n].contiguous()
    return weight.scales[: -(-n // 128) if weight.kind == "fp8_block" else n]


@dataclass(frozen=True)
class Layer:
    """Weights of a kind: of each product as many as no cache holds."""

    kind: str
    weights: dict[str, list[Any]]

    @property
    def num_bytes(self) -> dict[str, int]:
        return {name: held[0].nbytes for name, held in self.weights.items()}


def make_layer(kind: QuantKind | None) -> Layer:
    """``kind`` None: in 16 bits."""
    weights: dict[str, list[Any]] = {}
    for name, (n, k) in PRODUCTS.items():
        first = randn(n, k) if kind is None else pack_quant(make_weight(kind, n, k))
        copies = -(-FAR_BYTES // first.nbytes)
        weights[name] = [first]
        for _ in range(copies - 1):
            if isinstance(first, Tensor):
                weights[name].append(first.clone())
            else:
                weights[name].append(dataclasses.replace(first, data=first.data.clone()))
    return Layer(kind or "bf16", weights)


def linear_calls(layer: Layer, name: str, x: Tensor, ways: KernelThresholds | None) -> list[Call]:
    out = torch.empty(len(x), PRODUCTS[name][0], dtype=x.dtype, device=x.device)
    if layer.kind == "bf16":
        return [partial(torch.mm, x, w.t(), out=out) for w in layer.weights[name]]
    return [partial(quant_linear, x, w, out=out, ways=ways) for w in layer.weights[name]]


def product_calls(layer: Layer, name: str, x: Tensor, fast: bool = True) -> list[Call]:
    """Without what brings rows to 8 bits: our product, or the library's."""
    out = torch.empty(len(x), PRODUCTS[name][0], dtype=x.dtype, device=x.device)
    calls: list[Call] = []
    for weight in layer.weights[name]:
        values, scales = quantize_rows(x, weight.data.dtype, blocked=layer.kind == "fp8_block")
        if fast:
            calls.append(partial(own.product, values, scales, weight.data, weight.scales, out=out))
        else:
            calls.append(
                partial(
                    torch._scaled_mm,
                    values,
                    weight.data.t(),
                    scales[:, None],
                    weight.scales[None, :],
                    out_dtype=x.dtype,
                    use_fast_accum=True,
                    out=out,
                )
            )
    return calls


def ways_for(kind: str, num_rows: int) -> dict[str, KernelThresholds]:
    """What is worth a measurement."""
    if kind == "int4_group":
        found = {"own": KernelThresholds(0, EXACT)}
        if num_rows >= 64:
            found["library"] = KernelThresholds(0, 0)
        return found if num_rows <= 1024 else {"library": KernelThresholds(0, 0)}
    found = {"own": KernelThresholds(0, EXACT)}
    if num_rows <= 32:
        found["wide"] = KernelThresholds(EXACT, EXACT)
    library = kind in ("fp8_channel", "fp8_block") and kind not in WITHOUT_LIBRARY
    if library and num_rows >= 64:
        found["library"] = KernelThresholds(0, 0)
    return found


def build_all(calls: Iterable[Call]) -> None:
    """Compiles in parallel what the calls need."""

    def run(call: Call) -> None:
        torch.cuda.set_device(0)
        call()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, calls))
    torch.cuda.synchronize()


def measure(kinds: Iterable[QuantKind], quick: bool) -> dict[str, dict[str, dict[str, float]]]:
    """ "kind way" -> number of rows -> product -> microseconds."""
    found: dict[str, dict[str, dict[str, float]]] = {}

    def note(key: str, num_rows: int, name: str, calls: Sequence[Call]) -> None:
        us = median_us(calls, quick)
        found.setdefault(key, {}).setdefault(str(num_rows), {})[name] = round(us, 2)

    for kind in (None, *kinds):
        layer = make_layer(kind)
        x = randn(max(ROWS), max(k for _, k in PRODUCTS.values()))
        if kind is not None:
            build_all(
                linear_calls(layer, name, x[:num_rows, :k].contiguous(), ways)[0]
                for name, (_, k) in PRODUCTS.items()
                for num_rows in ROWS
                for ways in ways_for(kind, num_rows).values()
            )
        for num_rows in ROWS:
            for name, (_, k) in PRODUCTS.items():
                rows = x[:num_rows, :k].contiguous()
                if kind is None:
                    note("bf16", num_rows, name, linear_calls(layer, name, rows, None))
                    continue
                for way, ways in ways_for(kind, num_rows).items():
                    note(f"{kind} {way}", num_rows, name, linear_calls(layer, name, rows, ways))
                if kind != "int4_group" and num_rows <= 512:
                    note(f"{kind} product", num_rows, name, product_calls(layer, name, rows))
                if kind == "fp8_channel":
                    calls = product_calls(layer, name, rows, fast=False)
                    note(f"{kind} scaled_mm", num_rows, name, calls)
        del layer
        torch.cuda.empty_cache()
    return found


def fused_calls(
    layer: Layer, num_rows: int, ways: KernelThresholds | None, turn: int
) -> list[Call]:
    """A layer of the model without its attention, whose norms and activation give 8 bits."""
    ops, x, residual = TritonOps(), randn(num_rows, 4096), randn(num_rows, 4096)
    weight, form = randn(4096), ROW_FORMS[layer.kind]
    made = {name: randn(num_rows, n) for name, (n, _) in PRODUCTS.items()}
    given: dict[str, Any] = {"out": made["qkv"][:, :4096]}

    def norm(name: str, added: Tensor) -> None:
        given[name], _ = ops.add_rmsnorm_rows(added, residual, weight, 1e-5, form)

    def activation() -> None:
        given["down"] = ops.gated_rows(made["gate_up"], "silu", form)

    def times(name: str) -> Call:
        held = layer.weights[name]
        held = held[turn % len(held)]
        return lambda: quant_linear(given[name], held, out=made[name], ways=ways)

    return [
        partial(norm, "qkv", x),
        times("qkv"),
        times("out"),
        partial(norm, "gate_up", made["out"]),
        times("gate_up"),
        activation,
        times("down"),
    ]


def chain_calls(
    layer: Layer, num_rows: int, ways: KernelThresholds | None, turn: int
) -> list[Call]:
    """A layer of the model without its attention."""
    x, residual, weight = randn(num_rows, 4096), randn(num_rows, 4096), randn(4096)
    made = {name: randn(num_rows, n) for name, (n, _) in PRODUCTS.items()}
    normed, inner = torch.empty_like(x), randn(num_rows, 14336)

    def times(name: str, given: Tensor) -> Call:
        held = layer.weights[name]
        if layer.kind == "bf16":
            linear = TritonOps().linear
            return partial(linear, given, held[turn % len(held)], None, made[name])
        return partial(quant_linear, given, held[turn % len(held)], out=made[name], ways=ways)

    return [
        partial(add_rmsnorm, x, residual, weight, 1e-5, normed),
        times("qkv", normed),
        times("out", made["qkv"][:, :4096]),
        partial(add_rmsnorm, made["out"], residual, weight, 1e-5, normed),
        times("gate_up", normed),
        partial(gated, made["gate_up"], "silu", inner),
        times("down", inner),
    ]


def measure_chains(kinds: Iterable[QuantKind], quick: bool) -> dict[str, dict[str, float]]:
    """ "kind way" -> number of rows -> microseconds of a layer without its attention."""
    found: dict[str, dict[str, float]] = {}
    for kind in (None, *kinds):
        layer = make_layer(kind)
        for num_rows in CHAIN_ROWS:
            ways = {"": None} if kind is None else {"by passes": None, **ways_for(kind, num_rows)}
            if kind in ROW_FORMS:
                ways["in 8 bits"] = None
            for way, each in ways.items():
                make = fused_calls if way == "in 8 bits" else chain_calls
                calls = [c for turn in range(6) for c in make(layer, num_rows, each, turn)]
                us = median_us(calls, quick) * len(calls) / 6
                found.setdefault(f"{layer.kind} {way}", {})[str(num_rows)] = round(us, 1)
        del layer
        torch.cuda.empty_cache()
    print("\nus of a layer without attention, by rows " + " ".join(f"{n:>9}" for n in CHAIN_ROWS))
    for key, times in found.items():
        cells = [times.get(str(num_rows)) for num_rows in CHAIN_ROWS]
        print(f"{key:40}" + " ".join(" " * 9 if us is None else f"{us:9.1f}" for us in cells))
    return found


def best_ways(kind: QuantKind, found: dict[str, dict[str, dict[str, float]]]) -> dict[str, int]:
    """Up to how many rows each way is the fastest of those that come after it."""

    def us(way: str, num_rows: int) -> float:
        times = found.get(f"{kind} {way}", {}).get(str(num_rows))
        return float("inf") if times is None else sum(times.values())

    order = ("wide", "own", "library")
    most = dict.fromkeys(order, 0)
    for way, later in (("wide", order[1:]), ("own", order[2:])):
        for num_rows in ROWS:
            if us(way, num_rows) > min(us(each, num_rows) for each in later):
                break
            most[way] = num_rows
    if most["own"] == ROWS[-1]:
        most["own"] = EXACT
    return {"wide": most["wide"], "own": max(most["own"], most["wide"])}


def show(found: dict[str, dict[str, dict[str, float]]], ceiling: Ceiling) -> None:
    """Sums of the four products, and the share of the bytes' or the operations' ceiling."""
    per_weight = {"bf16": 2.0, "int4_group": 0.5 + 4 / 128}
    num_weights = sum(n * k for n, k in PRODUCTS.values())
    print("\nus of the four products (share of the ceiling), by rows")
    print(" " * 22 + "".join(f"{rows:>14}" for rows in ROWS))
    for key, by_rows in found.items():
        kind = key.split()[0]
        cells = []
        for num_rows in ROWS:
            times = by_rows.get(str(num_rows))
            if times is None:
                cells.append(" " * 14)
                continue
            us = sum(times.values())
            speed = 1 if kind in ("bf16", "int4_group") else 2
            least = 1e6 * max(
                num_weights * per_weight.get(kind, 1.0) / ceiling.bytes_per_s,
                2 * num_weights * num_rows / (speed * ceiling.flops_per_s),
            )
            cells.append(f"{us:8.1f} {least / us:4.0%} ")
        print(f"{key:22}" + "".join(cells))


def small_steps(quick: bool) -> dict[str, float]:
    """Microseconds of what brings rows to 8 bits."""
    found = {}
    weight = randn(4096)
    for num_rows in (1, 8, 64, 256, 4096):
        x, inner = randn(num_rows, 4096), randn(num_rows, 28672)
        residual = torch.zeros_like(x)
        fp8 = torch.float8_e4m3fn
        for name, call in {
            "rows": partial(quantize_rows, x, fp8),
            "rows blocked": partial(quantize_rows, x, fp8, blocked=True),
            "add_rmsnorm": partial(rmsnorm_rows, x, weight, 1e-5, fp8, residual=residual),
            "gated": partial(gated_rows, inner, "silu", fp8),
            "gated blocked": partial(gated_rows, inner, "silu", fp8, blocked=True),
        }.items():
            found[f"{name} {num_rows}"] = round(median_us([call], quick), 2)
    print("to 8 bits, us: " + "  ".join(f"{name}: {us}" for name, us in found.items()))
    return found


# -- tuning ------------------------------------------------------------------------------------

# rows, block_n, block_k, warps, stages, per_sm, copy, early
PRODUCT_CHOICES: dict[str, list[tuple[Any, ...]]] = {
    "8": [
        *[(16, 64, 256, 4, 4, 1, False, early) for early in (0, 512, 2048)],
        *[(8, 64, 256, 4, 4, 1, False, early) for early in (0, 2048)],
        *[(8, 128, 256, 8, 4, 1, False, 2048), (16, 128, 256, 8, 3, 1, False, 2048)],
        *[(16, 64, 256, 4, 4, 1, True, 2048), (16, 64, 256, 4, 4, 2, False, 2048)],
        *[(16, 64, 512, 4, 3, 1, False, 2048), (8, 64, 512, 8, 3, 1, False, 2048)],
        *[(8, 32, 512, 4, 4, 2, False, 2048), (16, 64, 128, 4, 8, 1, False, 2048)],
    ],
    "16": [
        *[(16, 64, 256, 4, 4, 1, False, early) for early in (0, 512, 2048)],
        *[(16, 128, 256, 8, 3, 1, False, 2048), (16, 64, 256, 4, 4, 1, True, 2048)],
        *[(16, 64, 512, 4, 3, 1, False, 2048), (16, 64, 256, 4, 4, 2, False, 2048)],
    ],
    "32": [
        *[(32, 64, 256, 4, 4, 1, False, early) for early in (0, 512, 2048)],
        *[(32, 64, 256, 4, 4, 1, True, 2048), (32, 64, 256, 4, 4, 2, False, 2048)],
        *[(32, 128, 256, 8, 3, 1, False, 2048), (32, 128, 256, 8, 3, 1, True, 2048)],
    ],
    "64": [
        *[(64, 64, 256, 4, 4, 1, True, early) for early in (0, 2048)],
        *[(64, 64, 256, 4, 3, 2, False, 2048), (64, 128, 256, 8, 3, 1, True, 2048)],
        *[(64, 64, 256, 4, 4, 1, False, 2048), (64, 128, 128, 8, 4, 1, False, 2048)],
    ],
    "128": [
        *[(128, 64, 128, 4, 4, 2, True, early) for early in (0, 2048)],
        *[(128, 128, 128, 8, 4, 1, True, 2048), (64, 128, 128, 4, 4, 2, True, 2048)],
        *[(128, 64, 256, 8, 3, 1, True, 2048), (128, 64, 128, 8, 4, 2, True, 2048)],
    ],
    "256": [
        *[(128, 64, 128, 4, 4, 2, True, early) for early in (0, 2048)],
        *[(128, 128, 128, 8, 4, 1, True, 2048), (128, 256, 128, 8, 3, 1, True, 2048)],
        *[(128, 128, 128, 8, 4, 0, True, 0), (128, 64, 128, 4, 4, 0, True, 0)],
    ],
    "many": [
        *[(128, 256, 128, 8, 3, 0, True, 0), (128, 128, 128, 8, 4, 0, True, 0)],
        *[(256, 128, 128, 8, 3, 0, True, 0), (128, 128, 128, 8, 3, 0, True, 0)],
        *[(128, 128, 128, 4, 3, 0, True, 0), (128, 64, 128, 4, 4, 0, True, 0)],
    ],
}
# rows, block_n, block_k, warps, stages, per_sm, early
WIDE_CHOICES: dict[str, list[tuple[Any, ...]]] = {
    "8": [
        *[(8, 64, 128, 4, 5, 3, early) for early in (0, 2048)],
        *[(8, 64, 256, 4, 4, 1, early) for early in (0, 2048)],
        *[(8, 128, 128, 8, 4, 2, 2048), (8, 128, 128, 8, 6, 1, 2048), (8, 128, 256, 8, 4, 1, 2048)],
        *[(8, 64, 256, 8, 4, 1, 2048), (8, 64, 128, 4, 8, 1, 2048), (8, 256, 128, 8, 4, 1, 2048)],
        *[(16, 64, 256, 4, 4, 1, early) for early in (0, 2048)],
        *[(16, 128, 128, 8, 4, 2, 2048), (16, 128, 256, 8, 3, 1, 2048)],
    ],
    "16": [
        *[(16, 64, 256, 4, 4, 1, early) for early in (0, 2048)],
        *[(16, 64, 256, 4, 4, 2, 2048), (16, 128, 128, 8, 4, 2, 2048)],
        *[(16, 128, 256, 8, 3, 1, 2048), (16, 128, 128, 8, 5, 1, 2048)],
    ],
    "many": [
        *[(32, 64, 256, 4, 3, 2, early) for early in (0, 2048)],
        *[(32, 128, 128, 8, 4, 2, 2048), (32, 128, 256, 8, 3, 1, 2048), (32, 64, 256, 4, 4, 1, 0)],
    ],
}
# rows, block_n, warps, stages, per_sm, early
BITS_CHOICES: dict[str, list[tuple[Any, ...]]] = {
    "8": [
        *[(8, 128, 8, 4, 2, early) for early in (0, 512, 1024)],
        *[(8, 64, 4, 4, 4, early) for early in (0, 1024)],
        *[(8, 128, 8, 6, 1, 1024), (8, 128, 4, 4, 2, 1024), (8, 256, 8, 3, 1, 1024)],
        *[(8, 64, 4, 6, 2, 1024), (8, 32, 2, 4, 6, 1024), (8, 128, 8, 4, 1, 1024)],
        *[(16, 64, 4, 4, 3, 1024), (16, 128, 8, 4, 1, 1024), (8, 128, 4, 5, 3, 1024)],
    ],
    "16": [
        *[(16, 64, 4, 3, 4, early) for early in (0, 1024)],
        *[(16, 128, 8, 4, 1, 1024), (16, 128, 8, 3, 2, 1024), (16, 64, 4, 4, 2, 1024)],
    ],
    "32": [
        *[(32, 64, 4, 3, 2, early) for early in (0, 1024)],
        *[(32, 128, 8, 3, 1, 1024), (32, 128, 8, 3, 2, 1024), (32, 256, 8, 2, 1, 1024)],
        *[(16, 128, 8, 3, 2, 1024)],
    ],
    "64": [
        *[(64, 64, 4, 3, 2, early) for early in (0, 1024)],
        *[(64, 128, 8, 3, 1, 1024), (32, 128, 8, 3, 2, 1024), (64, 256, 8, 2, 1, 1024)],
    ],
    "many": [
        *[(128, 128, 8, 2, 1, early) for early in (0, 1024)],
        *[(64, 128, 8, 3, 1, 0), (64, 256, 8, 2, 1, 0), (128, 256, 8, 2, 0, 0)],
    ],
}
AT = {"8": (1, 8), "16": (16,), "32": (32,), "64": (64,), "128": (128,), "256": (256,)}
Trial = tuple[str, type[Any], list[tuple[Any, ...]], tuple[int, ...]]


def trials(kind: QuantKind) -> Iterator[Trial]:
    """Key of a class, its type of configuration, the choices, and the numbers of rows."""
    name = {"fp8_channel": "fp8", "int8_channel": "int8", "fp8_block": "fp8 block"}.get(kind, "")
    if kind == "int4_group":
        for size, bits_choices in BITS_CHOICES.items():
            yield f"int4 {size}", bits.FourBitsConfig, bits_choices, AT.get(size, (128, 256))
        return
    for size, wide_choices in WIDE_CHOICES.items():
        if kind == "fp8_block":
            wide_choices = [c for c in wide_choices if c[2] == 128]
        yield f"wide {name} {size}", widened.WideConfig, wide_choices, AT.get(size, (32,))
    for size, choices in PRODUCT_CHOICES.items():
        if kind == "fp8_block":
            choices = [c for c in choices if c[2] == 128 and c[1] <= 128] or [
                (choices[0][0], 64, 128, *choices[0][3:])
            ]
        yield f"{name} {size}", own.ProductConfig, choices, AT.get(size, (512, 2048))


def tuned_calls(layer: Layer, name: str, x: Tensor, config: Any) -> tuple[list[Call], Tensor]:
    """Of the kernel that ``config`` is of, without what brings rows to 8 bits; and where they write
    to: all the same, since the weights are copies."""
    out = torch.empty(len(x), PRODUCTS[name][0], dtype=x.dtype, device=x.device)
    calls: list[Call] = []
    for w in layer.weights[name]:
        if isinstance(config, bits.FourBitsConfig):
            calls.append(partial(bits.four_bits, x, w.data, w.scales, out=out, config=config))
        elif isinstance(config, widened.WideConfig):
            calls.append(partial(widened.wide, x, w.data, w.scales, out=out, config=config))
        else:
            values, scales = quantize_rows(x, w.data.dtype, blocked=layer.kind == "fp8_block")
            calls.append(
                partial(own.product, values, scales, w.data, w.scales, out=out, config=config)
            )
    return calls, out


@dataclass
class Class:
    """A class of numbers of rows whose configurations are tried.

    Attributes:
        at: the numbers of rows.
        rows: of x, by their number and width.
        wanted: results by number of rows and product: those of the first configuration.
    """

    layer: Layer
    at: tuple[int, ...]
    rows: dict[tuple[int, int], Tensor]
    wanted: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def build(self, config: Any) -> Any:
        """``config``, compiled, or why it is none."""
        torch.cuda.set_device(0)
        try:
            for name, (_, k) in PRODUCTS.items():
                tuned_calls(self.layer, name, self.rows[self.at[0], k], config)[0][0]()
        except (OutOfResources, triton.CompilationError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {str(error)[:80]}"
        return config

    def timed(self, config: Any) -> list[float]:
        """Microseconds of the four products for each number of rows; infinite where a result is
        wrong."""
        times = []
        for num_rows in self.at:
            us = 0.0
            for name, (_, k) in PRODUCTS.items():
                calls, out = tuned_calls(self.layer, name, self.rows[num_rows, k], config)
                us += median_us(calls, True)
                want = self.wanted.setdefault((num_rows, name), out)
                if not distance(want, out) <= BOUND:
                    print(f"{config}: {name} is wrong")
                    us = float("inf")
            times.append(us)
        return times


def tune(kinds: Sequence[QuantKind], seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The best configuration of each class, and the microseconds of all that were tried."""
    best: dict[str, Any] = {}
    tried: dict[str, Any] = {}
    end = time.monotonic() + seconds
    for kind in kinds:
        layer = make_layer(kind)
        x = randn(2048, max(k for _, k in PRODUCTS.values()))
        for key, make, choices, at in trials(kind):
            if time.monotonic() > end:
                print(f"{key}: not tried, time is over")
                continue
            rows = {(m, k): x[:m, :k].contiguous() for m in at for _, k in PRODUCTS.values()}
            tried_class = Class(layer, at, rows)
            with ThreadPoolExecutor(THREADS) as pool:
                built = list(pool.map(tried_class.build, [make(*choice) for choice in choices]))
            times: dict[Any, list[float]] = {}
            for choice, config in zip(choices, built, strict=True):
                if isinstance(config, str):
                    print(f"{key} {choice}: {config}")
                    continue
                times[config] = tried_class.timed(config)
                shown = "  ".join(f"{us:8.1f}" for us in times[config])
                print(f"{key:16} {choice!s:36} us at {at}: {shown}", flush=True)
                tried[f"{key} {choice}"] = times[config]
            if times:
                first = min(times, key=lambda config: sum(times[config]))
                best[key] = dataclasses.asdict(first)
        del layer
        torch.cuda.empty_cache()
    print("\nbest")
    for key, entry in best.items():
        print(f"{key:16} {tuple(entry.values())}")
    return best, tried


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--only", choices=KINDS, action="append", help="these kinds of weights")
    parser.add_argument("--tune", action="store_true", help="try configurations")
    parser.add_argument("--seconds", type=float, default=300, help="how long to tune")
    parser.add_argument("--config", type=Path, help="JSON file that tuning updates")
    parser.add_argument(
        "--early", action="store_true", help="norms and activations are launched early, too"
    )
    parser.add_argument("--out", type=Path, help="folder for all numbers as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    kinds: Sequence[QuantKind] = options.only or KINDS
    if options.early:
        small = autotune.config_path(torch.cuda.get_device_name())
        everything = {kernel: {"early": True} for kernel in autotune.EARLY}
        autotune._read(torch.cuda.get_device_name())["launch"] = everything
        print(f"small kernels are launched early, whatever {small.name} says")
    begin = time.monotonic()
    WITHOUT_LIBRARY.update(without_library(kinds))
    if wrong := wrong_kernels(kinds):
        print("no numbers, results are wrong:\n  " + "\n  ".join(wrong), file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"results are right, {time.monotonic() - begin:.0f} s")
    numbers: dict[str, Any]
    if options.tune:
        best, tried = tune(kinds, options.seconds)
        numbers = {"best": best, "tried": tried}
        if options.config:
            merge_into(options.config, "quant", best)
    else:
        ceiling = measure_ceiling(options.quick)
        print(
            f"copy {ceiling.bytes_per_s / 1e12:.2f} TB/s, bf16 matrix product "
            f"{ceiling.flops_per_s / 1e12:.0f} TFLOP/s; in 8 bits twice that is taken"
        )
        for kind in kinds:
            print(f"ways of {kind}: {ways_of(kind, torch.device('cuda', 0))}")
        steps = small_steps(options.quick)
        found = measure(kinds, options.quick)
        ways = {kind: best_ways(kind, found) for kind in kinds}
        chains = measure_chains(kinds, options.quick)
        numbers = {"ceiling": dataclasses.asdict(ceiling), "us": found, "steps": steps}
        numbers |= {"layer": chains, "ways": ways}
        show(found, ceiling)
        print(f"fastest: {ways}")
        if options.config:
            merge_into(options.config, "quant ways", ways)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = "quant_tune.json" if options.tune else "quant.json"
        (options.out / name).write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"{time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
