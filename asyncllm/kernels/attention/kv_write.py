"""Rotary position embedding of a packed qkv row, fused with the write of K and V to their slots.

Owns the layout of packed qkv and of the K/V cache write; does not know who chose the slots.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor


# step metadata lies anywhere in a staging buffer: one build for every alignment
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rope_kv_kernel(
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    qkv_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, HALF_PAD)
    dim_live = dim < HALF
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    paired = dim < PAIRS
    cos = tl.load(cos_sin_ptr + position * (2 * PAIRS) + dim, mask=paired, other=0.0)
    sin = tl.load(cos_sin_ptr + position * (2 * PAIRS) + PAIRS + dim, mask=paired, other=0.0)
    # where the elements lie that are taken together; those beyond the pairs, by halves of the rest
    first, second = dim, dim + HALF
    if PAIRS < HALF:
        first = tl.where(paired, dim, dim + PAIRS)
        second = tl.where(paired, dim + PAIRS, dim + HALF)

    live = (head < Q_HEADS + 2 * KV_HEADS)[:, None] & dim_live[None, :]
    ptr = qkv_ptr + token * qkv_stride + head[:, None] * (2 * HALF)
    low = tl.load(ptr + first[None, :], mask=live, other=0.0)
    high = tl.load(ptr + second[None, :], mask=live, other=0.0)
    x, y = low.to(tl.float32), high.to(tl.float32)
    turned = (head < Q_HEADS + KV_HEADS)[:, None]
    moved = turned & paired[None, :]
    low = tl.where(moved, (x * cos[None, :] - y * sin[None, :]).to(low.dtype), low)
    high = tl.where(moved, (y * cos[None, :] + x * sin[None, :]).to(high.dtype), high)

    tl.store(ptr + first[None, :], low, mask=live & moved)
    tl.store(ptr + second[None, :], high, mask=live & moved)
    is_k = live & (head >= Q_HEADS)[:, None] & turned
    row = slot * (2 * HALF * KV_HEADS)
    offset = row + (head - Q_HEADS)[:, None] * (2 * HALF)
    tl.store(k_ptr + offset + first[None, :], low, mask=is_k)
    tl.store(k_ptr + offset + second[None, :], high, mask=is_k)
    is_v = live & (head >= Q_HEADS + KV_HEADS)[:, None]
    offset -= 2 * HALF * KV_HEADS
    tl.store(v_ptr + offset + first[None, :], low, mask=is_v)
    tl.store(v_ptr + offset + second[None, :], high, mask=is_v)


def rope_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_q_heads: int,
) -> Tensor:
    """Rotate Q and K in place and write rotated K, and V, to the cache.

    Args:
        qkv: [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim], rows [q | k | v]; rows may
            be strided. The V part is read only.
        cos_sin: [max_positions, dim] float32, contiguous: dim / 2 cosines, then sines, for the
            first ``dim`` elements of a head, with whatever factor multiplies them.
        positions: [num_tokens] int32 or int64.
        slots: [num_tokens] int32 or int64; padding tokens point at the last slot.
        k_cache, v_cache: [num_slots + 1, num_kv_heads, head_dim], contiguous, dtype of qkv.
        num_q_heads: query heads in a row of qkv.

    Returns:
        Q rotated, a view [num_tokens, num_q_heads, head_dim] into qkv. Rotation pairs element i
        with i + dim / 2 and runs in fp32; what lies beyond ``dim`` stays as it is.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``rope_kv_ref``. Does not synchronise; safe in CUDA graphs.
    """
    num_tokens = qkv.shape[0]
    num_kv_heads, head_dim = _check(qkv, cos_sin, positions, slots, k_cache, v_cache, num_q_heads)
    if num_tokens:
        half = head_dim // 2
        half_pad = triton.next_power_of_2(half)
        # about 2048 elements a program: 16 a thread with four warps
        heads = max(1, min(1024 // half_pad, triton.next_power_of_2(num_q_heads)))
        grid = (num_tokens, triton.cdiv(num_q_heads + 2 * num_kv_heads, heads))
        _rope_kv_kernel[grid](
            qkv,
            cos_sin,
            positions,
            slots,
            k_cache,
            v_cache,
            qkv.stride(0),
            Q_HEADS=num_q_heads,
            KV_HEADS=num_kv_heads,
            HALF=half,
            PAIRS=cos_sin.shape[1] // 2,
            HALF_PAD=half_pad,
            HEADS=heads,
            num_warps=4,
        )
    q: Tensor = qkv[:, : num_q_heads * head_dim].unflatten(1, (num_q_heads, head_dim))
    return q


def rope_kv_ref(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_q_heads: int,
) -> Tensor:
    """``rope_kv`` in plain torch; same in-place effects."""
    num_kv_heads, head_dim = k_cache.shape[1:]
    heads: Tensor = qkv.unflatten(1, (-1, head_dim))
    cos, sin = cos_sin[positions.long()][:, None].chunk(2, dim=-1)
    moved = heads[:, : num_q_heads + num_kv_heads, : cos_sin.shape[1]]
    low, high = moved.float().chunk(2, dim=-1)
    moved.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
    k_cache[slots.long()] = heads[:, num_q_heads : num_q_heads + num_kv_heads]
    v_cache[slots.long()] = heads[:, num_q_heads + num_kv_heads :]
    return heads[:, :num_q_heads]


def _check(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_q_heads: int,
) -> tuple[int, int]:
    if k_cache.dim() != 3 or k_cache.shape != v_cache.shape:
        raise ValueError(f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)} differ")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and cos_sin.is_contiguous()):
        raise ValueError("caches and cos_sin must be contiguous")
    if not qkv.dtype == k_cache.dtype == v_cache.dtype or cos_sin.dtype != torch.float32:
        raise ValueError(f"dtypes: qkv {qkv.dtype}, cache {k_cache.dtype}, cos {cos_sin.dtype}")
    _, num_kv_heads, head_dim = k_cache.shape
    width = (num_q_heads + 2 * num_kv_heads) * head_dim
    if qkv.dim() != 2 or qkv.shape[1] != width or qkv.stride(1) != 1:
        raise ValueError(f"qkv {tuple(qkv.shape)}: rows of {width} contiguous elements expected")
    if head_dim % 2 or cos_sin.shape[1] % 2 or cos_sin.shape[1] > head_dim:
        raise ValueError(f"cos_sin {tuple(cos_sin.shape)} does not fit head_dim {head_dim}")
    if positions.shape != (qkv.shape[0],) or slots.shape != (qkv.shape[0],):
        raise ValueError(f"positions and slots need {qkv.shape[0]} entries")
    return num_kv_heads, head_dim
