"""CUDA graphs of the decoder: one per bucket of tokens, for decode steps and for mixed steps.

A launch of an 8B step costs the event loop 14 ms eager and some 10 us as a graph. A graph takes
its columns from a fixed place on the device and leaves hidden states in a fixed buffer; what comes
before (rare table writes) is in no graph, what comes after (logits, sampling) in those of
:mod:`asyncllm.engine.sampler_graphs`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncllm.engine.step_inputs import Columns, Placed, Rows, Uploader

MAX_PREFILL_ROWS = 32
MAX_DECODE_ROWS = 1024  # of a decode step
MIXED_DECODE_ROWS = 512  # of a mixed step


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Shapes of one graph; a decode bucket has no prefill rows and as many rows as tokens."""

    num_tokens: int
    num_decode: int
    num_prefill: int


@dataclass(slots=True)
class Captured:
    """A graph and where its result lies."""

    graph: torch.cuda.CUDAGraph
    hidden: Tensor  # [num_tokens, hidden]


def decode_sizes(most: int) -> list[int]:
    """Rows of the decode buckets: dense where padding would cost most in proportion."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, *range(64, 128, 16), *range(128, 256, 32)]
    sizes += [*range(256, 512, 64), *range(512, MAX_DECODE_ROWS + 1, 128)]
    last = min(most, MAX_DECODE_ROWS)
    return [s for s in sizes if s < last] + [last]


def mixed_sizes(most: int) -> list[int]:
    """Tokens of the mixed buckets, up to a whole chunk and the decode rows beside it."""
    sizes = [*range(64, 1280, 64), *range(1280, 1 << 16, 128)]
    return [s for s in sizes if s < most] + [most]


class Graphs:
    """All graphs of one engine.

    Args:
        run: the decoder on columns of a bucket: (columns on the device, bucket) -> hidden states.
            It must not synchronise and must launch the same kernels whatever the columns hold.
        first: columns, always of the same size, that come before a bucket's in every upload.
        most_rows: decode rows that can come in one step.
        most_tokens: tokens of the largest mixed step that is worth a graph.
    """

    def __init__(
        self,
        run: Callable[[Placed, Bucket], Tensor],
        uploader: Uploader,
        first: Columns,
        *,
        most_rows: int,
        most_tokens: int,
        dump_lane: int,
        dump_slot: int,
    ) -> None:
        self._run, self._uploader, self._first = run, uploader, first
        self._dump_lane, self._dump_slot = dump_lane, dump_slot
        self._decode = [Bucket(n, n, 0) for n in decode_sizes(most_rows)]
        self._mixed = [
            Bucket(n, min(n, most_rows, MIXED_DECODE_ROWS), MAX_PREFILL_ROWS)
            for n in mixed_sizes(most_tokens)
        ]
        self._captured: dict[Bucket, Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    @torch.inference_mode()
    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Capture all buckets, largest first so that the later ones fit into its memory.

        Each runs once before: kernels are compiled and libraries choose their algorithms outside
        of the capture.
        """
        for bucket in sorted([*self._decode, *self._mixed], reverse=True):
            columns = self._uploader.upload(self._first | self.columns(bucket))
            self._run(columns, bucket)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                hidden = self._run(columns, bucket)
            self._captured[bucket] = Captured(graph, hidden)

    def pick(self, rows: Rows) -> Bucket | None:
        """The smallest bucket that holds ``rows``; None: too large, run it eagerly."""
        num_tokens, num_prefill = len(rows.tokens), len(rows.lanes) - rows.num_decode
        if num_prefill == 0:
            at = bisect_left(self._decode, num_tokens, key=lambda b: b.num_tokens)
            return self._decode[at] if at < len(self._decode) else None
        at = bisect_left(self._mixed, num_tokens, key=lambda b: b.num_tokens)
        if at == len(self._mixed) or num_prefill > MAX_PREFILL_ROWS:
            return None
        bucket = self._mixed[at]
        return bucket if rows.num_decode <= bucket.num_decode else None

    def replay(self, bucket: Bucket) -> Tensor:
        """Queue the graph; hidden states [num_tokens, hidden], valid until the next replay."""
        captured = self._captured[bucket]
        captured.graph.replay()
        return captured.hidden

    def close(self) -> None:
        """Free the graphs; must come before the collectives they hold are closed."""
        self._captured.clear()

    def columns(self, bucket: Bucket, rows: Rows | None = None) -> Columns:
        """The graph's columns of ``rows``, or nothing but padding."""
        n, d, p = bucket.num_tokens, bucket.num_decode, bucket.num_prefill
        columns = {
            "tokens": np.zeros(n, np.int32),
            "token_lanes": np.full(n, self._dump_lane, np.int32),
            "positions": np.zeros(n, np.int32),
            "slots": np.full(n, self._dump_slot, np.int32),
            "decode_lanes": np.full(d, self._dump_lane, np.int32),
            "decode_lens": np.zeros(d, np.int32),
            "prefill_lanes": np.full(p, self._dump_lane, np.int32),
            "prefill_starts": np.zeros(p, np.int32),
            "prefill_cu": np.zeros(p + 1, np.int32),
        }
        if rows is not None:
            t, nd = len(rows.tokens), rows.num_decode
            columns["tokens"][:t] = rows.tokens
            columns["token_lanes"][:t] = rows.token_lanes
            columns["positions"][:t] = rows.positions
            columns["slots"][:t] = rows.slots
            columns["decode_lanes"][:nd] = rows.lanes[:nd]
            columns["decode_lens"][:nd] = rows.starts[:nd] + 1
            if p:
                np_ = len(rows.lanes) - nd
                columns["prefill_lanes"][:np_] = rows.lanes[nd:]
                columns["prefill_starts"][:np_] = rows.starts[nd:]
                columns["prefill_cu"][: np_ + 1] = rows.cu[nd:]
                columns["prefill_cu"][np_ + 1 :] = rows.cu[-1]
        return dict(columns)
