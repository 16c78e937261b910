"""Profiles of steady prefill and decode steps of the offline engine, as tables.

Owns which kernel or operator belongs to which part of a step; knows nothing of how steps are made.
``bench/profile.py`` is its command.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvloop
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from asyncllm.errors import StartupError
from asyncllm.server.loading import Loaded
from bench.offline import (
    Phase,
    Workload,
    add_workload,
    engine,
    engine_config,
    load,
    random_workloads,
)

EXPERTS = "experts"
ATTENTION = "attention"  # with the phase's name: kernels for both would have one name on a CPU
GEMM, NORM, SAMPLING, COPIES = "gemm", "norm, rope, activation", "sampling", "copies"
COMMUNICATION, ELEMENTWISE, OTHER = "communication", "other elementwise", "other"
# the first that matches the lower-case name of a kernel or operator
GROUPS = tuple(
    (group, re.compile(pattern))
    for group, pattern in (
        (COMMUNICATION, r"nccl|gloo|c10d|all_?reduce|all_?gather|one_shot|two_shot|multimem"),
        (COPIES, r"memcpy|memset"),
        (f"{ATTENTION} prefill", r"prefill"),
        (f"{ATTENTION} decode", r"_decode_|_merge_kernel|_plan_kernel|split_?kv"),
        (EXPERTS, r"^_(route|order|product|sum)_kernel"),
        (ATTENTION, r"scaled_dot_product|flash|fmha|efficient_attention|attention"),
        (
            GEMM,
            r"gemm|gemv|nvjet|cutlass|cublas|splitk|xmma|mkldnn|onednn|"
            r"aten::(mm|addmm|bmm|baddbmm|matmul|linear)$|_linear_kernel",
        ),
        (NORM, r"rms_?norm|layer_?norm|rope|rotary|gated|silu|swiglu|gelu"),
        (
            SAMPLING,
            r"argmax|sort|radix|topk|top_?[kp]_|softmax|cumsum|scan|searchsorted|sampl|threshold|"
            r"penal|logit",
        ),
        (
            COPIES,
            r"copy|index|gather|scatter|embedding|catarray|fill|clone|contiguous|"
            r"aten::(cat|to|where|zero_|zeros|empty.*|masked_fill.*)$",
        ),
        (ELEMENTWISE, r"elementwise|reduce_kernel|aten::(add|sub|mul|div|pow|neg|mean|sum|lt|le)_?$"),
    )
)  # fmt: skip
TOP = 12  # kernels listed by name
NAME_CHARS = 56


@dataclass(frozen=True, slots=True)
class Event:
    """One kernel on a GPU, or the own time of one operator on a CPU; microseconds."""

    name: str
    group: str
    start: float
    end: float
    own: float  # without what is called inside


@dataclass(frozen=True, slots=True)
class Share:
    """A line of a table: a group, or a kernel of one."""

    name: str
    group: str
    total_us: float
    calls: int


def group_of(name: str, phase: str) -> str:
    """The part of a step that a kernel or operator belongs to."""
    lower = name.lower()
    for group, pattern in GROUPS:
        if pattern.search(lower):
            return f"{ATTENTION} {phase}" if group == ATTENTION else group
    return OTHER


def device_events(raw: Iterable[Any], phase: str) -> list[Event]:
    """What ran on the device: kernels if there are any, else operators of the busiest thread.

    Args:
        raw: torch's ``FunctionEvent``s. An operator belongs where its outermost caller with a
            group does: a transpose inside a product is part of the product.
    """
    every = [e for e in raw if not e.is_user_annotation]
    kernels = [e for e in every if e.device_type.name == "CUDA"]
    if kernels:
        return [
            Event(
                e.name,
                group_of(e.name, phase),
                e.time_range.start,
                e.time_range.end,
                e.time_range.end - e.time_range.start,
            )
            for e in kernels
        ]
    by_thread: dict[int, list[Any]] = defaultdict(list)
    for e in every:
        by_thread[e.thread].append(e)
    operators = max(by_thread.values(), key=lambda es: sum(e.self_cpu_time_total for e in es))
    return [
        Event(
            e.name,
            _inherited(e, phase),
            e.time_range.start,
            e.time_range.end,
            e.self_cpu_time_total,
        )
        for e in operators
    ]


def _inherited(event: Any, phase: str) -> str:
    group, caller = OTHER, event
    while caller is not None:
        if (found := group_of(caller.name, phase)) != OTHER:
            group = found
        caller = caller.cpu_parent
    return group


def host_events(raw: Iterable[Any], device: Sequence[Event]) -> list[Share]:
    """Own time of operators and driver calls on the host, if the device is another; by time."""
    on_gpu = any(e.device_type.name == "CUDA" for e in raw)
    if not on_gpu or not device:
        return []
    return _totals(
        Event(e.name, "host", e.time_range.start, e.time_range.end, e.self_cpu_time_total)
        for e in raw
        if e.device_type.name == "CPU" and not e.is_user_annotation
    )


def by_group(events: Sequence[Event]) -> list[Share]:
    """Own time of each group, the longest first."""
    return _totals(Event(e.group, e.group, e.start, e.end, e.own) for e in events)


def by_name(events: Iterable[Event]) -> list[Share]:
    """Own time of each kernel or operator, the longest first."""
    return _totals(events)


def _totals(events: Iterable[Event]) -> list[Share]:
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        sums[event.name, event.group].append(event.own)
    shares = [Share(name, group, sum(us), len(us)) for (name, group), us in sums.items()]
    return sorted(shares, key=lambda share: -share.total_us)


def span_and_busy(events: Sequence[Event]) -> tuple[float, float]:
    """Microseconds from the first start to the last end, and how many of them anything ran."""
    if not events:
        return 0.0, 0.0
    ordered = sorted(events, key=lambda e: e.start)
    busy, reached = 0.0, ordered[0].start
    for event in ordered:
        busy += max(0.0, event.end - max(event.start, reached))
        reached = max(reached, event.end)
    return reached - ordered[0].start, busy


def table(events: Sequence[Event], num_steps: int) -> str:
    """Groups and the longest kernels, per step."""
    span, busy = span_and_busy(events)

    def line(name: str, us: float, calls: float) -> str:
        return f"{name:<26}{us / num_steps / 1e3:>11.3f}{us / span:>8.1%}{calls / num_steps:>9.1f}"

    lines = [f"{'part':<26}{'ms / step':>11}{'share':>8}{'calls':>9}"]
    lines += [line(s.name, s.total_us, s.calls) for s in by_group(events)]
    lines.append(
        f"{'gaps':<26}{(span - busy) / num_steps / 1e3:>11.3f}{(span - busy) / span:>8.1%}"
    )
    lines.append(f"{'step':<26}{span / num_steps / 1e3:>11.3f}")
    lines += ["", f"{'longest':<{NAME_CHARS}}{'ms / step':>11}{'calls':>9}{'us each':>10}  part"]
    lines += [_named(share, num_steps) + f"  {share.group}" for share in by_name(events)[:TOP]]
    return "\n".join(lines)


def host_table(shares: Sequence[Share], num_steps: int) -> str:
    lines = [f"{'host, profiled':<{NAME_CHARS}}{'ms / step':>11}{'calls':>9}{'us each':>10}"]
    return "\n".join(lines + [_named(share, num_steps) for share in shares[:TOP]])


def _named(share: Share, num_steps: int) -> str:
    name = share.name if len(share.name) < NAME_CHARS else f"{share.name[: NAME_CHARS - 4]}..."
    return (
        f"{name:<{NAME_CHARS}}{share.total_us / num_steps / 1e3:>11.3f}"
        f"{share.calls / num_steps:>9.1f}{share.total_us / share.calls:>10.1f}"
    )


def summary(phase: Phase) -> str:
    """Times of a run without the profiler."""
    f = phase.figures({})
    step, launch, gap = f["step_ms"], f["launch_ms"], f["gpu_gap_ms"]
    text = (
        f"{phase.name}: {f['steps']} steps of {f['rows_per_step']:g} rows, "
        f"{f['tokens_per_step']:g} tokens; without the profiler: step {step['p50']:.3f} ms "
        f"(p99 {step['p99']:.3f}), launch on the host {launch['p50']:.3f} ms "
        f"(p99 {launch['p99']:.3f})"
    )
    return text + (f", gap {gap['p50']:.3f} ms (p99 {gap['p99']:.3f})" if gap else "")


async def report(a: argparse.Namespace, loaded: Loaded) -> str:
    """Run prefill, then decode, each first without and then with the profiler; the tables.

    Raises:
        StartupError: the asked steps do not fit into lanes or K/V.
    """
    check_fit(a, loaded)
    resolved, vocab = loaded.boot.resolved, loaded.spec.vocab_size
    fits = max(1, loaded.num_slots.full * 3 // 4 // (a.inp + 1))
    num = max(1, min(fits, round(a.prefill_steps * resolved.batch_max_tokens / a.inp)))
    wide = random_workloads(
        argparse.Namespace(**{**vars(a), "n": num, "out": 1}), vocab, "warm", "plain", "profiled"
    )
    deep = random_workloads(
        argparse.Namespace(**{**vars(a), "out": a.decode_steps, "seed": a.seed + 1}), vocab, "deep"
    )["deep"]
    once = Workload(deep.prompts, 1, deep.temperature, deep.top_p)
    sections = []
    async with engine(loaded) as offline:

        async def profiled(name: str, work: Workload) -> str:
            with profiler() as prof:
                phase = await offline.run(name, work)
            if a.trace:
                path = a.trace.with_name(f"{a.trace.stem}.{name}{a.trace.suffix or '.json'}")
                prof.export_chrome_trace(str(path))
            raw = list(prof.events())
            events = device_events(raw, name)
            texts = [table(events, len(phase.steps))]
            if host := host_events(raw, events):
                texts.append(host_table(host, len(phase.steps)))
            return "\n\n".join(texts)

        await offline.run("warm", wide["warm"])
        if a.prefill_steps:
            sections.append(summary(await offline.run("prefill", wide["plain"])))
            sections.append(await profiled("prefill", wide["profiled"]))
        if a.decode_steps:
            await offline.run("fill", once)
            sections.append(summary(await offline.run("decode", deep)))
            sections.append(await profiled("decode", deep))
    return "\n\n".join(sections)


def profiler() -> profile:
    """Over all threads: the CPU's steps run on one of their own."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(
        activities=activities,
        experimental_config=_ExperimentalConfig(profile_all_threads=True),
    )


def check_fit(a: argparse.Namespace, loaded: Loaded) -> None:
    """Refuse work of which parts would have to wait.

    Raises:
        StartupError: more rows than lanes, or more tokens than K/V slots.
    """
    resolved = loaded.boot.resolved
    if a.n > resolved.running_max_req_size:
        raise StartupError(
            f"--n {a.n} is more than --running_max_req_size {resolved.running_max_req_size}"
        )
    if (needed := a.n * (a.inp + a.decode_steps)) > loaded.num_slots.full:
        raise StartupError(
            f"--n {a.n} rows of --inp {a.inp} and --decode-steps {a.decode_steps} tokens need "
            f"{needed:,} K/V slots, there are {loaded.num_slots.full:,}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="profile.py",
        description="Tables of where the time of prefill and decode steps goes. Options that are "
        "not listed are asyncllm's own.",
        allow_abbrev=False,
    )
    add_workload(p)
    p.add_argument("--prefill-steps", type=int, default=4, help="about as many full steps")
    p.add_argument("--decode-steps", type=int, default=32, help="of --n rows, --inp tokens each")
    p.add_argument(
        "--trace", type=Path, metavar="FILE.json",
        help="write chrome traces to FILE.prefill.json and FILE.decode.json",
    )  # fmt: skip
    a, rest = p.parse_known_args(argv)
    try:
        text = uvloop.run(report(a, load(engine_config(rest))))
    except StartupError as error:
        sys.stderr.write(f"profile.py: {error}\n")
        return 2
    print(text)
    return 0
