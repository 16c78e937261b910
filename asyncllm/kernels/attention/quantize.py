"""Quantises K and V to 8 bits and back, in plain torch: used on the CPU, and as reference.

A scale is a bfloat16, which has the range of float32, so no K or V is too large for it. It is
rounded up, and values are divided by the rounded scale, so none exceeds the largest 8-bit value.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST = 1e-30  # nothing smaller is told from zero


def quantize_ref(x: Tensor, kind: torch.dtype, group: int | None) -> tuple[Tensor, Tensor]:
    """8-bit numbers like ``x`` and their scales.

    Args:
        x: [..., dim], finite.
        kind: torch.int8 or torch.float8_e4m3fn.
        group: neighbours of the last dimension that share a scale; None: all of them.

    Returns:
        [..., dim] of ``kind``, rounded to the nearest; [..., dim / group] bfloat16.
    """
    parts = x.float().unflatten(-1, (-1, group or x.shape[-1]))
    most = parts.abs().amax(-1).clamp_min(LEAST) / LARGEST[kind]
    scales = ((most.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    divided = (parts / scales.float().unsqueeze(-1)).flatten(-2)
    if kind == torch.int8:
        divided = (divided + 0.5).floor_()
    return divided.to(kind), scales


def dequantize_ref(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``quantize_ref`` was given, rounded twice: to 8 bits, and to ``dtype``."""
    # products are rounded once in either type, whose numbers hold all of 8 bits; scales may be
    # beyond those of float16
    wide = torch.float32 if dtype == torch.float16 else dtype
    numbers = values.to(wide) if values.dtype == torch.int8 else _of_e4m3(values).to(wide)
    factors = scales.to(wide)
    if factors.shape[-1] > 1:
        factors = factors.repeat_interleave(values.shape[-1] // factors.shape[-1], -1)
    return numbers.mul_(factors).to(dtype)


def _of_e4m3(x: Tensor) -> Tensor:
    """x, finite, as bfloat16, in a fifth of the time of torch's conversion.

    Sign, exponent and fraction are moved to where bfloat16 has them, and the exponents' other zero
    is made good by a factor.
    """
    bits = x.view(torch.int8).to(torch.int16)  # the sign is repeated in the upper half
    return bits.bitwise_left_shift_(4).bitwise_and_(~0x780F).view(torch.bfloat16).mul_(2.0**120)
