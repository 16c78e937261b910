"""Time and rate of each kernel on a CUDA device, beside what the device can do.

    python bench/kernels.py [--quick] [--tune decode|prefill]

First every kernel is compared with its reference on small random cases: no number is printed while
one is wrong. Then the two ceilings are measured (a large copy, a large matrix product), then every
kernel in a CUDA graph, median of many runs with the L2 cache flushed between them. ``--tune`` tries
the configurations of one attention kernel instead.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.kernels.decode_attention import (
    DecodeConfig,
    decode_attention,
    decode_attention_ref,
    plan_decode,
)
from asyncllm.kernels.prefill_attention import (
    PrefillConfig,
    prefill_attention,
    prefill_attention_ref,
)
from asyncllm.kernels.rmsnorm import add_rmsnorm, add_rmsnorm_ref, rmsnorm, rmsnorm_ref
from asyncllm.kernels.rope_kv import rope_kv, rope_kv_ref
from asyncllm.kernels.silu_mul import silu_mul, silu_mul_ref

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


def packed_q(num_tokens: int) -> Tensor:
    wide = randn(num_tokens, (Q_HEADS + 2 * KV_HEADS) * DIM)
    return wide[:, : Q_HEADS * DIM].unflatten(1, (Q_HEADS, DIM))


def decode_case(lengths: list[int]) -> dict[str, Tensor]:
    return {"q": packed_q(len(lengths)), "lens": ints(lengths), **cached(lengths)}


def prefill_case(rows: Rows) -> dict[str, Tensor]:
    counts = [count for _, count in rows]
    return {
        "q": packed_q(sum(counts)),
        "starts": ints(prefix for prefix, _ in rows),
        "cu_counts": ints(itertools.accumulate(counts, initial=0)),
        **cached([prefix + count for prefix, count in rows]),
    }


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
    compare("silu_mul", silu_mul_ref(x), silu_mul(x))
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
    for rows in ([(0, 700), (333, 1), (128, 300)], [(900, 3)] * 5, [(900, 16)] * 5):
        prefill = prefill_case(rows)
        want = prefill_attention_ref(**prefill, scale=SCALE)
        most = max(count for _, count in rows)
        compare(
            "prefill_attention", want, prefill_attention(**prefill, max_count=most, scale=SCALE)
        )
    return found


def median_us(call: Callable[[], object], quick: bool) -> float:
    """Median time of a replay of ``call`` in a CUDA graph, L2 flushed before each."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    rep = 30 if quick else 200
    return 1e3 * triton.testing.do_bench(graph.replay, warmup=10, rep=rep, return_mode="median")


def measure_ceiling(quick: bool) -> Ceiling:
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy_us = median_us(partial(target.copy_, source), quick)
    a, b = randn(8192, 8192), randn(8192, 8192)
    out = torch.empty_like(a)
    gemm_us = median_us(partial(torch.mm, a, b, out=out), quick)
    return Ceiling(2 * source.nbytes / copy_us * 1e6, 2 * 8192**3 / gemm_us * 1e6)


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
        us = median_us(partial(silu_mul, x, out), quick)
        show("silu_mul", f"{tokens} x 28672", us, ceiling, num_bytes=1.5 * x.nbytes)
    for tokens in (1, 256, 4096):
        case = rope_case(tokens)
        us = median_us(partial(rope_kv, *case, Q_HEADS), quick)
        moved = 2 * case[0].nbytes + tokens * DIM * 4
        show("rope_kv", f"{tokens} tokens", us, ceiling, num_bytes=moved)


def attention_kernels(ceiling: Ceiling, quick: bool) -> None:
    for name, lengths in DECODE.items():
        case = decode_case(lengths)
        planned = partial(plan_decode, case["lanes"], case["lens"], Q_HEADS, case["k_cache"])
        call = partial(decode_attention, **case, scale=SCALE, plan=planned())
        us = median_us(call, quick)
        show("decode_attention", name, us, ceiling, num_bytes=decode_bytes(lengths))
        show("  its plan", name, median_us(planned, quick), ceiling, num_bytes=8 * len(lengths))
    for name, rows in PREFILL.items():
        most = max(count for _, count in rows)
        call = partial(prefill_attention, **prefill_case(rows), max_count=most, scale=SCALE)
        show("prefill_attention", name, median_us(call, quick), ceiling, flops=prefill_flops(rows))


def tune_decode(ceiling: Ceiling) -> None:
    """Each row: configuration, then TB/s per case."""
    cases = {name: decode_case(DECODE[name]) for name in DECODE if name != "1 x 256"}
    print("tile warps stages per_sm waves: " + ", ".join(cases))
    for choice in itertools.product((32, 64, 128), (2, 4), (4, 5, 7), (2, 3, 4), (1, 4)):
        rates = []
        try:
            for name, case in cases.items():
                plan = plan_decode(
                    case["lanes"], case["lens"], Q_HEADS, case["k_cache"],
                    config=DecodeConfig(*choice),
                )  # fmt: skip
                us = median_us(partial(decode_attention, **case, scale=SCALE, plan=plan), True)
                rates.append(decode_bytes(DECODE[name]) / us / 1e6)
        except OutOfResources:
            continue
        least = min(rates[:3]) * 1e12 / ceiling.bytes_per_s
        report(choice, [f"{rate:5.2f}" for rate in rates], least)


def tune_prefill(ceiling: Ceiling) -> None:
    """Each row: configuration, then TFLOP/s per case."""
    cases = {name: prefill_case(rows) for name, rows in PREFILL.items()}
    print("block_m block_n warps stages: " + ", ".join(cases))
    for choice in itertools.product((64, 128), (32, 64, 128), (4, 8), (3, 5, 7)):
        config = PrefillConfig(*choice)
        call = partial(prefill_attention, max_count=1 << 20, scale=SCALE, config=config)
        rates = []
        try:
            for name, case in cases.items():
                us = median_us(partial(call, **case), True)
                rates.append(prefill_flops(PREFILL[name]) / us / 1e6)
        except OutOfResources:
            continue
        best = max(rates) * 1e12 / ceiling.flops_per_s
        report(choice, [f"{rate:4.0f}" for rate in rates], best)


def report(choice: tuple[int, ...], rates: list[str], share: float) -> None:
    shown = " ".join(f"{value:4}" for value in choice)
    print(f"{shown}:  {'  '.join(rates)}  ({share:.0%})", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--tune", choices=("decode", "prefill"), help="try configurations")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    if wrong := wrong_kernels():
        print("no numbers, results are wrong:\n  " + "\n  ".join(wrong), file=sys.stderr)
        return 1
    ceiling = measure_ceiling(options.quick)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(
        f"copy {ceiling.bytes_per_s / 1e12:.2f} TB/s, "
        f"bf16 matrix product {ceiling.flops_per_s / 1e12:.0f} TFLOP/s; "
        f"{Q_HEADS} query heads, {KV_HEADS} KV heads, head_dim {DIM}, {DTYPE}"
    )
    match options.tune:
        case "decode":
            tune_decode(ceiling)
        case "prefill":
            tune_prefill(ceiling)
        case _:
            small_kernels(ceiling, options.quick)
            attention_kernels(ceiling, options.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
