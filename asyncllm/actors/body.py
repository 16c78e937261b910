"""Request bodies from the connection to bytes: their size, encoding and time have limits.

Knows headers and streams; what the bytes mean is in :mod:`asyncllm.api`.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from typing import Final

from aiohttp import web

from asyncllm.api.common.errors import BodyTooLarge, BodyTooSlow, UnknownEncoding
from asyncllm.errors import RequestError

PIECE: Final = 256 << 10  # decompressed in one turn of the loop: a millisecond or so
WINDOW_BITS: Final = {"gzip": 31, "x-gzip": 31, "deflate": zlib.MAX_WBITS}


async def read_body(request: web.Request, most: int, limit_s: float) -> bytes:
    """The whole body, decompressed.

    Args:
        most: bytes, both as sent and decompressed.
        limit_s: seconds for all of it to come.

    Raises:
        RequestError: 400, it is not what its headers say. BodyTooLarge: 413. BodyTooSlow: 408.
        UnknownEncoding: 415. ConnectionError: the client has left.
    """
    encoding = request.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", *WINDOW_BITS):
        raise UnknownEncoding(
            f"Content-Encoding: {encoding[:80]!r} is not one of {', '.join(WINDOW_BITS)}"
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
    except zlib.error as error:
        raise _unreadable(f"it is not {encoding}, as Content-Encoding says: {error}") from None
    return bytes(body)


async def _limited(request: web.Request, most: int) -> AsyncIterator[bytes]:
    """The body as it comes."""
    size = 0
    while chunk := await request.content.readany():
        size += len(chunk)
        if size > most:
            raise _too_large(most)
        yield chunk


async def _unpacked(packed: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    """The same decompressed; other work gets a turn after every PIECE, however little came in."""
    unpacker = None
    async for chunk in packed:
        if unpacker is None:
            # "deflate" should be in zlib's format, but some clients send it raw
            raw = encoding == "deflate" and chunk[0] & 0x0F != zlib.DEFLATED
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS if raw else WINDOW_BITS[encoding])
        while chunk:
            yield unpacker.decompress(chunk, PIECE)
            await asyncio.sleep(0)
            if unpacker.eof:
                break
            chunk = unpacker.unconsumed_tail
        if unpacker.eof and unpacker.unused_data:
            raise _unreadable(f"something follows the end of its {encoding} data")
    if unpacker is not None and not unpacker.eof:
        raise _unreadable(f"its {encoding} data has no end")


def _too_large(most: int) -> RequestError:
    return BodyTooLarge(f"the body is larger than {most} bytes (--max_body_size)")


def _unreadable(why: str) -> RequestError:
    return RequestError(f"the body cannot be read: {why}", code="invalid_body")
