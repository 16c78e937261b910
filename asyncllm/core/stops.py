"""Finds stop strings and stop token sequences in streamed output.

Knows text and ids; knows neither tokenizers nor requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence


class StopFinder:
    """Returns the text before the stop string that starts first in the whole text.

    However the text is split, the output is ``text[:min(text.find(s) for s in stops)]``. Only text
    that may still become a stop string is held back.

    Args:
        stops: the stop strings.
        keep: the one that is found is returned too.

    Attributes:
        hit: a stop string was found; nothing more is returned.
        found: that string; "" until then.
    """

    __slots__ = ("_held", "_keep", "_stops", "found", "hit")

    def __init__(self, stops: tuple[str, ...], *, keep: bool = False) -> None:
        self._stops, self._keep = tuple(s for s in stops if s), keep
        self._held = ""
        self.hit = False
        self.found = ""

    def push(self, text: str) -> str:
        """Take more text; returns what can be shown now."""
        if self.hit or not text:
            return ""
        text = self._held + text
        found, stop = self._first(text)
        begun = min(_begun(text, s) for s in self._stops) if self._stops else len(text)
        # a stop string that started before the one found still wins if it is completed
        if 0 <= found <= begun:
            self._held = ""
            return self._end(text, found, stop)
        self._held = text[begun:]
        return text[:begun]

    def flush(self) -> str:
        """At the end of the text: what was held back, up to a stop string in it."""
        text, self._held = self._held, ""
        found, stop = self._first(text)
        if found < 0:
            return text
        return self._end(text, found, stop)

    def _end(self, text: str, found: int, stop: str) -> str:
        self.hit, self.found = True, stop
        return text[: found + len(stop) if self._keep else found]

    def _first(self, text: str) -> tuple[int, str]:
        """Start of the first stop string, and which; of two that start there, the shorter."""
        places = ((at, s) for s in self._stops if (at := text.find(s)) >= 0)
        return min(places, default=(-1, ""))


class StopMatcher:
    """Returns the text before the first stop string, where some tokens are not shown.

    A stop string that contains a special token's text is searched in the text that includes such
    tokens, any other one in the shown text.

    Args:
        stops: the stop strings.
        special: texts of special tokens.
        keep: as in ``StopFinder``; of a stop string with special tokens, what is shown of it.
    """

    __slots__ = ("_given", "_hidden", "_plain", "_taken", "_whole")

    def __init__(
        self, stops: tuple[str, ...], special: Collection[str] = (), *, keep: bool = False
    ) -> None:
        named = tuple(s for s in stops if any(token in s for token in special if token))
        self._whole = StopFinder(named, keep=keep) if named else None
        self._plain = StopFinder(tuple(s for s in stops if s not in named), keep=keep)
        self._hidden: deque[tuple[int, int]] = deque()  # where the whole text is not to be shown
        self._taken = self._given = 0  # characters of the whole text

    @property
    def hit(self) -> bool:
        """A stop string was found; nothing more is returned."""
        return self._plain.hit or (self._whole is not None and self._whole.hit)

    @property
    def found(self) -> str:
        """That string; "" until then."""
        return self._plain.found or ("" if self._whole is None else self._whole.found)

    def push(self, text: str, hidden: str = "") -> str:
        """Take more text, then that of a token that is not shown; returns what can be shown now."""
        if self._whole is None:
            return self._plain.push(text)
        if self.hit:
            return ""
        begin = self._taken + len(text)
        self._taken = begin + len(hidden)
        if hidden:
            self._hidden.append((begin, self._taken))
        shown = self._plain.push(self._visible(self._whole.push(text + hidden)))
        return shown + (self._plain.flush() if self._whole.hit else "")

    def flush(self) -> str:
        """At the end of the text: what was held back, up to a stop string in it."""
        if self._whole is None:
            return self._plain.flush()
        return self._plain.push(self._visible(self._whole.flush())) + self._plain.flush()

    def _visible(self, text: str) -> str:
        """The next part of the whole text, without what is hidden of it."""
        first, self._given = self._given, self._given + len(text)
        shown, at = [], 0
        while self._hidden and self._hidden[0][0] < self._given:
            begin, end = self._hidden.popleft()
            shown.append(text[at : begin - first])
            at = min(end, self._given) - first
            if end > self._given:
                self._hidden.appendleft((self._given, end))
        return "".join(shown) + text[at:]


def _begun(text: str, stop: str) -> int:
    """Start of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return at
        at = text.find(stop[0], at + 1)
    return len(text)


class SequenceFinder:
    """Finds the id sequence that is completed first; of two, the longer.

    Matches each sequence with Knuth-Morris-Pratt, so an id costs amortized constant time.

    Attributes:
        hit: length of the sequence just completed; 0: none yet.
    """

    __slots__ = ("_borders", "_matched", "_sequences", "hit")

    def __init__(self, sequences: Sequence[tuple[int, ...]]) -> None:
        self._sequences = [s for s in sequences if s]
        self._borders = [_borders(s) for s in self._sequences]
        self._matched = [0] * len(self._sequences)
        self.hit = 0

    @property
    def held(self) -> int:
        """How many of the newest ids may be the start of a sequence."""
        return max(self._matched, default=0)

    def push(self, token: int) -> None:
        """Take one more id; not after a hit."""
        for i, (sequence, borders) in enumerate(zip(self._sequences, self._borders, strict=True)):
            num = self._matched[i]
            while num and sequence[num] != token:
                num = borders[num - 1]
            num += sequence[num] == token
            self._matched[i] = num
            if num == len(sequence):
                self.hit = max(self.hit, num)


def _borders(sequence: Sequence[int]) -> list[int]:
    """For each prefix of ``sequence``: the length of its longest proper suffix that is also a
    prefix."""
    out = [0] * len(sequence)
    for i in range(1, len(sequence)):
        num = out[i - 1]
        while num and sequence[num] != sequence[i]:
            num = out[num - 1]
        out[i] = num + (sequence[num] == sequence[i])
    return out
