"""Captures and replays CUDA graphs, in particular those of the decoder.

Launching a step of an 8B model takes the event loop 14 ms eagerly and about 10 us as a graph. There
is one graph per bucket of tokens, for decode steps and for mixed steps; it reads its columns at a
fixed address on the device and writes hidden states to a fixed buffer. The work before it (rare
table writes) is in no graph; the work after it (logits, sampling) is in the graphs of
:mod:`asyncllm.engine.sampler_graphs`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from asyncllm.engine.h2d import Uploader
from asyncllm.engine.step_inputs import Bucket, StepColumns, StepRows

MAX_PREFILL_ROWS = 32
MAX_DECODE_ROWS = 1024  # per decode step
MIXED_DECODE_ROWS = 512  # per mixed step
MIXED_PADDING = 128  # least tokens of padding that cost more than launching kernel by kernel
# the tokens up to which mixed steps of any size have one
GRAPH_CHUNK, GRAPH_DECODE_ROWS = 2048, 256
MOST_CHUNK = 8192  # of a full step that has one: its activations have memory of their own
SHARED_SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768)  # decode steps with shared prefixes

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


class Capture(Protocol):
    """Captures a graph."""

    def __call__(self, run: Callable[[], R]) -> tuple[Callable[[], None], R]:
        """Returns a function that replays what ``run`` did, and the tensors with its results."""


def cuda_capture(stream: torch.cuda.Stream) -> Capture:
    """Captures graphs on ``stream`` that share their memory, so capture the largest first."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], R]) -> tuple[Callable[[], None], R]:
        run()  # kernels are compiled and libraries choose their algorithms outside of the capture
        # torch.cuda.graph would wait for the device and empty the allocator's cache each time
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                graph.capture_end()
        return graph.replay, result

    return capture


class GraphSet(Generic[K, R]):
    """Graphs by key."""

    def __init__(self) -> None:
        self._captured: dict[K, tuple[Callable[[], None], R]] = {}

    def __len__(self) -> int:
        return len(self._captured)

    @torch.inference_mode()
    def add(self, key: K, capture: Capture, run: Callable[[], R]) -> None:
        """Capture ``run``, which must not synchronise and must always launch the same kernels."""
        self._captured[key] = capture(run)

    def replay(self, key: K) -> R:
        """Queue the graph; its output is valid until the next replay."""
        replay, result = self._captured[key]
        replay()
        return result

    def close(self) -> None:
        """Free the graphs; must come before the collectives they hold are closed."""
        self._captured.clear()


def decode_sizes(most: int) -> list[int]:
    """Rows of the decode buckets: denser where padding costs relatively more."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, *range(64, 128, 16), *range(128, 256, 32)]
    sizes += [*range(256, 512, 64), *range(512, MAX_DECODE_ROWS + 1, 128)]
    last = min(most, MAX_DECODE_ROWS)
    return [s for s in sizes if s < last] + [last]


def mixed_sizes(chunk: int) -> list[int]:
    """Tokens of the mixed buckets: any up to a limit, and those of a full step.

    A step between the two, or of a chunk above ``MOST_CHUNK``, takes longer on the GPU than its
    launch on the host. Right above usual lengths of prompts, beside which a few rows decode, they
    are denser.
    """
    most = min(chunk, GRAPH_CHUNK) + GRAPH_DECODE_ROWS
    sizes = {*range(64, 1280, 64), *range(1280, most, MIXED_PADDING)}
    sizes |= {length + rows for length in (512, 1024, 2048) for rows in (16, 32)}
    # products of 448 rows take cuBLAS a third longer than those of 512 (an 8B model on an H200)
    sizes = sizes - {448} | {432}
    full = chunk if most < chunk <= MOST_CHUNK else most
    return sorted({*(s for s in sizes if s < most), most, full})


class DecoderGraphs(GraphSet[Bucket, Tensor]):
    """Hidden states [num_tokens, hidden], by bucket.

    Args:
        most_rows: maximum decode rows per step.
        chunk: tokens of a full mixed step.
        shares: decode rows may share prefix reads. Decode steps without groups then have graphs of
            their own, since the kernels for groups take time even if there are none; in mixed steps
            that is negligible.
    """

    def __init__(self, most_rows: int, chunk: int, *, shares: bool = False) -> None:
        super().__init__()
        self._decode = [Bucket(n, n, 0) for n in decode_sizes(most_rows)]
        last = self._decode[-1].num_tokens
        sizes = sorted({*(n for n in SHARED_SIZES if n < last), last}) if shares else []
        self._shared = [Bucket(n, n, 0, True) for n in sizes]
        self._mixed = [
            Bucket(n, min(n, most_rows, MIXED_DECODE_ROWS), MAX_PREFILL_ROWS, shares)
            for n in mixed_sizes(chunk)
        ]

    def all(self) -> list[Bucket]:
        """The sizes to capture, largest first."""
        return sorted([*self._decode, *self._shared, *self._mixed], reverse=True)

    def capture(
        self,
        capture: Capture,
        uploader: Uploader,
        run: Callable[[StepColumns[Tensor], Bucket], Tensor],
    ) -> None:
        """Capture the decoder for all buckets."""
        for bucket in self.all():
            self.add(bucket, capture, partial(run, uploader.captured(bucket), bucket))

    def size(self, num_tokens: int, *, mixed: bool) -> int:
        """Tokens of the smallest bucket that fits; ``num_tokens`` itself if none does.

        Args:
            mixed: some rows have more than one token.
        """
        bucket = self._smallest(num_tokens, mixed=mixed)
        return num_tokens if bucket is None else bucket.num_tokens

    def pick(self, rows: StepRows, num_tokens: int, *, mixed: bool) -> Bucket | None:
        """The smallest bucket for ``num_tokens``, if it holds ``rows``; None: run them eagerly.

        ``num_tokens`` beyond those of ``rows`` come from other groups that step in lockstep.
        """
        bucket = self._smallest(num_tokens, mixed=mixed, shares=rows.shared is not None)
        num_prefill = len(rows.lanes) - rows.num_decode
        if bucket is None or num_prefill > MAX_PREFILL_ROWS:
            return None
        return bucket if rows.num_decode <= bucket.num_decode else None

    def _smallest(self, num_tokens: int, *, mixed: bool, shares: bool = False) -> Bucket | None:
        buckets = self._mixed if mixed else self._shared if shares else self._decode
        at = bisect_left(buckets, num_tokens, key=lambda b: b.num_tokens)
        if at == len(buckets) or (mixed and buckets[at].num_tokens - num_tokens >= MIXED_PADDING):
            return None
        return buckets[at]
