"""Scheduler, allocator and a real model whose sliding layers have slots of their window only.

Slots that are free are filled with NaN before each step, so that whoever reads one too many, or
one that has been given away, says so.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncllm.core.steps import Step
from asyncllm.core.window_slots import WindowLedger
from asyncllm.core.windows import Window
from asyncllm.engine.build import drop_idle_windows, warm_up
from asyncllm.engine.device import CpuDevice, CpuPending, CudaDevice, CudaPending
from asyncllm.engine.engine import Engine
from asyncllm.engine.parallel import SingleRank
from asyncllm.messages import Finished, SlotsGranted, StepPlan, Tokens
from asyncllm.models.kv_format import PLAIN, KvMode
from tests.actors.fake_device import World
from tests.models.families import CASES, VOCAB, WINDOW, Reference, make
from tests.models.harness import Sequence, build, random_ids, read_spec

CPU = torch.device("cpu")
CLOSE = 2e-4
MOST = Window(WINDOW).most
ALTERNATE, SLIDE = ("gemma3", "qwen2, windows"), ("mistral",)
ALIKE = 64  # tokens of the prompts' common beginning


class Serving(World):
    """A world whose device is a model of transformers' making, with poisoned memory."""

    def __init__(
        self, folder: Path, num_slots: int, num_sliding: int, *, max_len: int = 512,
        where: torch.device = CPU, kv: KvMode = PLAIN, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            num_slots=num_slots, window=WINDOW, num_sliding=num_sliding, vocab=VOCAB, **kwargs
        )
        spec = drop_idle_windows(read_spec(folder), max_len)
        model = build(folder, spec, "fp32", where, max_len, kv)
        self.engine = Engine(
            model, SingleRank(), num_slots=num_slots, num_sliding=num_sliding,
            num_lanes=self.core.num_lanes, max_len=max_len, eos_ids=(),
        )  # fmt: skip
        cuda = where.type == "cuda"
        self.real = CudaDevice(self.engine) if cuda else CpuDevice(self.engine, 1)
        if cuda:
            warm_up(self.real, 16, max_len=max_len)
        self.device.launch = self.launch  # type: ignore[method-assign, assignment]
        self.free: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by step
        self.logprobs: dict[int, list[float]] = defaultdict(list)
        self.layers, plan = spec.layers, self.core.plan

        def planned(granted: SlotsGranted) -> Step | None:
            step: Step | None = plan(granted)
            if step is not None:
                self.free[step.plan.step] = self.free_slots()
            return step

        self.core.plan = planned

    def free_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both spaces; a row of padding reads slot 0, and masks it."""
        ledger = self.ledger
        assert isinstance(ledger, WindowLedger)
        full, sliding = (
            torch.tensor([s for s in pool.free if s], dtype=torch.int64)
            for pool in (ledger.pool, ledger.sliding)
        )
        return full, sliding

    def launch(self, plan: StepPlan) -> CpuPending | CudaPending:
        free = self.free.pop(plan.step)
        if isinstance(self.real, CpuDevice):
            self.real._thread.submit(self.poison, *free)
        else:
            with torch.cuda.stream(self.real._stream):
                self.poison(*(slots.to(self.engine.device) for slots in free))
        return self.real.launch(plan)

    def poison(self, full: torch.Tensor, sliding: torch.Tensor) -> None:
        for layer, tensors in zip(self.layers, self.engine.kv, strict=True):
            for tensor in (
                tensors if len(tensors) == 2 else tensors[-1:]
            ):  # numbers, or their scales
                tensor.index_fill_(0, full if layer.window is None else sliding, float("nan"))

    def _detokenize(self, endpoint: int, msg: Tokens | Finished) -> None:
        if isinstance(msg, Finished):
            self.finished[msg.rid] = msg
            return
        assert msg.logprobs is not None
        for rid, token, value in zip(msg.rids, msg.tokens, msg.logprobs.chosen, strict=True):
            self.tokens[rid].append(token)
            self.logprobs[rid].append(value)

    def serve(self, prompts: list[list[int]], num_new: int, rng: random.Random) -> None:
        """Requests that come while others run, each actor when it likes."""
        left = list(enumerate(prompts, 1 + len(self.submitted)))
        while left:
            rid, prompt = left.pop(0)
            self.submit(rid, prompt, max_new_tokens=num_new, temperature=0.0, logprobs=0)
            for _ in range(rng.choice([1, 5, 30])):
                if ready := self.ready():
                    self.turn(rng.choice(ready))
        self.run(rng)
        assert not [end.failure for end in self.finished.values() if end.failure]

    def differences(self, reference: Reference) -> list[float]:
        """Of every request's log-probabilities from those of transformers."""
        return [
            reference.distance(
                Sequence(
                    0, list(msg.prompt), outputs=self.tokens[rid], logprobs=self.logprobs[rid]
                ),
                start=len(msg.prompt) - 1,
            )
            for rid, msg in self.submitted.items()
        ]


@pytest.fixture(scope="module", params=[*ALTERNATE, *SLIDE])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Reference]:
    folder = tmp_path_factory.mktemp("windows")
    return request.param, folder, Reference(make(CASES[request.param], folder))


def prompts_of(num: int, seed: int) -> list[list[int]]:
    """Longer than the window; many go on where others began."""
    rng = random.Random(seed)
    stems = [random_ids(ALIKE, VOCAB, 100 + i) for i in range(2)]
    return [
        rng.choice(stems)[: rng.choice([20, 50, ALIKE])]
        + random_ids(rng.randint(1, 40), VOCAB, 1000 * seed + i)
        for i in range(num)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*ALTERNATE, *SLIDE])
def test_on_cuda_with_graphs(tmp_path: Path, name: str) -> None:
    reference = Reference(make(CASES[name], tmp_path, spread=0.4))
    world = Serving(
        tmp_path, num_slots=260, num_sliding=MOST + 40, num_lanes=6, chunked_prefill_size=16,
        batch_max_tokens=40, headroom=0, where=torch.device("cuda", 0),
    )  # fmt: skip
    world.serve(prompts_of(24, 2), 20, random.Random(2))
    assert max(world.differences(reference)) < 3e-2
    assert isinstance(world.ledger, WindowLedger)
    assert world.ledger.evicted_sliding > 100
    world.real.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_are_those_of_transformers_whatever_is_given_back(
    made: tuple[str, Path, Reference], depth: int
) -> None:
    """Chunks, hits of prefixes that have lost slots or not, preemption, two steps in flight."""
    name, folder, reference = made
    world = Serving(
        folder, num_slots=200, num_sliding=MOST + 30, num_lanes=6, chunked_prefill_size=16,
        batch_max_tokens=40, depth=depth, headroom=0,
    )  # fmt: skip
    world.serve(prompts_of(16, depth), 24, random.Random(depth))
    assert max(world.differences(reference)) < CLOSE
    ledger = world.ledger
    assert isinstance(ledger, WindowLedger)
    assert world.core.preemptions > 0
    assert ledger.hit_tokens > 200
    assert ledger.evicted_sliding > 100
    assert ledger.evicted_tokens > 100
    assert ledger.sliding_used == ledger.used == 0
    sliding = [kv for layer, kv in zip(world.layers, world.engine.kv, strict=True) if layer.window]
    assert {len(tensor) for kv in sliding for tensor in kv} == {MOST + 31}
    assert bool(world.engine.sliding_table is None) == (name in SLIDE)
    world.real.close()


def test_a_long_prompt_needs_a_window_and_a_chunk(made: tuple[str, Path, Reference]) -> None:
    _, folder, reference = made
    world = Serving(
        folder, num_slots=600, num_sliding=MOST + 16, max_len=600, chunked_prefill_size=16
    )
    prompt = random_ids(500, VOCAB, 7)
    world.serve([prompt], 20, random.Random(0))
    assert max(world.differences(reference)) < CLOSE
    world.serve([prompt + list(world.tokens[1]), [*prompt, 5]], 5, random.Random(0))
    assert max(world.differences(reference)) < CLOSE
    assert [world.finished[rid].cached_len for rid in (1, 2)] == [0, 519], "its end is still there"
    world.real.close()


def test_without_the_cache_the_same_tokens_come(made: tuple[str, Path, Reference]) -> None:
    _, folder, _ = made
    told = []
    for use_tree in (True, False):
        world = Serving(
            folder, num_slots=260, num_sliding=120, num_lanes=5, use_tree=use_tree,
            chunked_prefill_size=16, headroom=0,
        )  # fmt: skip
        world.serve(prompts_of(10, 3), 12, random.Random(3))
        assert (world.ledger.hit_tokens > 0) is use_tree
        told.append(dict(world.tokens))
        world.real.close()
    assert told[0] == told[1]
