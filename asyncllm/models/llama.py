"""Llama 1 to 3.x: the decoder, its parameters on one tensor-parallel rank, and where they come from.

Knows the block structure and the checkpoint's names; knows neither files nor how attention is done.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from asyncllm.models.layers import Batch, Comm, Ops, rope_table
from asyncllm.models.spec import ModelSpec, shard_heads
from asyncllm.models.weights import Target, whole


class Layer:
    """Parameters of one block on this rank; [out, in] as in torch."""

    def __init__(self, decoder: Decoder) -> None:
        spec, empty = decoder.spec, decoder.empty
        q_dim, kv_dim = decoder.num_q_heads * spec.head_dim, decoder.num_kv_heads * spec.head_dim
        inner, hidden = decoder.local_inner, spec.hidden_size
        self.qkv = empty(q_dim + 2 * kv_dim, hidden)
        self.qkv_bias = empty(q_dim + 2 * kv_dim) if spec.qkv_bias else None
        self.out = empty(hidden, q_dim)
        self.out_bias = empty(hidden) if spec.out_bias else None
        self.gate_up = empty(2 * inner, hidden)
        self.gate_up_bias = empty(2 * inner) if spec.mlp_bias else None
        self.down = empty(hidden, inner)
        self.down_bias = empty(hidden) if spec.mlp_bias else None
        self.attn_norm = empty(hidden)
        self.mlp_norm = empty(hidden)


class Decoder:
    """A Llama decoder, or one tensor-parallel share of it.

    Attention heads go to ranks in whole GQA groups and the MLP in equal slices, both padded with
    zeros where they do not divide: a zero group has zero query, key, value and output weights, so
    it adds exactly nothing. The embedding is held whole; the output matrix is split by vocabulary
    (a view of the embedding where the two are tied).

    Args:
        spec: shape of the whole model.
        comm: tensor-parallel group; adds up partial sums after attention and MLP.
        ops: operators of the device.
        max_len: positions for which rotary angles are precomputed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        comm: Comm,
        ops: Ops,
        *,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spec, self.comm, self.ops = spec, comm, ops
        self.dtype, self.device = dtype, device
        self.heads = shard_heads(spec.num_q_heads, spec.num_kv_heads, comm.size, comm.rank)
        self.num_q_heads, self.num_kv_heads = len(self.heads.q_heads), len(self.heads.kv_heads)
        self.local_inner = -(-spec.intermediate_size // comm.size)
        self.local_vocab = -(-spec.vocab_size // comm.size)
        self.embed = self.empty(self.local_vocab * comm.size, spec.hidden_size)
        self.layers = [Layer(self) for _ in range(spec.num_layers)]
        self.norm = self.empty(spec.hidden_size)
        first = comm.rank * self.local_vocab
        tied = self.embed[first : first + self.local_vocab]
        self.lm_head = (
            tied if spec.tie_embeddings else self.empty(self.local_vocab, spec.hidden_size)
        )
        self.cos_sin = rope_table(spec.rope, spec.head_dim, max_len).to(device)
        self.scale = spec.head_dim**-0.5

    def empty(self, *shape: int) -> Tensor:
        """A parameter; zero where heads or slices may be padding (filled only in part)."""
        make = torch.zeros if self.comm.size > 1 else torch.empty
        return make(*shape, dtype=self.dtype, device=self.device)

    def pack(self) -> None:
        """Let the operators lay out the loaded weights as they like them best."""
        for layer in self.layers:
            layer.qkv, layer.out = self.ops.pack(layer.qkv), self.ops.pack(layer.out)
            layer.gate_up, layer.down = self.ops.pack(layer.gate_up), self.ops.pack(layer.down)
        self.lm_head = self.ops.pack(self.lm_head)

    def forward(self, batch: Batch, kv: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Hidden states [num_tokens, hidden] after the last norm; K and V are written to ``kv``."""
        ops, eps, comm = self.ops, self.spec.rms_eps, self.comm
        first = self.layers[0].attn_norm
        x, residual = ops.embed_rmsnorm(batch.tokens, self.embed, first, eps)
        for i, layer in enumerate(self.layers):
            k_cache, v_cache = kv[i]
            qkv = ops.linear(x, layer.qkv, layer.qkv_bias)
            attended = ops.attend(qkv, self.cos_sin, k_cache, v_cache, batch, self.scale)
            x = comm.linear_reduce(ops, attended, layer.out, layer.out_bias)
            x, residual = ops.add_rmsnorm(x, residual, layer.mlp_norm, eps)
            inner = ops.silu_mul(ops.linear(x, layer.gate_up, layer.gate_up_bias))
            x = comm.linear_reduce(ops, inner, layer.down, layer.down_bias)
            last = i + 1 == len(self.layers)
            weight = self.norm if last else self.layers[i + 1].attn_norm
            x, residual = ops.add_rmsnorm(x, residual, weight, eps)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab_size] float32, gathered over the ranks."""
        gathered = self.comm.gather_last(self.ops.logits(hidden, self.lm_head))
        return gathered[:, : self.spec.vocab_size]

    def targets(self) -> Iterator[tuple[str, Target]]:
        """Checkpoint name -> where its values go on this rank."""
        vocab = self.spec.vocab_size
        yield "model.embed_tokens.weight", Target(self.embed, 0, vocab, ((0, 0, vocab),))
        yield "model.norm.weight", whole(self.norm)
        if not self.spec.tie_embeddings:
            first = self.comm.rank * self.local_vocab
            size = max(0, min(self.local_vocab, vocab - first))
            yield "lm_head.weight", Target(self.lm_head, 0, vocab, ((first, 0, size),))
        for i, layer in enumerate(self.layers):
            for name, target in self._layer_targets(layer):
                yield f"model.layers.{i}.{name}", target

    def ignores(self, name: str) -> bool:
        """True for checkpoint tensors that are not parameters here."""
        tied = self.spec.tie_embeddings and name == "lm_head.weight"
        return tied or name.endswith("rotary_emb.inv_freq")

    def _layer_targets(self, layer: Layer) -> Iterator[tuple[str, Target]]:
        dim, inner = self.spec.head_dim, self.spec.intermediate_size
        q_size, kv_size = self.spec.num_q_heads * dim, self.spec.num_kv_heads * dim
        q_dim = self.num_q_heads * dim
        kv_dim = self.num_kv_heads * dim
        q = _head_spans(self.heads.q_heads, dim, 0)
        k = _head_spans(self.heads.kv_heads, dim, q_dim)
        v = _head_spans(self.heads.kv_heads, dim, q_dim + kv_dim)
        for name, length, spans in (("q", q_size, q), ("k", kv_size, k), ("v", kv_size, v)):
            yield f"self_attn.{name}_proj.weight", Target(layer.qkv, 0, length, spans)
            if layer.qkv_bias is not None:
                yield f"self_attn.{name}_proj.bias", Target(layer.qkv_bias, 0, length, spans)
        yield "self_attn.o_proj.weight", Target(layer.out, 1, q_size, q)
        first = self.comm.rank * self.local_inner
        size = max(0, min(self.local_inner, inner - first))
        gate, up = ((first, 0, size),), ((first, self.local_inner, size),)
        for name, spans in (("gate", gate), ("up", up)):
            yield f"mlp.{name}_proj.weight", Target(layer.gate_up, 0, inner, spans)
            if layer.gate_up_bias is not None:
                yield f"mlp.{name}_proj.bias", Target(layer.gate_up_bias, 0, inner, spans)
        yield "mlp.down_proj.weight", Target(layer.down, 1, inner, gate)
        for name, bias in (
            ("self_attn.o_proj.bias", layer.out_bias),
            ("mlp.down_proj.bias", layer.down_bias),
        ):
            if bias is not None:  # added once, not once per rank
                spans = whole(bias).spans if self.comm.rank == 0 else ()
                yield name, Target(bias, 0, len(bias), spans)
        yield "input_layernorm.weight", whole(layer.attn_norm)
        yield "post_attention_layernorm.weight", whole(layer.mlp_norm)


def _head_spans(heads: tuple[int, ...], dim: int, offset: int) -> tuple[tuple[int, int, int], ...]:
    """(source, destination, length) of each run of neighbouring heads; padding heads have none."""
    spans: list[tuple[int, int, int]] = []
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
