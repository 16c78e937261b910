"""Matrix products with quantised weights on a CUDA device; chooses the kernel by number of rows.

For few rows, activations stay unquantised and weights are dequantised in registers, which saves a
pass over the activations. For more rows, activations are quantised to 8 bits too, for tensor cores.
For many rows, 4-bit weights are dequantised in memory for the library's matmul. The thresholds
between these are measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncllm.engine import quant_torch
from asyncllm.kernels.autotune import tuned, without_fp8
from asyncllm.kernels.quant.four_bits import HALVES, SPANS, four_bits, pack, pack_scales, widen
from asyncllm.kernels.quant.product import product
from asyncllm.kernels.quant.rows import quantize_rows
from asyncllm.kernels.quant.wide import fits_wide, wide
from asyncllm.models.ops import Activations
from asyncllm.models.quantization import (
    BLOCK,
    KIND_NAMES,
    ROW_FORMS,
    QuantKind,
    QuantRows,
    QuantWeight,
    RowForm,
    ServedKind,
)

WIDENED = 1 << 25  # 4-bit weights dequantised to 16 bits at a time
# Up to so many inputs the library may sum e4m3 products in the 14 bits of the tensor cores' own
# accumulators: a result then loses less there than by being rounded to bfloat16.
FAST_INPUTS = 4096
# one number of rows of each class of each kernel, to cover all that serving may need
_CLASSES = (1, 9, 17, 33, 65, 129, 257, 528)


EIGHT_BITS: dict[RowForm, torch.dtype] = {
    "fp8": torch.float8_e4m3fn,
    "fp8_block": torch.float8_e4m3fn,
    "int8": torch.int8,
}


@dataclass(frozen=True, slots=True)
class KernelThresholds:
    """Up to how many rows each kernel is used.

    Attributes:
        wide: kernel with unquantised activations and weights dequantised in registers.
        own: our 8-bit product; beyond it the library's.
        plain: unquantised activations, even if the preceding kernel could output 8 bits without an
            extra pass; at most ``wide``.
    """

    wide: int
    own: int
    plain: int = 0


_ALL = 1 << 30
_WAYS: dict[QuantKind, KernelThresholds] = {
    "fp8_channel": KernelThresholds(32, 64),
    "fp8_block": KernelThresholds(16, _ALL),
    "int8_channel": KernelThresholds(32, _ALL),
    "int4_group": KernelThresholds(512, 512),
}


def refuse(kinds: Iterable[ServedKind], device: torch.device) -> str | None:
    """Why weights of one of these kinds cannot be served on the device; None: they can."""
    found = next((kind for kind in kinds if kind in ("fp8_channel", "fp8_block")), None)
    if found is None or (name := without_fp8(device)) is None:
        return None
    return (
        f"weights in {KIND_NAMES[found]} are not supported on {name}, which has no 8-bit floats; "
        "--quant_type none serves them in the type of --data_type, w8a8 in int8"
    )


def ways_of(kind: QuantKind, device: torch.device) -> KernelThresholds:
    """The thresholds measured on the device, or those of the table."""
    entry = tuned(device, "quant ways", kind)
    return _WAYS[kind] if entry is None else KernelThresholds(**entry)


def pack_quant(weight: QuantWeight) -> QuantWeight:
    """Convert to the layout of ``quant_linear``: 4-bit weights to that of ``four_bits``."""
    if weight.kind != "int4_group" or not _fits_four_bits(weight):
        return weight
    return QuantWeight(
        weight.kind,
        pack(weight.data, weight.group),
        pack_scales(weight.scales, weight.zeros),
        None,
        weight.group,
        weight.out_features,
        weight.in_features,
    )


def prepare(weight: QuantWeight, dtype: torch.dtype) -> None:
    """Build everything that ``quant_linear`` will use for any number of rows, since the first steps
    do not use all of it."""
    x = torch.zeros(_CLASSES[-1], weight.in_features, dtype=dtype, device=weight.data.device)
    for num_rows in _CLASSES:
        quant_linear(x[:num_rows], weight)
        if (form := row_form(weight, num_rows)) is not None:
            quant_linear(in_8_bits(x[:num_rows], form), weight)


def row_form(weight: QuantWeight, num_rows: int) -> RowForm | None:
    """:meth:`asyncllm.models.ops.Ops.row_form`."""
    form = ROW_FORMS.get(weight.kind)
    if form is None or num_rows <= ways_of(weight.kind, weight.data.device).plain:
        return None
    return form


def quant_bytes(weight: QuantWeight, num_rows: int, itemsize: int) -> int:
    """:meth:`asyncllm.models.ops.Ops.quant_bytes`: rows in 8 bits, or a part of the weight in the
    dtype of activations."""
    width = weight.in_features
    if weight.kind != "int4_group":
        groups = -(-width // BLOCK) if weight.kind == "fp8_block" else 1
        return num_rows * (width + 4 * groups)
    if _is_packed(weight) or _fits_four_bits(weight):
        return min(weight.out_features * width, max(WIDENED, width)) * itemsize
    return quant_torch.quant_bytes(weight, num_rows)


def in_8_bits(x: Tensor, form: RowForm) -> QuantRows:
    """Rows in ``form``, by a pass of their own."""
    made = quantize_rows(x, EIGHT_BITS[form], blocked=form == "fp8_block")
    return QuantRows(form, *made, x.dtype)


def quant_linear(
    x: Activations,
    weight: QuantWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    ways: KernelThresholds | None = None,
) -> Tensor:
    """:meth:`asyncllm.models.ops.Ops.quant_linear` for a weight converted by ``pack_quant``.

    ``ways`` overrides the device's thresholds, to measure others. Does not synchronise; safe in
    CUDA graphs.
    """
    if out is None:
        shape = len(x), weight.out_features
        out = torch.empty(shape, dtype=x.dtype, device=weight.data.device)
    ways = ways or ways_of(weight.kind, weight.data.device)
    form, data, scales = ROW_FORMS.get(weight.kind), weight.data, weight.scales
    if isinstance(x, Tensor):
        if form is None:
            return _of_four_bits(x, weight, bias, out, ways)
        if len(x) <= ways.wide and fits_wide(x):
            return wide(x, data, scales, bias, out=out)
        x = in_8_bits(x, form)
    assert x.form == form, f"rows in {x.form} for weights of kind {weight.kind}"
    if len(x) <= ways.own or not _fits_library(weight, out):
        return product(x.values, x.scales, data, scales, bias, out=out)
    return _library(x, weight, bias, out)


def _of_four_bits(
    x: Tensor, weight: QuantWeight, bias: Tensor | None, out: Tensor, ways: KernelThresholds
) -> Tensor:
    data, scales = weight.data, weight.scales
    if not _is_packed(weight):  # groups that the kernel does not know
        return quant_torch.quant_linear(x, weight, bias, out)
    if len(x) <= ways.own:
        return four_bits(x, data, scales, bias, out=out)
    step = min(weight.out_features, max(1, WIDENED // weight.in_features))
    space = torch.empty((step, weight.in_features), dtype=x.dtype, device=x.device)
    for first in range(0, weight.out_features, step):
        made = out[:, first : first + step]
        part = widen(data, scales, first, space[: made.shape[1]])
        torch.mm(x, part.t(), out=made)
    return out if bias is None else out.add_(bias)


def _fits_four_bits(weight: QuantWeight) -> bool:
    """Whether the kernel knows such groups."""
    return weight.group % SPANS[-1] == 0 and weight.scales.dtype in HALVES


def _is_packed(weight: QuantWeight) -> bool:
    return weight.data.dtype == torch.int16


def _fits_library(weight: QuantWeight, out: Tensor) -> bool:
    """Whether ``torch._scaled_mm`` supports this product."""
    if out.dtype != torch.bfloat16 or weight.out_features % 16 or weight.in_features % 16:
        return False
    if weight.kind == "fp8_block":
        return len(out) % 4 == 0 and weight.in_features % (4 * BLOCK) == 0
    return weight.kind == "fp8_channel"


def _library(x: QuantRows, weight: QuantWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    scales = (x.scales[:, None], weight.scales[None, :])
    if weight.kind == "fp8_block":
        scales = (x.scales.t(), weight.scales.t())
    made = torch._scaled_mm(
        x.values,
        weight.data.t(),
        *scales,
        bias,
        out_dtype=out.dtype,
        use_fast_accum=weight.kind == "fp8_channel" and weight.in_features <= FAST_INPUTS,
        out=out if out.is_contiguous() else None,
    )
    return out if out.is_contiguous() else out.copy_(made)
