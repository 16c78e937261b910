"""Causal attention of many new tokens per row over K/V gathered by slot (prefill, mixed steps).

Owns the walk over query blocks; knows neither requests nor layers. The rows' own new K/V must be in
the cache already; given the packed qkv too, the chunk's K/V is read from there, where it lies in
rows that the tensor copy engine can fetch, and only the prefix goes through the slot table.

A block holds BLOCK_M (token, query head) pairs, of all query heads of a KV head or of one. Blocks
of all rows form one list, found from the counts inside the kernel; it is walked from the end,
because late blocks of a row have most keys to read. With a sliding window a block begins at the
first tile that one of its queries sees.
"""

# mypy: allow-incomplete-defs

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from asyncllm.kernels.attention.kv8 import KIND_NAMES, num_scales, packed_scales, read_ref
from asyncllm.kernels.attention.prefill_keys import attend
from asyncllm.kernels.attention.scores import padded, to_log2
from asyncllm.kernels.autotune import is_narrow, num_sms, tuned


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the kernel is built: (token, head) pairs and keys of a tile, warps, pipeline depth for
    keys of the chunk and for gathered ones, and whether a block holds all query heads of a KV head
    (``pack``) or one."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    gather_stages: int
    pack: bool = True


# (padded head_dim, class of block_pairs) -> configuration. 64 rows of M per group of four warps is
# what Hopper's matrix instruction takes; two programs of one group on a multiprocessor overlap the
# softmax of one with the products of the other. A gather spends one stage more, on the slots.
_CONFIGS = {
    (64, 16): PrefillConfig(16, 128, 4, 2, 4),
    (64, 64): PrefillConfig(64, 64, 4, 3, 4),
    (64, 128): PrefillConfig(64, 64, 4, 3, 4),
    (128, 16): PrefillConfig(16, 64, 4, 2, 4),
    (128, 64): PrefillConfig(64, 64, 4, 2, 3),
    (128, 128): PrefillConfig(64, 64, 4, 2, 3, False),
    (256, 16): PrefillConfig(16, 32, 4, 2, 4),
    (256, 64): PrefillConfig(64, 32, 4, 2, 3),
    (256, 128): PrefillConfig(128, 32, 8, 2, 3),
}
# the same over a prefix in 8 bits: more queries share what it takes to widen a tile
_EIGHT_BITS = {
    (64, 128): PrefillConfig(128, 64, 8, 3, 4),
    (128, 128): PrefillConfig(128, 64, 8, 2, 3),
}


@triton.jit
def _find_block(cu_counts_ptr, num_rows, index, TOKENS: tl.constexpr, SCAN: tl.constexpr):
    """Row of block ``total - 1 - index``, its number in the row, and whether it exists."""
    row = tl.arange(0, SCAN)
    low = tl.load(cu_counts_ptr + row, mask=row < num_rows, other=0)
    high = tl.load(cu_counts_ptr + row + 1, mask=row < num_rows, other=0)
    blocks = tl.cdiv(high - low, TOKENS)
    passed = tl.sum(blocks, axis=0)
    total = passed
    for begin in range(SCAN, num_rows, SCAN):
        low = tl.load(cu_counts_ptr + begin + row, mask=begin + row < num_rows, other=0)
        high = tl.load(cu_counts_ptr + begin + row + 1, mask=begin + row < num_rows, other=0)
        total += tl.sum(tl.cdiv(high - low, TOKENS), axis=0)
    wanted = total - 1 - index
    ends = tl.cumsum(blocks, axis=0)
    before = (ends <= wanted) & (row < num_rows)
    found = tl.sum(before.to(tl.int32), axis=0)
    first = tl.max(tl.where(before, ends, 0), axis=0)
    for begin in range(SCAN, num_rows, SCAN):
        low = tl.load(cu_counts_ptr + begin + row, mask=begin + row < num_rows, other=0)
        high = tl.load(cu_counts_ptr + begin + row + 1, mask=begin + row < num_rows, other=0)
        blocks = tl.cdiv(high - low, TOKENS)
        ends = passed + tl.cumsum(blocks, axis=0)
        before = (ends <= wanted) & (begin + row < num_rows)
        found += tl.sum(before.to(tl.int32), axis=0)
        first = tl.maximum(first, tl.max(tl.where(before, ends, 0), axis=0))
        passed += tl.sum(blocks, axis=0)
    return found, wanted - first, wanted


# step metadata lies anywhere in a staging buffer: one build for every alignment
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["lanes_ptr", "starts_ptr", "cu_counts_ptr"],
)
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    scales_ptr,
    kv_ptr,
    kv_desc,
    table_ptr,
    lanes_ptr,
    starts_ptr,
    cu_counts_ptr,
    out_ptr,
    num_rows,
    q_row,
    q_head,
    kv_row,
    out_row,
    out_head,
    table_row,
    scale_log2,
    cap_log2,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PACK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
    SOURCE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALES: tl.constexpr,
    GATHER_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
    SETTLE: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // PACK
    PACKS: tl.constexpr = Q_HEADS // PACK
    pack = tl.program_id(0) % PACKS
    head = pack * PACK // (Q_HEADS // KV_HEADS)
    index = tl.program_id(0) // PACKS
    row, block, wanted = _find_block(cu_counts_ptr, num_rows, index, TOKENS, SCAN)
    pair = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DIM_PAD)
    heads = pack * PACK + pair % PACK
    if wanted >= 0:  # else a surplus program: no row needs it
        first_token = tl.load(cu_counts_ptr + row)
        count = tl.load(cu_counts_ptr + row + 1) - first_token
        start = tl.load(starts_ptr + row)
        lane_ptr = table_ptr + tl.load(lanes_ptr + row).to(tl.int64) * table_row
        done = block * TOKENS  # tokens of the row in earlier blocks
        local = done + pair // PACK
        used = (pair // PACK < TOKENS)[:, None] & (local < count)[:, None] & (dim < DIM)[None, :]
        token = (first_token + local).to(tl.int64)
        q_at = q_ptr + token[:, None] * q_row + heads[:, None] * q_head + dim[None, :]
        q = tl.load(q_at, mask=used, other=0.0)
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
        # with a window: the oldest key of the block's first query, and of its last one
        first = 0
        shared = 0
        if WINDOW:
            first = tl.maximum(start + done + 1 - WINDOW, 0)
            shared = tl.maximum(start + tl.minimum(done + TOKENS, count) - WINDOW, 0)
        # keys up to the block's end: [0, full) seen by all its queries, [full, stop) not by all
        if SOURCE == 0:
            full = (start + done) // BLOCK_N * BLOCK_N
            stop = tl.minimum(start + done + TOKENS, start + count)
        else:
            k_column = (Q_HEADS + head) * DIM
            k_chunk = kv_ptr + first_token.to(tl.int64) * kv_row + k_column
            acc, best, norm = attend(
                acc,
                best,
                norm,
                q,
                k_chunk,
                k_chunk + KV_HEADS * DIM,
                None,
                lane_ptr,
                kv_row,
                head,
                kv_desc,
                first_token,
                k_column,
                k_column + KV_HEADS * DIM,
                tl.maximum(first - start, 0),
                tl.maximum(shared - start, 0),
                done // BLOCK_N * BLOCK_N,
                tl.minimum(done + TOKENS, count),
                local,
                scale_log2,
                cap_log2,
                KV_HEADS,
                DIM,
                DIM_PAD,
                BLOCK_N,
                SOURCE,
                WINDOW,
                CAPPED,
                0,
                STAGES,
                SETTLE,
            )
            full = start // BLOCK_N * BLOCK_N
            stop = start
            if WINDOW:
                stop = tl.where(first < start, start, 0)
        acc, best, norm = attend(
            acc,
            best,
            norm,
            q,
            k_ptr + head * DIM,
            v_ptr + head * DIM,
            scales_ptr,
            lane_ptr,
            KV_HEADS * DIM,
            head,
            None,
            0,
            0,
            0,
            first,
            shared,
            full,
            stop,
            start + local,
            scale_log2,
            cap_log2,
            KV_HEADS,
            DIM,
            DIM_PAD,
            BLOCK_N,
            0,
            WINDOW,
            CAPPED,
            SCALES,
            GATHER_STAGES,
            SETTLE,
        )
        out_at = out_ptr + token[:, None] * out_row + heads[:, None] * out_head + dim[None, :]
        tl.store(out_at, (acc / norm[:, None]).to(out_ptr.dtype.element_ty), mask=used)


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    starts: Tensor,
    cu_counts: Tensor,
    max_count: int,
    scale: float,
    out: Tensor | None = None,
    config: PrefillConfig | None = None,
    kv: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of each row's new tokens over its prefix and themselves.

    Args:
        q: [num_tokens, num_q_heads, head_dim] of the whole step; may be a view into packed qkv.
        k_cache, v_cache: [num_slots + 1, num_kv_heads, head_dim], contiguous, dtype of q, or int8
            or float8_e4m3fn; K/V of the new tokens are in it.
        table: [num_lanes, max_len] int32: slot of each position.
        lanes: [num_rows] int32.
        starts: [num_rows] int32, position of each row's first new token.
        cu_counts: [num_rows + 1] int32, not decreasing, from any first token: row i owns tokens
            [cu_counts[i], cu_counts[i + 1]); empty rows pad the batch.
        max_count: about the most new tokens of a row; selects the tile, never the result.
        scale: multiplies q·k; positive.
        out: where to write, like the result; last dimension contiguous. Tokens of no row are left
            as they are, so decode rows of the same step may lie there.
        config: instead of the tuned or built-in one.
        kv: [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim], the packed qkv of the same
            tokens as q after ``rope_kv``, which leaves rotated K in it; rows may be strided. Much
            faster than reading the chunk's K/V through the table; the same result.
        window: tokens that a token sees, itself included; None: all before it. What the table says
            of positions that no new token of the row sees is not used.
        softcap: scores become softcap * tanh(score / softcap).
        scales: of caches in 8 bits, as ``rope_kv`` writes them. ``kv`` must be given then: new
            tokens attend to themselves as they are there, and to what came before in 8 bits.

    Returns:
        [num_tokens, num_q_heads, head_dim]; without ``out``, tokens of no row are zero.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``prefill_attention_ref``. Does not synchronise; safe in CUDA graphs.
    """
    per_head = _check(q, k_cache, v_cache, table, lanes, starts, cu_counts, kv, scales)
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_q_heads // num_kv_heads
    if out is None:
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or out.stride(2) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit q {tuple(q.shape)}")
    if config is None:
        size = block_pairs(min(max_count, num_tokens) * group, num_tokens * num_q_heads, q.device)
        config = prefill_config(k_cache, group, size, q.element_size())
    if num_tokens == 0:
        return out
    pack = group if config.pack else 1
    source = 0
    if kv is not None and (config.block_m >= 64 or per_head):
        source = 2 if config.block_m >= 64 and _copyable(kv, head_dim) else 1
    desc = None
    if source == 2:
        desc = TensorDescriptor.from_tensor(kv, [config.block_n, head_dim])
    # every row leaves at most one block part empty, so this many blocks hold any division of the
    # tokens into rows
    num_rows = lanes.shape[0]
    num_blocks = triton.cdiv(num_tokens, config.block_m // pack) + num_rows
    scale_log2, cap_log2 = to_log2(scale, softcap)
    _prefill_kernel[(num_blocks * (num_q_heads // pack),)](
        q,
        k_cache,
        v_cache,
        packed_scales(scales),
        kv if source else None,
        desc,
        table,
        lanes,
        starts,
        cu_counts,
        out,
        num_rows,
        q.stride(0),
        q.stride(1),
        kv.stride(0) if kv is not None and source else 0,
        out.stride(0),
        out.stride(1),
        table.stride(0),
        scale_log2,
        cap_log2,
        Q_HEADS=num_q_heads,
        KV_HEADS=num_kv_heads,
        PACK=pack,
        DIM=head_dim,
        DIM_PAD=padded(head_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SCAN=128,
        SOURCE=source,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        SCALES=per_head,
        STAGES=config.num_stages,
        GATHER_STAGES=config.gather_stages,
        SETTLE=q.device.type != "cpu",  # the interpreter knows no assembly
        num_warps=config.num_warps,
    )
    return out


def prefill_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    starts: Tensor,
    cu_counts: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scales: Tensor | None = None,
    kv: Tensor | None = None,
) -> Tensor:
    """``prefill_attention`` in plain torch, fp32 throughout, rounded at the end."""
    group = q.shape[1] // k_cache.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for row in range(lanes.shape[0]):
        begin, stop, start = int(cu_counts[row]), int(cu_counts[row + 1]), int(starts[row])
        if begin == stop:
            continue
        length = start + stop - begin
        first = 0 if window is None else max(start + 1 - window, 0)
        slots = table[lanes[row].long(), first:length].long()
        k, v = read_ref(k_cache, v_cache, scales, slots)
        if kv is not None:
            new = kv[begin:stop].unflatten(1, (-1, q.shape[2]))[:, q.shape[1] :].float()
            own = slice(max(0, first - start), None)
            k[max(0, start - first) :], v[max(0, start - first) :] = (
                part[own] for part in new.chunk(2, dim=1)
            )
        k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))
        scores = torch.einsum("thd,nhd->htn", q[begin:stop].float(), k) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        position = torch.arange(first, length, device=q.device)
        ahead = position[None, :] - position[start - first :, None]
        seen = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
        scores.masked_fill_(~seen, float("-inf"))
        out[begin:stop] = torch.einsum("htn,nhd->thd", scores.softmax(-1), v)
    return out.to(q.dtype)


def block_pairs(row_pairs: int, all_pairs: int, device: torch.device) -> int:
    """Class of a shape by (token, query head) pairs: 16, 64 or 128. Not more than the longest row
    has in one KV head, and 128 only where that gives a block for each multiprocessor."""
    if row_pairs <= 16:
        return 16
    return 64 if row_pairs <= 64 or all_pairs < 128 * num_sms(device) else 128


def prefill_config(k_cache: Tensor, group: int, size: int, element_size: int) -> PrefillConfig:
    """The configuration for a shape of class ``size`` (``block_pairs``) over such a cache: the
    device's tuned one or that of the table, with small tiles for queries of 4 bytes.

    Raises:
        ValueError: head_dim or group is too large.
    """
    head_dim, device = k_cache.shape[2], k_cache.device
    dim_pad = max(64, triton.next_power_of_2(head_dim))
    found = _CONFIGS.get((dim_pad, size))
    if found is None:
        raise ValueError(f"head_dim {head_dim} is over 256")
    if group > 128:
        raise ValueError(f"{group} query heads per KV head: 128 at most")
    if dim_pad == 256 and size == 128 and is_narrow(device):
        found = _CONFIGS[dim_pad, 64]  # the larger block does not fit
    kind = KIND_NAMES.get(k_cache.dtype, "")
    if kind:
        found = _EIGHT_BITS.get((dim_pad, size), found)
    if entry := tuned(device, "prefill", f"{dim_pad} {size}{kind}"):
        found = PrefillConfig(**entry)
    if element_size > 2:
        found = PrefillConfig(min(found.block_m, 32), 32, 4, 2, 2)
    block_m = max(found.block_m, triton.next_power_of_2(group))
    return dataclasses.replace(found, block_m=block_m)


def _copyable(kv: Tensor, head_dim: int) -> bool:
    """Whether the tensor copy engine can fetch tiles: it wants addresses of 16 bytes, and copies a
    head alone only if that needs no padding."""
    if kv.element_size() > 2 or head_dim != padded(head_dim):
        return False
    return kv.stride(0) % 8 == 0 and kv.data_ptr() % 16 == 0


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    starts: Tensor,
    cu_counts: Tensor,
    kv: Tensor | None,
    scales: Tensor | None,
) -> int:
    """How many scales a head has; 0: K/V are in the type of q."""
    if k_cache.dtype != v_cache.dtype or table.dtype != torch.int32:
        raise ValueError(f"dtypes: K {k_cache.dtype}, V {v_cache.dtype}, table {table.dtype}")
    if k_cache.shape != v_cache.shape or k_cache.shape[2] != q.shape[2]:
        raise ValueError(f"caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)} do not fit q")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("caches must be contiguous")
    if q.stride(2) != 1 or table.stride(1) != 1:
        raise ValueError("the last dimensions of q and table must be contiguous")
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide by {k_cache.shape[1]} KV heads")
    num_rows = lanes.shape[0]
    if starts.shape != (num_rows,) or cu_counts.shape != (num_rows + 1,):
        raise ValueError(f"starts and cu_counts do not fit {num_rows} lanes")
    if not torch.int32 == lanes.dtype == starts.dtype == cu_counts.dtype:
        raise ValueError("lanes, starts and cu_counts must be int32")
    width = (q.shape[1] + 2 * k_cache.shape[1]) * q.shape[2]
    if kv is not None and (
        kv.shape != (q.shape[0], width) or kv.dtype != q.dtype or kv.stride(1) != 1
    ):
        raise ValueError(f"kv {tuple(kv.shape)} {kv.dtype}: packed qkv of q's tokens expected")
    if scales is not None and kv is None:
        raise ValueError("K/V in 8 bits need kv, the packed qkv of the new tokens")
    return num_scales(k_cache, scales, q.dtype)
