"""Reads 8-bit and 4-bit weights of checkpoints, dequantised or as stored.

Knows the layouts of :class:`asyncllm.models.quant_config.StoredForm`; knows no parameters.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from asyncllm.errors import StartupError
from asyncllm.models.quant_config import StoredForm
from asyncllm.models.tensors import FLOATS, BlockScaled, Index, TensorSource

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the order of 8 neighbours in the nibbles of a word
_NIBBLES = 8  # in a word of 32 bits
_WORD = "I32"


class QuantSource(TensorSource, Protocol):
    """A quantised matrix; ``read`` dequantises it to float32.

    Attributes:
        block: rows and columns that share a scale.
        order: columns sorted by group; None: already in order.
    """

    @property
    def form(self) -> StoredForm: ...

    @property
    def block(self) -> tuple[int, int]: ...

    @property
    def order(self) -> Tensor | None: ...

    def codes(self, rows: slice, columns: slice, device: torch.device) -> Tensor:
        """Values without their scales: 8 bits, or uint8 from 0 to 15."""

    def scales(self, device: torch.device) -> Tensor:
        """All scales, float32 [rows / block, columns / block], rounded up."""

    def zeros(self, device: torch.device) -> Tensor | None:
        """Zero points, float32, of the shape of scales; None: the natural zero, or 8 for 4-bit
        codes."""


def _all(source: TensorSource, device: torch.device) -> Tensor:
    return source.read(tuple(slice(0, size) for size in source.shape), device).to(device)


class ScaledWeights:
    """8-bit values times the scale of their block."""

    order: Tensor | None = None

    def __init__(
        self, label: str, form: StoredForm, values: TensorSource, scales: TensorSource
    ) -> None:
        self.form, self._values, self._scales = form, values, scales
        self.shape, self.kind = values.shape, form.element
        if len(self.shape) < 2:
            raise StartupError(f"{label} has type {values.kind} and one dimension: blocks need two")
        rows, columns = self.shape[-2:]
        self.block = form.block[0] or rows, form.block[1] or columns
        blocks = tuple(-(-size // by) for size, by in zip(self.shape[-2:], self.block, strict=True))
        wanted = [(*self.shape[:-2], *blocks)]
        if form.block == (0, 0):
            wanted += [(1,), ()]
        elif form.block[1] == 0:
            wanted += [(blocks[0],)]
        if scales.shape not in wanted or scales.kind not in FLOATS:
            raise StartupError(
                f"{label}{form.suffix} has type {scales.kind} and shape {list(scales.shape)}; "
                f"blocks of {self.block[0]} x {self.block[1]} of {list(self.shape)} want float32 "
                f"and {list(wanted[0])}"
            )
        self._blocks = blocks

    def read(self, index: Index, device: torch.device) -> Tensor:
        scales = _Reshaped(self._scales, (*self.shape[:-2], *self._blocks))
        return BlockScaled(self._values, scales, self.block).read(index, device)

    def codes(self, rows: slice, columns: slice, device: torch.device) -> Tensor:
        return self._values.read((rows, columns), device).to(device)

    def scales(self, device: torch.device) -> Tensor:
        return _all(self._scales, device).float().view(self._blocks)

    def zeros(self, device: torch.device) -> Tensor | None:
        return None


class _Reshaped:
    """A small tensor in another shape."""

    def __init__(self, source: TensorSource, shape: tuple[int, ...]) -> None:
        self._source, self.shape, self.kind = source, shape, source.kind

    def read(self, index: Index, device: torch.device) -> Tensor:
        if self._source.shape == self.shape:
            return self._source.read(index, device)
        return _all(self._source, device).view(self.shape)[index]


class PackedNibbles:
    """4-bit values, eight per word: compressed-tensors', AutoAWQ's and GPTQ's.

    Args:
        label: of the tensor ``X.weight``, for errors.
        found: the layer's tensors by name suffix.
    """

    kind = "U4"

    def __init__(self, label: str, form: StoredForm, found: dict[str, TensorSource]) -> None:
        self.form, self._found, self._label = form, found, label
        packed = form.method == "packed"
        self._words = self._need(form.main, _WORD)
        self._scales = self._need("weight_scale" if packed else "scales")
        zeros = "weight_zero_point" if packed else "qzeros"
        self._zeros = None if packed and form.symmetric else self._need(zeros, _WORD)
        if len(self._words.shape) != 2:
            raise StartupError(f"{label}: {form.main} has shape {list(self._words.shape)}")
        first, second = self._words.shape
        match form.method:
            case "packed":
                self.shape = first, self._columns(second * _NIBBLES)
            case "awq":
                self.shape = second * _NIBBLES, first
            case _:
                self.shape = second, first * _NIBBLES
        rows, columns = self.shape
        self.block = 1, form.block[1] or columns
        num = -(-columns // self.block[1])
        if columns % self.block[1]:
            raise StartupError(f"{label} has {columns} columns, not groups of {self.block[1]}")
        self._fits(self._scales, (rows, num) if packed else (num, rows), FLOATS)
        if self._zeros is not None:
            self._fits(self._zeros, (-(-rows // 8), num) if packed else (num, rows // 8), {_WORD})
        self._group_of = self._groups(columns, num)

    @property
    def order(self) -> Tensor | None:
        return self._group_of.argsort(stable=True) if self.form.ordered else None

    def read(self, index: Index, device: torch.device) -> Tensor:
        rows, columns = index
        groups = self._group_of[columns].to(device)
        scales, zeros = self.scales(device)[rows], self.zeros(device)
        codes = self.codes(rows, columns, device).float()
        if zeros is None:
            codes -= _NIBBLES
        else:
            codes -= zeros[rows].index_select(1, groups)
        return codes.mul_(scales.index_select(1, groups))

    def codes(self, rows: slice, columns: slice, device: torch.device) -> Tensor:
        match self.form.method:
            case "packed":
                return self._along(rows, columns, device, turned=False)
            case "gptq":
                return self._along(columns, rows, device, turned=True)
            case _:
                words, first = _words(rows)
                found = self._words.read((columns, words), device).to(device)
                wide = _unpack(found)[..., _places(device)].flatten(1)
                return wide[:, first : first + rows.stop - rows.start].t()

    def _along(self, a: slice, b: slice, device: torch.device, *, turned: bool) -> Tensor:
        """[rows, columns] of words along the columns, which are the second of the two slices; along
        the first where the tensor is ``turned``."""
        along, other = (a, b) if turned else (b, a)
        words, first = _words(along)
        found = self._words.read((words, other) if turned else (other, words), device).to(device)
        wide = _unpack(found.t() if turned else found).flatten(1)
        return wide[:, first : first + along.stop - along.start]

    def scales(self, device: torch.device) -> Tensor:
        found = _all(self._scales, device).float()
        return found if self.form.method == "packed" else found.t()

    def zeros(self, device: torch.device) -> Tensor | None:
        if self._zeros is None:
            return None
        found = _all(self._zeros, device)
        match self.form.method:
            case "packed":  # words along the rows
                return _unpack(found.t()).flatten(1).t()[: self.shape[0]].float()
            case "awq":
                return _unpack(found)[..., _places(device)].flatten(1).t().float()
            case _:
                return _unpack(found).flatten(1).t().float().add_(self.form.shift)

    def _need(self, name: str, kind: str = "") -> TensorSource:
        if name not in self._found:
            raise StartupError(f"{self._label} has no {name} beside {self.form.main}")
        found = self._found[name]
        if kind and found.kind != kind:
            raise StartupError(f"{self._label}: {name} has type {found.kind}, not {kind}")
        return found

    def _fits(
        self, source: TensorSource, shape: tuple[int, int], kinds: frozenset[str] | set[str]
    ) -> None:
        if source.shape != shape or source.kind not in kinds:
            raise StartupError(
                f"{self._label}: for {list(self.shape)} in groups of {self.block[1]}, scales or "
                f"zeros of type {source.kind} have shape {list(source.shape)}, not {list(shape)}"
            )

    def _columns(self, packed: int) -> int:
        """The number of columns in ``weight_shape``, since a row's last word may not be full."""
        if (found := self._found.get("weight_shape")) is None:
            return packed
        said = _all(found, torch.device("cpu")).flatten().long()
        for columns in range(packed, packed - _NIBBLES, -1):
            if torch.equal(said, torch.tensor([self._words.shape[0], columns])):
                return columns
        raise StartupError(f"{self._label}: weight_packed does not have the size of weight_shape")

    def _groups(self, columns: int, num: int) -> Tensor:
        """The group of each column."""
        plain = torch.arange(columns) // self.block[1]
        name = "weight_g_idx" if self.form.method == "packed" else "g_idx"
        found = self._found.get(name)
        if found is None:
            if self.form.ordered:
                raise StartupError(f"{self._label} has no {name}, and its columns are not in order")
            return plain
        given = _all(found, torch.device("cpu")).long()
        if given.shape != plain.shape or not torch.equal(given.sort().values, plain):
            raise StartupError(
                f"{self._label}: {name} does not give {self.block[1]} columns to each of {num} "
                f"groups"
            )
        if not self.form.ordered and not torch.equal(given, plain):
            raise StartupError(
                f"{self._label}: {name} orders columns, and config.json says that it does not "
                f"(desc_act, actorder)"
            )
        return given


def _words(part: slice) -> tuple[slice, int]:
    """The words that contain a slice, and the offset of its first element in them."""
    first = part.start // _NIBBLES
    return slice(first, -(-part.stop // _NIBBLES)), part.start - first * _NIBBLES


def _unpack(words: Tensor) -> Tensor:
    """int32 [...] -> uint8 [..., 8], the lowest nibble first."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts).bitwise_and_(15).to(torch.uint8)


def _places(device: torch.device) -> Tensor:
    """Reorder AutoAWQ's nibbles to column order."""
    return torch.tensor(_AWQ_ORDER, device=device).argsort()
