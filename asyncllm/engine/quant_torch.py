"""Products with quantised weights in plain torch.

What :class:`asyncllm.models.quantization.QuantWeight` says, with a part of the weight widened at a
time: the products of the CPU, and the reference of kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncllm.models.quantization import BLOCK, INT4_ZERO, QuantWeight
from asyncllm.models.quantize import quantize_rows as quantize_rows

WIDENED = 1 << 22  # elements of a weight that exist as float32 at a time


def rounded(x: Tensor, weight: QuantWeight) -> Tensor:
    """x [T, in] in float32 as ``weight`` sees it: by way of fp8 or int8, or as it is."""
    match weight.kind:
        case "int4_group":
            return x.float()
        case "fp8_block":
            short = -x.shape[-1] % BLOCK
            groups = torch.nn.functional.pad(x, (0, short)).unflatten(-1, (-1, BLOCK))
            values, scales = quantize_rows(groups, torch.float8_e4m3fn)
            return (values.float() * scales).flatten(-2)[:, : x.shape[-1]]
        case "fp8_channel" | "int8_channel":
            values, scales = quantize_rows(x, weight.data.dtype)
            return values.float() * scales


def dequantize(weight: QuantWeight, rows: slice = slice(None)) -> Tensor:
    """Some rows of the matrix, in float32."""
    first, end, _ = rows.indices(weight.out_features)
    data = weight.data[first:end]
    match weight.kind:
        case "int4_group":
            nibbles = torch.stack([data & 15, data >> 4], -1).float()
            groups: Tensor = nibbles.view(len(data), -1, weight.group)
            scales = weight.scales[:, first:end].t().float().unsqueeze(-1)
            if weight.zeros is None:
                return groups.sub_(INT4_ZERO).mul_(scales).flatten(1)
            zeros = weight.zeros[:, first:end].t().float().unsqueeze(-1)
            return groups.sub_(zeros).mul_(scales).flatten(1)
        case "fp8_block":
            blocks = torch.arange(first, end, device=data.device) // BLOCK
            columns = torch.arange(weight.in_features, device=data.device) // BLOCK
            scales = weight.scales.index_select(0, blocks).index_select(1, columns)
            return data.float().mul_(scales)
        case "fp8_channel" | "int8_channel":
            return data.float().mul_(weight.scales[first:end, None])


def quant_linear(
    x: Tensor, weight: QuantWeight, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """:meth:`asyncllm.models.ops.Ops.quant_linear`."""
    if out is None:
        out = x.new_empty(len(x), weight.out_features)
    seen, step = rounded(x, weight), max(1, WIDENED // weight.in_features)
    for first in range(0, weight.out_features, step):
        part = slice(first, first + step)
        made = seen @ dequantize(weight, part).t()
        out[:, part] = made if bias is None else made.add_(bias[part].float())
    return out
