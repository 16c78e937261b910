"""The operators of a decoder on the CPU, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from asyncllm.models.layers import Batch


class TorchOps:
    """Implements :class:`asyncllm.models.layers.Ops`."""

    def rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, (x.shape[-1],), weight, eps)

    def add_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return rms_norm(residual, (x.shape[-1],), weight, eps), residual

    def silu_mul(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return silu(gate) * up

    def attend(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: Batch,
        scale: float,
    ) -> Tensor:
        q = _rope_kv(qkv, cos_sin, batch, k_cache, v_cache)
        out = torch.empty_like(q)
        host, decode = batch.host, batch.decode_lanes.shape[0]
        assert host is not None
        if decode:
            self._decode(q[:decode], out[:decode], k_cache, v_cache, batch, scale)
        token = decode
        for row in range(decode, len(host.lanes)):
            count, start = host.counts[row], host.starts[row]
            part = slice(token, token + count)
            slots = batch.table[host.lanes[row], : start + count].long()
            out[part] = _extend(q[part], k_cache[slots], v_cache[slots], start, scale)
            token += count
        return out.flatten(1)

    def _decode(
        self, q: Tensor, out: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, scale: float
    ) -> None:
        """One-token rows together: the query heads of a KV head act as its queries."""
        rows, (kv_heads, dim) = q.shape[0], k_cache.shape[1:]
        assert batch.host is not None
        max_len = max(batch.host.starts[:rows]) + 1
        slots = batch.table[batch.decode_lanes.long(), :max_len].flatten().long()
        k = k_cache.flatten(1).index_select(0, slots).view(rows, max_len, kv_heads, dim)
        v = v_cache.flatten(1).index_select(0, slots).view(rows, max_len, kv_heads, dim)
        mask = torch.arange(max_len) < batch.decode_lens[:, None]
        attended = scaled_dot_product_attention(
            q.view(rows, kv_heads, -1, dim),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask[:, None, None, :] if rows > 1 else None,
            scale=scale,
        )
        out.copy_(attended.reshape(rows, -1, dim))


def _rope_kv(
    qkv: Tensor, cos_sin: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Rotated q, [T, Hq, D]; rotated k, and v, go to the batch's slots."""
    kv_heads, dim = k_cache.shape[1:]
    heads = qkv.view(qkv.shape[0], -1, dim)
    num_q = heads.shape[1] - 2 * kv_heads
    cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = heads[:, : num_q + kv_heads].float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    rotated = rotated.to(qkv.dtype)
    slots = batch.slots.long()
    k_cache.index_copy_(0, slots, rotated[:, num_q:])
    v_cache.index_copy_(0, slots, heads[:, num_q + kv_heads :])
    return rotated[:, :num_q]


def _extend(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    """[count, Hq, D] new queries at positions start.. over k, v [start + count, Hk, D]."""
    count, total = q.shape[0], k.shape[0]
    mask = None
    if start:
        mask = torch.arange(total) <= torch.arange(start, total)[:, None]
    attended = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None and count > 1,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)
