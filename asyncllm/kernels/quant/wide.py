"""Products of few unquantised rows with 8-bit weights, which are dequantised in registers.

Limited by memory bandwidth, without a pass that quantises the rows. Owns the tiles; does not know
how weights were quantised.
"""

# mypy: allow-incomplete-defs, disable-error-code="possibly-undefined"

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.kv8 import KINDS, halves
from asyncllm.kernels.autotune import tuned
from asyncllm.kernels.early import begun_early, launched_early
from asyncllm.kernels.quant.parts import divided, gathered, row_class_of
from asyncllm.kernels.quant.rows import BLOCK, config_name


@dataclass(frozen=True, slots=True)
class WideConfig:
    """How a product is built and divided: rows of x and outputs of a tile, inputs of a step; inputs
    are divided until there are ``per_sm`` programs to a multiprocessor (0: never); ``early`` bytes
    of each weight's row are asked for while the kernel before still runs."""

    rows: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    per_sm: int = 0
    early: int = 0


# up to so many rows -> configuration; one class more: many
_CONFIGS = {
    "8": WideConfig(8, 64, 128, 4, 5, 3),
    "16": WideConfig(16, 64, 128, 4, 5, 3),
    "many": WideConfig(32, 64, 128, 4, 4, 3),
}
row_class = partial(row_class_of, _CONFIGS)


@triton.jit(do_not_specialize=["num_rows"])
def _wide_kernel(
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
    KIND: tl.constexpr,
    BLOCKED: tl.constexpr,
    BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rows [ROWS] of x times a tile of weights [BLOCK_N, k_size], or a part of its inputs. x and
    weights are read as pairs of neighbours; k_size and x_row count these."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    PAIRS: tl.constexpr = BLOCK_K // 2
    row_tiles = tl.cdiv(num_rows, ROWS)
    tile = tl.program_id(0) // row_tiles  # neighbours share a tile of weights
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    used, kept = row < num_rows, n < n_size
    k = tl.arange(0, PAIRS)
    x_at = x_ptr + row.to(tl.int64)[None, :] * x_row + k[:, None]
    # outputs past the last are computed like it and not stored
    n_at = tl.minimum(n, n_size - 1)
    w_at = weight_ptr + n_at.to(tl.int64)[:, None] * k_size + k[None, :]
    steps = tl.cdiv(k_size, PAIRS)
    part, parts = tl.program_id(1), tl.num_programs(1)
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    begin, end = steps * part // parts, steps * (part + 1) // parts
    if not BLOCKED:  # asked for now, since it is in no cache
        scale = tl.load(scales_ptr + n_at)
    if EARLY:
        rows_at = weight_ptr + n_at.to(tl.int64) * k_size + begin * PAIRS
        begun_early(rows_at, (end - begin) * BLOCK_K, EARLY)
    for step in tl.range(begin, end, num_stages=STAGES):
        at = step * PAIRS
        if WHOLE:
            packed = tl.load(w_at + at)
            x = tl.load(x_at + at, mask=used[None, :], other=0)
        else:
            packed = tl.load(w_at + at, mask=(at + k < k_size)[None, :], other=0)
            x = tl.load(x_at + at, mask=used[None, :] & (at + k < k_size)[:, None], other=0)
        even, odd = halves(packed, KIND, ASM, dtype)
        x_even = x.to(tl.int16).to(dtype, bitcast=True)
        x_odd = (x >> 16).to(tl.int16).to(dtype, bitcast=True)
        if BLOCKED:
            made = tl.dot(even, x_even)
            made = tl.dot(odd, x_odd, made)
            acc += made * tl.load(scales_ptr + tile * BLOCK_N // 128 * steps + step)
        else:
            acc = tl.dot(even, x_even, acc)
            acc = tl.dot(odd, x_odd, acc)
    if SPLIT:
        acc, last = gathered(acc, partial_ptr, counters_ptr)
    else:
        last = True
    if last:
        if not BLOCKED:
            acc *= scale[:, None]
        if BIAS:
            acc += tl.load(bias_ptr + n_at).to(tl.float32)[:, None]
        out_at = out_ptr + row.to(tl.int64)[:, None] * out_row + n[None, :]
        tl.store(out_at, tl.trans(acc).to(dtype), mask=used[:, None] & kept[None, :])


def wide(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    config: WideConfig | None = None,
) -> Tensor:
    """x times a matrix in 8 bits, plus ``bias``.

    Args:
        x: [num_rows, in], 16-bit floats; rows may be strided by even numbers, ``in`` is even.
        weight: [out, in], e4m3 or int8, contiguous.
        scales: float32 [out], or of blocks of 128 x 128 [ceil(out / 128), ceil(in / 128)],
            contiguous.
        bias: [out] in the dtype of x.
        out: where to write, [num_rows, out] in the dtype of x; rows may be strided.
        config: instead of the tuned or built-in one.

    Returns:
        ``out``: weights without their scale are exact in the dtype of x, sums in float32, times
        scales in float32, rounded once. Rows of one class of numbers of rows come out the same
        whatever is beside them.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``wide_ref``. Does not synchronise; safe in CUDA graphs. Products of a stream must
    not run at the same time.
    """
    num_rows, n, k = _check(x, weight, scales, bias, out)
    if num_rows == 0 or n == 0:
        return out
    blocked = scales.dim() == 2
    c = config or wide_config(num_rows, weight.dtype, blocked, x.device)
    if blocked and (c.block_k != BLOCK or BLOCK % c.block_n):
        raise ValueError(f"{c} does not fit blocks of {BLOCK}")
    steps = triton.cdiv(k, c.block_k)
    grid, added, counters = divided(num_rows, n, steps, c, row_class(num_rows), x.device)
    early = c.early if x.device.type != "cpu" and k % c.block_k == 0 else 0
    _wide_kernel[grid](
        x.view(torch.int32),
        weight.view(torch.int16),
        scales,
        bias,
        out,
        added,
        counters,
        num_rows,
        n,
        k // 2,
        x.stride(0) // 2,
        out.stride(0),
        KIND=KINDS[weight.dtype],
        BLOCKED=blocked,
        BIAS=bias is not None,
        WHOLE=k % c.block_k == 0,
        ASM=x.device.type != "cpu",
        ROWS=c.rows,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        STAGES=c.num_stages,
        SPLIT=added is not None,
        EARLY=early,
        num_warps=c.num_warps,
        **launched_early(early, x),
    )
    return out


def fits_wide(x: Tensor) -> bool:
    """Whether ``wide`` takes such rows."""
    even = x.shape[1] % 2 == 0 and x.stride(0) % 2 == 0 and x.storage_offset() % 2 == 0
    return x.element_size() == 2 and x.stride(1) == 1 and even


def wide_ref(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """``wide`` in plain torch, products and sums in float32."""
    matrix = weight.float()
    if scales.dim() == 2:
        n, k = weight.shape
        of = scales.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)
        matrix *= of[:, :k]
    else:
        matrix *= scales[:, None]
    out = x.float() @ matrix.t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def wide_config(
    num_rows: int, kind: torch.dtype, blocked: bool, device: torch.device
) -> WideConfig:
    """The configuration for so many rows: the device's tuned one or that of the table."""
    size = row_class(num_rows)
    name = f"wide {config_name(kind, blocked)} {size}"
    entry = tuned(device, "quant", name)
    return _CONFIGS[size] if entry is None else WideConfig(**entry)


def _check(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
) -> tuple[int, int, int]:
    if x.dim() != 2 or x.dtype not in {torch.float16, torch.bfloat16} or not fits_wide(x):
        raise ValueError(f"x must be even rows in 16 bits: {tuple(x.shape)} {x.dtype}")
    num_rows, k = x.shape
    if weight.dim() != 2 or weight.shape[1] != k or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if weight.dtype not in KINDS:
        raise ValueError(f"weight is {weight.dtype}")
    n = len(weight)
    shape = (triton.cdiv(n, BLOCK), triton.cdiv(k, BLOCK)) if scales.dim() == 2 else (n,)
    if scales.shape != shape or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(f"scales {tuple(scales.shape)} {scales.dtype} do not fit {shape}")
    if bias is not None and (
        bias.shape != (n,) or bias.dtype != x.dtype or not bias.is_contiguous()
    ):
        raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype} does not fit the weight")
    if out.shape != (num_rows, n) or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit [{num_rows}, {n}]")
    return num_rows, n, k
