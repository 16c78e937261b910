"""Decompresses the keys and values of rows' latents, before their chunks attend to them.

A product whose rows are gathered by slot: their number is known on the device only, so a
fixed number of programs walks over tiles.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.kv8 import widened
from asyncllm.kernels.autotune import num_sms
from asyncllm.kernels.latent.plan import EXPAND_TILE
from asyncllm.kernels.latent.write import check_cache, read_ref


# step metadata lies anywhere in a staging buffer: one build for every alignment
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["lanes_ptr", "starts_ptr", "cu_counts_ptr"],
)
def _expand_kernel(
    cache_ptr,
    scales_ptr,
    weight_ptr,
    table_ptr,
    lanes_ptr,
    starts_ptr,
    cu_counts_ptr,
    bases_ptr,
    tile_ends_ptr,
    made_ptr,
    keys_ptr,
    num_rows,
    table_row,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCAN: tl.constexpr,
    SCALED: tl.constexpr,
):
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    total = tl.load(tile_ends_ptr + num_rows - 1) * COLUMNS
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        wanted = tile // COLUMNS
        row = 0
        begin_tile = 0
        for begin in range(0, num_rows, SCAN):
            other = begin + tl.arange(0, SCAN)
            ends = tl.load(tile_ends_ptr + other, mask=other < num_rows, other=0x7FFFFFFF)
            row += tl.sum((ends <= wanted).to(tl.int32), axis=0)
            begin_tile = tl.maximum(begin_tile, tl.max(tl.where(ends <= wanted, ends, 0), axis=0))
        first = tl.load(cu_counts_ptr + row)
        keys = tl.load(cu_counts_ptr + row + 1) - first + tl.load(starts_ptr + row)
        position = (wanted - begin_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        live = position < keys
        lane = tl.load(lanes_ptr + row).to(tl.int64)
        slot = tl.load(table_ptr + lane * table_row + position, mask=live, other=0)
        latent = cache_ptr + slot.to(tl.int64) * (RANK + ROPE)
        n = tile % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, RANK, BLOCK_K):
            inside = (begin + k < RANK)[None, :]
            x = tl.load(
                latent[:, None] + (begin + k)[None, :], mask=live[:, None] & inside, other=0.0
            )
            weight = tl.load(
                weight_ptr + n[:, None] * RANK + (begin + k)[None, :],
                mask=(n < WIDTH)[:, None] & inside,
                other=0.0,
            )
            acc = tl.dot(widened(x, weight.dtype), tl.trans(weight), acc, input_precision="ieee")
        by = tl.full([BLOCK_M], 1.0, tl.float32)
        if SCALED:
            by = tl.load(scales_ptr + slot.to(tl.int64), mask=live, other=0.0)
            acc = acc * by[:, None]
        to = (tl.load(bases_ptr + row) + position).to(tl.int64)
        tl.store(
            made_ptr + to[:, None] * WIDTH + n[None, :],
            acc.to(made_ptr.dtype.element_ty),
            mask=live[:, None] & (n < WIDTH)[None, :],
        )
        if tile % COLUMNS == 0:
            turn = tl.arange(0, ROPE_PAD)
            inside = live[:, None] & (turn < ROPE)[None, :]
            key = tl.load(latent[:, None] + (RANK + turn)[None, :], mask=inside, other=0.0)
            if SCALED:
                key = (key.to(tl.float32) * by[:, None]).to(keys_ptr.dtype.element_ty)
            tl.store(keys_ptr + to[:, None] * ROPE + turn[None, :], key, mask=inside)


def expand(
    cache: Tensor,
    weight: Tensor,
    table: Tensor,
    lanes: Tensor,
    starts: Tensor,
    cu_counts: Tensor,
    bases: Tensor,
    tile_ends: Tensor,
    made: Tensor,
    keys: Tensor,
    scales: Tensor | None = None,
) -> None:
    """Decompress all keys of the rows of a plan that want it.

    Args:
        cache: [num_slots + 1, rank + rope_dim], contiguous, dtype of weight or 8-bit floats;
            latents of the new tokens are in it.
        weight: [num_heads, dims, rank], contiguous: of the heads that are wanted now.
        table: [num_lanes, max_len] int32: slot of each position.
        lanes, starts, cu_counts: as given to ``plan_chunks``.
        bases, tile_ends: from it.
        made: [capacity, num_heads, dims], contiguous: a row's keys go to ``bases[row]`` and after.
        keys: [capacity, rope_dim], contiguous: the rotated part, which all heads share.
        scales: [num_slots + 1] float32: what multiplies a row of 8-bit floats.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``expand_ref``. Does not synchronise; safe in CUDA graphs.
    """
    rank, rope_dim, width = weight.shape[2], keys.shape[1], weight.shape[0] * weight.shape[1]
    num_rows = lanes.shape[0]
    if cache.shape[1] != rank + rope_dim or made.shape[1:] != weight.shape[:2]:
        raise ValueError(f"cache {tuple(cache.shape)}, made {tuple(made.shape)} do not fit weight")
    if made.shape[0] != keys.shape[0]:
        raise ValueError(f"{made.shape[0]} and {keys.shape[0]} decompressed tokens")
    check_cache(weight, cache, scales)
    if not weight.dtype == made.dtype == keys.dtype:
        raise ValueError(f"dtypes: weight {weight.dtype}, made {made.dtype}, keys {keys.dtype}")
    if not all(t.is_contiguous() for t in (cache, weight, made, keys)):
        raise ValueError("cache, weight, made and keys must be contiguous")
    if num_rows == 0:
        return
    narrow = weight.element_size() <= 2
    block_n = max(16, min(128 if narrow else 64, triton.next_power_of_2(width)))
    _expand_kernel[(num_sms(cache.device),)](
        cache,
        scales,
        weight,
        table,
        lanes,
        starts,
        cu_counts,
        bases,
        tile_ends,
        made,
        keys,
        num_rows,
        table.stride(0),
        RANK=rank,
        ROPE=rope_dim,
        ROPE_PAD=triton.next_power_of_2(rope_dim),
        WIDTH=width,
        BLOCK_M=EXPAND_TILE,
        BLOCK_N=block_n,
        BLOCK_K=max(16, min(64 if narrow else 32, triton.next_power_of_2(rank))),
        SCAN=128,
        SCALED=scales is not None,
        num_warps=8,
        num_stages=4 if narrow else 2,
    )


def expand_ref(
    cache: Tensor,
    weight: Tensor,
    table: Tensor,
    lanes: Tensor,
    starts: Tensor,
    cu_counts: Tensor,
    bases: Tensor,
    made: Tensor,
    keys: Tensor,
    scales: Tensor | None = None,
) -> None:
    """``expand`` in plain torch, fp32 throughout, rounded at the end."""
    rank = weight.shape[2]
    for row in range(lanes.shape[0]):
        if (base := int(bases[row])) < 0:
            continue
        length = int(starts[row] + cu_counts[row + 1] - cu_counts[row])
        found = read_ref(cache, scales, table[lanes[row].long(), :length].long())
        wide = torch.einsum("tr,hdr->thd", found[:, :rank], weight.float())
        made[base : base + length] = wide.to(made.dtype)
        keys[base : base + length] = found[:, rank:].to(keys.dtype)
