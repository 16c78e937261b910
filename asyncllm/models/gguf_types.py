"""Decodes tensors of GGUF files to integers with the scale of their group, or to floats.

Knows the types of blocks; knows neither models nor parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GroupedValues:
    """Rows of a matrix: w = values * scale + shift, in groups along a row.

    Attributes:
        values: int8 [rows, columns].
        scales: float32 [rows, columns / size].
        shifts: of the same shape; None: all are 0.
        size: of a group.
    """

    values: Tensor
    scales: Tensor
    shifts: Tensor | None
    size: int

    def columns(self, part: slice) -> GroupedValues:
        """Some columns; ``part`` begins and ends between groups."""
        of = slice(part.start // self.size, part.stop // self.size)
        shifts = None if self.shifts is None else self.shifts[:, of]
        return GroupedValues(self.values[:, part], self.scales[:, of], shifts, self.size)

    def widened(self) -> Tensor:
        """float32 [rows, columns]."""
        made: Tensor = (
            self.values.float().unflatten(-1, (-1, self.size)).mul_(self.scales.unsqueeze(-1))
        )
        if self.shifts is not None:
            made.add_(self.shifts.unsqueeze(-1))
        return made.flatten(-2)


def is_float(kind: str) -> bool:
    """Whether tensors of a type are floats rather than groups."""
    return kind in _FLOATS


def floats(kind: str, raw: Tensor) -> Tensor:
    """Decode uint8 [rows, bytes] of a float type to [rows, columns]."""
    values: Tensor = raw.view(_FLOATS[kind])
    return values


def groups(kind: str, raw: Tensor) -> GroupedValues:
    """Decode contiguous uint8 [rows, bytes] of any other type.

    Products of scales are rounded to float32, as in the ``gguf`` package.
    """
    block_bytes, decode = _DECODERS[kind]
    return decode(raw.view(len(raw), -1, block_bytes))


def _half(raw: Tensor) -> Tensor:
    """[rows, blocks, 2 * n] -> float32 [rows, blocks, n]."""
    values: Tensor = raw.contiguous().view(torch.float16).float()
    return values


def _nibbles(raw: Tensor) -> Tensor:
    """[..., n] -> [..., 2 * n]: all low ones, then all high ones."""
    return torch.cat((raw & 15, raw >> 4), -1)


def _joined(values: Tensor) -> Tensor:
    return values.flatten(1).view(torch.int8)


def _q4_0(raw: Tensor) -> GroupedValues:
    values = _nibbles(raw[..., 2:]).view(torch.int8).sub_(8)
    return GroupedValues(values.flatten(1), _half(raw[..., :2]).flatten(1), None, 32)


def _q4_1(raw: Tensor) -> GroupedValues:
    scale, shift = _half(raw[..., :4]).unbind(-1)
    return GroupedValues(_joined(_nibbles(raw[..., 4:])), scale, shift, 32)


def _fives(high: Tensor, low: Tensor) -> Tensor:
    """32 values of 5 bits: bit i of 4 bytes is the highest one of value i."""
    bits = torch.arange(8, dtype=torch.uint8)
    tops = (high.unsqueeze(-1) >> bits & 1).flatten(-2)
    return _nibbles(low) | tops << 4


def _q5_0(raw: Tensor) -> GroupedValues:
    values = _fives(raw[..., 2:6], raw[..., 6:]).view(torch.int8).sub_(16)
    return GroupedValues(values.flatten(1), _half(raw[..., :2]).flatten(1), None, 32)


def _q5_1(raw: Tensor) -> GroupedValues:
    scale, shift = _half(raw[..., :4]).unbind(-1)
    return GroupedValues(_joined(_fives(raw[..., 4:8], raw[..., 8:])), scale, shift, 32)


def _q8_0(raw: Tensor) -> GroupedValues:
    values = raw[..., 2:].contiguous().view(torch.int8).flatten(1)
    return GroupedValues(values, _half(raw[..., :2]).flatten(1), None, 32)


def _six_bits(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Decode 12 bytes to 8 scales and 8 shifts of 6 bits."""
    scale, shift, rest = raw.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((scale & 63, rest & 15 | scale >> 2 & 48), -1)
    shifts = torch.cat((shift & 63, rest >> 4 | shift >> 2 & 48), -1)
    return scales.float(), shifts.float()


def _scaled(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and shifts of the 8 groups of each block."""
    whole, least = _half(raw[..., :4]).split(1, -1)
    scales, shifts = _six_bits(raw[..., 4:16])
    return (whole * scales).flatten(1), (least * shifts).neg_().flatten(1)


def _q4_k(raw: Tensor) -> GroupedValues:
    values = _nibbles(raw[..., 16:].unflatten(-1, (4, 32)))
    return GroupedValues(_joined(values), *_scaled(raw), 32)


def _q5_k(raw: Tensor) -> GroupedValues:
    bits = torch.arange(8, dtype=torch.uint8).unsqueeze(-1)
    tops = raw[..., 16:48].unsqueeze(-2) >> bits & 1  # [.., 8, 32]: a bit for each group
    low = _nibbles(raw[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    return GroupedValues(_joined(low | tops << 4), *_scaled(raw), 32)


def _q6_k(raw: Tensor) -> GroupedValues:
    low = raw[..., :128].unflatten(-1, (2, 1, 64)) >> torch.tensor([[0], [4]], dtype=torch.uint8)
    shifts = torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8)
    high = raw[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3
    values = (low & 15).unflatten(-1, (2, 32)).flatten(-3, -2) | high << 4
    scales = _half(raw[..., 208:]) * raw[..., 192:208].contiguous().view(torch.int8).float()
    return GroupedValues(_joined(values).sub_(32), scales.flatten(1), None, 16)


_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DECODERS: dict[str, tuple[int, Callable[[Tensor], GroupedValues]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
