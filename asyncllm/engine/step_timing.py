"""Measures steps of some sizes at start, so that the first requests find their times known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from asyncllm.codec import i32
from asyncllm.core.request import SamplingParams
from asyncllm.core.step_times import StepSize
from asyncllm.engine.device import CpuDevice, CudaDevice
from asyncllm.messages import StepPlan
from asyncllm.records import OpenedLane

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of steps that decode
TOKENS = (64, 256, 1024)  # of others
ROUNDS = 3  # so that there are as many of each kind as a prediction needs
READ = 64  # tokens that each row attends to


def measure(
    device: CpuDevice | CudaDevice, num_tokens: int, max_len: int
) -> list[tuple[StepSize, float]]:
    """Steps and their milliseconds on the device; none where it does not measure them.

    What K/V cost shows only while serving: here all rows read the same few slots. Lanes and slots
    are those of the warm-up; nothing of it stays.

    Args:
        num_tokens: of the longest chunk.
        max_len: of a sequence.
    """
    if isinstance(device, CpuDevice):
        return []
    found = []
    most = min(len(device.engine.table) - 1, device.engine.num_rows)
    for plan in plans(most, num_tokens, max_len) * ROUNDS:
        done = device.launch(plan).wait()
        num = len(plan.tokens)
        size = StepSize(num, sum(plan.starts) + num, len(plan.lanes), plan.num_decode > 0)
        found.append((size, done.device_ms))
    return found


def plans(most: int, num_tokens: int, max_len: int) -> list[StepPlan]:
    """Steps that fit, of up to ``most`` rows; other arguments as of :func:`measure`."""
    decoding = [_decode(num, min(READ, max_len - 1)) for num in ROWS if num <= most]
    return decoding + [_prefill(num) for num in TOKENS if num <= min(num_tokens, max_len - 1)]


def _decode(num: int, start: int) -> StepPlan:
    return _opening(even_plan([1] * num, start, num_decode=num))


def _prefill(num_tokens: int) -> StepPlan:
    return _opening(even_plan([num_tokens], 0, num_decode=0))


def _opening(plan: StepPlan) -> StepPlan:
    """``plan`` with lanes that are new and greedy."""
    params, none = SamplingParams(temperature=0.0), i32([])
    rows = zip(plan.lanes, plan.starts, plan.counts, strict=True)
    return replace(
        plan, opened=[OpenedLane(lane, at + num, params, none) for lane, at, num in rows]
    )


def even_plan(counts: Sequence[int], start: int, *, num_decode: int) -> StepPlan:
    """A step of the first lanes, all of them at position ``start``, that sample; for the time
    before serving, since all of its K/V go to the first slot.

    Args:
        counts: tokens of each row.
    """
    rows, nothing = len(counts), i32([0] * sum(counts))
    return StepPlan(
        step=0,
        num_decode=num_decode,
        lanes=i32(range(rows)),
        starts=i32([start] * rows),
        counts=i32(counts),
        cached_counts=i32([0] * rows),
        slots=nothing,
        tokens=nothing,
        samples=bytearray(b"\x01" * rows),
        sliding=nothing,
    )
