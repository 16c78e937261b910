"""Masks: only tokens that they allow come out, of exactly the rows they are for."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncllm.codec import i32
from asyncllm.core.request import SamplingParams
from asyncllm.engine.bitmask import SLICE_ROWS, apply_token_bitmask, bitmask_of
from asyncllm.engine.sampling import SamplingTensors, TorchSampler
from asyncllm.engine.sampling_table import SamplingTable
from asyncllm.engine.step_inputs import unpack
from asyncllm.messages import StepPlan
from asyncllm.records import OpenedLane
from tests.models.harness import Driver, Sequence, make_device

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def packed(allowed: set[int], vocab_size: int) -> bytes:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("vocab_size", [31, 64, 1009])
@pytest.mark.parametrize("num_masks", [1, 3, SLICE_ROWS + 5])
def test_ban(device: str, vocab_size: int, num_masks: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(num_masks + 4, vocab_size, generator=generator)
    rows = torch.randperm(len(logits), generator=generator)[:num_masks].int()
    allowed = [
        {(7 * i + k * k) % vocab_size for k in range(5)} | {vocab_size - 1}
        for i in range(num_masks)
    ]
    column = np.frombuffer(b"".join(packed(a, vocab_size) for a in allowed), np.int32)
    masks = torch.from_numpy(column.reshape(num_masks, -1).copy())
    want = logits.clone()
    for row, some in zip(rows, allowed, strict=True):
        want[row, [t for t in range(vocab_size) if t not in some]] = -math.inf
    got = logits.to(device)
    apply_token_bitmask(got, rows.to(device), masks.to(device))
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0)


def test_rows_of_the_plan_become_rows_of_the_logits() -> None:
    plan = StepPlan(
        step=1, num_decode=2, lanes=i32([0, 1, 2, 3]), starts=i32([4, 4, 0, 0]),
        counts=i32([1, 1, 2, 2]), cached_counts=i32([0, 0, 0, 0]), slots=i32(range(6)),
        tokens=i32([-1, -1, 5, 5, 5, 5]), samples=bytearray(b"\x01\x01\x00\x01"),
        masked=i32([1, 3]), masks=bytearray(i32([6, 9]).tobytes()),
    )  # fmt: skip
    found = bitmask_of(plan, unpack(plan, 64))
    assert found is not None
    assert found.rows.tolist() == [1, 2]
    assert found.bits.tolist() == [[6], [9]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ban_of_end_tokens_yields_to_a_grammar_that_allows_nothing_else(
    temperature: float,
) -> None:
    params = SamplingParams(min_new_tokens=3, grammar=("regex", "a"), temperature=temperature)
    table = SamplingTable(1, 32, eos_ids=(2,))
    plan = StepPlan(
        step=1, num_decode=1, lanes=i32([0]), starts=i32([9]), counts=i32([1]), cached_counts=i32([0]),
        slots=i32([7]), tokens=i32([-1]), samples=bytearray(b"\x01"), opened=[OpenedLane(0, 10, params, i32([]))],
    )  # fmt: skip
    table.open(plan)
    bias = table.batch(unpack(plan, 64)).bias
    logits = torch.zeros(1, 32)
    assert bias is not None
    for row, token, value in zip(*bias, strict=True):
        logits[row, token] += value
    apply_token_bitmask(logits, torch.tensor([0]), torch.tensor([[1 << 2]], dtype=torch.int32))
    one = torch.tensor([0.5])
    given = SamplingTensors(
        torch.tensor([temperature]),
        torch.tensor([32]),
        one * 2,
        one * 0,
        one,
        not temperature,
        False,
    )
    assert int(TorchSampler().sample(logits, given)) == 2


@pytest.mark.parametrize("where", ["cpu", GPU])
def test_an_engine_samples_what_the_mask_allows_and_tells_raw_log_probabilities(
    where: str, demo_dir: Path
) -> None:
    sampled = SamplingParams(temperature=1.0, seed=5, logprobs=0)
    greedy = SamplingParams(temperature=0.0, logprobs=0)
    device = make_device(demo_dir, "fp32", where, num_slots=64, num_lanes=4, max_len=32)
    vocab_size = 49152
    try:
        driver = Driver(device, 64)
        rows = [
            Sequence(lane, [10, 20, 30, 40][: 2 + lane], greedy if lane < 2 else sampled)
            for lane in range(3)
        ]
        allowed = {1: {100, 49151}, 2: {7, 300, 301}}
        masks = {lane: packed(tokens, vocab_size) for lane, tokens in allowed.items()}
        done = driver.run([(s, len(s.prompt), 0) for s in rows], masks)
        step = driver.run([(s, 1, 0) for s in rows], {1: packed({5}, vocab_size)})
        free = Driver(device, 64)
        again = [Sequence(s.lane, s.prompt, s.params) for s in rows]
        free_done = free.run([(s, len(s.prompt), 0) for s in again])
        assert done.tokens[0] == free_done.tokens[0]
        for lane, tokens in allowed.items():
            assert rows[lane].outputs[0] in tokens
            assert rows[lane].logprobs[0] < -3, "a token forced is not made likely"
        assert rows[1].outputs[1] == 5
        assert len(step.tokens) == 3
    finally:
        device.close()


@pytest.mark.gpu
@pytest.mark.parametrize("top", [(1009, 1.0, 0.0), (5, 1.0, 0.0), (1009, 0.5, 0.0), (7, 0.9, 0.1)])
def test_the_kernels_draw_only_what_is_allowed(top: tuple[int, float, float]) -> None:
    """Rows of which nearly every logit is -inf; the last but one allows a single token."""
    from asyncllm.engine.sampling_cuda import TritonSampler

    num, vocab_size = 64, 1009
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(num, vocab_size, generator=generator).to(device)
    allowed = [{(31 * i + 211 * k) % vocab_size for k in range(4)} for i in range(num - 2)]
    allowed += [{1008}, set(range(vocab_size))]
    column = np.frombuffer(b"".join(packed(a, vocab_size) for a in allowed), np.int32)
    masks = torch.from_numpy(column.reshape(num, -1).copy()).to(device)
    apply_token_bitmask(logits, torch.arange(num, dtype=torch.int32, device=device), masks)
    ones = torch.ones(num, device=device)
    given = SamplingTensors(
        temperature=ones * 1.3,
        top_k=(ones * top[0]).int(),
        top_p=ones * top[1],
        min_p=ones * top[2],
        uniform=torch.rand(num, generator=generator).to(device),
        all_greedy=False,
        truncates=top != (1009, 1.0, 0.0),
    )
    tokens = TritonSampler(vocab_size, device).sample(logits, given)
    assert all(int(token) in some for token, some in zip(tokens, allowed, strict=True))
