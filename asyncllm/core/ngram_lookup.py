"""Guesses how a text continues by finding an earlier occurrence of its last tokens (n-gram lookup).

Knows token ids of one text; knows neither requests nor steps.
"""

from __future__ import annotations

from array import array

from asyncllm.codec import INT32

GRAM = 2  # tokens that must match to find a position
DEPTH = 8  # earlier positions that are compared, the latest first
LONGEST = 32  # tokens compared per position
NEAR = 48  # after a mismatch: tokens ahead of the position within which it may be resumed
LOST = 64  # tokens after which it is given up
TRUSTED = 4  # tokens of agreement that the beginning of a predicted text is worth
NO_TOKENS = array(INT32)
MOST_HEADS = 1 << 16  # bounds the memory of a long text's index: 256 KiB
CLASSES = 7  # of match lengths, see ``_class_of``
# prior acceptance rate of each class, and the weight of that prior in observations
PRIOR = (0.0, 0.25, 0.6, 0.7, 0.85, 0.9, 0.92)
WEIGHT = 4.0
FADE = 0.96  # decay of an observation with each later one of its class


def _class_of(agreed: int) -> int:
    """Class of a match of that many tokens: 1, 2-3, 4-7, ..., 32 and more."""
    return min(agreed.bit_length(), CLASSES - 1)


class NgramLookup:
    """The tokens of one text, and the position in it whose continuation it may be repeating.

    Every added token is compared with the guess for it, whether or not anybody used the guess, so
    the hit rate of guesses in this text is always known. A position is kept while it predicts
    correctly. Adding a token takes a microsecond, or 10 if the text departs from what it repeats.

    Args:
        ids: the tokens so far. :meth:`read` indexes them in pieces, since a prompt may be long;
            there are no guesses before all of them are indexed.
        most: upper bound of the text's length in tokens.
        prediction: another text, which the one after the prompt may repeat, from its beginning on.
        begun: ``ids`` are more than the prompt.
    """

    __slots__ = ("_agreed", "_first", "_heads", "_hits", "_lost", "_mask", "_place", "_prev", "_tries", "_waits", "ids")  # fmt: skip

    def __init__(
        self,
        ids: array[int],
        most: int,
        prediction: array[int] = NO_TOKENS,
        *,
        begun: bool = False,
    ) -> None:
        # a predicted text goes before the other, with a token between them that no text has
        self.ids = prediction + array(INT32, [-1]) + ids if prediction else ids[:]
        self._first = len(self.ids) - len(ids)
        num_heads = min(1 << max(most + self._first, 255).bit_length(), MOST_HEADS)
        self._heads = array(INT32, b"\xff" * (4 * num_heads))  # by hash: the last position after it
        self._mask = num_heads - 1
        self._prev = array(INT32)  # per token: the previous position with the same hash
        self._place = self._lost = -1  # of the next token; where the last match broke off
        self._waits = self._agreed = 0
        if prediction and begun:
            self._lost = 0
        elif prediction:
            self._place, self._agreed = 0, TRUSTED
        self._hits = [rate * WEIGHT for rate in PRIOR]
        self._tries = [WEIGHT] * CLASSES

    def read(self, most: int) -> int:
        """Index up to ``most`` of the tokens not indexed yet; returns how many."""
        begin = len(self._prev)
        end = min(len(self.ids), begin + most)
        if begin == end:
            return 0
        ids, heads, prev, mask = self.ids, self._heads, self._prev, self._mask
        before = ids[begin - 1] if begin else 0
        for i in range(begin, end):
            token = ids[i]
            key = (before * 0x9E3B1 + token * 0xC2B2B) & mask
            prev.append(heads[key])
            heads[key] = i + 1
            before = token
        if end == len(ids) and self._place < 0:
            self._find()
        return end - begin

    @property
    def unread(self) -> bool:
        """Whether some tokens have not been indexed."""
        return len(self._prev) < len(self.ids)

    def push(self, token: int) -> None:
        """Add a token."""
        ids, place = self.ids, self._place
        ids.append(token)
        if place >= 0:
            kind = _class_of(self._agreed)
            right = ids[place] == token
            self._tries[kind] = self._tries[kind] * FADE + 1
            self._hits[kind] = self._hits[kind] * FADE + right
            if right:
                self._place, self._agreed = place + 1, self._agreed + 1
                if place + 2 == self._first:
                    self._place, self._agreed = -1, 0  # the predicted text is over
            else:
                self._place, self._agreed = -1, 0
                self._lost, self._waits = place, 0
        if len(self._prev) < len(ids) - 1:
            return  # it is indexed with the others
        key = self._key()
        self._prev.append(self._heads[key])
        self._heads[key] = len(ids)
        if self._place < 0:
            self._find()

    @property
    def guesses(self) -> bool:
        """Whether there is a guess for the next token."""
        return self._place >= 0

    @property
    def is_predicted(self) -> bool:
        """Whether the guess is from the predicted text."""
        return 0 <= self._place < self._first

    def chances(self, most: int, ahead: int = 0) -> list[float]:
        """Probabilities that the next guess is right, the next two, and so on, up to ``most``.

        Args:
            ahead: number of leading guesses to leave out: tokens that exist but are not known yet.
        """
        out: list[float] = []
        if self._place < 0:
            return out
        if self._place < self._first:
            most = min(most, self._first - 1 - self._place - ahead)
        chance, agreed, hits, tries = 1.0, self._agreed, self._hits, self._tries
        for i in range(ahead + most):
            kind = _class_of(agreed + i)
            chance *= hits[kind] / tries[kind]
            if i >= ahead:
                out.append(chance)
        return out

    def guess(self, num: int) -> array[int]:
        """The next tokens, if the text continues as it did at the matched position."""
        ids, place = self.ids, self._place
        out = ids[place : place + num]
        period = len(ids) - place
        while len(out) < num:  # the repeated text overlaps its repetition
            out.append(out[-period])
        return out

    def _key(self) -> int:
        ids = self.ids
        before = ids[-2] if len(ids) > 1 else 0
        return (before * 0x9E3B1 + ids[-1] * 0xC2B2B) & self._mask

    def _find(self) -> None:
        """Find the position that matches the end of the text best, if there is one."""
        ids, end = self.ids, len(self.ids)
        best, place = 0, self._prev[end - 1] if end else -1
        for _ in range(DEPTH):
            if place < GRAM:
                break
            agreed = self._agreement(place)
            if agreed >= GRAM and agreed > best and place + 1 != self._first:
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
        """How many tokens before ``place`` equal those at the end of the text."""
        ids, end = self.ids, len(self.ids)
        most = min(place, LONGEST)
        for i in range(most):
            if ids[place - 1 - i] != ids[end - 1 - i]:
                return i
        return most
