"""CUDA graphs of the sampler: from hidden states of the sampled rows to their tokens.

Features of only some steps (biases, masks, length penalties, top log-probabilities) are not
captured: the sampler of such a step is launched kernel by kernel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from asyncllm.engine.graphs import Capture, GraphSet
from asyncllm.engine.h2d import Uploader
from asyncllm.engine.sampling_table import SamplingBatch
from asyncllm.engine.step_inputs import Bucket, StepColumns

MAX_ROWS = 1024
# greedy, truncates, penalized
KINDS = ((True, False, False), (False, False, False), (False, True, False), (False, True, True))

SampledTokens = tuple[
    Tensor, Tensor | None
]  # tokens [n] int32, their log-probabilities [n] float32


@dataclass(frozen=True, slots=True, order=True)
class SamplerVariant:
    """What one graph does, for up to ``num_rows`` rows.

    Attributes:
        greedy: all rows are greedy.
        truncates: some row has top_k, top_p or min_p.
        penalized: some row has penalties.
        scored: computes the log-probabilities of the tokens.
    """

    num_rows: int
    greedy: bool
    truncates: bool
    penalized: bool
    scored: bool


def sampler_sizes(most: int) -> list[int]:
    """Row counts that have graphs: reading the output matrix costs more than padding."""
    sizes = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, MAX_ROWS]
    last = min(most, MAX_ROWS)
    return [s for s in sizes if s < last] + [last]


class SamplerGraphs(GraphSet[SamplerVariant, SampledTokens]):
    """Tokens and log-probabilities, by number of rows and kind of sampling.

    Args:
        hidden: [num_lanes, hidden] buffer for the rows' hidden states.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden, self._sizes = hidden, sampler_sizes(len(hidden))

    def all(self) -> list[SamplerVariant]:
        """All variants that have graphs, the largest first."""
        return [
            SamplerVariant(size, *kind, scored)
            for size in reversed(self._sizes)
            for kind in KINDS
            for scored in (False, True)
        ]

    def capture(
        self,
        capture: Capture,
        uploader: Uploader,
        run: Callable[[Tensor, StepColumns[Tensor], SamplerVariant], SampledTokens],
    ) -> None:
        """Capture all; their columns precede those of any bucket."""
        columns = uploader.captured(Bucket(0, 0, 0))
        for variant in self.all():
            hidden = self._hidden[: variant.num_rows]
            self.add(variant, capture, partial(run, hidden, columns, variant))

    def pick(self, batch: SamplingBatch) -> SamplerVariant | None:
        """The graph for ``batch``; None: launch the kernels one by one."""
        at = bisect_left(self._sizes, len(batch.lanes))
        if at == len(self._sizes) or batch.num_top > 0 or batch.changes:
            return None
        penalized = bool(batch.penalties)
        greedy = batch.all_greedy and not penalized
        return SamplerVariant(
            num_rows=self._sizes[at],
            greedy=greedy,
            truncates=penalized or (batch.truncates and not greedy),
            penalized=penalized,
            scored=batch.num_top == 0,
        )

    def end(
        self, variant: SamplerVariant, hidden: Tensor, rows: Tensor | None, num_rows: int
    ) -> SampledTokens:
        """Queue the graph for ``hidden[rows]`` (None: the first ones).

        Returns:
            The results of ``num_rows`` rows; valid until the next replay.
        """
        place = self._hidden[:num_rows]
        if rows is None:
            place.copy_(hidden[:num_rows])
        else:
            torch.index_select(hidden, 0, rows, out=place)
        tokens, scores = self.replay(variant)
        return tokens[:num_rows], None if scores is None else scores[:num_rows]
