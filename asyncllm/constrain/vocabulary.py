"""Token strings sorted for prefix search in both directions, and bit masks of tokens.

Knows bytes and ids; knows neither tokenizer files nor requests.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Sequence


class Vocabulary:
    """Immutable.

    Args:
        pieces: bytes of every token in text; b"" for ids without a token.
        size: width of the logits; ids beyond it never come.
        special: ids whose bytes are a name, not text.
    """

    def __init__(
        self, pieces: Sequence[bytes], size: int, special: Collection[int] = frozenset()
    ) -> None:
        self.pieces, self.size = list(pieces[:size]), size
        self._hidden = [i for i in special if i < size]
        self._order = sorted(range(len(self.pieces)), key=self.pieces.__getitem__)
        self._sorted = [self.pieces[i] for i in self._order]
        self._ranked = array("i", self._order)

    def piece(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.pieces[token] if token < len(self.pieces) else b""

    def beginning_with(self, text: bytes) -> list[int]:
        """Tokens whose bytes begin with ``text``, which is not empty."""
        first = bisect_left(self._sorted, text)
        last = bisect_left(self._sorted, _after(text), first)
        return self._order[first:last]

    def beginnings_of(self, text: bytes) -> list[int]:
        """Tokens whose bytes, at least one, ``text`` begins with; the longest last."""
        found: list[int] = []
        for end in range(1, len(text) + 1):
            at = bisect_left(self._sorted, text[:end])
            while at < len(self._sorted) and self._sorted[at] == text[:end]:
                found.append(self._order[at])
                at += 1
        return found

    def agreeing_with(self, text: bytes, least: int = 1) -> bytes:
        """The mask of ordinary tokens that begin with ``text``, or with which it begins.

        Of the latter those of at least ``least`` bytes, unless nothing else is left.
        """
        import numpy as np  # here: the command line knows this module, and is to answer at once

        first = bisect_left(self._sorted, text)
        last = bisect_left(self._sorted, _after(text), first)
        flags = np.zeros(-(-self.size // 32) * 32, np.uint8)
        flags[np.frombuffer(self._ranked, np.int32)[first:last]] = 1
        shorter = self.beginnings_of(text)
        flags[[i for i in shorter if len(self.pieces[i]) >= least]] = 1
        flags[self._hidden] = 0
        if not flags.any():
            flags[shorter] = 1
            flags[self._hidden] = 0
        return np.packbits(flags, bitorder="little").tobytes()

    def containing(self, text: bytes) -> list[int]:
        """Tokens with ``text`` anywhere in them; looks at every token."""
        return [i for i, piece in enumerate(self.pieces) if text in piece]


def _after(text: bytes) -> bytes:
    """The first bytes in order that are behind everything that begins with ``text``."""
    body = text.rstrip(b"\xff")
    return body[:-1] + bytes([body[-1] + 1]) if body else text + b"\xff" * 4096


def bits(tokens: Collection[int], vocab_size: int) -> bytes:
    """The mask that ``tokens`` pass; see :class:`asyncllm.constrain.protocol.Constraint`."""
    mask = bytearray(-(-vocab_size // 32) * 4)
    for token in tokens:
        if token < vocab_size:
            mask[token >> 3] |= 1 << (token & 7)
    return bytes(mask)


def every(vocab_size: int) -> bytes:
    """The mask that all tokens pass."""
    return ((1 << vocab_size) - 1).to_bytes(-(-vocab_size // 32) * 4, "little")


def passes(mask: bytes, token: int) -> bool:
    """``token`` may come."""
    return not mask or bool(mask[token >> 3] >> (token & 7) & 1)


def either(one: bytes, other: bytes) -> bytes:
    """What one of two masks lets pass."""
    joined = int.from_bytes(one, "little") | int.from_bytes(other, "little")
    return joined.to_bytes(len(one), "little")


def without(mask: bytes, tokens: Collection[int]) -> bytes:
    """``mask`` less some tokens."""
    left = bytearray(mask)
    for token in tokens:
        left[token >> 3] &= ~(1 << (token & 7))
    return bytes(left)
