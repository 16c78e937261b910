"""Time of attention over latents on a CUDA device, beside what the device can do.

    python bench/kernels_latent.py [--quick] [--tune [--seconds S] [--out FILE]]

No number is printed while a kernel disagrees with its reference. Each call runs in a CUDA graph,
median of many runs with the L2 cache flushed between them. Decode is shown against a copy of as
many bytes as there are latents, and against a large matrix product; prefill absorbed and
decompressed beside each other, with the one that a server would choose. ``--tune`` tries
configurations instead, the likeliest first; its last lines are the best of each class, which
``--out`` merges into a file of the form of asyncllm/kernels/configs/.
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

from asyncllm.kernels.attention.quantize import quantize_ref
from asyncllm.kernels.latent.attend import attend, attend_ref
from asyncllm.kernels.latent.expand import expand, expand_ref
from asyncllm.kernels.latent.heads import heads, heads_ref
from asyncllm.kernels.latent.keys import AttendConfig
from asyncllm.kernels.latent.plan import plan_attend, plan_chunks
from asyncllm.kernels.latent.prefill import LatentPrefillConfig, prefill, prefill_ref
from asyncllm.kernels.latent.write import write, write_ref
from asyncllm.models.attention import decompressed_from
from asyncllm.models.rope import Rope
from asyncllm.models.spec import AttentionSpec
from bench.kernels import (
    BOUND,
    DTYPE,
    Ceiling,
    Rows,
    ints,
    measure_ceiling,
    median_us,
    merge_into,
    randn,
    refuse,
    show,
    tried,
)

RANK, ROPE, NOPE, VALUE = 512, 64, 128, 128
SCALE = (NOPE + ROPE) ** -0.5
DECODE: dict[str, list[int]] = {
    "128 x 4096": [4096] * 128,
    "8 x 16384": [16384] * 8,
    "1 x 4096": [4096],
    "255 x 300 + 1 x 16384": [*[300] * 255, 16384],
}
HEADS = (16, 128)
CHUNKS, PREFIXES = (32, 128, 192, 256, 512, 2048), (0, 4096, 32768)
Case = dict[str, Tensor]


def cached(lengths: list[int]) -> Case:
    """Latents of the lanes in shuffled slots, with the table."""
    total = sum(lengths)
    slots = torch.randperm(total, device="cuda", dtype=torch.int32)
    table = torch.zeros((len(lengths), max(lengths)), device="cuda", dtype=torch.int32)
    for lane, part in enumerate(slots.split(lengths)):
        table[lane, : len(part)] = part
    cache = randn(total + 1, RANK + ROPE)
    return {"cache": cache, "table": table, "lanes": ints(range(len(lengths)))}


def decode_case(lengths: list[int], num_heads: int) -> Case:
    q = randn(len(lengths), num_heads, RANK + ROPE)
    out = torch.zeros_like(q[..., :RANK])
    parts = {"q": q[..., :RANK], "turned": q[..., RANK:], "out": out, "lens": ints(lengths)}
    return parts | cached(lengths)


def in_eight_bits(case: Case) -> Case:
    """``case`` with its latents as 8-bit floats and scales."""
    cache, scales = quantize_ref(case["cache"], torch.float8_e4m3fn, None)
    return {**case, "cache": cache, "scales": scales[:, 0].float()}


def run_decode(case: Case, config: AttendConfig | None = None) -> partial[Tensor]:
    """``attend`` with a plan made before, as layers but the first have it."""
    num_heads = case["q"].shape[1]
    plan = plan_attend(case["lanes"], case["lens"], num_heads, case["cache"], RANK, config=config)
    names = "q", "turned", "cache", "table", "out", "scales"
    given = {name: case[name] for name in names if name in case}
    return partial(attend, **given, scale=SCALE, plan=plan)


class Prefill:
    """A step of rows of (prefix, new tokens), for one group of heads.

    Args:
        made: all rows are decompressed, or none.
    """

    def __init__(self, rows: Rows, num_heads: int, made: bool) -> None:
        counts, totals = [count for _, count in rows], [sum(row) for row in rows]
        tokens, self.num_heads = sum(counts), num_heads
        self.held = cached(totals)
        q = randn(tokens, num_heads, NOPE + ROPE)
        self.q, self.turned = q[..., :NOPE], q[..., NOPE:]
        self.up = randn(num_heads, NOPE + VALUE, RANK) * RANK**-0.5
        self.starts = ints(prefix for prefix, _ in rows)
        self.cu = ints(itertools.accumulate(counts, initial=0))
        self.made = torch.zeros(sum(totals), num_heads, NOPE + VALUE, device="cuda", dtype=DTYPE)
        self.keys = torch.zeros(sum(totals), ROPE, device="cuda", dtype=DTYPE)
        self.out = torch.zeros(tokens, num_heads, VALUE, device="cuda", dtype=DTYPE)
        self.wide, self.summed = (
            torch.zeros(tokens, num_heads, RANK, device="cuda", dtype=DTYPE) for _ in range(2)
        )
        lanes, cache = self.held["lanes"], self.held["cache"]
        self.plan = plan_chunks(
            lanes, self.starts, self.cu, tokens, num_heads, cache, RANK,
            capacity=sum(totals) if made else 0, least=1,
        )  # fmt: skip

    def expand(self) -> None:
        rows = self.held["table"], self.held["lanes"], self.starts, self.cu, self.plan.bases
        expand(self.held["cache"], self.up, *rows, self.plan.tile_ends, self.made, self.keys)

    def prefill(self, config: LatentPrefillConfig | None = None) -> Tensor:
        rows = self.starts, self.cu, self.plan.bases
        whole = self.q, self.turned, self.made, self.keys, *rows, SCALE, self.out
        return prefill(*whole, config=config)

    def run(self) -> Tensor:
        """All that a step launches, the ways that have nothing to do too."""
        heads(self.q, self.up[:, :NOPE], self.plan.state, self.wide)
        cache, table = self.held["cache"], self.held["table"]
        attend(self.wide, self.turned, cache, table, SCALE, plan=self.plan.attend, out=self.summed)
        heads(self.summed, self.up[:, NOPE:].transpose(1, 2), self.plan.state, self.out)
        self.expand()
        return self.prefill()


def wrong_kernels() -> list[str]:
    """Names of kernels that differ from their reference, with the error."""
    found: list[str] = []

    def compare(name: str, want: Tensor, got: Tensor, bound: float = BOUND) -> None:
        error = ((got.double() - want.double()).norm() / want.double().norm()).item()
        if not error <= bound:
            found.append(f"{name}: relative error {error:.1e}")

    for num_heads, lengths in itertools.product(HEADS, ([1, 700, 64, 65, 1300], [300] * 70)):
        case = decode_case(lengths, num_heads)
        for some in (case, in_eight_bits(case)):
            given = {name: tensor for name, tensor in some.items() if name != "out"}
            want = attend_ref(**given, scale=SCALE)
            compare(f"attend, {num_heads} heads", want, run_decode(some)())
    for rows in ([(0, 700), (333, 1), (128, 300)], [(77, 300)], [(900, 3)] * 5):
        some = Prefill(rows, 16, True)
        made, keys = torch.zeros_like(some.made), torch.zeros_like(some.keys)
        held = (some.held[name] for name in ("table", "lanes"))
        cache, bases = some.held["cache"], some.plan.bases
        expand_ref(cache, some.up, *held, some.starts, some.cu, bases, made, keys)
        got = some.run()
        compare("expand", made, some.made)
        compare("expand, keys", keys, some.keys)
        rest = some.starts, some.cu, bases, SCALE, torch.zeros_like(got)
        want = prefill_ref(some.q, some.turned, made, keys, *rest)
        compare("prefill", want, got)
        # rounded on another way: queries and sums instead of keys and values
        absorbed = Prefill(rows, 16, False)
        for name in ("held", "q", "turned", "up"):
            setattr(absorbed, name, getattr(some, name))
        compare("absorbed", want, absorbed.run(), 2 * BOUND)
    x, weight, state = randn(130, 16, NOPE), randn(16, NOPE, RANK), ints([1] * 130)
    out = randn(130, 16, RANK)
    compare("heads", heads_ref(x, weight, state, out.clone()), heads(x, weight, state, out))
    angles = torch.rand((4096, ROPE // 2), device="cuda") * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    raw, norm, turned = randn(9, RANK + ROPE), randn(RANK), randn(9, 16, ROPE)
    cache = randn(40, RANK + ROPE)
    given = norm, 1e-6, cos_sin, ints(range(9)), ints(range(0, 36, 4))
    mirror, want_cache = turned.clone(), cache.clone()
    write(raw, turned, *given, cache, interleaved=True)
    write_ref(raw, mirror, *given, want_cache, interleaved=True)
    compare("write", want_cache, cache)
    compare("write, queries", mirror, turned)
    return found


def show_decode(ceiling: Ceiling, quick: bool) -> None:
    for num_heads, (name, lengths) in itertools.product(HEADS, DECODE.items()):
        case = decode_case(lengths, num_heads)
        us = median_us(run_decode(case), quick)
        rows = len(lengths) * num_heads * (2 * RANK + ROPE)
        num_bytes = 2 * (sum(lengths) * (RANK + ROPE) + rows) + 4 * sum(lengths)
        title = f"{name}, {num_heads} heads"
        show("attend", title, us, ceiling, num_bytes=num_bytes)
        flops = 2 * sum(lengths) * num_heads * (2 * RANK + ROPE)
        show("", "", us, ceiling, flops=flops)
        us = median_us(run_decode(in_eight_bits(case)), quick)
        num_bytes = sum(lengths) * (RANK + ROPE + 8) + 2 * rows
        show("  in 8 bits", "", us, ceiling, num_bytes=num_bytes)
    for tokens in (1, 128):
        x, weight = randn(tokens, 16, NOPE), randn(16, NOPE + VALUE, RANK)
        wide, state = randn(tokens, 16, RANK), ints([1] * tokens)
        us = median_us(partial(heads, x, weight[:, :NOPE], state, wide), quick)
        show("heads, queries", f"{tokens} x 16", us, ceiling, num_bytes=weight.nbytes / 2)
        values = weight[:, NOPE:].transpose(1, 2)
        us = median_us(partial(heads, wide, values, state, x), quick)
        show("heads, values", f"{tokens} x 16", us, ceiling, num_bytes=weight.nbytes / 2)


def spec() -> AttentionSpec:
    return AttentionSpec(
        kind="mla", num_q_heads=16, num_kv_heads=16, head_dim=NOPE + ROPE, v_dim=VALUE, scale=SCALE,
        rope=Rope(theta=1e4, dim=ROPE), kv_rank=RANK,
    )  # fmt: skip


def show_prefill(ceiling: Ceiling, quick: bool) -> None:
    least = decompressed_from(spec())
    print(f"prefill, 16 heads: us absorbed | decompressed (of these expand) | chosen, by {least}")
    for prefix, chunk in itertools.product(PREFIXES, CHUNKS):
        rows = [(prefix, chunk)]
        absorbed = median_us(Prefill(rows, 16, False).run, quick)
        made = Prefill(rows, 16, True)
        decompressed, expanded = median_us(made.run, quick), median_us(made.expand, quick)
        pairs = chunk * prefix + chunk * (chunk + 1) // 2
        flops = 2 * 16 * (pairs * (NOPE + ROPE + VALUE) + (prefix + chunk) * RANK * (NOPE + VALUE))
        chosen, other = absorbed, decompressed
        if chunk**2 > 2 * prefix * (least - chunk):
            chosen, other = decompressed, absorbed
        print(
            f"{chunk:5} new, prefix {prefix:6}: {absorbed:9.1f} | {decompressed:9.1f} "
            f"({expanded:8.1f}) {flops / decompressed * 1e6 / ceiling.flops_per_s:6.1%} | "
            f"{'best' if chosen <= other else f'{chosen / other - 1:.0%} slower'}",
            flush=True,
        )


# likeliest first: tile, warps, stages, programs per multiprocessor
ATTEND_CHOICES = {
    16: [
        *[(32, 4, 5, 2), (32, 4, 4, 2), (16, 4, 7, 2), (32, 8, 7, 1), (64, 8, 4, 1)],
        *[(16, 4, 5, 2), (32, 4, 5, 1), (64, 4, 4, 1), (16, 4, 9, 2), (32, 8, 5, 1)],
    ],
    64: [
        *[(32, 8, 5, 1), (32, 8, 4, 1), (64, 8, 3, 1), (64, 8, 2, 1), (16, 8, 7, 1)],
        *[(16, 8, 5, 1), (32, 8, 6, 1)],
    ],
}
ATTEND_CLASS = {
    "128 x 4096": "many",
    "255 x 300 + 1 x 16384": "many",
    "8 x 16384": "few",
    "1 x 4096": "few",
}
PREFILL_CHOICES = [
    *[(64, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2), (64, 32, 4, 3), (128, 32, 8, 3)],
    *[(64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2), (128, 64, 4, 2)],
]
PREFILL_CLASS = {"1 x 8192": "all", "4 x 512, prefix 8192": "all", "1 x 2048": "all"}


def tune(seconds: float) -> dict[str, dict[str, dict[str, Any]]]:
    """The best configurations by kernel and class."""
    found: dict[str, dict[str, dict[str, Any]]] = {"latent": {}, "latent prefill": {}}
    for pairs, num_heads in zip(ATTEND_CHOICES, HEADS, strict=True):
        cases = {name: decode_case(DECODE[name], num_heads) for name in ATTEND_CLASS}
        wanted = {name: run_decode(case)().clone() for name, case in cases.items()}

        def timed(
            choice: tuple[int, ...], name: str, cases: dict[str, Case] = cases,
            wanted: Case = wanted,
        ) -> float:  # fmt: skip
            call = run_decode(cases[name], AttendConfig(*choice))
            check(choice, wanted[name], call())
            return median_us(call, True)

        title = f"{num_heads} heads: tile warps stages per_sm"
        best = tried(title, ATTEND_CHOICES[pairs], ATTEND_CLASS, timed, seconds / 3)
        for key, choice in best.items():
            found["latent"][f"{pairs} {key}"] = dataclasses.asdict(AttendConfig(*choice))
    rows: list[Rows] = [[(0, 8192)], [(8192, 512)] * 4, [(0, 2048)]]
    steps = {name: Prefill(some, 16, True) for name, some in zip(PREFILL_CLASS, rows, strict=True)}
    made = {name: step.run().clone() for name, step in steps.items()}

    def timed_prefill(choice: tuple[int, ...], name: str) -> float:
        call = partial(steps[name].prefill, LatentPrefillConfig(*choice))
        check(choice, made[name], call())
        return median_us(call, True)

    title = "prefill: block_m block_n warps stages"
    best = tried(title, PREFILL_CHOICES, PREFILL_CLASS, timed_prefill, seconds / 3)
    found["latent prefill"]["all"] = dataclasses.asdict(LatentPrefillConfig(*best["all"]))
    return found


def check(choice: tuple[int, ...], want: Tensor, got: Tensor) -> None:
    if not (got.double() - want.double()).norm() <= BOUND * want.double().norm():
        raise RuntimeError(f"{choice} gives a wrong result")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--tune", action="store_true", help="try configurations")
    parser.add_argument("--seconds", type=float, default=180, help="how long to tune")
    parser.add_argument("--out", type=Path, help="JSON file that tuning updates")
    options = parser.parse_args()
    if code := refuse(wrong_kernels):
        return code
    if options.tune:
        entries = tune(options.seconds)
        print(json.dumps(entries))
        for kernel, found in entries.items():
            if options.out:
                merge_into(options.out, kernel, found)
        return 0
    ceiling = measure_ceiling(options.quick)
    print(
        f"copy {ceiling.bytes_per_s / 1e12:.2f} TB/s, bf16 matrix product "
        f"{ceiling.flops_per_s / 1e12:.0f} TFLOP/s; latents of {RANK} + {ROPE}"
    )
    show_decode(ceiling, options.quick)
    show_prefill(ceiling, options.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
