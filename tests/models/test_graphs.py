"""CUDA graphs: the same answers as eager steps, for every kind of step, padded or not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from asyncllm.codec import i32
from asyncllm.core.request import SamplingParams
from asyncllm.engine.device import CudaDevice
from asyncllm.engine.engine import Engine
from asyncllm.engine.graphs import MAX_DECODE_ROWS, decode_sizes, mixed_sizes
from asyncllm.engine.sampler_graphs import (
    KINDS,
    MAX_ROWS,
    PENALTIES,
    Ended,
    SamplerGraphs,
    SamplerVariant,
    penalty_matrix,
    sampler_sizes,
)
from asyncllm.engine.sampling_table import SamplingTable
from asyncllm.engine.step_inputs import Columns, Placed, Rows, unpack
from asyncllm.messages import StepPlan
from tests.models.harness import Driver, Sequence, make_device, random_ids
from tests.models.test_llama import VOCAB, make_checkpoint


@pytest.mark.parametrize("most", [1, 3, 100, 1000, 5000])
def test_sizes_rise_and_reach_the_most(most: int) -> None:
    for sizes in (decode_sizes(most), mixed_sizes(most)):
        assert sizes == sorted(set(sizes))
    assert decode_sizes(most)[-1] == min(most, MAX_DECODE_ROWS)
    assert mixed_sizes(most)[-1] == most
    waste = [b / (a + 1) for a, b in zip(decode_sizes(most), decode_sizes(most)[1:], strict=False)]
    assert all(w <= 2 for w in waste)


CHOICES = [
    SamplingParams(temperature=0.0, logprobs=0),
    SamplingParams(temperature=0.9, seed=5),
    SamplingParams(temperature=0.9, top_p=0.8, seed=7, logprobs=0),
    SamplingParams(temperature=0.7, top_k=9, min_p=0.01, seed=9, logprobs=2),
    SamplingParams(temperature=0.0, repetition_penalty=1.3),
    SamplingParams(temperature=0.8, logit_bias=((3, 4.0),), seed=1),
]


@pytest.mark.parametrize("most", [1, 5, 256, 1000, 3000])
def test_tail_sizes_rise_and_reach_the_most(most: int) -> None:
    sizes = sampler_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(most, MAX_ROWS)


def test_columns_of_a_tail_have_one_size_and_padding_that_harms_nothing() -> None:
    tails = SamplerGraphs(lambda *_: None, None, torch.zeros(6, 4), dump_lane=6)  # type: ignore[arg-type, return-value]
    given: Columns = {
        name: np.full((*column.shape[:-1], 3), 5, column.dtype)
        for name, column in tails.columns().items()
        if name != "penalties"
    }
    for name, column in tails.columns(given).items():
        padding = tails.columns()[name]
        assert column.shape == padding.shape
        assert column.dtype == padding.dtype
        np.testing.assert_array_equal(column[..., 3:], padding[..., 3:])
        if name in given:
            np.testing.assert_array_equal(column[..., :3], given[name])
    assert (tails.columns()["sampled_lanes"] == 6).all()
    assert (tails.columns()["temperature"] == 0).all()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ([0], SamplerVariant(1, True, False, False, True)),
        ([0, 1], SamplerVariant(2, False, False, False, True)),
        ([1, 1, 1], SamplerVariant(4, False, False, False, False)),
        ([0, 2, 1], SamplerVariant(4, False, True, False, True)),
        ([3], None),  # alternatives
        ([4], SamplerVariant(1, False, True, True, False)),
        ([0, 4], SamplerVariant(2, False, True, True, True)),
        ([4, 5], None),
        ([5], None),  # biases
        ([0] * 7, None),  # more rows than graphs have
    ],
)
def test_steps_end_in_the_graph_of_their_kind(
    params: list[int], expected: SamplerVariant | None
) -> None:
    lanes = SamplingTable(8, VOCAB, (2,))
    opened = tuple((lane, 3, CHOICES[i].pack(), b"") for lane, i in enumerate(params))
    n = len(params)
    plan = StepPlan(
        step=1, num_decode=0, lanes=i32(range(n)), starts=i32([0] * n), counts=i32([3] * n),
        heads=i32([0] * n), slots=i32(range(3 * n)), tokens=i32([1] * (3 * n)),
        samples=b"\x01" * n, opened=opened,
    )  # fmt: skip
    lanes.open(plan)
    tails = SamplerGraphs(lambda *_: None, None, torch.zeros(6, 4), dump_lane=6)  # type: ignore[arg-type, return-value]
    rows = unpack(plan, 16)
    assert tails.pick(lanes.choice(rows)) == expected
    assert tails.pick(lanes.choice(rows, masked=True)) is None


class Simulated(SamplerGraphs):
    """Replays by running what would have been captured, on the columns of the last upload."""

    def __init__(self, engine: Engine) -> None:
        hidden = torch.zeros(engine.num_lanes, engine.model.hidden_size)
        super().__init__(engine._end, engine._uploader, hidden, dump_lane=engine.num_lanes)
        self.used: set[SamplerVariant] = set()
        self._last: list[Placed] = []
        upload = engine._uploader.upload

        def keep(columns: Columns) -> Placed:
            self._last = [upload(columns)]
            return self._last[0]

        engine._uploader.upload = keep  # type: ignore[method-assign]
        for tail in self.all():
            self._captured[tail] = self._simulate(tail)  # type: ignore[assignment]

    def _simulate(self, tail: SamplerVariant) -> tuple[SimpleNamespace, Ended]:
        tokens = torch.empty(tail.num_rows, dtype=torch.int32)
        scores = torch.empty(tail.num_rows) if tail.scored else None

        def replay() -> None:
            self.used.add(tail)
            ended = self._run(self._hidden[: tail.num_rows], self._last[0], tail)
            tokens.copy_(ended[0])
            if scores is not None and ended[1] is not None:
                scores.copy_(ended[1])

        return SimpleNamespace(replay=replay), (tokens, scores)


class NoGraphs:
    def pick(self, rows: Rows) -> None:
        return None

    def close(self) -> None:
        pass


def test_ends_in_graphs_choose_what_eager_ones_choose(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    answers: list[list[Sequence]] = []
    used: set[SamplerVariant] = set()
    for graphs in (False, True):
        device = make_device(tmp_path, "fp32", "cpu", num_lanes=40)
        if graphs:
            engine = device._engine
            engine.graphs, engine.tails = NoGraphs(), Simulated(engine)  # type: ignore[assignment]
            used = engine.tails.used  # type: ignore[union-attr]
        answers.append(choose_in_many_ways(Driver(device, 4096)))
    for eager, graphed in zip(*answers, strict=True):
        assert eager.outputs == graphed.outputs
        torch.testing.assert_close(
            torch.tensor(graphed.logprobs), torch.tensor(eager.logprobs), equal_nan=True
        )
    assert {(t.greedy, t.truncates, t.penalized) for t in used} == set(KINDS)
    assert {t.scored for t in used} == {False, True}


def choose_in_many_ways(driver: Driver) -> list[Sequence]:
    out = []
    for kinds in (
        [0],
        [1],
        [2],
        [0, 1, 2],
        [1, 1],
        [3, 0],
        [4],
        [4, 2, 4],
        [5, 1],
        [4] * 7,
        [2] * 7,
    ):
        seqs = [
            Sequence(lane, random_ids(9 + lane, VOCAB, lane), CHOICES[kind])
            for lane, kind in enumerate(kinds)
        ]
        driver.run([(s, len(s.prompt), 0) for s in seqs])
        for _ in range(8):
            driver.run([(s, 1, 0) for s in seqs])
        out += seqs
    return out


def test_penalties_reach_the_logits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    driver = Driver(make_device(tmp_path, "fp32", "cpu", max_len=256), 4096)
    far = SamplingParams(temperature=0.0, presence_penalty=1e4)
    seqs = [Sequence(0, random_ids(5, VOCAB, 0), far), Sequence(1, random_ids(5, VOCAB, 0))]
    driver.generate(seqs, 200)
    assert len(set(seqs[0].outputs)) == 200
    assert len(set(seqs[1].outputs)) < 200


def test_rows_without_penalties_have_length_0() -> None:
    columns: Columns = {
        f"pen_{name}": np.array([7, 8], np.int32) for name in ("rows", "lanes", *PENALTIES)
    }
    columns["pen_rows"] = np.array([2, 0], np.int32)
    columns["pen_repetition"] = np.array([1.5, 2.5], np.float32)
    matrix = penalty_matrix(columns, 4)
    assert matrix[0].tolist() == [8, 0, 7, 0]
    assert matrix[4].view(np.float32).tolist() == [2.5, 0, 1.5, 0]


@pytest.mark.gpu
def test_ends_of_steps_give_what_eager_ones_give(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    answers = []
    for graphs in (False, True):
        device = make_device(tmp_path, "fp32", "cuda", num_lanes=40)
        assert isinstance(device, CudaDevice)
        if graphs:
            device.capture(300)
            torch.cuda.set_sync_debug_mode("error")
        try:
            answers.append(choose_in_many_ways(Driver(device, 4096)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    same = [e.outputs == g.outputs for e, g in zip(*answers, strict=True)]
    assert np.mean(same) > 0.8  # buckets change the shape of products, so near-ties may flip
    for eager, graphed in zip(*answers, strict=True):
        if eager.outputs == graphed.outputs:
            torch.testing.assert_close(
                torch.tensor(graphed.logprobs),
                torch.tensor(eager.logprobs),
                atol=0.02,
                rtol=0.02,
                equal_nan=True,
            )


@pytest.mark.gpu
def test_graphs_give_what_eager_steps_give(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    answers = []
    for graphs in (False, True):
        device = make_device(tmp_path, "bf16", "cuda", num_lanes=40)
        assert isinstance(device, CudaDevice)
        if graphs:
            device.capture(300)
            torch.cuda.set_sync_debug_mode("error")
        driver = Driver(device, 4096)
        # 1 row, then odd numbers of rows beside chunks that do and do not fill a bucket
        seqs = [Sequence(lane, random_ids(size, VOCAB, lane)) for lane, size in
                enumerate([5, 64, 130, 1, 17, 250, *range(30, 50)])]  # fmt: skip
        running: list[Sequence] = []
        try:
            for seq in seqs:
                driver.run([*((s, 1, 0) for s in running), (seq, len(seq.prompt), 0)])
                running.append(seq)
            for _ in range(6):
                driver.run([(s, 1, 0) for s in running])
            for _ in range(6):
                driver.run([(s, 1, 0) for s in running[:3]])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        answers.append(seqs)
    eager, graphed = answers
    same = [e.outputs == g.outputs for e, g in zip(eager, graphed, strict=True)]
    assert np.mean(same) > 0.8  # buckets change the shape of products, so near-ties may flip
    for e, g in zip(eager, graphed, strict=True):
        until = next((i for i, (a, b) in enumerate(zip(e.outputs, g.outputs, strict=True)) if a != b), len(e.outputs))  # fmt: skip
        torch.testing.assert_close(
            torch.tensor(g.logprobs[:until]), torch.tensor(e.logprobs[:until]), atol=0.1, rtol=0.02
        )
