"""Sampling against what the definitions say, on hand-made distributions."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncllm.codec import i32
from asyncllm.core.request import SamplingParams
from asyncllm.engine.sampling import SamplingTensors, TorchSampler, put_given, raise_ends
from asyncllm.engine.sampling_table import BAN, SamplingTable, uniform
from asyncllm.engine.step_inputs import Penalties, unpack
from asyncllm.messages import StepPlan
from asyncllm.records import OpenedLane
from tests.models.harness import Driver, Sequence, make_device
from tests.speed import quickest

PROBS = [0.4, 0.3, 0.15, 0.1, 0.05]
DRAWS = 4000


def draw(logits: list[float], **params: float) -> dict[int, float]:
    """Share of each token in many draws with seeds 0, 1, 2, ..."""
    uniforms = uniform(np.arange(DRAWS, dtype=np.uint64), np.full(DRAWS, 5, np.int32))
    given = SamplingTensors(
        temperature=torch.full((DRAWS,), params.get("temperature", 1.0)),
        top_k=torch.full((DRAWS,), int(params.get("top_k", len(logits))), dtype=torch.int32),
        top_p=torch.full((DRAWS,), params.get("top_p", 1.0)),
        min_p=torch.full((DRAWS,), params.get("min_p", 0.0)),
        uniform=torch.from_numpy(uniforms),
        all_greedy=params.get("temperature") == 0,
        truncates=bool({"top_k", "top_p", "min_p"} & params.keys()),
    )
    tokens = TorchSampler().sample(torch.tensor([logits]).expand(DRAWS, -1), given)
    return {int(t): float((tokens == t).float().mean()) for t in tokens.unique()}


def shares(kept: list[float]) -> dict[int, float]:
    return {i: p / sum(kept) for i, p in enumerate(kept) if p}


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({}, shares(PROBS)),
        ({"temperature": 0.5}, shares([p**2 for p in PROBS])),
        ({"top_k": 2}, shares(PROBS[:2])),
        ({"top_k": 1}, {0: 1.0}),
        ({"top_p": 0.6}, shares(PROBS[:2])),  # 0.4 is short of 0.6, so the second is kept
        ({"top_p": 0.01}, {0: 1.0}),
        ({"min_p": 0.3}, shares(PROBS[:3])),  # at least 0.12
        ({"top_k": 4, "top_p": 0.8}, shares(PROBS[:3])),
        ({"temperature": 0.0}, {0: 1.0}),
    ],
)
def test_distribution(params: dict[str, float], want: dict[int, float]) -> None:
    got = draw([math.log(p) for p in PROBS], **params)
    assert got.keys() == want.keys()
    for token, share in want.items():  # 4 standard deviations of a share
        assert got[token] == pytest.approx(share, abs=4 * math.sqrt(0.25 / DRAWS))


def test_banned_tokens_are_never_drawn() -> None:
    got = draw([0.0, -math.inf, 0.0])
    assert set(got) == {0, 2}


def test_a_row_does_not_depend_on_its_company() -> None:
    torch.manual_seed(0)
    logits = torch.randn(16, 300)

    def run(rows: slice) -> torch.Tensor:
        n = len(range(16)[rows])
        uniforms = uniform(np.arange(16, dtype=np.uint64)[rows], np.full(n, 9, np.int32))
        given = SamplingTensors(
            torch.full((n,), 0.8), torch.full((n,), 50), torch.full((n,), 0.9),
            torch.zeros(n), torch.from_numpy(uniforms), False, True,
        )  # fmt: skip
        return TorchSampler().sample(logits[rows], given)

    together = run(slice(None))
    for row in range(16):
        assert run(slice(row, row + 1)) == together[row]


def test_uniform_is_a_function_of_seed_and_position() -> None:
    seeds = np.array([1, 1, 2], np.uint64)
    got = uniform(seeds, np.array([0, 1, 0], np.int32))
    assert len(set(map(float, got))) == 3
    assert np.array_equal(got, uniform(seeds, np.array([0, 1, 0], np.int32)))
    many = uniform(np.full(20000, 7, np.uint64), np.arange(20000, dtype=np.int32))
    assert 0 < many.min() < 0.001
    assert 0.999 < many.max() < 1
    assert abs(many.mean() - 0.5) < 0.01


def penalties(**changes: torch.Tensor) -> Penalties[torch.Tensor]:
    base = Penalties(
        rows=torch.tensor([1]), lanes=torch.tensor([2]), lens=torch.tensor([5]),
        prompt_lens=torch.tensor([3]), presence=torch.tensor([0.0]),
        frequency=torch.tensor([0.0]), repetition=torch.tensor([1.0]),
        penalize_prompt=torch.tensor([0]),
    )  # fmt: skip
    return base._replace(**changes)


# lane 2: prompt 0 1 1, generated 3 3; what follows is left from an earlier request
HISTORY = torch.tensor([[9] * 6, [9] * 6, [0, 1, 1, 3, 3, 4]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"presence": torch.tensor([0.5])}, [1.0, 1.0, 1.0, 0.5, 1.0]),
        ({"frequency": torch.tensor([0.5])}, [1.0, 1.0, 1.0, 0.0, 1.0]),
        ({"repetition": torch.tensor([2.0])}, [1.0, 1.0, 1.0, 0.5, 1.0]),
        (
            {"repetition": torch.tensor([2.0]), "penalize_prompt": torch.tensor([1])},
            [0.5, 0.5, 1.0, 0.5, 1.0],
        ),
    ],
)
def test_penalties(changes: dict[str, torch.Tensor], want: list[float]) -> None:
    logits = torch.ones(2, 5)
    TorchSampler().penalize(logits, HISTORY, penalties(**changes), 5)
    torch.testing.assert_close(logits, torch.tensor([[1.0] * 5, want]))


def test_repetition_multiplies_negative_logits() -> None:
    logits = -torch.ones(2, 5)
    TorchSampler().penalize(logits, HISTORY, penalties(repetition=torch.tensor([2.0])), 5)
    assert logits[1, 3] == -2


@pytest.mark.parametrize(
    ("temperature", "repetition"),
    [(1e308, 1.0), (1e39, 1e-10), (1e-5, 5e-324), (1.0, 1e-38), (1e308, 5e-324)],
)
def test_numbers_beyond_float32_undo_no_ban(temperature: float, repetition: float) -> None:
    table = SamplingTable(1, 100, eos_ids=())
    wild = SamplingParams(temperature=temperature, repetition_penalty=repetition)
    plan = one_row_plan(wild, 1, 9)
    table.open(plan)
    batch = table.batch(unpack(plan, 64))
    assert batch.penalties is not None or repetition == 1
    factor = torch.tensor(table.repetition)
    logits = torch.tensor([[0.0] * 5, [1e4, -1e4, 0.0, BAN, 1e4]])
    every = torch.arange(6, dtype=torch.int32).expand(3, -1)
    given = penalties(repetition=factor, penalize_prompt=torch.tensor([1]))
    TorchSampler().penalize(logits, every, given, 5)
    assert torch.isfinite(logits).all()
    logits[1, 4] = -math.inf  # by a mask
    assert set(draw(logits[1].tolist(), temperature=float(batch.temperature[0]))) <= {0, 1, 2}


def test_log_probs() -> None:
    logits = torch.log(torch.tensor([PROBS]))
    chosen, ids, top = TorchSampler().log_probs(logits, torch.tensor([3]), 2)
    assert chosen[0] == pytest.approx(math.log(0.1))
    assert [int(i) for i in ids[0]] == [0, 1]
    torch.testing.assert_close(top[0], torch.log(torch.tensor([0.4, 0.3])))


def one_row_plan(params: SamplingParams, prompt_len: int, start: int) -> StepPlan:
    return StepPlan(
        step=1, num_decode=1, lanes=i32([0]), starts=i32([start]), counts=i32([1]), cached_counts=i32([0]),
        slots=i32([7]), tokens=i32([-1]), samples=bytearray(b"\x01"),
        opened=[OpenedLane(0, prompt_len, params, i32([]))],
    )  # fmt: skip


@pytest.mark.parametrize(("start", "banned"), [(9, True), (11, True), (12, False)])
def test_end_tokens_are_banned_below_min_new_tokens(start: int, banned: bool) -> None:
    """The token at position start + 1 is number start + 1 - prompt_len, counted from 0."""
    table = SamplingTable(1, 100, eos_ids=(2,))
    plan = one_row_plan(SamplingParams(min_new_tokens=3, stop_token_ids=(5,)), 10, start)
    table.open(plan)
    batch = table.batch(unpack(plan, 64))
    assert (sorted(batch.bias.tokens) if batch.bias else []) == ([2, 5] if banned else [])


def test_what_is_kept_of_lanes_ends_when_one_is_opened_again_or_others_are_sampled() -> None:
    table = SamplingTable(2, 100, eos_ids=(2,))
    columns = i32([0, 1]), i32([9, 19]), i32([1, 1]), i32([0, 0]), i32([7, 8]), i32([-1, -1])
    names = "lanes", "starts", "counts", "cached_counts", "slots", "tokens"
    plan = StepPlan(
        step=1,
        num_decode=2,
        **dict(zip(names, columns, strict=True)),
        samples=bytearray(b"\1\1"),
        opened=[OpenedLane(i, 5, SamplingParams(temperature=0), i32([])) for i in range(2)],
    )
    table.open(plan)
    first = table.batch(unpack(plan, 64))
    later = replace(plan, opened=[], starts=i32([10, 20]))
    table.open(later)
    second = table.batch(unpack(later, 64))
    assert first.all_greedy
    assert second.all_greedy
    assert [*first.uniform, *second.uniform] == [0.5] * 4

    params = SamplingParams(
        temperature=0.5, top_p=0.25, repetition_penalty=2.0, min_new_tokens=60, logprobs=1
    )
    again = replace(later, opened=[OpenedLane(1, 5, params, i32([]))])
    table.open(again)
    third = table.batch(unpack(again, 64))
    assert (third.all_greedy, third.truncates, third.num_top) == (False, True, 1)
    assert third.temperature.tolist() == [0, 0.5]
    further = table.batch(unpack(replace(again, opened=[], starts=i32([11, 21])), 64))
    assert (further.uniform != third.uniform).all()  # positions differ
    assert third.penalties is not None
    assert third.penalties.lens.tolist() == [21]
    assert third.bias is not None
    assert third.bias.rows.tolist() == [1]

    alone = replace(later, samples=bytearray(b"\1\0"))  # the first row only
    fourth = table.batch(unpack(alone, 64))
    assert (fourth.all_greedy, fourth.num_top, fourth.penalties) == (True, -1, None)
    assert (fourth.lanes.tolist(), fourth.logit_rows.tolist()) == ([0], [0])


def test_logit_bias_reaches_the_row() -> None:
    table = SamplingTable(1, 100, eos_ids=())
    plan = one_row_plan(SamplingParams(logit_bias=((4, 2.5), (7, -100.0))), 10, 9)
    table.open(plan)
    batch = table.batch(unpack(plan, 64))
    assert batch.bias is not None
    assert list(zip(*batch.bias, strict=True)) == [
        (0, 4, 2.5),
        (0, 7, -100.0),
    ]


def test_biases_of_many_rows_take_no_time_and_bans_end_when_they_should() -> None:
    num, bias = 256, tuple((i, -1.0) for i in range(10, 310))
    table = SamplingTable(num, 1000, eos_ids=(2,))
    plan = StepPlan(
        step=1, num_decode=num, lanes=i32(range(num)), starts=i32([9] * num), counts=i32([1] * num),
        cached_counts=i32([0] * num), slots=i32(range(num)), tokens=i32([-1] * num),
        samples=bytearray(b"\1" * num),
        opened=[
            OpenedLane(i, 10, SamplingParams(logit_bias=bias, min_new_tokens=2 * (i == 3)), i32([]))
            for i in range(num)
        ],
    )  # fmt: skip
    table.open(plan)

    def biases(start: int) -> int:
        rows = unpack(replace(plan, starts=i32([start] * num)), 64)
        found = table.batch(rows).bias
        assert found is not None
        banned = found.rows[found.tokens == 2].tolist()
        assert banned == ([3] if start < 11 else [])
        return len(found.rows)

    assert [biases(start) for start in (9, 10, 11, 10)] == [76801, 76801, 76800, 76801]
    assert quickest(lambda: (biases(10), biases(11)), 0.02) < 0.02


@pytest.mark.parametrize("num_top", [3, 5])
def test_log_probabilities_of_given_tokens_take_the_place_of_the_best(num_top: int) -> None:
    table = SamplingTable(1, 100, eos_ids=())
    plan = one_row_plan(SamplingParams(logprobs=3, logprob_ids=(9, 50, 4)), 10, 9)
    table.open(plan)
    batch = table.batch(unpack(plan, 64))
    assert (batch.num_top, batch.given is None) == (3, False)
    assert batch.given is not None
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(1)) * 5
    chosen = torch.tensor([7, 9])
    want, best = logits.log_softmax(-1), logits.log_softmax(-1).topk(num_top)
    found = TorchSampler().log_probs(logits, chosen, num_top)
    put_given(logits, chosen, found, *map(torch.tensor, batch.given))
    assert found[1][0, :3].tolist() == [9, 50, 4]
    torch.testing.assert_close(found[2][0, :3], want[0, [9, 50, 4]])
    assert torch.equal(found[1][1], best.indices[1].int())  # rows of others are as they were
    assert torch.equal(found[2][1], best.values[1])


@pytest.mark.parametrize("generated", [0, 1, 4, 5, 6, 40])
@pytest.mark.parametrize("negative", [False, True])
def test_the_length_penalty_is_that_of_transformers(generated: int, negative: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import ExponentialDecayLengthPenalty

    prompt_len, ends = 10, (2, 50)
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(1))
    logits[0, list(ends)] = -1.5 if negative else 0.5
    reference: Any = ExponentialDecayLengthPenalty((4, 1.3), list(ends), prompt_len)
    ids = torch.zeros(1, prompt_len + generated, dtype=torch.int64)
    want = reference(ids, logits.clone())
    table = SamplingTable(1, 100, eos_ids=ends)
    params = SamplingParams(length_penalty=(4, 1.3))
    plan = one_row_plan(params, prompt_len, prompt_len + generated - 1)
    table.open(plan)
    batch = table.batch(unpack(plan, 64))
    assert (batch.lengths is not None) == (generated > 4)
    if batch.lengths is not None:
        rows, scales = map(torch.tensor, batch.lengths)
        raise_ends(logits, rows, scales, torch.tensor(ends))
    torch.testing.assert_close(logits, want, rtol=2e-6, atol=1e-6)


def test_a_length_penalty_waits_for_min_new_tokens_and_stays_finite() -> None:
    table = SamplingTable(1, 100, eos_ids=(2,))
    params = SamplingParams(length_penalty=(0, 100.0), min_new_tokens=6)
    plan = one_row_plan(params, 10, 14)
    table.open(plan)
    assert table.batch(unpack(plan, 64)).lengths is None
    later = replace(plan, starts=i32([15]), opened=[])
    lengths = table.batch(unpack(later, 64)).lengths
    assert lengths is not None
    assert list(lengths.rows) == [0]
    far = table.batch(unpack(replace(plan, starts=i32([60_000]), opened=[]), 70_000)).lengths
    assert far is not None
    logits = torch.full((1, 100), 50.0)
    raise_ends(logits, *map(torch.tensor, far), torch.tensor([2]))
    assert torch.isfinite(logits).all()
    assert int(logits.argmax()) == 2


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_engine_shifts_the_ends_of_rows_that_ask_only(where: str, demo_dir: Path) -> None:
    ends, vocab_size = (2, 49151), 49152
    device = make_device(
        demo_dir, "fp32", where, num_slots=64, num_lanes=4, max_len=32, eos_ids=ends
    )
    try:
        greedy = SamplingParams(temperature=0.0)
        eager = replace(greedy, length_penalty=(1, 100.0))
        rows = [Sequence(lane, [10, 20, 30, 40], [greedy, eager][lane]) for lane in range(2)]
        Driver(device, 64).generate(rows, 5)
        assert rows[0].outputs[:2] == rows[1].outputs[:2], "up to start nothing changes"
        assert not set(rows[0].outputs) & set(ends)
        assert set(rows[1].outputs[3:]) <= set(ends)
        assert all(token < vocab_size for token in rows[1].outputs)
    finally:
        device.close()
