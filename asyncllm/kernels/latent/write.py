"""Writes tokens' latents to the cache, and rotates their queries.

Owns the layout of a row of the cache: the normed latent, then the rotated key that all heads share;
in 8-bit floats a scale for both lies apart. The scales are float32, since nothing smaller than four
bytes can be copied asynchronously.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.kv8 import KINDS, half_scale, quantized, whole_scale
from asyncllm.kernels.attention.quantize import quantize_ref

_FP8 = tl.constexpr(KINDS[torch.float8_e4m3fn])


# step metadata lies anywhere in a staging buffer: one build for every alignment
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _write_kernel(
    raw_ptr,
    turned_ptr,
    weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    cache_ptr,
    scales_ptr,
    raw_row,
    turned_row,
    turned_head,
    eps,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pair = tl.arange(0, HALF_PAD)
    live = pair < HALF
    # the places of a pair's two elements, in the cache as well: q·k does not care for their order
    if INTERLEAVED:
        low, high = 2 * pair, 2 * pair + 1
    else:
        low, high = pair, pair + HALF
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_sin_ptr + position * (2 * HALF) + pair, mask=live, other=0.0)
    sin = tl.load(cos_sin_ptr + position * (2 * HALF) + HALF + pair, mask=live, other=0.0)
    if part == 0:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        row = cache_ptr + slot * (RANK + 2 * HALF)
        raw = raw_ptr + token * raw_row
        dim = tl.arange(0, RANK_PAD)
        x = tl.load(raw + dim, mask=dim < RANK, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + dim, mask=dim < RANK, other=0.0)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / RANK + eps)
        normed = (x * scale).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
        dtype = raw_ptr.dtype.element_ty
        normed = normed.to(dtype)
        x = tl.load(raw + RANK + low, mask=live, other=0.0).to(tl.float32)
        y = tl.load(raw + RANK + high, mask=live, other=0.0).to(tl.float32)
        first = (x * cos - y * sin).to(dtype)
        second = (y * cos + x * sin).to(dtype)
        if SCALED:
            keys = tl.maximum(tl.abs(first.to(tl.float32)), tl.abs(second.to(tl.float32)))
            most = tl.maximum(tl.max(tl.abs(normed.to(tl.float32)), axis=0), tl.max(keys, axis=0))
            by = whole_scale(half_scale(most, _FP8))
            tl.store(scales_ptr + slot, by)
            normed = quantized(normed.to(tl.float32), by, _FP8)
            first = quantized(first.to(tl.float32), by, _FP8)
            second = quantized(second.to(tl.float32), by, _FP8)
        tl.store(row + dim, normed, mask=dim < RANK)
        tl.store(row + RANK + low, first, mask=live)
        tl.store(row + RANK + high, second, mask=live)
    else:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)
        inside = (head < NUM_HEADS)[:, None] & live[None, :]
        ptr = turned_ptr + token * turned_row + head[:, None] * turned_head
        a = tl.load(ptr + low[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(ptr + high[None, :], mask=inside, other=0.0).to(tl.float32)
        # the thread that has read an element writes it, so nobody reads what is rotated already
        tl.store(ptr + low[None, :], (a * cos - b * sin).to(ptr.dtype.element_ty), mask=inside)
        tl.store(ptr + high[None, :], (b * cos + a * sin).to(ptr.dtype.element_ty), mask=inside)


def write(
    raw: Tensor,
    turned: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
    scales: Tensor | None = None,
    *,
    interleaved: bool,
) -> None:
    """Norm latents and rotate the keys beside them into the cache; rotate queries in place.

    Args:
        raw: [num_tokens, rank + rope_dim]: latent and key; rows may be strided. Read only.
        turned: [num_tokens, num_heads, rope_dim]: the part of the queries that is rotated.
        weight: [rank], of the latent's norm.
        eps: added to the mean square.
        cos_sin: [max_positions, rope_dim] float32, contiguous: cosines, then sines.
        positions: [num_tokens] int32.
        slots: [num_tokens] int32; padding tokens point at the last slot.
        cache: [num_slots + 1, rank + rope_dim], contiguous, dtype of raw or 8-bit floats.
        scales: [num_slots + 1] float32: what multiplies a row of 8-bit floats.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + rope_dim / 2); they keep their
            places. Rotation and norm run in float32.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``write_ref``. Does not synchronise; safe in CUDA graphs.
    """
    num_tokens, num_heads, rope_dim = turned.shape
    rank = weight.shape[0]
    check_cache(raw, cache, scales)
    _check(raw, turned, weight, cos_sin, positions, slots, cache)
    if num_tokens == 0:
        return
    half_pad = triton.next_power_of_2(rope_dim // 2)
    heads = max(1, min(1024 // half_pad, triton.next_power_of_2(num_heads)))
    _write_kernel[(num_tokens, 1 + triton.cdiv(num_heads, heads))](
        raw,
        turned,
        weight,
        cos_sin,
        positions,
        slots,
        cache,
        scales,
        raw.stride(0),
        turned.stride(0),
        turned.stride(1),
        eps,
        NUM_HEADS=num_heads,
        HEADS=heads,
        RANK=rank,
        RANK_PAD=triton.next_power_of_2(rank),
        HALF=rope_dim // 2,
        HALF_PAD=half_pad,
        INTERLEAVED=interleaved,
        SCALED=scales is not None,
        num_warps=4,
    )


def write_ref(
    raw: Tensor,
    turned: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
    scales: Tensor | None = None,
    *,
    interleaved: bool,
) -> None:
    """``write`` in plain torch; same in-place effects."""
    rank = weight.shape[0]
    wide = raw[:, :rank].float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(raw.dtype) * weight
    angles = cos_sin[positions.long()]
    key = turn_ref(raw[:, None, rank:], angles, interleaved=interleaved)[:, 0]
    rows = torch.cat([normed, key], dim=1)
    if scales is None:
        cache[slots.long()] = rows
    else:
        rows, by = quantize_ref(rows, cache.dtype, None)
        cache.view(torch.uint8)[slots.long()] = rows.view(torch.uint8)
        scales[slots.long()] = by[:, 0].float()
    turned.copy_(turn_ref(turned, angles, interleaved=interleaved))


def turn_ref(x: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
    """``x`` [T, heads, dim] rotated by cosines and sines [T, dim], in float32, then rounded."""
    cos, sin = angles[:, None].chunk(2, dim=-1)
    wide = x.float()
    low, high = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    pairs = low * cos - high * sin, high * cos + low * sin
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return turned.to(x.dtype)


def read_ref(cache: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    """Rows of the cache as float32; slots are int64."""
    if scales is None:
        return cache[slots].float()
    rows = cache.view(torch.uint8)[slots].view(cache.dtype)
    return rows.float() * scales[slots][:, None]


def check_cache(like: Tensor, cache: Tensor, scales: Tensor | None) -> None:
    """Raises ValueError for a cache that is neither of the dtype of ``like`` nor 8-bit floats with
    scales."""
    wanted = like.dtype if scales is None else torch.float8_e4m3fn
    if cache.dtype != wanted:
        raise ValueError(f"dtypes: cache {cache.dtype}, wanted {wanted}")
    if scales is not None and (
        scales.shape != cache.shape[:1] or scales.dtype != torch.float32 or scales.stride(0) != 1
    ):
        raise ValueError(f"scales {tuple(scales.shape)} {scales.dtype}: float32 of each row wanted")


def _check(
    raw: Tensor,
    turned: Tensor,
    weight: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
) -> None:
    num_tokens, _, rope_dim = turned.shape
    width = weight.shape[0] + rope_dim
    if raw.shape != (num_tokens, width) or cache.dim() != 2 or cache.shape[1] != width:
        raise ValueError(f"raw {tuple(raw.shape)}, cache {tuple(cache.shape)}: rows of {width}")
    if not raw.dtype == turned.dtype == weight.dtype:
        raise ValueError(f"dtypes: raw {raw.dtype}, turned {turned.dtype}, weight {weight.dtype}")
    if not (cache.is_contiguous() and cos_sin.is_contiguous()) or cos_sin.dtype != torch.float32:
        raise ValueError("the cache and cos_sin, in float32, must be contiguous")
    if raw.stride(1) != 1 or turned.stride(2) != 1:
        raise ValueError("the last dimensions of raw and turned must be contiguous")
    if rope_dim % 2 or cos_sin.shape[1] != rope_dim:
        raise ValueError(f"cos_sin {tuple(cos_sin.shape)} does not fit rope_dim {rope_dim}")
    if positions.shape != (num_tokens,) or slots.shape != (num_tokens,):
        raise ValueError(f"positions and slots need {num_tokens} entries")
