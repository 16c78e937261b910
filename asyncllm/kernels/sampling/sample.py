"""Samples tokens from logits without sorting: split reductions, then a bracketed bit search.

Owns the order of inversion and what happens to ties; knows neither requests nor seeds.

A row is cut into tiles of 4096 tokens. Everything is expressed as *depth*: (best logit - logit) /
temperature, at least 0, so that a weight is exp(-depth), and depths have the same order as their
bits.

1. Per tile: best logit, its token, sum of weights.
2. Rows that truncate: from a fixed sample of about 4096 tokens, two depths that enclose the
   threshold of top_k and top_p with a margin of 4.5 standard errors.
3. Per tile: weights that are certainly kept are added up, the candidates in between are listed.
4. Per row: search the threshold among the candidates, bit by bit. If the bracket turns out wrong
   or has too many candidates (many equal logits), the row is searched as a whole: slower, same
   result. Then the tile that holds the goal, then the token in it.

Sums over candidates are integers, so their order in memory does not matter. No launch depends on
the contents of a row, and a row's token depends neither on other rows nor on their number.
"""

# mypy: allow-incomplete-defs

import torch
import triton
from torch import Tensor

from asyncllm.kernels.sampling.draw import FUSION, draw_kernel
from asyncllm.kernels.sampling.tiles import TILE, best_kernel, check_logits, clean, tiles_kernel
from asyncllm.kernels.sampling.truncate import DEEPEST, Z, bracket_kernel, list_kernel, sample_size


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    *,
    greedy: bool,
    truncates: bool,
    out: Tensor | None = None,
) -> Tensor:
    """One token per row.

    Temperature, then top_k, top_p and min_p on the tempered distribution, then inversion: the
    first token, **by id**, at which the running sum of kept probabilities passes ``uniform``
    times their total. A token is kept if fewer than top_k tokens and less than top_p of the mass
    lie above it and its probability is at least min_p of the best; of equal logits the lower id
    lies above, so top_k keeps exactly k and top_p no more than it needs. One token is always
    kept. Tokens below exp(-40) of the best probability are dropped where the batch truncates.

    Args:
        logits: [n, vocab_size] float32, float16 or bfloat16; rows may be strided. NaN counts as
            -inf; tokens at -inf are drawn only where a row has nothing else (then token 0).
        temperature: [n] float32; 0: the best token, lowest id among equals.
        top_k: [n] int32, vocab_size for all.
        top_p, min_p: [n] float32, 1 and 0 for all.
        uniform: [n] float32 in (0, 1).
        greedy: all temperatures are 0; the other columns are not read (pass any tensor).
        truncates: some row has a top_k, top_p or min_p that cuts.
        out: [n] int64, where to write.

    Returns:
        [n] int64. The same for a row whatever the other rows are.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``sample_ref``. Two launches, four if ``truncates``. Does not synchronise; safe in
    CUDA graphs.
    """
    n, vocab_size = check_logits(logits)
    device = logits.device
    if out is None:
        out = torch.empty(n, dtype=torch.int64, device=device)
    elif out.shape != (n,) or out.dtype != torch.int64 or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} {out.dtype}: [{n}] int64 expected")
    if not greedy:
        _check_columns(n, temperature, top_k, top_p, min_p, uniform)
    if n == 0:
        return out
    tiles = triton.cdiv(vocab_size, TILE)
    pad = triton.next_power_of_2(tiles)
    top, sums, mass = torch.empty((3, n, tiles), dtype=torch.float32, device=device)
    best, counts = torch.empty((2, n, tiles), dtype=torch.int32, device=device)
    used = torch.empty(n, dtype=torch.int32, device=device)
    stride = logits.stride(0)
    tiles_kernel[(tiles, n)](
        logits,
        temperature,
        top,
        best,
        sums,
        used,
        stride,
        VOCAB=vocab_size,
        TILE=TILE,
        SUMS=not greedy,
        TEMPERED=not greedy,
        num_warps=8,
    )
    if greedy:
        best_kernel[(n,)](top, best, out, TILES=tiles, PAD=pad, num_warps=1)
        return out
    room = 8192 if vocab_size <= 2**17 else 16384
    shown = n if truncates else 0
    depths = torch.empty((shown, room), dtype=torch.float32, device=device)
    tokens = torch.empty((shown, room), dtype=torch.int32, device=device)
    bracket = torch.empty((shown, 3), dtype=torch.float32, device=device)
    if truncates:
        bracket_kernel[(n,)](
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            top,
            sums,
            bracket,
            stride,
            VOCAB=vocab_size,
            TILES=tiles,
            PAD=pad,
            SAMPLE=sample_size(vocab_size),
            DEEPEST=DEEPEST,
            Z=Z,
            num_warps=8,
        )
        list_kernel[(tiles, n)](
            logits,
            temperature,
            bracket,
            mass,
            counts,
            used,
            depths,
            tokens,
            stride,
            VOCAB=vocab_size,
            TILE=TILE,
            ROOM=room,
            num_warps=16,
        )
    draw_kernel[(n,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        uniform,
        top,
        best,
        sums,
        mass,
        counts,
        bracket,
        used,
        depths,
        tokens,
        out,
        stride,
        VOCAB=vocab_size,
        TILE=TILE,
        TILES=tiles,
        PAD=pad,
        ROOM=room,
        DEEPEST=DEEPEST,
        TRUNCATES=truncates,
        num_warps=16 if truncates else 8,
        enable_fp_fusion=FUSION,
    )
    return out


def kept_ref(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """What ``sample`` may draw from: [n, vocab_size] bool, and weights relative to the best."""
    depth = _depth(logits, temperature)
    ordered, tokens = depth.sort(dim=-1, stable=True)
    weight = ordered.double().neg().exp()
    above = weight.cumsum(dim=-1) - weight
    keep = torch.arange(logits.shape[1], device=logits.device) < top_k[:, None]
    share = top_p[:, None].double()
    keep &= (above < share * weight.sum(dim=-1, keepdim=True)) | (share >= 1)
    floor = torch.where(min_p > 0, -min_p.clamp_min(1e-30).log(), DEEPEST).clamp(0, DEEPEST)
    keep &= ordered <= floor[:, None]
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter(1, tokens, keep), depth.double().neg().exp()


def sample_ref(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """``sample`` in plain torch, with a sort; fp64 sums."""
    best = clean(logits).argmax(dim=-1)
    kept, weight = kept_ref(logits, temperature, top_k, top_p, min_p)
    weight *= kept
    sums = weight.cumsum(dim=-1)
    goal = uniform.double()[:, None] * sums[:, -1:]
    tokens = torch.arange(logits.shape[1], device=logits.device)
    last = torch.where(weight > 0, tokens, -1).amax(dim=-1)
    drawn = torch.searchsorted(sums, goal, right=True)[:, 0].minimum(last)
    return torch.where((temperature == 0) | (last < 0), best, drawn)


def _depth(logits: Tensor, temperature: Tensor) -> Tensor:
    x = clean(logits)
    best = x.amax(dim=-1, keepdim=True).clamp_min(-1e30)
    return (best - x) * (1 / temperature.clamp_min(1e-6))[:, None]


def _check_columns(
    n: int, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> None:
    wanted = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "uniform"), torch.float32)
    wanted["top_k"] = torch.int32
    for (name, dtype), column in zip(
        wanted.items(), (temperature, top_k, top_p, min_p, uniform), strict=True
    ):
        if column.dtype != dtype or column.shape != (n,) or not column.is_contiguous():
            raise ValueError(f"{name} {tuple(column.shape)} {column.dtype}: [{n}] {dtype} expected")
