"""Sliding windows: separate counts for layers that see only the last tokens.

Knows numbers of tokens; knows neither slots nor tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GRAIN = 64
SHORT = 6  # at least one sliding slot per this many full ones: for shorter requests and the cache
UNBACKED = 16  # if all layers slide: known tokens per token with a slot


class PerSpace(NamedTuple):
    """A count per slot space: for layers that see all tokens, and for those with a window."""

    full: int
    sliding: int

    def of(self, window: int | None) -> int:
        """The count of a layer's space."""
        return self.full if window is None else self.sliding


NO_SLOTS = PerSpace(0, 0)


@dataclass(frozen=True, slots=True)
class Window:
    """How far the layers of the sliding space see.

    Attributes:
        size: tokens that a token sees, itself included, in the layer that sees most.
    """

    size: int

    @property
    def reach(self) -> int:
        """Tokens before a new one that it sees."""
        return self.size - 1

    @property
    def grain(self) -> int:
        """Slots are freed in portions of this size, since each portion costs host time."""
        return max(1, min(GRAIN, self.size // 16))

    @property
    def most(self) -> int:
        """Most slots that a lane holds besides those of the tokens that a step computes."""
        return self.reach + 2 * self.grain


@dataclass(frozen=True, slots=True)
class SlotDivision:
    """How memory is divided between the two slot spaces.

    Attributes:
        slot: bytes of a slot; 0 where a space has no layers.
        window: of the sliding layers, if there are any.
        max_len: tokens of the longest sequence.
    """

    slot: PerSpace
    window: Window | None
    max_len: int

    def nbytes(self, num: PerSpace) -> int:
        """Bytes of these slots plus one for padding in each space."""
        return self.slot.full * (num.full + 1) + self.slot.sliding * (num.sliding + 1)

    @property
    def unbacked(self) -> bool:
        """All layers slide: the full space is bookkeeping only and takes no memory."""
        return not self.slot.full

    def fit(self, budget: int, wanted: int | None) -> PerSpace:
        """The most slots in ``budget`` bytes, or ``wanted`` ones; fewer: they do not fit.

        ``wanted`` are full ones, or sliding ones where all layers slide. Equal numbers: there is
        only one space.
        """
        if self.unbacked or self.window is None:
            fits = max(budget // sum(self.slot) - 1, 0)
            num = min(wanted or fits, fits)
            return PerSpace(self._remembered(num), num)
        low, high = 0, wanted or budget // self.slot.full
        while low < high:
            middle = (low + high + 1) // 2
            fits_too = self.nbytes(self.balanced(middle)) <= budget
            low, high = (middle, high) if fits_too else (low, middle - 1)
        return self.balanced(low)

    def balanced(self, full: int) -> PerSpace:
        """Sizes with sliding slots for as many sequences of ``max_len``, plus their new tokens."""
        if self.window is None:
            return PerSpace(full, full)
        most = self.window.most
        whole = -(-max(full, self.max_len) * most // self.max_len) + most
        return PerSpace(full, min(full, max(full // SHORT, whole)))

    def _remembered(self, sliding: int) -> int:
        """Full slots for this many sliding ones, where only the latter take memory."""
        if self.window is None or sliding <= self.window.most:
            return sliding
        lanes = max(sliding // self.window.most - 1, 1)
        return max(sliding, self.max_len, min(lanes * self.max_len, UNBACKED * sliding))
