"""The operators of a decoder on the CPU, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from asyncllm.models.layers import Batch, Named

WIDENED_ROWS = 8192  # of the output matrix, whose float32 copies exist at a time


class TorchOps:
    """Implements :class:`asyncllm.models.layers.Ops`."""

    def stage(self, columns: Named, last_token: Tensor, table: Tensor, history: Tensor) -> Tensor:
        lanes = columns["token_lanes"].long()
        where = lanes * table.shape[1] + columns["positions"].long()
        table.view(-1).index_copy_(0, where, columns["slots"])
        given = columns["tokens"].long()
        tokens = torch.where(given < 0, last_token[lanes], given)
        history.view(-1).index_copy_(0, where, tokens.int())
        return tokens

    def pack(self, weight: Tensor) -> Tensor:
        """oneDNN's own layout for bfloat16: half the time of a product of few rows."""
        if weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return packed

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if weight.is_mkldnn:
            made = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        else:
            made = linear(x, weight, bias)
        return made if out is None else out.copy_(made)

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Within 2**-16 of the product where the weight is packed: it is made twice.

        oneDNN rounds what it returns to bfloat16, and subtracts before it rounds; so a second
        product less the first one gives what the first one lost. Half the time of float32 weights.
        """
        if weight.is_mkldnn:
            product = torch.ops.mkldnn._linear_pointwise
            rounded: Tensor = product(x, weight, None, "none", [], "")
            return rounded.float().add_(product.binary(x, rounded, weight, None, "sub"))
        if x.dtype == torch.float32:
            return linear(x, weight)
        x, out = x.float(), x.new_empty(len(x), len(weight), dtype=torch.float32)
        for first in range(0, len(weight), WIDENED_ROWS):
            part = slice(first, first + WIDENED_ROWS)
            out[:, part] = linear(x, weight[part].float())
        return out

    def embed_rmsnorm(
        self, tokens: Tensor, table: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        residual = embedding(tokens, table)
        return rms_norm(residual, (residual.shape[-1],), weight, eps), residual

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
        if batch.plan is None:
            batch.plan = _plan(cos_sin, batch)
        plan: _Plan = batch.plan
        q = _rope_kv(qkv, plan, k_cache, v_cache)
        out = torch.empty_like(q)
        decode = batch.decode_lanes.shape[0]
        if decode:
            _decode(q[:decode], out[:decode], k_cache, v_cache, plan, scale)
        for part, slots, mask in plan.extends:
            out[part] = _extend(q[part], k_cache[slots], v_cache[slots], mask, scale)
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is the same in all layers of a step; slots are int64."""

    cos: Tensor  # [T, 1, D] float32, both halves alike
    sin: Tensor  # the first half negated
    slots: Tensor  # [T] of the new tokens
    decode_slots: Tensor  # [num_decode * longest], padded with whatever the table holds
    decode_mask: Tensor | None  # [num_decode, 1, 1, longest]
    extends: list[tuple[slice, Tensor, Tensor | None]]  # tokens, slots, mask of the other rows


def _plan(cos_sin: Tensor, batch: Batch) -> _Plan:
    host, decode = batch.host, batch.decode_lanes.shape[0]
    assert host is not None
    cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, dim=-1)
    longest = max(host.starts[:decode], default=-1) + 1
    lanes = batch.decode_lanes.long()
    extends, token = [], decode
    for row in range(decode, len(host.lanes)):
        count, start = host.counts[row], host.starts[row]
        total, mask = start + count, None
        if start:
            mask = torch.arange(total) <= torch.arange(start, total)[:, None]
        slots = batch.table[host.lanes[row], :total].long()
        extends.append((slice(token, token + count), slots, mask))
        token += count
    return _Plan(
        torch.cat([cos, cos], dim=-1),
        torch.cat([-sin, sin], dim=-1),
        batch.slots.long(),
        batch.table[lanes, :longest].flatten().long(),
        (torch.arange(longest) < batch.decode_lens[:, None])[:, None, None] if decode > 1 else None,
        extends,
    )


def _decode(
    q: Tensor, out: Tensor, k_cache: Tensor, v_cache: Tensor, plan: _Plan, scale: float
) -> None:
    """One-token rows together: the query heads of a KV head act as its queries."""
    rows, (kv_heads, dim) = q.shape[0], k_cache.shape[1:]
    k = k_cache.flatten(1).index_select(0, plan.decode_slots).view(rows, -1, kv_heads, dim)
    v = v_cache.flatten(1).index_select(0, plan.decode_slots).view(rows, -1, kv_heads, dim)
    attended = scaled_dot_product_attention(
        q.view(rows, kv_heads, -1, dim),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=plan.decode_mask,
        scale=scale,
    )
    out.copy_(attended.reshape(rows, -1, dim))


def _rope_kv(qkv: Tensor, plan: _Plan, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """Rotated q, [T, Hq, D]; rotated k, and v, go to the batch's slots."""
    kv_heads, dim = k_cache.shape[1:]
    heads = qkv.view(qkv.shape[0], -1, dim)
    num_q = heads.shape[1] - 2 * kv_heads
    plain = heads[:, : num_q + kv_heads].float()
    rotated = (plain * plan.cos).add_(plain.roll(dim // 2, -1) * plan.sin).to(qkv.dtype)
    k_cache.index_copy_(0, plan.slots, rotated[:, num_q:])
    v_cache.index_copy_(0, plan.slots, heads[:, num_q + kv_heads :])
    return rotated[:, :num_q]


def _extend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[count, Hq, D] new queries, the last of the k, v [total, Hk, D]; no mask: of all."""
    attended = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None and q.shape[0] > 1,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)
