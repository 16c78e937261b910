"""Reads request bodies, within limits of size, time and encoding.

Knows headers and streams; what the bytes mean is in :mod:`asyncllm.api`.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final, Protocol

import brotli
from aiohttp import web

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from asyncllm.api.common.errors import BodyTooLarge, BodyTooSlow, UnknownEncoding
from asyncllm.errors import RequestError

PIECE: Final = 256 << 10  # decompressed per loop iteration: about a millisecond
# zstd window that a sender may use: 8 MiB, as browsers allow
WINDOW: Final = {int(zstd.DecompressionParameter.window_log_max): 23}


async def read_body(request: web.Request, most: int, limit_s: float) -> bytes:
    """The whole body, decompressed.

    Args:
        most: bytes, both as sent and decompressed.
        limit_s: time limit for receiving all of it.

    Raises:
        RequestError: 400, it contradicts its headers. BodyTooLarge: 413. BodyTooSlow: 408.
        UnknownEncoding: 415. ConnectionError: the client has left.
    """
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", *UNPACKERS):
        raise UnknownEncoding(
            f"Content-Encoding: {encoding[:80]!r} is not one of {', '.join(UNPACKERS)}"
        )
    if (request.content_length or 0) > most:
        raise _too_large(most)
    packed = _limited(request, most)
    pieces = packed if encoding in ("", "identity") else _unpacked(packed, encoding)
    body = bytearray()
    try:
        async with asyncio.timeout(limit_s):
            async for piece in pieces:
                body += piece
                if len(body) > most:
                    raise _too_large(most)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not come within {limit_s:g} s (--body_timeout)") from None
    except web.RequestPayloadError as error:
        raise _unreadable(str(error)) from None
    except _BROKEN as error:
        raise _unreadable(f"it is not {encoding}, as Content-Encoding says: {error}") from None
    return bytes(body)


async def _limited(request: web.Request, most: int) -> AsyncIterator[bytes]:
    """The body as it arrives."""
    size = 0
    while chunk := await request.content.readany():
        size += len(chunk)
        if size > most:
            raise _too_large(most)
        yield chunk


async def _unpacked(packed: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    """The same decompressed; yields to the loop after every PIECE."""
    unpacker: _Unpacker | None = None
    async for chunk in packed:
        unpacker = unpacker or UNPACKERS[encoding](chunk)
        for piece in unpacker.pieces(chunk):
            yield piece
            await asyncio.sleep(0)
        if unpacker.more_follows:
            raise _unreadable(f"something follows the end of its {encoding} data")
    if unpacker is not None and not unpacker.ended:
        raise _unreadable(f"its {encoding} data has no end")


class _Unpacker(Protocol):
    """Decompresses a body chunk by chunk; created from the first one, without consuming it."""

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """Decompress a chunk, at most PIECE bytes at a time. Raises _BROKEN."""

    @property
    def ended(self) -> bool: ...

    @property
    def more_follows(self) -> bool: ...


class _Gzip:
    wbits = 31

    def __init__(self, first: bytes) -> None:
        self._data = zlib.decompressobj(self.wbits)

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        while chunk and not self.ended:
            yield self._data.decompress(chunk, PIECE)
            chunk = self._data.unconsumed_tail

    @property
    def ended(self) -> bool:
        return self._data.eof

    @property
    def more_follows(self) -> bool:
        return bool(self._data.unused_data)


class _Deflate(_Gzip):
    def __init__(self, first: bytes) -> None:
        # it should be in zlib's format, but some clients send it raw
        raw = first[0] & 0x0F != zlib.DEFLATED
        self.wbits = -zlib.MAX_WBITS if raw else zlib.MAX_WBITS
        super().__init__(first)


class _Zstd:
    def __init__(self, first: bytes) -> None:
        self._data = zstd.ZstdDecompressor(options=WINDOW)

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        yield self._data.decompress(chunk, PIECE)
        while not (self.ended or self._data.needs_input):
            yield self._data.decompress(b"", PIECE)

    @property
    def ended(self) -> bool:
        return self._data.eof

    @property
    def more_follows(self) -> bool:
        return bool(self._data.unused_data)


class _Brotli:
    more_follows = False  # what follows the end is an error

    def __init__(self, first: bytes) -> None:
        self._data = brotli.Decompressor()

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        yield self._data.process(chunk, output_buffer_limit=PIECE)
        while not (self.ended or self._data.can_accept_more_data()):
            yield self._data.process(b"", output_buffer_limit=PIECE)

    @property
    def ended(self) -> bool:
        return bool(self._data.is_finished())


UNPACKERS: Final[dict[str, Callable[[bytes], _Unpacker]]] = {
    "gzip": _Gzip,
    "x-gzip": _Gzip,
    "deflate": _Deflate,
    "zstd": _Zstd,
    "br": _Brotli,
}
_BROKEN: Final = (zlib.error, zstd.ZstdError, brotli.error)


def _too_large(most: int) -> RequestError:
    return BodyTooLarge(f"the body is larger than {most} bytes (--max_body_size)")


def _unreadable(why: str) -> RequestError:
    return RequestError(f"the body cannot be read: {why}", code="invalid_body")
