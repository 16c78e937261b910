"""Drive an Engine by hand-made plans, without scheduler or actors."""

from __future__ import annotations

import random
import threading
from array import array
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asyncllm.codec import i32
from asyncllm.core.request import SamplingParams
from asyncllm.engine.build import build_model
from asyncllm.engine.device import CpuDevice, CpuPending, CudaDevice
from asyncllm.engine.engine import Engine
from asyncllm.engine.parallel import SingleRank
from asyncllm.messages import StepDone, StepPlan
from asyncllm.models.checkpoint import as_stored, read_checkpoint
from asyncllm.models.kv_format import PLAIN, KvMode
from asyncllm.models.model import Model
from asyncllm.models.ops import Activations, Product
from asyncllm.models.quantization import AS_STORED, WeightTypes
from asyncllm.models.spec import ModelSpec
from asyncllm.records import OpenedLane

GREEDY = SamplingParams(temperature=0.0, logprobs=0)


@dataclass
class Sequence:
    """One request as the harness sees it."""

    lane: int
    prompt: list[int]
    params: SamplingParams = GREEDY
    outputs: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    computed: int = 0


class Driver:
    """Gives slots in a scrambled order, so that nothing works by being contiguous."""

    def __init__(self, device: CpuDevice | CudaDevice | Ranks, num_slots: int) -> None:
        self.device, self.step = device, 0
        self.free = list(range(num_slots))
        random.Random(0).shuffle(self.free)

    def run(
        self, rows: list[tuple[Sequence, int, int]], masks: dict[int, bytes] | None = None
    ) -> StepDone:
        """One step; a row is (sequence, new tokens, cached tokens whose slots it already has).

        ``masks``: by lane, which tokens may come.
        """
        rows = sorted(rows, key=lambda row: row[1] != 1)
        opened, tokens, slots, samples, starts = [], [], [], [], []
        for seq, count, head in rows:
            first = seq.computed == 0
            if first:
                p = seq.params
                known = seq.prompt if p.prompt_logprobs >= 0 or _penalised(p) else []
                opened.append(OpenedLane(seq.lane, len(seq.prompt), p, i32(known)))
                seq.computed = head
            starts.append(seq.computed)
            new = [self.free.pop() for _ in range(count)]
            slots += (seq.slots[:head] if head else []) + new
            seq.slots += new
            known_tokens = seq.prompt[seq.computed : seq.computed + count]
            tokens += known_tokens or [-1]
            seq.computed += count
            samples.append(int(seq.computed >= len(seq.prompt)))
        self.step += 1
        prefix_order, shared_lens = relations([seq for seq, _, _ in rows])
        done = self.device.launch(
            StepPlan(
                step=self.step,
                num_decode=sum(count == 1 for _, count, _ in rows),
                lanes=i32(s.lane for s, _, _ in rows),
                starts=i32(starts),
                counts=i32(count for _, count, _ in rows),
                cached_counts=i32(head for _, _, head in rows),
                slots=i32(slots),
                tokens=i32(tokens),
                samples=bytearray(samples),
                opened=opened,
                prefix_order=prefix_order,
                shared_lens=shared_lens,
                masked=i32(i for i, (s, _, _) in enumerate(rows) if s.lane in (masks or {})),
                masks=bytearray().join((masks or {}).get(s.lane, b"") for s, _, _ in rows),
            )
        ).wait()
        self._take(rows, done)
        return done

    def generate(self, sequences: list[Sequence], num_tokens: int, chunk: int = 1 << 30) -> None:
        """Prefill in chunks, then decode together."""
        while any(s.computed < len(s.prompt) for s in sequences):
            self.run([(s, min(chunk, len(s.prompt) - s.computed), 0) for s in sequences if s.computed < len(s.prompt)])  # fmt: skip
        for _ in range(num_tokens - 1):
            self.run([(s, 1, 0) for s in sequences])

    def _take(self, rows: list[tuple[Sequence, int, int]], done: StepDone) -> None:
        assert done.step == self.step
        values = done.logprobs.chosen if done.logprobs else [float("nan")] * len(rows)
        for (seq, _, _), token, value in zip(rows, done.tokens, values, strict=True):
            if token >= 0:
                seq.outputs.append(token)
                seq.logprobs.append(value)
        for row, logprobs in done.prompt:
            rows[row][0].prompt_logprobs += logprobs.chosen


def relations(sequences: list[Sequence]) -> tuple[array[int], array[int]]:
    """``prefix_order`` and ``shared_lens`` of a plan, from the slots."""
    order = sorted(sequences, key=lambda seq: seq.slots)
    shared_lens = [0]
    for left, right in pairwise(order):
        same = (a == b for a, b in zip(left.slots, right.slots, strict=False))
        shared_lens.append(sum(takewhile(bool, same)))
    return i32(seq.lane for seq in order), i32(shared_lens)


def _penalised(p: SamplingParams) -> bool:
    neutral = (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0, 0, 1)
    return not neutral


def build(
    model_dir: Path, spec: ModelSpec, dtype: str, where: torch.device, max_len: int,
    kv: KvMode = PLAIN,
) -> Model:  # fmt: skip
    """The model of ``model_dir`` on one rank."""
    return build_model(
        model_dir, spec, SingleRank(), dtype=dtype, device=where, max_len=max_len, kv=kv
    )


class Together(SingleRank):
    """A rank of a group whose ranks are threads of this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, box: list[Tensor | None]) -> None:
        self.rank, self.size = rank, len(box)
        self._barrier, self._box = barrier, box

    def _all(self, x: Tensor) -> list[Tensor]:
        self._box[self.rank] = x
        self._barrier.wait()
        found = [part.clone() for part in self._box if part is not None]
        self._barrier.wait()
        return found

    def linear_reduce(self, linear: Product, x: Activations) -> Tensor:
        return torch.stack(self._all(linear(x))).sum(0)

    def gather_last(self, x: Tensor) -> Tensor:
        return torch.cat(self._all(x), dim=1)

    def broadcast(self, x: Tensor) -> Tensor:
        return x.copy_(self._all(x)[0])


class InStep(Together):
    """A rank of several groups that step together, which has some of the experts of all."""

    def __init__(
        self, rank: int, barrier: threading.Barrier, box: list[Tensor | None], groups: int
    ) -> None:
        super().__init__(rank, barrier, box)
        self._groups, self._group_size = groups, len(box) // groups

    def gather_tokens(self, x: Tensor) -> Tensor:
        return torch.cat(self._all(x)[:: self._group_size])

    def gather_flags(self, x: Tensor) -> Tensor:
        return torch.cat(self._all(x)[:: self._group_size])

    def sum_tokens(self, product: Product, x: Tensor) -> Tensor:
        return self.linear_reduce(product, x).chunk(self._groups)[self.rank // self._group_size]


class Ranks:
    """The ranks of a group as one device, whose answers are its first rank's.

    Args:
        groups: of ``size`` ranks each, which step together; the others have steps of other sizes.
        driven: the one that has the plans.
    """

    def __init__(
        self, model_dir: Path, size: int, kv: KvMode = PLAIN, *, dtype: str = "fp32",
        max_len: int = 4096, groups: int = 1, driven: int = 0, whole_experts: bool = False,
        asked: WeightTypes = AS_STORED,
    ) -> None:  # fmt: skip
        num, self.driven = size * groups, driven
        everybody = threading.Barrier(num, timeout=60), [None] * num
        self.groups: list[list[CpuDevice]] = []
        for number in range(groups):
            own = threading.Barrier(size, timeout=60), [None] * size
            self.groups.append([])
            for rank in range(size):
                group, spec = Together(rank, *own), read_spec(model_dir)
                world = InStep(number * size + rank, *everybody, groups) if groups > 1 else None
                model = build_model(
                    model_dir, spec, group, dtype=dtype, device=torch.device("cpu"),
                    max_len=max_len, kv=kv, world=world, whole_experts=whole_experts,
                    asked=asked,
                )  # fmt: skip
                engine = Engine(
                    model, group, num_slots=1024, num_lanes=8, max_len=max_len, eos_ids=()
                )
                self.groups[-1].append(CpuDevice(engine, 1))
        self._pending: list[CpuPending] = []
        self._sizes = random.Random(0)

    @property
    def devices(self) -> list[CpuDevice]:
        return [device for group in self.groups for device in group]

    def launch(self, plan: StepPlan) -> Ranks:
        plans = [plan] * len(self.groups)
        if len(plans) > 1:
            sizes = [self._sizes.choice([0, 0, 1, 5, 60]) for _ in self.groups]
            plans = [self._other(plan.step, size) for size in sizes]
            plans[self.driven] = plan
            common = max(len(each.tokens) for each in plans)
            mixed = any(each.num_decode < len(each.lanes) for each in plans)
            plans = [replace(each, common=common, mixed=mixed) for each in plans]
        pending = [
            [device.launch(each) for device in group]
            for group, each in zip(self.groups, plans, strict=True)
        ]
        self._pending = [*pending[self.driven], *(p for group in pending for p in group)]
        return self

    @staticmethod
    def _other(step: int, size: int) -> StepPlan:
        """A prompt of ``size`` tokens, if any."""
        if not size:
            return StepPlan(step=step, num_decode=0)
        return StepPlan(
            step=step, num_decode=0 if size > 1 else 1, lanes=i32([0]), starts=i32([0]),
            counts=i32([size]), cached_counts=i32([0]), slots=i32(range(size)), samples=bytearray(b"\1"),
            tokens=i32(range(3, 3 + size)), opened=[OpenedLane(0, size, GREEDY, i32([]))],
        )  # fmt: skip

    def wait(self) -> StepDone:
        done, *_ = [pending.wait() for pending in self._pending]
        return done

    def close(self) -> None:
        for device in self.devices:
            device.close()


def read_spec(model_dir: Path) -> ModelSpec:
    """What the start reads of a folder, by its checkpoint's names."""
    with read_checkpoint(model_dir) as checkpoint:
        return as_stored(ModelSpec.from_dir(model_dir), checkpoint)


def make_device(
    model_dir: Path, dtype: str, device: str, *, num_slots: int = 8192, num_lanes: int = 32,
    max_len: int = 4096, eos_ids: tuple[int, ...] = (), kv: KvMode = PLAIN,
    spec: ModelSpec | None = None, shares_prefixes: bool = False, num_rows: int | None = None,
) -> CpuDevice | CudaDevice:  # fmt: skip
    """A device with the model of ``model_dir``, as ``spec`` or its config.json describes it."""
    spec = spec or read_spec(model_dir)
    where = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    model = build(model_dir, spec, dtype, where, max_len, kv)
    engine = Engine(
        model,
        SingleRank(),
        num_slots=num_slots,
        num_lanes=num_lanes,
        max_len=max_len,
        eos_ids=eos_ids,
        shares_prefixes=shares_prefixes,
        num_rows=num_rows,
    )
    return CudaDevice(engine) if device == "cuda" else CpuDevice(engine, 2)


def random_ids(num: int, vocab_size: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, vocab_size, num)]
