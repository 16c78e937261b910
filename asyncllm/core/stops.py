"""Stop strings: find the first one in a text that arrives in parts, and cut the text before it.

Knows text only; knows neither tokens nor requests.
"""

from __future__ import annotations


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


def _begun(text: str, stop: str) -> int:
    """Where the longest end of ``text`` that is a proper beginning of ``stop`` starts."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return at
        at = text.find(stop[0], at + 1)
    return len(text)
