"""Logits to tokens on the device: batched, without host syncs, and independent of the other rows of
the batch.

A row's token depends on its logits, parameters, seed and position only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from asyncllm.engine.step_inputs import Penalties

PENALTY_ROWS = 64  # rows with dense token counts at a time: bounds the memory


@dataclass(slots=True)
class SamplingTensors:
    """Sampling parameters of n rows on the device; float32 or int32."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor
    all_greedy: bool
    truncates: bool


class Sampler(Protocol):
    """Operators applied to the float32 logits on one device; none waits for the device."""

    def sample(self, logits: Tensor, given: SamplingTensors) -> Tensor:
        """One token per row of ``logits`` [n, vocab_size]: [n] int64.

        Temperature, then top_k, top_p and min_p on the tempered distribution, then inversion: the
        first token, by id, at which the running sum of kept probabilities passes the row's uniform
        number times their total. temperature 0 takes the best token, the lowest id among equals.
        """

    def add_bias(self, logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
        """``logits[rows, tokens] += values`` in place."""

    def penalize(self, logits: Tensor, history: Tensor, p: Penalties[Tensor], max_len: int) -> None:
        """Repetition, frequency and presence penalties on float32 ``logits`` in place.

        Repetition divides positive and multiplies negative logits (Keskar et al., 2019, §4.1);
        frequency and presence subtract, as OpenAI's API defines them, over generated tokens.

        Args:
            history: [num_lanes + 1, max_len] int32 token of every position of every lane.
            max_len: no row is longer.
        """

    def log_probs(
        self, logits: Tensor, tokens: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From ``logits`` [n, vocab_size]: log-probabilities of ``tokens`` [n], and the top ones.

        Returns:
            [n] float32, [n, num_top] int32 ids, [n, num_top] float32.
        """


class TorchSampler:
    """:class:`Sampler` in plain torch."""

    def sample(self, logits: Tensor, given: SamplingTensors) -> Tensor:
        best = logits.argmax(dim=-1)
        if given.all_greedy:
            return best
        greedy = given.temperature == 0
        scaled = logits / torch.where(greedy, 1.0, given.temperature)[:, None]
        probs = scaled.softmax(dim=-1)
        if given.truncates:
            probs = _truncated(probs, given)
        return torch.where(greedy, best, _invert(probs, given.uniform))

    def add_bias(self, logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
        logits.index_put_((rows.long(), tokens.long()), values, accumulate=True)

    def penalize(self, logits: Tensor, history: Tensor, p: Penalties[Tensor], max_len: int) -> None:
        for first in range(0, len(p.rows), PENALTY_ROWS):
            part = Penalties(*(column[first : first + PENALTY_ROWS] for column in p))
            _penalize_rows(logits, history, part, max_len)

    def log_probs(
        self, logits: Tensor, tokens: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = logits.log_softmax(dim=-1)
        chosen = scores.gather(1, tokens[:, None])[:, 0]
        top, ids = scores.topk(num_top, dim=-1)
        return chosen, ids.int(), top


def put_given(
    logits: Tensor,
    chosen: Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    columns: Tensor,
    tokens: Tensor,
) -> None:
    """Replace the top tokens at ``rows`` and ``columns`` by ``tokens`` [m].

    Args:
        found: the result of :meth:`Sampler.log_probs` for ``chosen``; modified in place.
    """
    scores, ids, values = found
    rows, columns, wanted = rows.long(), columns.long(), tokens.long()
    shift = scores[rows] - logits[rows, chosen[rows]].float()
    ids[rows, columns] = tokens
    values[rows, columns] = logits[rows, wanted].float() + shift


def raise_ends(logits: Tensor, rows: Tensor, scales: Tensor, ends: Tensor) -> None:
    """``logits[rows, ends] += |logits[rows, ends]| * scales`` in place.

    Args:
        logits: [n, vocab_size] float32.
        rows: [m] int32, each row at most once; scales: [m] float32, > 0.
        ends: [e] int64.
    """
    where = rows.long()[:, None], ends
    some = logits[where]
    logits.index_put_(where, some + some.abs() * scales[:, None])


def _truncated(probs: Tensor, given: SamplingTensors) -> Tensor:
    """``probs`` with the tokens that top_k, top_p and min_p exclude set to 0."""
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[1], device=probs.device)
    before = ordered.cumsum(dim=-1) - ordered
    keep = rank < given.top_k[:, None]
    keep &= (before < given.top_p[:, None]) | (given.top_p[:, None] >= 1)
    keep &= ordered >= given.min_p[:, None] * ordered[:, :1]
    keep[:, 0] = True
    return torch.zeros_like(probs).scatter_(1, tokens, ordered * keep)


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """First index at which the cumulative sum passes ``uniform`` times the total."""
    sums = probs.cumsum(dim=-1)
    goal = uniform[:, None] * sums[:, -1:]
    index = torch.searchsorted(sums, goal, right=True)[:, 0]
    return torch.where(index < probs.shape[1], index, probs.argmax(dim=-1))


def _penalize_rows(logits: Tensor, history: Tensor, p: Penalties[Tensor], max_len: int) -> None:
    rows, vocab_size = p.rows.long(), logits.shape[1]
    tokens = history[p.lanes.long(), :max_len].long()
    position = torch.arange(max_len, device=logits.device)
    valid = position < p.lens[:, None]
    made = valid & (position >= p.prompt_lens[:, None])
    seen = made | (valid & (p.penalize_prompt[:, None] > 0))
    # counts per token; column vocab_size collects tokens that do not count
    zeros = torch.zeros(len(rows), vocab_size + 1, device=logits.device)
    ones = torch.ones((), device=logits.device).expand(tokens.shape)
    counts = zeros.scatter_add(1, tokens.masked_fill(~made, vocab_size), ones)[:, :vocab_size]
    seen_counts = zeros.scatter_add(1, tokens.masked_fill(~seen, vocab_size), ones)
    changed = logits[rows]
    factor = torch.where(
        seen_counts[:, :vocab_size] > 0, p.repetition[:, None], torch.ones_like(changed)
    )
    changed = torch.where(changed > 0, changed / factor, changed * factor)
    changed -= p.frequency[:, None] * counts
    changed -= p.presence[:, None] * (counts > 0)
    logits.index_copy_(0, rows, changed)
