"""Products of 8-bit rows with 8-bit weights on tensor cores; few rows run at memory bandwidth.

A tile is weights times rows, not rows times weights: weights fill the long side of a matrix
instruction, so 8 rows are not padded. If there are fewer tiles than the device runs at once, the
inputs are divided among programs (split-K). Owns tiles and that division; does not know how values
were quantised.
"""

# mypy: allow-incomplete-defs, disable-error-code="possibly-undefined"

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from asyncllm.kernels.attention.kv8 import KINDS
from asyncllm.kernels.autotune import tuned
from asyncllm.kernels.early import begun_early, launched_early
from asyncllm.kernels.quant.parts import divided, gathered, row_class_of
from asyncllm.kernels.quant.rows import BLOCK, config_name

_GROUP = 8  # tiles of rows that are gone through together


@dataclass(frozen=True, slots=True)
class ProductConfig:
    """How a product is built and divided.

    Attributes:
        rows: of x in a tile, from 8.
        block_n: outputs of a tile.
        block_k: inputs of a step.
        per_sm: inputs are divided until there are so many programs to a multiprocessor; 0: never.
        copy: weights come by the tensor copy engine.
        early: bytes of each weight's row that are asked for while the kernel before still runs.
    """

    rows: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    per_sm: int = 0
    copy: bool = False
    early: int = 0


# up to so many rows -> configuration; one class more: many
_CONFIGS = {
    "8": ProductConfig(8, 64, 128, 4, 6, 3),
    "16": ProductConfig(16, 64, 128, 4, 6, 3),
    "32": ProductConfig(32, 64, 128, 4, 5, 3),
    "64": ProductConfig(64, 64, 128, 4, 5, 2),
    "128": ProductConfig(128, 64, 128, 4, 4, 2),
    "256": ProductConfig(128, 128, 128, 8, 4, 1),
    "many": ProductConfig(128, 128, 128, 8, 4),
}
row_class = partial(row_class_of, _CONFIGS)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "scale_row"])
def _eight_bits_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_desc,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counters_ptr,
    num_rows,
    num_tiles,
    n_size,
    k_size,
    x_row,
    out_row,
    scale_row,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKED: tl.constexpr,
    BIAS: tl.constexpr,
    COPY: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rows [ROWS] of x times a tile of weights [BLOCK_N, k_size], or a part of its inputs."""
    # neighbours share a tile of weights, and a run of GROUP tiles of rows stays in the cache
    row_tiles = tl.cdiv(num_rows, ROWS)
    run = tl.program_id(0) // (num_tiles * GROUP)
    height = tl.minimum(row_tiles - run * GROUP, GROUP)
    within = tl.program_id(0) % (num_tiles * GROUP)
    first_row = (run * GROUP + within % height) * ROWS
    tile = within // height
    row = first_row + tl.arange(0, ROWS)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    used, kept = row < num_rows, n < n_size
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[None, :] * x_row + k[:, None]
    # outputs past the last are computed like it and not stored
    w_at = weight_ptr + tl.minimum(n, n_size - 1).to(tl.int64)[:, None] * k_size + k[None, :]
    steps = tl.cdiv(k_size, BLOCK_K)
    part, parts = tl.program_id(1), tl.num_programs(1)
    begin, end = steps * part // parts, steps * (part + 1) // parts
    if not BLOCKED:  # asked for now, since it is in no cache
        weight_scale = tl.load(weight_scale_ptr + n, mask=kept, other=0.0)
    if EARLY:
        rows_at = weight_ptr + tl.minimum(n, n_size - 1).to(tl.int64) * k_size + begin * BLOCK_K
        begun_early(rows_at, (end - begin) * BLOCK_K, EARLY)
    if x_ptr.dtype.element_ty == tl.int8:
        acc = tl.zeros([BLOCK_N, ROWS], tl.int32)
    else:
        acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        at = step * BLOCK_K
        if WHOLE:
            x = tl.load(x_at + at, mask=used[None, :], other=0.0)
        else:
            x = tl.load(x_at + at, mask=used[None, :] & (at + k < k_size)[:, None], other=0.0)
        if COPY:  # past the last input it gives zeros
            weight = weight_desc.load([tile * BLOCK_N, at])
        elif WHOLE:
            weight = tl.load(w_at + at, eviction_policy="evict_first")
        else:
            weight = tl.load(w_at + at, mask=(at + k < k_size)[None, :], other=0.0)
        if BLOCKED:
            made = tl.dot(weight, x)
            weight_scale = tl.load(weight_scale_ptr + tile * BLOCK_N // 128 * steps + step)
            x_scale = tl.load(x_scale_ptr + step * scale_row + row, mask=used, other=0.0)
            acc += made * (x_scale * weight_scale)[None, :]
        elif x_ptr.dtype.element_ty == tl.int8:
            acc = tl.dot(weight, x, acc, out_dtype=tl.int32)
        else:
            # sums of e4m3 products lose bits inside the matrix units: not over more than this many
            acc = tl.dot(weight, x, acc, max_num_imprecise_acc=BLOCK_K)
    made = acc.to(tl.float32)
    if not BLOCKED:
        x_scale = tl.load(x_scale_ptr + row, mask=used, other=0.0)
    if SPLIT:
        made, last = gathered(made, partial_ptr, counters_ptr)
    else:
        last = True
    if last:
        if not BLOCKED:
            made = made * x_scale[None, :] * weight_scale[:, None]
        if BIAS:
            made += tl.load(bias_ptr + n, mask=kept, other=0.0).to(tl.float32)[:, None]
        out = tl.trans(made).to(out_ptr.dtype.element_ty)
        out_at = out_ptr + row.to(tl.int64)[:, None] * out_row + n[None, :]
        tl.store(out_at, out, mask=used[:, None] & kept[None, :])


def product(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    config: ProductConfig | None = None,
) -> Tensor:
    """``x @ weight.T`` times both scales, plus ``bias``.

    Args:
        x: [num_rows, in], e4m3 or int8; rows may be strided.
        x_scales: float32 [num_rows], or of each 128 inputs [ceil(in / 128), num_rows] contiguous.
        weight: [out, in] of the type of x, contiguous.
        scales: float32 [out], or of blocks of 128 x 128 [ceil(out / 128), ceil(in / 128)],
            contiguous; e4m3 only, with such ``x_scales``.
        bias: [out], added in float32.
        out: where to write, [num_rows, out] in any floating type; rows may be strided.
        config: instead of the tuned or built-in one.

    Returns:
        ``out``. Sums in float32, of int8 exact in each part of the inputs; rounded once. How many
        parts there are depends on the class of the number of rows: rows of one class come out the
        same whatever is beside them.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``product_ref``. Does not synchronise; safe in CUDA graphs. Products of a stream must
    not run at the same time.
    """
    num_rows, n, k = _check(x, x_scales, weight, scales, bias, out)
    blocked = scales.dim() == 2
    if num_rows == 0 or n == 0:
        return out
    c = config or product_config(num_rows, x.dtype, blocked, x.device)
    if blocked and (c.block_k != BLOCK or BLOCK % c.block_n):
        raise ValueError(f"{c} does not fit blocks of {BLOCK}")
    steps = triton.cdiv(k, c.block_k)
    grid, added, counters = divided(num_rows, n, steps, c, row_class(num_rows), x.device)
    copy = c.copy and k % 16 == 0 and weight.data_ptr() % 16 == 0
    early = c.early if x.device.type != "cpu" and k % c.block_k == 0 else 0
    desc = TensorDescriptor.from_tensor(weight, [c.block_n, c.block_k]) if copy else None
    _eight_bits_kernel[grid](
        x,
        x_scales,
        weight,
        desc,
        scales,
        bias,
        out,
        added,
        counters,
        num_rows,
        triton.cdiv(n, c.block_n),
        n,
        k,
        x.stride(0),
        out.stride(0),
        num_rows,
        ROWS=c.rows,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        STAGES=c.num_stages,
        SPLIT=added is not None,
        BLOCKED=blocked,
        BIAS=bias is not None,
        COPY=copy,
        WHOLE=k % c.block_k == 0,
        GROUP=_GROUP,
        EARLY=early,
        num_warps=c.num_warps,
        **launched_early(early, x),
    )
    return out


def product_ref(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``product`` in plain torch, in float64, as float32."""
    wide, matrix = x.double(), weight.double()
    if scales.dim() == 2:
        n, k = weight.shape
        wide = wide * x_scales.t().double().repeat_interleave(BLOCK, 1)[:, :k]
        of = scales.double().repeat_interleave(BLOCK, 0)[:n]
        matrix = matrix * of.repeat_interleave(BLOCK, 1)[:, :k]
    else:
        wide, matrix = wide * x_scales[:, None], matrix * scales[:, None]
    out = wide @ matrix.t()
    return (out if bias is None else out + bias.double()).float()


def product_config(
    num_rows: int, kind: torch.dtype, blocked: bool, device: torch.device
) -> ProductConfig:
    """The configuration for so many rows: the device's tuned one or that of the table."""
    size = row_class(num_rows)
    entry = tuned(device, "quant", f"{config_name(kind, blocked)} {size}")
    return _CONFIGS[size] if entry is None else ProductConfig(**entry)


def _check(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
) -> tuple[int, int, int]:
    if x.dim() != 2 or x.stride(1) != 1 or x.dtype not in KINDS:
        raise ValueError(f"x must be rows in 8 bits: {tuple(x.shape)} {x.dtype}")
    num_rows, k = x.shape
    if weight.dim() != 2 or weight.shape[1] != k or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}")
    n, blocks = len(weight), triton.cdiv(k, BLOCK)
    shapes: list[tuple[int, ...]] = [(n,), (num_rows,)]
    if scales.dim() == 2:
        shapes = [(triton.cdiv(n, BLOCK), blocks), (blocks, num_rows)]
    for name, tensor, shape in zip(("scales", "x_scales"), (scales, x_scales), shapes, strict=True):
        fits = tensor.shape == shape and tensor.is_contiguous()
        if not fits or tensor.dtype != torch.float32:
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} do not fit {shape}")
    if scales.dim() == 2 and x.dtype == torch.int8:
        raise ValueError("int8 has no scales of blocks")
    if bias is not None and (bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit the weight")
    if out.shape != (num_rows, n) or out.stride(1) != 1 or not out.is_floating_point():
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit [{num_rows}, {n}]")
    return num_rows, n, k
