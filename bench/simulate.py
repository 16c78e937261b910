"""Scheduler and allocator with a clock, clients and a device that are simulated: what pacing does.

    python bench/simulate.py --loads conc8,rate8 --seeds 10
    python bench/simulate.py --loads "mine=--n 96 --conc 16 --mix uniform" --chunk 1024

A load takes a second instead of a GPU's minute, and runs with the same seed are equal. Requests are
those of ``bench/serve.py``. The device takes steps in turn, each as long as steps of Llama-3.1-8B
in bf16 on an H200; throughput and medians of TTFT and TPOT are within 5 % of what was measured.
"""

from __future__ import annotations

import argparse
import heapq
import random
import shlex
import statistics
import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from asyncllm.actors import scheduler as module
from asyncllm.actors.allocator import Allocator
from asyncllm.actors.scheduler import Scheduler
from asyncllm.codec import i32
from asyncllm.core.pacing import Pacer
from asyncllm.core.request import SamplingParams
from asyncllm.core.scheduling import SchedulerCore
from asyncllm.core.step_times import StepTimes
from asyncllm.engine.graphs import mixed_sizes
from asyncllm.messages import StepDone, StepPlan, Submit, Tokens
from bench import loads, serve
from bench.common import Load, Record
from bench.figures import Figures

SLOTS, LANES, BATCH, CHUNK = 855_886, 1000, 16384, 4096
NO_TOKEN = -1


@dataclass(frozen=True)
class Delays:
    """Seconds that things take; ranges are drawn from evenly."""

    launch: float = 0.0009  # from the plan to the device
    told: float = 0.0001  # from the device to the scheduler
    timer: float = 0.0008  # that a timer is late, at most
    inbound: float = 0.001  # from a client to the scheduler
    outbound: float = 0.0005  # from the scheduler to a client
    first: float = 0.03  # over which the first requests of a closed loop are spread
    between: tuple[float, float] = (0.0003, 0.002)  # from an answer to its client's next request


def h200_ms(plan: StepPlan) -> float:
    """Milliseconds of a step of Llama-3.1-8B in bf16 on an H200."""
    num = plan.num_decode
    read = 3.64e-5 * sum(plan.starts[:num])
    if num == len(plan.lanes):
        return 4.2 + 0.5 * min(num - 1, 7) / 7 + 0.005 * max(num - 8, 0) + read
    sizes = mixed_sizes(CHUNK)
    at = bisect_left(sizes, len(plan.tokens))
    tokens = sizes[at] if at < len(sizes) else len(plan.tokens)
    rows = zip(plan.starts[num:], plan.counts[num:], strict=True)
    attended = sum(new * (start + new / 2) for start, new in rows)
    return max(5.0, 1.6 + 0.0212 * tokens) + read + 1.3e-6 * attended


class Simulation:
    """One load.

    Attributes:
        plans: of all steps.
        gaps: seconds that the device waited before each step while requests were running.
    """

    endpoint, topology = 0, None  # what actors see of a system

    def __init__(
        self,
        load: Load,
        step_ms: Callable[[StepPlan], float] = h200_ms,
        *,
        pacer: Pacer | None = None,
        delays: Delays | None = None,
        chunk: int = CHUNK,
        seed: int = 0,
    ) -> None:
        self._load, self._step_ms, self._delays = load, step_ms, delays or Delays()
        self._rng = random.Random(seed)
        self._now = self._free_at = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._mail: deque[tuple[str, Any]] = deque()
        self._records: list[Record] = []
        self.plans: list[StepPlan] = []
        self.gaps: list[float] = []
        self.loop = SimpleNamespace(call_later=self._call_later)
        self._allocator = Allocator(SLOTS)
        core = SchedulerCore(
            num_lanes=LANES,
            num_slots=SLOTS,
            batch_max_tokens=BATCH,
            chunked_prefill_size=chunk,
            eos_ids=(),
        )
        self._scheduler = Scheduler(core, runners=[0], pacer=pacer or Pacer(StepTimes()))
        for actor in (self._allocator, self._scheduler):
            actor.system = self  # type: ignore[assignment]
            actor.started()

    def ref(self, name: str, endpoint: int = 0) -> Any:
        return SimpleNamespace(tell=lambda msg: self._mail.append((name, msg)))

    at_coordinator = ref

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def _call_later(self, delay: float, put: Any, msg: Any) -> None:
        late = self._rng.uniform(0, self._delays.timer)
        self._at(self._now + delay + late, lambda: self._mail.append(("scheduler", msg)))

    def run(self) -> list[Record]:
        """All requests, in order of sending."""
        for when in self._load.arrivals or range(self._load.conc):
            if self._load.arrivals is None:
                when = self._rng.uniform(0, self._delays.first)
            self._at(when, self._send)
        with patch.object(module, "perf_counter", lambda: self._now):
            while self._events:
                self._now, _, what = heapq.heappop(self._events)
                what()
                while self._mail:
                    self._deliver(*self._mail.popleft())
        return self._records

    def _send(self) -> None:
        rid = len(self._records)
        if rid == len(self._load.bodies):
            return
        body = self._load.bodies[rid]
        prompt, asked = body["prompt"], body["max_tokens"]
        self._records.append(Record(self._now, prompt_len=len(prompt), asked=asked))
        params = SamplingParams(max_new_tokens=asked, ignore_eos=True)
        msg = Submit(rid=rid, prompt=i32(prompt), params=params)
        arrives = self._now + self._delays.inbound
        self._at(arrives, lambda: self._mail.append(("scheduler", msg)))

    def _deliver(self, name: str, msg: Any) -> None:
        if name == "scheduler":
            self._scheduler.receive([msg])
        elif name == "allocator":
            self._allocator.receive([msg])
        elif name == "runner":
            self._launch(msg)
        elif isinstance(msg, Tokens):
            for rid in msg.rids:
                self._receive(self._records[rid])

    def _receive(self, record: Record) -> None:
        """A client has another token."""
        record.end = self._now + self._delays.outbound
        record.stamps.append(record.end)
        if len(record.stamps) == record.asked:
            record.done = True
            if self._load.arrivals is None:
                self._at(record.end + self._rng.uniform(*self._delays.between), self._send)

    def _launch(self, plan: StepPlan) -> None:
        ready, ms = self._now + self._delays.launch, self._step_ms(plan)
        if self._free_at and plan.num_decode:  # some requests were running already
            self.gaps.append(max(ready - self._free_at, 0.0))
        self._free_at = max(ready, self._free_at) + ms / 1e3
        self.plans.append(plan)
        tokens = i32([7 if sampled else NO_TOKEN for sampled in plan.samples])
        done = StepDone(step=plan.step, tokens=tokens, logprobs=None, prompt=(), device_ms=ms)
        told = self._free_at + self._delays.told
        self._at(told, lambda: self._mail.append(("scheduler", done)))


def figures(options: str, seed: int, share: float, chunk: int) -> Figures:
    """Of one load."""
    a = serve.parser().parse_args([*shlex.split(options), "--seed", str(seed)])
    pacer = Pacer(StepTimes(), share)
    records = Simulation(serve.make_load(a), pacer=pacer, chunk=chunk, seed=seed).run()
    return serve.summary(a, records)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = p.add_argument
    add("--loads", default="conc8,rate8,rate16", help="of loads.py, or NAME=OPTIONS of serve.py")
    add("--seeds", type=serve.positive, default=5, help="runs of each load; medians are printed")
    add("--share", type=float, default=1.0, help="--prefill_share")
    add("--chunk", type=serve.positive, default=CHUNK, help="--chunked_prefill_size")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    try:
        todo = loads.chosen(a.loads.split(","), "--loads")
    except serve.BenchError as error:
        sys.stderr.write(f"simulate.py: {error}\n")
        return 2
    found = {}
    for name, options in todo.items():
        runs = [figures(options, seed, a.share, a.chunk) for seed in range(a.seeds)]
        found[name] = middle(runs)
        each = " ".join(f"{run['itl_ms']['p99']:.1f}" for run in runs)
        sys.stderr.write(f"{name}: ITL p99 of each run {each}\n")
    print(loads.table(found))
    return 0


def middle(runs: Sequence[Figures]) -> Figures:
    """The median of each figure that the table has."""
    out: Figures = {}
    for key, part in loads.COLUMNS.values():
        if key not in runs[0]:
            continue
        if part:
            out.setdefault(key, {})[part] = statistics.median(run[key][part] for run in runs)
        else:
            out[key] = statistics.median(run[key] for run in runs)
    return out


if __name__ == "__main__":
    sys.exit(main())
