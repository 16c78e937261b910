"""Products of rows with 4-bit weights, dequantised in registers: limited by memory bandwidth.

Owns the layout in which four columns of a weight share 16 bits (``pack``): masks alone extract
pairs of operands, and the columns of an operand are neighbours. Does not know how weights were
quantised.
"""

# mypy: allow-incomplete-defs, disable-error-code="possibly-undefined"

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.autotune import tuned
from asyncllm.kernels.early import begun_early, launched_early
from asyncllm.kernels.quant.parts import divided, gathered, row_class_of

HALVES = {torch.float16: 1024.0, torch.bfloat16: 128.0}  # exponents that numbers stand behind
SPANS = (64, 32)  # columns of an operand, which share 16 bits with three times as many


@dataclass(frozen=True, slots=True)
class FourBitsConfig:
    """How a product is built and divided: rows of x and outputs of a tile; inputs are divided until
    there are ``per_sm`` programs to a multiprocessor (0: never); ``early`` bytes of each weight's
    row are asked for while the kernel before still runs."""

    rows: int
    block_n: int
    num_warps: int
    num_stages: int
    per_sm: int = 0
    early: int = 0


# up to so many rows -> configuration; one class more: many
_CONFIGS = {
    # 32 outputs to a warp, which take a third fewer instructions than twice 16
    "8": FourBitsConfig(8, 64, 2, 3, 4),
    "16": FourBitsConfig(16, 64, 2, 3, 4),
    "32": FourBitsConfig(32, 64, 4, 4, 3),
    "64": FourBitsConfig(64, 64, 4, 3, 2),
    "many": FourBitsConfig(128, 128, 8, 2, 1),
}
row_class = partial(row_class_of, _CONFIGS)


@triton.constexpr_function
def _shifted(quarter, rest):
    """Instructions that give the nibbles of two numbers behind an exponent, and ``rest``."""
    shift = f"shr.u32 t, $1, {4 * quarter};" if quarter else "mov.b32 t, $1;"
    return f"{{ .reg .b32 t, a, one; mov.b32 one, 0x3f803f80; {shift} {rest} }}"


@triton.jit
def _quarter(packed, less, QUARTER: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
    """(nibble QUARTER of each of int16 ``packed``) + (128 or 1024) + ``less``, as ``dtype``,
    exactly: 128 with bfloat16."""
    # the bits of a number behind the exponent of 2^7 or 2^10
    if ASM and dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            _shifted(
                QUARTER,
                "lop3.b32 a, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, a, one, $2;",
            ),
            "=r,r,r",
            [packed, less],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif ASM:
        wide = tl.inline_asm_elementwise(
            _shifted(QUARTER, "lop3.b32 a, t, 0x000f000f, 0x64006400, 0xea; add.f16x2 $0, a, $2;"),
            "=r,r,r",
            [packed, less],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        offset: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        number = ((packed >> (4 * QUARTER)) & 15).to(tl.float32) + offset
        wide = (number + less.to(tl.float32)).to(dtype)
    return wide


@triton.jit
def _scale_of(scales_ptr, group, n_at, n_size, dtype: tl.constexpr):
    """(float32 scale, what is to be added to a number behind its exponent) of outputs in a group:
    both are in 32 bits."""
    both = tl.load(scales_ptr + group.to(tl.int64) * n_size + n_at)
    scale = both.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return scale, (both >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit(do_not_specialize=["num_rows"])
def _four_bits_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_rows,
    n_size,
    k_size,
    x_row,
    out_row,
    SPAN: tl.constexpr,
    SCALED: tl.constexpr,
    RUN: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rows [ROWS] of x times a tile of weights [BLOCK_N, k_size], or a part of its inputs. A scale
    is that of SCALED columns, the same in RUN spans of a step."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row_tiles = tl.cdiv(num_rows, ROWS)
    tile = tl.program_id(0) // row_tiles  # neighbours share a tile of weights
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    used, kept = row < num_rows, n < n_size
    span = tl.arange(0, SPAN)
    x_at = x_ptr + row.to(tl.int64)[None, :] * x_row + span[:, None]
    steps = tl.cdiv(k_size, 4 * SPAN)
    # outputs past the last are computed like it and not stored
    n_at = tl.minimum(n, n_size - 1)
    w_row = weight_ptr + n_at.to(tl.int64) * (steps * SPAN)
    w_at = w_row[:, None] + span[None, :]
    part, parts = tl.program_id(1), tl.num_programs(1)
    begin, end = steps * part // parts, steps * (part + 1) // parts
    if EARLY:
        begun_early(w_row + begin * SPAN, (end - begin) * (2 * SPAN), EARLY)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        packed = tl.load(w_at + step * SPAN)
        for quarter in tl.static_range(4):
            first = (step * 4 + quarter) * SPAN
            if WHOLE:
                x = tl.load(x_at + first, mask=used[None, :], other=0.0)
            else:  # columns past the last may be anything, x there is zero
                live = used[None, :] & (first + span < k_size)[:, None]
                x = tl.load(x_at + first, mask=live, other=0.0)
            if quarter % RUN == 0:
                group = tl.minimum(first, k_size - 1) // SCALED
                scale, less = _scale_of(scales_ptr, group, n_at, n_size, dtype)
            weight = _quarter(packed, less[:, None], quarter, ASM, dtype)
            if quarter % RUN == 0:
                made = tl.dot(weight, x)
            else:
                made = tl.dot(weight, x, made)
            if quarter % RUN == RUN - 1:
                acc += made * scale[:, None]
    if SPLIT:
        acc, last = gathered(acc, partial_ptr, counters_ptr)
    else:
        last = True
    if last:
        if BIAS:
            acc += tl.load(bias_ptr + n_at).to(tl.float32)[:, None]
        out_at = out_ptr + row.to(tl.int64)[:, None] * out_row + n[None, :]
        tl.store(out_at, tl.trans(acc).to(dtype), mask=used[:, None] & kept[None, :])


@triton.jit(do_not_specialize=["first_row", "last_row"])
def _widen_kernel(
    weight_ptr,
    scales_ptr,
    out_ptr,
    first_row,
    last_row,
    n_size,
    k_size,
    SPAN: tl.constexpr,
    SCALED: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of the matrix from ``first_row`` to before ``last_row``, of one run of four spans."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    made = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = first_row + made
    kept = n < last_row
    n_at = tl.minimum(n, n_size - 1)
    step = tl.program_id(1)
    span = tl.arange(0, SPAN)
    steps = tl.num_programs(1)
    packed = tl.load(weight_ptr + n_at.to(tl.int64)[:, None] * (steps * SPAN) + step * SPAN + span)
    for quarter in tl.static_range(4):
        first = (step * 4 + quarter) * SPAN
        group = tl.minimum(first, k_size - 1) // SCALED
        scale, less = _scale_of(scales_ptr, group, n_at, n_size, dtype)
        wide = _quarter(packed, less[:, None], quarter, ASM, dtype).to(tl.float32) * scale[:, None]
        at = out_ptr + made.to(tl.int64)[:, None] * k_size + (first + span)[None, :]
        live = kept[:, None] & (first + span < k_size)[None, :]
        tl.store(at, wide.to(dtype), mask=live)


def four_bits(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    config: FourBitsConfig | None = None,
) -> Tensor:
    """x times a matrix in 4 bits, plus ``bias``.

    Args:
        x: [num_rows, in], 16-bit floats; rows may be strided.
        weight: what ``pack`` gives, [out, steps * span] int16.
        scales: what ``pack_scales`` gives of those in the dtype of x, [in / group, out] int32; a
            group is whole spans.
        bias: [out] in the dtype of x.
        out: where to write, [num_rows, out] in the dtype of x; rows may be strided.
        config: instead of the tuned or built-in one.

    Returns:
        ``out``: weights without their scale are exact in the dtype of x, sums in float32, times
        scales in float32, rounded once. Rows of one class of numbers of rows come out the same
        whatever is beside them.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``four_bits_ref``. Does not synchronise; safe in CUDA graphs. Products of a stream
    must not run at the same time.
    """
    num_rows, n, k, span = _check(x, weight, scales, bias, out)
    if num_rows == 0 or n == 0:
        return out
    c = config or four_bits_config(num_rows, x.device)
    steps = weight.shape[1] // span
    grid, added, counters = divided(num_rows, n, steps, c, row_class(num_rows), x.device)
    scaled, early = k // len(scales), c.early if x.device.type != "cpu" else 0
    aligned = scaled % (4 * span) == 0 or (4 * span) % scaled == 0
    _four_bits_kernel[grid](
        x,
        weight,
        scales,
        bias,
        out,
        added,
        counters,
        num_rows,
        n,
        k,
        x.stride(0),
        out.stride(0),
        SPAN=span,
        SCALED=scaled,
        RUN=min(4, scaled // span) if aligned else 1,
        BIAS=bias is not None,
        WHOLE=k % (4 * span) == 0,
        ASM=x.device.type != "cpu",
        ROWS=c.rows,
        BLOCK_N=c.block_n,
        STAGES=c.num_stages,
        SPLIT=added is not None,
        EARLY=early,
        num_warps=c.num_warps,
        **launched_early(early, x),
    )
    return out


def widen(weight: Tensor, scales: Tensor, first: int, out: Tensor) -> Tensor:
    """Rows of the matrix from ``first`` on, as many as fit into ``out`` [n, in], contiguous, which
    is returned; rounded once to its dtype. The rest as ``four_bits`` takes it.

    Reference: ``widen_ref``. Does not synchronise; safe in CUDA graphs.
    """
    n, k = scales.shape[1], out.shape[1]
    span = _span(weight.shape[1], k, k // len(scales))
    block_n = 32
    _widen_kernel[(triton.cdiv(len(out), block_n), weight.shape[1] // span)](
        weight,
        scales,
        out,
        first,
        min(n, first + len(out)),
        n,
        k,
        SPAN=span,
        SCALED=k // len(scales),
        ASM=out.device.type != "cpu",
        BLOCK_N=block_n,
        num_warps=4,
    )
    return out


def pack(nibbles: Tensor, group: int) -> Tensor:
    """The layout of ``four_bits``; start-up only.

    Args:
        nibbles: uint8 [out, in / 2]: the low half of byte b is column 2 b, the other one 2 b + 1.
        group: columns that share a scale, a multiple of 32.

    Returns:
        int16 [out, steps * span]: number j of step s has column 4 * span * s + q * span + j in its
        bits from 4 * q on. The columns of the last step that there are not are zero.
    """
    n, k = len(nibbles), 2 * nibbles.shape[1]
    span = best_span(k, group)
    columns = torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(1)
    columns = torch.nn.functional.pad(columns, (0, -k % (4 * span)))
    parts = columns.view(n, -1, 4, span).to(torch.int32).unbind(2)
    whole = parts[0] | parts[1] << 4 | parts[2] << 8 | parts[3] << 12
    return whole.to(torch.int16).flatten(1)


def pack_scales(scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Scales and zeros in 32 bits each, so that they are read together; start-up only.

    Args:
        scales: [in / group, out], float16 or bfloat16.
        zeros: like scales, whole numbers from 0 to 16; None: 8.

    Returns:
        int32 [in / group, out]: the scale's bits below, those of minus (128 or, with float16, 1024,
        plus the zero) above.
    """
    zeros = torch.full_like(scales, 8) if zeros is None else zeros
    less = (-HALVES[scales.dtype] - zeros.float()).to(scales.dtype)
    low, high = (x.contiguous().view(torch.int16).to(torch.int32) for x in (scales, less))
    return (low & 0xFFFF) | (high << 16)


def best_span(columns: int, group: int) -> int:
    """The width of operands of a matrix of so many columns, in groups.

    Raises:
        ValueError: a group is no multiple of 32.
    """
    for span in SPANS:
        if group % span == 0 and (columns % (4 * span) == 0 or span == SPANS[-1]):
            return span
    raise ValueError(f"groups of {group} columns: a multiple of {SPANS[-1]} expected")


def widen_ref(weight: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The whole matrix [out, columns] in float32, in plain torch; scales are in ``dtype``."""
    group = columns // len(scales)
    span = _span(weight.shape[1], columns, group)
    parts = [(weight.to(torch.int32) >> (4 * quarter)) & 15 for quarter in range(4)]
    numbers = torch.stack([part.view(len(weight), -1, span) for part in parts], 2)
    wide = numbers.flatten(1)[:, :columns].float()
    low, high = (x.to(torch.int16).view(dtype).float() for x in (scales, scales >> 16))
    of = torch.arange(columns, device=weight.device) // group
    return (wide + (HALVES[dtype] + high)[of].t()) * low[of].t()


def four_bits_ref(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """``four_bits`` in plain torch, products and sums in float32."""
    out = x.float() @ widen_ref(weight, scales, x.shape[1], x.dtype).t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def four_bits_config(num_rows: int, device: torch.device) -> FourBitsConfig:
    """The configuration for so many rows: the device's tuned one or that of the table."""
    size = row_class(num_rows)
    entry = tuned(device, "quant", f"int4 {size}")
    return _CONFIGS[size] if entry is None else FourBitsConfig(**entry)


def _span(words: int, columns: int, group: int) -> int:
    span = best_span(columns, group)
    if words != triton.cdiv(columns, 4 * span) * span:
        raise ValueError(f"weight of {words} words does not fit {columns} columns")
    return span


def _check(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
) -> tuple[int, int, int, int]:
    if x.dim() != 2 or x.stride(1) != 1 or x.dtype not in HALVES:
        raise ValueError(f"x must be rows in 16 bits: {tuple(x.shape)} {x.dtype}")
    num_rows, k = x.shape
    n = len(weight)
    if weight.dim() != 2 or weight.dtype != torch.int16 or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} is not packed")
    if scales.dim() != 2 or scales.shape[1] != n or len(scales) == 0 or k % len(scales):
        raise ValueError(f"scales {tuple(scales.shape)} do not fit {n} x {k}")
    if scales.dtype != torch.int32 or not scales.is_contiguous():
        raise ValueError(f"scales {scales.dtype} are not packed")
    span = _span(weight.shape[1], k, k // len(scales))
    if bias is not None and (
        bias.shape != (n,) or bias.dtype != x.dtype or not bias.is_contiguous()
    ):
        raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype} does not fit the weight")
    if out.shape != (num_rows, n) or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit [{num_rows}, {n}]")
    return num_rows, n, k, span
