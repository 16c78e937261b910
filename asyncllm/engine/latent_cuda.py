"""Multi-head latent attention (MLA) on a CUDA device, by Triton kernels.

Decode rows attend to the latents directly (absorbed). For other rows the device decides in each
step which ones have their keys and values decompressed first: those where that is cheaper
(``decompressed_from``), while the buffer has room. Heads are processed in groups, so that the
buffer fits all keys of a long row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncllm.kernels.attention.shared_rows import SharingCosts
from asyncllm.kernels.autotune import tuned, without_fp8
from asyncllm.kernels.latent.attend import attend
from asyncllm.kernels.latent.expand import expand
from asyncllm.kernels.latent.heads import heads
from asyncllm.kernels.latent.plan import AttendPlan, ChunkPlan, plan_attend, plan_chunks
from asyncllm.kernels.latent.prefill import prefill
from asyncllm.kernels.latent.shared import piece_numbers, shared_blocks
from asyncllm.kernels.latent.write import write
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

MAX_RANK, MAX_PART = 512, 256  # of a latent; of a head's rotary part, non-rotary part and values
SPACE = 1 << 30  # maximum bytes of decompressed keys and values
LEAST_TOKENS = 8192  # tokens they should cover, if a group of heads can be small enough
GROUP = 32  # maximum heads per group
LEAST_PIECES = 384  # partial results of shared prefixes that the same space should hold


class TritonLatents(KvLatents):
    """Latents written by our kernels."""


@dataclass(frozen=True, slots=True)
class DecompressBuffer:
    """Buffer for the decompressed keys and values of a group of heads, and before these in each
    layer for the partial results of what decode rows share; all layers share it."""

    group: int  # heads
    made: Tensor  # [tokens, group, head_dim - rope.dim + v_dim]
    keys: Tensor  # [tokens, rope.dim]
    pieces: Tensor  # float32, at the place of ``made`` and as large or larger

    @property
    def nbytes(self) -> int:
        return self.pieces.nbytes + self.keys.nbytes


class TritonLatentAttention:
    """Implements :class:`asyncllm.models.attention.AttentionBackend`.

    Args:
        least: overrides ``decompressed_from``.
    """

    def __init__(
        self,
        layers: Sequence[AttentionSpec],
        layout: TritonLatents,
        max_len: int,
        where: torch.device,
        *,
        least: int | None = None,
    ) -> None:
        self.layout, self.angles = layout, rope_tables(layers, max_len, where)
        self._least = least
        self._spaces = {spec: _space(spec, max_len, layout.dtype, where) for spec in set(layers)}
        self.nbytes = sum(table.nbytes for table in self.angles.values())
        self.nbytes += sum(space.nbytes for space in self._spaces.values())

    @staticmethod
    def refuse(spec: AttentionSpec, layout: KvLayout, device: torch.device) -> str | None:
        if device.type != "cuda" or not isinstance(layout, TritonLatents):
            return f"has its K/V in {type(layout).__name__} on {device.type}"
        if (reason := layout.refuse(spec) or refuse_beyond_latent(spec)) is not None:
            return reason
        if layout.element == torch.float8_e4m3fn and (name := without_fp8(device)) is not None:
            return f"has its latents in 8-bit floats on {name}"
        if spec.kv_rank > MAX_RANK:
            return f"has latents of {spec.kv_rank}, more than {MAX_RANK}"
        turned = spec.rope.dim if spec.rope else 0
        if (part := max(spec.head_dim - turned, turned, spec.v_dim)) > MAX_PART:
            return f"has heads with parts of {part}, more than {MAX_PART}"
        return None

    def token_bytes(self, spec: AttentionSpec, dtype: torch.dtype) -> int:
        num = spec.num_q_heads
        return dtype.itemsize * num * (spec.head_dim + spec.v_dim + 2 * spec.kv_rank)

    def sharing(self) -> SharingCosts | None:
        spec, element = self.layout.layers[0], self.layout.element
        assert spec.rope is not None
        where = self._spaces[spec].made.device
        if where.type != "cpu" and tuned(where, "latent", "64 shared") is None:
            return None  # not shown to save anything on this kind of GPU
        blocks = min(
            shared_blocks(space.pieces, spec.num_q_heads, spec.kv_rank, element)
            for spec, space in self._spaces.items()
        )
        sizes = spec.num_q_heads, spec.kv_rank, spec.rope.dim, blocks
        return SharingCosts.of_latents(*sizes, eight_bits=element.itemsize == 1)

    def plan(self, spec: AttentionSpec, batch: Batch) -> TritonLatentPlan:
        assert spec.rope is not None
        least = decompressed_from(spec) if self._least is None else self._least
        return TritonLatentPlan(spec, batch, self.angles[spec.rope], self._spaces[spec], least)


@dataclass(slots=True)
class TritonLatentPlan:
    """What all layers of a step share; the first layer makes the plans."""

    spec: AttentionSpec
    batch: Batch
    cos_sin: Tensor
    space: DecompressBuffer
    least: int
    decode: AttendPlan | None = None
    chunks: ChunkPlan | None = None

    def run(self, qkv: Tensor, kv: LayerKv, latent: Latent | None = None) -> Tensor:
        assert latent is not None
        assert self.spec.rope is not None
        batch, (cache, *scales) = self.batch, kv
        q = qkv.unflatten(1, (-1, self.spec.head_dim))
        plain = self.spec.head_dim - self.spec.rope.dim
        write(
            latent.raw,
            q[..., plain:],
            latent.norm,
            latent.eps,
            self.cos_sin,
            batch.positions,
            batch.slots,
            cache,
            *scales,
            interleaved=self.spec.rope.interleaved,
        )
        out: Tensor = q.new_empty(len(q), q.shape[1], self.spec.v_dim)
        if num := batch.decode_lanes.shape[0]:
            if self.decode is None:
                lanes, lens = batch.decode_lanes, batch.decode_lens
                rank = self.spec.kv_rank
                self.decode = plan_attend(
                    lanes,
                    lens,
                    q.shape[1],
                    cache,
                    rank,
                    shared=batch.shared,
                    space=self.space.pieces,
                )
            self._absorbed(q[:num], kv, latent.up, self.decode, batch.decode_lens, out[:num])
        if batch.prefill_lanes.shape[0]:  # after decode, whose padded rows may overlap these
            for first in range(0, q.shape[1], self.space.group):
                some = slice(first, first + self.space.group)
                self._chunked(q[:, some], kv, latent.up[some], out[:, some])
        elif num < len(q):  # tokens that belong to no row: later operators need finite values
            out[num:].zero_()
        return out.flatten(1)

    def _absorbed(
        self, q: Tensor, kv: LayerKv, up: Tensor, plan: AttendPlan, state: Tensor, out: Tensor
    ) -> None:
        """Attend for tokens whose ``state`` is positive; those with 0 get zeros."""
        plain = q.shape[2] - self.cos_sin.shape[1]
        wide, summed = (q.new_empty(*q.shape[:2], self.spec.kv_rank) for _ in range(2))
        heads(q[..., :plain], up[:, :plain], state, wide)
        (cache, *rest), table, scale = kv, self.batch.table, self.spec.scale
        scales = rest[0] if rest else None
        attend(wide, q[..., plain:], cache, table, scale, plan=plan, out=summed, scales=scales)
        heads(summed, up[:, plain:].transpose(1, 2), state, out)

    def _chunked(self, q: Tensor, kv: LayerKv, up: Tensor, out: Tensor) -> None:
        """Attend for rows of several new tokens, in groups of heads."""
        batch, made, keys = self.batch, self.space.made, self.space.keys
        lanes, starts, cu = batch.prefill_lanes, batch.prefill_starts, batch.prefill_cu
        if self.chunks is None:
            self.chunks = plan_chunks(
                lanes,
                starts,
                cu,
                len(q),
                self.space.group,
                kv[0],
                self.spec.kv_rank,
                capacity=len(made),
                least=self.least,
            )
        chunks, plain = self.chunks, q.shape[2] - self.cos_sin.shape[1]
        self._absorbed(q, kv, up, chunks.attend, chunks.state, out)
        rows = starts, cu, chunks.bases
        cache, *scales = kv
        expand(cache, up, batch.table, lanes, *rows, chunks.tile_ends, made, keys, *scales)
        prefill(q[..., :plain], q[..., plain:], made, keys, *rows, self.spec.scale, out)


def _space(
    spec: AttentionSpec, max_len: int, dtype: torch.dtype, where: torch.device
) -> DecompressBuffer:
    """The buffer: for all keys of the longest sequence, if a group of heads can be small enough."""
    assert spec.rope is not None
    made, num, wanted = spec.head_dim - spec.rope.dim + spec.v_dim, spec.num_q_heads, max_len
    wanted = max(wanted, LEAST_TOKENS)
    most = min(GROUP, num, max(1, SPACE // (dtype.itemsize * made * wanted)))
    group = next(size for size in range(most, 0, -1) if num % size == 0)
    tokens = min(wanted, SPACE // (dtype.itemsize * made * group))
    numbers = LEAST_PIECES * piece_numbers(num, spec.kv_rank)
    size = max(tokens * group * made * dtype.itemsize, 4 * numbers)
    space = torch.empty(-(-size // 4), device=where)
    return DecompressBuffer(
        group,
        space.view(dtype)[: tokens * group * made].view(tokens, group, made),
        torch.empty(tokens, spec.rope.dim, dtype=dtype, device=where),
        space,
    )
