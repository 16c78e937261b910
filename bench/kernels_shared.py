"""Decode attention with shared prefixes on a CUDA device: what reading them once saves, and costs.

    python bench/kernels_shared.py [--quick] [--format NAME] [--tune [--seconds S]] [--out DIR]

No number is printed while a kernel disagrees with its reference. Each call is one layer's in a CUDA
graph, the L2 cache flushed before it, median of many runs. For each shape: microseconds without
groups, with them, of the shared part alone; the bytes that must be read with groups, as a share of
the rate of a large copy; and the tokens' K/V that are not read again. "nothing shared" has the
mechanism and no groups: its cost is what every step pays. The lines "n x length" have groups of few
rows beside rows that share nothing: where they save less than they cost no group should be formed.
``--tune`` tries tiles and splits on some of the shapes instead. ``--out`` takes all as JSON.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.kernels.attention.decode import decode_attention, decode_attention_ref
from asyncllm.kernels.attention.decode_plan import DecodePlan, plan_decode
from asyncllm.kernels.attention.kv8 import num_scales
from asyncllm.kernels.attention.scores import to_log2
from asyncllm.kernels.attention.shared import SharedConfig, attend_shared
from asyncllm.kernels.attention.shared_rows import MAX_GROUPS, SharedRows
from bench.kernels import (
    BOUND,
    DIM,
    KV_HEADS,
    Q_HEADS,
    SCALE,
    ints,
    measure_ceiling,
    median_us,
    randn,
)
from bench.kernels_modes import KINDS, PLAIN, Case, in_format

Groups = list[tuple[int, int, int, int]]  # first token, token behind the last; first row, how many


@dataclasses.dataclass(frozen=True)
class Shape:
    lengths: list[int]
    groups: Groups

    @property
    def saved(self) -> int:
        """Tokens whose K/V are not read again."""
        return sum((stop - begin) * (count - 1) for begin, stop, _, count in self.groups)


def alike(num: int, shared: int, own: int) -> Shape:
    return Shape([shared + own] * num, [(0, shared, 0, num)] if shared else [])


def beside(num: int, length: int, times: int = 1) -> Shape:
    """Groups of ``num`` rows beside others, 64 rows of 1200 tokens in all."""
    return Shape([1200] * 64, [(0, length, i * num, num) for i in range(times)])


NESTED = Shape([2036] * 128, [(0, 512, 0, 128), *((512, 1536, 32 * i, 32) for i in range(4))])
SHAPES: dict[str, Shape] = {
    "128 x (1536 + 576)": alike(128, 1536, 576),
    "256 x 1200, 4 x 1024 shared": Shape([1200] * 256, [(0, 1024, 64 * i, 64) for i in range(4)]),
    "128 x (512 + 4 x 1024 + 500)": NESTED,
    "8 x (12000 + 250)": alike(8, 12000, 250),
    "32 x (1024 + 200)": alike(32, 1024, 200),
    "512 x (700 + 300)": alike(512, 700, 300),
    "4 x (2048 + 200)": alike(4, 2048, 200),
    "nothing shared, 256 x 1200": alike(256, 0, 1200),
    "nothing shared, 64 x 300": alike(64, 0, 300),
    "nothing shared, 8 x 600": alike(8, 0, 600),
    **{f"{n} x {m} beside": beside(n, m) for n in (2, 4, 16) for m in (128, 512, 1100)},
    "16 groups of 2 x 512": beside(2, 512, 16),
    "16 groups of 4 x 256": beside(4, 256, 16),
}
TUNED = [
    "128 x (1536 + 576)",
    "256 x 1200, 4 x 1024 shared",
    "8 x (12000 + 250)",
    "512 x (700 + 300)",
]
# likeliest first: block_m, block_n, warps, stages, min_tiles, programs per multiprocessor
CHOICES = [
    *[(64, 64, 4, 3, 4, 2), (64, 64, 4, 3, 4, 1), (64, 64, 4, 4, 4, 2), (128, 64, 8, 3, 4, 1)],
    *[(128, 64, 8, 3, 4, 2), (64, 32, 4, 4, 8, 3), (64, 64, 4, 2, 4, 2), (128, 128, 8, 3, 2, 1)],
    *[(64, 128, 4, 3, 2, 1), (64, 64, 4, 3, 8, 2), (32, 64, 4, 3, 4, 3), (64, 64, 4, 3, 2, 2)],
    *[(128, 64, 8, 4, 4, 1), (64, 32, 4, 5, 8, 2), (16, 64, 4, 4, 4, 3), (64, 32, 4, 3, 4, 4)],
]


def case_of(shape: Shape, fmt: str) -> Case:
    """Rows in shuffled slots; the members of a group have those of its first one."""
    lengths, total = shape.lengths, sum(shape.lengths)
    table = torch.zeros((len(lengths), max(lengths)), dtype=torch.int32)
    for row, part in enumerate(torch.randperm(total, dtype=torch.int32).split(lengths)):
        table[row, : len(part)] = part
    for begin, stop, first, count in shape.groups:
        table[first : first + count, begin:stop] = table[first, begin:stop]
    caches = {name: randn(total + 1, KV_HEADS, DIM) for name in ("k_cache", "v_cache")}
    lanes = ints(range(len(lengths)))
    q = randn(len(lengths), Q_HEADS, DIM)
    return {
        "q": q, "lens": ints(lengths), "lanes": lanes, "table": table.cuda(),
        **in_format(caches, KINDS[fmt]),
    }  # fmt: skip


def rows_of(shape: Shape) -> SharedRows:
    num = len(shape.lengths)
    groups = torch.zeros((4, MAX_GROUPS), dtype=torch.int32)
    places, owns = torch.full((num,), -1, dtype=torch.int32), torch.zeros(num, dtype=torch.int32)
    for i, (begin, stop, first, count) in enumerate(shape.groups):
        groups[:, i] = torch.tensor([begin, stop, first, count])
        some = slice(first, first + count)
        places[some] = torch.arange(first, first + count, dtype=torch.int32)
        owns[some] = torch.maximum(owns[some], torch.tensor(stop))
    return SharedRows(groups.cuda(), ints(range(num)), places.cuda(), owns.cuda())


def planned(case: Case, shared: SharedRows | None, config: SharedConfig | None) -> DecodePlan:
    return plan_decode(
        case["lanes"], case["lens"], Q_HEADS, case["k_cache"], shared=shared, shared_config=config
    )


def alone(case: Case, plan: DecodePlan) -> None:
    """The shared part of a layer's attention."""
    q, scales = case["q"], case.get("scales")
    caches = case["k_cache"], case["v_cache"]
    assert plan.shared is not None
    attend_shared(
        plan.shared, q, *caches, case["table"], case["lanes"], scales,
        num_scales(caches[0], scales, q.dtype), to_log2(SCALE, None),
    )  # fmt: skip


def bytes_read(case: Case, num_tokens: int) -> float:
    k, scales = case["k_cache"], case.get("scales")
    token = 2 * KV_HEADS * DIM * k.element_size() + 4
    token += 0 if scales is None else scales[0].nbytes
    return num_tokens * token + 2 * case["q"].nbytes


def wrong(fmt: str, config: SharedConfig | None = None) -> list[str]:
    """Shapes, small and large, of which the result differs from the reference."""
    found = []
    small = Shape([700 - i for i in range(9)], [(0, 333, 0, 9), (333, 600, 0, 4), (333, 650, 6, 2)])
    for name, shape in {"small": small, **{n: SHAPES[n] for n in TUNED}, "nested": NESTED}.items():
        case = case_of(shape, fmt)
        some = slice(0, 9)  # the reference takes its time
        less = {**case, **{key: case[key][some] for key in ("q", "lanes", "lens")}}
        want = decode_attention_ref(**less, scale=SCALE)
        plan = planned(case, rows_of(shape), config)
        for _ in range(2):  # the second finds what the first left
            got = decode_attention(**case, scale=SCALE, plan=plan)
        plain = decode_attention(**case, scale=SCALE)
        for what, right, is_ in (("reference", want, got[some]), ("unshared", plain, got)):
            error = ((is_.double() - right.double()).norm() / right.double().norm()).item()
            if not error <= BOUND:
                found.append(f"{fmt}, {name}: {error:.1e} from the {what}")
    return found


def measure(fmt: str, rate: float, quick: bool) -> list[dict[str, Any]]:
    lines = []
    for name, shape in SHAPES.items():
        case, found = case_of(shape, fmt), {}
        plain = planned(case, None, None)
        plan = planned(case, rows_of(shape), None)
        call = partial(decode_attention, **case, scale=SCALE, out=torch.empty_like(case["q"]))
        found["plain_us"] = median_us(partial(call, plan=plain), quick)
        found["us"] = median_us(partial(call, plan=plan), quick)
        found["shared_us"] = median_us(partial(alone, case, plan), quick)
        found["plan_us"] = median_us(partial(planned, case, rows_of(shape), None), quick)
        read = bytes_read(case, sum(shape.lengths) - shape.saved)
        found["of_copy"] = read / found["us"] * 1e6 / rate
        line = {"shape": name, "format": fmt, "saved": shape.saved, **found}
        print(
            f"{fmt:13} {name:30} {found['plain_us']:8.1f} {found['us']:8.1f} "
            f"{found['us'] / found['plain_us']:6.3f} {found['shared_us']:7.1f} "
            f"{found['plan_us']:6.1f} {found['of_copy']:6.1%} {shape.saved:9,}",
            flush=True,
        )
        lines.append(line)
    return lines


def tune(fmt: str, seconds: float) -> list[dict[str, Any]]:
    """Configurations on some shapes, microseconds with all of a layer's attention."""
    until, lines = time.monotonic() + seconds, []
    cases = {name: (case_of(SHAPES[name], fmt), rows_of(SHAPES[name])) for name in TUNED}
    for choice in CHOICES:
        if time.monotonic() > until:
            break
        config, times = SharedConfig(*choice), {}
        try:
            for name, (case, rows) in cases.items():
                plan = planned(case, rows, config)
                want = decode_attention(**case, scale=SCALE)
                call = partial(decode_attention, **case, scale=SCALE, plan=plan)
                got = call()
                if not (got.double() - want.double()).norm() <= BOUND * want.double().norm():
                    raise RuntimeError(f"{choice} gives a wrong result")
                times[name] = median_us(call, True), median_us(partial(alone, case, plan), True)
        except Exception as error:  # what does not build is left out
            print(f"{fmt:13} {choice}: {type(error).__name__}: {str(error)[:80]}", flush=True)
            continue
        lines.append({"format": fmt, "choice": choice, "us": times})
        shown = "  ".join(f"{us:7.1f} ({alone_us:5.1f})" for us, alone_us in times.values())
        print(f"{fmt:13} {choice!s:26} {shown}", flush=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--format", choices=[*KINDS], help="of K/V; all without it")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, help="a folder for results as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    formats = [args.format] if args.format else [PLAIN, *[f for f in KINDS if f != PLAIN]]
    if bad := list(itertools.chain(*map(wrong, formats))):
        print("\n".join(bad))
        return 1
    print(f"{torch.cuda.get_device_name()}: agrees with the reference in {', '.join(formats)}")
    ceiling = measure_ceiling(True)
    print(f"copy {ceiling.bytes_per_s / 1e12:.2f} TB/s", flush=True)
    lines = []
    if args.tune:
        print("us a layer (of it the shared part): " + ", ".join(TUNED))
        for fmt in formats:
            lines += tune(fmt, args.seconds / len(formats))
    else:
        print(
            f"{'format':13} {'shape':30}    plain   shared  ratio   alone   plan   copy     saved"
        )
        for fmt in formats:
            lines += measure(fmt, ceiling.bytes_per_s, args.quick or fmt != PLAIN)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        found = {
            "device": torch.cuda.get_device_name(),
            "copy": ceiling.bytes_per_s,
            "lines": lines,
        }
        (args.out / f"shared{'_tune' if args.tune else ''}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
