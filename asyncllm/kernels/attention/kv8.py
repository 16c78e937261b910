"""8-bit K and V inside kernels: scales, and conversion from and to the types of products.

``quantize.py`` has the same arithmetic in plain torch. Scales are bfloat16 in memory; here they
are handled as the upper halves of float32.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.quantize import dequantize_ref

KIND_NAMES = {torch.int8: " int8", torch.float8_e4m3fn: " fp8"}  # in keys of tuned configurations
KINDS = {torch.int8: 1, torch.float8_e4m3fn: 2}  # KIND of kernels; 0 is K/V in their own type


@triton.jit
def half_scale(most, KIND: tl.constexpr):
    """The scale, as 16 bits, of numbers of which ``most`` is the largest: rounded up."""
    largest: tl.constexpr = 127.0 if KIND == 1 else 448.0
    scale = tl.div_rn(tl.maximum(most, 1e-30), tl.full(most.shape, largest, tl.float32))
    return (scale.to(tl.int32, bitcast=True) + 0xFFFF) >> 16


@triton.jit
def whole_scale(half):
    """float32 of a scale's 16 bits, whatever stands above them."""
    return (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def quantized(x, scale, KIND: tl.constexpr):
    """float32 ``x`` by ``scale``, in 8 bits."""
    divided = tl.div_rn(x, scale)
    if KIND == 1:
        rounded = tl.floor(divided + 0.5).to(tl.int8)
    else:
        # here, to the nearest, even: the conversion is exact then wherever it is made
        bits = divided.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = (divided + 24576.0) - 24576.0  # multiples of 2^-9
        rounded = tl.where(tl.abs(divided) < 0.015625, small, normal).to(tl.float8e4nv)
    return rounded


@triton.jit
def widened(x, dtype: tl.constexpr):
    """Numbers in 8 bits as ``dtype``, which holds them exactly."""
    if x.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        # by float32: the direct conversion of float16, which it would go by, is a slow one
        wide = x.to(tl.float16).to(tl.float32).to(dtype)
    else:
        wide = x.to(dtype)
    return wide


@triton.jit
def spread(scale, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """[ROWS, GROUPS * SIZE] of [ROWS, GROUPS]: each one SIZE times."""
    each = tl.broadcast_to(scale[:, :, None], [ROWS, GROUPS, SIZE])
    return tl.reshape(each, [ROWS, GROUPS * SIZE])


@triton.jit
def from_8_bits(
    k,
    v,
    scales_ptr,
    slot,
    seen,
    kv_head,
    KV_HEADS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    dtype: tl.constexpr,
):
    """K and V [ROWS, DIM_PAD] of slots [ROWS] as ``dtype``, times their scales. Of slots that are
    not ``seen`` K and V must be zero. SCALES 0: they have their own type."""
    if SCALES > 0:
        k_scale, v_scale = scales_of(scales_ptr, slot, seen, kv_head, KV_HEADS, DIM_PAD, SCALES)
        if SCALES == 1:
            k_scale, v_scale = k_scale[:, None], v_scale[:, None]
        else:
            k_scale = spread(k_scale, ROWS, DIM_PAD // 8, 8)
            v_scale = spread(v_scale, ROWS, DIM_PAD // 8, 8)
        k, v = times(widened(k, dtype), k_scale), times(widened(v, dtype), v_scale)
    return k, v


@triton.jit
def scales_of(
    scales_ptr,
    slot,
    seen,
    kv_head,
    KV_HEADS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SCALES: tl.constexpr,
):
    """float32 scales of K and of V in slots [ROWS]: [ROWS], or [ROWS, DIM_PAD / 8] for groups."""
    if SCALES == 1:
        # 32 bits: the scale of K below, that of V above
        pair = tl.load(scales_ptr + slot * KV_HEADS + kv_head, mask=seen, other=0)
        k_half, v_half = pair, pair >> 16
    else:
        group = tl.arange(0, DIM_PAD // 8)
        at = scales_ptr + ((slot * KV_HEADS + kv_head) * (2 * SCALES))[:, None] + group[None, :]
        live = seen[:, None] & (group < SCALES)[None, :]
        k_half = tl.load(at, mask=live, other=0)
        v_half = tl.load(at + SCALES, mask=live, other=0)
    return whole_scale(k_half), whole_scale(v_half)


@triton.jit
def times(x, scale):
    """Whole numbers times scales, rounded once."""
    if x.dtype == tl.bfloat16:  # which holds both exactly
        product = x * scale.to(tl.bfloat16)
    else:
        product = (x.to(tl.float32) * scale).to(x.dtype)
    return product


@triton.jit
def halves(x, KIND: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
    """The two 8-bit numbers in each of int16 ``x``, the lower and the upper, as ``dtype``.

    Where 16 bits are moved, and not 8, matrix instructions are fed as with 16-bit numbers; what is
    left to do takes two to three instructions for two numbers (ASM: bfloat16 or float16 on a GPU).
    """
    if ASM and KIND == 1 and dtype == tl.bfloat16:
        # 128 + the lower 7 bits, less 128 or, where the sign is set, 256: ones in these are units
        low = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c; mov.b32 c, 0xbf80bf80;
            lop3.b32 a, $1, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 b, $1, 0x00800080, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, b, c, a; }""",
            "=r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
        high = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, t; mov.b32 c, 0xbf80bf80; shr.u32 t, $1, 8;
            lop3.b32 a, t, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 b, t, 0x00800080, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, b, c, a; }""",
            "=r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif ASM and KIND == 1:
        # 1024 + 128 + the number, less 1152
        low = tl.inline_asm_elementwise(
            """{ .reg .b32 a, c; mov.b32 c, 0x64806480;
            lop3.b32 a, $1, 0x00ff00ff, 0x64806480, 0x6a;
            sub.f16x2 $0, a, c; }""",
            "=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
        high = tl.inline_asm_elementwise(
            """{ .reg .b32 a, c, t; mov.b32 c, 0x64806480; shr.u32 t, $1, 8;
            lop3.b32 a, t, 0x00ff00ff, 0x64806480, 0x6a;
            sub.f16x2 $0, a, c; }""",
            "=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    elif ASM and dtype == tl.bfloat16:
        # exponent and mantissa at their places, times 2^120 for the other bias
        low = tl.inline_asm_elementwise(
            """{ .reg .b32 a, s, u, c, z; mov.b32 c, 0x7b807b80; mov.b32 z, 0x80008000;
            shl.b32 s, $1, 8; shl.b32 u, $1, 4; and.b32 u, u, 0x07f007f0;
            lop3.b32 a, s, 0x80008000, u, 0xea;
            fma.rn.bf16x2 $0, a, c, z; }""",
            "=r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
        high = tl.inline_asm_elementwise(
            """{ .reg .b32 a, u, c, z; mov.b32 c, 0x7b807b80; mov.b32 z, 0x80008000;
            shr.u32 u, $1, 4; and.b32 u, u, 0x07f007f0;
            lop3.b32 a, $1, 0x80008000, u, 0xea;
            fma.rn.bf16x2 $0, a, c, z; }""",
            "=r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif ASM:
        # the same, times 2^8
        low = tl.inline_asm_elementwise(
            """{ .reg .b32 a, s, u, c; mov.b32 c, 0x5c005c00;
            shl.b32 s, $1, 8; shl.b32 u, $1, 7; and.b32 u, u, 0x3f803f80;
            lop3.b32 a, s, 0x80008000, u, 0xea;
            mul.f16x2 $0, a, c; }""",
            "=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
        high = tl.inline_asm_elementwise(
            """{ .reg .b32 a, u, c; mov.b32 c, 0x5c005c00;
            shr.u32 u, $1, 1; and.b32 u, u, 0x3f803f80;
            lop3.b32 a, $1, 0x80008000, u, 0xea;
            mul.f16x2 $0, a, c; }""",
            "=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    elif KIND == 1:
        low = ((x << 8) >> 8).to(dtype)
        high = (x >> 8).to(dtype)
    else:
        low = (x & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32).to(dtype)
        high = ((x >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        high = high.to(dtype)
    return low, high


@triton.jit
def kv_halves(x, KIND: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
    """``halves`` of K and V. To make float16 of e4m3, a GPU has an instruction from capability 8.9
    on, which those have that serve K/V in it."""
    if ASM and KIND == 2 and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 t; .reg .b16 a, b; prmt.b32 t, $2, 0, 0x3120; mov.b32 {a, b}, t;
            cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }""",
            "=r,=r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low, high = halves(x, KIND, ASM, dtype)
    return low, high


@triton.jit
def float16_factor(most):
    """The power of two that brings float32 ``most`` to the end of float16, and its inverse."""
    exponent = tl.maximum(most.to(tl.int32, bitcast=True) >> 23, 15)
    factor = ((268 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^14 by the power of ``most``
    return factor, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def by_power(scale):
    """The logarithm of the power of two below each positive float32 ``scale``, what the scale is
    by that power, and the power's inverse. Powers below -60, mostly of zeros, count as -60: a
    row may have others as high as 60 beside them."""
    power = tl.minimum(tl.maximum((scale.to(tl.int32, bitcast=True) >> 23) - 127, -60), 126)
    inverse = ((127 - power) << 23).to(tl.float32, bitcast=True)
    return power.to(tl.float32), scale * inverse, inverse


def num_scales(k_cache: Tensor, scales: Tensor | None, dtype: torch.dtype) -> int:
    """How many scales a head has; 0: K/V are in ``dtype``, the type of q.

    Raises:
        ValueError: caches and scales do not fit.
    """
    if scales is None:
        if k_cache.dtype != dtype:
            raise ValueError(f"dtypes: q {dtype}, cache {k_cache.dtype} without scales")
        return 0
    num_slots, num_kv_heads, head_dim = k_cache.shape
    if k_cache.dtype not in KINDS or scales.dtype != torch.bfloat16:
        raise ValueError(f"dtypes: cache {k_cache.dtype}, scales {scales.dtype}")
    num = int(scales.shape[-1])
    if scales.shape != (num_slots, num_kv_heads, 2, num) or num not in (1, head_dim // 8):
        raise ValueError(f"scales {tuple(scales.shape)} do not fit cache {tuple(k_cache.shape)}")
    if not scales.is_contiguous():
        raise ValueError("scales must be contiguous")
    return num


def packed_scales(scales: Tensor | None) -> Tensor | None:
    """What kernels take them as: K's and V's of a head at once, where there is one of each."""
    if scales is None:
        return None
    return scales.flatten(2).view(torch.int32 if scales.shape[3] == 1 else torch.int16)


def read_ref(
    k_cache: Tensor, v_cache: Tensor, scales: Tensor | None, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """K and V [n, num_kv_heads, head_dim] of ``slots`` [n] int64, in float32."""
    if scales is None:
        return k_cache[slots].float(), v_cache[slots].float()
    # bytes, since torch does not index 8-bit floats
    k, v = (x.view(torch.uint8)[slots].view(x.dtype) for x in (k_cache, v_cache))
    k_scales, v_scales = scales[slots].unbind(2)
    return dequantize_ref(k, k_scales, torch.float32), dequantize_ref(v, v_scales, torch.float32)
