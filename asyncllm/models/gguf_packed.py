"""Matrices of GGUF files in their own low-bit formats, laid out for products on a CPU.

Knows their memory layout and how they are filled; the products are in ``engine/int4_cpu.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncllm.models.gguf_tensors import GgufTensor
from asyncllm.models.gguf_types import GroupedValues
from asyncllm.models.model import ModelContext
from asyncllm.models.tensors import TensorSource
from asyncllm.models.weights import SliceSpan, TensorMismatch

ROWS = 64  # the number of rows is padded to a multiple of this
GROUP = 32  # columns of nibbles that share a scale
_CHUNK = 1 << 21  # weights filled at a time


@dataclass(frozen=True, slots=True)
class NibblePlanes:
    """How numbers of a type become nibbles v, with w = (v - 8) * scale + shift.

    Attributes:
        width: 0: a number is a nibble; otherwise each run of this many numbers is followed by an
            equal run of their high parts, which multiply activations times ``factor``.
        shifted: shifts may be other than 0.
    """

    width: int = 0
    factor: int = 1
    shifted: bool = True

    def nibbles(self, groups: GroupedValues) -> tuple[Tensor, Tensor, Tensor]:
        """(v uint8 [rows, n], scales and shifts float32 [rows, n / 32])."""
        values, scales, shifts = groups.values, groups.scales, groups.shifts
        shifts = torch.zeros_like(scales) if shifts is None else shifts
        if not self.width:
            if self.shifted:  # 0 to 15
                return values.view(torch.uint8), scales, shifts + 8 * scales
            return (values + 8).view(torch.uint8), scales, shifts
        if self.width < GROUP:  # the two parts share a scale, and there is no shift
            parts = values & self.factor - 1, torch.div(values, 8, rounding_mode="floor") + 9
        else:
            parts = values & 15, torch.div(values, 16, rounding_mode="floor") + 8
            scales = scales.repeat_interleave(2, 1)
            shifts = torch.stack((shifts + 8 * groups.scales, torch.zeros_like(shifts)), -1)
        made = torch.stack([part.unflatten(-1, (-1, self.width)) for part in parts], -2)
        return made.flatten(1).to(torch.uint8), scales, shifts.flatten(1)


_FIVE_TO_EIGHT = NibblePlanes(32, 16)
PLANES = {
    "Q4_0": NibblePlanes(shifted=False),
    "Q4_1": NibblePlanes(),
    "Q4_K": NibblePlanes(),
    "Q5_0": _FIVE_TO_EIGHT,
    "Q5_1": _FIVE_TO_EIGHT,
    "Q5_K": _FIVE_TO_EIGHT,
    "Q6_K": NibblePlanes(16, 8, shifted=False),
    "Q8_0": _FIVE_TO_EIGHT,
}


class PackedMatrix:
    """A matrix [rows, columns].

    Attributes:
        data: uint8 [rows filled up, bytes]; until it is packed, the low nibble of byte b is column
            2 * b of the nibbles.
        scales: [nibbles / 32, rows filled up, 2] scales and shifts, in the type of activations.
        spare: an extra group of zero nibbles, for use by products.
    """

    def __init__(
        self, site: ModelContext, shape: tuple[int, int], type_: str, *, spare: bool = False
    ) -> None:
        self.rows, self.columns = shape
        self.planes, self.spare = PLANES[type_], spare
        self.nibbles = self.columns * (2 if self.planes.width else 1)
        filled, width = -(-self.rows // ROWS) * ROWS, self.nibbles + GROUP * spare
        make = torch.empty if site.device.type == "meta" else torch.zeros
        self.data = make(filled, width // 2, dtype=torch.uint8, device=site.device)
        self.scales = make(width // GROUP, filled, 2, dtype=site.dtype, device=site.device)
        if site.device.type != "meta":
            self.data.fill_(0x88)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes


@dataclass(frozen=True, slots=True)
class PackedTarget:
    """Destination of a GGUF matrix: spans along ``dim``, as in ``Target``."""

    matrix: PackedMatrix
    dim: int
    size: int
    spans: tuple[SliceSpan, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the file's matrix."""
        if self.dim == 0:
            return self.size, self.matrix.columns
        return self.matrix.rows, self.size

    def fill(self, source: TensorSource) -> None:
        """Raises TensorMismatch: it is not of a GGUF file."""
        if not isinstance(source, GgufTensor):
            raise TensorMismatch("is not in the bits of a GGUF file")
        matrix = self.matrix
        step = max(1, _CHUNK // source.shape[1])
        for start, into, length in self.spans:
            first, place, end = start, into, start + length
            if self.dim == 1:
                first, place, end = 0, 0, matrix.rows
            for row in range(first, end, step):
                part = slice(row, min(row + step, end))
                groups = source.groups(part)
                if self.dim == 1:
                    groups = groups.columns(slice(start, start + length))
                made, scales, shifts = matrix.planes.nibbles(groups)
                rows = slice(place + row - first, place + part.stop - first)
                left = (into if self.dim == 1 else 0) * matrix.nibbles // matrix.columns
                bytes_ = slice(left // 2, (left + made.shape[1]) // 2)
                matrix.data[rows, bytes_] = made[:, ::2] | made[:, 1::2] << 4
                at = slice(left // GROUP, left // GROUP + scales.shape[1])
                matrix.scales[at, rows, 0] = scales.t().to(matrix.scales.dtype)
                matrix.scales[at, rows, 1] = shifts.t().to(matrix.scales.dtype)
