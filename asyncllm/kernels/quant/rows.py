"""Quantises rows of activations to 8 bits, with one scale per row, or per 128 columns.

Owns how they are rounded, and that the norm or the activation before it needs no pass of its own;
does not know what the rows are multiplied with.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.kv8 import KINDS, quantized
from asyncllm.kernels.autotune import launches_early, num_sms
from asyncllm.kernels.early import begun, launched_early
from asyncllm.kernels.gated import activated, gated_ref
from asyncllm.kernels.rmsnorm import add_rmsnorm_ref, rmsnorm_ref

BLOCK = 128  # columns that share a scale where a row has several; of weights outputs, too
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_NAMES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
LEAST = 1e-12  # scale; that of zeros may be anything
_PIECE = 2048  # columns of an activation that a program makes of few rows


@triton.jit
def _in_8_bits(x, most, KIND: tl.constexpr):
    """(values, scales) of float32 rows [GROUPS, SIZE], each with one scale, whose largest
    magnitudes are ``most``."""
    largest: tl.constexpr = 127.0 if KIND == 1 else 448.0
    scale = tl.maximum(tl.div_rn(most, tl.full(most.shape, largest, tl.float32)), 1e-12)
    if KIND == 1:
        divided = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        values = ((divided + 12582912.0) - 12582912.0).to(tl.int8)  # half to even
    else:
        values = quantized(x, tl.broadcast_to(scale[:, None], x.shape), KIND)
    return values, scale


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    x_row,
    residual_row,
    eps,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BEFORE: tl.constexpr,
    GELU: tl.constexpr,
    KIND: tl.constexpr,
    BLOCKED: tl.constexpr,
    ROW: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A piece of a row, [GROUPS, SIZE] with what is missing after its WIDTH columns. Pieces of an
    activation with one scale need the largest of ROW columns, that is all: each finds it itself."""
    begun(EARLY)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * GROUPS
    column = (first + tl.arange(0, GROUPS))[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    live = column < WIDTH
    x_at = x_ptr + row * x_row + column
    x = tl.load(x_at, mask=live, other=0.0)
    if BEFORE == "gated":
        x = activated(x, tl.load(x_at + WIDTH, mask=live, other=0.0), GELU)
    wide = x.to(tl.float32)
    if BEFORE == "norm" or BEFORE == "add_norm":
        if BEFORE == "add_norm":
            residual_at = residual_ptr + row * residual_row + column
            residual = tl.load(residual_at, mask=live, other=0.0)
            total = (wide + residual.to(tl.float32)).to(residual.dtype)
            tl.store(residual_at, total, mask=live)
            wide = total.to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=live, other=0.0)
        scale = tl.rsqrt(tl.sum(tl.sum(wide * wide, axis=1), axis=0) / WIDTH + eps)
        # rounded as a norm of its own rounds
        normed = (wide * scale).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
        wide = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
    if ROW > GROUPS * SIZE and not BLOCKED:
        every = tl.arange(0, ROW)
        gate = tl.load(x_ptr + row * x_row + every, mask=every < WIDTH, other=0.0)
        up = tl.load(x_ptr + row * x_row + WIDTH + every, mask=every < WIDTH, other=0.0)
        largest = tl.max(tl.abs(activated(gate, up, GELU).to(tl.float32)), axis=0)
        most = tl.full([GROUPS], 0.0, tl.float32) + largest
    else:
        most = tl.max(tl.abs(wide), axis=1)
    values, scales = _in_8_bits(wide, most, KIND)
    tl.store(values_ptr + row * WIDTH + column, values, mask=live)
    group = first + tl.arange(0, GROUPS)
    if BLOCKED:
        tl.store(
            scales_ptr + group.to(tl.int64) * num_rows + row, scales, mask=group * SIZE < WIDTH
        )
    else:
        tl.store(scales_ptr + row + group, scales, mask=group == 0)


def config_name(kind: torch.dtype, blocked: bool) -> str:
    """Of products with such weights, in tables of configurations."""
    return f"{_NAMES[kind]}{' block' if blocked else ''}"


def quantize_rows(x: Tensor, kind: torch.dtype, *, blocked: bool = False) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits.

    Args:
        x: [num_rows, width]; rows may be strided, the last dimension is contiguous.
        kind: torch.float8_e4m3fn or torch.int8.
        blocked: each 128 columns of a row have a scale of their own.

    Returns:
        [num_rows, width] of ``kind``, rounded to the nearest, halves to even; float32 scales
        [num_rows], or [ceil(width / 128), num_rows] where ``blocked``: the largest magnitude by
        448 or 127.

    Raises:
        ValueError: another kind, or shapes or strides that do not fit.

    Reference: ``quantize_rows_ref``. Does not synchronise; safe in CUDA graphs.
    """
    return _launch(x, x.shape[-1], kind, blocked, "nothing")


def rmsnorm_rows(
    x: Tensor,
    weight: Tensor,
    eps: float,
    kind: torch.dtype,
    *,
    residual: Tensor | None = None,
    blocked: bool = False,
) -> tuple[Tensor, Tensor]:
    """``quantize_rows`` of ``rmsnorm(x, weight, eps)``.

    Args:
        residual: [num_rows, width] in the dtype of x: x is added to it in place, and the norm is
            that of the sum.

    Raises:
        ValueError: another kind, or shapes, dtypes or strides that do not fit.

    Reference: ``rmsnorm_rows_ref``. Does not synchronise; safe in CUDA graphs.
    """
    if weight.shape != x.shape[1:] or weight.dtype not in {x.dtype, torch.float32}:
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit x")
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(-1) != 1
    ):
        raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} does not fit x")
    before = "norm" if residual is None else "add_norm"
    return _launch(x, x.shape[-1], kind, blocked, before, residual, weight, eps)


def gated_rows(
    x: Tensor, activation: str, kind: torch.dtype, *, blocked: bool = False
) -> tuple[Tensor, Tensor]:
    """``quantize_rows`` of ``gated(x, activation)``: x is [num_rows, 2 * width].

    Raises:
        ValueError: another kind or activation, or shapes or strides that do not fit.

    Reference: ``gated_rows_ref``. Does not synchronise; safe in CUDA graphs.
    """
    if activation not in ("silu", "gelu_tanh") or x.shape[-1] % 2:
        raise ValueError(f"activation {activation!r} of rows of {x.shape[-1]}")
    return _launch(x, x.shape[-1] // 2, kind, blocked, "gated", gelu=activation == "gelu_tanh")


def quantize_rows_ref(
    x: Tensor, kind: torch.dtype, *, blocked: bool = False
) -> tuple[Tensor, Tensor]:
    """``quantize_rows`` in plain torch."""
    width = x.shape[-1]
    wide = x.float()
    if blocked:
        wide = torch.nn.functional.pad(wide, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    most = wide.abs().amax(-1)
    # by a tensor: CUDA multiplies by the reciprocal of a number, which may be off by a bit
    scales = (most / torch.full_like(most, LARGEST[kind])).clamp_min(LEAST)
    divided = wide / scales.unsqueeze(-1)
    if kind == torch.int8:
        divided = divided.round()
    if blocked:
        return divided.flatten(-2)[:, :width].to(kind), scales.t()
    return divided.to(kind), scales


def rmsnorm_rows_ref(
    x: Tensor,
    weight: Tensor,
    eps: float,
    kind: torch.dtype,
    *,
    residual: Tensor | None = None,
    blocked: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rmsnorm_rows`` in plain torch; leaves its inputs alone."""
    normed = (
        rmsnorm_ref(x, weight, eps)
        if residual is None
        else add_rmsnorm_ref(x, residual, weight, eps)[0]
    )
    return quantize_rows_ref(normed, kind, blocked=blocked)


def gated_rows_ref(
    x: Tensor, activation: str, kind: torch.dtype, *, blocked: bool = False
) -> tuple[Tensor, Tensor]:
    """``gated_rows`` in plain torch."""
    return quantize_rows_ref(gated_ref(x, activation), kind, blocked=blocked)


def _launch(
    x: Tensor,
    width: int,
    kind: torch.dtype,
    blocked: bool,
    before: str,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    gelu: bool = False,
) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or x.stride(1) != 1 or width == 0:
        raise ValueError(f"x must be rows: {tuple(x.shape)}")
    if kind not in LARGEST:
        raise ValueError(f"{kind} is not one of {', '.join(map(str, LARGEST))}")
    num_rows = len(x)
    values = torch.empty((num_rows, width), dtype=kind, device=x.device)
    shape = (triton.cdiv(width, BLOCK), num_rows) if blocked else (num_rows,)
    scales = torch.empty(shape, dtype=torch.float32, device=x.device)
    block = piece = triton.next_power_of_2(max(width, BLOCK))
    pieces = triton.cdiv(width, _PIECE)
    # one program to a row is bound by its instructions; several find the largest each
    if before == "gated" and (blocked or num_rows * pieces <= 2 * num_sms(x.device)):
        piece = min(block, _PIECE)
    warps = block if piece < block and not blocked else piece
    early = launches_early(x.device, "rows in 8 bits")
    if num_rows:
        _rows_kernel[(num_rows, triton.cdiv(width, piece))](
            x,
            residual,
            weight,
            values,
            scales,
            num_rows,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            WIDTH=width,
            GROUPS=piece // BLOCK if blocked else 1,
            SIZE=BLOCK if blocked else piece,
            BEFORE=before,
            GELU=gelu,
            KIND=KINDS[kind],
            BLOCKED=blocked,
            ROW=block,
            EARLY=early,
            num_warps=4 if warps <= 2048 else 8 if warps <= 8192 else 16,
            **launched_early(early, x),
        )
    return values, scales
