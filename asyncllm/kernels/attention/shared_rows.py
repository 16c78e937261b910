"""Describes on the device which rows of a decode step have the same first slots, and
the costs of sharing.

Plain torch: also needed without Triton.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor

MAX_GROUPS = 32  # of a step; a power of 2, since kernels look at all of them at once
MEMBERS = 2  # times the rows of a step: members of all groups at most
# As measured on an H100 (bench/kernels_shared.py). What rows share mostly comes from the L2 cache
# when each reads it, three times as fast as from memory: less is saved than the bytes would say.
CACHE_RATE = 9.7e12  # bytes/s of 16 bits for each channel of K and V
BLOCK_RATE = 1.3e12  # channels of K for 64 pairs, per second
ROW_S = 17e-12  # for each channel of a row's queries: partial results are written and read
STEP_S = 14e-6  # until the groups' part has started and ended
# The same of latents, where products set the time, also where rows share (measured on an H200 by
# bench/kernels_latent_shared.py): a latent's channels, as key and as value, for all pairs of a
# block of 16 or 64 per second; and where latents are in 8 bits.
LATENT_RATE = {16: 5.2e12, 64: 2.0e12}
LATENT_RATE_8_BITS = {16: 5.2e12, 64: 1.2e12}
LATENT_ROW_S = 6e-12  # for each channel of a row's sums
LATENT_STEP_S = 26e-6


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Groups of rows whose tables name the same slots over a range of tokens; int32 all.

    Rows are put into an order in which the members of each group follow one another. A row is a
    member of several groups where these lie inside one another: the tokens of an inner group follow
    those of the outer one without a gap, and the outermost begins with token 0.

        group     tokens          members
        0         [0, 512)        order[0:6]
        1         [512, 1536)     order[0:3]
        2         [512, 800)      order[3:5]

    There are ``MEMBERS`` memberships for each row of the step at most.
    """

    groups: Tensor  # [4, MAX_GROUPS] first token, token behind the last; first member, their number
    order: Tensor  # [num_rows] the members; behind them anything that is a row
    places: Tensor  # [num_rows] where a row is in ``order``; -1: in no group
    owns: Tensor  # [num_rows] the first token that no group of the row has; 0 where in none


@dataclass(frozen=True, slots=True)
class SharingCosts:
    """What groups cost in a layer, in tokens whose K/V are read in that time.

    Attributes:
        rows: that are computed together; a group's last block costs as much as a full one.
        block: per block of rows and token of the group.
        row: per member.
        step: once for all groups of a step.
        blocks: most of all groups, whose partial results have a space that is given.
    """

    rows: int
    block: float
    row: float
    step: float
    blocks: int = sys.maxsize

    @classmethod
    def of(cls, num_q_heads: int, num_kv_heads: int, head_dim: int) -> SharingCosts:
        """Of a layer on one rank."""
        group = num_q_heads // num_kv_heads
        channels = num_kv_heads * head_dim
        token_s = 4 * channels / CACHE_RATE
        return cls(
            rows=max(64, group) // group,
            block=channels / BLOCK_RATE / token_s,
            row=ROW_S * num_q_heads * head_dim / token_s,
            step=STEP_S / token_s,
        )

    @classmethod
    def of_latents(
        cls, num_heads: int, rank: int, rope_dim: int, blocks: int, *, eight_bits: bool = False
    ) -> SharingCosts | None:
        """The same over latents; None where sharing never saves anything: each block computes as
        much as before, which is all of the time if a row fills a block by itself."""
        group = 1 << (num_heads - 1).bit_length()
        channels = 2 * rank + rope_dim
        rates = LATENT_RATE_8_BITS if eight_bits else LATENT_RATE
        block_s = channels / rates[64] * max(1, -(-num_heads // 64))
        token_s = channels / rates[16] if num_heads <= 16 else block_s
        rows = max(64, group) // group
        if rows * token_s <= block_s:
            return None
        return cls(
            rows=rows,
            block=block_s / token_s,
            row=LATENT_ROW_S * num_heads * rank / token_s,
            step=LATENT_STEP_S / token_s,
            blocks=blocks,
        )

    def num_blocks(self, count: int) -> int:
        """Of a group of ``count`` rows."""
        return -(-count // self.rows)

    def gain(self, length: int, count: int) -> float:
        """Of ``count`` rows with ``length`` tokens in common."""
        read = 1 + self.num_blocks(count) * self.block
        return length * (count - read) - count * self.row
