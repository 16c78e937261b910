"""Decompression of rows' latents against its reference."""

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.latent.expand import expand, expand_ref
from asyncllm.kernels.latent.plan import ChunkPlan, plan_chunks
from tests.kernels.harness import DEVICE, assert_close, no_sync, randn, replayed
from tests.kernels.latents import in_eight_bits, make_chunks, make_latents

# each combination is a build on the card, and one of its types is enough there
HERE = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32]


def make_case(
    rows: list[tuple[int, int]], heads: int, dims: int, rank: int, rope: int, dtype: torch.dtype,
    capacity: int, least: int = 2,
) -> tuple[dict[str, Tensor], ChunkPlan]:  # fmt: skip
    latents = make_latents([start + count for start, count in rows], rank + rope, dtype)
    case = {**latents, **make_chunks(rows, 1), "weight": randn(heads, dims, rank, dtype=dtype)}
    case["made"] = torch.full((capacity, heads, dims), 7.0, dtype=dtype, device=DEVICE)
    case["keys"] = torch.full((capacity, rope), 7.0, dtype=dtype, device=DEVICE)
    given = {name: case[name] for name in ("lanes", "starts", "cu_counts", "cache")}
    tokens = 1 + sum(count for _, count in rows)
    plan = plan_chunks(
        **given, num_tokens=tokens, num_heads=heads, rank=rank, capacity=capacity, least=least
    )
    return {**case, "bases": plan.bases}, plan


def check(case: dict[str, Tensor], plan: ChunkPlan) -> None:
    want = {**case, "made": case["made"].clone(), "keys": case["keys"].clone()}
    with no_sync():
        expand(**case, tile_ends=plan.tile_ends)
    expand_ref(**want)
    assert_close("made", want["made"], case["made"])
    assert_close("keys", want["keys"], case["keys"])


@pytest.mark.parametrize(
    ("rows", "heads", "dims", "rank", "rope"),
    [
        ([(0, 2)], 1, 16, 16, 8),
        ([(150, 3), (9, 1), (0, 5), (200, 0), (3, 20)], 3, 40, 40, 24),
        ([(30, 9)], 2, 256, 512, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", HERE, ids=str)
def test_expand(
    rows: list[tuple[int, int]], heads: int, dims: int, rank: int, rope: int, dtype: torch.dtype
) -> None:
    check(*make_case(rows, heads, dims, rank, rope, dtype, capacity=190))


@pytest.mark.parametrize("rank", [40, 512])
def test_eight_bits(rank: int) -> None:
    case, plan = make_case([(30, 9), (0, 4)], 2, 32, rank, 64, HERE[0], capacity=50)
    check(in_eight_bits(case), plan)


def test_what_does_not_fit_is_left_out() -> None:
    case, plan = make_case([(0, 9), (20, 9), (0, 3)], 1, 16, 16, 8, torch.float32, capacity=20)
    check(case, plan)
    assert plan.bases.tolist() == [0, -1, -1]
    assert bool((case["made"][9:] == 7.0).all())


def test_refuses_what_does_not_fit() -> None:
    case, plan = make_case([(0, 9)], 2, 16, 16, 8, torch.float32, capacity=20)
    with pytest.raises(ValueError, match="weight"):
        expand(**{**case, "weight": case["weight"][:1]}, tile_ends=plan.tile_ends)
    with pytest.raises(ValueError, match="tokens"):
        expand(**{**case, "keys": case["keys"][:9]}, tile_ends=plan.tile_ends)
    with pytest.raises(ValueError, match="dtypes"):
        expand(**{**case, "weight": case["weight"].half()}, tile_ends=plan.tile_ends)


@pytest.mark.gpu
def test_at_full_size_in_a_graph() -> None:
    rows = [(4000, 1000), (0, 2), (300, 1), (129, 900)]
    case, plan = make_case(rows, 16, 256, 512, 64, torch.bfloat16, capacity=8192)
    want = {**case, "made": case["made"].clone(), "keys": case["keys"].clone()}
    replayed(
        lambda: expand(**case, tile_ends=plan.tile_ends), before=lambda: case["made"].fill_(7.0)
    )
    expand_ref(**want)
    assert_close("made", want["made"], case["made"])
    assert_close("keys", want["keys"], case["keys"])
