"""Time of a mixture of experts on a CUDA device, beside what the device can do.

    python bench/kernels_moe.py [--quick] [--tp N] [--kinds KIND ...]
        [--tune [--seconds S] [--classes CLASS ...] [--out FILE]]

No number is printed while a kernel disagrees with its reference. Each call runs in a CUDA graph,
median of many runs with the L2 cache flushed between them. The ceiling of a shape is the longer of
two times: bytes of the experts that its tokens touch by the speed of a copy, and operations by the
speed of a large matrix product. ``--tune`` tries configurations instead, the likeliest first; its
last line is the best of each class, which ``--out`` merges into a file of the form of
asyncllm/kernels/configs/.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.kernels.moe.eight_bits import WIDE
from asyncllm.kernels.moe.experts import (
    experts,
    experts_config,
    experts_ref,
)
from asyncllm.kernels.moe.order import order, order_ref
from asyncllm.kernels.moe.route import route, route_ref
from asyncllm.kernels.moe.tiles import ExpertsConfig, Tile, size_class
from asyncllm.models.quantize import quantize_blocks, quantize_rows
from bench.kernels import BOUND, Ceiling, measure_ceiling, median_us, merge_into, randn, refuse


@dataclass(frozen=True)
class Shape:
    """Experts of a layer."""

    num_experts: int
    top_k: int
    hidden: int
    inner: int


SHAPES = {
    "V2-Lite": Shape(64, 6, 2048, 1408),
    "Qwen3-30B-A3B": Shape(128, 8, 2048, 768),
}
THREADS = 12
ROUNDED = 0.02  # relative error where rows come to 8 bits
TOKENS = (1, 8, 64, 256, 2048)
TUNED = (1, 8, 64, 256, 1024, 2048, 4096)  # some of each class
Case = dict[str, Any]
KINDS = {"bf16": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8, "fp8 block": None}


def weights_of(shape: Shape, kind: str = "bf16") -> Case:
    found: Case = {
        "gate_up": randn(shape.num_experts, 2 * shape.inner, shape.hidden) / shape.hidden**0.5,
        "down": randn(shape.num_experts, shape.hidden, shape.inner) / shape.inner**0.5,
    }
    if kind == "bf16":
        return found
    scales = []
    for name, stack in found.items():
        if (element := KINDS[kind]) is not None:
            data, by = quantize_rows(stack, element)
            made = data, by[..., 0].contiguous()
        else:
            data, by = map(torch.stack, zip(*map(quantize_blocks, stack), strict=True))
            made = data.contiguous(), by.contiguous()
        found[name] = made[0]
        scales.append(made[1])
    return found | {"scales": tuple(scales)}


def tokens_of(shape: Shape, num_tokens: int) -> Case:
    """Rows, and experts as random logits choose them."""
    logits = torch.randn(num_tokens, shape.num_experts, device="cuda")
    ids, weights = route_ref(logits, shape.top_k)
    return {"x": randn(num_tokens, shape.hidden), "ids": ids, "weights": weights}


def wrong_kernels() -> list[str]:
    """Names of kernels that differ from their reference, with the error."""
    found: list[str] = []
    for num_experts, top_k, options in (
        (64, 6, {}),
        (128, 8, {"renormalise": True}),
        (256, 8, {"groups": 8, "top_groups": 4, "top2": True, "sigmoid": True}),
    ):
        logits = torch.randn(300, num_experts, device="cuda")
        (ids, weights), (want_ids, want) = (
            route(logits, top_k, **options),  # type: ignore[arg-type]
            route_ref(logits, top_k, **options),  # type: ignore[arg-type]
        )
        if not torch.equal(ids, want_ids) or not torch.allclose(weights, want, rtol=1e-4):
            found.append(f"route, {top_k} of {num_experts}")
        for block_m in (16, 128):
            got, ordered = order(ids, num_experts, block_m), order_ref(ids, num_experts, block_m)
            needed = (ordered[1] >= 0).repeat_interleave(block_m)
            if not torch.equal(got[1], ordered[1]) or not torch.equal(
                got[0][needed], ordered[0][needed]
            ):
                found.append(f"order, {top_k} of {num_experts}, blocks of {block_m}")
    for kind in KINDS:
        shape = Shape(24, 4, 528, 256)
        held = weights_of(shape, kind)
        for num_tokens in (1, 20, 150, 700, 2000):
            case = held | tokens_of(shape, num_tokens)
            device = case["x"].device
            wide = size_class(num_tokens * shape.top_k, 24, shape.inner, device) in WIDE
            error = distance(experts_ref(**case, wide=wide), experts(**case))
            # a number between two of 8 bits may become either
            if not error <= (BOUND if wide or kind == "bf16" else ROUNDED):
                found.append(f"experts in {kind}, {num_tokens} tokens: relative error {error:.1e}")
    return found


def distance(want: Tensor, got: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def ceiling_us(shape: Shape, case: Case, ceiling: Ceiling) -> tuple[float, str]:
    """The least time, and what sets it: products of 8-bit rows at twice the speed of bf16."""
    touched = case["down"].element_size() * 3 * shape.inner * shape.hidden
    touched *= len(case["ids"].unique())
    flops = 6 * case["ids"].numel() * shape.inner * shape.hidden / (2 if "scales" in case else 1)
    by_bytes, by_flops = touched / ceiling.bytes_per_s, flops / ceiling.flops_per_s
    return (1e6 * by_bytes, "copy") if by_bytes > by_flops else (1e6 * by_flops, "product")


def show_all(shapes: dict[str, Shape], kind: str, ceiling: Ceiling, quick: bool) -> None:
    print(f"{kind}: shape, tokens: experts in all | ceiling, of what | share | routing, sorting")
    for name, shape in shapes.items():
        held = weights_of(shape, kind)
        for num_tokens in TOKENS:
            case = held | tokens_of(shape, num_tokens)
            us = median_us(partial(experts, **case), quick)
            least, by = ceiling_us(shape, case, ceiling)
            logits = torch.randn(num_tokens, shape.num_experts, device="cuda")
            routed = median_us(partial(route, logits, shape.top_k, renormalise=True), quick)
            block_m = plain_config(shape, case["ids"].numel()).block_m
            sorted_us = median_us(partial(order, case["ids"], shape.num_experts, block_m), quick)
            print(
                f"{name:14} {num_tokens:5}: {us:8.1f} us | {least:8.1f} us by {by:7} | "
                f"{least / us:6.1%} | {routed:5.1f} {sorted_us:5.1f} us",
                flush=True,
            )


def plain_config(shape: Shape, num_pairs: int) -> ExpertsConfig:
    return experts_config(num_pairs, shape.num_experts, shape.inner, 2, torch.device("cuda", 0))


# class -> rows of a block; outputs, inputs, warps, stages, group, copy of each product's tiles
SMALL_UP = [
    *[(32, 128, 4, 4, 1, False), (64, 64, 4, 4, 1, False), (32, 128, 4, 4, 1, True)],
    *[(64, 128, 4, 3, 1, False), (32, 256, 4, 3, 1, False), (64, 64, 4, 5, 1, True)],
    *[(16, 256, 4, 4, 1, False), (128, 64, 8, 4, 1, False), (64, 128, 8, 3, 1, True)],
]
SMALL_DOWN = [
    *[(64, 128, 4, 4, 1, False), (32, 128, 4, 4, 1, False), (64, 128, 4, 4, 1, True)],
    *[(128, 64, 4, 4, 1, False), (32, 256, 4, 3, 1, False), (64, 64, 4, 5, 1, False)],
    *[(128, 128, 8, 3, 1, False), (128, 128, 8, 3, 1, True), (16, 256, 4, 4, 1, False)],
]
LARGE_UP = [
    *[(128, 64, 8, 3, 1, False), (128, 64, 8, 3, 1, True), (64, 64, 4, 4, 1, False)],
    *[(128, 64, 8, 4, 8, True), (64, 64, 4, 4, 4, True), (128, 64, 8, 4, 1, True)],
    *[(64, 64, 8, 4, 1, True), (128, 64, 8, 3, 4, True), (64, 128, 4, 3, 1, False)],
]
LARGE_DOWN = [
    *[(128, 64, 4, 4, 1, False), (256, 64, 8, 3, 1, True), (128, 64, 4, 4, 1, True)],
    *[(256, 64, 8, 3, 1, False), (128, 64, 8, 4, 1, True), (256, 64, 8, 4, 8, True)],
    *[(128, 128, 8, 3, 1, False), (128, 64, 4, 4, 4, True), (256, 64, 8, 4, 1, True)],
]
CHOICES = {
    "few": ((16,), SMALL_UP, SMALL_DOWN),
    "8": ((16, 32), SMALL_UP, SMALL_DOWN),
    "32": ((32, 64, 16), SMALL_UP, SMALL_DOWN),
    "128": ((64, 128), LARGE_UP, LARGE_DOWN),
    "many": ((128, 64), LARGE_UP, LARGE_DOWN),
}


# the same in 8 bits: a step is 128 inputs
SMALL_8 = [
    *[(32, 128, 4, 5, 1, False), (64, 128, 4, 4, 1, False), (32, 128, 4, 8, 1, False)],
    *[(64, 128, 4, 6, 1, False), (128, 128, 8, 4, 1, False), (16, 128, 4, 6, 1, False)],
]
LARGE_8 = [
    *[(64, 128, 8, 3, 1, False), (64, 128, 4, 3, 1, False), (128, 128, 8, 3, 1, False)],
    *[(64, 128, 8, 3, 4, True), (64, 128, 4, 3, 4, True), (128, 128, 8, 3, 4, True)],
    *[(64, 128, 8, 4, 4, False), (64, 128, 8, 4, 8, True), (64, 128, 4, 4, 4, True)],
    *[(128, 128, 8, 4, 1, True), (128, 128, 8, 4, 8, False)],
]
CHOICES_8 = {
    "few": ((16, 8), SMALL_8, SMALL_8),
    "8": ((16, 8), SMALL_8, SMALL_8),
    "32": ((32, 16), SMALL_8, SMALL_8),
    "128": ((64, 128, 32), LARGE_8, LARGE_8),
    "many": ((128, 64), LARGE_8, LARGE_8),
}


def tune(
    shapes: dict[str, Shape], kind: str, seconds: float, classes: list[str]
) -> dict[str, dict[str, Any]]:
    """For each of ``classes`` the best tile of the first product, then of the second, in blocks of each
    size: the least sum of relative times over its cases. Each class gets an equal part of the
    seconds."""
    cases: dict[str, list[Case]] = {}
    for shape in shapes.values():
        held = weights_of(shape, kind)
        for num_tokens in TUNED:
            num_pairs = num_tokens * shape.top_k
            key = size_class(num_pairs, shape.num_experts, shape.inner, torch.device("cuda", 0))
            if key in classes:
                cases.setdefault(key, []).append(held | tokens_of(shape, num_tokens))
    found = {}
    for key, mine in cases.items():
        best = tune_class(key, mine, seconds / len(cases))
        found[key if kind == "bf16" else f"{kind} {key}"] = dataclasses.asdict(best)
        print(f"best for {kind} {key}: {best}", flush=True)
    return found


def tune_class(key: str, cases: list[Case], seconds: float) -> ExpertsConfig:
    end = time.monotonic() + seconds
    eight_bits = "scales" in cases[0]
    sizes, ups, downs = (CHOICES_8 if eight_bits else CHOICES)[key]
    base = [median_us(partial(experts, **case), True) for case in cases]
    print(f"{key}: as it is now " + "  ".join(f"{us:8.1f}" for us in base))
    wanted = [experts(**case) for case in cases]
    tried: dict[ExpertsConfig, float] = {}

    def cost(config: ExpertsConfig) -> float:
        if time.monotonic() > end:
            return float("inf")
        times = []
        for case, want in zip(cases, wanted, strict=True):
            try:
                bound = ROUNDED if eight_bits else BOUND
                if not distance(want, experts(**case, config=config)) <= bound:
                    raise RuntimeError(f"{config} gives a wrong result")
                times.append(median_us(partial(experts, **case, config=config), True))
            except (OutOfResources, ValueError):  # too large, or not of whole blocks
                return float("inf")
        shown = [config.block_m, *map(dataclasses.astuple, (config.up, config.down))]
        print(*shown, ":", "  ".join(f"{us:8.1f}" for us in times), flush=True)
        tried[config] = sum(us / now for us, now in zip(times, base, strict=True))
        return tried[config]

    def build(config: ExpertsConfig) -> None:
        torch.cuda.set_device(0)
        for case in cases:
            with contextlib.suppress(OutOfResources, ValueError):
                experts(**case, config=config)

    first = ExpertsConfig(sizes[0], Tile(*ups[0]), Tile(*downs[0]))
    build(first)
    with ThreadPoolExecutor(THREADS) as pool:
        starts = [dataclasses.replace(first, block_m=block_m) for block_m in sizes]
        some = [dataclasses.replace(start, up=Tile(*up)) for start in starts for up in ups]
        some += [dataclasses.replace(start, down=Tile(*down)) for start in starts for down in downs]
        list(pool.map(build, some))
    for start in starts:
        up = best_of(ups, lambda tile, start=start: cost(dataclasses.replace(start, up=tile)))
        start = dataclasses.replace(start, up=up)
        best_of(downs, lambda tile, start=start: cost(dataclasses.replace(start, down=tile)))
    return min(tried, key=lambda config: tried[config])


def best_of(
    tiles: list[tuple[int, int, int, int, int, bool]], cost: Callable[[Tile], float]
) -> Tile:
    return min((Tile(*tile) for tile in tiles), key=cost)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--tp", type=int, default=1, help="ranks that cut each expert")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tune", action="store_true", help="try configurations")
    parser.add_argument("--seconds", type=float, default=300, help="how long to tune")
    parser.add_argument("--classes", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--out", type=Path, help="JSON file that tuning updates")
    options = parser.parse_args()
    if code := refuse(wrong_kernels):
        return code
    shapes = {
        name: dataclasses.replace(shape, inner=-(-shape.inner // options.tp))
        for name, shape in SHAPES.items()
    }
    if options.tune:
        entries = {}
        for kind in options.kinds:
            seconds = options.seconds / len(options.kinds)
            entries |= tune(shapes, kind, seconds, options.classes)
        print(json.dumps({"experts": entries}))
        if options.out:
            merge_into(options.out, "experts", entries)
        return 0
    ceiling = measure_ceiling(options.quick)
    print(
        f"copy {ceiling.bytes_per_s / 1e12:.2f} TB/s, bf16 matrix product "
        f"{ceiling.flops_per_s / 1e12:.0f} TFLOP/s"
    )
    for kind in options.kinds:
        show_all(shapes, kind, ceiling, options.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
