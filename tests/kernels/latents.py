"""Cases of latents in shuffled slots, shared by the tests of their kernels."""

import torch
from torch import Tensor

from tests.kernels.harness import DEVICE, ints, make_cache, randn


def make_latents(lengths: list[int], width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """cache [num_slots + 1, width], table and lanes; what is nobody's is NaN or far outside."""
    cache, _, table, lanes = make_cache(lengths, 1, width, dtype)
    return {"cache": cache.flatten(1), "table": table, "lanes": lanes}


def make_chunks(rows: list[tuple[int, int]], first: int) -> dict[str, Tensor]:
    """starts and cu_counts of rows of (start, new tokens), the first token being ``first``."""
    counts = torch.tensor([0, *(count for _, count in rows)])
    cu_counts = (counts.cumsum(0) + first).int().to(DEVICE)
    return {"starts": ints([start for start, _ in rows]), "cu_counts": cu_counts}


def make_queries(
    num_tokens: int, heads: int, nope: int, rope: int, dtype: torch.dtype, seed: int = 3
) -> tuple[Tensor, Tensor]:
    """The two parts of queries, views of one tensor."""
    q = randn(num_tokens, heads, nope + rope, dtype=dtype, seed=seed)
    return q[..., :nope], q[..., nope:]
