"""Linear layer for a few rows: reads every weight once, at the speed of memory.

For 1 to 8 rows a matrix product is a walk over the weights. One row is multiplied on the ordinary
units, straight from registers; more rows go through matrix instructions, rows padded to 16.
Owns the tile shapes; does not know which layer it is.
"""

# mypy: allow-incomplete-defs

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 8


@dataclass(frozen=True)
class LinearConfig:
    """Tile of the weights of one program, and how it is run."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


_ONE = LinearConfig(8, 1024, 4, 3)
_FEW = LinearConfig(16, 512, 1, 4)


@triton.jit
def _one_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    weight_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * weight_stride
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = begin + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            weight = tl.load(weight_ptr + row + k[None, :], eviction_policy="evict_first")
            x = tl.load(x_ptr + k)
        else:
            weight = tl.load(weight_ptr + row + k[None, :], mask=k[None, :] < K, other=0.0)
            x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        total += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(total, axis=1)
    if BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _few_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    weight_stride,
    out_stride,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, 16)
    weight_ptr += tl.minimum(n, N - 1).to(tl.int64)[:, None] * weight_stride
    total = tl.zeros((BLOCK_N, 16), tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            weight = tl.load(weight_ptr + k[None, :])
        else:
            weight = tl.load(weight_ptr + k[None, :], mask=k[None, :] < K, other=0.0)
        live = (m[None, :] < M) & (k[:, None] < K)
        x = tl.load(x_ptr + m[None, :] * x_stride + k[:, None], mask=live, other=0.0)
        total = tl.dot(weight, x, acc=total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    live = (n[:, None] < N) & (m[None, :] < M)
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[None, :] * out_stride + n[:, None], out, mask=live)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    config: LinearConfig | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` for 1 to 8 rows.

    Args:
        x: [m, in_features], m at most 8; rows may be strided.
        weight: [out_features, in_features], dtype of x; rows may be strided.
        bias: [out_features], dtype of x.
        out: [m, out_features], where to write, in the dtype of x or float32; rows may be strided.
        config: instead of the built-in one, to measure others.

    Returns:
        [m, out_features]; sums in fp32, in a fixed order, rounded once.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``linear_ref``. One launch, compiled per m and weight shape. Does not synchronise;
    safe in CUDA graphs.
    """
    m, k = _check(x, weight, bias)
    n = weight.shape[0]
    if out is None:
        out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    elif out.shape != (m, n) or out.dtype not in (x.dtype, torch.float32) or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit [{m}, {n}] {x.dtype}")
    c = config or linear_config(m, x.element_size())
    grid = (triton.cdiv(n, c.block_n),)
    added = weight if bias is None else bias
    if m == 1:
        _one_kernel[grid](
            x,
            weight,
            added,
            out,
            weight.stride(0),
            N=n,
            K=k,
            BIAS=bias is not None,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            STAGES=c.num_stages,
            num_warps=c.num_warps,
        )
    elif m:
        _few_kernel[grid](
            x,
            weight,
            added,
            out,
            x.stride(0),
            weight.stride(0),
            out.stride(0),
            M=m,
            N=n,
            K=k,
            BIAS=bias is not None,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        )
    return out


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` in plain torch, fp32 throughout, rounded at the end."""
    out = x.float() @ weight.float().T
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)


def linear_config(num_rows: int, element_size: int) -> LinearConfig:
    """The built-in configuration; 4-byte elements get a smaller tile."""
    c = _ONE if num_rows == 1 else _FEW
    if element_size <= 2:
        return c
    return LinearConfig(c.block_n, c.block_k // 4, c.num_warps, 2)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    if x.dim() != 2 or x.stride(1) != 1 or x.shape[0] > MAX_ROWS:
        raise ValueError(f"x must be at most {MAX_ROWS} contiguous rows: {tuple(x.shape)}")
    m, k = x.shape
    if weight.dim() != 2 or weight.shape[1] != k or weight.stride(1) != 1:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}")
    if bias is not None and (
        bias.shape != weight.shape[:1] or bias.dtype != x.dtype or not bias.is_contiguous()
    ):
        raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype} does not fit the weight")
    return m, k
