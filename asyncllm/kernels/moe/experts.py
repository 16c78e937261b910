"""Products of tokens with their experts' weights, grouped by expert, and the weighted sum.

Owns the walk over blocks of (token, expert) pairs; does not know how experts were chosen. Rows are
read through the sorted order and written at the pair's number, so nothing is moved to be sorted; a
token's sum reads its pairs in their order, so it does not depend on scheduling.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from asyncllm.kernels.autotune import tuned
from asyncllm.kernels.gated import activated, gated_ref
from asyncllm.kernels.moe.eight_bits import (
    WIDE,
    config_of,
    eight_bits,
    fits,
    widened_ref,
)
from asyncllm.kernels.moe.order import CHUNKS, order
from asyncllm.kernels.moe.tiles import ExpertsConfig, Tile, size_class, work_of
from asyncllm.kernels.quant.rows import BLOCK, quantize_rows_ref

_BLOCK = 1024  # columns of the sum per program
Scales = tuple[Tensor | None, Tensor | None]  # of both products' weights; None: these are plain


# class of a shape (``size_class``) -> configuration
_CONFIGS = {
    "few": ExpertsConfig(16, Tile(32, 128, 4, 4), Tile(32, 128, 4, 4)),
    "8": ExpertsConfig(16, Tile(32, 128, 4, 4), Tile(64, 128, 4, 4)),
    "32": ExpertsConfig(32, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4)),
    "128": ExpertsConfig(64, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4)),
    "many": ExpertsConfig(128, Tile(128, 64, 8, 3), Tile(256, 64, 8, 3)),
}


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _product_kernel(
    x_ptr,
    weight_ptr,
    weight_desc,
    pairs_ptr,
    experts_ptr,
    out_ptr,
    num_pairs,
    num_blocks,
    x_row,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Row p of ``out`` [num_pairs, N] is row p // PAIRS_PER_ROW of ``x`` times the matrix of p's
    expert; with GATED the matrix is [gate | up], and the row is activation(gate) * up."""
    expert, tile, pair, used = work_of(
        pairs_ptr, experts_ptr, num_pairs, num_blocks, N, BLOCK_M, BLOCK_N, GROUP
    )
    if expert >= 0:
        k = tl.arange(0, BLOCK_K)
        row = (pair // PAIRS_PER_ROW).to(tl.int64)
        x_at = x_ptr + row[:, None] * x_row + k[None, :]
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        first = expert * N * (2 if GATED else 1)  # the matrix's first row
        # outputs past the last are computed like it and not stored
        at = (first + tl.minimum(n, N - 1)).to(tl.int64) * K
        w_at = weight_ptr + at[None, :] + k[:, None]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            live = begin + k < K
            if K % BLOCK_K == 0:
                x = tl.load(x_at + begin, mask=used[:, None], other=0.0)
            else:
                x = tl.load(x_at + begin, mask=used[:, None] & live[None, :], other=0.0)
            if COPY:  # past the last input it gives zeros
                w = tl.trans(weight_desc.load([first + tile * BLOCK_N, begin]))
            elif K % BLOCK_K == 0:
                w = tl.load(w_at + begin)
            else:
                w = tl.load(w_at + begin, mask=live[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            if GATED:
                if COPY:
                    w = tl.trans(weight_desc.load([first + N + tile * BLOCK_N, begin]))
                elif K % BLOCK_K == 0:
                    w = tl.load(w_at + begin + N * K)
                else:
                    w = tl.load(w_at + begin + N * K, mask=live[:, None], other=0.0)
                up = tl.dot(x, w, up, input_precision="ieee")
        made = acc.to(out_ptr.dtype.element_ty)
        if GATED:
            made = activated(made, up.to(out_ptr.dtype.element_ty), GELU)
        out_at = out_ptr + pair.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_at, made, mask=used[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["first"])
def _sum_kernel(
    made_ptr,
    ids_ptr,
    weights_ptr,
    shared_ptr,
    gate_ptr,
    out_ptr,
    first,
    shared_row,
    gate_row,
    out_row,
    NUM_EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < HIDDEN
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        expert = tl.load(ids_ptr + pair) - first
        # rows of other experts were not written
        width = tl.where((expert >= 0) & (expert < NUM_EXPERTS), HIDDEN, 0)
        made = tl.load(made_ptr + pair * HIDDEN + column, mask=column < width, other=0.0)
        total += made.to(tl.float32) * tl.load(weights_ptr + pair)
    if SHARED:
        shared = tl.load(shared_ptr + token * shared_row + column, mask=live, other=0.0)
        shared = shared.to(tl.float32)
        if GATE:
            shared /= 1.0 + tl.exp(-tl.load(gate_ptr + token * gate_row))
        total += shared
    at = out_ptr + token * out_row + column
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=live)


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    scales: Scales = (None, None),
    held: range | None = None,
    num_experts: int | None = None,
    activation: str = "silu",
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
    out: Tensor | None = None,
    size: str | None = None,
    config: ExpertsConfig | None = None,
) -> Tensor:
    """Weighted sum of what each token's experts make of it:
    ``down(activation(gate(x)) * up(x))`` of each.

    Args:
        x: [num_tokens, hidden]; rows may be strided.
        gate_up: [num_held or more, 2 * inner, hidden], contiguous, gate first; in the dtype of x,
            or in 8 bits: e4m3 or int8.
        down: [num_held or more, hidden, inner], contiguous, likewise.
        ids: [num_tokens, top_k] int32, contiguous: numbers of each token's experts, no two the
            same.
        weights: [num_tokens, top_k] float32, contiguous.
        scales: of ``gate_up`` and ``down`` in 8 bits, as ``eight_bits`` takes them.
        held: numbers of the experts whose matrices these are; others add nothing. None: from 0.
        num_experts: that there are, here and elsewhere: selects the tiles, and whether rows come to
            8 bits for weights that are in 8 bits. None: those of ``held``.
        activation: silu or gelu_tanh.
        shared: [num_tokens, hidden], added to the sum; rows may be strided.
        shared_gate: [num_tokens, 1] float32: its sigmoid multiplies ``shared``.
        out: where to write, like the result; rows may be strided.
        size: class of the shape, instead of its own.
        config: instead of the tuned or built-in one.

    Returns:
        [num_tokens, hidden]. Products are rounded where unfused torch code rounds them, the sum
        once, in fp32 and in the order of ``ids`` with ``shared`` last. Rows that meet weights in 8
        bits stay as they are in classes of ``WIDE``, and come to 8 bits in the others.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``experts_ref``. Does not synchronise; safe in CUDA graphs.
    """
    held = range(len(gate_up)) if held is None else held
    _check(x, gate_up, down, scales, ids, weights, held)
    out = _checked_out(x, shared, shared_gate, out)
    if len(x) == 0:
        return out
    if size is None:
        size = size_class(ids.numel(), num_experts or len(held), down.shape[2], x.device)
    if config is None:
        config = _config_of(size, x, (gate_up, down), scales)
    pairs, owners = order(ids, len(held), config.block_m, held.start)
    top_k = ids.shape[1]
    inner = _made(x, gate_up, scales[0], (pairs, owners), (size, config), top_k, activation)
    made = _made(inner, down, scales[1], (pairs, owners), (size, config), top_k, None)
    _sum_kernel[(len(x), triton.cdiv(x.shape[1], _BLOCK))](
        made,
        ids,
        weights,
        shared,
        shared_gate,
        out,
        held.start,
        0 if shared is None else shared.stride(0),
        0 if shared_gate is None else shared_gate.stride(0),
        out.stride(0),
        NUM_EXPERTS=len(held),
        HIDDEN=x.shape[1],
        TOP_K=top_k,
        SHARED=shared is not None,
        GATE=shared_gate is not None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(x.shape[1])),
        num_warps=4,
    )
    return out


def _made(
    x: Tensor,
    weights: Tensor,
    scales: Tensor | None,
    sorted_: tuple[Tensor, Tensor],
    built: tuple[str, ExpertsConfig],
    top_k: int,
    activation: str | None,
) -> Tensor:
    """A product for each pair, [num_pairs, outputs]: that of tokens, gated, where there is an
    activation; else that of pairs."""
    (pairs, owners), (size, config) = sorted_, built
    gated = activation is not None
    tile, per_row = (config.up, top_k) if gated else (config.down, 1)
    num_pairs = len(x) * per_row
    n = weights.shape[1] // (2 if gated else 1)
    out = torch.empty((num_pairs, n), dtype=x.dtype, device=x.device)
    if len(owners) == 0:  # no experts here
        return out
    if scales is None:
        return _product(x, weights, pairs, owners, out, per_row, config.block_m, tile, activation)
    return eight_bits(
        x,
        weights,
        scales,
        pairs,
        owners,
        out,
        pairs_per_row=per_row,
        block_m=config.block_m,
        tile=tile,
        wide=size in WIDE,
        activation=activation,
    )


def _product(
    x: Tensor,
    weights: Tensor,
    pairs: Tensor,
    owners: Tensor,
    out: Tensor,
    pairs_per_row: int,
    block_m: int,
    tile: Tile,
    activation: str | None,
) -> Tensor:
    """``out`` of ``_product_kernel``, gated where there is an activation."""
    (num_pairs, n), k = out.shape, weights.shape[2]
    copy = tile.copy and k * x.element_size() % 16 == 0 and weights.data_ptr() % 16 == 0
    desc = None
    if copy:
        desc = TensorDescriptor.from_tensor(weights.flatten(0, 1), [tile.block_n, tile.block_k])
    _product_kernel[(len(owners) * triton.cdiv(n, tile.block_n),)](
        x,
        weights,
        desc,
        pairs,
        owners,
        out,
        num_pairs,
        len(owners),
        x.stride(0),
        N=n,
        K=k,
        PAIRS_PER_ROW=pairs_per_row,
        GATED=activation is not None,
        GELU=activation == "gelu_tanh",
        COPY=copy,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP=tile.group,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    return out


def experts_ref(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    scales: Scales = (None, None),
    held: range | None = None,
    activation: str = "silu",
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
    wide: bool = True,
) -> Tensor:
    """``experts`` in plain torch: one expert after the other, products and the sum in fp32.

    ``wide``: rows are multiplied as they are with weights in 8 bits, too."""
    matrices = [
        w if s is None else widened_ref(w, s) for w, s in zip((gate_up, down), scales, strict=True)
    ]

    def product(rows: Tensor, at: int, place: int) -> Tensor:
        by, kind = scales[at], (gate_up, down)[at].dtype
        seen = rows.float()
        if by is not None and not wide:
            values, each = quantize_rows_ref(rows, kind, blocked=by.dim() == 3)
            if by.dim() == 3:
                each = each.t().repeat_interleave(BLOCK, 1)[:, : rows.shape[1]]
            else:
                each = each[:, None]
            seen = values.float() * each
        return (seen @ matrices[at][place].float().T).to(x.dtype)

    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for place, expert in enumerate(range(len(gate_up)) if held is None else held):
        token, k = (ids == expert).nonzero(as_tuple=True)
        made = product(gated_ref(product(x[token], 0, place), activation), 1, place)
        total[token] += made.float() * weights[token, k, None]
    if shared is not None:
        total += shared.float() * (1.0 if shared_gate is None else shared_gate.sigmoid())
    return total.to(x.dtype)


def experts_config(
    num_pairs: int, num_experts: int, inner: int, element_size: int, device: torch.device
) -> ExpertsConfig:
    """The configuration for a shape: the device's tuned one or that of the table, with small tiles
    for 4-byte elements."""
    size = size_class(num_pairs, num_experts, inner, device)
    return _plain_config(size, element_size, device)


def _config_of(
    size: str, x: Tensor, stacks: tuple[Tensor, Tensor], scales: Scales
) -> ExpertsConfig:
    """Of both products, each by its weights; blocks are those of the first one."""
    up, down = (
        _plain_config(size, x.element_size(), x.device)
        if by is None
        else config_of(size, stack, by)
        for stack, by in zip(stacks, scales, strict=True)
    )
    return ExpertsConfig(up.block_m, up.up, down.down)


def _plain_config(size: str, element_size: int, device: torch.device) -> ExpertsConfig:
    entry = tuned(device, "experts", size)
    found = _CONFIGS[size] if entry is None else ExpertsConfig.of(entry)
    if element_size <= 2:
        return found
    small = Tile(32, 32, 4, 2)
    return dataclasses.replace(found, block_m=min(found.block_m, 32), up=small, down=small)


def prepare(
    gate_up: Tensor,
    down: Tensor,
    scales: Scales,
    held: range,
    top_k: int,
    activation: str,
    dtype: torch.dtype,
) -> None:
    """Builds what ``experts`` will use for any number of tokens of ``dtype``: not all of it turns
    up in the first steps. Takes what ``experts`` takes."""
    x = torch.zeros(1, gate_up.shape[2], dtype=dtype, device=gate_up.device)
    # experts that are elsewhere
    ids = torch.full((CHUNKS[-1], top_k), -1, dtype=torch.int32, device=x.device)
    weights = torch.zeros((1, top_k), dtype=torch.float32, device=x.device)
    for size in _CONFIGS:
        config = _config_of(size, x, (gate_up, down), scales)
        for chunk in CHUNKS:
            order(ids[: max(1, chunk // top_k)], len(held), config.block_m)
        experts(
            *(x, gate_up, down, ids[:1], weights),
            scales=scales,
            held=held,
            activation=activation,
            size=size,
        )


def _check(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    scales: Scales,
    ids: Tensor,
    weights: Tensor,
    held: range,
) -> None:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"x must be rows: {tuple(x.shape)}")
    num, width, hidden = gate_up.shape
    if (hidden, width % 2) != (x.shape[1], 0) or down.shape != (num, hidden, width // 2):
        raise ValueError(
            f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} do not fit x "
            f"{tuple(x.shape)}"
        )
    if not (gate_up.is_contiguous() and down.is_contiguous()):
        raise ValueError("gate_up and down must be contiguous")
    for name, stack, by in (("gate_up", gate_up, scales[0]), ("down", down, scales[1])):
        if by is None and stack.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype}, {name} {stack.dtype}")
        if by is not None and not fits(stack, by):
            raise ValueError(f"scales {tuple(by.shape)} do not fit {name} {tuple(stack.shape)}")
    if num < len(held) or held.step != 1:
        raise ValueError(f"{held} does not fit {num} experts")
    rows = ids.dim() == 2 and len(ids) == len(x) and ids.shape == weights.shape
    if not rows or ids.dtype != torch.int32 or weights.dtype != torch.float32:
        raise ValueError(f"ids {tuple(ids.shape)} {ids.dtype}, weights {tuple(weights.shape)}")
    if not (ids.is_contiguous() and weights.is_contiguous()):
        raise ValueError("ids and weights must be contiguous")


def _checked_out(
    x: Tensor, shared: Tensor | None, shared_gate: Tensor | None, out: Tensor | None
) -> Tensor:
    for name, tensor in (("shared", shared), ("out", out)):
        if tensor is not None and (
            tensor.shape != x.shape or tensor.dtype != x.dtype or tensor.stride(1) != 1
        ):
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} does not fit x")
    if shared_gate is not None and (
        shared is None or shared_gate.shape != (len(x), 1) or shared_gate.dtype != torch.float32
    ):
        raise ValueError(f"shared_gate {tuple(shared_gate.shape)} {shared_gate.dtype}")
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
