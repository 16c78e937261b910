"""Rotary position embedding of a packed qkv row, fused with the write of K and V to their slots,
in their own type or in 8 bits.

Owns the layout of packed qkv and of the K/V cache write; does not know who chose the slots.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.kv8 import (
    KINDS,
    half_scale,
    num_scales,
    quantized,
    spread,
    whole_scale,
)
from asyncllm.kernels.attention.quantize import quantize_ref
from asyncllm.kernels.autotune import launches_early
from asyncllm.kernels.early import begun, launched_early


@triton.jit
def _store(k_ptr, v_ptr, offset, place, values, is_k, is_v, V_BEHIND: tl.constexpr):
    """``values`` of a slot's K heads and V heads to ``place`` in their rows."""
    tl.store(k_ptr + offset + place, values, mask=is_k)
    tl.store(v_ptr + offset - V_BEHIND + place, values, mask=is_v)


# step metadata lies anywhere in a staging buffer: one build for every alignment
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rope_kv_kernel(
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    scales_ptr,
    qkv_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    KIND: tl.constexpr,
    SCALES: tl.constexpr,
    EARLY: tl.constexpr,
):
    begun(EARLY)
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
    is_v = live & (head >= Q_HEADS + KV_HEADS)[:, None]
    behind: tl.constexpr = 2 * HALF * KV_HEADS
    offset = slot * behind + (head - Q_HEADS)[:, None] * (2 * HALF)
    low_at, high_at = first[None, :], second[None, :]
    if KIND == 0:
        _store(k_ptr, v_ptr, offset, low_at, low, is_k, is_v, behind)
        _store(k_ptr, v_ptr, offset, high_at, high, is_k, is_v, behind)
    else:
        low, high = low.to(tl.float32), high.to(tl.float32)
        kv_head = (head - Q_HEADS)[:, None]
        is_value = kv_head >= KV_HEADS
        # [slots, KV_HEADS, 2, SCALES]
        scale_row = slot * KV_HEADS + kv_head - tl.where(is_value, KV_HEADS, 0)
        scales_at = scales_ptr + (2 * scale_row + is_value.to(tl.int32)) * SCALES
        if SCALES == 1:
            most = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
            half = half_scale(most, KIND)[:, None]
            low_scale, high_scale = whole_scale(half), whole_scale(half)
            kept = (head >= Q_HEADS) & (head < Q_HEADS + 2 * KV_HEADS)
            tl.store(scales_at, half.to(tl.int16), mask=kept[:, None])
        else:
            # groups of 8, none of which lies on both sides of a border of halves or pairs
            groups: tl.constexpr = HALF_PAD // 8
            group = tl.arange(0, groups)
            low_group, high_group = group, group + HALF // 8
            if PAIRS < HALF:
                low_group = tl.where(group < PAIRS // 8, group, group + PAIRS // 8)
                high_group = tl.where(group < PAIRS // 8, group + PAIRS // 8, group + HALF // 8)
            low_most = tl.max(tl.reshape(tl.abs(low), [HEADS, groups, 8]), axis=2)
            high_most = tl.max(tl.reshape(tl.abs(high), [HEADS, groups, 8]), axis=2)
            low_half, high_half = half_scale(low_most, KIND), half_scale(high_most, KIND)
            kept = (head >= Q_HEADS) & (head < Q_HEADS + 2 * KV_HEADS)
            kept = kept[:, None] & (group < HALF // 8)[None, :]
            tl.store(scales_at + low_group[None, :], low_half.to(tl.int16), mask=kept)
            tl.store(scales_at + high_group[None, :], high_half.to(tl.int16), mask=kept)
            low_scale = spread(whole_scale(low_half), HEADS, groups, 8)
            high_scale = spread(whole_scale(high_half), HEADS, groups, 8)
        low, high = quantized(low, low_scale, KIND), quantized(high, high_scale, KIND)
        _store(k_ptr, v_ptr, offset, low_at, low, is_k, is_v, behind)
        _store(k_ptr, v_ptr, offset, high_at, high, is_k, is_v, behind)


def rope_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_q_heads: int,
    scales: Tensor | None = None,
) -> Tensor:
    """Rotate Q and K in place and write rotated K, and V, to the cache.

    Args:
        qkv: [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim], rows [q | k | v]; rows may
            be strided. The V part is read only.
        cos_sin: [max_positions, dim] float32, contiguous: dim / 2 cosines, then sines, for the
            first ``dim`` elements of a head, with whatever factor multiplies them.
        positions: [num_tokens] int32 or int64.
        slots: [num_tokens] int32 or int64; padding tokens point at the last slot.
        k_cache, v_cache: [num_slots + 1, num_kv_heads, head_dim], contiguous, dtype of qkv, or
            int8 or float8_e4m3fn.
        num_q_heads: query heads in a row of qkv.
        scales: of such 8-bit caches, [num_slots + 1, num_kv_heads, 2, n] bfloat16, contiguous, for
            K and for V: n is 1, or one for each 8 channels, which must then divide the halves of a
            head and of what is rotated of it.

    Returns:
        Q rotated, a view [num_tokens, num_q_heads, head_dim] into qkv. Rotation pairs element i
        with i + dim / 2 and runs in fp32; what lies beyond ``dim`` stays as it is.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``rope_kv_ref``. Does not synchronise; safe in CUDA graphs.
    """
    num_tokens = qkv.shape[0]
    num_kv_heads, head_dim = _check(qkv, cos_sin, positions, slots, k_cache, v_cache, num_q_heads)
    per_head = num_scales(k_cache, scales, qkv.dtype)
    if per_head > 1 and (head_dim % 16 or cos_sin.shape[1] % 16):
        raise ValueError(f"groups of 8 in halves of {head_dim} and of {cos_sin.shape[1]}")
    if num_tokens:
        half = head_dim // 2
        half_pad = triton.next_power_of_2(half)
        # about 2048 elements a program: 16 a thread with four warps
        heads = max(1, min(1024 // half_pad, triton.next_power_of_2(num_q_heads)))
        early = launches_early(qkv.device, "rotation")
        grid = (num_tokens, triton.cdiv(num_q_heads + 2 * num_kv_heads, heads))
        _rope_kv_kernel[grid](
            qkv,
            cos_sin,
            positions,
            slots,
            k_cache,
            v_cache,
            None if scales is None else scales.view(torch.int16),
            qkv.stride(0),
            Q_HEADS=num_q_heads,
            KV_HEADS=num_kv_heads,
            HALF=half,
            PAIRS=cos_sin.shape[1] // 2,
            HALF_PAD=half_pad,
            HEADS=heads,
            KIND=KINDS.get(k_cache.dtype, 0),
            SCALES=per_head,
            EARLY=early,
            num_warps=4,
            **launched_early(early, qkv),
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
    scales: Tensor | None = None,
) -> Tensor:
    """``rope_kv`` in plain torch; same in-place effects."""
    num_kv_heads, head_dim = k_cache.shape[1:]
    heads: Tensor = qkv.unflatten(1, (-1, head_dim))
    cos, sin = cos_sin[positions.long()][:, None].chunk(2, dim=-1)
    moved = heads[:, : num_q_heads + num_kv_heads, : cos_sin.shape[1]]
    low, high = moved.float().chunk(2, dim=-1)
    moved.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
    k, v = heads[:, num_q_heads:].split(num_kv_heads, dim=1)
    if scales is not None:
        group = None if scales.shape[3] == 1 else head_dim // scales.shape[3]
        pair, scales[slots.long()] = quantize_ref(torch.stack((k, v), 2), k_cache.dtype, group)
        # bytes, since torch does not index 8-bit floats
        k, v = pair.view(torch.uint8).unbind(2)
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    k_cache[slots.long()] = k
    v_cache[slots.long()] = v
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
    if k_cache.dtype != v_cache.dtype or cos_sin.dtype != torch.float32:
        raise ValueError(f"dtypes: K {k_cache.dtype}, V {v_cache.dtype}, cos {cos_sin.dtype}")
    _, num_kv_heads, head_dim = k_cache.shape
    width = (num_q_heads + 2 * num_kv_heads) * head_dim
    if qkv.dim() != 2 or qkv.shape[1] != width or qkv.stride(1) != 1:
        raise ValueError(f"qkv {tuple(qkv.shape)}: rows of {width} contiguous elements expected")
    if head_dim % 2 or cos_sin.shape[1] % 2 or cos_sin.shape[1] > head_dim:
        raise ValueError(f"cos_sin {tuple(cos_sin.shape)} does not fit head_dim {head_dim}")
    if positions.shape != (qkv.shape[0],) or slots.shape != (qkv.shape[0],):
        raise ValueError(f"positions and slots need {qkv.shape[0]} entries")
    return num_kv_heads, head_dim
