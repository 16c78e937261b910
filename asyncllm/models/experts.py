"""A mixture of experts as a block's MLP, on one rank.

Knows tensors, their names in the checkpoint and which of them this rank has; routing and
multiplication are left to the operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from asyncllm.models.layers import LinearGroup, gated
from asyncllm.models.linear import LinearPart, by_inputs, by_outputs, plain
from asyncllm.models.model import ModelContext
from asyncllm.models.ops import Activations, LocalExperts
from asyncllm.models.quantization import (
    BLOCK,
    QuantKind,
    QuantStack,
    QuantWeight,
    RowForm,
    ServedLinear,
)
from asyncllm.models.spec import ExpertsSpec
from asyncllm.models.weights import AnyTarget, QuantTarget, SliceSpan, Target, whole

# kinds of the weights of experts in few bits -> type of an element
ELEMENTS: dict[QuantKind, torch.dtype] = {
    "fp8_channel": torch.float8_e4m3fn,
    "fp8_block": torch.float8_e4m3fn,
    "int8_channel": torch.int8,
}


class Experts:
    """Called with the normed tokens of a step, like :class:`asyncllm.models.layers.GatedMLP`.

    Experts are sliced equally by their inner size over the ranks of ``site.world`` (with scales of
    blocks, as equally as whole blocks allow), or each rank has some whole experts
    (``site.whole_experts``); the shared MLP is always sliced. Every rank routes all tokens and adds
    the results of its experts, so there is one all-reduce, and no shape depends on how many tokens
    an expert gets.

    Attributes:
        width: maximum elements of workspace per token.
        nbytes: bytes of the tensors on this rank.
    """

    def __init__(self, site: ModelContext, hidden: int, spec: ExpertsSpec) -> None:
        self._site, self._spec = site, spec
        rank, size = site.world.rank, site.world.size
        if site.whole_experts:
            first, last = (r * spec.num_experts // size for r in (rank, rank + 1))
            num, inner = -(-spec.num_experts // size), spec.inner  # the same on every rank
        else:
            first, last = 0, spec.num_experts
            num, inner = spec.num_experts, -(-spec.inner // size)
        names = spec.names
        self._ways = ways = _way(site, spec, names.gate, names.up), _way(site, spec, names.down)
        if any(way.kind == "fp8_block" for way in ways):  # no block belongs to two
            inner = -(-inner // BLOCK) * BLOCK
        self._span = _slice(spec.inner, inner, 0 if site.whole_experts else rank)
        self._inner = inner
        gate_up = _empty_stack(site, (num, 2 * inner, hidden), ways[0])
        down = _empty_stack(site, (num, hidden, inner), ways[1])
        for stack in (gate_up, down):
            if isinstance(stack, Tensor) and inner > spec.inner:  # what blocks leave over
                stack.zero_()
        self._held = LocalExperts(
            range(first, last), spec.num_experts, gate_up, down, spec.activation
        )
        self._router = site.empty(spec.num_experts, hidden)
        self._bias: Tensor | None = None
        if spec.bias:
            self._bias = site.empty(spec.num_experts, dtype=torch.float32)  # like the scores
        self._shared: _Shared | None = None
        if spec.shared_inner:
            self._shared = _Shared(site.below(f"{spec.names.shared}."), hidden, spec)
        self._shared_gate = site.empty(1, hidden) if spec.shared_gate else None
        tensors = (self._router, self._bias, gate_up, down, self._shared_gate)
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        itemsize = site.dtype.itemsize
        work = site.ops.experts_bytes(spec, hidden, inner, itemsize)
        self.width = -(-work // itemsize)
        if self._shared is not None:
            self.nbytes += self._shared.nbytes
            self.width += self._shared.width
        groups = size // site.comm.size
        if groups > 1:  # also the tokens of all groups and their sums
            self.width = groups * (self.width + 2 * hidden)

    def row_form(self, num_tokens: int) -> RowForm | None:
        return None

    def product_bytes(self, num_tokens: int) -> int:
        site, held = self._site, self._held
        num = num_tokens * (site.world.size // site.comm.size)
        found = [0 if self._shared is None else self._shared.product_bytes(num)]
        found += [site.ops.experts_quant_bytes(held, num, self._spec.top_k, site.dtype)]
        return max(found)

    def __call__(self, x: Activations, live: Tensor | None = None) -> Tensor:
        world = self._site.world
        return world.sum_tokens(partial(self._mixed, live), world.gather_tokens(plain(x)))

    def _mixed(self, live: Tensor | None, given: Activations, out: Tensor | None = None) -> Tensor:
        """This rank's partial sum over the experts and the shared MLP."""
        ops, x = self._site.ops, plain(given)
        routed = ops.route(ops.logits(x, self._router), self._bias, self._spec, live)
        shared: tuple[Tensor, Tensor | None] | None = None
        if self._shared is not None:
            gate = None if self._shared_gate is None else ops.logits(x, self._shared_gate)
            shared = self._shared(x), gate
        return ops.experts(x, self._held, routed, shared, out)

    def targets(self, prefix: str) -> Iterator[tuple[str, AnyTarget]]:
        yield f"{prefix}gate.weight", whole(self._router)
        if self._bias is not None:
            yield f"{prefix}gate.e_score_correction_bias", whole(self._bias)
        for expert in range(self._spec.num_experts):
            yield from self._expert(expert, f"{prefix}experts.{expert}.")
        if self._shared is not None:
            yield from self._shared.targets(f"{prefix}{self._spec.names.shared}.")
        if self._shared_gate is not None:
            yield f"{prefix}{self._spec.names.shared}_gate.weight", whole(self._shared_gate)

    def _expert(self, expert: int, prefix: str) -> Iterator[tuple[str, AnyTarget]]:
        held, names, local = self._held, self._spec.names, self._inner
        ours = expert in held.numbers
        place = held.numbers.index(expert) if ours else 0  # nothing is kept of other ranks' experts
        gate_up, down = held.gate_up[place], held.down[place]
        start, _, size = self._span
        for name, weight, dim, begin in (
            (names.gate, gate_up, 0, 0),
            (names.up, gate_up, 0, local),
            (names.down, down, 1, 0),
        ):
            spans = ((start, begin, size),) if ours else ()
            yield f"{prefix}{name}.weight", self._target(weight, dim, spans)

    def _target(
        self, weight: Tensor | QuantWeight, dim: int, spans: tuple[SliceSpan, ...]
    ) -> AnyTarget:
        inner = self._spec.inner
        if isinstance(weight, Tensor):
            return Target(weight, dim, inner, spans)
        rows = slice(0, 0)  # of another rank's
        for _, begin, _ in spans:
            rows = slice(begin, begin + self._inner) if dim == 0 else slice(0, None)
        return QuantTarget(weight, self._ways[dim].form, None, dim, inner, spans, rows)

    def pack(self) -> None:
        self._site.ops.pack_experts(self._held, self._spec, self._site.dtype)
        if self._shared is not None:
            self._shared.pack()


class _Shared(LinearGroup):
    """The MLP of every token, in equal slices over the ranks of ``site.world``; not summed."""

    def __init__(self, site: ModelContext, hidden: int, spec: ExpertsSpec) -> None:
        inner = spec.shared_inner
        local = -(-inner // site.world.size)
        first, _, size = kept = _slice(inner, local, site.world.rank)
        gate, up = (
            LinearPart("gate_proj", inner, (kept,), local),
            LinearPart("up_proj", inner, ((first, local, size),), local),
        )
        self._gate_up = by_outputs(site, (2 * local, hidden), (gate, up), bias=False)
        self._down = by_inputs(
            site, (hidden, local), LinearPart("down_proj", inner, (kept,), local), bias=False
        )
        super().__init__(self._gate_up, self._down)
        self.width = 3 * local + hidden
        self._ops, self._activation = site.ops, spec.activation

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(gated(self._ops, self._gate_up(x), self._activation, self._down))


def _way(site: ModelContext, spec: ExpertsSpec, *names: str) -> ServedLinear:
    """How these layers of all experts are served: in 8 bits if all are in the same way."""
    below = [f"{site.path}experts.{expert}." for expert in range(spec.num_experts)]
    ways = {site.quantisation.way(f"{path}{name}") for path in below for name in names}
    way = ways.pop()
    kept = way if not ways and _kind(way) is not None else ServedLinear()
    site.quantisation.tally.add(kept.kind, [f"{site.path}experts.{name}" for name in names])
    return kept


def _empty_stack(
    site: ModelContext, shape: tuple[int, int, int], way: ServedLinear
) -> Tensor | QuantStack:
    """Of what is not filled, each element is zero."""
    num, rows, columns = shape
    if (kind := _kind(way)) is None:
        return site.empty(*shape)
    data = site.empty(*shape, dtype=ELEMENTS[kind]).zero_()
    if kind == "fp8_block":
        blocks = -(-rows // BLOCK), -(-columns // BLOCK)
        scales = site.empty(num, *blocks, dtype=torch.float32)
        return QuantStack(kind, data, scales.zero_(), BLOCK)
    scales = site.empty(num, rows, dtype=torch.float32)
    return QuantStack(kind, data, scales.zero_(), columns)


def _kind(way: ServedLinear) -> QuantKind | None:
    """The kind of experts' weights; None: the activations' dtype, also for 4-bit weights."""
    return next((kind for kind in ELEMENTS if kind == way.kind), None)


def _slice(total: int, local: int, rank: int) -> SliceSpan:
    """The ``rank``-th slice of ``local``, as a span to the beginning of a parameter."""
    first = rank * local
    return first, 0, max(0, min(local, total - first))
