"""How a tokenizer spells text that a grammar forces.

Knows texts and token ids; knows neither grammars nor requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

MAX_BYTES: Final = 128  # of a text that is spelled
MAX_KEPT: Final = 4096
BREAK: Final = b"\n"  # ends a token in front of a text, and some tokenizers' space before it


class Spelling:
    """The tokens of texts, most of which come again and again. May be used from any thread.

    Args:
        encode: the tokenizer, for texts without special tokens around them; None: no text is
            spelled.
        pieces: bytes of every token.
    """

    def __init__(
        self, encode: Callable[[str], Sequence[int]] | None, pieces: Sequence[bytes]
    ) -> None:
        self.pieces = pieces
        self._encode = encode
        self._kept: dict[bytes, list[int]] = {}

    def of(self, text: bytes) -> list[int]:
        """Tokens that ``text`` begins with; []: not known."""
        if self._encode is None:
            return []
        text = text[: MAX_BYTES + 1]
        if (found := self._kept.get(text)) is None:
            if len(self._kept) >= MAX_KEPT:
                self._kept = {}
            found = self._kept[text] = self._spell(text, self._encode)
        return found

    def _spell(self, text: bytes, encode: Callable[[str], Sequence[int]]) -> list[int]:
        cut = len(text) > MAX_BYTES
        rest = text[:MAX_BYTES]
        begun, found = False, list[int]()
        for token in encode((BREAK + rest).decode(errors="ignore")):
            piece = self.pieces[token] if token < len(self.pieces) else b""
            if not begun:
                begun = piece.endswith(BREAK)
            elif piece and rest.startswith(piece):
                found.append(token)
                rest = rest[len(piece) :]
            else:
                break
        return found[:-1] if cut else found
