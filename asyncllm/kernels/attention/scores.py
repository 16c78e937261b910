"""Attention scores in units of log2, so that softmax needs no more than exp2."""

# mypy: allow-incomplete-defs

import math

import triton
import triton.language as tl


@triton.jit
def capped(product, scale_log2, cap_log2):
    """softcap * tanh(product * scale / softcap); ``to_log2`` gives the factors."""
    return cap_log2 * (1.0 - 2.0 / (1.0 + tl.exp2(product * scale_log2)))


def padded(head_dim: int) -> int:
    """Elements of a head as tiles have them: a power of 2, and as many as products want."""
    power: int = triton.next_power_of_2(head_dim)
    return max(16, power)


def to_log2(scale: float, softcap: float | None) -> tuple[float, float]:
    """What turns q·k into a score: its factor, and 0; with a softcap the factors of ``capped``."""
    if softcap is None:
        return scale * math.log2(math.e), 0.0
    return 2.0 * scale / softcap * math.log2(math.e), softcap * math.log2(math.e)
