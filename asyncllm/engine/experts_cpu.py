"""Mixtures of experts on the CPU, in plain torch: one expert after the other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from asyncllm.models.spec import ExpertsSpec


def route(
    logits: Tensor, bias: Tensor | None, spec: ExpertsSpec, live: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :meth:`asyncllm.models.ops.Ops.route`."""
    scores = logits.sigmoid() if spec.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if spec.groups > 1:
        grouped = choice.unflatten(1, (spec.groups, -1))
        best = grouped.topk(2 if spec.group_score == "top2" else 1).values.sum(-1)
        dropped = torch.ones_like(best, dtype=torch.bool)
        dropped.scatter_(1, best.topk(spec.top_groups).indices, False)
        choice = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.topk(spec.top_k).indices
    weights = scores.gather(1, ids)
    if spec.renormalise:
        weights /= weights.sum(-1, keepdim=True) + 1e-20  # sigmoids may all be 0
    if live is not None:
        ids = ids.masked_fill((live == 0).unsqueeze(1), -1)
    return ids.int(), weights * spec.scale


def add_experts(
    total: Tensor,
    mlp: Callable[[int, Tensor], Tensor],
    x: Tensor,
    routed: tuple[Tensor, Tensor],
    held: range,
) -> None:
    """Add the outputs of the experts ``held`` for their tokens to ``total`` [T, hidden] float32.

    Args:
        mlp: (index in ``held``, rows of ``x``) -> the expert's output.
        routed: experts of each token and their weights, [T, top_k] each.
    """
    ids, weights = (tensor.flatten() for tensor in routed)
    order = ids.numpy().argsort(kind="stable")
    found, starts = np.unique(ids.numpy()[order], return_index=True)
    for expert, (start, stop) in zip(found, pairwise((*starts, len(ids))), strict=True):
        if expert not in held:
            continue
        pairs = torch.from_numpy(order[start:stop])
        tokens = pairs // (len(ids) // len(x))
        made = mlp(held.index(expert), x[tokens]).float()
        total.index_add_(0, tokens, made.mul_(weights[pairs].unsqueeze(1)))


def work_bytes(spec: ExpertsSpec, hidden: int, inner: int, itemsize: int) -> int:
    """Workspace per token: the sum, scores, and one expert that gets all tokens."""
    one = itemsize * (2 * hidden + 3 * inner) + 4 * hidden
    return 4 * hidden + 16 * spec.num_experts + 40 * spec.top_k + one
