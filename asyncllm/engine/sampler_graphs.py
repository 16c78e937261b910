"""The end of a step as CUDA graphs: hidden states of the rows that sample, their logits, their tokens.

Owns the graphs, by number of rows and kind of choice, and the place where they find their rows. What
only some steps need (biases, masks, length penalties, alternatives' log-probabilities) is in none of
them: the end of such a step is launched kernel by kernel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncllm.engine.sampling_table import SamplingBatch
from asyncllm.engine.step_inputs import Columns, Placed, Rows, Uploader

MAX_ROWS = 1024
# greedy, truncates, penalized
KINDS = ((True, False, False), (False, False, False), (False, True, False), (False, True, True))
PENALTIES = ("lens", "prompt_lens", "presence", "frequency", "repetition", "prompt")

Ended = tuple[Tensor, Tensor | None]  # tokens [n] int32, their log-probabilities [n] float32


@dataclass(frozen=True, slots=True, order=True)
class SamplerVariant:
    """What one graph does, for up to ``num_rows`` rows.

    Attributes:
        greedy: every row takes its best token.
        truncates: some row has top_k, top_p or min_p.
        penalized: some row has penalties.
        scored: with the log-probabilities of the tokens.
    """

    num_rows: int
    greedy: bool
    truncates: bool
    penalized: bool
    scored: bool


def sampler_sizes(most: int) -> list[int]:
    """Numbers of rows that have graphs: reading the output matrix costs more than padding."""
    sizes = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, MAX_ROWS]
    last = min(most, MAX_ROWS)
    return [s for s in sizes if s < last] + [last]


def tail_columns(choice: SamplingBatch, rows: Rows) -> Columns:
    """Columns of a step's end, an entry for each row that samples."""
    columns: Columns = {
        "logit_rows": rows.cu[1:][rows.samples] - 1,
        "sampled_lanes": rows.lanes[rows.samples],
        "temperature": choice.temperature,
        "top_k": choice.top_k,
        "top_p": choice.top_p,
        "min_p": choice.min_p,
        "uniform": choice.uniform,
    }
    return columns


def penalty_matrix(columns: Columns, num_rows: int) -> NDArray[np.int32]:
    """[6, num_rows] of PENALTIES, floats by their bits, from columns of the penalized rows only.

    Other rows have length 0, which changes nothing.
    """
    matrix = np.zeros((len(PENALTIES), num_rows), np.int32)
    for row, name in zip(matrix, PENALTIES, strict=True):
        row[columns["pen_rows"]] = columns[f"pen_{name}"].view(np.int32)
    return matrix


class SamplerGraphs:
    """All graphs of a step's end.

    Args:
        run: (hidden states of the rows, columns, what to do) -> tokens and log-probabilities. It must
            not synchronise and must launch the same kernels whatever the columns hold.
        hidden: [num_lanes, hidden] where the rows' hidden states are put.
        dump_lane: what padded rows write to.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Placed, SamplerVariant], Ended],
        uploader: Uploader,
        hidden: Tensor,
        *,
        dump_lane: int,
    ) -> None:
        self._run, self._uploader, self._hidden = run, uploader, hidden
        self._sizes = sampler_sizes(len(hidden))
        ints, floats = np.zeros(len(hidden), np.int32), np.zeros(len(hidden), np.float32)
        self._padding: Columns = {  # of a greedy choice
            "logit_rows": ints,
            "sampled_lanes": ints + np.int32(dump_lane),
            "temperature": floats,
            "top_k": ints + np.int32(1),
            "top_p": floats + np.float32(1),
            "min_p": floats,
            "uniform": floats + np.float32(0.5),
            "penalties": np.zeros((len(PENALTIES), len(hidden)), np.int32),
        }
        self._captured: dict[SamplerVariant, tuple[torch.cuda.CUDAGraph, Ended]] = {}

    def columns(self, columns: Columns | None = None) -> Columns:
        """``columns`` padded to a fixed size: first in every upload, so that graphs find them."""
        if columns is None:
            return dict(self._padding)
        made: Columns = dict(self._padding)
        for name, column in columns.items():
            made[name] = made[name].copy()
            made[name][..., : column.shape[-1]] = column
        return made

    def all(self) -> list[SamplerVariant]:
        """What there are graphs for, the largest first."""
        return [
            SamplerVariant(size, *kind, scored)
            for size in reversed(self._sizes)
            for kind in KINDS
            for scored in (False, True)
        ]

    @torch.inference_mode()
    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Capture all, in the memory pool of the decoder's graphs, which run before these."""
        placed = self._uploader.upload(self.columns())
        for tail in self.all():
            hidden = self._hidden[: tail.num_rows]
            self._run(hidden, placed, tail)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                ended = self._run(hidden, placed, tail)
            self._captured[tail] = graph, ended

    def pick(self, choice: SamplingBatch) -> SamplerVariant | None:
        """The graph for ``choice``; None: there is none, launch the kernels."""
        at = bisect_left(self._sizes, len(choice.temperature))
        if at == len(self._sizes) or choice.num_top > 0 or choice.changes:
            return None
        if choice.penalized:
            return SamplerVariant(self._sizes[at], False, True, True, choice.num_top == 0)
        truncates = choice.truncates and not choice.all_greedy
        return SamplerVariant(
            self._sizes[at], choice.all_greedy, truncates, False, choice.num_top == 0
        )

    def replay(
        self, tail: SamplerVariant, hidden: Tensor, rows: Tensor | None, num_rows: int
    ) -> Ended:
        """Queue the graph for ``hidden[rows]`` (None: the first ones).

        Returns:
            Of ``num_rows`` rows; valid until the next replay.
        """
        place = self._hidden[:num_rows]
        if rows is None:
            place.copy_(hidden[:num_rows])
        else:
            torch.index_select(hidden, 0, rows, out=place)
        graph, (tokens, scores) = self._captured[tail]
        graph.replay()
        return tokens[:num_rows], None if scores is None else scores[:num_rows]

    def close(self) -> None:
        """Free the graphs; must come before the collectives they hold are closed."""
        self._captured.clear()
