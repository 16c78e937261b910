"""API keys and CORS: who may use the API, and from which web pages.

Knows headers and raw request targets; knows neither routes nor bodies.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from hmac import compare_digest
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

from aiohttp import web

from asyncllm.api.common.errors import ForeignOrigin, Unauthorized
from asyncllm.api.common.validation import preview

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS: Final = frozenset(
    {"/health", "/healthz", "/liveness", "/readiness", "/cluster", "/ping"}
)
PREFLIGHT_S: Final = "600"  # how long a browser may remember a preflight's answer
EXPOSED: Final = "X-Request-Id, request-id, X-Omitted-Tools, Retry-After"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What clients must present, and where requests may come from.

    Args:
        keys: any one of them gives access; none: everything is open.
        origins: web origins whose pages may send requests and read answers; "*": all.
        tls: of the listening sockets; None: plain HTTP.
        proxies: addresses or networks of trusted proxies that report their clients' addresses.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()
    tls: ssl.SSLContext | None = None
    proxies: tuple[str, ...] = ()


class AccessControl:
    """Checks every request before anything else is done with it."""

    def __init__(self, access: Access) -> None:
        # digests have one length, so that a comparison's time says nothing about a key
        self._digests = [sha256(key.encode()).digest() for key in access.keys]
        self._origins = frozenset(access.origins)
        self._proxies = [ip_network(proxy, strict=False) for proxy in access.proxies]

    def check(self, request: web.Request) -> None:
        """Raises Unauthorized (401) without a valid key, whatever is at the path.

        Only the target as it was sent decides: nothing that a Host header, an absolute target or
        an escape could change.
        """
        if not self._digests or request.raw_path.partition("?")[0].rstrip("/") in OPEN_PATHS:
            return
        given = _keys(request)
        if not given:
            raise Unauthorized(
                "an API key is missing; send Authorization: Bearer KEY", code="missing_api_key"
            )
        if not sum(self._fits(key) for key in given):
            raise Unauthorized("the API key is not valid", code="invalid_api_key")

    def check_origin(self, request: web.Request) -> None:
        """Raises ForeignOrigin (403) where a page of another site may have sent what changes
        something.

        A browser sends some requests for any page without asking first, though it hides the answer,
        and it reaches a server that only listens on this machine. It says which page that was.
        """
        if request.method in SAFE_METHODS or "*" in self._origins:
            return
        origins = set(request.headers.getall("Origin", ()))
        if origins and origins <= self._origins:
            return
        foreign = {each for each in origins if not _own(each, request)}
        if foreign or request.headers.get("Sec-Fetch-Site") == "cross-site":
            page = preview(min(foreign)) if foreign else "another site"
            raise ForeignOrigin(f"a page of {page} may not send this (--cors_allow_origins)")

    def client(self, request: web.Request) -> int:
        """The client of a checked request: a 64-bit hash of its key, or else of its address.

        The same in every process. Of IPv6 the first half counts: a host has the other to itself.
        """
        if self._digests:
            name = next((key for key in _keys(request) if self._fits(key)), b"")
        else:
            name = _name(self._address(request))
        return int.from_bytes(blake2b(name, digest_size=8).digest())

    def _address(self, request: web.Request) -> IPv4Address | IPv6Address | None:
        """The peer's address, or the one reported by trusted proxies; None: unknown.

        A client can send the headers as well. What it wrote stands left of what the proxies have
        added, so they are read from the right, up to the first that no trusted proxy has written.
        Where both headers are there and differ, one of them was passed through: neither counts.
        """
        peer = _parsed(request.remote or "")
        if not self._proxies:
            return peer
        told = {
            self._behind(peer, tuple(reversed(hops)))
            for hops in (_x_forwarded_for(request), _forwarded(request))
            if hops
        }
        return told.pop() if len(told) == 1 else peer

    def _behind(
        self, peer: IPv4Address | IPv6Address | None, hops: tuple[str, ...]
    ) -> IPv4Address | IPv6Address | None:
        for hop in hops:
            if peer is None or not any(peer in proxy for proxy in self._proxies):
                break
            if (before := _parsed(hop)) is None:  # "unknown", or a name that only the proxy knows
                break
            peer = before
        return peer

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks before it sends; it brings no key,
        and runs no route."""
        wanted = request.headers.get("Access-Control-Request-Method")
        if request.method != "OPTIONS" or wanted is None or not self._origins:
            return None
        headers = {
            "Access-Control-Allow-Methods": "GET, HEAD, POST, DELETE",
            "Access-Control-Max-Age": PREFLIGHT_S,
        }
        names = request.headers.get("Access-Control-Request-Headers", "")
        if names and names.isascii():  # else it is no list of names, nor text that can be sent
            headers["Access-Control-Allow-Headers"] = names
        return web.Response(status=204, headers=headers)

    def mark(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let the requesting page read the answer, if its origin is allowed."""
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


def _own(origin: str, request: web.Request) -> bool:
    """Whether a page that this server may have served sends it.

    A name that its owner has pointed at this machine makes his page look like ours (DNS rebinding),
    so what comes over loopback must use a name that nobody else owns.
    """
    host = request.headers.get("Host", "").lower()
    if origin.lower().partition("://")[2] != host:
        return False
    local = None if request.transport is None else request.transport.get_extra_info("sockname")
    if not local or not ip_address(local[0].partition("%")[0]).is_loopback:
        return True
    name = host.partition(":")[0]
    return name == "localhost" or name.endswith(".localhost") or _parsed(host) is not None


def _keys(request: web.Request) -> list[bytes]:
    """The keys a request brings, as OpenAI's and as Anthropic's clients do."""
    found = []
    scheme, _, rest = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found.append(rest.strip())
    found.append(request.headers.get("x-api-key", ""))
    return [key.encode("utf-8", "surrogateescape") for key in found if key]


def _x_forwarded_for(request: web.Request) -> list[str]:
    """The addresses of X-Forwarded-For, the client's first."""
    lines = request.headers.getall("X-Forwarded-For", ())
    return [hop.strip() for line in lines for hop in line.split(",")]


def _forwarded(request: web.Request) -> list[str]:
    """The ``for`` of each element of Forwarded (RFC 7239), the client's first."""
    hops = []
    for line in request.headers.getall("Forwarded", ()):
        for element in line.split(","):
            pairs = dict(pair.strip().partition("=")[::2] for pair in element.lower().split(";"))
            hops.append(pairs.get("for", "").strip('"'))
    return hops


def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    """An address with or without a port and brackets."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _name(address: IPv4Address | IPv6Address | None) -> bytes:
    if address is None:
        return b""
    return address.packed[:8]
