"""Kernel configurations of the two products of a mixture of experts, by class of shape."""

# mypy: allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from asyncllm.kernels.autotune import Entry, num_sms


@dataclass(frozen=True, slots=True)
class Tile:
    """How one product is built: outputs and inputs of a tile, warps, pipeline depth, blocks that
    share a run of programs, and whether weights come by the tensor copy engine."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 1
    copy: bool = False


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Pairs of a block, and both products: gate and up, of which a tile has ``block_n`` outputs
    each, and down."""

    block_m: int
    up: Tile
    down: Tile

    @classmethod
    def of(cls, entry: Entry) -> ExpertsConfig:
        """From what ``dataclasses.asdict`` made of one."""
        return cls(entry["block_m"], Tile(**entry["up"]), Tile(**entry["down"]))


@triton.jit
def work_of(
    pairs_ptr,
    experts_ptr,
    num_pairs,
    num_blocks,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(expert or -1, tile of N outputs, pairs of the block, which of these there are) of this
    program, of as many for each block as there are tiles: GROUP neighbouring blocks, often of one
    expert, share a tile of weights."""
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    run = tl.program_id(0) // (TILES * GROUP)
    height = tl.minimum(num_blocks - run * GROUP, GROUP)
    within = tl.program_id(0) % (TILES * GROUP)
    block = run * GROUP + within % height
    pair = tl.load(pairs_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    return tl.load(experts_ptr + block), within // height, pair, pair < num_pairs


def size_class(num_pairs: int, num_experts: int, inner: int, device: torch.device) -> str:
    """Class of a shape by pairs per expert: up to 8, 32, 128, or many; few where there would not be
    two tiles of 64 outputs for each multiprocessor."""
    if num_pairs * triton.cdiv(inner, 64) < 2 * num_sms(device):
        return "few"
    return next((str(n) for n in (8, 32, 128) if num_pairs <= n * num_experts), "many")
