"""Finds stop strings and stop sequences of token ids in output that arrives in pieces.

Knows text and ids; knows neither tokenizers nor requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence


class StopFinder:
    """Gives the text before the stop string that begins first in the whole text.

    However the text is split, what is given is ``text[:min(text.find(s) for s in stops)]``. Only
    text that may still turn out to be the beginning of a stop string is held back.

    Attributes:
        hit: a stop string was found; nothing comes out any more.
        found: that string; "" until then.
    """

    __slots__ = ("_held", "_stops", "found", "hit")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(s for s in stops if s)
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
        # a stop string that has begun before the one found still wins if it comes whole
        if 0 <= found <= begun:
            self.hit, self.found, self._held = True, stop, ""
            return text[:found]
        self._held = text[begun:]
        return text[:begun]

    def flush(self) -> str:
        """The text has ended: what was held back, up to a stop string inside it."""
        text, self._held = self._held, ""
        found, stop = self._first(text)
        if found < 0:
            return text
        self.hit, self.found = True, stop
        return text[:found]

    def _first(self, text: str) -> tuple[int, str]:
        """Where a stop string begins first, and which; of two that begin there, the shorter."""
        places = ((at, s) for s in self._stops if (at := text.find(s)) >= 0)
        return min(places, default=(-1, ""))


class Stops:
    """Gives the text before the stop string that begins first, where some tokens are not shown.

    A stop string with the text of a special token in it is looked for in the text with such tokens,
    any other one in the text that is shown.

    Args:
        stops: the stop strings.
        special: texts of special tokens.
    """

    __slots__ = ("_given", "_hidden", "_plain", "_taken", "_whole")

    def __init__(self, stops: tuple[str, ...], special: Collection[str] = ()) -> None:
        named = tuple(s for s in stops if any(token in s for token in special if token))
        self._whole = StopFinder(named) if named else None
        self._plain = StopFinder(tuple(s for s in stops if s not in named))
        self._hidden: deque[tuple[int, int]] = deque()  # where the whole text is not to be shown
        self._taken = self._given = 0  # characters of the whole text

    @property
    def hit(self) -> bool:
        """A stop string was found; nothing comes out any more."""
        return self._plain.hit or (self._whole is not None and self._whole.hit)

    @property
    def found(self) -> str:
        """That string; "" until then."""
        return self._plain.found or ("" if self._whole is None else self._whole.found)

    def push(self, text: str, hidden: str = "") -> str:
        """Take more text, and behind it that of a token that is not shown;
        what can be shown now."""
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
        """The text has ended: what was held back, up to a stop string inside it."""
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
    """Where the longest end of ``text`` that is a proper beginning of ``stop`` starts."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return at
        at = text.find(stop[0], at + 1)
    return len(text)


class SequenceFinder:
    """Finds the sequence of ids that is the first to come whole; of two, the longer.

    Each sequence is followed as in Knuth, Morris and Pratt's search, so that an id costs constant
    time on average, whatever has come before.

    Attributes:
        hit: length of the sequence that has just come whole; 0: none yet.
    """

    __slots__ = ("_borders", "_matched", "_sequences", "hit")

    def __init__(self, sequences: Sequence[tuple[int, ...]]) -> None:
        self._sequences = [s for s in sequences if s]
        self._borders = [_borders(s) for s in self._sequences]
        self._matched = [0] * len(self._sequences)
        self.hit = 0

    @property
    def held(self) -> int:
        """How many of the newest ids may be the beginning of a sequence."""
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
    """Of each beginning of ``sequence``:
    the length of its longest proper end that begins it too."""
    out = [0] * len(sequence)
    for i in range(1, len(sequence)):
        num = out[i - 1]
        while num and sequence[num] != sequence[i]:
            num = out[num - 1]
        out[i] = num + (sequence[num] == sequence[i])
    return out
