"""Matrix products with quantised weights in plain torch.

Computes what :class:`asyncllm.models.quantization.QuantWeight` defines, dequantising a part of the
weight at a time; used on the CPU, and as the reference of kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncllm.models.ops import Activations
from asyncllm.models.quantization import (
    BLOCK,
    INT4_ZERO,
    ROW_FORMS,
    QuantRows,
    QuantWeight,
    RowForm,
)
from asyncllm.models.quantize import quantize_rows as quantize_rows

WIDENED = 1 << 22  # elements of a weight dequantised to float32 at a time


def in_8_bits(x: Tensor, form: RowForm) -> QuantRows:
    """x [T, width] in ``form``."""
    if form == "fp8_block":
        width = x.shape[-1]
        groups = torch.nn.functional.pad(x, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
        values, scales = quantize_rows(groups, torch.float8_e4m3fn)
        made = values.flatten(-2)[:, :width].contiguous()
        return QuantRows(form, made, scales.squeeze(-1).t().contiguous(), x.dtype)
    kind = torch.int8 if form == "int8" else torch.float8_e4m3fn
    values, scales = quantize_rows(x, kind)
    return QuantRows(form, values, scales.squeeze(-1), x.dtype)


def rounded(x: Activations, weight: QuantWeight) -> Tensor:
    """x [T, in] in float32 as ``weight`` sees it: by way of fp8 or int8, or as it is."""
    form = ROW_FORMS.get(weight.kind)
    if isinstance(x, Tensor):
        if form is None:
            return x.float()
        x = in_8_bits(x, form)
    assert x.form == form, f"rows in {x.form} for weights of kind {weight.kind}"
    scales = x.scales.unsqueeze(-1)
    if form == "fp8_block":
        scales = x.scales.t().repeat_interleave(BLOCK, 1)[:, : weight.in_features]
    return x.values.float().mul_(scales)


def dequantize(weight: QuantWeight, rows: slice = slice(None)) -> Tensor:
    """Dequantise some rows of the matrix to float32."""
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


def quant_bytes(weight: QuantWeight, num_rows: int) -> int:
    """:meth:`asyncllm.models.ops.Ops.quant_bytes`: rows in float32 while they come to 8 bits and
    from there, a part of the weight and the result of it."""
    width, step = weight.in_features, max(1, WIDENED // weight.in_features)
    rows = num_rows * (13 * (width + BLOCK) + 4 * min(step, weight.out_features))
    return rows + 10 * min(step, weight.out_features) * width


def quant_linear(
    x: Activations, weight: QuantWeight, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """:meth:`asyncllm.models.ops.Ops.quant_linear`."""
    if out is None:
        shape = len(x), weight.out_features
        out = torch.empty(shape, dtype=x.dtype, device=weight.data.device)
    seen, step = rounded(x, weight), max(1, WIDENED // weight.in_features)
    for first in range(0, weight.out_features, step):
        part = slice(first, first + step)
        made = seen @ dequantize(weight, part).t()
        out[:, part] = made if bias is None else made.add_(bias[part].float())
    return out
