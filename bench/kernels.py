"""Time and rate of each kernel on a CUDA device, beside what the device can do.

    python bench/kernels.py [--quick] [--only NAME] [--tune decode|prefill [--seconds S] [--out FILE]]

First every kernel is compared with its reference on small random cases: no number is printed while
one is wrong. Then the two ceilings are measured (a large copy, a large matrix product), then every
kernel in a CUDA graph, median of many runs with the L2 cache flushed between them. ``--tune`` tries
configurations of one attention kernel instead, the likeliest first, for about ``--seconds``; its
last lines are the best of each class, which ``--out`` merges into a file of the form of
asyncllm/kernels/configs/.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.kernels.attention.decode import decode_attention, decode_attention_ref
from asyncllm.kernels.attention.decode_plan import DecodeConfig, plan_decode
from asyncllm.kernels.attention.kv_write import rope_kv, rope_kv_ref
from asyncllm.kernels.attention.prefill import (
    PrefillConfig,
    prefill_attention,
    prefill_attention_ref,
)
from asyncllm.kernels.gated import gated, gated_ref
from asyncllm.kernels.qk_rmsnorm import qk_rmsnorm, qk_rmsnorm_ref
from asyncllm.kernels.rmsnorm import add_rmsnorm, add_rmsnorm_ref, rmsnorm, rmsnorm_ref

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
DTYPE = torch.bfloat16
BOUND = 8e-3  # relative RMS error of a bf16 result
Rows = list[tuple[int, int]]  # (prefix, new tokens) of each row

DECODE: dict[str, list[int]] = {
    "256 x 1200": [1200] * 256,
    "64 x 1200": [1200] * 64,
    "8 x 16384": [16384] * 8,
    "1 x 8192": [8192],
    "1 x 256": [256],
    "255 x 300 + 1 x 16384": [*[300] * 255, 16384],
}
PREFILL: dict[str, Rows] = {
    "1 x 8192": [(0, 8192)],
    "8 x 2048": [(0, 2048)] * 8,
    "1 x 2048": [(0, 2048)],
    "16 x 512, prefix 4096": [(4096, 512)] * 16,
    "1 x 512": [(0, 512)],
    "1 x 256, prefix 1024": [(1024, 256)],
}


@dataclass(frozen=True)
class Ceiling:
    """What the device reached in this run."""

    bytes_per_s: float
    flops_per_s: float


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def ints(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), device="cuda", dtype=torch.int32)


def cached(lengths: list[int]) -> dict[str, Tensor]:
    """K/V of the lanes in shuffled slots, with the table."""
    total = sum(lengths)
    slots = torch.randperm(total, device="cuda", dtype=torch.int32)
    table = torch.zeros((len(lengths), max(lengths)), device="cuda", dtype=torch.int32)
    for lane, part in enumerate(slots.split(lengths)):
        table[lane, : len(part)] = part
    return {
        "k_cache": randn(total + 1, KV_HEADS, DIM),
        "v_cache": randn(total + 1, KV_HEADS, DIM),
        "table": table,
        "lanes": ints(range(len(lengths))),
    }


def packed(num_tokens: int) -> Tensor:
    return randn(num_tokens, (Q_HEADS + 2 * KV_HEADS) * DIM)


def q_of(qkv: Tensor) -> Tensor:
    return qkv[:, : Q_HEADS * DIM].unflatten(1, (Q_HEADS, DIM))


def decode_case(lengths: list[int]) -> dict[str, Tensor]:
    return {"q": q_of(packed(len(lengths))), "lens": ints(lengths), **cached(lengths)}


def prefill_case(rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of prefill attention, and the packed qkv with the same new K and V."""
    counts = [count for _, count in rows]
    case = cached([prefix + count for prefix, count in rows])
    qkv = packed(sum(counts))
    heads = qkv.unflatten(1, (-1, DIM))
    for lane, part in enumerate(heads.split(counts)):
        prefix, count = rows[lane]
        slots = case["table"][lane, prefix : prefix + count].long()
        case["k_cache"][slots] = part[:, Q_HEADS:-KV_HEADS]
        case["v_cache"][slots] = part[:, -KV_HEADS:]
    case |= {
        "q": q_of(qkv),
        "starts": ints(prefix for prefix, _ in rows),
        "cu_counts": ints(itertools.accumulate(counts, initial=0)),
    }
    return case, qkv


def rope_case(num_tokens: int) -> list[Tensor]:
    """qkv, cos_sin, positions, slots, k_cache, v_cache."""
    angles = torch.rand((4096, DIM // 2), device="cuda") * 6
    return [
        randn(num_tokens, (Q_HEADS + 2 * KV_HEADS) * DIM),
        torch.cat((angles.cos(), angles.sin()), dim=1),
        torch.randint(4096, (num_tokens,), device="cuda", dtype=torch.int32),
        torch.randperm(2 * num_tokens, device="cuda", dtype=torch.int32)[:num_tokens],
        randn(2 * num_tokens + 1, KV_HEADS, DIM),
        randn(2 * num_tokens + 1, KV_HEADS, DIM),
    ]


def wrong_kernels() -> list[str]:
    """Names of kernels that differ from their reference, with the error."""
    found: list[str] = []

    def compare(name: str, want: Tensor, got: Tensor) -> None:
        error = ((got.double() - want.double()).norm() / want.double().norm()).item()
        if not error <= BOUND:
            found.append(f"{name}: relative error {error:.1e}")

    x, residual, weight = randn(37, 4096), randn(37, 4096), randn(4096)
    compare("rmsnorm", rmsnorm_ref(x, weight, 1e-5), rmsnorm(x, weight, 1e-5))
    normed, total = add_rmsnorm_ref(x, residual, weight, 1e-5)
    compare("add_rmsnorm", normed, add_rmsnorm(x, residual, weight, 1e-5)[0])
    compare("add_rmsnorm, residual", total, residual)
    wide = randn(4096).float()
    compare("rmsnorm, float32 weight", rmsnorm_ref(x, wide, 1e-5), rmsnorm(x, wide, 1e-5))
    for activation in ("silu", "gelu_tanh"):
        compare(f"gated, {activation}", gated_ref(x, activation), gated(x, activation))
    heads = [randn(37, (Q_HEADS + 2 * KV_HEADS) * DIM), randn(DIM), randn(DIM)]
    mirror = [t.clone() for t in heads]
    qk_rmsnorm_ref(*mirror, Q_HEADS, KV_HEADS, 1e-5)
    qk_rmsnorm(*heads, Q_HEADS, KV_HEADS, 1e-5)
    compare("qk_rmsnorm", mirror[0], heads[0])
    case = rope_case(37)
    mirror = [t.clone() for t in case]
    rope_kv_ref(*mirror, Q_HEADS)
    rope_kv(*case, Q_HEADS)
    for part, index in (("qkv", 0), ("k", 4), ("v", 5)):
        compare(f"rope_kv, {part}", mirror[index], case[index])
    for lengths in ([1, 700, 64, 65, 1300], [300] * 70, [5000]):
        decode = decode_case(lengths)
        want = decode_attention_ref(**decode, scale=SCALE)
        compare("decode_attention", want, decode_attention(**decode, scale=SCALE))
    for rows in ([(0, 1700), (333, 1), (128, 300)], [(77, 300)], [(900, 3)] * 5, [(900, 16)] * 5):
        prefill, qkv = prefill_case(rows)
        want = prefill_attention_ref(**prefill, scale=SCALE)
        call = partial(prefill_attention, **prefill, scale=SCALE)
        for most in (max(count for _, count in rows), 4096):
            compare("prefill_attention", want, call(max_count=most))
            compare("prefill_attention, kv", want, call(max_count=most, kv=qkv))
    return found


def median_us(call: Callable[[], object], quick: bool) -> float:
    """Median time of a replay of ``call`` in a CUDA graph, L2 flushed before each."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    rep = 30 if quick else 200
    return 1e3 * triton.testing.do_bench(graph.replay, warmup=10, rep=rep, return_mode="median")


def in_turn_us(calls: Sequence[Callable[[], object]], quick: bool, turns: int = 1) -> float:
    """Median time per call of a graph that runs all ``calls`` in turn, ``turns`` times over; they
    see to it that no cache helps."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * turns:
            call()
    times = []
    for _ in range(8 if quick else 20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[2:]) / (turns * len(calls))


def measure_ceiling(quick: bool) -> Ceiling:
    """Bytes read and written by the best of a few large contiguous copies (device time between two
    events around each), and the rate of a matrix product."""
    source = torch.randn(2**29, device="cuda")  # 2 GiB: far over any cache
    target = torch.empty_like(source)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    for event in events:
        target.copy_(source)
        event.record()
    torch.cuda.synchronize()
    copy_ms = min(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    a, b = randn(8192, 8192), randn(8192, 8192)
    out = torch.empty_like(a)
    gemm_us = median_us(partial(torch.mm, a, b, out=out), quick)
    return Ceiling(2 * source.nbytes / copy_ms * 1e3, 2 * 8192**3 / gemm_us * 1e6)


def show(kernel: str, shape: str, us: float, ceiling: Ceiling, **work: float) -> None:
    """One row; ``work`` is num_bytes or flops."""
    [(kind, amount)] = work.items()
    rate = amount / us * 1e6
    top = ceiling.bytes_per_s if kind == "num_bytes" else ceiling.flops_per_s
    unit = "TB/s" if kind == "num_bytes" else "TFLOP/s"
    number = f"{rate / 1e12:8.2f} {unit:7}"
    print(f"{kernel:18} {shape:28} {us:10.1f} us {number} {rate / top:6.1%}", flush=True)


def decode_bytes(lengths: list[int]) -> float:
    return sum(lengths) * (KV_HEADS * DIM * 4 + 4) + len(lengths) * Q_HEADS * DIM * 4


def prefill_flops(rows: Rows) -> float:
    pairs = sum(count * prefix + count * (count + 1) // 2 for prefix, count in rows)
    return 4 * Q_HEADS * DIM * pairs


def small_kernels(ceiling: Ceiling, quick: bool) -> None:
    weight = randn(4096)
    for tokens in (1, 256, 4096):
        x, residual, out = randn(tokens, 4096), randn(tokens, 4096), randn(tokens, 4096)
        us = median_us(partial(rmsnorm, x, weight, 1e-5, out), quick)
        show("rmsnorm", f"{tokens} x 4096", us, ceiling, num_bytes=2 * x.nbytes)
        us = median_us(partial(add_rmsnorm, x, residual, weight, 1e-5, out), quick)
        show("add_rmsnorm", f"{tokens} x 4096", us, ceiling, num_bytes=4 * x.nbytes)
    for tokens in (1, 256):
        x, out = randn(tokens, 28672), randn(tokens, 14336)
        for activation in ("silu", "gelu_tanh"):
            us = median_us(partial(gated, x, activation, out), quick)
            show(f"gated, {activation}", f"{tokens} x 28672", us, ceiling, num_bytes=1.5 * x.nbytes)
    for tokens in (1, 64, 4096):
        qkv, q, k = randn(tokens, (Q_HEADS + 2 * KV_HEADS) * DIM), randn(DIM), randn(DIM)
        us = median_us(partial(qk_rmsnorm, qkv, q, k, Q_HEADS, KV_HEADS, 1e-5), quick)
        moved = 2 * tokens * (Q_HEADS + KV_HEADS) * DIM * 2
        show("qk_rmsnorm", f"{tokens} tokens", us, ceiling, num_bytes=moved)
    for tokens in (1, 256, 4096):
        case = rope_case(tokens)
        us = median_us(partial(rope_kv, *case, Q_HEADS), quick)
        moved = 2 * case[0].nbytes + tokens * DIM * 4
        show("rope_kv", f"{tokens} tokens", us, ceiling, num_bytes=moved)


def decode_kernels(ceiling: Ceiling, quick: bool) -> None:
    for name, lengths in DECODE.items():
        case = decode_case(lengths)
        planned = partial(plan_decode, case["lanes"], case["lens"], Q_HEADS, case["k_cache"])
        call = partial(decode_attention, **case, scale=SCALE, plan=planned())
        us = median_us(call, quick)
        show("decode_attention", name, us, ceiling, num_bytes=decode_bytes(lengths))
        show("  its plan", name, median_us(planned, quick), ceiling, num_bytes=8 * len(lengths))


def prefill_kernels(ceiling: Ceiling, quick: bool) -> None:
    for name, rows in PREFILL.items():
        most = max(count for _, count in rows)
        case, qkv = prefill_case(rows)
        call = partial(
            prefill_attention, **case, max_count=most, scale=SCALE, out=case["q"].clone()
        )
        us = median_us(partial(call, kv=qkv), quick)
        show("prefill_attention", name, us, ceiling, flops=prefill_flops(rows))
        show("  without kv", name, median_us(call, quick), ceiling, flops=prefill_flops(rows))


# case -> class of its shape: the key of its configuration
DECODE_CLASS = {
    "256 x 1200": "many",
    "64 x 1200": "many",
    "8 x 16384": "some",
    "255 x 300 + 1 x 16384": "many",
    "1 x 8192": "few",
    "1 x 256": "few",
}
PREFILL_CLASS = {
    "1 x 8192": 128,
    "8 x 2048": 128,
    "1 x 2048": 128,
    "16 x 512, prefix 4096": 128,
    "1 x 512": 64,
    "1 x 256, prefix 1024": 64,
}
# likeliest first: tile, warps, stages, programs per multiprocessor, waves
DECODE_CHOICES = [
    *[(64, 4, 4, 3, 1), (64, 4, 4, 4, 1), (64, 4, 5, 2, 1), (128, 4, 4, 2, 1), (32, 4, 5, 4, 1)],
    *[(64, 4, 4, 3, 2), (32, 4, 7, 3, 1), (64, 8, 4, 2, 1), (64, 4, 5, 3, 1), (32, 4, 4, 6, 1)],
    *[(128, 8, 4, 2, 1), (64, 4, 4, 3, 4), (32, 2, 5, 6, 1), (64, 2, 4, 4, 1), (128, 4, 4, 1, 1)],
    *[(64, 4, 7, 2, 1), (32, 4, 4, 4, 2), (16, 4, 7, 4, 1), (64, 8, 5, 3, 1), (128, 8, 5, 1, 1)],
]
# block_m, block_n, warps, stages, gather stages, pack
PREFILL_CHOICES = [
    *[(64, 64, 4, 2, 3, False), (64, 64, 4, 2, 3, True), (128, 128, 8, 2, 3, True)],
    *[(64, 32, 4, 3, 4, False), (64, 64, 4, 2, 2, False), (64, 32, 4, 2, 3, True)],
    *[(128, 128, 8, 2, 3, False), (64, 32, 4, 4, 5, False), (128, 64, 8, 3, 4, True)],
    *[(64, 32, 4, 2, 3, False), (128, 64, 8, 2, 3, False), (64, 32, 4, 3, 4, True)],
    *[(64, 64, 4, 3, 3, False), (128, 64, 8, 4, 4, True), (64, 128, 4, 2, 3, True)],
]


def tune_decode(seconds: float) -> dict[str, dict[str, Any]]:
    """Tries the configurations; microseconds a case, and the best of each class by its key."""
    cases = {name: decode_case(DECODE[name]) for name in DECODE_CLASS}

    def timed(choice: tuple[int, ...], name: str) -> float:
        case, config = cases[name], DecodeConfig(*choice)
        planned = partial(
            plan_decode, case["lanes"], case["lens"], Q_HEADS, case["k_cache"], config=config
        )
        call = partial(decode_attention, **case, scale=SCALE)
        want, got = call(), call(plan=planned())
        if not (got.double() - want.double()).norm() <= BOUND * want.double().norm():
            raise RuntimeError(f"{choice} gives a wrong result")
        return median_us(partial(call, plan=planned(), out=got), True)

    best = tried("tile warps stages per_sm waves", DECODE_CHOICES, DECODE_CLASS, timed, seconds)
    return {f"128 {key}": dataclasses.asdict(DecodeConfig(*choice)) for key, choice in best.items()}


def tune_prefill(seconds: float) -> dict[str, dict[str, Any]]:
    """As ``tune_decode``; blocks of 64 pairs compete for their class only."""
    cases = {name: prefill_case(PREFILL[name]) for name in PREFILL_CLASS}

    def timed(choice: tuple[int, ...], name: str) -> float:
        case, qkv = cases[name]
        call = partial(prefill_attention, **case, scale=SCALE, max_count=4096, kv=qkv)
        want, got = call(), call(config=PrefillConfig(*choice))
        if not (got.double() - want.double()).norm() <= BOUND * want.double().norm():
            raise RuntimeError(f"{choice} gives a wrong result")
        return median_us(partial(call, config=PrefillConfig(*choice), out=got), True)

    best = tried(
        "block_m block_n warps stages gather pack", PREFILL_CHOICES, PREFILL_CLASS, timed, seconds
    )
    return {
        f"128 {key}": dataclasses.asdict(PrefillConfig(*choice)) for key, choice in best.items()
    }


def tried(
    title: str,
    choices: list[Any],
    classes: dict[str, Any],
    timed: Callable[[tuple[int, ...], str], float],
    seconds: float,
) -> dict[str, tuple[int, ...]]:
    """Times each choice in each case until the seconds are over; per class, the choice of least
    relative time over its cases."""
    end = time.monotonic() + seconds
    names = list(classes)
    times: dict[tuple[int, ...], dict[str, float]] = {}
    print(f"{title}: us of " + " | ".join(names))
    for choice in choices:
        if time.monotonic() > end:
            print(f"{len(choices) - len(times)} of {len(choices)} not tried: time is over")
            break
        try:
            times[choice] = {name: timed(choice, name) for name in names}
        except OutOfResources:
            print(f"{choice}: does not fit")
            continue
        shown = "  ".join(f"{us:8.1f}" for us in times[choice].values())
        print(" ".join(f"{int(value):4}" for value in choice) + ":  " + shown, flush=True)
    least = {name: min(found[name] for found in times.values()) for name in names}
    best = {}
    for key in dict.fromkeys(classes.values()):
        mine = [name for name in names if classes[name] == key]
        best[key] = min(times, key=lambda c: sum(times[c][n] / least[n] for n in mine))
        print(f"best for {key}: {best[key]}")
    return best


def merge_into(path: Path, kernel: str, entries: dict[str, dict[str, Any]]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(kernel, {}).update(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def refuse(wrong_kernels: Callable[[], list[str]]) -> int:
    """The exit code of a command that measures nothing, since there is no device or since kernels
    disagree with their references; 0 after the device's name has been printed."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    if wrong := wrong_kernels():
        print("no numbers, results are wrong:\n  " + "\n  ".join(wrong), file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--tune", choices=("decode", "prefill"), help="try configurations")
    parser.add_argument("--seconds", type=float, default=60, help="how long to tune")
    parser.add_argument("--out", type=Path, help="JSON file that tuning updates")
    parser.add_argument("--only", choices=("small", "decode", "prefill"), help="these kernels")
    options = parser.parse_args()
    if code := refuse(wrong_kernels):
        return code
    ceiling = measure_ceiling(options.quick)
    print(
        f"copy {ceiling.bytes_per_s / 1e12:.2f} TB/s, "
        f"bf16 matrix product {ceiling.flops_per_s / 1e12:.0f} TFLOP/s; "
        f"{Q_HEADS} query heads, {KV_HEADS} KV heads, head_dim {DIM}, {DTYPE}"
    )
    if options.tune:
        tune = {"decode": tune_decode, "prefill": tune_prefill}[options.tune]
        entries = tune(options.seconds)
        print(json.dumps({options.tune: entries}))
        if options.out:
            merge_into(options.out, options.tune, entries)
        return 0
    parts = {"small": small_kernels, "decode": decode_kernels, "prefill": prefill_kernels}
    for name, part in parts.items():
        if options.only in (None, name):
            part(ceiling, options.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
