"""Sorts (token, expert) pairs by expert, into blocks of one expert each.

Computes the order only: no tokens are moved. There is one program per expert; each counts all
pairs, so it knows where its expert's blocks begin without waiting for another program.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNKS = (256, 1024, 4096)  # pairs that are looked at together


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "first"])
def _order_kernel(
    ids_ptr,
    pairs_ptr,
    experts_ptr,
    num_pairs,
    num_blocks,
    first,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    bin_ = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for begin in range(0, num_pairs, CHUNK):
        live = begin + lane < num_pairs
        chosen = tl.load(ids_ptr + begin + lane, mask=live, other=-1) - first
        # what is nobody's here goes to a bin of its own
        held = live & (chosen >= 0) & (chosen < NUM_EXPERTS)
        counts += tl.histogram(tl.where(held, chosen, NUM_EXPERTS), BINS)
    blocks = tl.where(bin_ < NUM_EXPERTS, tl.cdiv(counts, BLOCK_M), 0)
    count = tl.sum(tl.where(bin_ == expert, counts, 0), axis=0)
    mine = tl.sum(tl.where(bin_ == expert, blocks, 0), axis=0)
    begin_block = tl.sum(tl.where(bin_ < expert, blocks, 0), axis=0)
    done = begin_block * BLOCK_M
    if count > 0:
        for begin in range(0, num_pairs, CHUNK):
            live = begin + lane < num_pairs
            chosen = tl.load(ids_ptr + begin + lane, mask=live, other=-1) - first
            hit = (live & (chosen == expert)).to(tl.int32)
            place = done + tl.cumsum(hit, axis=0) - hit
            tl.store(pairs_ptr + place, begin + lane, mask=hit > 0)
            done += tl.sum(hit, axis=0)
    for begin in range(0, begin_block * BLOCK_M + mine * BLOCK_M - done, CHUNK):
        rest = done + begin + lane
        tl.store(pairs_ptr + rest, num_pairs, mask=rest < (begin_block + mine) * BLOCK_M)
    for begin in range(0, mine, CHUNK):
        live = begin + lane < mine
        tl.store(experts_ptr + begin_block + begin + lane, expert, mask=live)
    if expert == 0:
        total = tl.sum(blocks, axis=0)
        for begin in range(total, num_blocks, CHUNK):
            tl.store(experts_ptr + begin + lane, -1, mask=begin + lane < num_blocks)


def order(ids: Tensor, num_experts: int, block_m: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Sorts (token, expert) pairs, numbered through ``ids``, by expert.

    Args:
        ids: [num_tokens, top_k] int32, contiguous: experts of each token.
        num_experts: those from ``first`` on; pairs of others are left out.
        block_m: pairs of a block.

    Returns:
        pairs [num_blocks * block_m] int32: numbers of the pairs, each expert's filled up to whole
        blocks with the number of all pairs; and experts [num_blocks] int32: whose a block is, from
        0, -1 for blocks that are not needed, behind the others, whose pairs are not written.
        There are as many blocks as any choice of experts could need.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``order_ref``. Does not synchronise; safe in CUDA graphs.
    """
    if ids.dim() != 2 or ids.dtype != torch.int32 or not ids.is_contiguous():
        raise ValueError(f"ids must be [tokens, top_k] int32: {tuple(ids.shape)} {ids.dtype}")
    num_pairs, num_blocks = ids.numel(), most_blocks(ids.numel(), num_experts, block_m)
    pairs = torch.empty(num_blocks * block_m, dtype=torch.int32, device=ids.device)
    experts = torch.empty(num_blocks, dtype=torch.int32, device=ids.device)
    chunk = next((chunk for chunk in CHUNKS if num_pairs <= chunk), CHUNKS[-1])
    if num_blocks:
        _order_kernel[(num_experts,)](
            ids,
            pairs,
            experts,
            num_pairs,
            num_blocks,
            first,
            NUM_EXPERTS=num_experts,
            BINS=max(32, triton.next_power_of_2(num_experts + 1)),  # a bin to a lane at least
            BLOCK_M=block_m,
            CHUNK=chunk,
            num_warps=8 if chunk == CHUNKS[-1] else 4,
        )
    return pairs, experts


def most_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Blocks that ``num_pairs`` need, however they fall: all but one pair of a block may be
    missing for each expert that has any."""
    return (
        0
        if num_experts == 0
        else (num_pairs + min(num_experts, num_pairs) * (block_m - 1)) // block_m
    )


def order_ref(ids: Tensor, num_experts: int, block_m: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """``order`` in plain torch; pairs of blocks that are not needed are the number of all pairs."""
    flat = ids.flatten() - first
    num_blocks = most_blocks(len(flat), num_experts, block_m)
    pairs = torch.full((num_blocks, block_m), len(flat), dtype=torch.int32, device=ids.device)
    experts = torch.full((num_blocks,), -1, dtype=torch.int32, device=ids.device)
    block = 0
    for expert in range(num_experts):
        for part in (flat == expert).nonzero()[:, 0].split(block_m):
            if len(part):
                pairs[block, : len(part)] = part
                experts[block] = expert
                block += 1
    return pairs.flatten(), experts
