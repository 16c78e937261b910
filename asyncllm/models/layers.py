"""Layers shared by families: norms, attention of grouped heads, the gated MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from asyncllm.models.attention import AttentionPlan, LayerKv
from asyncllm.models.linear import LinearPart, by_inputs, by_outputs, fused, share
from asyncllm.models.model import ModelContext
from asyncllm.models.ops import Activations, Linear, Ops
from asyncllm.models.quantization import RowForm
from asyncllm.models.spec import Activation, AttentionSpec, MlpSpec, ModelSpec, shard_heads
from asyncllm.models.weights import AnyTarget, SliceSpan, whole


class LinearGroup:
    """Linear layers that form one part of a block."""

    def __init__(self, *linears: Linear) -> None:
        self._linears = linears

    @property
    def nbytes(self) -> int:
        return sum(linear.nbytes for linear in self._linears)

    def product_bytes(self, num_tokens: int) -> int:
        """Of work space of the product that takes most."""
        return max(linear.work_bytes(num_tokens) for linear in self._linears)

    def targets(self, prefix: str) -> Iterator[tuple[str, AnyTarget]]:
        for linear in self._linears:
            yield from linear.targets(prefix)

    def pack(self) -> None:
        for linear in self._linears:
            linear.pack()


class Norm:
    """The weight of a root-mean-square norm of ``size`` elements, the same on every rank."""

    def __init__(self, site: ModelContext, spec: ModelSpec, size: int) -> None:
        self._offset = spec.norm_offset
        # weights near 0 that are added to 1 would lose their last bits in a shorter dtype
        self.weight = site.empty(size, dtype=torch.float32 if spec.norm_offset else None)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def targets(self, name: str) -> Iterator[tuple[str, AnyTarget]]:
        yield f"{name}.weight", whole(self.weight)

    def pack(self) -> None:
        self.weight.add_(self._offset)


def normed(ops: Ops, x: Tensor, weight: Tensor, eps: float, form: RowForm | None) -> Activations:
    """The norm of ``x`` in the form that its reader asked for."""
    if form is None:
        return ops.rmsnorm(x, weight, eps)
    return ops.rmsnorm_rows(x, weight, eps, form)


def add_normed(
    ops: Ops, x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: RowForm | None
) -> tuple[Activations, Tensor]:
    """(norm of ``residual + x`` in the form that its reader asked for, ``residual + x``)."""
    if form is None:
        return ops.add_rmsnorm(x, residual, weight, eps)
    return ops.add_rmsnorm_rows(x, residual, weight, eps, form)


def gated(ops: Ops, x: Tensor, activation: Activation, down: Linear) -> Activations:
    """The inner activation of a gated MLP in the form in which ``down`` reads it."""
    form = down.row_form(len(x))
    if form is None:
        return ops.gated(x, activation)
    return ops.gated_rows(x, activation, form)


class BlockPart(Protocol):
    """What the parts of a block have in common."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors on this rank."""

    def product_bytes(self, num_tokens: int) -> int:
        """Of work space of the product that takes most."""

    def row_form(self, num_tokens: int) -> RowForm | None:
        """The form in which it reads its input; None: as it is, which it takes in any case."""

    def targets(self, prefix: str) -> Iterator[tuple[str, AnyTarget]]:
        """Checkpoint name -> where its values go; names begin with ``prefix``."""

    def pack(self) -> None:
        """Repack weights into the operators' preferred layout."""


class MlpPart(BlockPart, Protocol):
    """The part of a block that follows attention."""

    @property
    def width(self) -> int:
        """Maximum workspace per token, in elements of the model's dtype."""

    def __call__(self, x: Activations, live: Tensor | None = None) -> Tensor:
        """[T, hidden] -> [T, hidden], summed over ranks; valid as ``Comm.linear_reduce`` says.

        ``live``: of the tokens that ``World.gather_tokens`` gives: 0 for padding, whose result does
        not matter; None: no padding.
        """


class AttentionPart(BlockPart, Protocol):
    """A block's attention with its projections."""

    @property
    def spec(self) -> AttentionSpec:
        """This rank's share; parts with equal specs share the plan of a step."""

    @property
    def width(self) -> int:
        """Workspace per token, in elements, besides the backend's ``token_bytes``."""

    def __call__(self, x: Activations, plan: AttentionPlan, kv: LayerKv) -> Tensor:
        """[T, hidden] -> [T, hidden], summed over ranks; valid as ``Comm.linear_reduce`` says."""


class Attention(LinearGroup):
    """Heads in whole GQA groups; a group that is padding has zero weights and adds nothing."""

    width = 0

    def __init__(self, site: ModelContext, spec: ModelSpec, layer: AttentionSpec) -> None:
        heads, dim = shard_heads(layer, site.comm.size, site.comm.rank), layer.head_dim
        self.spec = layer.on(heads)
        q_size, kv_size = layer.num_q_heads * dim, layer.num_kv_heads * dim
        q_dim, kv_dim = self.spec.num_q_heads * dim, self.spec.num_kv_heads * dim
        q = head_spans(heads.q_heads, dim, 0)
        k = head_spans(heads.kv_heads, dim, q_dim)
        v = head_spans(heads.kv_heads, dim, q_dim + kv_dim)
        parts = [
            LinearPart("q_proj", q_size, q, q_dim),
            LinearPart("k_proj", kv_size, k, kv_dim),
            LinearPart("v_proj", kv_size, v, kv_dim),
        ]
        if spec.fused_projections:
            parts = [fused("qkv_proj", parts)]
        hidden = spec.hidden_size
        self.qkv = by_outputs(site, (q_dim + 2 * kv_dim, hidden), parts, spec.qkv_bias)
        out = LinearPart("o_proj", q_size, q, q_dim)
        self.out = by_inputs(site, (hidden, q_dim), out, spec.out_bias)
        super().__init__(self.qkv, self.out)
        self._site, self._eps = site, spec.rms_eps
        self._norms = {}
        if spec.qk_norm:
            self._norms = {name: Norm(site, spec, dim) for name in ("q_norm", "k_norm")}

    def row_form(self, num_tokens: int) -> RowForm | None:
        return self.qkv.row_form(num_tokens)

    def __call__(self, x: Activations, plan: AttentionPlan, kv: LayerKv) -> Tensor:
        qkv, spec = self.qkv(x), self.spec
        if self._norms:
            q, k = (norm.weight for norm in self._norms.values())
            self._site.ops.qk_rmsnorm(qkv, q, k, spec.num_q_heads, spec.num_kv_heads, self._eps)
        return self._site.comm.linear_reduce(self.out, plan.run(qkv, kv))

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(norm.nbytes for norm in self._norms.values())

    def targets(self, prefix: str) -> Iterator[tuple[str, AnyTarget]]:
        yield from super().targets(prefix)
        for name, norm in self._norms.items():
            yield from norm.targets(f"{prefix}{name}")

    def pack(self) -> None:
        super().pack()
        for norm in self._norms.values():
            norm.pack()


class GatedMLP(LinearGroup):
    """down(activation(gate(x)) * up(x)), in equal slices.

    Attributes:
        width: maximum workspace per token, in elements.
    """

    def __init__(self, site: ModelContext, spec: ModelSpec, mlp: MlpSpec) -> None:
        hidden, local = spec.hidden_size, -(-mlp.width // site.comm.size)
        first, _, size = kept = share(mlp.width, site)
        inner = [
            LinearPart("gate_proj", mlp.width, (kept,), local),
            LinearPart("up_proj", mlp.width, ((first, local, size),), local),
        ]
        if spec.fused_projections:
            inner = [fused("gate_up_proj", inner)]
        self.gate_up = by_outputs(site, (2 * local, hidden), inner, mlp.bias)
        down = LinearPart("down_proj", mlp.width, (kept,), local)
        self.down = by_inputs(site, (hidden, local), down, mlp.bias)
        super().__init__(self.gate_up, self.down)
        self.width = 3 * local
        self._site, self._activation = site, mlp.activation

    def row_form(self, num_tokens: int) -> RowForm | None:
        return self.gate_up.row_form(num_tokens)

    def __call__(self, x: Activations, live: Tensor | None = None) -> Tensor:
        inner = gated(self._site.ops, self.gate_up(x), self._activation, self.down)
        return self._site.comm.linear_reduce(self.down, inner)


def head_spans(heads: tuple[int, ...], dim: int, offset: int) -> tuple[SliceSpan, ...]:
    """(source, destination, length) of each run of neighbouring heads; padding heads have none."""
    spans: list[SliceSpan] = []
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
