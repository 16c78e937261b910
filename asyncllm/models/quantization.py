"""Kinds of 8-bit and 4-bit weights: memory layouts and how activations are multiplied.

Does not import torch: processes that serve only HTTP read what a checkpoint is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from asyncllm.models.quant_config import StoredForm

QuantKind = Literal["fp8_channel", "fp8_block", "int8_channel", "int4_group"]
RowForm = Literal["fp8", "fp8_block", "int8"]  # of activations in 8 bits
ServedKind = QuantKind | Literal["gguf"]  # the last one: a ``PackedMatrix``, on CPUs

REPACKED: frozenset[ServedKind] = frozenset({"int4_group", "gguf"})  # once they are read
BLOCK = 128  # rows and columns of fp8_block that share a scale; columns of its activations
FP8_MAX = 448.0  # largest value of e4m3
INT8_MAX = 127.0
INT4_ZERO = 8  # the value that stands for 0 where there are no zeros


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """A quantised matrix W [out_features, in_features].

    ``x`` [T, in_features] is multiplied in this way, sums in float32, the result in the dtype of x:

    fp8_channel: ``data`` float8_e4m3fn [out, in], ``scales`` float32 [out];
        W[o, i] = data[o, i] * scales[o]. Each row of x becomes e4m3 too, divided by its own scale
        max|row| / 448: y[t, o] = (xq[t] . data[o]) * x_scale[t] * scales[o].
    fp8_block: ``data`` float8_e4m3fn [out, in], ``scales`` float32 [ceil(out / 128),
        ceil(in / 128)]; W[o, i] = data[o, i] * scales[o // 128, i // 128]; the last blocks may be
        smaller. Each group of 128 columns of each row of x has a scale of its own, as above.
    int8_channel: ``data`` int8 [out, in], ``scales`` float32 [out], as fp8_channel; x becomes int8
        (rounded half to even, scale max|row| / 127), products are summed exactly.
    int4_group: ``data`` uint8 [out, in / 2]: the low nibble of byte b is column 2 * b, the high one
        column 2 * b + 1, both 0 to 15. ``scales`` [in / group, out] in the dtype of activations,
        ``zeros`` of the same shape and dtype with whole numbers from 0 to 16, None: all are 8.
        W[o, i] = (nibble[o, i] - zeros[i // group, o]) * scales[i // group, o]. x stays as it is.

    ``data`` is contiguous, row by row. A row (group) of x that is all zeros has any scale but 0.

    Attributes:
        group: columns that share a scale: 128 of fp8_block, those of int4_group (32, 64, 128 or
            in_features among others; it divides in_features); in_features of the other kinds.
    """

    kind: QuantKind
    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.data.nbytes + self.scales.nbytes + zeros


# kinds of weights that meet activations in 8 bits
ROW_FORMS: dict[QuantKind, RowForm] = {
    "fp8_channel": "fp8",
    "fp8_block": "fp8_block",
    "int8_channel": "int8",
}


@dataclass(frozen=True, slots=True)
class QuantRows:
    """Activations [T, width] in 8 bits, made once for all products that read them.

    Attributes:
        form: what they are made for.
        values: [T, width], float8_e4m3fn or int8, contiguous.
        scales: float32 [T], or of each 128 columns [ceil(width / 128), T] of form "fp8_block".
        dtype: of the activations that they stand for, and of what is made of them.
    """

    form: RowForm
    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True)
class QuantStack:
    """The same matrix of several experts in 8 bits: a :class:`QuantWeight` of each, whose ``data``
    and ``scales`` have one dimension more here, in front."""

    kind: QuantKind
    data: Tensor
    scales: Tensor
    group: int

    def __getitem__(self, place: int) -> QuantWeight:
        data, scales = self.data[place], self.scales[place]
        return QuantWeight(self.kind, data, scales, None, self.group, *data.shape)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes


# names of --quant_type -> kind of weights; None: they stay in the activations' dtype
TYPES: dict[str, QuantKind | None] = {
    "none": None,
    "fp8w8a8": "fp8_channel",
    "fp8w8a8-b128": "fp8_block",
    "w8a8": "int8_channel",
    "awq": "int4_group",
}
KIND_NAMES: dict[ServedKind, str] = {
    "fp8_channel": "fp8 (a scale per output channel)",
    "fp8_block": "fp8 (blocks of 128 x 128)",
    "int8_channel": "int8 (a scale per output channel)",
    "int4_group": "4 bits (in groups)",
    "gguf": "the bits of the GGUF file",
}
_LAYER = re.compile(r"layers\.(\d+)\.(?:.*\.)?(\w+)")
_EXPERT = re.compile(r"(experts)\.\d+\.\w+$")


@dataclass(frozen=True, slots=True)
class Override:
    """A type for some projections of some layers; ``layers`` None: all of them."""

    type: str
    projections: frozenset[str]
    layers: frozenset[int] | None


@dataclass(frozen=True, slots=True)
class WeightTypes:
    """The requests of --quant_type and --quant_cfg, by the names of ``TYPES``.

    form: the checkpoint's, if the weight is used as stored; None: it is made from the
        dequantised weight.
        overrides: the last one for a layer wins.
    """

    type: str | None = None
    overrides: tuple[Override, ...] = ()

    def of(self, name: str) -> str | None:
        """The type of a linear layer, by its name in the checkpoint; "experts" are all of one."""
        name = _EXPERT.sub(r"\1", name)
        if (found := _LAYER.search(name)) is None:
            return self.type
        layer, projection = int(found[1]), found[2]
        for override in reversed(self.overrides):
            if projection in override.projections and (
                override.layers is None or layer in override.layers
            ):
                return override.type
        return self.type


AS_STORED = WeightTypes()


@dataclass(frozen=True, slots=True)
class ServedLinear:
    """How a linear layer is served.

    Attributes:
        kind: of its weight; None: the activations' dtype.
        form: the checkpoint's, where the weight is taken as it stands; None: it is made of what
            the checkpoint's stands for.
        type: of kind "gguf", the type in the file.
    """

    kind: ServedKind | None = None
    form: StoredForm | None = None
    type: str = ""


@dataclass(slots=True)
class LinearCounts:
    """Counts linear layers by the kind of their weights."""

    served: dict[ServedKind, int] = field(default_factory=dict)
    plain: int = 0
    widened: list[str] = field(default_factory=list)  # dequantised because of the shards

    def add(self, kind: ServedKind | None, names: Iterable[str], *, widened: bool = False) -> None:
        found = list(names)
        if kind is None:
            self.plain += len(found)
            self.widened += found if widened else []
        else:
            self.served[kind] = self.served.get(kind, 0) + len(found)

    def counts(self, dtype: str) -> tuple[tuple[str, int], ...]:
        """(kind or ``dtype``, number of layers) of those that occur."""
        plain = ((dtype, self.plain),) if self.plain else ()
        return (*self.served.items(), *plain)

    def text(self, dtype: str) -> str:
        """One line for the log."""
        parts = [f"{num} in {KIND_NAMES[kind]}" for kind, num in self.served.items()]
        parts += [f"{self.plain} in {dtype}"] if self.plain or not parts else []
        return f"linear layers: {', '.join(parts)}"

    def warnings(self, dtype: str) -> list[str]:
        """A line if layers had to be dequantised."""
        if not self.widened:
            return []
        return [
            f"{len(self.widened)} linear layers are widened to {dtype}, since this --tp cuts their "
            f"blocks or groups; the first: {self.widened[0]}"
        ]


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the linear layers of a model are served.

    Attributes:
        stored: how the checkpoint stores quantised layers.
        gguf: types of a GGUF file's matrices that can be used as stored, by name.
        tally: statistics of the layers, filled while a model is built.
    """

    stored: StoredForm | None = None
    asked: WeightTypes = AS_STORED
    gguf: Mapping[str, str] = field(default_factory=dict)
    tally: LinearCounts = field(default_factory=LinearCounts, compare=False)

    def way(self, name: str) -> ServedLinear:
        """How to serve a linear layer, by its checkpoint name, if shards keep groups whole."""
        form, asked = self.stored, self.asked.of(name)
        if asked is None and (type_ := self.gguf.get(f"{name}.weight")) is not None:
            return ServedLinear("gguf", type=type_)
        packed = form is not None and name not in form.plain
        if form is not None and not packed:
            return ServedLinear()  # layers that a quantised checkpoint leaves unquantised stay so
        kind = TYPES[asked] if asked is not None else form.kind if form is not None else None
        if kind is None:
            return ServedLinear()
        return ServedLinear(kind, form if form is not None and form.kind == kind else None)
