"""The start of a step: input tokens, the slot table and the history; then embedding and first norm.

Owns what a step writes before the model runs; does not know who chose slots or lanes.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.rmsnorm import rmsnorm_ref

_BLOCK = 256


@triton.jit(do_not_specialize_on_alignment=["tokens_ptr"])
def _embed_kernel(
    tokens_ptr,
    table_ptr,
    weight_ptr,
    normed_ptr,
    residual_ptr,
    table_stride,
    eps,
    factor,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < HIDDEN
    token = tl.load(tokens_ptr + row).to(tl.int64)
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0)
    x = tl.load(table_ptr + token * table_stride + col, mask=mask, other=0.0)
    x = (x.to(tl.float32) * factor).to(x.dtype)
    tl.store(residual_ptr + row * HIDDEN + col, x, mask=mask)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    normed = (x * scale).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(normed_ptr + row * HIDDEN + col, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=[
        "tokens_ptr",
        "token_lanes_ptr",
        "positions_ptr",
        "slots_ptr",
        "sliding_slots_ptr",
    ],
)
def _stage_kernel(
    tokens_ptr,
    token_lanes_ptr,
    positions_ptr,
    slots_ptr,
    last_token_ptr,
    table_ptr,
    history_ptr,
    sliding_table_ptr,
    sliding_slots_ptr,
    out_ptr,
    num_tokens,
    table_stride,
    history_stride,
    HISTORY: tl.constexpr,
    SLIDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < num_tokens
    lane = tl.load(token_lanes_ptr + i, mask=live, other=-1).to(tl.int64)
    owned = lane >= 0
    position = tl.load(positions_ptr + i, mask=owned, other=0).to(tl.int64)
    token = tl.load(tokens_ptr + i, mask=owned, other=0).to(tl.int64)
    last = tl.load(last_token_ptr + lane, mask=owned & (token < 0), other=0).to(tl.int64)
    token = tl.where(token < 0, last, token)
    tl.store(out_ptr + i, token, mask=live)
    slot = tl.load(slots_ptr + i, mask=owned, other=0)
    tl.store(table_ptr + lane * table_stride + position, slot, mask=owned)
    if HISTORY:
        tl.store(history_ptr + lane * history_stride + position, token.to(tl.int32), mask=owned)
    if SLIDING:
        slot = tl.load(sliding_slots_ptr + i, mask=owned, other=0)
        tl.store(sliding_table_ptr + lane * table_stride + position, slot, mask=owned)


def stage(
    tokens: Tensor,
    token_lanes: Tensor,
    positions: Tensor,
    slots: Tensor,
    last_token: Tensor,
    table: Tensor,
    history: Tensor | None = None,
    sliding_table: Tensor | None = None,
    sliding_slots: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Input tokens of a step; enters their slots, and the tokens, in the lane tables.

    Args:
        tokens: [num_tokens] int32; -1: the last token of its lane.
        token_lanes: [num_tokens] int32; -1 marks padding, for which nothing is written and token
            0 is given.
        positions, slots: [num_tokens] int32.
        last_token: [num_lanes] int64.
        table: [num_lanes, max_len] int32; ``table[lane, position] = slot``.
        history: like table; ``history[lane, position] = token``.
        sliding_table, sliding_slots: of the second slot space, like table and slots, with the
            table's strides.
        out: [num_tokens] int64, where to write.

    Returns:
        [num_tokens] int64.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``stage_ref``. One launch. Does not synchronise; safe in CUDA graphs.
    """
    num = len(tokens)
    second_table = table if sliding_table is None else sliding_table
    second_slots = slots if sliding_slots is None else sliding_slots
    for name, column in (
        ("tokens", tokens),
        ("token_lanes", token_lanes),
        ("positions", positions),
        ("slots", slots),
        ("sliding_slots", second_slots),
    ):
        if column.shape != (num,) or column.dtype != torch.int32 or not column.is_contiguous():
            raise ValueError(f"{name} {tuple(column.shape)} {column.dtype}: [{num}] int32 expected")
    for name, rows in (("table", table), ("history", table if history is None else history)):
        if rows.dtype != torch.int32 or rows.dim() != 2 or rows.stride(1) != 1:
            raise ValueError(f"{name} {tuple(rows.shape)} {rows.dtype}: int32 rows expected")
        if rows.shape != (len(last_token), table.shape[1]):
            raise ValueError(f"{name} {tuple(rows.shape)} has not {len(last_token)} lanes")
    like = second_table.shape == table.shape and second_table.stride() == table.stride()
    if second_table.dtype != torch.int32 or not like:
        raise ValueError(f"sliding_table {tuple(second_table.shape)} is not like the table")
    if last_token.dtype != torch.int64 or not last_token.is_contiguous():
        raise ValueError(f"last_token {last_token.dtype}: contiguous int64 expected")
    if out is None:
        out = torch.empty(num, dtype=torch.int64, device=tokens.device)
    elif out.shape != (num,) or out.dtype != torch.int64 or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} {out.dtype}: [{num}] int64 expected")
    if num:
        _stage_kernel[(triton.cdiv(num, _BLOCK),)](
            tokens,
            token_lanes,
            positions,
            slots,
            last_token,
            table,
            table if history is None else history,
            second_table,
            second_slots,
            out,
            num,
            table.stride(0),
            table.stride(0) if history is None else history.stride(0),
            HISTORY=history is not None,
            SLIDING=sliding_table is not None,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out


def embed_rmsnorm(
    tokens: Tensor,
    table: Tensor,
    weight: Tensor,
    eps: float,
    scale: float = 1.0,
    out: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of the embedding table times ``scale``, and their RMS norm.

    Args:
        tokens: [num_tokens] int32 or int64, in range.
        table: [vocab_size, hidden]; rows may be strided.
        weight: [hidden], dtype of the table or float32.
        eps: as in ``rmsnorm``.
        scale: of what is looked up; the product is rounded before the norm.
        out, residual: [num_tokens, hidden] contiguous, where to write.

    Returns:
        (normed, residual), each [num_tokens, hidden]: the norm rounds as ``rmsnorm`` does.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``embed_rmsnorm_ref``. Does not synchronise; safe in CUDA graphs.
    """
    num, hidden = len(tokens), table.shape[1]
    if tokens.dim() != 1 or tokens.is_floating_point() or not tokens.is_contiguous():
        raise ValueError(f"tokens {tuple(tokens.shape)} {tokens.dtype}: integers expected")
    fits = weight.shape == (hidden,) and weight.dtype in {table.dtype, torch.float32}
    if table.stride(1) != 1 or not fits:
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit the table")
    made = []
    for name, given in (("out", out), ("residual", residual)):
        if given is None:
            given = torch.empty((num, hidden), dtype=table.dtype, device=table.device)
        elif (
            given.shape != (num, hidden) or given.dtype != table.dtype or not given.is_contiguous()
        ):
            raise ValueError(f"{name} {tuple(given.shape)} {given.dtype} does not fit")
        made.append(given)
    if num:
        block = triton.next_power_of_2(hidden)
        _embed_kernel[(num,)](
            tokens,
            table,
            weight,
            made[0],
            made[1],
            table.stride(0),
            eps,
            scale,
            HIDDEN=hidden,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        )
    return made[0], made[1]


def stage_ref(
    tokens: Tensor,
    token_lanes: Tensor,
    positions: Tensor,
    slots: Tensor,
    last_token: Tensor,
    table: Tensor,
    history: Tensor | None = None,
    sliding_table: Tensor | None = None,
    sliding_slots: Tensor | None = None,
) -> Tensor:
    """``stage`` in plain torch; same in-place effects."""
    owned = token_lanes >= 0
    lanes, where = token_lanes[owned].long(), positions[owned].long()
    given = tokens[owned].long()
    given = torch.where(given < 0, last_token[lanes], given)
    table[lanes, where] = slots[owned]
    if history is not None:
        history[lanes, where] = given.int()
    if sliding_table is not None and sliding_slots is not None:
        sliding_table[lanes, where] = sliding_slots[owned]
    out = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    out[owned] = given
    return out


def embed_rmsnorm_ref(
    tokens: Tensor, table: Tensor, weight: Tensor, eps: float, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``embed_rmsnorm`` in plain torch."""
    residual = table[tokens.long()] * scale
    return rmsnorm_ref(residual, weight, eps), residual
