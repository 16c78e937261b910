"""Pairs sorted by expert against the reference."""

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.moe.order import most_blocks, order, order_ref
from tests.kernels.harness import DEVICE, no_sync, replayed


def choose(num_tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Tensor:
    """Experts of each token, no two the same, few of them chosen often."""
    generator = torch.Generator().manual_seed(seed)
    merit = torch.rand(num_tokens, num_experts, generator=generator)
    merit[:, : num_experts // 4] += 0.3
    return merit.topk(top_k).indices.int().to(DEVICE)


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], block_m: int) -> None:
    """Blocks that are needed are the same; what the others' pairs are does not matter."""
    assert torch.equal(got[1], want[1])
    needed = (want[1] >= 0).repeat_interleave(block_m)
    assert torch.equal(got[0][needed], want[0][needed])


SHAPES = [(1, 6, 64), (8, 8, 128), (64, 2, 8), (100, 6, 60), (700, 6, 10), (3, 1, 1), (40, 5, 5)]


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_order(shape: tuple[int, int, int], block_m: int) -> None:
    ids, num_experts = choose(*shape), shape[2]
    with no_sync():
        got = order(ids, num_experts, block_m)
    same(got, order_ref(ids, num_experts, block_m), block_m)


@pytest.mark.parametrize("first", [0, 20, 40, 57])
def test_pairs_of_others_are_left_out(first: int) -> None:
    ids = choose(50, 6, 60)
    got = order(ids, min(20, 60 - first), 16, first)
    same(got, order_ref(ids, min(20, 60 - first), 16, first), 16)
    held = ((ids >= first) & (ids < first + 20)).sum()
    assert (got[0].view(-1, 16)[got[1] >= 0] < ids.numel()).sum() == held


def test_all_to_one_expert_and_to_nobody() -> None:
    ids = torch.full((90, 1), 3, dtype=torch.int32, device=DEVICE)
    same(order(ids, 7, 16), order_ref(ids, 7, 16), 16)
    assert (order(ids, 3, 16)[1] == -1).all()
    assert len(order(ids, 0, 16)[1]) == 0


def test_there_are_blocks_for_any_choice() -> None:
    for num_pairs in range(200):
        for experts, block_m in ((1, 16), (7, 16), (64, 32)):
            uneven = [1] * min(experts, num_pairs)
            if uneven:
                uneven[0] += num_pairs - len(uneven)
            needed = sum(-(-count // block_m) for count in uneven)
            assert needed <= most_blocks(num_pairs, experts, block_m) <= num_pairs


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="int32"):
        order(choose(4, 2, 8).long(), 8, 16)
    with pytest.raises(ValueError, match="tokens"):
        order(choose(4, 2, 8)[0], 8, 16)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    for num_tokens in (3, 64, 2048):
        ids, fresh = (choose(num_tokens, 6, 64, seed) for seed in range(2))
        found: list[tuple[Tensor, Tensor]] = []
        replayed(lambda: found.append(order(ids, 64, 32)), before=lambda: ids.copy_(fresh))  # noqa: B023
        same(found[-1], order_ref(fresh, 64, 32), 32)
