"""Incremental detokenization, one id at a time, that never splits a character.

Knows the bytes of each id and how they are joined; knows neither requests nor tokenizer files.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

BAD = "\ufffd"
WINDOW_LIMIT = 16  # ids a WindowStream holds back for an unfinished character


class TextStream(Protocol):
    """The text of one request, id by id; text once returned is never revised."""

    def push(self, token: int, force: bool = False) -> str:
        """The text that ``token`` completes, possibly ""; ``force`` shows a hidden token."""

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, or ""."""


@dataclass(frozen=True, slots=True)
class PieceTable:
    """The text and bytes of each id.

    Attributes:
        pieces: bytes of each id; b"" for ids without a token.
        shown: text of ids that are complete characters by themselves, None for the others.
        plain: the same with special tokens hidden ("").
        byte_runs: SentencePiece style: None in ``shown`` marks byte tokens, and only adjacent byte
            tokens form a character. Otherwise all bytes of the text are one sequence.
        strip: number of spaces dropped at the very start of a text.
    """

    pieces: list[bytes]
    shown: list[str | None]
    plain: list[str | None]
    byte_runs: bool
    strip: int

    @classmethod
    def of(
        cls,
        pieces: list[bytes],
        special: Collection[int],
        byte_tokens: Collection[int] | None = None,
        strip: int = 0,
    ) -> PieceTable:
        """``byte_tokens``: ids that stand for one byte (SentencePiece); None: byte-level BPE."""
        shown: list[str | None] = [_whole(piece) for piece in pieces]
        for token in byte_tokens or ():
            shown[token] = None
        plain = list(shown)
        for token in special:
            plain[token] = ""
        return cls(pieces, shown, plain, byte_tokens is not None, strip)

    def stream(self, tail: Sequence[int] = (), skip_special_tokens: bool = True) -> TextStream:
        """A stream that continues after the ids ``tail``, whose own text is not repeated.

        A character left incomplete by ``tail`` is returned whole once the stream completes it.
        """
        out = (_RunStream if self.byte_runs else _ByteStream)(self, skip_special_tokens)
        for token in tail:
            out.push(token)
        out.adopt()
        return out


class _ByteStream:
    """Byte-level BPE: the text is all bytes joined, decoded as UTF-8 with replacement."""

    __slots__ = ("_broken", "_foreign", "_pieces", "_quick", "_rest", "_strip", "_texts")

    def __init__(self, table: PieceTable, skip_special_tokens: bool) -> None:
        self._pieces = table.pieces
        self._texts = table.plain if skip_special_tokens else table.shown
        self._strip = table.strip
        self._rest = b""  # an incomplete character
        self._foreign = 0  # bytes of it that belong to the prompt
        self._broken = False  # for _RunStream: the current run has had an invalid byte
        self._quick = not self._strip  # nothing is held back: complete characters pass through

    def push(self, token: int, force: bool = False) -> str:
        if token >= len(self._texts):
            return ""
        text = self._texts[token]
        if force and text == "":
            text = None
        if text is not None and (self._quick or not text):
            return text
        text = self._join(token, text)
        if self._strip and text:
            text = self._stripped(text)
        self._quick = not (self._rest or self._strip or self._broken)
        return text

    def flush(self) -> str:
        text = BAD if self._rest and not self._foreign else ""
        self._rest, self._foreign = b"", 0
        return text

    def adopt(self) -> None:
        """The bytes held back now are the prompt's, so their U+FFFD is not shown."""
        self._foreign = len(self._rest)

    def _join(self, token: int, text: str | None) -> str:
        data = self._rest + self._pieces[token]
        out, used = utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        if self._foreign and out:
            # the prompt's incomplete bytes are one U+FFFD, already at the end of the prompt's text
            if out[0] == BAD and not data.startswith(b"\xef\xbf\xbd"):
                out = out[1:]
            self._foreign = 0
        return out

    def _stripped(self, text: str) -> str:
        left = text
        while self._strip and left.startswith(" "):
            left = left[1:]
            self._strip -= 1
        if left:
            self._strip = 0
        return left


class _RunStream(_ByteStream):
    """SentencePiece with byte fallback: adjacent byte tokens are decoded together.

    As in the tokenizers library, a run of byte tokens that is not valid UTF-8 becomes one U+FFFD
    per byte. Unlike there, characters completed before the invalid byte are kept: they have already
    been returned, and waiting for the end of each run would delay every newline.
    """

    __slots__ = ()

    def flush(self) -> str:
        text = BAD * (len(self._rest) - self._foreign)
        self._rest, self._foreign, self._broken = b"", 0, False
        return text

    def _join(self, token: int, text: str | None) -> str:
        piece = self._pieces[token]
        if self._texts[token] is None:
            return self._byte(piece)
        return self.flush() + (text or piece.decode("utf-8", "replace"))

    def _byte(self, piece: bytes) -> str:
        if self._broken:
            return BAD
        data = self._rest + piece
        try:
            out, used = utf_8_decode(data, "strict", False)
        except UnicodeDecodeError:
            out = BAD * (len(data) - self._foreign)
            self._rest, self._foreign, self._broken = b"", 0, True
            return out
        self._rest = data[used:]
        if out:
            self._foreign = 0
        return out


class WindowStream:
    """For decoders without a token table: decodes a short window with and without the new id.

    Costs two calls of ``decode`` per id. An incomplete character is held back for at most
    ``WINDOW_LIMIT`` ids, so that the window stays short.

    Args:
        decode: (ids, skip_special_tokens) -> text.
        tail: ids before the first one, whose text is not repeated.
    """

    def __init__(
        self,
        decode: Callable[[list[int], bool], str],
        tail: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._decode, self._skip = decode, skip_special_tokens
        self._ids = list(tail)
        self._read = len(self._ids)  # ids[:read] have been returned; ids[read:] are held back

    def push(self, token: int, force: bool = False) -> str:
        if force and self._skip:
            return self.flush() + self._decode([token], False)
        self._ids.append(token)
        text = self._new_text()
        if (not text or text.endswith(BAD)) and len(self._ids) - self._read < WINDOW_LIMIT:
            return ""
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return text

    def flush(self) -> str:
        text = self._new_text() if len(self._ids) > self._read else ""
        self._read = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[: self._read], self._skip)
        return self._decode(self._ids, self._skip)[len(before) :]


def _whole(piece: bytes) -> str | None:
    """Its text, or None if it is not valid UTF-8 by itself."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None
