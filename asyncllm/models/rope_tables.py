"""Computes the cosines and sines of rotary embeddings, for every variant.

The arithmetic is that of transformers, in float32, so that values agree at any position.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from asyncllm.models.rope import Dynamic, LinearScaling, Llama3Scaling, LongRope, Rope, Yarn
from asyncllm.models.spec import AttentionSpec


def rope_tables(
    specs: Iterable[AttentionSpec], max_len: int, device: torch.device
) -> dict[Rope | None, Tensor]:
    """The :func:`rope_table` of every rope of ``specs``."""
    ropes = dict.fromkeys(spec.rope for spec in specs)
    if device.type == "meta":  # only sizes are needed
        return {rope: torch.empty(max_len, rope.dim, device=device) for rope in ropes if rope}
    return {rope: rope_table(rope, max_len).to(device) for rope in ropes if rope}


def rope_table(rope: Rope, max_len: int) -> Tensor:
    """cos and sin of every position: [max_len, rope.dim] float32, cosines in the first half."""
    frequencies = inverse_frequencies(rope, max_len)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1) * rope.attention_factor
    return table.contiguous()


def inverse_frequencies(rope: Rope, max_len: int) -> Tensor:
    """Radians per position, [rope.dim / 2] float32 (RoFormer, Su et al., 2021, §3.4.2).

    Args:
        max_len: of the sequences served. Dynamic and longrope angles depend on it, and on
            nothing else: K in the cache must fit any query.
    """
    steps = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    match rope.scaling:
        case None:
            return 1.0 / torch.pow(rope.theta, steps)
        case LinearScaling(factor, _):
            return 1.0 / torch.pow(rope.theta, steps) / factor
        case Dynamic(factor, trained):
            stretch = factor * max(max_len, trained) / trained - (factor - 1)
            return 1.0 / torch.pow(rope.theta * stretch ** (rope.dim / (rope.dim - 2)), steps)
        case Llama3Scaling() as scaling:
            return _llama3(1.0 / torch.pow(rope.theta, steps), scaling)
        case Yarn() as scaling:
            return _yarn(rope, scaling, torch.pow(rope.theta, steps))
        case LongRope(short, long, trained):
            divisors = torch.tensor(long if max_len > trained else short, dtype=torch.float32)
            return 1.0 / (divisors * torch.pow(rope.theta, steps))


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """The Llama 3 Herd of Models, 2024, §3.4.2, and its code."""
    wavelen = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.trained / wavelen - low) / (high - low)
    divided = frequencies / scaling.factor
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return torch.where(smooth < 0, divided, torch.where(smooth > 1, frequencies, blended))


def _yarn(rope: Rope, scaling: Yarn, wavelen: Tensor) -> Tensor:
    """YaRN (Peng et al., 2023), §3.2; its attention factor is the rope's."""

    def border(turns: float) -> float:
        """The dimension that makes this many rotations within the trained positions."""
        return (rope.dim * math.log(scaling.trained / (turns * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low, high = border(scaling.beta_fast), border(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 0.001
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * wavelen) * (1 - kept) + 1.0 / wavelen * kept
