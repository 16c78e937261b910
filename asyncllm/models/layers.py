"""Layers that families share: linear layers sharded over ranks, and the gated MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from asyncllm.models.model import Site
from asyncllm.models.ops import Linear
from asyncllm.models.weights import Span, Target, whole


@dataclass(frozen=True, slots=True)
class Part:
    """A linear layer of the checkpoint, of which ours holds some spans.

    Attributes:
        name: below the prefix that ``targets`` is given.
        size: of the sharded dimension in the checkpoint.
        spans: what this rank holds of it; the rest of ours is padding, and zero.
    """

    name: str
    size: int
    spans: tuple[Span, ...]


class DenseLinear:
    """A weight in the model's dtype.

    Args:
        shape: [out, in] on this rank.
        parts: the checkpoint's layers; sharded by inputs (``dim`` 1) there is one.
        dim: the sharded dimension, 0 for outputs. The bias of a sum is added by rank 0 only.
    """

    def __init__(
        self, site: Site, shape: tuple[int, int], parts: Sequence[Part], *, dim: int, bias: bool
    ) -> None:
        self._site, self._parts, self._dim = site, parts, dim
        self.weight = site.empty(*shape)
        self.bias = site.empty(shape[0]) if bias else None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._site.ops.linear(x, self.weight, self.bias, out)

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        for part in self._parts:
            name = f"{prefix}{part.name}"
            yield f"{name}.weight", Target(self.weight, self._dim, part.size, part.spans)
            if self.bias is None:
                continue
            if self._dim == 0:
                yield f"{name}.bias", Target(self.bias, 0, part.size, part.spans)
            else:
                spans = whole(self.bias).spans if self._site.comm.rank == 0 else ()
                yield f"{name}.bias", Target(self.bias, 0, len(self.bias), spans)

    def pack(self) -> None:
        self.weight = self._site.ops.pack(self.weight)


def by_outputs(site: Site, shape: tuple[int, int], parts: Sequence[Part], bias: bool) -> Linear:
    """A linear layer whose outputs are shared out over the ranks."""
    return DenseLinear(site, shape, parts, dim=0, bias=bias)


def by_inputs(site: Site, shape: tuple[int, int], part: Part, bias: bool) -> Linear:
    """A linear layer whose inputs are shared out: the ranks' results are to be summed."""
    return DenseLinear(site, shape, (part,), dim=1, bias=bias)


def share(total: int, site: Site) -> Span:
    """This rank's equal slice of ``total``, as a span to the beginning of a parameter."""
    local = -(-total // site.comm.size)
    first = site.comm.rank * local
    return first, 0, max(0, min(local, total - first))


class Linears:
    """Linear layers that together are one part of a block."""

    def __init__(self, *linears: Linear) -> None:
        self._linears = linears

    @property
    def nbytes(self) -> int:
        return sum(linear.nbytes for linear in self._linears)

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        for linear in self._linears:
            yield from linear.targets(prefix)

    def pack(self) -> None:
        for linear in self._linears:
            linear.pack()


class GatedMLP(Linears):
    """down(silu(gate(x)) * up(x)), in equal slices.

    Attributes:
        width: elements that a token takes inside, at most.
    """

    def __init__(self, site: Site, hidden: int, inner: int, bias: bool) -> None:
        local = -(-inner // site.comm.size)
        first, _, size = kept = share(inner, site)
        gate, up = (
            Part("gate_proj", inner, (kept,)),
            Part("up_proj", inner, ((first, local, size),)),
        )
        self.gate_up = by_outputs(site, (2 * local, hidden), (gate, up), bias)
        self.down = by_inputs(site, (hidden, local), Part("down_proj", inner, (kept,)), bias)
        super().__init__(self.gate_up, self.down)
        self.width = 3 * local
        self._site = site

    def __call__(self, x: Tensor) -> Tensor:
        inner = self._site.ops.silu_mul(self.gate_up(x))
        return self._site.comm.linear_reduce(self.down, inner)
