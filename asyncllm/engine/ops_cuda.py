"""The operators of a decoder on a CUDA device, as Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncllm.kernels.attention.decode import decode_attention
from asyncllm.kernels.attention.decode_plan import plan_decode
from asyncllm.kernels.attention.kv_write import rope_kv
from asyncllm.kernels.attention.prefill import prefill_attention
from asyncllm.kernels.embedding import embed_rmsnorm, stage
from asyncllm.kernels.linear import linear
from asyncllm.kernels.rmsnorm import add_rmsnorm
from asyncllm.kernels.silu_mul import silu_mul
from asyncllm.models.layers import Batch, Named

GEMV_OUT = 65536  # up to so many outputs our kernel for one row is faster than cuBLAS


class TritonOps:
    """Implements :class:`asyncllm.models.layers.Ops`."""

    def stage(self, columns: Named, last_token: Tensor, table: Tensor, history: Tensor) -> Tensor:
        lanes, positions = columns["token_lanes"], columns["positions"]
        return stage(
            columns["tokens"], lanes, positions, columns["slots"], last_token, table, history
        )

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if len(x) == 1 and len(weight) <= GEMV_OUT and x.element_size() == 2:
            return linear(x, weight, bias, out)
        if out is None:
            return torch.nn.functional.linear(x, weight, bias)
        torch.mm(x, weight.t(), out=out)
        return out if bias is None else out.add_(bias)

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return torch.mm(x, weight.t())
        if len(x) == 1 and len(weight) <= GEMV_OUT:
            return linear(x, weight, out=x.new_empty(1, len(weight), dtype=torch.float32))
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    def embed_rmsnorm(
        self, tokens: Tensor, table: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return embed_rmsnorm(tokens, table, weight, eps)

    def add_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return add_rmsnorm(x, residual, weight, eps)

    def silu_mul(self, x: Tensor) -> Tensor:
        return silu_mul(x)

    def attend(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: Batch,
        scale: float,
    ) -> Tensor:
        kv_heads, dim = k_cache.shape[1:]
        num_q = qkv.shape[1] // dim - 2 * kv_heads
        q = rope_kv(qkv, cos_sin, batch.positions, batch.slots, k_cache, v_cache, num_q)
        out = q.new_empty(q.shape)
        num_decode = batch.decode_lanes.shape[0]
        if num_decode:
            lanes, lens = batch.decode_lanes, batch.decode_lens
            if batch.plan is None:
                batch.plan = plan_decode(lanes, lens, q.shape[1], k_cache)
            decode_attention(
                q[:num_decode],
                k_cache,
                v_cache,
                batch.table,
                lanes,
                lens,
                scale,
                plan=batch.plan,
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
                scale,
                out=out,
                kv=qkv,
            )
        return out.flatten(1)
