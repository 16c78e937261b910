"""Launches steps without waiting: on a compute thread (CPU) or a stream (CUDA)."""

from __future__ import annotations

from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncllm.codec import FLOAT32, INT32
from asyncllm.engine.engine import Engine, Outputs, PreparedStep
from asyncllm.engine.graphs import cuda_capture
from asyncllm.messages import StepDone, StepPlan
from asyncllm.records import Logprobs


@dataclass(slots=True)
class HostOutputs:
    """Outputs with tensors in host memory, possibly still being copied."""

    tokens: Tensor | None
    logprobs: tuple[Tensor, Tensor, Tensor] | None
    scored: list[tuple[int, Tensor, int, Tensor, Tensor]]  # row, chosen, num_top, ids, values


def step_done(work: PreparedStep, host: HostOutputs, device_ms: float = 0.0) -> StepDone:
    """The message of a finished step; rows that sampled nothing get -1 and NaN."""
    samples, num_top = work.rows.samples, max(work.batch.num_top, 0)
    tokens = np.full(len(samples), -1, np.int32)
    if host.tokens is not None:
        tokens[samples] = host.tokens.numpy()
    logprobs = None
    if host.logprobs is not None:
        chosen, ids, values = (t.numpy() for t in host.logprobs)
        column = np.full(len(samples), np.nan, np.float32)
        column[samples] = chosen
        wide_ids = np.full((len(samples), num_top), -1, np.int32)
        wide = np.full((len(samples), num_top), np.nan, np.float32)
        if num_top:
            wide_ids[samples], wide[samples] = ids, values
        logprobs = Logprobs(num_top, _floats(column), _ints(wide_ids), _floats(wide))
    return StepDone(
        step=work.step,
        tokens=_ints(tokens),
        logprobs=logprobs,
        prompt=tuple(
            (
                row,
                Logprobs(num, _floats(chosen.numpy()), _ints(ids.numpy()), _floats(top.numpy())),
            )
            for row, chosen, num, ids, top in host.scored
        ),
        device_ms=device_ms,
    )


def _ints(values: NDArray[np.int32]) -> array[int]:
    return array(INT32, values.tobytes())


def _floats(values: NDArray[np.float32]) -> array[float]:
    return array(FLOAT32, values.tobytes())


class CpuPending:
    """A step on the compute thread."""

    gap_ms: float | None = None

    def __init__(self, work: PreparedStep, future: Future[Outputs]) -> None:
        self._work, self._future = work, future

    def wait(self) -> StepDone:
        """Block, without the GIL, until the step is done. Raises what the step raised."""
        out = self._future.result()
        scored = [(s.row, a, s.num_top, b, c) for s, a, b, c in out.scored]
        return step_done(self._work, HostOutputs(out.tokens, out.logprobs, scored))


class CpuDevice:
    """Runs steps in order on one thread, so that the event loop stays free."""

    def __init__(self, engine: Engine, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.engine = engine
        self._thread = ThreadPoolExecutor(
            1, "compute", initializer=torch.set_num_threads, initargs=(num_threads,)
        )

    def launch(self, plan: StepPlan) -> CpuPending:
        work = self.engine.prepare(plan)
        return CpuPending(work, self._thread.submit(self.engine.execute, work))

    def close(self) -> None:
        """Drop steps that have not started; a running one finishes by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class CudaPending:
    """A step on the stream, and the pinned memory its results will be in.

    Attributes:
        gap_ms: after :meth:`wait`, idle time before this step; None if it was already idle when
            the step was launched.
    """

    def __init__(
        self, work: PreparedStep, host: HostOutputs, span: StepSpan, before: StepSpan | None
    ) -> None:
        self._work, self._host, self._span, self._before = work, host, span, before
        self.gap_ms: float | None = None

    def wait(self) -> StepDone:
        """Block, without the GIL, until the step is done. Raises on a CUDA error."""
        self._span.end.synchronize()
        if self._before is not None:
            self.gap_ms = max(0.0, self._before.end.elapsed_time(self._span.begin))
        self._span.over = True
        return step_done(self._work, self._host, self._span.begin.elapsed_time(self._span.end))


@dataclass(slots=True)
class StepSpan:
    """When a step ran, by events on its stream."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    over: bool = False


class CudaDevice:
    """Queues steps on one stream; never waits for the device."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._device = engine.device
        self._stream = torch.cuda.Stream(self._device)
        # what zeroes tables, K/V and parameters has been queued on another one
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._last: StepSpan | None = None

    def launch(self, plan: StepPlan) -> CudaPending:
        before = self._last if self._last is not None and not self._last.over else None
        work = self.engine.prepare(plan)
        span = StepSpan(
            torch.cuda.Event(enable_timing=True),
            torch.cuda.Event(enable_timing=True, blocking=True),
        )
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            span.begin.record(self._stream)
            host = _fetch(self.engine.execute(work))
            span.end.record(self._stream)
        self._last = span
        return CudaPending(work, host, span, before)

    def capture(self, chunk: int) -> None:
        """Make the engine's CUDA graphs; start-up only."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self.engine.capture(cuda_capture(self._stream), chunk)
        self._stream.synchronize()

    def close(self) -> None:
        """Free the graphs, which must go before the collectives that they hold."""
        self.engine.close()


def _fetch(out: Outputs) -> HostOutputs:
    """Queue the copies to the host."""
    tokens = None if out.tokens is None else _to_host(out.tokens)
    logprobs = None
    if out.logprobs is not None:
        chosen, ids, values = out.logprobs
        logprobs = _to_host(chosen), _to_host(ids), _to_host(values)
    scored = [
        (s.row, _to_host(chosen), s.num_top, _to_host(ids), _to_host(values))
        for s, chosen, ids, values in out.scored
    ]
    return HostOutputs(tokens, logprobs, scored)


def _to_host(x: Tensor) -> Tensor:
    """Queue a copy to pinned memory, which the caching host allocator recycles."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)
