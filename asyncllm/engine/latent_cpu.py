"""Multi-head latent attention (MLA) on the CPU, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from asyncllm.kernels.attention.quantize import dequantize_ref, quantize_ref
from asyncllm.models.attention import (
    Batch,
    KvLatents,
    KvLayout,
    Latent,
    LayerKv,
    decompressed_from,
    refuse_beyond_latent,
)
from asyncllm.models.rope_tables import rope_tables
from asyncllm.models.spec import AttentionSpec

SCORES = 1 << 22  # maximum scores in memory, or those of one token


class TorchLatents(KvLatents):
    """Latents written and read by torch."""

    def write(self, kv: LayerKv, slots: Tensor, rows: Tensor) -> None:
        """Write rows [T, width] to ``slots`` [T] int64."""
        if self.format is None:
            kv[0].index_copy_(0, slots, rows)
            return
        eights, scales = quantize_ref(rows, self.element, None)
        kv[0].view(torch.uint8).index_copy_(0, slots, eights.view(torch.uint8))
        kv[1].index_copy_(0, slots, scales[:, 0].float())

    def read(self, kv: LayerKv, slots: Tensor) -> Tensor:
        """Read [T, width] from ``slots`` [T] int64, in the model's compute dtype."""
        if self.format is None:
            return kv[0].index_select(0, slots)
        # torch does not index 8-bit floats
        rows = kv[0].view(torch.uint8).index_select(0, slots).view(self.element)
        return dequantize_ref(rows, kv[1].index_select(0, slots)[:, None], self.dtype)


class TorchLatentAttention:
    """Implements :class:`asyncllm.models.attention.AttentionBackend`.

    Args:
        least: overrides ``decompressed_from``.
    """

    def __init__(
        self,
        layers: Sequence[AttentionSpec],
        layout: TorchLatents,
        max_len: int,
        where: torch.device,
        *,
        least: int | None = None,
    ) -> None:
        self.layout, self.angles = layout, rope_tables(layers, max_len, where)
        self._least = least
        tables = sum(table.nbytes for table in self.angles.values())
        # the latents of a sequence and their decompressed keys and values, in float32 at worst
        heads = max(spec.num_q_heads * (spec.head_dim + spec.v_dim) for spec in layers)
        self.nbytes = tables + 4 * max_len * (2 * heads + max(spec.kv_rank for spec in layers))

    @staticmethod
    def refuse(spec: AttentionSpec, layout: KvLayout, device: torch.device) -> str | None:
        if device.type != "cpu" or not isinstance(layout, TorchLatents):
            return f"has its K/V in {type(layout).__name__} on {device.type}"
        return layout.refuse(spec) or refuse_beyond_latent(spec)

    def token_bytes(self, spec: AttentionSpec, dtype: torch.dtype) -> int:
        heads, q = spec.num_q_heads, spec.num_q_heads * (spec.head_dim + spec.v_dim)
        absorbed = 3 * heads * (spec.kv_rank + spec.head_dim)
        widened = 12 * heads * spec.head_dim  # float32: rotated, its product, the other summand
        return dtype.itemsize * (2 * q + absorbed) + widened

    def sharing(self) -> None:
        """None: each row reads all of its K/V by itself."""

    def plan(self, spec: AttentionSpec, batch: Batch) -> TorchLatentPlan:
        least = decompressed_from(spec) if self._least is None else self._least
        assert spec.rope is not None
        return TorchLatentPlan(self.layout, spec, batch, self.angles[spec.rope], least)


class TorchLatentPlan:
    """What all layers of a step share; slots are int64."""

    def __init__(
        self,
        layout: TorchLatents,
        spec: AttentionSpec,
        batch: Batch,
        cos_sin: Tensor,
        least: int,
    ) -> None:
        host, decode = batch.host, batch.decode_lanes.shape[0]
        assert host is not None
        assert spec.rope is not None
        self._layout, self._spec, self._num_decode, self._least = layout, spec, decode, least
        self._turned, self._interleaved = spec.rope.dim, spec.rope.interleaved
        cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, dim=-1)
        # [T, 1, rope.dim] float32: equal for both elements of a pair; the first's sine negated
        if spec.rope.interleaved:
            self._cos = cos.repeat_interleave(2, dim=-1)
            self._sin = torch.stack([-sin, sin], dim=-1).flatten(-2)
        else:
            self._cos, self._sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        self._slots = batch.slots.long()
        longest = max(host.starts[:decode], default=-1) + 1
        slots = batch.table[batch.decode_lanes.long(), :longest].long()
        seen = torch.arange(longest) < batch.decode_lens[:, None]
        # unseen entries of the table may hold anything
        self._decode_slots = slots.masked_fill_(~seen, 0)
        self._decode_mask = None if decode == 1 else seen[:, None, None]
        # (first new token, its position, number of new tokens, slots of all tokens)
        self._chunks: list[tuple[int, int, int, Tensor]] = []
        token = decode
        for row in range(decode, len(host.lanes)):
            start, count = host.starts[row], host.counts[row]
            slots = batch.table[host.lanes[row], : start + count].long()
            self._chunks.append((token, start, count, slots))
            token += count

    def run(self, qkv: Tensor, kv: LayerKv, latent: Latent | None = None) -> Tensor:
        assert latent is not None
        spec, num_decode = self._spec, self._num_decode
        rank, plain = spec.kv_rank, spec.head_dim - self._turned
        heads = qkv.unflatten(1, (-1, spec.head_dim))
        q = torch.cat([heads[..., :plain], self._turn(heads[..., plain:])], dim=-1)
        normed = rms_norm(latent.raw[:, :rank].float(), (rank,), eps=latent.eps).to(qkv.dtype)
        key = self._turn(latent.raw[:, None, rank:])[:, 0]
        self._layout.write(kv, self._slots, torch.cat([normed * latent.norm, key], dim=1))
        out = q.new_zeros(len(q), spec.num_q_heads, spec.v_dim)  # some tokens may belong to no row
        if num_decode:
            rows = self._layout.read(kv, self._decode_slots.flatten())
            rows = rows.view(num_decode, 1, -1, rank + self._turned)
            queries = self._absorb(q[:num_decode], latent.up)[:, None]  # heads as its tokens
            summed = self._attend(queries, rows, rows[..., :rank], self._decode_mask)
            out[:num_decode] = self._values(summed[:, 0], latent.up)
        for token, start, count, slots in self._chunks:
            rows, mine = self._layout.read(kv, slots), slice(token, token + count)
            cheaper = count**2 > 2 * start * (self._least - count)
            make = self._decompressed if cheaper else self._absorbed
            out[mine] = make(q[mine], rows, start, latent.up)
        return out.flatten(1)

    def _turn(self, x: Tensor) -> Tensor:
        """x [T, heads, rope.dim], rotated in float32."""
        wide = x.float()
        if self._interleaved:
            other = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            other = wide.roll(self._turned // 2, -1)
        return (wide * self._cos).add_(other.mul_(self._sin)).to(x.dtype)

    def _absorb(self, q: Tensor, up: Tensor) -> Tensor:
        """Transform q [T, H, D] to queries for latents, [T, H, rank + rope.dim]."""
        plain = q.shape[2] - self._turned
        wide = torch.einsum("thd,hdr->thr", q[..., :plain], up[:, :plain])
        return torch.cat([wide, q[..., plain:]], dim=-1)

    def _values(self, summed: Tensor, up: Tensor) -> Tensor:
        """Values [T, H, Dv] from weighted sums of latents [T, H, rank]."""
        plain = self._spec.head_dim - self._turned
        return torch.einsum("thr,hdr->thd", summed, up[:, plain:])

    def _absorbed(self, q: Tensor, rows: Tensor, start: int, up: Tensor) -> Tensor:
        keys, values = rows[None], rows[None, :, : self._spec.kv_rank]
        summed = self._causal(self._absorb(q, up).transpose(0, 1), keys, values, start)
        return self._values(summed.transpose(0, 1), up)

    def _decompressed(self, q: Tensor, rows: Tensor, start: int, up: Tensor) -> Tensor:
        rank, plain = self._spec.kv_rank, q.shape[2] - self._turned
        made = torch.einsum("nr,hdr->hnd", rows[:, :rank], up)
        turned = rows[None, :, rank:].expand(len(made), -1, -1)
        keys = torch.cat([made[..., :plain], turned], dim=-1)
        return self._causal(q.transpose(0, 1), keys, made[..., plain:], start).transpose(0, 1)

    def _causal(self, q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """Attend causally: q [H, T, D] from position ``start`` to [H or 1, n, ..], in pieces."""
        (heads, num, _), (own, total, _) = q.shape, keys.shape
        size = max(1, SCORES // (heads * total))
        found = []
        for begin in range(0, num, size):
            stop = min(begin + size, num)
            mask = torch.arange(total) <= torch.arange(start + begin, start + stop)[:, None]
            # heads that share keys are treated as more queries of one head
            some = q[:, begin:stop].reshape(1, own, -1, q.shape[2])
            mask = mask.repeat(heads // own, 1)
            attended = self._attend(some, keys[None], values[None], mask)
            found.append(attended.view(heads, stop - begin, -1))
        return torch.cat(found, dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self._spec.scale)
