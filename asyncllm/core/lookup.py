"""Guesses how a text goes on: where its last tokens have been before, it may repeat itself.

Knows token ids of one text; knows neither requests nor steps.
"""

from __future__ import annotations

from array import array

from asyncllm.codec import INT32

GRAM = 3  # tokens that must agree before a place is found by them alone
DEPTH = 8  # earlier places that are compared, the latest first
LONGEST = 32  # tokens that two places are compared by
NEAR = 48  # tokens behind a lost place in which the text may join it again
LOST = 64  # tokens after which it is given up
MOST_HEADS = 1 << 16  # bounds the memory of a long text's index: 256 KiB
CLASSES = 7  # of agreement, see ``_class_of``
# how often a guess of each class is right before a text has shown it, and what that weighs
PRIOR = (0.0, 0.25, 0.6, 0.7, 0.85, 0.9, 0.92)
WEIGHT = 4.0
FADE = 0.96  # what a guess counts for less with each later one of its class


def _class_of(agreed: int) -> int:
    """Of a place that agrees with the text's end in that many tokens: 1, 2-3, 4-7, ..., 32-."""
    return min(agreed.bit_length(), CLASSES - 1)


class Lookup:
    """The tokens of one text, and the place in it that it may be repeating.

    Every token that is added is held against the guess for it, whether or not anybody has used the
    guess, so it is always known how good they are here. A place is held on to for as long as it is
    right. Adding a token takes a microsecond, 10 where the text departs from what it repeats.

    Args:
        ids: the tokens so far. They are read by :meth:`read`, in pieces, since a prompt may be
            long; nothing is guessed before all of them are.
        most: tokens that may come to be in it.
    """

    __slots__ = ("_agreed", "_heads", "_hits", "_lost", "_mask", "_place", "_prev", "_tries", "_waits", "ids")  # fmt: skip

    def __init__(self, ids: array[int], most: int) -> None:
        self.ids = ids[:]
        num_heads = min(1 << max(most, 255).bit_length(), MOST_HEADS)
        self._heads = array(INT32, b"\xff" * (4 * num_heads))  # by hash: the last place behind it
        self._mask = num_heads - 1
        self._prev = array(INT32)  # of each token: the place before it with the same hash
        self._place = self._lost = -1  # of the next token; where the last one was given up
        self._waits = self._agreed = 0
        self._hits = [rate * WEIGHT for rate in PRIOR]
        self._tries = [WEIGHT] * CLASSES

    def read(self, most: int) -> int:
        """Read up to ``most`` of the tokens that have not been read; returns how many."""
        begin = len(self._prev)
        end = min(len(self.ids), begin + most)
        if begin == end:
            return 0
        ids, heads, prev, mask = self.ids, self._heads, self._prev, self._mask
        first, second = (ids[max(begin - i, 0)] if begin else 0 for i in (2, 1))
        for i in range(begin, end):
            third = ids[i]
            key = (first * 0x9E3B1 + second * 0x85EB5 + third * 0xC2B2B) & mask
            prev.append(heads[key])
            heads[key] = i + 1
            first, second = second, third
        if end == len(ids):
            self._find()
        return end - begin

    @property
    def unread(self) -> bool:
        """Some of the tokens have not been read."""
        return len(self._prev) < len(self.ids)

    def push(self, token: int) -> None:
        """Add a token."""
        ids, place = self.ids, self._place
        ids.append(token)
        if len(self._prev) < len(ids) - 1:
            return  # it is read with the others
        if place >= 0:
            kind = _class_of(self._agreed)
            right = ids[place] == token
            self._tries[kind] = self._tries[kind] * FADE + 1
            self._hits[kind] = self._hits[kind] * FADE + right
            if right:
                self._place, self._agreed = place + 1, self._agreed + 1
            else:
                self._place, self._agreed = -1, 0
                self._lost, self._waits = place, 0
        key = self._key()
        self._prev.append(self._heads[key])
        self._heads[key] = len(ids)
        if self._place < 0:
            self._find()

    @property
    def guesses(self) -> bool:
        """There is a guess for the next token."""
        return self._place >= 0

    def chances(self, most: int, ahead: int = 0) -> list[float]:
        """How likely the next guesses are right together with all before them, up to ``most``.

        Args:
            ahead: the first ones, which are not listed: tokens that exist but are not known yet.
        """
        out: list[float] = []
        if self._place < 0:
            return out
        chance, agreed, hits, tries = 1.0, self._agreed, self._hits, self._tries
        for i in range(ahead + most):
            kind = _class_of(agreed + i)
            chance *= hits[kind] / tries[kind]
            if i >= ahead:
                out.append(chance)
        return out

    def guess(self, num: int) -> array[int]:
        """The next tokens, if the text goes on as it did at its place."""
        ids, place = self.ids, self._place
        out = ids[place : place + num]
        period = len(ids) - place
        while len(out) < num:  # what is repeated runs into the repetition
            out.append(out[-period])
        return out

    def _key(self) -> int:
        ids, end = self.ids, len(self.ids)
        first, second = (ids[end - i] if end >= i else 0 for i in (3, 2))
        return (first * 0x9E3B1 + second * 0x85EB5 + ids[-1] * 0xC2B2B) & self._mask

    def _find(self) -> None:
        """The place that agrees best with the end of the text, if there is one."""
        ids, end = self.ids, len(self.ids)
        best, place = 0, self._prev[end - 1] if end else -1
        for _ in range(DEPTH):
            if place < GRAM:
                break
            if (agreed := self._agreement(place)) > best and agreed >= GRAM:
                best, self._place, self._agreed = agreed, place, agreed
                if agreed >= LONGEST:
                    break
            place = self._prev[place - 1]
        if self._lost < 0:
            return
        if self._place >= 0 or (waits := self._waits + 1) > LOST:
            self._lost = -1
            return
        self._waits = waits
        try:
            place = ids.index(ids[-1], self._lost, min(self._lost + NEAR, end - 1)) + 1
        except ValueError:
            return
        self._place, self._agreed = place, self._agreement(place)

    def _agreement(self, place: int) -> int:
        """How many tokens before ``place`` are those at the end of the text."""
        ids, end = self.ids, len(self.ids)
        most = min(place, LONGEST)
        for i in range(most):
            if ids[place - 1 - i] != ids[end - 1 - i]:
                return i
        return most
