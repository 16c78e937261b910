"""Scans text that arrives in pieces as if all of it were there.

A parser is a generator that reads from a :class:`Scanner` and yields where it needs text that has
not arrived yet. The scanner's answers depend on the text alone, never on where the pieces were cut,
so a parser built on it gives the same result for every cut. Knows no format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import Final, Generic, TypeVar

T = TypeVar("T")
Run = Generator[None, None, T]  # yields: more text is needed; returns a T
Out = Callable[[str], object]  # takes a piece of text

SPACE: Final = " \t\r\n"


class Literals:
    """Literal strings to search for together; none may contain another."""

    def __init__(self, *marks: str) -> None:
        assert not any(a != b and a in b for a in marks for b in marks), marks
        self.all = marks
        self._pattern = re.compile("|".join(map(re.escape, marks)))
        self._first = frozenset(mark[0] for mark in marks)
        self._longest = max(map(len, marks))

    def search(self, text: str, start: int) -> re.Match[str] | None:
        """The first mark at or after ``start``."""
        return self._pattern.search(text, start)

    def partial(self, text: str, start: int) -> int:
        """Where the end of ``text`` may be the beginning of a mark; len(text): nowhere."""
        for i in range(max(start, len(text) - self._longest + 1), len(text)):
            if text[i] in self._first and any(mark.startswith(text[i:]) for mark in self.all):
                return i
        return len(text)


class Scanner:
    """A window on the text: what has arrived and is still needed, and a position in it.

    Three states: :meth:`free` (text is dropped once it is passed), :meth:`mark` (it is kept, and
    :meth:`rewind` returns to it), and after :meth:`release` (:meth:`passed` still gives it, but
    there is no way back to it).
    """

    def __init__(self) -> None:
        self.buf = ""
        self.pos = 0
        self.ended = False  # no more text will come
        self.starved = False  # something was asked for beyond the end, since the last free()
        self._held = False
        self._recording = False
        self._passed: list[str] = []

    def feed(self, text: str) -> None:
        """Append text."""
        self.buf += text

    def free(self) -> None:
        """Drop the text that is passed, now and from now on."""
        self._drop()
        self._held = self._recording = self.starved = False

    def mark(self) -> None:
        """Remember this position and all text after it."""
        self._drop()
        self._held = self._recording = True

    def release(self) -> None:
        """Give up the way back to the mark."""
        self._held = False

    def rewind(self) -> None:
        """Go back to the mark."""
        assert self._held
        self.pos = 0

    def passed(self) -> str:
        """The text from the mark to here."""
        return "".join(self._passed) + self.buf[: self.pos]

    # -- what parsers ask; positions are relative to the present one -------------------------------

    def more(self) -> Run[bool]:
        """Wait for text; False at the end."""
        if self.pos and not self._held:
            if self._recording:
                self._passed.append(self.buf[: self.pos])
            self.buf = self.buf[self.pos :]
            self.pos = 0
        length = len(self.buf)
        while len(self.buf) == length and not self.ended:
            yield
        if len(self.buf) == length:
            self.starved = True
        return len(self.buf) > length

    def at(self, k: int = 0) -> Run[str]:
        """The character ``k`` places on, "" beyond the end."""
        while self.pos + k >= len(self.buf):
            if not (yield from self.more()):
                return ""
        return self.buf[self.pos + k]

    def starts(self, literal: str, k: int = 0) -> Run[bool]:
        """Is ``literal`` at ``k``? Waits only while it may be."""
        while True:
            have = self.buf[self.pos + k : self.pos + k + len(literal)]
            if have == literal:
                return True
            if not literal.startswith(have) or not (yield from self.more()):
                return False

    def accept(self, *literals: str, k: int = 0) -> Run[str]:
        """Pass the first of these that is at ``k``, with what is before it; "" if none is."""
        for literal in literals:
            if (yield from self.starts(literal, k)):
                self.pos += k + len(literal)
                return literal
        return ""

    def accept_next(self, *literals: str, skip: str = SPACE) -> Run[str]:
        """The same of the first that is not white space (not one of ``skip``)."""
        return (yield from self.accept(*literals, k=(yield from self.past_spaces(0, skip))))

    def past_spaces(self, k: int = 0, chars: str = SPACE) -> Run[int]:
        """The first position from ``k`` on that is not white space (not one of ``chars``)."""
        while (c := (yield from self.at(k))) and c in chars:
            k += 1
        return k

    def spaces(self) -> Run[str]:
        """Pass white space, and return it."""
        k = yield from self.past_spaces()
        self.pos += k
        return self.buf[self.pos - k : self.pos]

    def until(self, marks: Literals, limit: int) -> Run[str | None]:
        """Pass and return the text before a mark; None, staying, if none is within ``limit``."""
        while True:
            found = marks.search(self.buf, self.pos)
            if found is not None:
                if found.start() - self.pos > limit:
                    return None
                text = self.buf[self.pos : found.start()]
                self.pos = found.start()
                return text
            if marks.partial(self.buf, self.pos) - self.pos > limit:
                return None
            if not (yield from self.more()):
                return None

    def through(self, marks: Literals, limit: int) -> Run[str | None]:
        """As :meth:`until`, and pass the mark too."""
        text = yield from self.until(marks, limit)
        if text is not None:
            yield from self.accept(*marks.all)
        return text

    def to_mark(self, marks: Literals, out: Out) -> Run[str]:
        """Hand on the text before the next mark as it arrives; returns the mark, or "" at the end.

        A possible beginning of a mark is held back until it is known not to be one.
        """
        while True:
            found = marks.search(self.buf, self.pos)
            end = marks.partial(self.buf, self.pos) if found is None else found.start()
            if end > self.pos:
                out(self.buf[self.pos : end])
                self.pos = end
            if found is not None:
                return found.group()
            if not (yield from self.more()):
                if self.pos < len(self.buf):
                    out(self.buf[self.pos :])
                    self.pos = len(self.buf)
                return ""

    def rest(self, out: Out) -> Run[None]:
        """Hand on all text up to the end as it arrives."""
        while True:
            if self.pos < len(self.buf):
                out(self.buf[self.pos :])
                self.pos = len(self.buf)
            if not (yield from self.more()):
                return

    def _drop(self) -> None:
        self.buf = self.buf[self.pos :]
        self.pos = 0
        self._passed.clear()


class IncrementalParser(Generic[T]):
    """Runs a parser over text that arrives in pieces; its results go to ``self._found``."""

    def __init__(self) -> None:
        self._scan = Scanner()
        self._found: list[T] = []
        self._parser = self._run()

    def push(self, text: str) -> list[T]:
        """The results that are certain after this piece of text."""
        assert not self._scan.ended, "text after finish"
        self._scan.feed(text)
        return self._advance()

    def finish(self) -> list[T]:
        """The text has ended: the remaining results."""
        assert not self._scan.ended, "finished twice"
        self._scan.ended = True
        return self._advance()

    def _run(self) -> Run[None]:
        raise NotImplementedError

    def _advance(self) -> list[T]:
        next(self._parser, None)
        self._settle()
        found, self._found = self._found, []
        return found

    def _settle(self) -> None:
        """Called before ``_found`` is returned."""
