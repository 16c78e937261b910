"""What a model needs from the engine: one step's batch, its operators, its tensor-parallel group.

Interfaces only; the engine implements them for CPU (torch) and CUDA (Triton).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from asyncllm.models.spec import Rope


@dataclass(slots=True)
class Batch:
    """One step on the device: ``num_tokens`` new tokens in ``num_rows`` rows.

    Rows [0, num_decode) have one new token each; the others follow with their tokens in a run.
    Every tensor is int32 on the model's device unless said otherwise.
    """

    tokens: Tensor  # [num_tokens] int64, all known by now
    positions: Tensor  # [num_tokens]
    slots: Tensor  # [num_tokens] where the new tokens' K and V go
    table: Tensor  # [num_lanes, max_len] slot of every position of every lane
    lanes: Tensor  # [num_rows]
    starts: Tensor  # [num_rows] position of a row's first new token
    lens: Tensor  # [num_rows] tokens a row attends to, new ones included
    cu_counts: Tensor  # [num_rows - num_decode + 1] prefix sums over the rows after the decode rows
    num_decode: int
    num_rows: int
    max_count: int  # largest count of the rows after the decode rows, 0 if there are none
    host_lanes: list[int]  # the same as lanes, starts, counts, for operators that run on the host
    host_starts: list[int]
    host_counts: list[int]


class Ops(Protocol):
    """The operators a decoder is made of, on one device."""

    def rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x)."""

    def silu_mul(self, x: Tensor) -> Tensor:
        """[T, 2 * I] -> [T, I]: silu of the first half times the second."""

    def rope_kv(
        self, qkv: Tensor, cos_sin: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """Rotate q and k of qkv [T, (Hq + 2 Hk) * D]; write k and v to the batch's slots.

        Returns q, [T, Hq, D].
        """

    def attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        """Causal attention of each row over its lane's slots: [T, Hq, D] -> [T, Hq * D]."""


class Comm(Protocol):
    """The tensor-parallel group of a rank."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place where possible."""

    def gather_last(self, x: Tensor) -> Tensor:
        """[n, v] of each rank -> [n, size * v], ranks side by side."""


def rope_table(rope: Rope, head_dim: int, max_position: int) -> Tensor:
    """cos and sin of every position: [max_position, head_dim] float32, cos in the first half.

    Frequencies as in RoFormer (Su et al., 2021, §3.4.2); "llama3" scaling blends long wavelengths
    into frequencies divided by ``factor`` (The Llama 3 Herd of Models, 2024, §3.4.2 and its code).
    """
    half = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (rope.theta**half)
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inv_freq)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).contiguous()


def _llama3(inv_freq: Tensor, rope: Rope) -> Tensor:
    wavelen = 2 * math.pi / inv_freq
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_max_position / wavelen - low) / (high - low)
    blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = torch.where(smooth < 0, inv_freq / rope.factor, blended)
    return torch.where(smooth > 1, inv_freq, scaled)
