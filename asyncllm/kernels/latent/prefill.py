"""Causal attention of rows of many new tokens over decompressed keys and values.

Owns the walk over query blocks; the keys of a row, its own tokens included, lie one behind the
other, as ``expand`` leaves them. As in `kernels/attention/prefill.py`, blocks of all rows form one
list that is walked from the end, because late blocks of a row have most keys to read.
Source: online softmax over tiles as in FlashAttention-2 (Dao, 2023).
"""

# mypy: allow-incomplete-defs

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from asyncllm.kernels.attention.scores import padded
from asyncllm.kernels.autotune import tuned


@dataclass(frozen=True, slots=True)
class LatentPrefillConfig:
    """How the kernel is built: queries and keys of a tile, warps, pipeline depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# two programs of one group of four warps on a multiprocessor overlap the softmax of one with the
# products of the other
_CONFIG = LatentPrefillConfig(64, 64, 4, 2)


@triton.jit
def _attend(
    acc,
    best,
    norm,
    q,
    turned,
    made_ptr,
    keys_ptr,
    made_desc,
    values_desc,
    keys_desc,
    base,
    column,
    begin,
    stop,
    q_position,
    scale_log2,
    WIDTH: tl.constexpr,
    NOPE: tl.constexpr,
    NOPE_PAD: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
    COPY: tl.constexpr,
    STAGES: tl.constexpr,
    SETTLE: tl.constexpr,
):
    """Keys [begin, stop): whole tiles that all queries see, or (EDGE) each those up to its place.

    COPY: by the tensor copy engine, which knows no mask.
    """
    nope = tl.arange(0, NOPE_PAD)
    turn = tl.arange(0, ROPE_PAD)
    value = tl.arange(0, VALUE_PAD)
    for key in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        if COPY:
            k = made_desc.load([base + key, column])
            v = values_desc.load([base + key, column + NOPE])
            kr = keys_desc.load([base + key, 0])
        else:
            position = key + tl.arange(0, BLOCK_N)
            # what is behind the last key may be NaN, and 0 * NaN would spoil the sum
            live = (position < stop)[:, None]
            at = (base + position).to(tl.int64)[:, None]
            k = tl.load(
                made_ptr + at * WIDTH + (column + nope)[None, :],
                mask=live & (nope < NOPE)[None, :],
                other=0.0,
            )
            v = tl.load(
                made_ptr + at * WIDTH + (column + NOPE + value)[None, :],
                mask=live & (value < VALUE)[None, :],
                other=0.0,
            )
            kr = tl.load(
                keys_ptr + at * ROPE + turn[None, :], mask=live & (turn < ROPE)[None, :], other=0.0
            )
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        score = tl.dot(turned, tl.trans(kr), score, input_precision="ieee") * scale_log2
        if EDGE:
            place = key + tl.arange(0, BLOCK_N)
            seen = (place < stop)[None, :] & (place[None, :] <= q_position[:, None])
            score = tl.where(seen, score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        norm = norm * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        best = new_best
        if SETTLE:
            # an accumulator that is pending where the loop turns makes ptxas run all matrix
            # instructions of the kernel one by one: this use of it waits
            acc = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
            )
    return acc, best, norm


@triton.jit
def _find_block(cu_counts_ptr, num_rows, index, BLOCK_M: tl.constexpr, SCAN: tl.constexpr):
    """Row of block ``total - 1 - index``, the row's first one, and the block's number."""
    total = 0
    for begin in range(0, num_rows, SCAN):
        other = begin + tl.arange(0, SCAN)
        low = tl.load(cu_counts_ptr + other, mask=other < num_rows, other=0)
        high = tl.load(cu_counts_ptr + other + 1, mask=other < num_rows, other=0)
        total += tl.sum(tl.cdiv(high - low, BLOCK_M), axis=0)
    wanted = total - 1 - index
    row = 0
    first = 0
    passed = 0
    for begin in range(0, num_rows, SCAN):
        other = begin + tl.arange(0, SCAN)
        low = tl.load(cu_counts_ptr + other, mask=other < num_rows, other=0)
        high = tl.load(cu_counts_ptr + other + 1, mask=other < num_rows, other=0)
        blocks = tl.cdiv(high - low, BLOCK_M)
        ends = passed + tl.cumsum(blocks, axis=0)
        before = (ends <= wanted) & (other < num_rows)
        row += tl.sum(before.to(tl.int32), axis=0)
        first = tl.maximum(first, tl.max(tl.where(before, ends, 0), axis=0))
        passed += tl.sum(blocks, axis=0)
    return row, first, wanted


# step metadata lies anywhere in a staging buffer: one build for every alignment
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["starts_ptr", "cu_counts_ptr"],
)
def _prefill_kernel(
    q_ptr,
    turned_ptr,
    made_ptr,
    keys_ptr,
    made_desc,
    values_desc,
    keys_desc,
    starts_ptr,
    cu_counts_ptr,
    bases_ptr,
    out_ptr,
    num_rows,
    q_row,
    q_head,
    turned_row,
    turned_head,
    out_row,
    out_head,
    scale_log2,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    NOPE_PAD: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
    COPY: tl.constexpr,
    STAGES: tl.constexpr,
    SETTLE: tl.constexpr,
):
    head = tl.program_id(0) % HEADS
    index = tl.program_id(0) // HEADS
    row, first, wanted = _find_block(cu_counts_ptr, num_rows, index, BLOCK_M, SCAN)
    base = -1
    if wanted >= 0:  # else a surplus program: no row needs it
        base = tl.load(bases_ptr + row)
    if base >= 0:
        first_token = tl.load(cu_counts_ptr + row)
        count = tl.load(cu_counts_ptr + row + 1) - first_token
        start = tl.load(starts_ptr + row)
        done = (wanted - first) * BLOCK_M  # tokens of the row in earlier blocks
        nope = tl.arange(0, NOPE_PAD)
        turn = tl.arange(0, ROPE_PAD)
        value = tl.arange(0, VALUE_PAD)
        local = done + tl.arange(0, BLOCK_M)
        live = (local < count)[:, None]
        token = (first_token + local).to(tl.int64)[:, None]
        q = tl.load(
            q_ptr + token * q_row + head * q_head + nope[None, :],
            mask=live & (nope < NOPE)[None, :],
            other=0.0,
        )
        turned = tl.load(
            turned_ptr + token * turned_row + head * turned_head + turn[None, :],
            mask=live & (turn < ROPE)[None, :],
            other=0.0,
        )
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, VALUE_PAD], tl.float32)
        # [0, full) seen by all queries of the block, [full, stop) not by all; the latter first,
        # which leaves no query without a key
        full = (start + done) // BLOCK_N * BLOCK_N
        stop = start + tl.minimum(done + BLOCK_M, count)
        WIDTH: tl.constexpr = HEADS * (NOPE + VALUE)
        column = head * (NOPE + VALUE)
        acc, best, norm = _attend(
            acc,
            best,
            norm,
            q,
            turned,
            made_ptr,
            keys_ptr,
            made_desc,
            values_desc,
            keys_desc,
            base,
            column,
            full,
            stop,
            start + local,
            scale_log2,
            WIDTH,
            NOPE,
            NOPE_PAD,
            ROPE,
            ROPE_PAD,
            VALUE,
            VALUE_PAD,
            BLOCK_N,
            True,
            False,
            1,
            False,
        )
        acc, best, norm = _attend(
            acc,
            best,
            norm,
            q,
            turned,
            made_ptr,
            keys_ptr,
            made_desc,
            values_desc,
            keys_desc,
            base,
            column,
            0,
            full,
            start + local,
            scale_log2,
            WIDTH,
            NOPE,
            NOPE_PAD,
            ROPE,
            ROPE_PAD,
            VALUE,
            VALUE_PAD,
            BLOCK_N,
            False,
            COPY,
            STAGES,
            SETTLE,
        )
        tl.store(
            out_ptr + token * out_row + head * out_head + value[None, :],
            (acc / norm[:, None]).to(out_ptr.dtype.element_ty),
            mask=live & (value < VALUE)[None, :],
        )


def prefill(
    q: Tensor,
    turned: Tensor,
    made: Tensor,
    keys: Tensor,
    starts: Tensor,
    cu_counts: Tensor,
    bases: Tensor,
    scale: float,
    out: Tensor,
    config: LatentPrefillConfig | None = None,
) -> Tensor:
    """Causal attention of the decompressed rows' new tokens over all their keys.

    Args:
        q: [num_tokens, num_heads, nope_dim] of the whole step.
        turned: [num_tokens, num_heads, rope_dim]: the rotated part of the queries.
        made: [capacity, num_heads, nope_dim + v_dim], contiguous: keys, and values, of ``expand``.
        keys: [capacity, rope_dim], contiguous: the rotated part of the keys.
        starts, cu_counts: as given to ``plan_chunks``.
        bases: from it; rows with -1 are left out.
        scale: multiplies q·k; positive.
        out: [num_tokens, num_heads, v_dim]. Tokens of other rows, and of none, are left as they
            are.
        config: instead of the tuned or built-in one.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``prefill_ref``. Does not synchronise; safe in CUDA graphs.
    """
    num_tokens, num_heads, nope_dim = q.shape
    rope_dim, v_dim, num_rows = turned.shape[2], out.shape[2], starts.shape[0]
    _check(q, turned, made, keys, out)
    if config is None:
        entry = tuned(q.device, "latent prefill", "all")
        config = LatentPrefillConfig(**entry) if entry else _CONFIG
        if q.element_size() > 2:
            config = LatentPrefillConfig(32, 32, 4, 2)
    if num_tokens == 0 or num_rows == 0:
        return out
    copy = all(_copyable(made, dim) for dim in (nope_dim, rope_dim, v_dim))
    descs: list[TensorDescriptor | None] = [None, None, None]
    if copy:
        flat = made.flatten(1)
        descs = [
            TensorDescriptor.from_tensor(source, [config.block_n, dim])
            for source, dim in ((flat, nope_dim), (flat, v_dim), (keys, rope_dim))
        ]
    # every row leaves at most one block part empty, so this many blocks hold any division of the
    # tokens into rows
    num_blocks = num_tokens // config.block_m + num_rows
    _prefill_kernel[(num_blocks * num_heads,)](
        q,
        turned,
        made,
        keys,
        *descs,
        starts,
        cu_counts,
        bases,
        out,
        num_rows,
        q.stride(0),
        q.stride(1),
        turned.stride(0),
        turned.stride(1),
        out.stride(0),
        out.stride(1),
        scale * math.log2(math.e),
        HEADS=num_heads,
        NOPE=nope_dim,
        NOPE_PAD=padded(nope_dim),
        ROPE=rope_dim,
        ROPE_PAD=padded(rope_dim),
        VALUE=v_dim,
        VALUE_PAD=padded(v_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SCAN=128,
        COPY=copy,
        STAGES=config.num_stages,
        SETTLE=q.device.type != "cpu",  # the interpreter knows no assembly
        num_warps=config.num_warps,
    )
    return out


def prefill_ref(
    q: Tensor,
    turned: Tensor,
    made: Tensor,
    keys: Tensor,
    starts: Tensor,
    cu_counts: Tensor,
    bases: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """``prefill`` in plain torch, fp32 throughout, rounded at the end."""
    nope_dim = q.shape[2]
    for row in range(starts.shape[0]):
        begin, stop, base = int(cu_counts[row]), int(cu_counts[row + 1]), int(bases[row])
        if base < 0:
            continue
        start, length = int(starts[row]), int(starts[row]) + stop - begin
        mine, rope = made[base : base + length].float(), keys[base : base + length].float()
        scores = torch.einsum("thd,nhd->htn", q[begin:stop].float(), mine[..., :nope_dim])
        scores += torch.einsum("thd,nd->htn", turned[begin:stop].float(), rope)
        position = torch.arange(length, device=q.device)
        hidden = position[None, :] > position[start:, None]
        weights = (scores * scale).masked_fill_(hidden, float("-inf")).softmax(-1)
        found = torch.einsum("htn,nhd->thd", weights, mine[..., nope_dim:])
        out[begin:stop] = found.to(out.dtype)
    return out


def _copyable(made: Tensor, dim: int) -> bool:
    """Whether the tensor copy engine can fetch tiles of ``dim`` columns."""
    return made.element_size() <= 2 and dim == padded(dim)


def _check(q: Tensor, turned: Tensor, made: Tensor, keys: Tensor, out: Tensor) -> None:
    _, num_heads, nope_dim = q.shape
    if turned.shape[:2] != q.shape[:2] or out.shape[:2] != q.shape[:2]:
        raise ValueError(f"q {tuple(q.shape)}, turned {tuple(turned.shape)}, out do not fit")
    if made.shape[1:] != (num_heads, nope_dim + out.shape[2]):
        raise ValueError(f"made {tuple(made.shape)} does not fit q and out")
    if keys.shape != (made.shape[0], turned.shape[2]):
        raise ValueError(f"keys {tuple(keys.shape)} do not fit made {tuple(made.shape)}")
    if not q.dtype == turned.dtype == made.dtype == keys.dtype == out.dtype:
        raise ValueError(f"dtypes: q {q.dtype}, made {made.dtype}, out {out.dtype}")
    if not (made.is_contiguous() and keys.is_contiguous()):
        raise ValueError("made and keys must be contiguous")
    if not 1 == q.stride(2) == turned.stride(2) == out.stride(2):
        raise ValueError("the last dimensions of q, turned and out must be contiguous")
