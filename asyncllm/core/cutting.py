"""The first and last tokens of a long text, without encoding all of it.

Knows that a tokenizer works from left to right on pieces of text that do not depend on each other
(words, mostly); knows no tokenizer.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Final

Encode = Callable[[str], "array[int]"]

GUESS: Final = 8  # characters of a token; English has 4 to 5
MARGIN: Final = 64  # tokens at a cut that are not used
SEEK: Final = 1024  # characters among which a place to cut is looked for


def shortened(ids: array[int], head: int, tail: int) -> array[int]:
    """The first ``head`` ids and the last ``tail``, or all if they are not more."""
    if len(ids) <= head + tail:
        return ids
    return ids[:head] + ids[len(ids) - tail :]


def encode_ends(
    text: str, encode: Encode, head: int, tail: int, longest: int
) -> tuple[array[int], bool]:
    """``shortened(encode(text), head, tail)`` in a time that depends on the two numbers alone.

    The text is cut before a word, where every tokenizer that splits at words has a boundary, and
    what is encoded from there on is what comes of the whole. Where there is no such place (scripts
    without spaces) the tokens next to the cut may differ, and MARGIN of them are not used. Ids can
    differ only inside one run that is longer than the margin and is split from its beginning, such
    as 300,000 spaces, or digits in threes; the text they stand for is the end of the text all the
    same.

    Args:
        encode: text -> ids; special tokens at the beginning or the end may be among them.
        longest: characters of the longest token, so that there is an end to trying.

    Returns:
        The ids, and whether any were left out.
    """
    if len(text) > GUESS * (head + tail + 2 * MARGIN):
        first = _end(text, encode, head, longest, last=False)
        last = _end(text, encode, tail, longest, last=True)
        if first is not None and last is not None:  # else the tokens are long: there may be few
            return first + last, True
    ids = encode(text)
    return shortened(ids, head, tail), len(ids) > head + tail


def _end(text: str, encode: Encode, number: int, longest: int, *, last: bool) -> array[int] | None:
    """The first or last ``number`` ids; None: all of the text is needed."""
    if not number:
        return array("i")
    wanted, size = number + MARGIN, GUESS * (number + MARGIN)
    while True:
        # neither end may need what the other one has
        if 2 * size >= len(text):
            return None
        ids = encode(text[_word(text, len(text) - size) :] if last else text[:size])
        if len(ids) >= wanted or size >= wanted * longest:
            return ids[max(len(ids) - number, 0) :] if last else ids[:number]
        size *= 4


def _word(text: str, at: int) -> int:
    """The beginning of a word with the space before it, near ``at``; else ``at``."""
    for i in range(at, max(at - SEEK, 0), -1):
        if text[i] == " " and text[i - 1].isalpha() and text[i + 1].isalpha():
            return i
    return at
