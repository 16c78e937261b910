"""Decode over latents with shared prefixes on a CUDA device: what reading them once saves, and costs.

    python bench/kernels_latent_shared.py [--quick] [--heads N ...] [--tune [--seconds S] [--out FILE]]

No number is printed while a kernel disagrees with its reference. Each call is one layer's in a CUDA
graph, the L2 cache flushed before it, median of several runs. For each shape: microseconds without
groups, with them, of the shared part alone, and of a step's plan; what is saved, and what the costs
foretell (``SharingCosts.of_latents``; "none": no rank with so many heads forms groups); the bytes
that must be read with groups as a share of the rate of a large copy, and the products as one of that
of a large product. "nothing shared" has the mechanism and no groups. ``--tune`` tries configurations
instead, also of plain decode with 128 heads; ``--out`` merges the best ones into a file of the form
of asyncllm/kernels/configs/.
"""

import argparse
import dataclasses
import math
import sys
from functools import partial
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.kernels.attention.shared_rows import (
    LATENT_RATE,
    LATENT_RATE_8_BITS,
    SharedRows,
    SharingCosts,
)
from asyncllm.kernels.latent.attend import attend, attend_ref
from asyncllm.kernels.latent.keys import AttendConfig
from asyncllm.kernels.latent.plan import AttendPlan, plan_attend
from asyncllm.kernels.latent.shared import attend_shared
from bench.kernels import (
    BOUND,
    Ceiling,
    measure_ceiling,
    median_us,
    merge_into,
    refuse,
    tried,
)
from bench.kernels_latent import (
    DECODE,
    RANK,
    ROPE,
    SCALE,
    Case,
    decode_case,
    in_eight_bits,
    run_decode,
)
from bench.kernels_shared import SHAPES, Shape, alike, beside, rows_of

NAMES = [
    "128 x (1536 + 576)",
    "128 x (512 + 4 x 1024 + 500)",
    "8 x (12000 + 250)",
    "512 x (700 + 300)",
]
MORE = [*NAMES, "32 x (1024 + 200)", "4 x (2048 + 200)", "nothing shared, 256 x 1200"]
LARGE = {"256 x (1536 + 576)": alike(256, 1536, 576), "512 x (1536 + 256)": alike(512, 1536, 256)}
BESIDE = {f"{n} x {m} beside": beside(n, m) for n, m in ((4, 512), (8, 512), (8, 1100), (16, 256))}
TUNED = NAMES[:3]
# likeliest first: tile, warps, stages, programs per multiprocessor
CHOICES = [(64, 8, 2, 1), (64, 8, 3, 1), (32, 8, 5, 1), (32, 8, 3, 1), (64, 8, 1, 1)]


def case_of(shape: Shape, num_heads: int) -> Case:
    """Rows in shuffled slots; the members of a group have those of its first one."""
    case = decode_case(shape.lengths, num_heads)
    for begin, stop, first, count in shape.groups:
        case["table"][first : first + count, begin:stop] = case["table"][first, begin:stop].clone()
    return case


def planned(
    case: Case, shared: SharedRows | None, config: AttendConfig | None = None
) -> AttendPlan:
    where = case["lanes"], case["lens"], case["q"].shape[1], case["cache"], RANK
    return plan_attend(*where, shared=shared, shared_config=config)


def call_of(case: Case, plan: AttendPlan) -> partial[Tensor]:
    names = "q", "turned", "cache", "table", "out", "scales"
    return partial(attend, **{n: case[n] for n in names if n in case}, scale=SCALE, plan=plan)


def alone(case: Case, plan: AttendPlan) -> None:
    """The shared part of a layer's attention."""
    assert plan.shared is not None
    given = (case[name] for name in ("q", "turned", "cache", "table", "lanes"))
    attend_shared(plan.shared, *given, case.get("scales"), SCALE * math.log2(math.e))


def error(want: Tensor, got: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def wrong() -> list[str]:
    """Shapes whose result differs from the reference; whoever measures compares with and without
    groups."""
    found = []
    small = Shape([700 - i for i in range(9)], [(0, 333, 0, 9), (333, 600, 0, 4), (333, 650, 6, 2)])
    for name, shape in {"small": small, NAMES[1]: SHAPES[NAMES[1]]}.items():
        for case in (plain := case_of(shape, 16), in_eight_bits(plain)):
            less = {**case, **{k: case[k][:9] for k in ("q", "turned", "lanes", "lens")}}
            want = attend_ref(**{k: v for k, v in less.items() if k != "out"}, scale=SCALE)
            call = call_of(case, planned(case, rows_of(shape)))
            for _ in range(2):  # the second finds what the first left
                got = call()
            if not error(want, got[:9]) <= BOUND:
                found.append(f"{name}: {error(want, got[:9]):.1e} from the reference")
    return found


def foretold(shape: Shape, num_heads: int, bits: bool) -> float | None:
    """Microseconds that the costs say groups save; ``bits``: over latents in 8 bits."""
    costs = SharingCosts.of_latents(num_heads, RANK, ROPE, sys.maxsize, eight_bits=bits)
    if costs is None:
        return None
    gain = sum(costs.gain(stop - begin, count) for begin, stop, _, count in shape.groups)
    rates = LATENT_RATE_8_BITS if bits else LATENT_RATE
    token_s = (2 * RANK + ROPE) / rates[16 if num_heads <= 16 else 64]
    return (gain - costs.step) * token_s * 1e6


def measure(name: str, shape: Shape, num_heads: int, top: Ceiling, quick: bool, bits: bool) -> None:
    case = case_of(shape, num_heads)
    if bits:
        case = in_eight_bits(case)
    rows = rows_of(shape)
    unshared, plan = planned(case, None), planned(case, rows)
    want = call_of(case, unshared)().clone()
    if not error(want, call_of(case, plan)()) <= BOUND:
        raise RuntimeError(f"{name}, {num_heads} heads: groups give another result")
    plain_us = median_us(call_of(case, unshared), quick)
    us, alone_us = (
        median_us(call_of(case, plan), quick),
        median_us(partial(alone, case, plan), quick),
    )
    plan_us = median_us(partial(planned, case, rows), quick)
    read = sum(shape.lengths) - shape.saved
    pairs = len(shape.lengths) * num_heads * (2 * RANK + ROPE)
    num_bytes = read * ((RANK + ROPE) * case["cache"].element_size() + 4) + 2 * pairs
    flops = 2 * sum(shape.lengths) * num_heads * (2 * RANK + ROPE)
    said = foretold(shape, num_heads, bits)
    print(
        f"{num_heads:3}{' fp8' if bits else '    '} {name:30} {plain_us:8.1f} {us:8.1f} "
        f"{us / plain_us:6.3f} {alone_us:7.1f} {plan_us:6.1f} {plain_us - us:8.1f} "
        f"{'none' if said is None else f'{said:.1f}':>8} {num_bytes / us * 1e6 / top.bytes_per_s:6.1%} "
        f"{flops / us * 1e6 / top.flops_per_s:6.1%}",
        flush=True,
    )


def tune(seconds: float) -> dict[str, dict[str, object]]:
    """The best configurations by class: of shared prefixes with 16 heads, of decode with 128."""
    shared = {name: case_of(SHAPES[name], 16) for name in TUNED}
    wanted = {name: call_of(case, planned(case, None))().clone() for name, case in shared.items()}

    def timed(choice: tuple[int, ...], name: str) -> float:
        case, rows = shared[name], rows_of(SHAPES[name])
        plan = planned(case, rows, AttendConfig(*choice))
        if not error(wanted[name], call_of(case, plan)()) <= BOUND:
            raise RuntimeError(f"{choice} gives a wrong result")
        return median_us(partial(alone, case, plan), True)

    classes = dict.fromkeys(TUNED, "shared")
    title = "shared part, 16 heads: tile warps stages per_sm"
    best = tried(title, CHOICES, classes, timed, seconds / 2)
    shared.clear()
    whole = {name: decode_case(DECODE[name], 128) for name in ("128 x 4096", "8 x 16384")}
    for name, case in whole.items():
        wanted[name] = run_decode(case)().clone()

    def timed_decode(choice: tuple[int, ...], name: str) -> float:
        call = run_decode(whole[name], AttendConfig(*choice))
        if not error(wanted[name], call()) <= BOUND:
            raise RuntimeError(f"{choice} gives a wrong result")
        return median_us(call, True)

    sizes = dict(zip(whole, ("many", "few"), strict=True))
    title = "decode, 128 heads: tile warps stages per_sm"
    best |= tried(title, CHOICES, sizes, timed_decode, seconds / 2)
    return {f"64 {key}": dataclasses.asdict(AttendConfig(*choice)) for key, choice in best.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 8, 32, 128], help="of a rank")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=60, help="how long to tune")
    parser.add_argument("--out", type=Path, help="JSON file that tuning updates")
    args = parser.parse_args()
    if code := refuse(wrong):
        return code
    if args.tune:
        entries = tune(args.seconds)
        print(entries)
        if args.out:
            merge_into(args.out, "latent", entries)
        return 0
    top = measure_ceiling(True)
    print(f"copy {top.bytes_per_s / 1e12:.2f} TB/s, product {top.flops_per_s / 1e12:.0f} TFLOP/s")
    print(
        f"{'heads':7} {'shape':30}    plain   shared  ratio   alone   plan    saved foretold   copy "
        "products"
    )
    few = {**{name: SHAPES[name] for name in NAMES[:3]}, **LARGE}
    many = {**{name: SHAPES[name] for name in MORE}, **BESIDE, "2 x 4000": alike(2, 4000, 100)}
    for num_heads in args.heads:
        wanted = few | many if num_heads == args.heads[0] else few
        for name, shape in wanted.items():
            measure(name, shape, num_heads, top, args.quick, False)
            if name in NAMES[:2]:
                measure(name, shape, num_heads, top, args.quick, True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
