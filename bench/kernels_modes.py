"""Decode kernels by name and K/V in 8 bits on a CUDA device: which wins where, beside bf16.

    python bench/kernels_modes.py [--quick]
    python bench/kernels_modes.py --tune decode|prefill [--format NAME] [--kernel NAME]
                                  [--seconds S] [--out FILE]

No number is printed while a kernel disagrees with its reference. Each call runs in a CUDA graph,
median of many runs with the L2 cache flushed between them. Decode: microseconds, and the rate at
which K/V, scales and slot numbers are read as a share of that of a large copy; the best kernel of
each line is marked. Prefill: microseconds, and the rate as a share of that over K/V in bf16.
``--tune`` tries configurations of one kernel over one format instead; ``--out`` merges the best of
each class into a file of the form of asyncllm/kernels/configs/.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.kernels.attention.decode import decode_attention, decode_attention_ref
from asyncllm.kernels.attention.decode_plan import DecodeConfig, plan_decode
from asyncllm.kernels.attention.kv8 import KIND_NAMES
from asyncllm.kernels.attention.kv_write import rope_kv, rope_kv_ref
from asyncllm.kernels.attention.prefill import (
    PrefillConfig,
    prefill_attention,
    prefill_attention_ref,
)
from asyncllm.kernels.attention.quantize import dequantize_ref, quantize_ref
from asyncllm.models.attention import ELEMENTS
from asyncllm.models.kv_format import DECODE_KERNELS, FORMATS, DecodeKernel, KvFormat
from bench.kernels import (
    BOUND,
    DECODE_CHOICES,
    DECODE_CLASS,
    DIM,
    DTYPE,
    PREFILL_CHOICES,
    SCALE,
    Ceiling,
    Rows,
    ints,
    measure_ceiling,
    median_us,
    merge_into,
    randn,
    refuse,
    tried,
)
from bench.kernels import DECODE as DECODE_SHAPES

Case = dict[str, Tensor]
PLAIN = "bf16"
KINDS: dict[str, KvFormat | None] = {PLAIN: None, **FORMATS}
GROUPED, SINGLE = (32, 8), (32, 32)  # query and KV heads
DECODE: list[tuple[str, list[int], tuple[int, int]]] = [
    *((name, lengths, GROUPED) for name, lengths in DECODE_SHAPES.items()),
    ("256 x 256", [256] * 256, GROUPED),
    ("1024 x 300", [300] * 1024, GROUPED),
    ("16 x 512", [512] * 16, GROUPED),
    ("64 x 1200, 32 KV heads", [1200] * 64, SINGLE),
    ("4 x 4096, 32 KV heads", [4096] * 4, SINGLE),
]
PREFILL: dict[str, Rows] = {
    "16 x 512, prefix 4096": [(4096, 512)] * 16,
    "4 x 2048, prefix 8192": [(8192, 2048)] * 4,
    "1 x 256, prefix 1024": [(1024, 256)],
    "1 x 256, prefix 16384": [(16384, 256)],
    "32 x 16, prefix 2048": [(2048, 16)] * 32,
    "8 x 2048": [(0, 2048)] * 8,
}
PREFILL_CLASS = {
    "16 x 512, prefix 4096": 128,
    "4 x 2048, prefix 8192": 128,
    "1 x 256, prefix 1024": 64,
    "1 x 256, prefix 16384": 64,
}


def cached(lengths: list[int], heads: tuple[int, int], fmt: KvFormat | None) -> Case:
    """K/V of the lanes in shuffled slots, with the table."""
    total = sum(lengths)
    slots = torch.randperm(total, device="cuda", dtype=torch.int32)
    table = torch.zeros((len(lengths), max(lengths)), device="cuda", dtype=torch.int32)
    for lane, part in enumerate(slots.split(lengths)):
        table[lane, : len(part)] = part
    caches = {name: randn(total + 1, heads[1], DIM) for name in ("k_cache", "v_cache")}
    return {**in_format(caches, fmt), "table": table, "lanes": ints(range(len(lengths)))}


def in_format(caches: Case, fmt: KvFormat | None) -> Case:
    if fmt is None:
        return caches
    found: Case = {}
    scales = []
    for name, cache in caches.items():  # in slices: float32 of all would not fit
        parts = [quantize_ref(x, ELEMENTS[fmt.element], fmt.group) for x in cache.split(1 << 16)]
        found[name] = torch.cat([x.view(torch.uint8) for x, _ in parts]).view(parts[0][0].dtype)
        scales.append(torch.cat([x for _, x in parts]))
    return {**found, "scales": torch.stack(scales, 2).contiguous()}


def decode_case(lengths: list[int], heads: tuple[int, int], fmt: KvFormat | None) -> Case:
    q = randn(len(lengths), heads[0], DIM)
    return {"q": q, "lens": ints(lengths), **cached(lengths, heads, fmt)}


def prefill_case(rows: Rows, fmt: KvFormat | None) -> tuple[Case, Tensor]:
    """Arguments of prefill attention, and the packed qkv of the new tokens."""
    counts = [count for _, count in rows]
    qkv = randn(sum(counts), (GROUPED[0] + 2 * GROUPED[1]) * DIM)
    case = cached([prefix + count for prefix, count in rows], GROUPED, None)
    heads = qkv.unflatten(1, (-1, DIM))
    for lane, part in enumerate(heads.split(counts)):
        prefix, count = rows[lane]
        slots = case["table"][lane, prefix : prefix + count].long()
        case["k_cache"][slots] = part[:, GROUPED[0] : -GROUPED[1]]
        case["v_cache"][slots] = part[:, -GROUPED[1] :]
    caches = in_format({name: case[name] for name in ("k_cache", "v_cache")}, fmt)
    return {
        **case,
        **caches,
        "q": heads[:, : GROUPED[0]],
        "starts": ints(prefix for prefix, _ in rows),
        "cu_counts": ints(itertools.accumulate(counts, initial=0)),
    }, qkv


def run_decode(
    case: Case, kernel: DecodeKernel, config: DecodeConfig | None = None, **options: Any
) -> partial[Tensor]:
    """One layer's call; the plan of a step is made before it."""
    way = {"grouped": kernel.grouped, "split": kernel.split}
    call = partial(decode_attention, **case, scale=SCALE, **way, **options)
    if not kernel.split:
        return partial(call, config=config)
    plan = plan_decode(
        case["lanes"], case["lens"], case["q"].shape[1], case["k_cache"],
        grouped=kernel.grouped, config=config, window=options.get("window"),
    )  # fmt: skip
    return partial(call, plan=plan)


def decode_bytes(case: Case) -> float:
    """Of K/V and scales of all rows, of slot numbers, of q and the result."""
    slot = sum(case[name][0].nbytes for name in ("k_cache", "v_cache", "scales") if name in case)
    return float(case["lens"].sum()) * (slot + 4) + 2 * case["q"].nbytes


def wrong_kernels() -> list[str]:
    """Names of kernels that differ from their reference, with the error."""
    found: list[str] = []

    def compare(name: str, want: Tensor, got: Tensor, bound: float = BOUND) -> None:
        error = ((got.double() - want.double()).norm() / want.double().norm()).item()
        if not error <= bound:
            found.append(f"{name}: relative error {error:.1e}")

    for name, fmt in KINDS.items():
        for heads, limits in ((GROUPED, {}), (SINGLE, {}), (GROUPED, {"window": 500})):
            for lengths in ([1, 700, 64, 65, 1300], [300] * 70, [5000]):
                case = decode_case(lengths, heads, fmt)
                want = decode_attention_ref(**case, scale=SCALE, **limits)
                for kernel in readers(fmt):
                    got = run_decode(case, kernel, **limits)()
                    compare(f"{kernel.name}, {name}, {heads}, {limits}", want, got)
        for rows in ([(0, 1700), (333, 1), (128, 300)], [(77, 300)], [(900, 3)] * 5):
            step, qkv = prefill_case(rows, fmt)
            want = prefill_attention_ref(**step, scale=SCALE, kv=qkv)
            for most in (max(count for _, count in rows), 4096):
                got = prefill_attention(**step, scale=SCALE, kv=qkv, max_count=most)
                compare(f"prefill, {name}", want, got)
        if fmt is not None:
            args = rope_case(37, fmt)
            mirror = [x.clone() for x in args]
            rope_kv_ref(*mirror[:6], GROUPED[0], mirror[6])
            rope_kv(*args[:6], GROUPED[0], args[6])
            for part in (0, 1):
                want, got = (
                    dequantize_ref(x[4 + part], x[6][:, :, part], torch.float32)
                    for x in (mirror, args)
                )
                compare(f"rope_kv, {name}", want, got)
    return found


def rope_case(num_tokens: int, fmt: KvFormat | None) -> list[Tensor]:
    """qkv, cos_sin, positions, slots, K, V and, of 8 bits, scales."""
    angles = torch.rand((4096, DIM // 2), device="cuda") * 6
    names = ("k_cache", "v_cache")
    caches = in_format({name: randn(2 * num_tokens + 1, GROUPED[1], DIM) for name in names}, fmt)
    return [
        randn(num_tokens, (GROUPED[0] + 2 * GROUPED[1]) * DIM),
        torch.cat((angles.cos(), angles.sin()), dim=1),
        torch.randint(4096, (num_tokens,), device="cuda", dtype=torch.int32),
        torch.randperm(2 * num_tokens, device="cuda", dtype=torch.int32)[:num_tokens],
        *caches.values(),
    ]


def readers(fmt: KvFormat | None) -> list[DecodeKernel]:
    """The kernels that read it."""
    return [k for k in DECODE_KERNELS.values() if fmt is None or not k.halves]


def show_decode(ceiling: Ceiling, quick: bool) -> None:
    print(f"\n{'decode':24} {'K/V':14} " + " ".join(f"{name:>25}" for name in DECODE_KERNELS))
    for shape, lengths, heads in DECODE:
        for name, fmt in KINDS.items():
            case = decode_case(lengths, heads, fmt)
            times = {
                kernel.name: median_us(run_decode(case, kernel), quick) for kernel in readers(fmt)
            }
            cells = []
            for kernel in DECODE_KERNELS:
                us = times.get(kernel)
                if us is None:
                    cells.append(f"{'-':>25}")
                    continue
                share = decode_bytes(case) / us * 1e6 / ceiling.bytes_per_s
                mark = "*" if us == min(times.values()) else " "
                cells.append(f"{us:10.1f} us {share:7.1%} {mark:>3}")
            print(f"{shape:24} {name:14} " + " ".join(f"{cell:>25}" for cell in cells), flush=True)


def show_prefill(quick: bool) -> None:
    print(f"\n{'prefill':24} " + " ".join(f"{name:>28}" for name in KINDS))
    for shape, rows in PREFILL.items():
        most = max(count for _, count in rows)
        pairs = sum(count * prefix + count * (count + 1) // 2 for prefix, count in rows)
        cells, plain = [], 0.0
        for fmt in KINDS.values():
            case, qkv = prefill_case(rows, fmt)
            out = torch.empty_like(case["q"], memory_format=torch.contiguous_format)
            call = partial(prefill_attention, **case, scale=SCALE, kv=qkv, max_count=most, out=out)
            us = median_us(call, quick)
            plain = plain or us
            rate = 4 * GROUPED[0] * DIM * pairs / us / 1e6
            cells.append(f"{us:9.1f} us {rate:4.0f} TF {plain / us:7.1%}")
        print(f"{shape:24} " + " ".join(f"{cell:>28}" for cell in cells), flush=True)


def show_rope(quick: bool) -> None:
    print(f"\n{'rope and write':24} " + " ".join(f"{name:>16}" for name in KINDS))
    for num_tokens in (1, 256, 4096):
        cells = []
        for fmt in KINDS.values():
            args = rope_case(num_tokens, fmt)
            call = partial(rope_kv, *args[:6], GROUPED[0], *args[6:])
            cells.append(f"{median_us(call, quick):10.1f} us")
        print(f"{num_tokens:>17} tokens " + " ".join(f"{cell:>16}" for cell in cells), flush=True)


def show_windows(quick: bool) -> None:
    """A windowed layer beside what it would cost without a window, and what a window costs."""
    print("\nwindow of 1024 (us): with it, without it, rows of 1024")
    for rows, length in ((64, 1200), (64, 8192), (4, 16384)):
        case = decode_case([length] * rows, GROUPED, None)
        short = decode_case([1024] * rows, GROUPED, None)
        fastest = DECODE_KERNELS["triton_gqa_flashdecoding"]
        calls = [
            run_decode(case, fastest, window=1024),
            run_decode(case, fastest),
            run_decode(short, fastest),
        ]
        found = " ".join(f"{median_us(call, quick):10.1f}" for call in calls)
        print(f"{f'decode {rows} x {length}':24} {found}", flush=True)
    for count in (2048, 8192):
        step, qkv = prefill_case([(8192, count)], None)
        call = partial(prefill_attention, **step, scale=SCALE, kv=qkv, max_count=count)
        found = " ".join(
            f"{median_us(partial(call, window=window), quick):10.1f}" for window in (1024, None)
        )
        print(f"{f'prefill 8192 + {count}':24} {found}", flush=True)


def tune_decode(fmt: KvFormat | None, kernel: DecodeKernel, seconds: float) -> dict[str, Any]:
    cases = {name: decode_case(DECODE_SHAPES[name], GROUPED, fmt) for name in DECODE_CLASS}
    wanted = {name: run_decode(case, kernel)().clone() for name, case in cases.items()}

    def timed(choice: tuple[int, ...], name: str) -> float:
        call = run_decode(cases[name], kernel, DecodeConfig(*choice))
        check(choice, wanted[name], call())
        return median_us(call, True)

    choices = DECODE_CHOICES if kernel.grouped else LONE_CHOICES
    if fmt is not None and kernel.grouped:
        choices = [*EIGHT_BIT_CHOICES, *choices]
    best = tried("tile warps stages per_sm waves", choices, DECODE_CLASS, timed, seconds)
    way = f"{'' if kernel.split else ' whole'}{'' if kernel.grouped else ' lone'}"
    return {
        f"{DIM} {key}{kind_name(fmt)}{way}": dataclasses.asdict(DecodeConfig(*choice))
        for key, choice in best.items()
    }


def tune_prefill(fmt: KvFormat | None, seconds: float) -> dict[str, Any]:
    cases = {name: prefill_case(PREFILL[name], fmt) for name in PREFILL_CLASS}

    def timed(choice: tuple[int, ...], name: str) -> float:
        case, qkv = cases[name]
        call = partial(prefill_attention, **case, scale=SCALE, max_count=4096, kv=qkv)
        check(choice, call(), call(config=PrefillConfig(*choice)))
        return median_us(partial(call, config=PrefillConfig(*choice)), True)

    choices = [*((128, 64, 8, s, g, p) for s, g in ((2, 3), (2, 2), (3, 4)) for p in (False, True))]
    title = "block_m block_n warps stages gather pack"
    best = tried(title, [*choices, *PREFILL_CHOICES], PREFILL_CLASS, timed, seconds)
    return {
        f"{DIM} {key}{kind_name(fmt)}": dataclasses.asdict(PrefillConfig(*choice))
        for key, choice in best.items()
    }


# tile, warps, stages, programs per multiprocessor, waves
LONE_CHOICES = [
    *[(16, 1, 4, 8, 1), (8, 1, 4, 13, 1), (16, 1, 3, 8, 1), (16, 2, 4, 6, 1), (8, 1, 5, 12, 1)],
    *[(16, 1, 5, 6, 1), (16, 2, 3, 8, 1), (32, 4, 3, 4, 1), (16, 1, 4, 8, 2), (16, 4, 4, 6, 1)],
]
EIGHT_BIT_CHOICES = [
    *[(64, 4, 4, 4, 1), (128, 8, 4, 2, 1), (128, 4, 4, 2, 1), (64, 2, 4, 5, 1), (64, 4, 5, 4, 1)],
    *[(128, 8, 4, 3, 1), (32, 2, 4, 8, 1), (64, 4, 5, 3, 1), (128, 4, 5, 2, 1), (64, 2, 5, 6, 1)],
]


def kind_name(fmt: KvFormat | None) -> str:
    return "" if fmt is None else KIND_NAMES[ELEMENTS[fmt.element]]


def check(choice: tuple[int, ...], want: Tensor, got: Tensor) -> None:
    if not (got.double() - want.double()).norm() <= BOUND * want.double().norm():
        raise RuntimeError(f"{choice} gives a wrong result")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--tune", choices=("decode", "prefill"), help="try configurations")
    parser.add_argument("--format", choices=list(KINDS), default="triton_int8kv")
    parser.add_argument(
        "--kernel", choices=list(DECODE_KERNELS), default="triton_gqa_flashdecoding"
    )
    parser.add_argument("--seconds", type=float, default=90, help="how long to tune")
    parser.add_argument("--out", type=Path, help="JSON file that tuning updates")
    options = parser.parse_args()
    if code := refuse(wrong_kernels):
        return code
    if options.tune:
        fmt = KINDS[options.format]
        if options.tune == "decode":
            entries = tune_decode(fmt, DECODE_KERNELS[options.kernel], options.seconds)
        else:
            entries = tune_prefill(fmt, options.seconds)
        print(json.dumps({options.tune: entries}))
        if options.out:
            merge_into(options.out, options.tune, entries)
        return 0
    ceiling = measure_ceiling(options.quick)
    print(f"copy {ceiling.bytes_per_s / 1e12:.2f} TB/s; heads of {DIM}, {GROUPED}, {DTYPE}")
    show_decode(ceiling, options.quick)
    show_prefill(options.quick)
    show_rope(options.quick)
    show_windows(options.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
