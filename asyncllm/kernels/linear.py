"""Linear layer for one row: reads every weight once, at memory bandwidth.

The row is multiplied on CUDA cores, straight from registers: a matrix product is a walk
over the weights. Owns the tile shapes; does not know which layer it is.
"""

# mypy: allow-incomplete-defs

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.autotune import launches_early
from asyncllm.kernels.early import begun_early, launched_early


@dataclass(frozen=True)
class LinearConfig:
    """Tile of the weights of one program, and how it is run; ``early`` bytes of each row of it are
    asked for while the kernel before still runs, on devices where that was measured to pay."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    early: int = 0


_ONE = LinearConfig(8, 1024, 4, 3, 2048)


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
    EARLY: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * weight_stride
    if EARLY:
        rows_at = weight_ptr + tl.minimum(n, N - 1).to(tl.int64) * weight_stride
        begun_early(rows_at, 2 * K, EARLY)
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


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    config: LinearConfig | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` for one row.

    Args:
        x: [1, in_features].
        weight: [out_features, in_features], dtype of x; rows may be strided.
        bias: [out_features], dtype of x.
        out: [1, out_features], where to write, in the dtype of x or float32.
        config: overrides the built-in one, for measurements.

    Returns:
        [1, out_features]; sums in fp32, in a fixed order, rounded once.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``linear_ref``. One launch, compiled per weight shape. Does not synchronise;
    safe in CUDA graphs.
    """
    n, k = _check(x, weight, bias)
    if out is None:
        out = torch.empty((1, n), dtype=x.dtype, device=x.device)
    elif out.shape != (1, n) or out.dtype not in (x.dtype, torch.float32) or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit [1, {n}] {x.dtype}")
    c = config or linear_config(x.element_size())
    # what is asked for early is whole pieces of 16 bytes
    whole = k % 8 == 0 and weight.stride(0) % 8 == 0 and weight.data_ptr() % 16 == 0
    fits = whole and x.element_size() == 2 and launches_early(x.device, "product of a row")
    early = c.early if fits else 0
    _one_kernel[(triton.cdiv(n, c.block_n),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        weight.stride(0),
        N=n,
        K=k,
        BIAS=bias is not None,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        STAGES=c.num_stages,
        EARLY=early,
        num_warps=c.num_warps,
        **launched_early(early, x),
    )
    return out


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` in plain torch, fp32 throughout, rounded at the end."""
    out = x.float() @ weight.float().T
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)


def linear_config(element_size: int) -> LinearConfig:
    """The built-in configuration; 4-byte elements get a smaller tile."""
    if element_size <= 2:
        return _ONE
    return LinearConfig(_ONE.block_n, _ONE.block_k // 4, _ONE.num_warps, 2)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    if x.dim() != 2 or x.stride(1) != 1 or len(x) != 1:
        raise ValueError(f"x must be one contiguous row: {tuple(x.shape)}")
    k = x.shape[1]
    if weight.dim() != 2 or weight.shape[1] != k or weight.stride(1) != 1:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}")
    if bias is not None and (
        bias.shape != weight.shape[:1] or bias.dtype != x.dtype or not bias.is_contiguous()
    ):
        raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype} does not fit the weight")
    return len(weight), k
