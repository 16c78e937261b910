"""Attention on the CPU, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from asyncllm.kernels.attention.quantize import dequantize_ref, quantize_ref
from asyncllm.models.attention import (
    Batch,
    KvLayout,
    KvPairs,
    Latent,
    LayerKv,
    refuse_beyond_plain,
)
from asyncllm.models.rope_tables import rope_tables
from asyncllm.models.spec import AttentionSpec

WINDOW_QUERIES = 256  # queries per piece of a sliding-window layer, or the window's size if larger
SCORES = 1 << 22  # maximum soft-capped scores in memory, or those of one token


class TorchPairs(KvPairs):
    """K/V pairs written and read by torch."""

    def write(self, kv: LayerKv, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k, v [T, Hk, D] to ``slots`` [T] int64."""
        if self.format is None:
            for cache, values in zip(kv, (k, v), strict=True):
                cache.index_copy_(0, slots, values)
            return
        # [T, Hk, 2, D] and [T, Hk, 2, scales]
        pairs, scales = quantize_ref(torch.stack([k, v], 2), self.element, self.format.group)
        for cache, values in zip(kv, (*pairs.unbind(2), scales), strict=True):
            _raw(cache).index_copy_(0, slots, _raw(values))

    def read(self, kv: LayerKv, slots: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [T, Hk, D] of ``slots`` [T] int64, in the model's compute dtype."""
        k, v, *rest = (_raw(x).flatten(1).index_select(0, slots).view(-1, *x.shape[1:]) for x in kv)
        if not rest:
            return k, v
        k_scales, v_scales = rest[0].unbind(2)
        return (
            dequantize_ref(k.view(self.element), k_scales, self.dtype),
            dequantize_ref(v.view(self.element), v_scales, self.dtype),
        )


def _raw(x: Tensor) -> Tensor:
    """8-bit floats as bytes: torch does not index them."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


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
        return refuse_beyond_plain(spec) or layout.refuse(spec)

    def token_bytes(self, spec: AttentionSpec, dtype: torch.dtype) -> int:
        turned = (spec.num_q_heads + spec.num_kv_heads) * spec.head_dim
        widened = 12 if dtype.itemsize < 4 else 8  # float32: rotated, product, summand
        return dtype.itemsize * (turned + spec.num_kv_heads * spec.v_dim) + widened * turned

    def sharing(self) -> None:
        """None: each row reads all of its K/V by itself."""

    def plan(self, spec: AttentionSpec, batch: Batch) -> TorchPlan:
        return TorchPlan(self.layout, spec, batch, self.angles[spec.rope])


@dataclass(slots=True)
class Extend:
    """Some new tokens of a row, and the tokens they attend to."""

    queries: slice  # of the step's tokens
    prefix: Tensor  # slots of the row's tokens before this step
    new: slice  # the row's tokens in the step, up to the last query
    mask: Tensor | None  # [1, 1, queries, prefix and new]; None: causal


class TorchPlan:
    """What all layers of a step share; slots are int64."""

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
        self._decode_slots, self._decode_mask = self._decode_rows(batch, longest)
        self._extends: list[Extend] = []
        token = decode
        for row in range(decode, len(host.lanes)):
            slots = batch.table[host.lanes[row]]
            self._extends += self._pieces(slots, token, host.starts[row], host.counts[row])
            token += host.counts[row]

    def _decode_rows(self, batch: Batch, longest: int) -> tuple[Tensor, Tensor | None]:
        """Slots [num_decode * width] for rows of one token, and the mask of visible ones
        [num_decode, 1, 1, width]; None: all."""
        width, lens = min(longest, self._spec.window or longest), batch.decode_lens[:, None]
        position = (lens - width).clamp_min(0) + torch.arange(width)
        slots = batch.table[batch.decode_lanes.long()].gather(1, position.long()).long()
        if self._num_decode == 1:
            return slots.flatten(), None
        seen = position < lens  # other table entries may hold anything
        return slots.masked_fill_(~seen, 0).flatten(), seen[:, None, None]

    def _pieces(self, slots: Tensor, token: int, start: int, count: int) -> Iterator[Extend]:
        """Splits a row of ``count`` tokens from ``token`` on, the first at position ``start`` of
        ``slots``, so that the tokens of a piece see mostly the same tokens and the scores of a
        piece are bounded."""
        spec, size = self._spec, count
        if spec.window is not None:
            size = min(size, max(spec.window, WINDOW_QUERIES))
        if spec.softcap is not None:
            size = min(size, max(1, SCORES // (spec.num_q_heads * (start + count))))
        for begin in range(0, count, size):
            stop = min(begin + size, count)
            query = torch.arange(start + begin, start + stop)[:, None]
            first = max(0, start + begin + 1 - (spec.window or start + begin + 1))
            key, mask = torch.arange(first, start + stop), None
            if start + begin or first or spec.window or spec.softcap:
                mask = key <= query
                if spec.window is not None:
                    mask &= key > query - spec.window
                mask = mask[None, None]
            new = slice(token + max(0, first - start), token + stop)
            prefix = slots[min(first, start) : start].long()
            yield Extend(slice(token + begin, token + stop), prefix, new, mask)

    def run(self, qkv: Tensor, kv: LayerKv, latent: Latent | None = None) -> Tensor:
        assert latent is None
        q, k, v = self._turn(qkv)
        self._layout.write(kv, self._slots, k, v)
        out = torch.empty_like(q)
        if self._num_decode:
            self._decode(q[: self._num_decode], out[: self._num_decode], kv)
        for part in self._extends:
            keys, values = k[part.new], v[part.new]
            if part.prefix.shape[0]:
                old_keys, old_values = self._layout.read(kv, part.prefix)
                keys, values = torch.cat([old_keys, keys]), torch.cat([old_values, values])
            queries, keys, values = (
                x.transpose(0, 1)[None] for x in (q[part.queries], keys, values)
            )
            attended = self._attend(queries, keys, values, part.mask, causal=part.mask is None)
            out[part.queries] = attended[0].transpose(0, 1)
        return out.flatten(1)

    def _turn(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [T, Hq, D] and k [T, Hk, D], and v."""
        num_q, dim = self._spec.num_q_heads, self._spec.head_dim
        heads = qkv.view(qkv.shape[0], -1, dim)
        turned = num_q + self._spec.num_kv_heads
        moved = self._cos.shape[-1]
        plain = heads[:, :turned, :moved].float()
        rotated = (plain * self._cos).add_(plain.roll(moved // 2, -1).mul_(self._sin)).to(qkv.dtype)
        if moved < dim:
            rotated = torch.cat([rotated, heads[:, :turned, moved:]], dim=-1)
        return rotated[:, :num_q], rotated[:, num_q:], heads[:, turned:]

    def _decode(self, q: Tensor, out: Tensor, kv: LayerKv) -> None:
        """One-token rows together: the query heads of a KV head act as its queries."""
        rows, (kv_heads, dim) = q.shape[0], kv[0].shape[1:]
        k, v = (
            x.view(rows, -1, kv_heads, dim).transpose(1, 2)
            for x in self._layout.read(kv, self._decode_slots)
        )
        q = q.view(rows, kv_heads, -1, dim)
        attended = self._attend(q, k, v, self._decode_mask, causal=False)
        out.copy_(attended.reshape(rows, -1, dim))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        """Attention [B, Hq, T, D] of q over k, v [B, Hk, n, D] under a mask [B or 1, 1, T or 1,
        n]."""
        scale, cap = self._spec.scale, self._spec.softcap
        if cap is None:
            gqa = q.shape[1] != k.shape[1]
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
            )
        grouped = q.unflatten(1, (k.shape[1], -1)).float()  # [B, Hk, G, T, D]
        scores: Tensor = grouped @ k.float().unsqueeze(2).transpose(3, 4)
        scores = scores.mul_(scale / cap).tanh_().mul_(cap)
        if mask is not None:
            scores.masked_fill_(~mask.unsqueeze(1), float("-inf"))
        return (scores.softmax(-1) @ v.float().unsqueeze(2)).flatten(1, 2).to(q.dtype)
