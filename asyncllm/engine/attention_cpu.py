"""Attention on the CPU, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from asyncllm.models.angles import rope_tables
from asyncllm.models.attention import (
    Batch,
    KvLayout,
    KvPairs,
    LayerKv,
    refuse_beyond_plain,
)
from asyncllm.models.spec import AttentionSpec


class TorchPairs(KvPairs):
    """Pairs that torch writes."""

    def write(self, kv: LayerKv, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [T, Hk, D] to ``slots`` [T] int64."""
        for cache, values in zip(kv, (k, v), strict=True):
            cache.index_copy_(0, slots, values)


class TorchAttention:
    """Implements :class:`asyncllm.models.attention.AttentionBackend`."""

    def __init__(
        self, layers: Sequence[AttentionSpec], layout: TorchPairs, max_len: int, where: torch.device
    ) -> None:
        self.layout, self.angles = layout, rope_tables(layers, max_len, where)
        self.nbytes = sum(table.nbytes for table in self.angles.values())

    @staticmethod
    def refuse(spec: AttentionSpec, layout: KvLayout, device: torch.device) -> str | None:
        if device.type != "cpu" or not isinstance(layout, TorchPairs):
            return f"has its K/V in {type(layout).__name__} on {device.type}"
        return refuse_beyond_plain(spec)

    def token_bytes(self, spec: AttentionSpec, dtype: torch.dtype) -> int:
        turned = (spec.num_q_heads + spec.num_kv_heads) * spec.head_dim
        widened = 12 if dtype.itemsize < 4 else 8  # float32: turned, its product, the sum's other
        return dtype.itemsize * (turned + spec.num_kv_heads * spec.v_dim) + widened * turned

    def plan(self, spec: AttentionSpec, batch: Batch) -> TorchPlan:
        return TorchPlan(self.layout, spec, batch, self.angles[spec.rope])


class TorchPlan:
    """What is the same in all layers of a step; slots are int64."""

    def __init__(
        self, layout: TorchPairs, spec: AttentionSpec, batch: Batch, cos_sin: Tensor
    ) -> None:
        host, decode = batch.host, batch.decode_lanes.shape[0]
        assert host is not None
        self._layout, self._spec, self._num_decode = layout, spec, decode
        cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, dim=-1)
        self._cos = torch.cat([cos, cos], dim=-1)  # [T, 1, rope.dim] float32, both halves alike
        self._sin = torch.cat([-sin, sin], dim=-1)  # the first half negated
        self._slots = batch.slots.long()
        longest = max(host.starts[:decode], default=-1) + 1
        # [num_decode * longest], padded with whatever the table holds
        self._decode_slots = batch.table[batch.decode_lanes.long(), :longest].flatten().long()
        self._decode_mask = None  # [num_decode, 1, 1, longest]
        if decode > 1:
            seen = torch.arange(longest) < batch.decode_lens[:, None]
            self._decode_mask = seen[:, None, None]
        # tokens, slots and mask of the other rows; no mask: each sees what is before it
        self._extends: list[tuple[slice, Tensor, Tensor | None]] = []
        token = decode
        for row in range(decode, len(host.lanes)):
            count, start = host.counts[row], host.starts[row]
            total, mask = start + count, None
            if start:
                mask = torch.arange(total) <= torch.arange(start, total)[:, None]
            slots = batch.table[host.lanes[row], :total].long()
            self._extends.append((slice(token, token + count), slots, mask))
            token += count

    def run(self, qkv: Tensor, kv: LayerKv) -> Tensor:
        q, (k_cache, v_cache) = self._rope_write(qkv, kv), kv
        out = torch.empty_like(q)
        if self._num_decode:
            self._decode(q[: self._num_decode], out[: self._num_decode], kv)
        for part, slots, mask in self._extends:
            out[part] = self._extend(q[part], k_cache[slots], v_cache[slots], mask)
        return out.flatten(1)

    def _rope_write(self, qkv: Tensor, kv: LayerKv) -> Tensor:
        """Rotated q, [T, Hq, D]; rotated k, and v, go to the batch's slots."""
        num_q, dim = self._spec.num_q_heads, self._spec.head_dim
        heads = qkv.view(qkv.shape[0], -1, dim)
        turned = num_q + self._spec.num_kv_heads
        moved = self._cos.shape[-1]
        plain = heads[:, :turned, :moved].float()
        rotated = (plain * self._cos).add_(plain.roll(moved // 2, -1).mul_(self._sin)).to(qkv.dtype)
        if moved < dim:
            rotated = torch.cat([rotated, heads[:, :turned, moved:]], dim=-1)
        self._layout.write(kv, self._slots, rotated[:, num_q:], heads[:, turned:])
        return rotated[:, :num_q]

    def _decode(self, q: Tensor, out: Tensor, kv: LayerKv) -> None:
        """One-token rows together: the query heads of a KV head act as its queries."""
        rows, (kv_heads, dim) = q.shape[0], kv[0].shape[1:]
        k, v = (
            cache.flatten(1).index_select(0, self._decode_slots).view(rows, -1, kv_heads, dim)
            for cache in kv
        )
        attended = scaled_dot_product_attention(
            q.view(rows, kv_heads, -1, dim),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=self._decode_mask,
            scale=self._spec.scale,
        )
        out.copy_(attended.reshape(rows, -1, dim))

    def _extend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[count, Hq, D] new queries, the last of the k, v [total, Hk, D]; no mask: of all."""
        attended = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None and q.shape[0] > 1,
            scale=self._spec.scale,
            enable_gqa=True,
        )
        return attended[0].transpose(0, 1)
