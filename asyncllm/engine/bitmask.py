"""Applies the host's bit masks of allowed tokens to the logits on the device.

Knows bits and logits; does not know grammars. Nothing here waits for the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from asyncllm.engine.step_inputs import I32, Bitmask, HostColumn, StepRows
from asyncllm.messages import StepPlan

SLICE_ROWS = 64  # rows unpacked at a time: bounds the memory


def bitmask_of(plan: StepPlan, rows: StepRows) -> Bitmask[HostColumn] | None:
    """A plan's masks, by sampled rows."""
    if not plan.masks:
        return None
    masked = np.frombuffer(plan.masked, np.int32)
    sampled: I32 = np.cumsum(rows.samples, dtype=np.int32) - np.int32(1)
    return Bitmask(sampled[masked], np.frombuffer(plan.masks, np.int32).reshape(len(masked), -1))


def apply_token_bitmask(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Logits of tokens whose bit is 0 become -inf, in place.

    Args:
        logits: [n, vocab_size].
        rows: [m] int32, each row at most once.
        masks: [m, ceil(vocab_size / 32)] int32.
    """
    vocab_size = logits.shape[1]
    shifts = torch.arange(8, device=logits.device, dtype=torch.uint8)
    for first in range(0, len(rows), SLICE_ROWS):
        some = rows[first : first + SLICE_ROWS].long()
        # a word's low byte comes first on every machine that this runs on
        octets = masks[first : first + SLICE_ROWS].contiguous().view(torch.uint8)
        allowed = (octets[:, :, None] >> shifts).bitwise_and_(1).view(len(some), -1)
        banned = allowed[:, :vocab_size] == 0
        logits.index_copy_(0, some, logits[some].masked_fill_(banned, -torch.inf))
