"""Products of tokens with their experts' 8-bit weights, grouped by expert.

For few rows of an expert, activations stay unquantised and weights are dequantised in registers;
many rows are in 8 bits themselves, for the tensor cores. A tile is weights times rows, so few rows
are not padded to many. Does not know how experts were chosen or values quantised.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from asyncllm.kernels.attention.kv8 import KINDS, halves
from asyncllm.kernels.autotune import tuned
from asyncllm.kernels.gated import activated
from asyncllm.kernels.moe.tiles import ExpertsConfig, Tile, work_of
from asyncllm.kernels.quant.rows import BLOCK, config_name, quantize_rows
from asyncllm.kernels.quant.wide import fits_wide

WIDE = ("few", "8", "32")  # classes of shapes whose rows stay as they are

# class of a shape -> configuration
CONFIGS = {
    "few": ExpertsConfig(16, Tile(32, 128, 4, 5), Tile(32, 128, 4, 5)),
    "8": ExpertsConfig(16, Tile(32, 128, 4, 5), Tile(64, 128, 4, 5)),
    "32": ExpertsConfig(32, Tile(64, 128, 4, 4), Tile(64, 128, 4, 4)),
    "128": ExpertsConfig(64, Tile(64, 128, 4, 4), Tile(128, 128, 4, 4)),
    "many": ExpertsConfig(128, Tile(64, 128, 4, 3), Tile(128, 128, 8, 4)),
}
# where scales are of blocks there are three sums: with 128 pairs they do not fit the registers of
# four warps, if addresses of weights must be there too
BLOCKED_CONFIGS = CONFIGS | {
    "many": ExpertsConfig(64, Tile(64, 128, 4, 3), Tile(64, 128, 4, 3)),
}


@triton.jit
def _added(
    acc,
    weight,
    x,
    by,
    scale_at,
    WIDE: tl.constexpr,
    BLOCKED: tl.constexpr,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
    STEP: tl.constexpr,
    dtype: tl.constexpr,
):
    """``acc`` and a step's product of weights and rows, times the scale of rows ``by`` and that of
    weights where BLOCKED. WIDE: both are pairs of neighbours, rows in ``dtype``."""
    if WIDE:
        even, odd = halves(weight, KIND, ASM, dtype)
        x_even = x.to(tl.int16).to(dtype, bitcast=True)
        x_odd = (x >> 16).to(tl.int16).to(dtype, bitcast=True)
        if BLOCKED:
            made = tl.dot(even, x_even)
            acc += tl.dot(odd, x_odd, made) * tl.load(scale_at)
        else:
            acc = tl.dot(even, x_even, acc)
            acc = tl.dot(odd, x_odd, acc)
    elif BLOCKED:
        acc += tl.dot(weight, x) * (by * tl.load(scale_at))
    elif KIND == 1:
        acc = tl.dot(weight, x, acc, out_dtype=tl.int32)
    else:
        # sums of e4m3 products lose bits inside the matrix units: not over more than this many
        acc = tl.dot(weight, x, acc, max_num_imprecise_acc=STEP)
    return acc


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "scale_row"])
def _experts_eight_bits_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_desc,
    scale_ptr,
    pairs_ptr,
    experts_ptr,
    out_ptr,
    num_pairs,
    num_blocks,
    x_row,
    scale_row,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKED: tl.constexpr,
    ASM: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Row p of ``out`` [num_pairs, N] is row p // PAIRS_PER_ROW of ``x`` times the matrix of p's
    expert; with GATED the matrix is [gate | up], and the row is activation(gate) * up. K, STEP and
    ``x_row`` count pairs of neighbours where WIDE."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    expert, tile, pair, used = work_of(
        pairs_ptr, experts_ptr, num_pairs, num_blocks, N, BLOCK_M, BLOCK_N, GROUP
    )
    if expert >= 0:
        row = pair // PAIRS_PER_ROW
        k = tl.arange(0, STEP)
        x_at = x_ptr + row.to(tl.int64)[None, :] * x_row + k[:, None]
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        HEIGHT: tl.constexpr = N * (2 if GATED else 1)
        STEPS: tl.constexpr = (K + STEP - 1) // STEP
        first = expert * HEIGHT  # the matrix's first row
        # outputs past the last are computed like it and not stored
        n_at = first + tl.minimum(n, N - 1)
        w_at = weight_ptr + n_at.to(tl.int64)[:, None] * K + k[None, :]
        # of blocks, the scale of this tile's first step
        blocks_at = scale_ptr + (
            (expert * ((HEIGHT + 127) // 128) + tile * BLOCK_N // 128).to(tl.int64) * STEPS
        )
        if KIND == 1 and not WIDE:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            up = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
        else:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            at = step * STEP
            if K % STEP == 0:
                x = tl.load(x_at + at, mask=used[None, :], other=0.0)
            else:
                x = tl.load(x_at + at, mask=used[None, :] & (at + k < K)[:, None], other=0.0)
            if COPY:  # past the last input it gives zeros
                weight = weight_desc.load([first + tile * BLOCK_N, at])
            elif K % STEP == 0:
                weight = tl.load(w_at + at)
            else:
                weight = tl.load(w_at + at, mask=(at + k < K)[None, :], other=0.0)
            if BLOCKED and not WIDE:
                x_scale = tl.load(x_scale_ptr + step * scale_row + row, mask=used, other=0.0)
                by = x_scale[None, :]
            else:
                by = 1.0
            scale_at = blocks_at + step
            acc = _added(acc, weight, x, by, scale_at, WIDE, BLOCKED, KIND, ASM, STEP, dtype)
            if GATED:
                if COPY:
                    weight = weight_desc.load([first + N + tile * BLOCK_N, at])
                elif K % STEP == 0:
                    weight = tl.load(w_at + at + N * K)
                else:
                    weight = tl.load(w_at + at + N * K, mask=(at + k < K)[None, :], other=0.0)
                scale_at += (N // 128) * STEPS
                up = _added(up, weight, x, by, scale_at, WIDE, BLOCKED, KIND, ASM, STEP, dtype)
        made, up_made = acc.to(tl.float32), up.to(tl.float32)
        if not BLOCKED:
            made *= tl.load(scale_ptr + n_at)[:, None]
            if GATED:
                up_made *= tl.load(scale_ptr + n_at + N)[:, None]
            if not WIDE:
                x_scale = tl.load(x_scale_ptr + row, mask=used, other=0.0)[None, :]
                made *= x_scale
                up_made *= x_scale
        out = made.to(dtype)
        if GATED:
            out = activated(out, up_made.to(dtype), GELU)
        out_at = out_ptr + pair.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_at, tl.trans(out), mask=used[:, None] & (n < N)[None, :])


def eight_bits(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    pairs: Tensor,
    owners: Tensor,
    out: Tensor,
    *,
    pairs_per_row: int,
    block_m: int,
    tile: Tile,
    wide: bool,
    activation: str | None,
) -> Tensor:
    """Each pair's row of ``x`` times the matrix of its expert.

    Args:
        x: [num_rows, in] floats; rows may be strided. Pair p takes row ``p // pairs_per_row``.
        weights: [num_experts, height, in], e4m3 or int8, contiguous; height is that of ``out``, or
            twice as much where there is an activation, gate first.
        scales: float32 [num_experts, height], or of blocks of 128 x 128 [num_experts,
            ceil(height / 128), ceil(in / 128)], contiguous; then half of a height of two parts is
            whole blocks.
        pairs, owners: what ``order`` gives for blocks of ``block_m``.
        out: where to write, [num_pairs, outputs], contiguous, in the dtype of x; rows of pairs that
            are in no block are left alone.
        wide: rows stay as they are if ``fits_wide``; else they come to 8 bits, each by its own
            scale, or by one for each 128 inputs where scales are of blocks.

    Returns:
        ``out``: sums in float32 (of int8 rows exact), times scales in float32, rounded once.

    Reference: ``experts_ref`` of what it is a part of. Does not synchronise; safe in CUDA graphs.
    """
    gated, blocked = activation is not None, scales.dim() == 3
    n, k = out.shape[1], x.shape[1]
    if blocked and (BLOCK % tile.block_n or tile.block_k != BLOCK or (gated and n % BLOCK)):
        raise ValueError(f"{tile} and {n} outputs do not fit blocks of {BLOCK}")
    wide = wide and fits_wide(x)
    unit = 2 if wide else 1
    values, x_scales, data = x, None, weights
    if wide:
        values, data = x.view(torch.int32), weights.view(torch.int16)
    else:
        values, x_scales = quantize_rows(x, weights.dtype, blocked=blocked)
    copy = tile.copy and not wide and k % 16 == 0 and weights.data_ptr() % 16 == 0
    desc = None
    if copy:
        desc = TensorDescriptor.from_tensor(weights.flatten(0, 1), [tile.block_n, tile.block_k])
    _experts_eight_bits_kernel[(len(owners) * triton.cdiv(n, tile.block_n),)](
        values,
        x_scales,
        data,
        desc,
        scales,
        pairs,
        owners,
        out,
        len(out),
        len(owners),
        values.stride(0),
        len(x),
        N=n,
        K=k // unit,
        PAIRS_PER_ROW=pairs_per_row,
        GATED=gated,
        GELU=activation == "gelu_tanh",
        KIND=KINDS[weights.dtype],
        WIDE=wide,
        BLOCKED=blocked,
        ASM=x.device.type != "cpu",
        COPY=copy,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        STEP=tile.block_k // unit,
        GROUP=tile.group,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    return out


def widened_ref(weights: Tensor, scales: Tensor) -> Tensor:
    """Matrices [num_experts, height, in] in float32, in plain torch."""
    if scales.dim() == 2:
        return weights.float() * scales[..., None]
    each = scales.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    return weights.float() * each[:, : weights.shape[1], : weights.shape[2]]


def config_of(size: str, weights: Tensor, scales: Tensor) -> ExpertsConfig:
    """The configuration of a class of shapes: the device's tuned one or that of the table."""
    blocked = scales.dim() == 3
    kind = config_name(weights.dtype, blocked)
    entry = tuned(weights.device, "experts", f"{kind} {size}")
    if entry is None:
        return (BLOCKED_CONFIGS if blocked else CONFIGS)[size]
    return ExpertsConfig.of(entry)


def fits(weights: Tensor, scales: Tensor) -> bool:
    """Whether these are scales of these weights."""
    num, height, k = weights.shape
    blocks = num, triton.cdiv(height, BLOCK), triton.cdiv(k, BLOCK)
    known = weights.dtype in KINDS and scales.dtype == torch.float32 and scales.is_contiguous()
    if scales.dim() == 3:
        return known and scales.shape == blocks and weights.dtype != torch.int8
    return known and scales.shape == (num, height)
