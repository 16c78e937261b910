"""Sampling on a CUDA device by Triton kernels: no sort, no dense counts, few launches."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncllm.engine.sampling import PENALTY_ROWS, SamplingTensors
from asyncllm.engine.step_inputs import Penalties
from asyncllm.kernels import penalties
from asyncllm.kernels.log_probs import log_probs
from asyncllm.kernels.sampling.sample import sample


class TritonSampler:
    """Implements :class:`asyncllm.engine.sampling.Sampler`."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._counts = penalties.penalty_counts(PENALTY_ROWS, vocab_size, device)

    def sample(self, logits: Tensor, given: SamplingTensors) -> Tensor:
        return sample(
            logits,
            given.temperature,
            given.top_k,
            given.top_p,
            given.min_p,
            given.uniform,
            greedy=given.all_greedy,
            truncates=given.truncates,
        )

    def add_bias(self, logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
        penalties.add_bias(logits, rows, tokens, values)

    def penalize(self, logits: Tensor, history: Tensor, p: Penalties[Tensor], max_len: int) -> None:
        penalties.penalize(logits, history, self._counts, *p)

    def log_probs(
        self, logits: Tensor, tokens: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen = log_probs(logits, tokens)
        if num_top == 0:
            none = torch.empty(len(tokens), 0, device=logits.device)
            return chosen, none.int(), none
        top, ids = logits.topk(num_top, dim=-1)
        best = log_probs(logits, ids[:, 0].contiguous())
        values = top - top[:, :1] + best[:, None]
        return chosen, ids.int(), values
