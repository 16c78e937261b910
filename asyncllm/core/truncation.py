"""The first and last tokens of a long text, without encoding all of it.

Relies on tokenizers working from left to right on independent pieces of text (mostly words); knows
no particular tokenizer.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Final

Encode = Callable[[str], "array[int]"]

GUESS: Final = 8  # characters per token; English has 4 to 5
MARGIN: Final = 64  # tokens discarded next to a cut
SEEK: Final = 1024  # characters searched for a place to cut


def shortened(ids: array[int], head: int, tail: int) -> array[int]:
    """The first ``head`` and the last ``tail`` ids, or all of them if there are no more than
    that."""
    if len(ids) <= head + tail:
        return ids
    return ids[:head] + ids[len(ids) - tail :]


def encode_ends(
    text: str, encode: Encode, head: int, tail: int, longest: int
) -> tuple[array[int], bool]:
    """``shortened(encode(text), head, tail)`` in time that depends only on ``head`` and ``tail``.

    The text is cut before a word, where every tokenizer that splits at words has a boundary, so
    encoding from there gives the same ids as encoding the whole. Where there is no such place
    (scripts without spaces), ids next to the cut may differ, and MARGIN of them are discarded. Ids
    can still differ inside a run that is longer than the margin and split from its start, such as
    300,000 spaces or digits in threes; they still decode to the end of the text.

    Args:
        encode: text -> ids; may add special tokens at either end.
        longest: characters of the longest token, which bounds the search.

    Returns:
        The ids, and whether any were left out.
    """
    if len(text) > GUESS * (head + tail + 2 * MARGIN):
        first = _end(text, encode, head, longest, last=False)
        last = _end(text, encode, tail, longest, last=True)
        if first is not None and last is not None:  # else the tokens are long, and there may be few
            return first + last, True
    ids = encode(text)
    return shortened(ids, head, tail), len(ids) > head + tail


def _end(text: str, encode: Encode, number: int, longest: int, *, last: bool) -> array[int] | None:
    """The first or last ``number`` ids; None: the whole text is needed."""
    if not number:
        return array("i")
    wanted, size = number + MARGIN, GUESS * (number + MARGIN)
    while True:
        # the two ends must not overlap
        if 2 * size >= len(text):
            return None
        ids = encode(text[_word(text, len(text) - size) :] if last else text[:size])
        if len(ids) >= wanted or size >= wanted * longest:
            return ids[max(len(ids) - number, 0) :] if last else ids[:number]
        size *= 4


def _word(text: str, at: int) -> int:
    """The start of a word (including the space before it) near ``at``; else ``at``."""
    for i in range(at, max(at - SEEK, 0), -1):
        if text[i] == " " and text[i - 1].isalpha() and text[i + 1].isalpha():
            return i
    return at
