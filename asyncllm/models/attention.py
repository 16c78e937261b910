"""One step's batch, the K/V that attention reads and writes, and the attention interface.

A model plans each distinct attention of its layers once per step and runs the plan in every layer;
only the layout knows how K and V are stored. The engine implements backends per device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from asyncllm.core.windows import PerSpace
from asyncllm.kernels.attention.shared_rows import SharedRows, SharingCosts
from asyncllm.models.kv_format import Element, KvFormat
from asyncllm.models.spec import AttentionSpec

ELEMENTS: dict[Element, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

LayerKv = tuple[Tensor, ...]  # of one layer, made by its layout; dimension 0 is the slot


@dataclass(slots=True)
class Batch:
    """One step on the device: rows of new tokens, one-token rows first.

    Every tensor is int32 on the model's device unless noted otherwise. In a CUDA graph the shapes
    are those of a bucket and the rest is padding: padded decode rows have length 0, padded prefill
    rows no tokens, and padded tokens write K and V to a slot that nobody reads.
    """

    tokens: Tensor  # [num_tokens] int64, all known
    table: Tensor  # [num_lanes + 1, max_len] slot of every position of every lane
    positions: Tensor  # [num_tokens]
    slots: Tensor  # [num_tokens] where the new tokens' K and V are written
    decode_lanes: Tensor  # [num_decode] rows of one new token: row i is token i
    decode_lens: Tensor  # [num_decode] tokens a row attends to, the new one included
    prefill_cu: Tensor  # [num_prefill + 1] the other rows: row i is tokens [cu[i], cu[i + 1])
    prefill_lanes: Tensor  # [num_prefill]
    prefill_starts: Tensor  # [num_prefill] position of the first new token
    max_count: int  # approximate maximum of new tokens in a prefill row
    host: HostRows | None = None  # for operators that run on the host
    # for layers with a window that have a separate slot space; entries they no longer see may be
    # slots that have been reassigned
    sliding_table: Tensor | None = None
    sliding_slots: Tensor | None = None
    lanes: Tensor | None = None  # [num_tokens], the last lane for padding; None: no padding
    shared: SharedRows | None = None  # prefixes that decode rows share, for layers without windows

    def live(self) -> Tensor | None:
        """[num_tokens] int32: 1 for tokens, 0 for padding; None: all are tokens."""
        return None if self.lanes is None else (self.lanes < len(self.table) - 1).int()

    def of(self, spec: AttentionSpec) -> Batch:
        """The batch for layers with ``spec``, with the table and slots of their space."""
        if spec.window is None or self.sliding_table is None or self.sliding_slots is None:
            return self
        return replace(self, table=self.sliding_table, slots=self.sliding_slots)


@dataclass(slots=True)
class HostRows:
    """The rows of a batch on the host."""

    lanes: list[int]
    starts: list[int]
    counts: list[int]


class KvLayout(Protocol):
    """How the K/V of tokens are stored, in all layers of one rank.

    The only place that knows bytes, shapes and dtypes; its subclass for a device writes them.
    """

    @property
    def layers(self) -> Sequence[AttentionSpec]:
        """This rank's share of the specs of its layers."""

    def heads(self, layer: AttentionSpec) -> int:
        """Number of equal, consecutive parts into which dimensions 1 and later of each of a layer's
        tensors divide: the rank's KV heads. 1: they are not divided."""

    def bytes_per_slot(self) -> PerSpace:
        """Bytes of one token over all layers of each space (without a window, with one)."""

    def allocate(self, num_slots: PerSpace, device: torch.device) -> list[LayerKv]:
        """Allocate zeroed tensors of every layer, with as many slots as its space has."""


@dataclass(frozen=True, slots=True)
class Latent:
    """The source of new tokens' keys and values in a layer of kind "mla"."""

    raw: Tensor  # [T, kv_rank + rope.dim] latent and rotary part of keys; before norm and rotation
    norm: Tensor  # [kv_rank], weight of the latent's norm
    eps: float
    up: Tensor  # [Hq, D - rope.dim + Dv, kv_rank]: the rest of each head's key, and its value


class AttentionPlan(Protocol):
    """An attention of one step, ready to run in every layer that has it."""

    def run(self, qkv: Tensor, kv: LayerKv, latent: Latent | None = None) -> Tensor:
        """Rotate q and k of ``qkv`` [T, (Hq + Hk) * D + Hk * Dv], write k and v to the batch's
        slots, and let each row attend causally to its lane's: [T, Hq * Dv]. May change qkv.

        For kind "mla", ``qkv`` is q only, whose heads end with the rotary part, and ``latent`` has
        the keys and values."""


@dataclass(slots=True)
class ScaledQueries:
    """A plan that first multiplies the queries by a factor per token."""

    plan: AttentionPlan
    factors: Tensor  # [T, 1] in the dtype of q
    width: int  # of q in a row of qkv

    def run(self, qkv: Tensor, kv: LayerKv, latent: Latent | None = None) -> Tensor:
        qkv[:, : self.width].mul_(self.factors)
        return self.plan.run(qkv, kv, latent)


class AttentionBackend(Protocol):
    """Attention on one device, over K/V in one layout."""

    @property
    def layout(self) -> KvLayout:
        """The layout of the K/V that it reads and writes."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tables besides the K/V."""

    @staticmethod
    def refuse(spec: AttentionSpec, layout: KvLayout, device: torch.device) -> str | None:
        """Why ``spec`` cannot run here, as the end of a sentence about it; None: it can."""

    def token_bytes(self, spec: AttentionSpec, dtype: torch.dtype) -> int:
        """Bytes of workspace per token while a plan runs, including qkv and the result."""

    def sharing(self) -> SharingCosts | None:
        """The costs of reading shared prefixes of decode rows once (``Batch.shared``); None: each
        row reads all of its K/V by itself."""

    def plan(self, spec: AttentionSpec, batch: Batch) -> AttentionPlan:
        """Compute what all layers with ``spec`` share in a step; called once per step and spec."""


class KvPairs:
    """K and V as tensors [num_slots, num_kv_heads, head_dim] in ``dtype``.

    In an 8-bit format a third tensor has the scales of both, [num_slots, num_kv_heads, 2,
    num_scales] bfloat16: adjacent, since whoever reads a token's K also reads its V.
    """

    def __init__(
        self, layers: Sequence[AttentionSpec], dtype: torch.dtype, fmt: KvFormat | None = None
    ) -> None:
        self.dtype, self.format, self.layers = dtype, fmt, layers

    def heads(self, layer: AttentionSpec) -> int:
        return layer.num_kv_heads

    @property
    def element(self) -> torch.dtype:
        """Dtype of K and V in memory."""
        return self.dtype if self.format is None else ELEMENTS[self.format.element]

    def bytes_per_slot(self) -> PerSpace:
        sizes = [2 * spec.num_kv_heads * self._row_bytes(spec.head_dim) for spec in self.layers]
        sliding = sum(compress(sizes, (spec.window is not None for spec in self.layers)))
        return PerSpace(sum(sizes) - sliding, sliding)

    def _row_bytes(self, dim: int) -> int:
        return dim * self.dtype.itemsize if self.format is None else self.format.row_bytes(dim)

    def allocate(self, num_slots: PerSpace, device: torch.device) -> list[LayerKv]:
        return [self._layer(num_slots.of(spec.window), spec, device) for spec in self.layers]

    def _layer(self, num_slots: int, spec: AttentionSpec, device: torch.device) -> LayerKv:
        heads, dim = spec.num_kv_heads, spec.head_dim
        k, v = (zeros((num_slots, heads, dim), self.element, device) for _ in range(2))
        if self.format is None:
            return k, v
        shape = (num_slots, heads, 2, self.format.num_scales(dim))
        return k, v, zeros(shape, torch.bfloat16, device)

    def refuse(self, spec: AttentionSpec) -> str | None:
        """Why ``spec`` cannot use this layout, as the end of a sentence about it; None: it can."""
        if self.format is None or self.format.group is None:
            return None
        halves = spec.head_dim // 2, (spec.rope.dim if spec.rope else 0) // 2
        if any(half % self.format.group for half in halves):
            return (
                f"turns {2 * halves[1]} channels of heads of {spec.head_dim}, whose halves do not "
                f"divide by groups of {self.format.group} ({self.format.name})"
            )
        return None


class KvLatents:
    """The latent of a token, normed, and the rotated key that all heads share, in ``dtype``:
    [num_slots, kv_rank + rope.dim]. The same on every rank.

    In 8-bit floats a second tensor has a scale for each row, [num_slots] float32: smaller elements
    cannot be copied asynchronously.
    """

    def __init__(
        self, layers: Sequence[AttentionSpec], dtype: torch.dtype, fmt: KvFormat | None = None
    ) -> None:
        self.dtype, self.format, self.layers = dtype, fmt, layers
        self._widths = [spec.kv_rank + (spec.rope.dim if spec.rope else 0) for spec in layers]

    def heads(self, layer: AttentionSpec) -> int:
        return 1

    @property
    def element(self) -> torch.dtype:
        """Dtype of latents in memory."""
        return self.dtype if self.format is None else ELEMENTS[self.format.element]

    def bytes_per_slot(self) -> PerSpace:
        scale = 0 if self.format is None else torch.float32.itemsize
        total = sum(width * self.element.itemsize + scale for width in self._widths)
        return PerSpace(total, 0)

    def allocate(self, num_slots: PerSpace, device: torch.device) -> list[LayerKv]:
        return [self._layer(num_slots.full, width, device) for width in self._widths]

    def _layer(self, num_slots: int, width: int, device: torch.device) -> LayerKv:
        rows = zeros((num_slots, width), self.element, device)
        if self.format is None:
            return (rows,)
        return rows, zeros((num_slots,), torch.float32, device)

    def refuse(self, spec: AttentionSpec) -> str | None:
        """Why ``spec`` cannot store its latents this way, as the end of a sentence about it."""
        if self.format is None or (self.format.element == "fp8" and self.format.group is None):
            return None
        return f"has its latents in {self.format.name} instead of triton_fp8kv"


def refuse_beyond_plain(spec: AttentionSpec) -> str | None:
    """``AttentionBackend.refuse`` for backends with causal grouped-query attention only."""
    asked = {
        f"is of kind {spec.kind!r}": spec.kind != "gqa",
        "has no rotary embedding": spec.rope is None,
        "turns neighbouring elements": spec.rope is not None and spec.rope.interleaved,
        "has attention sinks": spec.sinks,
        "has latents": spec.kv_rank != 0 or spec.q_rank is not None,
        f"has values of {spec.v_dim} and keys of {spec.head_dim}": spec.v_dim != spec.head_dim,
    }
    return next((reason for reason, yes in asked.items() if yes), None)


def refuse_beyond_latent(spec: AttentionSpec) -> str | None:
    """``AttentionBackend.refuse`` for backends with causal attention over latents only."""
    asked = {
        f"is of kind {spec.kind!r} beside others": spec.kind != "mla",
        f"has {spec.num_q_heads} heads of queries and {spec.num_kv_heads} of keys": (
            spec.num_q_heads != spec.num_kv_heads
        ),
        "has no rotary embedding": spec.rope is None,
        f"has a sliding window of {spec.window}": spec.window is not None,
        f"has logits capped at {spec.softcap}": spec.softcap is not None,
        "has attention sinks": spec.sinks,
    }
    return next((reason for reason, yes in asked.items() if yes), None)


def decompressed_from(spec: AttentionSpec) -> int:
    """Number of new tokens in a row from which, whatever its prefix, decompressing keys and values
    is cheaper than attending to the latents themselves.

    A pair of query and latent takes ``2 * (2 * kv_rank + rope)`` operations a head instead of
    ``2 * (D + Dv)``. Keys and values of a latent cost ``2 * kv_rank * (D - rope + Dv)``, for every
    token of the row; projecting a query and its result costs as much, for every new token. So
    ``count`` new tokens after ``start`` others are decompressed where ``count ** 2 > 2 * start *
    (decompressed_from - count)``.
    """
    assert spec.rope is not None
    made = spec.head_dim - spec.rope.dim + spec.v_dim
    return -(-spec.kv_rank * made // max(1, 2 * spec.kv_rank - made))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like ``torch.zeros``; on the CPU without touching the memory (13 s for 4 GiB), by calloc."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
