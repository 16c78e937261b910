"""Routes tokens to experts by the router's logits: scores, groups, top-k, weights.

Owns the choice; does not know what experts are. One warp per token, entirely in registers.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _without_best(score, column):
    """``score`` [1, n] without the first of its best, its column and its value, [1] each."""
    best = tl.max(score, axis=1)
    found = tl.min(tl.where(score == best[:, None], column[None, :], score.shape[1]), axis=1)
    found = tl.minimum(found, score.shape[1] - 1)  # NaN equals nothing
    rest = tl.where(column[None, :] == found[:, None], float("-inf"), score)
    return rest, found, best


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    live_ptr,
    ids_ptr,
    weights_ptr,
    logits_row,
    scale,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PAD: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    LIVE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    RENORMALISE: tl.constexpr,
):
    SIZE: tl.constexpr = NUM_EXPERTS // GROUPS
    COLUMNS: tl.constexpr = GROUPS_PAD * SIZE_PAD
    token = tl.program_id(0).to(tl.int64)
    # a group's experts lie in a run of SIZE_PAD columns
    column = tl.arange(0, COLUMNS)
    expert = column // SIZE_PAD * SIZE + column % SIZE_PAD
    live = (column % SIZE_PAD < SIZE) & (column // SIZE_PAD < GROUPS)
    at = logits_ptr + token * logits_row + expert
    logits = tl.load(at, mask=live, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logits))
    else:
        raised = tl.exp(logits - tl.max(logits, axis=0))
        score = raised / tl.sum(raised, axis=0)
    choice = score
    if BIAS:
        choice += tl.load(bias_ptr + expert, mask=live, other=0.0)
    choice = tl.where(live, choice, float("-inf"))[None, :]
    if TOP_GROUPS < GROUPS:
        group = tl.arange(0, GROUPS_PAD)
        within = tl.reshape(choice, [GROUPS_PAD, SIZE_PAD])
        rest, _, merit = _without_best(within, tl.arange(0, SIZE_PAD))
        if TOP2:
            merit += tl.max(rest, axis=1)
        left = tl.where(group < GROUPS, merit, float("-inf"))[None, :]
        kept = tl.zeros([GROUPS_PAD], tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            left, found, _ = _without_best(left, group)
            kept += (group == tl.max(found, axis=0)).to(tl.int32)
        within = tl.where((kept > 0)[:, None], within, float("-inf"))
        choice = tl.reshape(within, [1, COLUMNS])
    slot = tl.arange(0, TOP_K_PAD)
    ids = tl.zeros([TOP_K_PAD], tl.int32)
    weights = tl.zeros([TOP_K_PAD], tl.float32)
    for k in tl.static_range(TOP_K):
        choice, found, _ = _without_best(choice, column)
        place = tl.max(found, axis=0)
        weight = tl.sum(tl.where(column == place, score, 0.0), axis=0)
        number = tl.minimum(place // SIZE_PAD * SIZE + place % SIZE_PAD, NUM_EXPERTS - 1)
        ids = tl.where(slot == k, number, ids)
        weights = tl.where(slot == k, weight, weights)
    if RENORMALISE:
        weights /= tl.sum(weights, axis=0) + 1e-20  # sigmoids may all be 0
    if LIVE:
        ids = tl.where(tl.load(live_ptr + token) != 0, ids, -1)
    at = token * TOP_K + slot
    tl.store(ids_ptr + at, ids, mask=slot < TOP_K)
    tl.store(weights_ptr + at, weights * scale, mask=slot < TOP_K)


def route(
    logits: Tensor,
    top_k: int,
    *,
    sigmoid: bool = False,
    bias: Tensor | None = None,
    live: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    top2: bool = False,
    renormalise: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token.

    Args:
        logits: [num_tokens, num_experts] float32; rows may be strided.
        top_k: experts of a token.
        sigmoid: scores are sigmoids of the logits, else their softmax.
        bias: [num_experts] float32, added to the scores for the choice, not for the weights.
        live: [num_tokens] int32: 0 for tokens that only pad; None: none do.
        groups: equal runs of experts, of which the ``top_groups`` best are chosen from.
        top2: a group is as good as its two best experts together, else as its best.
        renormalise: weights are divided by their sum.
        scale: multiplies the weights.

    Returns:
        Experts [num_tokens, top_k] int32, the best first, of equal ones the first; and their
        weights float32. Logits that are not numbers give some experts that exist. The experts of
        tokens that only pad are -1.

    Raises:
        ValueError: shapes, dtypes, strides or numbers do not fit.

    Reference: ``route_ref``. Does not synchronise; safe in CUDA graphs.
    """
    num_tokens, num_experts = _check(logits, bias, live, top_k, groups, top_groups, top2)
    shape = (num_tokens, top_k)
    ids = torch.empty(shape, dtype=torch.int32, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return ids, weights
    _route_kernel[(num_tokens,)](
        logits,
        logits if bias is None else bias,
        logits if live is None else live,
        ids,
        weights,
        logits.stride(0),
        float(scale),
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        TOP_K_PAD=triton.next_power_of_2(top_k),
        SIGMOID=sigmoid,
        BIAS=bias is not None,
        LIVE=live is not None,
        GROUPS=groups,
        GROUPS_PAD=triton.next_power_of_2(groups),
        SIZE_PAD=triton.next_power_of_2(num_experts // groups),
        TOP_GROUPS=top_groups,
        TOP2=top2,
        RENORMALISE=renormalise,
        num_warps=1,
    )
    return ids, weights


def route_ref(
    logits: Tensor,
    top_k: int,
    *,
    sigmoid: bool = False,
    bias: Tensor | None = None,
    live: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    top2: bool = False,
    renormalise: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``route`` in plain torch."""
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    grouped = choice.unflatten(1, (groups, -1))
    merit = grouped.topk(2 if top2 else 1).values.sum(-1)
    best = merit.sort(descending=True, stable=True).indices[:, :top_groups]
    kept = torch.zeros_like(merit, dtype=torch.bool).scatter_(1, best, True)
    choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.sort(descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if live is not None:
        ids = ids.masked_fill((live == 0).unsqueeze(1), -1)
    return ids.int(), weights * scale


def _check(
    logits: Tensor,
    bias: Tensor | None,
    live: Tensor | None,
    top_k: int,
    groups: int,
    top_groups: int,
    top2: bool,
) -> tuple[int, int]:
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be rows of float32: {tuple(logits.shape)} {logits.dtype}")
    num_tokens, num_experts = logits.shape
    if num_experts % groups or not 0 < top_groups <= groups:
        raise ValueError(f"{num_experts} experts in {groups} groups, {top_groups} of them")
    size = num_experts // groups
    if not 0 < top_k <= top_groups * size or (top2 and size < 2):
        raise ValueError(f"{top_k} experts of {top_groups} groups of {size}")
    if bias is not None and (
        bias.shape != (num_experts,) or bias.dtype != torch.float32 or not bias.is_contiguous()
    ):
        raise ValueError(f"bias {tuple(bias.shape)} {bias.dtype} does not fit {num_experts} logits")
    if live is not None and (live.shape != (num_tokens,) or live.dtype != torch.int32):
        raise ValueError(f"live {tuple(live.shape)} {live.dtype} does not fit {num_tokens} tokens")
    return num_tokens, num_experts
