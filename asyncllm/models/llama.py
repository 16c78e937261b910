"""Llama 1 to 3.x and what is built like it: the decoder on one tensor-parallel rank.

Knows the block structure and the checkpoint's names; knows neither files nor how attention is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from asyncllm.models.attention import AttentionPlan, Batch, LayerKv
from asyncllm.models.layers import GatedMLP, Linears, Part, by_inputs, by_outputs, share
from asyncllm.models.model import Site
from asyncllm.models.spec import AttentionSpec, ModelSpec, shard_heads
from asyncllm.models.weights import Span, Target, whole


class Attention(Linears):
    """Heads in whole GQA groups; a group that is padding has zero weights and adds nothing."""

    def __init__(self, site: Site, spec: ModelSpec, layer: AttentionSpec) -> None:
        heads, dim = shard_heads(layer, site.comm.size, site.comm.rank), layer.head_dim
        self.spec = layer.on(heads)
        q_size, kv_size = layer.num_q_heads * dim, layer.num_kv_heads * dim
        q_dim, kv_dim = self.spec.num_q_heads * dim, self.spec.num_kv_heads * dim
        q = head_spans(heads.q_heads, dim, 0)
        k = head_spans(heads.kv_heads, dim, q_dim)
        v = head_spans(heads.kv_heads, dim, q_dim + kv_dim)
        parts = Part("q_proj", q_size, q), Part("k_proj", kv_size, k), Part("v_proj", kv_size, v)
        hidden = spec.hidden_size
        self.qkv = by_outputs(site, (q_dim + 2 * kv_dim, hidden), parts, spec.qkv_bias)
        self.out = by_inputs(site, (hidden, q_dim), Part("o_proj", q_size, q), spec.out_bias)
        super().__init__(self.qkv, self.out)
        self._comm = site.comm

    def __call__(self, x: Tensor, plan: AttentionPlan, kv: LayerKv) -> Tensor:
        return self._comm.linear_reduce(self.out, plan.run(self.qkv(x), kv))


class Block:
    """Attention, then MLP, each behind a norm and added to the residual stream.

    The norm behind the MLP is that of the next block: one pass adds and normalises.
    """

    def __init__(self, site: Site, spec: ModelSpec, layer: AttentionSpec) -> None:
        self._ops, self._eps = site.ops, spec.rms_eps
        self.attention = Attention(site, spec, layer)
        self.mlp = GatedMLP(site, spec.hidden_size, spec.intermediate_size, spec.mlp_bias)
        self.attn_norm, self.mlp_norm = (site.empty(spec.hidden_size) for _ in range(2))

    def __call__(
        self, x: Tensor, residual: Tensor, plan: AttentionPlan, kv: LayerKv, next_norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(normed input of the next block, residual stream)."""
        x = self.attention(x, plan, kv)
        x, residual = self._ops.add_rmsnorm(x, residual, self.mlp_norm, self._eps)
        return self._ops.add_rmsnorm(self.mlp(x), residual, next_norm, self._eps)

    @property
    def nbytes(self) -> int:
        norms = self.attn_norm.nbytes + self.mlp_norm.nbytes
        return self.attention.nbytes + self.mlp.nbytes + norms

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        yield from self.attention.targets(f"{prefix}self_attn.")
        yield from self.mlp.targets(f"{prefix}mlp.")
        yield f"{prefix}input_layernorm.weight", whole(self.attn_norm)
        yield f"{prefix}post_attention_layernorm.weight", whole(self.mlp_norm)

    def pack(self) -> None:
        self.attention.pack()
        self.mlp.pack()


class Decoder:
    """Implements :class:`asyncllm.models.model.Model`.

    The embedding is held whole; the output matrix is split by vocabulary (a view of the embedding
    where the two are tied).
    """

    def __init__(self, spec: ModelSpec, site: Site) -> None:
        self.spec, self.site = spec, site
        self.vocab_size, self.hidden_size = spec.vocab_size, spec.hidden_size
        local = -(-spec.vocab_size // site.comm.size)
        self.embed = site.empty(local * site.comm.size, spec.hidden_size)
        self.blocks = [Block(site, spec, layer) for layer in spec.layers]
        self.norm = site.empty(spec.hidden_size)
        tied = self.embed.narrow(0, site.comm.rank * local, local)
        self.lm_head = tied if spec.tie_embeddings else site.empty(local, spec.hidden_size)
        # layers that attend alike share a plan
        self._kinds = list(dict.fromkeys(block.attention.spec for block in self.blocks))
        self._kind_of = [self._kinds.index(block.attention.spec) for block in self.blocks]

    @property
    def nbytes(self) -> int:
        lm_head = 0 if self.spec.tie_embeddings else self.lm_head.nbytes
        blocks = sum(block.nbytes for block in self.blocks)
        return self.embed.nbytes + blocks + self.norm.nbytes + lm_head

    def work_bytes(self, num_tokens: int) -> int:
        dtype, attention = self.site.dtype, self.site.attention
        inside = [attention.token_bytes(spec, dtype) for spec in self._kinds]
        inside += [dtype.itemsize * block.mlp.width for block in self.blocks]
        angles = 8 * max(spec.head_dim for spec in self._kinds)
        # residual stream and normed, before and behind a block
        stream = 4 * dtype.itemsize * self.hidden_size
        return num_tokens * (stream + max(inside) + angles + 64)

    def pack(self) -> None:
        for block in self.blocks:
            block.pack()
        self.lm_head = self.site.ops.pack(self.lm_head)

    def forward(self, batch: Batch, kv: Sequence[LayerKv]) -> Tensor:
        norms = [*(block.attn_norm for block in self.blocks), self.norm]
        plans = [self.site.attention.plan(spec, batch) for spec in self._kinds]
        x, residual = self.site.ops.embed_rmsnorm(
            batch.tokens, self.embed, norms[0], self.spec.rms_eps
        )
        for i, block in enumerate(self.blocks):
            x, residual = block(x, residual, plans[self._kind_of[i]], kv[i], norms[i + 1])
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        gathered = self.site.comm.gather_last(self.site.ops.logits(hidden, self.lm_head))
        return gathered[:, : self.vocab_size]

    def targets(self) -> Iterator[tuple[str, Target]]:
        vocab = self.vocab_size
        yield "model.embed_tokens.weight", Target(self.embed, 0, vocab, ((0, 0, vocab),))
        yield "model.norm.weight", whole(self.norm)
        if not self.spec.tie_embeddings:
            kept = share(vocab, self.site)
            yield "lm_head.weight", Target(self.lm_head, 0, vocab, (kept,))
        for i, block in enumerate(self.blocks):
            yield from block.targets(f"model.layers.{i}.")

    def ignores(self, name: str) -> bool:
        tied = self.spec.tie_embeddings and name == "lm_head.weight"
        return tied or name.endswith("rotary_emb.inv_freq")


def head_spans(heads: tuple[int, ...], dim: int, offset: int) -> tuple[Span, ...]:
    """(source, destination, length) of each run of neighbouring heads; padding heads have none."""
    spans: list[Span] = []
    for local, head in enumerate(heads):
        if head < 0:
            continue
        source, destination = head * dim, offset + local * dim
        if spans and spans[-1][0] + spans[-1][2] == source:
            source, destination, length = spans.pop()
            spans.append((source, destination, length + dim))
        else:
            spans.append((source, destination, dim))
    return tuple(spans)
