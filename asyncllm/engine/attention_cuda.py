"""Attention on a CUDA device, by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asyncllm.kernels.attention.decode import decode_attention
from asyncllm.kernels.attention.decode_plan import DecodePlan, plan_decode
from asyncllm.kernels.attention.kv_write import rope_kv
from asyncllm.kernels.attention.prefill import prefill_attention
from asyncllm.kernels.attention.shared_rows import SharingCosts
from asyncllm.kernels.autotune import without_fp8
from asyncllm.models.attention import (
    Batch,
    KvLayout,
    KvPairs,
    Latent,
    LayerKv,
    refuse_beyond_plain,
)
from asyncllm.models.kv_format import DECODE_KERNELS, DecodeKernel
from asyncllm.models.rope_tables import rope_tables
from asyncllm.models.spec import AttentionSpec

MAX_HEAD_DIM = 256
FASTEST = DECODE_KERNELS["triton_gqa_flashdecoding"]


class TritonPairs(KvPairs):
    """K/V pairs written by our kernels."""

    def rope_write(self, kv: LayerKv, qkv: Tensor, cos_sin: Tensor, batch: Batch) -> Tensor:
        """Rotated q [T, Hq, D], a view of ``qkv``; rotated k, and v, go to the batch's slots."""
        k_cache, v_cache = kv[:2]
        kv_heads, dim = k_cache.shape[1:]
        num_q = qkv.shape[1] // dim - 2 * kv_heads
        where = batch.positions, batch.slots
        return rope_kv(qkv, cos_sin, *where, k_cache, v_cache, num_q, _scales(kv))


class TritonAttention:
    """Implements :class:`asyncllm.models.attention.AttentionBackend`.

    Args:
        kernel: decode kernel, for rows of one new token; None: the fastest.
    """

    def __init__(
        self,
        layers: Sequence[AttentionSpec],
        layout: TritonPairs,
        max_len: int,
        where: torch.device,
        kernel: DecodeKernel | None = None,
    ) -> None:
        self.layout, self.angles = layout, rope_tables(layers, max_len, where)
        self.kernel = kernel or FASTEST
        self.nbytes = sum(table.nbytes for table in self.angles.values())

    @staticmethod
    def refuse(spec: AttentionSpec, layout: KvLayout, device: torch.device) -> str | None:
        if device.type != "cuda" or not isinstance(layout, TritonPairs):
            return f"has its K/V in {type(layout).__name__} on {device.type}"
        if spec.head_dim > MAX_HEAD_DIM:
            return f"has heads of {spec.head_dim}, more than {MAX_HEAD_DIM}"
        if layout.element == torch.float8_e4m3fn and (name := without_fp8(device)) is not None:
            return f"has its K/V in 8-bit floats on {name}"
        return refuse_beyond_plain(spec) or layout.refuse(spec)

    def token_bytes(self, spec: AttentionSpec, dtype: torch.dtype) -> int:
        q, kv = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        return dtype.itemsize * 2 * (q + kv)

    def sharing(self) -> SharingCosts | None:
        specs = [spec for spec in self.layout.layers if self._shares(spec)]
        if not specs:
            return None
        spec = specs[0]
        return SharingCosts.of(spec.num_q_heads, spec.num_kv_heads, spec.head_dim)

    def _shares(self, spec: AttentionSpec) -> bool:
        return spec.window is None and self.kernel.split and self.kernel.grouped

    def plan(self, spec: AttentionSpec, batch: Batch) -> TritonPlan:
        if batch.shared is not None and not self._shares(spec):
            batch = replace(batch, shared=None)
        return TritonPlan(self.layout, spec, batch, self.angles[spec.rope], self.kernel)


@dataclass(slots=True)
class TritonPlan:
    """What all layers of a step share; the first layer splits the decode work."""

    layout: TritonPairs
    spec: AttentionSpec
    batch: Batch
    cos_sin: Tensor
    kernel: DecodeKernel
    divided: DecodePlan | None = None

    def run(self, qkv: Tensor, kv: LayerKv, latent: Latent | None = None) -> Tensor:
        assert latent is None
        q = self.layout.rope_write(kv, qkv, self.cos_sin, self.batch)
        out = q.new_empty(q.shape)
        if num := self.batch.decode_lanes.shape[0]:
            self._decode(q[:num], out[:num], kv)
        if self.batch.prefill_lanes.shape[0]:  # after decode, whose padded rows may overlap these
            self._prefill(q, out, kv, qkv)
        return out.flatten(1)

    def _decode(self, q: Tensor, out: Tensor, kv: LayerKv) -> None:
        spec, batch, kernel = self.spec, self.batch, self.kernel
        (k_cache, v_cache), scales = kv[:2], _scales(kv)
        lanes, lens = batch.decode_lanes, batch.decode_lens
        if self.divided is None and kernel.split:
            self.divided = plan_decode(
                lanes,
                lens,
                q.shape[1],
                k_cache,
                window=spec.window,
                grouped=kernel.grouped,
                shared=batch.shared,
            )
        decode_attention(
            q,
            k_cache,
            v_cache,
            batch.table,
            lanes,
            lens,
            spec.scale,
            scales=scales,
            window=spec.window,
            softcap=spec.softcap,
            grouped=kernel.grouped,
            split=kernel.split,
            plan=self.divided,
            out=out,
        )

    def _prefill(self, q: Tensor, out: Tensor, kv: LayerKv, qkv: Tensor) -> None:
        spec, batch = self.spec, self.batch
        (k_cache, v_cache), scales = kv[:2], _scales(kv)
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
            scales=scales,
        )


def _scales(kv: LayerKv) -> Tensor | None:
    """The scales of 8-bit K/V, or None."""
    return kv[2] if len(kv) > 2 else None
