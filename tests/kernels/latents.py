"""Cases of latents in shuffled slots, shared by the tests of their kernels."""

import torch
from torch import Tensor

from asyncllm.kernels.attention.quantize import quantize_ref
from tests.kernels.harness import DEVICE, ints, make_cache, randn


def make_latents(lengths: list[int], width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """cache [num_slots + 1, width], table and lanes; what is nobody's is NaN or far outside."""
    cache, _, table, lanes = make_cache(lengths, 1, width, dtype)
    return {"cache": cache.flatten(1), "table": table, "lanes": lanes}


def in_eight_bits(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """``case`` with its cache as 8-bit floats and scales; what was NaN is."""
    cache, scales = quantize_ref(case["cache"].cpu().nan_to_num(0.0), torch.float8_e4m3fn, None)
    nobody = case["cache"].cpu().isnan().any(dim=1)
    cache.view(torch.uint8)[nobody] = 0x7F
    wide = scales[:, 0].float().masked_fill(nobody, float("nan"))
    return {**case, "cache": cache.to(DEVICE), "scales": wide.to(DEVICE)}


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
