"""Weights in 8 or 4 bits: what kinds there are, how they lie in memory, how activations meet them.

Does not import torch: processes that serve only HTTP read what a checkpoint is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

QuantKind = Literal["fp8_channel", "fp8_block", "int8_channel", "int4_group"]

BLOCK = 128  # rows and columns of fp8_block that share a scale; columns of its activations
FP8_MAX = 448.0  # largest value of e4m3
INT8_MAX = 127.0
INT4_ZERO = 8  # the value that stands for 0 where there are no zeros


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """A matrix W [out_features, in_features] in few bits.

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
