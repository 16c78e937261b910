"""Linear layers sharded over ranks, with weights in the activations' dtype or quantised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from asyncllm.models.gguf_packed import GROUP, PackedMatrix, PackedTarget
from asyncllm.models.model import ModelContext
from asyncllm.models.ops import Activations, Linear
from asyncllm.models.quantization import BLOCK, QuantWeight, RowForm, ServedLinear
from asyncllm.models.weights import AnyTarget, QuantTarget, SliceSpan, Target, whole


@dataclass(frozen=True, slots=True)
class LinearPart:
    """A linear layer of the checkpoint, of which this rank holds some spans.

    Attributes:
        name: below the prefix that ``targets`` is given.
        size: size of the sharded dimension in the checkpoint.
        spans: what this rank holds of it; the rest of the local weight is zero padding.
        local: local size of the sharded dimension, including padding. Parts are concatenated.
    """

    name: str
    size: int
    spans: tuple[SliceSpan, ...]
    local: int


@dataclass(frozen=True, slots=True)
class LinearShard:
    """A rank's share of a linear layer.

    Attributes:
        shape: [out, in] on this rank.
        parts: the checkpoint's layers; just one if it is sharded by inputs (``dim`` 1).
        dim: the sharded dimension, 0 for outputs. If results are summed, only rank 0 adds the bias.
        bias: whether it has one.
    """

    shape: tuple[int, int]
    parts: Sequence[LinearPart]
    dim: int
    bias: bool


class _Biased:
    """Base of linear layers: their parts and the bias."""

    def __init__(self, site: ModelContext, shard: LinearShard) -> None:
        self._site, self._parts, self._dim = site, shard.parts, shard.dim
        self.bias = site.empty(shard.shape[0]) if shard.bias else None

    def _bias_targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        if self.bias is None:
            return
        for part in self._parts:
            spans, size = part.spans, part.size
            if self._dim == 1:
                spans = whole(self.bias).spans if self._site.comm.rank == 0 else ()
                size = len(self.bias)
            yield f"{prefix}{part.name}.bias", Target(self.bias, 0, size, spans)

    def row_form(self, num_rows: int) -> RowForm | None:
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the bias."""
        return 0 if self.bias is None else self.bias.nbytes


def plain(x: Activations) -> Tensor:
    """Rows that were asked for as they are."""
    assert isinstance(x, Tensor), "rows in 8 bits where nobody asked for them"
    return x


class DenseLinear(_Biased):
    """A weight in the model's dtype."""

    def __init__(self, site: ModelContext, shard: LinearShard) -> None:
        super().__init__(site, shard)
        self.weight = site.empty(*shard.shape)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + super().nbytes

    def __call__(self, x: Activations, out: Tensor | None = None) -> Tensor:
        return self._site.ops.linear(plain(x), self.weight, self.bias, out)

    def work_bytes(self, num_rows: int) -> int:
        return 0

    def targets(self, prefix: str) -> Iterator[tuple[str, Target]]:
        for part in self._parts:
            target = Target(self.weight, self._dim, part.size, part.spans)
            yield f"{prefix}{part.name}.weight", target
        yield from self._bias_targets(prefix)

    def pack(self) -> None:
        self.weight = self._site.ops.pack(self.weight)


class QuantLinear(_Biased):
    """A quantised weight: taken from the checkpoint, or quantised while it is read.

    With ``way.form.ordered`` the columns of the weight are sorted by group, and those of the
    activations are reordered to match.
    """

    def __init__(self, site: ModelContext, shard: LinearShard, way: ServedLinear) -> None:
        super().__init__(site, shard)
        self._way, form = way, way.form
        self.weight = _empty_weight(site, shard.shape, way)
        self._order: Tensor | None = None
        if form is not None and form.ordered:
            self._order = site.empty(shard.shape[1], dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        order = 0 if self._order is None else self._order.nbytes
        return self.weight.nbytes + order + super().nbytes

    def row_form(self, num_rows: int) -> RowForm | None:
        return self._site.ops.row_form(self.weight, num_rows)

    def __call__(self, x: Activations, out: Tensor | None = None) -> Tensor:
        if self._order is not None:
            x = plain(x).index_select(1, self._order)
        return self._site.ops.quant_linear(x, self.weight, self.bias, out)

    def work_bytes(self, num_rows: int) -> int:
        itemsize, ordered = self._site.dtype.itemsize, 0
        if self._order is not None:
            ordered = num_rows * self.weight.in_features * itemsize
        return ordered + self._site.ops.quant_bytes(self.weight, num_rows, itemsize)

    def targets(self, prefix: str) -> Iterator[tuple[str, AnyTarget]]:
        begin = 0
        for part in self._parts:
            rows = slice(begin, begin + part.local) if self._dim == 0 else slice(0, None)
            yield (
                f"{prefix}{part.name}.weight",
                QuantTarget(
                    self.weight, self._way.form, self._order, self._dim, part.size, part.spans, rows
                ),
            )
            begin += part.local
        yield from self._bias_targets(prefix)

    def pack(self) -> None:
        self.weight = self._site.ops.pack_quant(self.weight, self._site.dtype)


def _empty_weight(site: ModelContext, shape: tuple[int, int], way: ServedLinear) -> QuantWeight:
    """Zeros, or uninitialised if all of it will be filled."""
    kind, (rows, columns), form = way.kind, shape, way.form
    assert kind is not None
    assert kind != "gguf"
    if kind == "int4_group":
        assert form is not None
        group = form.block[1] or columns
        data = site.empty(rows, columns // 2, dtype=torch.uint8)
        scales = site.empty(columns // group, rows)
        zeros = None if form.symmetric else site.empty(columns // group, rows)
        return QuantWeight(kind, data, scales, zeros, group, rows, columns)
    element = torch.int8 if kind == "int8_channel" else torch.float8_e4m3fn
    data = site.empty(rows, columns, dtype=element)
    if kind == "fp8_block":
        scales = site.empty(-(-rows // BLOCK), -(-columns // BLOCK), dtype=torch.float32)
        return QuantWeight(kind, data, scales, None, BLOCK, rows, columns)
    scales = site.empty(rows, dtype=torch.float32)
    return QuantWeight(kind, data, scales, None, columns, rows, columns)


class PackedLinear(_Biased):
    """A weight of a GGUF file in its own format."""

    def __init__(self, site: ModelContext, shard: LinearShard, way: ServedLinear) -> None:
        super().__init__(site, shard)
        self.weight = PackedMatrix(site, shard.shape, way.type)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + super().nbytes

    def __call__(self, x: Activations, out: Tensor | None = None) -> Tensor:
        packed = self._site.ops.packed
        assert packed is not None
        return packed.linear(plain(x), self.weight, self.bias, out)

    def work_bytes(self, num_rows: int) -> int:
        packed = self._site.ops.packed
        assert packed is not None
        return packed.linear_bytes(self.weight, num_rows, self._site.dtype.itemsize)

    def targets(self, prefix: str) -> Iterator[tuple[str, AnyTarget]]:
        for part in self._parts:
            target = PackedTarget(self.weight, self._dim, part.size, part.spans)
            yield f"{prefix}{part.name}.weight", target
        yield from self._bias_targets(prefix)

    def pack(self) -> None:
        packed = self._site.ops.packed
        assert packed is not None
        packed.pack(self.weight)


class SideBySide:
    """Linear layers with the same input whose weights cannot be merged: their outputs are
    concatenated."""

    def __init__(self, linears: Sequence[Linear], width: int, itemsize: int) -> None:
        self._linears, self._width, self._itemsize = linears, width, itemsize

    @property
    def nbytes(self) -> int:
        return sum(linear.nbytes for linear in self._linears)

    def row_form(self, num_rows: int) -> RowForm | None:
        return common_form(self._linears, num_rows)

    def work_bytes(self, num_rows: int) -> int:
        # of the one that runs, and all results before they are brought together
        made = num_rows * self._width * self._itemsize
        return made + max(linear.work_bytes(num_rows) for linear in self._linears)

    def __call__(self, x: Activations, out: Tensor | None = None) -> Tensor:
        made = [linear(x) for linear in self._linears]
        return torch.cat(made, 1) if out is None else torch.cat(made, 1, out=out)

    def targets(self, prefix: str) -> Iterator[tuple[str, AnyTarget]]:
        for linear in self._linears:
            yield from linear.targets(prefix)

    def pack(self) -> None:
        for linear in self._linears:
            linear.pack()


def by_outputs(
    site: ModelContext, shape: tuple[int, int], parts: Sequence[LinearPart], bias: bool
) -> Linear:
    """A linear layer whose outputs are split over the ranks (column-parallel).

    Parts are merged into one weight if they are served in the same way and no block of scales
    spans two of them.
    """
    ways = [site.quantisation.way(site.path + part.name) for part in parts]
    together = len(set(ways)) == 1 and (len(parts) == 1 or not _ordered(ways[0]))
    if together and _lines_up(ways[0], parts, 0):
        return _make(site, LinearShard(shape, parts, 0, bias), ways[0])
    begins = accumulate((part.local for part in parts), initial=0)
    alone = [_moved(part, begin) for part, begin in zip(parts, begins, strict=False)]
    made = []
    for part, way in zip(alone, ways, strict=True):
        kept = way if _lines_up(way, [part], 0) else ServedLinear()
        shard = LinearShard((part.local, shape[1]), [part], 0, bias)
        made.append(_make(site, shard, kept, widened=kept != way))
    return made[0] if len(made) == 1 else SideBySide(made, shape[0], site.dtype.itemsize)


def common_form(linears: Sequence[Linear], num_rows: int) -> RowForm | None:
    """The form that all of these like best for the same rows; None if they differ."""
    forms = {linear.row_form(num_rows) for linear in linears}
    return forms.pop() if len(forms) == 1 else None


def by_inputs(site: ModelContext, shape: tuple[int, int], part: LinearPart, bias: bool) -> Linear:
    """A linear layer whose inputs are split over the ranks (row-parallel); results must be
    summed."""
    way = site.quantisation.way(site.path + part.name)
    kept = way if _lines_up(way, [part], 1) else ServedLinear()
    return _make(site, LinearShard(shape, [part], 1, bias), kept, widened=kept != way)


def _make(
    site: ModelContext, shard: LinearShard, way: ServedLinear, *, widened: bool = False
) -> Linear:
    names = [site.path + part.name for part in shard.parts]
    site.quantisation.tally.add(way.kind, names, widened=widened)
    if way.kind is None:
        return DenseLinear(site, shard)
    if way.kind == "gguf":
        return PackedLinear(site, shard, way)
    return QuantLinear(site, shard, way)


def _ordered(way: ServedLinear) -> bool:
    return way.form is not None and way.form.ordered


def _moved(part: LinearPart, begin: int) -> LinearPart:
    """``part`` as a separate weight."""
    spans = tuple((source, into - begin, length) for source, into, length in part.spans)
    return replace(part, spans=spans)


def _lines_up(way: ServedLinear, parts: Sequence[LinearPart], dim: int) -> bool:
    """Whether no block of scales on this rank spans several blocks or layers of the checkpoint.

    The result is the same on every rank: a rank's part begins at a multiple of its size.
    """
    match way.kind:
        case "gguf" if dim == 1:
            step = GROUP
        case "fp8_block":
            step = BLOCK
            if way.form is None:  # quantised here
                begins = accumulate((part.local for part in parts), initial=0)
                return all(begin % BLOCK == 0 for begin, _ in zip(begins, parts, strict=False))
        case "int4_group" if dim == 1:
            assert way.form is not None
            if way.form.ordered:
                return all(part.local == part.size for part in parts)
            step = way.form.block[1] or 2  # whole rows share a scale: so do their slices
        case _:
            return True
    if any(part.local % step for part in parts if part.local != part.size):
        return False
    return all(n % step == 0 for part in parts for span in part.spans for n in span[:2])


def share(total: int, site: ModelContext) -> SliceSpan:
    """This rank's equal slice of ``total``, as a span at the start of a parameter."""
    local = -(-total // site.comm.size)
    first = site.comm.rank * local
    return first, 0, max(0, min(local, total - first))


def fused(name: str, parts: Sequence[LinearPart]) -> LinearPart:
    """``parts`` as one tensor of the checkpoint that concatenates them."""
    spans, begin = [], 0
    for part in parts:
        spans += [(begin + source, into, length) for source, into, length in part.spans]
        begin += part.size
    return LinearPart(name, begin, tuple(spans), sum(part.local for part in parts))
