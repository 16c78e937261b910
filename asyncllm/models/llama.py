"""The decoder of one tensor-parallel rank: Llama 1 to 3.x, and models that differ only by their
spec.

Knows the block structure and the checkpoint's names; knows neither files nor how attention is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncllm.models.attention import AttentionPlan, Batch, LayerKv, ScaledQueries
from asyncllm.models.embedding import Embedding
from asyncllm.models.experts import Experts
from asyncllm.models.layers import Attention, AttentionPart, GatedMLP, MlpPart, Norm, add_normed
from asyncllm.models.linear import plain
from asyncllm.models.mla import LatentAttention
from asyncllm.models.model import ModelContext
from asyncllm.models.ops import Activations
from asyncllm.models.quantization import RowForm
from asyncllm.models.spec import AttentionSpec, ExpertsSpec, ModelSpec
from asyncllm.models.weights import AnyTarget

KV_SCALES = (".k_scale", ".v_scale", ".kv_scale")  # suffixes of calibrated K/V scales


def attention_part(site: ModelContext, spec: ModelSpec, layer: int) -> AttentionPart:
    """Create the attention for ``spec.layers[layer]``."""
    if spec.layers[layer].kind == "mla":
        return LatentAttention(site, spec, spec.layers[layer])
    return Attention(site, spec, spec.layers[layer])


def mlp_part(site: ModelContext, spec: ModelSpec, layer: int) -> MlpPart:
    """Create the MLP for ``spec.mlps[layer]``."""
    mlp = spec.mlps[layer]
    if isinstance(mlp, ExpertsSpec):
        return Experts(site, spec.hidden_size, mlp)
    return GatedMLP(site, spec, mlp)


@dataclass(frozen=True, slots=True)
class NextNorm:
    """What reads a block's result: a norm, and behind it something that wants it in ``form``."""

    norm: Norm
    form: RowForm | None


class Block:
    """Attention, then MLP, each preceded by a norm and added to the residual stream.

    The norm after the MLP belongs to the next block: one kernel adds and normalises. With
    ``spec.sandwich_norms`` the outputs of attention and MLP are normed before they are added.
    """

    def __init__(self, site: ModelContext, spec: ModelSpec, layer: int) -> None:
        self._ops, self._eps, self._mlp_name = site.ops, spec.rms_eps, spec.mlp_name
        self.attention = attention_part(site.below("self_attn."), spec, layer)
        self.mlp = mlp_part(site.below(f"{spec.mlp_name}."), spec, layer)
        before_mlp, sandwich = "post_attention_layernorm", []
        if spec.sandwich_norms:
            before_mlp = "pre_feedforward_layernorm"
            sandwich = ["post_attention_layernorm", "post_feedforward_layernorm"]
        names = ["input_layernorm", before_mlp, *sandwich]
        self._norms = {name: Norm(site, spec, spec.hidden_size) for name in names}
        self.attn_norm, self.mlp_norm, *self._sandwich = self._norms.values()

    def __call__(
        self,
        x: Activations,
        residual: Tensor,
        plan: AttentionPlan,
        kv: LayerKv,
        behind: NextNorm,
        live: Tensor | None,
    ) -> tuple[Activations, Tensor]:
        """(normed input of the next block, residual stream); ``live``: as for ``MlpPart``."""
        before_mlp = NextNorm(self.mlp_norm, self.mlp.row_form(len(x)))
        x, residual = self._added(self.attention(x, plan, kv), residual, 0, before_mlp)
        return self._added(self.mlp(x, live), residual, 1, behind)

    def _added(
        self, x: Tensor, residual: Tensor, part: int, behind: NextNorm
    ) -> tuple[Activations, Tensor]:
        """What ``part`` has made, added and normed for what is ``behind``."""
        if self._sandwich:
            x = self._ops.rmsnorm(x, self._sandwich[part].weight, self._eps)
        return add_normed(self._ops, x, residual, behind.norm.weight, self._eps, behind.form)

    @property
    def nbytes(self) -> int:
        norms = sum(norm.nbytes for norm in self._norms.values())
        return self.attention.nbytes + self.mlp.nbytes + norms

    def targets(self, prefix: str) -> Iterator[tuple[str, AnyTarget]]:
        yield from self.attention.targets(f"{prefix}self_attn.")
        yield from self.mlp.targets(f"{prefix}{self._mlp_name}.")
        for name, norm in self._norms.items():
            yield from norm.targets(f"{prefix}{name}")

    def pack(self) -> None:
        self.attention.pack()
        self.mlp.pack()
        for norm in self._norms.values():
            norm.pack()


class Decoder:
    """Implements :class:`asyncllm.models.model.Model`."""

    def __init__(self, spec: ModelSpec, site: ModelContext) -> None:
        self.spec, self.site = spec, site
        self.vocab_size, self.hidden_size = spec.vocab_size, spec.hidden_size
        self.embedding = Embedding(site, spec)
        self.blocks = [
            Block(site.below(f"{spec.prefix}layers.{layer}."), spec, layer)
            for layer in range(len(spec.layers))
        ]
        self.norm = Norm(site, spec, spec.hidden_size)
        # layers with equal attention share a plan
        self._kinds = list(dict.fromkeys(block.attention.spec for block in self.blocks))
        self._kind_of = [self._kinds.index(block.attention.spec) for block in self.blocks]

    @property
    def nbytes(self) -> int:
        blocks = sum(block.nbytes for block in self.blocks)
        return self.embedding.nbytes + blocks + self.norm.nbytes

    def work_bytes(self, num_tokens: int) -> int:
        dtype, attention = self.site.dtype, self.site.attention
        inside = [dtype.itemsize * block.mlp.width for block in self.blocks]
        parts = {block.attention.spec: block.attention for block in self.blocks}
        inside += [
            attention.token_bytes(spec, dtype) + dtype.itemsize * part.width
            for spec, part in parts.items()
        ]
        angles = 8 * max(spec.head_dim for spec in self._kinds)
        # residual stream and normed, before and after a block
        stream = 4 * dtype.itemsize * self.hidden_size
        products = [
            part.product_bytes(num_tokens)
            for block in self.blocks
            for part in (block.attention, block.mlp)
        ]
        return num_tokens * (stream + max(inside) + angles + 64) + max(products)

    def pack(self) -> None:
        for block in self.blocks:
            block.pack()
        self.norm.pack()
        self.embedding.pack()

    def forward(self, batch: Batch, kv: Sequence[LayerKv]) -> Tensor:
        num_tokens = len(batch.tokens)
        behind = [
            *(NextNorm(b.attn_norm, b.attention.row_form(num_tokens)) for b in self.blocks[1:]),
            NextNorm(self.norm, None),
        ]
        live = batch.live() if self.spec.has_experts else None
        if live is not None:
            live = self.site.world.gather_flags(live)
        plans = [self._plan(spec, batch) for spec in self._kinds]
        x: Activations
        x, residual = self.embedding.embed(batch.tokens, self.blocks[0].attn_norm.weight)
        for i, block in enumerate(self.blocks):
            x, residual = block(x, residual, plans[self._kind_of[i]], kv[i], behind[i], live)
        return plain(x)

    def _plan(self, spec: AttentionSpec, batch: Batch) -> AttentionPlan:
        plan = self.site.attention.plan(spec, batch.of(spec))
        if (growth := spec.query_growth) is None:
            return plan
        spans = batch.positions.div(growth.trained, rounding_mode="floor")
        factors = 1 + growth.beta * torch.log1p(spans)
        width = spec.num_q_heads * spec.head_dim
        return ScaledQueries(plan, factors[:, None].to(self.site.dtype), width)

    def logits(self, hidden: Tensor) -> Tensor:
        gathered = self.site.comm.gather_last(self.embedding.logits(hidden))
        if (cap := self.spec.logit_softcap) is not None:
            gathered.div_(cap).tanh_().mul_(cap)
        return gathered[:, : self.vocab_size]

    def targets(self) -> Iterator[tuple[str, AnyTarget]]:
        prefix = self.spec.prefix
        yield from self.embedding.targets()
        yield from self.norm.targets(f"{prefix}norm")
        for i, block in enumerate(self.blocks):
            yield from block.targets(f"{prefix}layers.{i}.")

    def ignores(self, name: str) -> bool:
        tied = self.spec.tie_embeddings and name == f"{self.spec.head}.weight"
        scales = KV_SCALES if self.spec.kv_format else ()
        return (
            tied
            or name.endswith(("rotary_emb.inv_freq", *scales))
            or name.startswith(self.spec.ignored)
        )
