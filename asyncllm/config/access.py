"""Options of who may ask, and what one request or connection may cost."""

from __future__ import annotations

from dataclasses import dataclass

from asyncllm.config.cluster import SERVERS
from asyncllm.config.flag import (
    Needs,
    above_zero,
    api_key,
    at_least,
    between,
    flag,
    network,
    not_empty,
    origin,
)

CERTIFIED = Needs("--ssl_certfile", lambda c: c.ssl_certfile is not None, vital=True)
KEYLESS = Needs("addresses, without API keys", lambda c: not (c.api_key or c.api_key_file))


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Keys, certificates, origins, and the limits of requests and connections."""

    api_key: tuple[str, ...] = flag(
        (), nargs="+", check=api_key, metavar="KEY", secret=True,
        help="keys of which a request must bring one (Authorization: Bearer KEY, or x-api-key), on "
        "every route but /health, /healthz, /liveness and /readiness; command lines are visible to "
        "other users of the machine, --api_key_file and the variable ASYNCLLM_API_KEY are not",
    )  # fmt: skip
    api_key_file: str | None = flag(
        None, check=not_empty, metavar="FILE",
        help="further keys, one a line; # begins a comment; a file without a key ends the start",
    )  # fmt: skip
    ssl_certfile: str | None = flag(
        None, check=not_empty, metavar="FILE",
        help="serve HTTPS with this certificate chain (PEM)",
    )  # fmt: skip
    ssl_keyfile: str | None = flag(
        None, check=not_empty, metavar="FILE", needs=CERTIFIED,
        help="its private key (PEM, not encrypted); default: in the certificate's file",
    )  # fmt: skip
    cluster_key_file: str | None = flag(
        None, check=not_empty, metavar="FILE", needs=SERVERS,
        help="secret that all nodes have, without which none is heard; only its owner may read the "
        "file (chmod 600 or 400). Two secrets, one a line, while one replaces the other: node 0 "
        "uses the first, the others try both. Not needed on the loopback interface",
    )  # fmt: skip
    make_cluster_key: str | None = flag(
        None, check=not_empty, metavar="FILE",
        help="write a new secret for --cluster_key_file to FILE, which must not exist, and exit",
    )  # fmt: skip
    cors_allow_origins: tuple[str, ...] = flag(
        (), nargs="+", check=origin, metavar="ORIGIN",
        help="web origins whose pages may use the API, e.g. https://chat.example.org; *: all; what "
        "pages of others send with POST or DELETE is answered 403",
    )  # fmt: skip
    trust_forwarded_for: tuple[str, ...] = flag(
        (), nargs="+", check=network, metavar="ADDRESS", needs=KEYLESS,
        help="addresses or networks of proxies in front of this server: a request that comes from "
        "one belongs to the last address in X-Forwarded-For (or Forwarded) that is not one of "
        "them; clients that wait are served in turn, one address each where there are no API keys",
    )  # fmt: skip
    max_body_size: int | None = flag(
        None, check=at_least(1), metavar="BYTES",
        help="longest request body, as sent and decompressed; a longer one is answered 413; default: "
        "24 bytes for each token of --max_req_total_len, at least 4 MiB",
    )  # fmt: skip
    body_timeout: float = flag(
        60.0, check=above_zero, metavar="SECONDS",
        help="time that a request body may take to come; a slower one is answered 408",
    )  # fmt: skip
    max_header_size: int = flag(
        8192, check=between(1, 1 << 20), metavar="BYTES",
        help="longest request line and longest header; a longer one is answered 431",
    )  # fmt: skip
    max_headers: int = flag(
        128, check=between(1, 4096),
        help="headers of one request; more are answered 431",
    )  # fmt: skip
    keep_alive_timeout: float = flag(
        75.0, check=above_zero, metavar="SECONDS",
        help="a connection without a request for this long is closed",
    )  # fmt: skip
    sse_keep_alive: float = flag(
        15.0, check=at_least(0), metavar="SECONDS",
        help="a stream with nothing to send for this long gets a comment, so that proxies keep it "
        "open; 0: never. LightLLM's own routes do so only if it is given: some of their clients know "
        "no comments",
    )  # fmt: skip
