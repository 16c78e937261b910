"""Measure the engine without HTTP: scheduler, allocator and runner, prompts in, token ids out.

    python bench/offline.py --n 64 --inp 512 --out 128 --model_dir /models/x --device cuda
    python bench/offline.py --sla ttft=200,tpot=12 --plot offline.png

Options that are not listed in ``--help`` are asyncllm's own. Three runs, of ``--n`` requests each:

- prefill: fresh prompts, one token each
- decode: the same prompts again, from the prefix cache, ``--out`` tokens each
- whole: fresh prompts, ``--out`` tokens each, as the scheduler mixes them

The actors are the ones that serve; frontend, tokenizer and detokenizer are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import uvloop

from asyncllm import cli, log
from asyncllm.actors.base import Actor
from asyncllm.actors.runner import PendingStep, Runner
from asyncllm.actors.system import ActorSystem
from asyncllm.config import Config
from asyncllm.constrain.factory import ConstraintFactory
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.engine.device import CpuDevice, CudaDevice
from asyncllm.environment import cache_dir, quiet_libraries
from asyncllm.errors import StartupError
from asyncllm.hub import resolve_model_dir
from asyncllm.messages import Finished, StepDone, StepPlan, Submit, Tokens
from asyncllm.models.checkpoint import as_stored, read_checkpoint
from asyncllm.models.spec import ModelSpec
from asyncllm.rank import resolve
from asyncllm.server.assembly import make_allocator, make_scheduler
from asyncllm.server.launch import Boot
from asyncllm.server.loading import Loaded, load_endpoint
from asyncllm.topology import Topology
from bench.common import Record, percentile
from bench.figures import Sla, add_sla, goodput, goodput_line, requests_table, times
from bench.plot import MISSING, Run, available, plot

FIRST_ID = 1000  # as in the HTTP benchmarks; smaller vocabularies are used whole
SHARES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are submitted together."""

    prompts: list[array[int]]
    num_out: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(slots=True)
class StepTime:
    """One step. ``step_ms`` is from its launch, or the end of the step before, to its end."""

    num_rows: int
    num_decode: int
    num_tokens: int
    begin: float  # perf_counter
    launch_ms: float = 0.0  # the event loop was held
    step_ms: float = 0.0
    gap_ms: float | None = None  # the device waited for it; None: not known, or it was idle before


@dataclass(slots=True)
class Phase:
    """What one workload cost."""

    name: str
    wall_s: float
    host_s: float  # CPU time of the event loop's thread
    prompt_tokens: int  # of all requests
    cached_tokens: int  # of them from the prefix cache
    output_tokens: int
    steps: list[StepTime]
    records: list[Record]  # of all requests, in order of submission
    handler_s: dict[str, float] = field(default_factory=dict)  # time inside receive, by actor

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were not in the cache."""
        return self.prompt_tokens - self.cached_tokens

    def figures(self, sla: Sla) -> dict[str, Any]:
        """For JSON and the table; times in milliseconds. Goodput where ``sla`` has limits."""
        steps, gaps = self.steps, [s.gap_ms for s in self.steps if s.gap_ms is not None]
        return {
            "wall_s": round(self.wall_s, 4),
            "prefill_tok_s": round(self.computed_tokens / self.wall_s, 1),
            "decode_tok_s": round(self.output_tokens / self.wall_s, 1),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "steps": len(steps),
            "rows_per_step": round(sum(s.num_rows for s in steps) / len(steps), 2),
            "tokens_per_step": round(sum(s.num_tokens for s in steps) / len(steps), 2),
            "step_ms": _spread([s.step_ms for s in steps]),
            "launch_ms": _spread([s.launch_ms for s in steps]),
            "gpu_gap_ms": _spread(gaps) if gaps else None,
            "host_us_per_token": round(1e6 * self.host_s / max(1, self.output_tokens), 2),
            "handler_ms_per_step": {
                name: round(1e3 * spent / len(steps), 4) for name, spent in self.handler_s.items()
            },
            **times(self.records),
            **goodput(sla, self.records, self.wall_s),
        }


class Recorder:
    """A device that notes how long each step takes; implements the runner's ``Device``."""

    def __init__(self, device: CpuDevice | CudaDevice) -> None:
        self._device = device
        self._last_end = 0.0
        self.steps: list[StepTime] = []

    def launch(self, plan: StepPlan) -> PendingStep:
        num_rows, num_tokens = len(plan.lanes), len(plan.tokens)
        step = StepTime(num_rows, plan.num_decode, num_tokens, time.perf_counter())
        pending = self._device.launch(plan)
        step.launch_ms = (time.perf_counter() - step.begin) * 1e3
        self.steps.append(step)
        return _Watched(self, step, pending)

    def ended(self, step: StepTime, gap_ms: float | None) -> None:
        """Called by the waiter thread, in order of launch."""
        now = time.perf_counter()
        step.step_ms = (now - max(step.begin, self._last_end)) * 1e3
        step.gap_ms = gap_ms
        self._last_end = now

    def close(self) -> None:
        self._device.close()


class _Watched:
    """A launched step whose end is noted."""

    def __init__(self, recorder: Recorder, step: StepTime, pending: PendingStep) -> None:
        self._recorder, self._step, self._pending = recorder, step, pending
        self.gap_ms: float | None = None

    def wait(self) -> StepDone:
        done = self._pending.wait()
        self.gap_ms = self._pending.gap_ms
        self._recorder.ended(self._step, self.gap_ms)
        return done


class Sink(Actor[Tokens | Finished]):
    """Stands where the detokenizer does and notes what comes, and when."""

    def __init__(self) -> None:
        super().__init__("detokenizer")
        self._open: dict[int, Record] = {}
        self.ended: asyncio.Event = asyncio.Event()
        self.num_tokens = self.cached_len = 0
        self.error = ""

    def expect(self, records: dict[int, Record]) -> None:
        """Start to count anew; ``ended`` is set when all of ``records`` (by rid) are complete."""
        self._open = records.copy()
        self.num_tokens = self.cached_len = 0
        self.ended.clear()

    def receive(self, batch: list[Tokens | Finished]) -> None:
        now = time.perf_counter()
        for msg in batch:
            if isinstance(msg, Tokens):
                for rid in msg.rids:
                    self._open[rid].stamps.append(now)
                continue
            record = self._open.pop(msg.rid)
            record.end, record.done = now, True
            record.usage = {"completion_tokens": msg.num_tokens}
            self.num_tokens += msg.num_tokens
            self.cached_len += max(0, msg.cached_len)
            if msg.reason == FinishReason.ERROR:
                self.error = msg.failure.detail if msg.failure else ""
        if not self._open:
            self.ended.set()


class Offline:
    """A running engine; made by :func:`engine`."""

    def __init__(self, loaded: Loaded) -> None:
        assert loaded.device is not None
        self.loaded = loaded
        self._recorder, self._sink = Recorder(loaded.device), Sink()
        self._system = ActorSystem()
        self._actors = [
            make_allocator(loaded),
            make_scheduler(loaded),
            Runner(self._recorder, reports=True),
            self._sink,
        ]
        for actor in self._actors:
            self._system.add(actor)
        self._scheduler = self._system.ref("scheduler")
        self._next_rid = 0
        self._running: asyncio.Task[None] = asyncio.create_task(self._system.run())

    async def run(self, name: str, load: Workload) -> Phase:
        """Submit ``load`` and wait until all of it has ended.

        Raises:
            StartupError: a request was refused, e.g. since it is longer than the engine allows.
            FatalError: an actor crashed.
        """
        rids = range(self._next_rid, self._next_rid + len(load.prompts))
        self._next_rid = rids.stop
        self._recorder.steps = []
        params = SamplingParams(
            max_new_tokens=load.num_out,
            temperature=load.temperature,
            top_p=load.top_p,
            ignore_eos=True,
        )
        submits = [
            Submit(rid, prompt, params) for rid, prompt in zip(rids, load.prompts, strict=True)
        ]
        busy = {actor.name: actor.busy_s for actor in self._actors}
        begin, host = time.perf_counter(), time.thread_time()
        records = {
            rid: Record(begin, len(prompt), load.num_out)
            for rid, prompt in zip(rids, load.prompts, strict=True)
        }
        self._sink.expect(records)
        for submit in submits:
            self._scheduler.tell(submit)
        await self._all_ended()
        wall_s, host_s = time.perf_counter() - begin, time.thread_time() - host
        if self._sink.error:
            raise StartupError(self._sink.error)
        return Phase(
            name=name,
            wall_s=wall_s,
            host_s=host_s,
            prompt_tokens=sum(map(len, load.prompts)),
            cached_tokens=self._sink.cached_len,
            output_tokens=self._sink.num_tokens,
            steps=self._recorder.steps,
            records=[*records.values()],
            handler_s={actor.name: actor.busy_s - busy[actor.name] for actor in self._actors},
        )

    async def _all_ended(self) -> None:
        ended = asyncio.create_task(self._sink.ended.wait())
        await asyncio.wait({ended, self._running}, return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():  # an actor crashed
            ended.cancel()
            await self._running

    async def stop(self) -> None:
        self._system.stop()
        await self._running


def load(config: Config) -> Loaded:
    """Model and K/V as a server with ``config`` would have them, in this process.

    Raises:
        StartupError: it cannot start as configured, or needs several processes.
    """
    if config.tp > 1:
        raise StartupError(f"--tp {config.tp} needs several processes; this runs one")
    model_dir = resolve_model_dir(config.model_dir, cache_dir())
    spec = as_stored(ModelSpec.from_dir(model_dir), read_checkpoint(model_dir))
    boot = Boot(
        endpoint=0,
        topology=Topology.on_one_node(),
        keys=("", ""),
        config=config,
        resolved=resolve(config, spec, model_dir),
        model_dir=str(model_dir),
        rendezvous=None,
        listen_fd=-1,
        parent=0,
    )
    loaded = load_endpoint(boot, spec)
    loaded.constraints = ConstraintFactory(spec.vocab_size, loaded.boot.resolved.eos_ids)
    return loaded


@contextlib.asynccontextmanager
async def engine(loaded: Loaded) -> AsyncIterator[Offline]:
    """The actors around a loaded device; the device is closed at the end."""
    offline = Offline(loaded)
    try:
        yield offline
    finally:
        await offline.stop()


def random_workloads(a: argparse.Namespace, vocab_size: int, *names: str) -> dict[str, Workload]:
    """One workload of fresh prompts for each name, by ``a.n``, ``a.inp``, ``a.out``, ``a.seed``."""
    rng = random.Random(a.seed)
    first = FIRST_ID if vocab_size > 2 * FIRST_ID else 0

    def prompt() -> array[int]:
        return array("i", (rng.randrange(first, vocab_size) for _ in range(a.inp)))

    return {
        name: Workload([prompt() for _ in range(a.n)], a.out, a.temperature, a.top_p)
        for name in names
    }


async def measure(a: argparse.Namespace, loaded: Loaded) -> list[Phase]:
    """The three runs, after a short one that is not reported."""
    loads = random_workloads(a, loaded.spec.vocab_size, "warm", "first", "whole")
    warm, first, whole = loads["warm"], loads["first"], loads["whole"]
    one = Workload(first.prompts, 1, a.temperature, a.top_p)
    async with engine(loaded) as offline:
        await offline.run("warm", Workload(warm.prompts[:2], min(4, a.out), a.temperature, a.top_p))
        return [
            await offline.run("prefill", one),
            await offline.run("decode", first),
            await offline.run("whole", whole),
        ]


def table(phases: Sequence[Phase], sla: Sla) -> str:
    """The figures for people; one line per run, and one for its goodput."""
    lines = [
        f"{'run':<9}{'wall s':>9}{'prompt tok/s':>14}{'output tok/s':>14}{'steps':>7}{'rows':>8}"
        f"{'step ms p50':>13}{'p99':>9}{'launch ms p50':>15}{'p99':>9}{'gap ms p50':>12}"
        f"{'host us/tok':>13}"
    ]
    found = {phase.name: phase.figures(sla) for phase in phases}
    for name, f in found.items():
        gap = f"{f['gpu_gap_ms']['p50']:.3f}" if f["gpu_gap_ms"] else "-"
        lines.append(
            f"{name:<9}{f['wall_s']:>9.3f}{f['prefill_tok_s']:>14.1f}"
            f"{f['decode_tok_s']:>14.1f}{f['steps']:>7}{f['rows_per_step']:>8.1f}"
            f"{f['step_ms']['p50']:>13.3f}{f['step_ms']['p99']:>9.3f}"
            f"{f['launch_ms']['p50']:>15.3f}{f['launch_ms']['p99']:>9.3f}{gap:>12}"
            f"{f['host_us_per_token']:>13.1f}"
        )
    lines += [f"goodput, {name:<9}{goodput_line(f)}" for name, f in found.items() if sla]
    return "\n".join(lines)


def draw(path: Path, phases: Sequence[Phase], a: argparse.Namespace) -> None:
    """A PNG of the times of requests, a line per run; submitted together, all were sent at 0."""
    runs = {
        phase.name: Run(
            requests_table(phase.records, a.sla),
            [1e3 * gap for record in phase.records for gap in record.gaps_s],
            phase.wall_s,
        )
        for phase in phases
    }
    plot(path, f"offline n={a.n} inp={a.inp} out={a.out}", runs, a.sla)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {name: round(percentile(values, share), 4) for name, share in SHARES.items()}


def add_workload(p: argparse.ArgumentParser) -> None:
    """Options that say what the engine is given."""
    p.add_argument("--n", type=int, default=16, help="requests, submitted together")
    p.add_argument("--inp", type=int, default=256, help="prompt tokens")
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--top_p", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0, help="of the prompts")


def engine_config(rest: Sequence[str]) -> Config:
    """asyncllm's options, with its logging set up (warnings only, unless --log_level is given).

    Raises:
        StartupError: an option that asyncllm does not know or accept.
    """
    config = cli.parse(list(rest))
    level = config.log_level if "log_level" in config.explicit else "warning"
    log.setup(level, config.log_json, "bench")
    quiet_libraries()
    return config


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add_workload(p)
    p.add_argument("--out", type=int, default=64, help="output tokens")
    p.add_argument("--json", type=Path, metavar="FILE", help="write figures and every step here")
    p.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG here (needs matplotlib)")
    add_sla(p)
    a, rest = p.parse_known_args(argv)
    try:
        if a.plot and not available():
            raise StartupError(MISSING)
        loaded = load(engine_config(rest))
        phases = uvloop.run(measure(a, loaded))
    except StartupError as error:
        sys.stderr.write(f"offline.py: {error}\n")
        return 2
    print(table(phases, a.sla))
    if a.plot:
        draw(a.plot, phases, a)
    if a.json:
        content = {
            ph.name: {**ph.figures(a.sla), "each": [asdict(step) for step in ph.steps]}
            for ph in phases
        }
        a.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
