"""Who may ask: API keys, and which web pages' scripts may (CORS).

Knows headers and raw request targets; knows neither routes nor bodies.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from hashlib import sha256
from hmac import compare_digest
from typing import Final

from aiohttp import web

from asyncllm.api.errors import Unauthorized

OPEN_PATHS: Final = frozenset({"/health", "/healthz", "/liveness", "/readiness"})
PREFLIGHT_S: Final = "600"  # how long a browser may remember a preflight's answer
EXPOSED: Final = "X-Request-Id, Retry-After"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a client must bring, and how it may come.

    Args:
        keys: any one of them opens; none: everything is open.
        origins: web origins whose scripts may read answers; "*": all.
        tls: of the listening sockets; None: plain HTTP.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()
    tls: ssl.SSLContext | None = None


class Gate:
    """Checks every request before anything of it is looked at."""

    def __init__(self, access: Access) -> None:
        # digests have one length, so that a comparison's time says nothing about a key
        self._digests = [sha256(key.encode()).digest() for key in access.keys]
        self._origins = frozenset(access.origins)

    def check(self, request: web.Request) -> None:
        """Raises Unauthorized (401) without a valid key, whatever is at the path.

        Only the target as it was sent decides: nothing that a Host header, an absolute target or
        an escape could change.
        """
        if not self._digests or request.raw_path.partition("?")[0] in OPEN_PATHS:
            return
        given = _keys(request)
        if not given:
            raise Unauthorized(
                "an API key is missing; send Authorization: Bearer KEY", code="missing_api_key"
            )
        if not sum(self._fits(key) for key in given):
            raise Unauthorized("the API key is not valid", code="invalid_api_key")

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks before it sends; it brings no key, and runs no route."""
        wanted = request.headers.get("Access-Control-Request-Method")
        if request.method != "OPTIONS" or wanted is None or not self._origins:
            return None
        headers = {
            "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE",
            "Access-Control-Max-Age": PREFLIGHT_S,
        }
        if names := request.headers.get("Access-Control-Request-Headers"):
            headers["Access-Control-Allow-Headers"] = names
        return web.Response(status=204, headers=headers)

    def mark(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Let the asking page read the answer, if its origin may."""
        if not self._origins:
            return
        everyone = "*" in self._origins
        if not everyone:
            response.headers["Vary"] = "Origin"
        origin = request.headers.get("Origin")
        if origin is not None and (everyone or origin in self._origins):
            response.headers["Access-Control-Allow-Origin"] = "*" if everyone else origin
            response.headers["Access-Control-Expose-Headers"] = EXPOSED

    def _fits(self, key: bytes) -> bool:
        digest = sha256(key).digest()
        # sum: every key is compared, so that it does not show which one fits
        return sum(compare_digest(digest, known) for known in self._digests) > 0


def _keys(request: web.Request) -> list[bytes]:
    """The keys a request brings, as OpenAI's and as Anthropic's clients do."""
    found = []
    scheme, _, rest = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found.append(rest.strip())
    found.append(request.headers.get("x-api-key", ""))
    return [key.encode("utf-8", "surrogateescape") for key in found if key]
