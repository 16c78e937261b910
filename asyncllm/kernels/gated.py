"""Gated activation of an MLP: silu or gelu of gate, times up, over a fused [gate | up] row.

Owns the rounding order of the activation; does not know the projections around it.
"""

# mypy: allow-incomplete-defs

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import gelu, silu

from asyncllm.kernels.autotune import launches_early
from asyncllm.kernels.early import begun, launched_early

_BLOCK = 1024
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


@triton.jit
def activated(gate, up, GELU: tl.constexpr):
    """activation(gate) * up; silu, or gelu approximated by tanh."""
    wide = gate.to(tl.float32)
    if GELU:
        # x * (1 + tanh(t)) / 2 = x * sigmoid(2 t)
        inner = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
    else:
        inner = wide
    # rounded before the product, as two separate torch operations do
    active = (wide / (1.0 + tl.exp(-inner))).to(gate.dtype)
    return (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _gated_kernel(
    x_ptr,
    out_ptr,
    x_stride,
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    EARLY: tl.constexpr,
):
    begun(EARLY)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < WIDTH
    gate = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0)
    up = tl.load(x_ptr + row * x_stride + WIDTH + col, mask=mask, other=0.0)
    tl.store(out_ptr + row * out_stride + col, activated(gate, up, GELU), mask=mask)


def gated(x: Tensor, activation: str = "silu", out: Tensor | None = None) -> Tensor:
    """``activation(x[:, :width]) * x[:, width:]`` for rows of twice ``width`` elements.

    Args:
        x: [num_tokens, 2 * width]; rows may be strided, the last dimension is contiguous.
        activation: silu, or gelu_tanh (Hendrycks and Gimpel, 2016, §2, the approximation by tanh).
        out: where to write, [num_tokens, width]; must not overlap x.

    Returns:
        [num_tokens, width]; the activation in fp32, rounded to the dtype, then multiplied.

    Raises:
        ValueError: another activation, odd width, or shapes, dtypes or strides that do not fit.

    Reference: ``gated_ref``. Does not synchronise; safe in CUDA graphs.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: one of {', '.join(_ACTIVATIONS)} expected")
    if x.dim() != 2 or x.shape[1] % 2 or x.stride(1) != 1:
        raise ValueError(f"x must be [tokens, 2 * width] with contiguous rows: {tuple(x.shape)}")
    num_tokens, width = x.shape[0], x.shape[1] // 2
    if out is None:
        out = torch.empty((num_tokens, width), dtype=x.dtype, device=x.device)
    elif out.shape != (num_tokens, width) or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit x {tuple(x.shape)}")
    if num_tokens and width:
        early = launches_early(x.device, "activation")
        grid = (num_tokens, triton.cdiv(width, _BLOCK))
        _gated_kernel[grid](
            x,
            out,
            x.stride(0),
            out.stride(0),
            WIDTH=width,
            BLOCK=_BLOCK,
            GELU=activation == "gelu_tanh",
            EARLY=early,
            num_warps=4,
            **launched_early(early, x),
        )
    return out


def gated_ref(x: Tensor, activation: str = "silu") -> Tensor:
    """``gated`` in plain torch."""
    gate, up = x.chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate.float()).to(x.dtype) * up
