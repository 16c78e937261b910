"""Multi-head latent attention: keys and values of all heads are projected from one latent per
token.

DeepSeek-V2 (2024), §2.1. Knows the projections and their names; the backend chooses whether to
decompress keys or to absorb the projection into queries.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from asyncllm.errors import StartupError
from asyncllm.models.attention import AttentionPlan, Latent, LayerKv
from asyncllm.models.layers import LinearGroup, Norm, head_spans, normed
from asyncllm.models.linear import LinearPart, by_inputs, by_outputs, common_form
from asyncllm.models.model import ModelContext
from asyncllm.models.ops import Activations, Linear
from asyncllm.models.quantization import RowForm
from asyncllm.models.spec import AttentionSpec, ModelSpec, shard_heads
from asyncllm.models.weights import AnyTarget, Target

EPS = 1e-6  # of the latents' norms, whatever the epsilon of other norms


class LatentAttention(LinearGroup):
    """Heads are split over the ranks; each computes all latents. Padding heads have zero
    weights and adds nothing.

    Attributes:
        width: workspace per token, in elements, besides the backend's.
    """

    def __init__(self, site: ModelContext, spec: ModelSpec, layer: AttentionSpec) -> None:
        if layer.rope is None or spec.qk_norm or spec.fused_projections:
            raise StartupError(f"latents in {spec.architecture}, of another kind: not available")
        shard = shard_heads(layer, site.comm.size, site.comm.rank)
        self.spec, heads = layer.on(shard), shard.q_heads
        self._raw, hidden = layer.kv_rank + layer.rope.dim, spec.hidden_size
        num, total, q_rank = len(heads), layer.num_q_heads, layer.q_rank
        q_dim, made = num * layer.head_dim, layer.head_dim - layer.rope.dim + layer.v_dim
        q_name = "q_proj" if q_rank is None else "q_b_proj"
        q = LinearPart(q_name, total * layer.head_dim, head_spans(heads, layer.head_dim, 0), q_dim)
        # q or its latent comes out of the product that makes the other latent; not where only one
        # of the two has a bias
        self._query: Linear | None = None
        beside = [q]
        if q_rank is not None:
            beside = [LinearPart("q_a_proj", q_rank, ((0, 0, q_rank),), q_rank)]
        first = q_dim if q_rank is None else q_rank
        if q_rank is None and spec.qkv_bias:
            self._query, beside, first = by_outputs(site, (q_dim, hidden), [q], False), [], 0
        elif q_rank is not None:
            self._query = by_outputs(site, (q_dim, q_rank), [q], False)
        kept = ((0, first, self._raw),)
        raw = LinearPart("kv_a_proj_with_mqa", self._raw, kept, self._raw)
        self._down = by_outputs(site, (first + self._raw, hidden), [*beside, raw], spec.qkv_bias)
        v_dim, spans = num * layer.v_dim, head_spans(heads, layer.v_dim, 0)
        out = LinearPart("o_proj", total * layer.v_dim, spans, v_dim)
        self._out = by_inputs(site, (hidden, v_dim), out, spec.out_bias)
        super().__init__(self._down, *([self._query] if self._query else []), self._out)
        self._norm = Norm(site, spec, layer.kv_rank)
        self._q_norm = None if q_rank is None else Norm(site, spec, q_rank)
        self._up = site.empty(num, made, layer.kv_rank)
        self._up_target = Target(
            self._up.flatten(0, 1), 0, total * made, head_spans(heads, made, 0)
        )
        self.width = self._raw + 2 * (q_rank or 0)
        self._site = site

    def row_form(self, num_tokens: int) -> RowForm | None:
        readers = [self._down]
        if self._query is not None and self._q_norm is None:
            readers.append(self._query)
        return common_form(readers, num_tokens)

    def __call__(self, x: Activations, plan: AttentionPlan, kv: LayerKv) -> Tensor:
        ops, both = self._site.ops, self._down(x)
        beside, raw = both[:, : -self._raw], both[:, -self._raw :]
        if self._query is None:
            q = beside
        elif self._q_norm is None:
            q = self._query(x)
        else:
            form = self._query.row_form(len(x))
            q = self._query(normed(ops, beside, self._q_norm.weight, EPS, form))
        latent = Latent(raw, self._norm.weight, EPS, self._up)
        return self._site.comm.linear_reduce(self._out, plan.run(q, kv, latent))

    @property
    def nbytes(self) -> int:
        norms = self._norm.nbytes + (0 if self._q_norm is None else self._q_norm.nbytes)
        return super().nbytes + norms + self._up.nbytes

    def targets(self, prefix: str) -> Iterator[tuple[str, AnyTarget]]:
        yield from super().targets(prefix)
        yield f"{prefix}kv_b_proj.weight", self._up_target
        yield from self._norm.targets(f"{prefix}kv_a_layernorm")
        if self._q_norm is not None:
            yield from self._q_norm.targets(f"{prefix}q_a_layernorm")
