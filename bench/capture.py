"""Where the time goes while a start captures CUDA graphs, and whether each way gives equal answers.

    python bench/mkmodel.py llama31_8b /tmp/m8b
    python bench/capture.py --model_dir /tmp/m8b --ways direct first
    python bench/capture.py --model_dir /tmp/m8b --ways first direct

A way is how a graph is captured: ``first`` runs its work once before, as a start does, ``direct``
does not, and so loads kernels of other shapes while it captures (mode "relaxed"), ``strict`` tries
that in the mode that forbids it. Kernels are loaded once in a process, so only the first way of a
run has the times of a start.

Steps of every size run in each way, twice, and without graphs, with the same K/V. In each row the
likeliest token comes, whatever the kind of sampling (temperature 0 or near it, or top_k 1). Twice by
the same graphs must give the same bits: of steps that differ, the first layer whose new K/V do is
told, which is where to look for a race. Without graphs products have other shapes and so other
roundings; weights are random, so that the likeliest tokens are close to each other and a rounding
changes some of them, while a graph that is wrong changes next to all: there more than half of the
rows is an error. An error is exit code 1. Nothing is read but config.json.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.codec import i32
from asyncllm.core.request import SamplingParams
from asyncllm.engine.build import build_model, warm_up
from asyncllm.engine.device import CudaDevice
from asyncllm.engine.engine import Engine
from asyncllm.engine.graphs import SHARED_SIZES, Capture, decode_sizes, mixed_sizes
from asyncllm.engine.jit_monitor import JitMonitor
from asyncllm.engine.parallel import SingleRank
from asyncllm.engine.step_timing import even_plan
from asyncllm.messages import StepPlan
from asyncllm.models.quantization import WeightTypes
from asyncllm.models.quantize import quantize_rows
from asyncllm.models.spec import ModelSpec
from asyncllm.models.weights import QuantTarget, Target
from asyncllm.records import OpenedLane

R = TypeVar("R")
WAYS = {
    "first": (True, "thread_local"),
    "direct": (False, "relaxed"),
    "strict": (False, "thread_local"),
}
MAX_LEN, NUM_LANES, NUM_ROWS, SLOTS = 8192, 1000, 1024, 16384
READ = 64  # tokens that each row attends to
COLD = 1e-4  # a temperature at which the likeliest token comes
MOST = 0.5  # share of rows with another token


@dataclass(slots=True)
class Spent:
    """Seconds of one graph, and of loading kernels within them."""

    first: float
    capture: float
    make: float
    loaded: int
    loading: float


class Loads:
    """Counts kernels that Triton takes from its cache, or compiles, and loads onto the GPU."""

    def __init__(self) -> None:
        self.num, self.seconds, self._depth = 0, 0.0, 0

    def watch(self) -> None:
        """From now on, for this process."""
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime.jit import JITFunction

        for owner, name in ((JITFunction, "_do_compile"), (CompiledKernel, "_init_handles")):
            setattr(owner, name, self._timed(getattr(owner, name), counts=name == "_do_compile"))

    def _timed(self, call: Callable[..., Any], *, counts: bool) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.num += counts
            self._depth += 1
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - begin

        return run


def timed_capture(stream: torch.cuda.Stream, way: str, loads: Loads, spent: list[Spent]) -> Capture:
    """As ``asyncllm.engine.graphs.cuda_capture``, step by step."""
    pool = torch.cuda.graph_pool_handle()
    first, mode = WAYS[way]

    def capture(run: Callable[[], R]) -> tuple[Callable[[], None], R]:
        num, seconds = loads.num, loads.seconds
        marks = [time.perf_counter()]
        if first:
            run()
        marks.append(time.perf_counter())
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool, capture_error_mode=mode)
            try:
                result = run()
            finally:
                graph.capture_end()
        marks.append(time.perf_counter())
        graph.instantiate()
        marks.append(time.perf_counter())
        took = [b - a for a, b in pairwise(marks)]
        spent.append(Spent(*took, loads.num - num, loads.seconds - seconds))
        return graph.replay, result

    return capture


def capture_all(device: CudaDevice, way: str, loads: Loads, chunk: int) -> str:
    """Capture all graphs in this way; a line of the table."""
    spent: list[Spent] = []
    stream = device._stream
    stream.synchronize()
    begin = time.perf_counter()
    with torch.cuda.stream(stream):
        device.engine.capture(timed_capture(stream, way, loads, spent), chunk)
    host = time.perf_counter() - begin
    stream.synchronize()
    whole = time.perf_counter() - begin
    assert device.engine.graphs is not None
    num = len(device.engine.graphs[0])
    lines = []
    for what, some in (("decoder", spent[:num]), ("sampling", spent[num:])):
        sums = [sum(getattr(s, name) for s in some) for name in Spent.__slots__]
        lines.append(
            f"| {way} | {what} | {len(some)} | {sums[0]:.2f} | {sums[1]:.2f} | {sums[2]:.2f} "
            f"| {sums[3]:.0f} in {sums[4]:.2f} |"
        )
    lines.append(
        f"| {way} | all, host {host:.2f}, with the GPU {whole:.2f} | {len(spent)} | | | | |"
    )
    return "\n".join(lines)


def steps(num_rows: int, chunk: int) -> Iterator[StepPlan]:
    """One of each bucket, filled to one token less than its size where that is possible."""
    rng = random.Random(0)
    kinds = [
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(temperature=COLD, seed=3),
        SamplingParams(temperature=0.9, top_k=1, seed=5, logprobs=0),
        SamplingParams(temperature=COLD, repetition_penalty=1.2, seed=7),
    ]
    # all rows share all tokens but their own: as long as the table names no slot but the first
    shapes = [([1] * n, MAX_LEN - 1, MAX_LEN - 1) for n in (*SHARED_SIZES, NUM_LANES)]
    shapes += [([1] * min(max(1, size - 1), NUM_LANES), READ, 0) for size in decode_sizes(num_rows)]
    for size in mixed_sizes(chunk):
        rows = min(16, size // 4)
        left = size - 1 - rows
        shapes.append(([1] * rows + [left // 2, left - left // 2], READ, 0))
    for i, (counts, start, shared) in enumerate(shapes):
        num, decode = sum(counts), counts.count(1)
        plan = even_plan(counts, start, num_decode=decode)
        starts = [start] * decode + [0] * (len(counts) - decode)
        opened = [
            OpenedLane(lane, at + count, kinds[i % len(kinds)], i32([7] * READ))
            for lane, (at, count) in enumerate(zip(starts, counts, strict=True))
        ]
        if shared:
            shared_lens = i32([0] + [shared] * (num - 1))
            plan = replace(plan, prefix_order=plan.lanes, shared_lens=shared_lens)
        yield replace(
            plan,
            starts=i32(starts),
            # one for each token, in all layers: rows that read what others write would race
            slots=i32(range(1, num + 1)),
            sliding=i32([]),
            tokens=i32(rng.randrange(1000, 30000) for _ in range(num)),
            opened=opened,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What a step gives: the tokens of its rows, and of each layer a sum over the bits of the K/V
    that it has written, which follow from what the layers before it have made."""

    num_tokens: int
    tokens: list[int]
    layers: list[int]


Answers = list[Answer]


def written(engine: Engine, num: int) -> list[int]:
    """Of each layer, a sum over the bits in the slots of a step's ``num`` tokens."""
    sums = []
    for layer in engine.kv:
        bits = [x[1 : num + 1].flatten().view(torch.uint8).long() for x in layer]
        sums.append(sum((x * torch.arange(1, len(x) + 1, device=x.device)).sum() for x in bits))
    found: list[int] = torch.stack(sums).tolist()
    return found


def answers(device: CudaDevice, chunk: int) -> Answers:
    """Of one step of each size; K/V and tables are the same before."""
    found: Answers = []
    engine = device.engine
    noise = torch.Generator(engine.device).manual_seed(1)
    with torch.cuda.stream(device._stream):
        for layer in engine.kv:
            for tensor in layer:
                tensor.normal_(generator=noise)
        for table in (engine.table, engine.history, engine.last_token):
            table.zero_()
    for plan in steps(NUM_ROWS, chunk):
        tokens = device.launch(plan).wait().tokens
        num = len(plan.tokens)
        found.append(Answer(num, list(tokens), written(engine, num)))
    return found


def differ(a: Answers, b: Answers) -> float:
    """The share of rows with another token."""
    pairs = [
        pair for x, y in zip(a, b, strict=True) for pair in zip(x.tokens, y.tokens, strict=True)
    ]
    return sum(x != y for x, y in pairs) / len(pairs)


def first_differences(a: Answers, b: Answers) -> list[str]:
    """Of each step that is not the same in all bits, where it begins to differ."""
    found = []
    for x, y in zip(a, b, strict=True):
        same = [mine == yours for mine, yours in zip(x.layers, y.layers, strict=True)]
        step = f"{x.num_tokens} tokens of {len(x.tokens)} rows"
        if not all(same):
            found.append(f"{step}: from the K/V of layer {same.index(False)} on")
        elif x.tokens != y.tokens:
            found.append(f"{step}: behind the K/V of all layers")
    return found


@contextmanager
def without_graphs(device: CudaDevice) -> Iterator[None]:
    graphs, device.engine.graphs = device.engine.graphs, None
    yield
    device.engine.graphs = graphs


@torch.no_grad()
def make_device(model_dir: Path, kind: str | None) -> CudaDevice:
    """A device with random weights."""
    torch.cuda.set_device(0)
    where = torch.device("cuda", 0)
    model = build_model(
        model_dir, ModelSpec.from_dir(model_dir), SingleRank(), dtype="bf16", device=where,
        max_len=MAX_LEN, asked=WeightTypes(kind), begin=lambda read: None,
    )  # fmt: skip
    for _, target in model.targets():
        if isinstance(target, Target):
            target.param.normal_(std=0.02) if target.param.dim() > 1 else target.param.fill_(1)
        elif isinstance(target, QuantTarget):
            part, scales = target.weight.data[target.rows], target.weight.scales
            noise = torch.randn(part.shape, device=where) * 0.02
            values, by = quantize_rows(noise, part.dtype)
            part.copy_(values)
            if scales.dim() == 1:
                scales[target.rows] = by[:, 0]
            else:
                scales.fill_(float(by.mean()))
    model.pack()
    engine = Engine(
        model, SingleRank(), num_slots=SLOTS, num_lanes=NUM_LANES, num_rows=NUM_ROWS,
        max_len=MAX_LEN, eos_ids=(), shares_prefixes=True,
    )  # fmt: skip
    return CudaDevice(engine)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["direct", "first"])
    parser.add_argument("--quant_type", help="as the server's option")
    args = parser.parse_args(argv)
    device = make_device(args.model_dir, args.quant_type)
    chunk = MAX_LEN // 2
    begin = time.perf_counter()
    warm_up(device, chunk, max_len=MAX_LEN, graphs=False)
    print(f"warm-up steps: {time.perf_counter() - begin:.2f} s", flush=True)
    loads, monitor = Loads(), JitMonitor()
    loads.watch()
    table, told, found, wrong = list[str](), list[str](), dict[str, Answers](), False
    for way in args.ways:
        table.append(capture_all(device, way, loads, chunk))
        print(table[-1], flush=True)
        warm_up(device, 16, max_len=MAX_LEN, graphs=False)
        monitor.arm()
        before = monitor.count
        found[way] = answers(device, chunk)
        print(f"{way}: {monitor.count - before} kernels compiled or loaded in steps by graphs")
        once_more = answers(device, chunk)
        unlike = first_differences(found[way], once_more)
        told.append(f"{way} once more: {len(unlike)} of {len(once_more)} steps differ")
        told += unlike
        wrong |= bool(unlike)
    with without_graphs(device):
        found["no graphs"] = answers(device, chunk)
    first, *rest = found
    for other in rest:
        told.append(f"{first} and {other}: {differ(found[first], found[other]):.1%} of rows")
    print(
        "\n| way | graphs | number | first run, s | capture, s | instantiation, s | kernels loaded, s |"
    )
    print("|---|---|---|---|---|---|---|")
    print("\n".join([*table, "", *told]))
    wrong |= any(differ(found[way], found[first]) > MOST for way in found)
    device.close()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
