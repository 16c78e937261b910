"""What a model needs from the engine: one step's batch, its operators, its tensor-parallel group.

Interfaces only; the engine implements them for CPU (torch) and CUDA (Triton).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from asyncllm.models.spec import Rope


@dataclass(slots=True)
class Batch:
    """One step on the device: rows of new tokens, one-token rows first.

    Every tensor is int32 on the model's device unless said otherwise. In a CUDA graph the shapes
    are those of a bucket and the rest is padding: padded decode rows have length 0, padded prefill
    rows no tokens, and padded tokens write K and V to a slot that nobody reads.
    """

    tokens: Tensor  # [num_tokens] int64, all known by now
    positions: Tensor  # [num_tokens]
    slots: Tensor  # [num_tokens] where the new tokens' K and V go
    table: Tensor  # [num_lanes + 1, max_len] slot of every position of every lane
    decode_lanes: Tensor  # [num_decode] rows of one new token: row i is token i
    decode_lens: Tensor  # [num_decode] tokens a row attends to, the new one included
    prefill_lanes: Tensor  # [num_prefill] the other rows
    prefill_starts: Tensor  # [num_prefill] position of the first new token
    prefill_cu: Tensor  # [num_prefill + 1] row i is tokens [cu[i], cu[i + 1])
    max_count: int  # about the most new tokens of a prefill row
    host: HostRows | None = None  # for operators that run on the host
    plan: Any = None  # what the attention operator works out once for all layers


@dataclass(slots=True)
class HostRows:
    """The rows of a batch on the host."""

    lanes: list[int]
    starts: list[int]
    counts: list[int]


class Named(Protocol):
    """Tensors by name."""

    def __getitem__(self, name: str) -> Tensor:
        """Raises KeyError."""


class Ops(Protocol):
    """The operators a decoder is made of, on one device."""

    def stage(self, columns: Named, last_token: Tensor, table: Tensor, history: Tensor) -> Tensor:
        """Enter a step's slots and tokens into the lane tables; its tokens, [num_tokens] int64.

        Args:
            columns: int32 [num_tokens] each: tokens (-1: the lane's last one), token_lanes,
                positions, slots.
            last_token: [num_lanes + 1] int64.
            table, history: [num_lanes + 1, max_len] int32 slot and token of every position.
        """

    def pack(self, weight: Tensor) -> Tensor:
        """``weight`` [out, in] in the form that :meth:`linear` reads fastest; start-up only."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """x @ weight.T + bias."""

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight.T as float32, never rounded to the dtype of the two."""

    def embed_rmsnorm(
        self, tokens: Tensor, table: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm of the embeddings, embeddings), [num_tokens, hidden] each."""

    def add_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x)."""

    def silu_mul(self, x: Tensor) -> Tensor:
        """[T, 2 * I] -> [T, I]: silu of the first half times the second."""

    def attend(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: Batch,
        scale: float,
    ) -> Tensor:
        """Rotate q and k of qkv [T, (Hq + 2 Hk) * D], write k and v to the batch's slots, and let
        each row attend causally to its lane's slots: [T, Hq * D]. qkv may be changed."""


class Comm(Protocol):
    """The tensor-parallel group of a rank."""

    rank: int
    size: int

    def linear_reduce(self, ops: Ops, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias, summed over ranks; valid until the call after the next one."""

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
