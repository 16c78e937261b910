"""Attention on a CUDA device, by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncllm.kernels.attention.decode import decode_attention
from asyncllm.kernels.attention.decode_plan import DecodePlan, plan_decode
from asyncllm.kernels.attention.kv_write import rope_kv
from asyncllm.kernels.attention.prefill import prefill_attention
from asyncllm.models.angles import rope_tables
from asyncllm.models.attention import (
    Batch,
    KvLayout,
    KvPairs,
    Latent,
    LayerKv,
    refuse_beyond_plain,
)
from asyncllm.models.spec import AttentionSpec

MAX_HEAD_DIM = 256


class TritonPairs(KvPairs):
    """Pairs that our kernels write."""

    def rope_write(self, kv: LayerKv, qkv: Tensor, cos_sin: Tensor, batch: Batch) -> Tensor:
        """Rotated q [T, Hq, D], a view of ``qkv``; rotated k, and v, go to the batch's slots."""
        k_cache, v_cache = kv
        kv_heads, dim = k_cache.shape[1:]
        num_q = qkv.shape[1] // dim - 2 * kv_heads
        return rope_kv(qkv, cos_sin, batch.positions, batch.slots, k_cache, v_cache, num_q)


class TritonAttention:
    """Implements :class:`asyncllm.models.attention.AttentionBackend`."""

    def __init__(
        self,
        layers: Sequence[AttentionSpec],
        layout: TritonPairs,
        max_len: int,
        where: torch.device,
    ) -> None:
        self.layout, self.angles = layout, rope_tables(layers, max_len, where)
        self.nbytes = sum(table.nbytes for table in self.angles.values())

    @staticmethod
    def refuse(spec: AttentionSpec, layout: KvLayout, device: torch.device) -> str | None:
        if device.type != "cuda" or not isinstance(layout, TritonPairs):
            return f"has its K/V in {type(layout).__name__} on {device.type}"
        if spec.head_dim > MAX_HEAD_DIM:
            return f"has heads of {spec.head_dim}, more than {MAX_HEAD_DIM}"
        if layout.format is not None:  # until the kernels read it
            return f"has its K/V as {layout.format.name} on {device.type}"
        return refuse_beyond_plain(spec)

    def token_bytes(self, spec: AttentionSpec, dtype: torch.dtype) -> int:
        q, kv = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        return dtype.itemsize * 2 * (q + kv)

    def plan(self, spec: AttentionSpec, batch: Batch) -> TritonPlan:
        return TritonPlan(self.layout, spec, batch, self.angles[spec.rope])


@dataclass(slots=True)
class TritonPlan:
    """What is the same in all layers of a step; decode work is divided by the first of them."""

    layout: TritonPairs
    spec: AttentionSpec
    batch: Batch
    cos_sin: Tensor
    decode: DecodePlan | None = None

    def run(self, qkv: Tensor, kv: LayerKv, latent: Latent | None = None) -> Tensor:
        assert latent is None
        spec, batch, (k_cache, v_cache) = self.spec, self.batch, kv
        q = self.layout.rope_write(kv, qkv, self.cos_sin, batch)
        out = q.new_empty(q.shape)
        num_decode = batch.decode_lanes.shape[0]
        if num_decode:
            lanes, lens = batch.decode_lanes, batch.decode_lens
            if self.decode is None:
                self.decode = plan_decode(lanes, lens, q.shape[1], k_cache, window=spec.window)
            decode_attention(
                q[:num_decode],
                k_cache,
                v_cache,
                batch.table,
                lanes,
                lens,
                spec.scale,
                window=spec.window,
                softcap=spec.softcap,
                plan=self.decode,
                out=out[:num_decode],
            )
        if batch.prefill_lanes.shape[0]:  # after decode, whose padded rows may lie over these
            prefill_attention(
                q,
                k_cache,
                v_cache,
                batch.table,
                batch.prefill_lanes,
                batch.prefill_starts,
                batch.prefill_cu,
                batch.max_count,
                spec.scale,
                out=out,
                kv=qkv,
                window=spec.window,
                softcap=spec.softcap,
            )
        return out.flatten(1)
