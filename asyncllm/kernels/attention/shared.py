"""Decode attention over slots that several rows share: their K/V are read once for all rows.

Owns the division of such work among programs, and its partial results, which decode attention
merges with those of the rows' own tokens; knows neither requests nor layers.

The (row, query head) pairs of a group are cut into blocks of BLOCK_M, its tokens into splits. An
item is a block of one group over one split of its tokens, in one KV head:

    group 0                                   group 1
    block 0: | split 0 | split 1 | split 2 |  block 0: | split 0 |
    block 1: | split 0 | split 1 | split 2 |

The length of splits is chosen so that the items of all groups fill the device. Each item leaves the
normalised softmax sums of its pairs, with their log2; no item waits for another. Items follow from
the groups alone and are computed where they are needed, so grids depend on shapes only.
Sources: one product for all rows that share a prefix as in Hydragen (Juravsky et al., 2024), by
chunks of a prefix tree as in ChunkAttention (Ye et al., 2024).
"""

# mypy: allow-incomplete-defs

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.attention.kv8 import KIND_NAMES, packed_scales
from asyncllm.kernels.attention.prefill_keys import attend
from asyncllm.kernels.attention.scores import padded
from asyncllm.kernels.attention.shared_rows import MAX_GROUPS, MEMBERS, SharedRows
from asyncllm.kernels.autotune import num_sms, tuned


@dataclass(frozen=True, slots=True)
class SharedConfig:
    """How the kernel is built and spread: (row, head) pairs and keys of a tile, warps, pipeline
    depth (one stage of it for slots), the fewest tiles of a split, and programs for each
    multiprocessor that the splits are meant to fill."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    min_tiles: int
    programs_per_sm: int


# (padded head_dim, pairs of a block) -> configuration
_CONFIGS = {
    (64, 16): SharedConfig(16, 128, 4, 4, 2, 2),
    (64, 64): SharedConfig(64, 64, 4, 4, 4, 2),
    (128, 16): SharedConfig(16, 64, 4, 4, 4, 2),
    (128, 64): SharedConfig(64, 64, 4, 3, 4, 2),
    (256, 16): SharedConfig(16, 32, 4, 4, 8, 2),
    (256, 64): SharedConfig(64, 32, 4, 3, 8, 1),
}


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """A step's groups, how they are divided, and the space for partial results, which all layers
    use, one after another. Device tensors only."""

    config: SharedConfig
    rows: SharedRows
    target: int  # about as many items are made in a KV head
    pieces: Tensor  # [num_rows, most of a row] where its partial results are
    num_pieces: Tensor  # [num_rows]
    partial: Tensor  # [items * rows of a block, num_q_heads, head_dim] fp32
    lse: Tensor  # [items * rows of a block, num_q_heads] fp32, base 2


@triton.jit
def longest_split(
    groups_ptr,
    target,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """How many tiles a split may have, so that there are about ``target`` items."""
    group = tl.arange(0, GROUPS)
    begin = tl.load(groups_ptr + group)
    stop = tl.load(groups_ptr + GROUPS + group)
    count = tl.load(groups_ptr + 3 * GROUPS + group)
    work = tl.sum(tl.cdiv(count, ROWS) * tl.cdiv(stop - begin, BLOCK_N), axis=0)
    return tl.maximum(tl.cdiv(work, target), MIN_TILES)


@triton.jit
def divided(begin, stop, most, BLOCK_N: tl.constexpr):
    """Tiles of each split of a group but the last, and splits; of a range without tokens none."""
    tiles = tl.cdiv(stop - begin, BLOCK_N)
    share = tl.maximum(tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, most), 1)), 1)
    return share, tl.cdiv(tiles, share)


@triton.jit
def items_of(groups_ptr, most, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """Items of each group in a KV head."""
    group = tl.arange(0, GROUPS)
    begin = tl.load(groups_ptr + group)
    stop = tl.load(groups_ptr + GROUPS + group)
    _, splits = divided(begin, stop, most, BLOCK_N)
    return tl.cdiv(tl.load(groups_ptr + 3 * GROUPS + group), ROWS) * splits


@triton.jit
def group_of(groups_ptr, ends, number, GROUPS: tl.constexpr):
    """The group that has ``number``, where those of each group end at ``ends``: which groups come
    before it; its first token, the one behind its last, its first member, how many; and how many
    numbers it has before this one."""
    passed = ends <= number
    at = groups_ptr + tl.sum(passed.to(tl.int32), axis=0)
    begin, stop = tl.load(at), tl.load(at + GROUPS)
    first, count = tl.load(at + 2 * GROUPS), tl.load(at + 3 * GROUPS)
    return passed, begin, stop, first, count, number - tl.max(tl.where(passed, ends, 0), axis=0)


@triton.jit(
    do_not_specialize=["target"],
    do_not_specialize_on_alignment=["groups_ptr", "order_ptr", "lanes_ptr"],
)
def _shared_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    scales_ptr,
    table_ptr,
    lanes_ptr,
    groups_ptr,
    order_ptr,
    partial_ptr,
    lse_ptr,
    target,
    q_row,
    q_head,
    table_row,
    scale_log2,
    cap_log2,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALES: tl.constexpr,
    STAGES: tl.constexpr,
    SETTLE: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0) % KV_HEADS
    most = longest_split(groups_ptr, target, ROWS, BLOCK_N, MIN_TILES, GROUPS)
    items = items_of(groups_ptr, most, ROWS, BLOCK_N, GROUPS)
    total = tl.sum(items, axis=0)
    ends = tl.cumsum(items, axis=0)
    pair = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DIM_PAD)
    heads = head * GROUP + pair % GROUP
    stride = tl.num_programs(0) // KV_HEADS
    for item in tl.range(tl.program_id(0) // KV_HEADS, total, stride, num_stages=1):
        _, begin, stop, first, count, within = group_of(groups_ptr, ends, item, GROUPS)
        order = order_ptr + first
        share, splits = divided(begin, stop, most, BLOCK_N)
        member = within // splits * ROWS + pair // GROUP
        live = (pair // GROUP < ROWS) & (member < count)
        row = tl.load(order + member, mask=live, other=0).to(tl.int64)
        used = live[:, None] & (dim < DIM)[None, :]
        q_at = q_ptr + row[:, None] * q_row + heads[:, None] * q_head + dim[None, :]
        q = tl.load(q_at, mask=used, other=0.0)
        lane = tl.load(lanes_ptr + tl.load(order)).to(tl.int64)
        key = begin + within % splits * share * BLOCK_N
        num = tl.minimum(share * BLOCK_N, stop - key)
        acc, best, norm = attend(
            tl.zeros([BLOCK_M, DIM_PAD], tl.float32),
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            q,
            k_ptr + head * DIM,
            v_ptr + head * DIM,
            scales_ptr,
            table_ptr + lane * table_row + key,
            KV_HEADS * DIM,
            head,
            None,
            0,
            0,
            0,
            0,
            0,
            num // BLOCK_N * BLOCK_N,
            num,
            tl.full([BLOCK_M], 1 << 30, tl.int32),  # a query sees them all
            scale_log2,
            cap_log2,
            KV_HEADS,
            DIM,
            DIM_PAD,
            BLOCK_N,
            0,
            0,
            CAPPED,
            SCALES,
            STAGES,
            SETTLE,
        )
        part = (item * ROWS + pair // GROUP).to(tl.int64) * Q_HEADS + heads
        tl.store(partial_ptr + part[:, None] * DIM + dim[None, :], acc / norm[:, None], mask=used)
        tl.store(lse_ptr + part, best + tl.log2(norm), mask=live)


def plan_shared(
    rows: SharedRows, num_q_heads: int, k_cache: Tensor, config: SharedConfig | None = None
) -> SharedPlan:
    """Space for what the groups of a step leave; ``plan_decode`` fills ``pieces``."""
    _, num_kv_heads, head_dim = k_cache.shape
    num_rows, device = rows.order.shape[0], k_cache.device
    group = num_q_heads // num_kv_heads
    config = config or shared_config(k_cache, num_rows, group)
    block = config.block_m // group
    target = max(1, config.programs_per_sm * num_sms(device) // num_kv_heads)
    # Each group has at most a block that is not full, each block a split more than its share of
    # the target.
    items = target + MEMBERS * num_rows // block + min(MAX_GROUPS, num_rows)
    return SharedPlan(
        config=config,
        rows=rows,
        target=target,
        pieces=torch.empty((num_rows, target + MAX_GROUPS), dtype=torch.int32, device=device),
        num_pieces=torch.empty(num_rows, dtype=torch.int32, device=device),
        partial=torch.empty((items * block, num_q_heads, head_dim), device=device),
        lse=torch.empty((items * block, num_q_heads), device=device),
    )


def attend_shared(
    plan: SharedPlan,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lanes: Tensor,
    scales: Tensor | None,
    per_head: int,
    factors: tuple[float, float],
) -> None:
    """Leaves the groups' partial results in the plan; arguments as ``decode_attention`` has
    checked them. ``per_head``: scales of a head; ``factors``: see ``to_log2``."""
    config, rows = plan.config, plan.rows
    num_q_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[1]
    # items may be more than they were meant to be: these have programs of their own too
    _shared_kernel[(2 * plan.target * num_kv_heads,)](
        q,
        k_cache,
        v_cache,
        packed_scales(scales),
        table,
        lanes,
        rows.groups,
        rows.order,
        plan.partial,
        plan.lse,
        plan.target,
        q.stride(0),
        q.stride(1),
        table.stride(0),
        *factors,
        Q_HEADS=num_q_heads,
        KV_HEADS=num_kv_heads,
        GROUP=num_q_heads // num_kv_heads,
        DIM=head_dim,
        DIM_PAD=padded(head_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        MIN_TILES=config.min_tiles,
        GROUPS=MAX_GROUPS,
        CAPPED=factors[1] != 0.0,
        SCALES=per_head,
        STAGES=config.num_stages,
        SETTLE=q.device.type != "cpu",  # the interpreter knows no assembly
        num_warps=config.num_warps,
    )


def shared_config(k_cache: Tensor, num_rows: int, group: int) -> SharedConfig:
    """The configuration for up to ``num_rows`` rows, ``group`` query heads for a KV head, over such
    a cache: the device's tuned one, or that of the table; small tiles for 4-byte elements.

    Raises:
        ValueError: head_dim is over 256.
    """
    head_dim, device = k_cache.shape[2], k_cache.device
    dim_pad = max(64, triton.next_power_of_2(head_dim))
    size = 16 if num_rows * group <= 16 else 64
    found = _CONFIGS.get((dim_pad, size))
    if found is None:
        raise ValueError(f"head_dim {head_dim} is over 256")
    if entry := tuned(device, "shared", f"{dim_pad} {size}{KIND_NAMES.get(k_cache.dtype, '')}"):
        found = SharedConfig(**entry)
    if k_cache.element_size() > 2:
        found = SharedConfig(min(found.block_m, 32), 32, 4, 2, 4, found.programs_per_sm)
    return replace(found, block_m=max(found.block_m, triton.next_power_of_2(group)))
