"""Quantises tensors to 8-bit values and scales."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from asyncllm.models.quantization import BLOCK, FP8_MAX, INT8_MAX

_TINY = 1e-12  # minimum scale, for rows of zeros


def quantize_rows(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., n] -> values of ``kind`` (float8_e4m3fn or int8) and float32 scales [..., 1]."""
    x = x.float()
    return _by(x, x.abs().amax(-1, keepdim=True), kind)


def quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [r, c] -> float8_e4m3fn [r, c] and float32 scales [ceil(r / 128), ceil(c / 128)]."""
    rows, columns = x.shape
    whole = pad(x.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = whole.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    values, scales = _by(blocks, blocks.abs().amax((1, 3), keepdim=True), torch.float8_e4m3fn)
    return values.flatten(2).flatten(0, 1)[:rows, :columns], scales[:, 0, :, 0]


def _by(x: Tensor, largest: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    most = INT8_MAX if kind == torch.int8 else FP8_MAX
    # by a tensor: CUDA multiplies by the reciprocal of a number, which may be off by a bit
    scales = (largest / torch.full_like(largest, most)).clamp_min_(_TINY)
    scaled = x / scales
    if kind == torch.int8:
        scaled.round_()
    return scaled.clamp_(-most, most).to(kind), scales
