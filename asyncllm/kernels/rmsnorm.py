"""RMS norm, alone and fused with the residual addition.

Owns the rounding order of the norm; does not know layers or models.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.autotune import launches_early
from asyncllm.kernels.early import begun, launched_early


@triton.jit
def _rmsnorm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    begun(EARLY)
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < HIDDEN
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        # the sum is rounded to the residual's dtype before the norm sees it, as an unfused add does
        residual = tl.load(residual_ptr + row * residual_stride + col, mask=mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * residual_stride + col, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    normed = (x * scale).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * out_stride + col, normed.to(out_ptr.dtype.element_ty), mask=mask)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Root-mean-square norm of each row, times ``weight``.

    Args:
        x: [num_tokens, hidden]; rows may be strided, the last dimension is contiguous.
        weight: [hidden], dtype of x or float32.
        eps: added to the mean square.
        out: where to write, [num_tokens, hidden]; may be ``x`` itself.

    Returns:
        [num_tokens, hidden] in the dtype of x: normalised in fp32, rounded to the weight's dtype,
        then multiplied (the order of the Hugging Face implementations).

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``rmsnorm_ref``. Does not synchronise; safe in CUDA graphs.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _launch(x, None, weight, eps, out)
    return out


def add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``residual += x`` in place, then the RMS norm of the sum.

    Args:
        x: [num_tokens, hidden].
        residual: [num_tokens, hidden], same dtype; overwritten with the sum.
        weight, eps: as in ``rmsnorm``.
        out: where to write the normed rows; may be ``x``, must not be ``residual``.

    Returns:
        (normed [num_tokens, hidden], residual).

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``add_rmsnorm_ref``. Does not synchronise; safe in CUDA graphs.
    """
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(-1) != 1:
        raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} does not fit x")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _launch(x, residual, weight, eps, out)
    return out, residual


def rmsnorm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rmsnorm`` in plain torch."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(weight.dtype) * weight).to(x.dtype)


def add_rmsnorm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``add_rmsnorm`` in plain torch; leaves its inputs alone."""
    total = residual + x
    return rmsnorm_ref(total, weight, eps), total


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"x must be [tokens, hidden] with contiguous rows: {tuple(x.shape)}")
    num_tokens, hidden = x.shape
    fits = weight.dtype in {x.dtype, torch.float32} and weight.stride(0) == 1
    if weight.shape != (hidden,) or not fits:
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {hidden}")
    if out.shape != x.shape or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit x {tuple(x.shape)}")
    if num_tokens == 0:
        return
    block = triton.next_power_of_2(hidden)
    early = launches_early(x.device, "norm")
    _rmsnorm_kernel[(num_tokens,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        ADD=residual is not None,
        EARLY=early,
        num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        **launched_early(early, x),
    )
