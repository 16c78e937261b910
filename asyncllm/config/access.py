"""Options for access control, and for limits of single requests and connections."""

from __future__ import annotations

from dataclasses import dataclass

from asyncllm.config.cluster import SERVERS
from asyncllm.config.flag import (
    Requirement,
    above_zero,
    api_key,
    at_least,
    between,
    flag,
    network,
    not_empty,
    origin,
)

CERTIFIED = Requirement("--ssl_certfile", lambda c: c.ssl_certfile is not None, vital=True)
KEYLESS = Requirement(
    "client addresses, without API keys", lambda c: not (c.api_key or c.api_key_file)
)


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Keys, certificates, origins, and limits of requests and connections."""

    api_key: tuple[str, ...] = flag(
        (), nargs="+", check=api_key, metavar="KEY", secret=True,
        help="API keys; a request must carry one (Authorization: Bearer KEY, or x-api-key) on "
        "every route except /health, /healthz, /ping, /liveness, /readiness and /cluster. Command "
        "lines are visible to other users of the machine; --api_key_file and the environment "
        "variable ASYNCLLM_API_KEY are not",
    )  # fmt: skip
    api_key_file: str | None = flag(
        None, check=not_empty, metavar="FILE",
        help="file with further keys, one per line; # begins a comment; a file without keys is "
        "refused",
    )  # fmt: skip
    ssl_certfile: str | None = flag(
        None, check=not_empty, metavar="FILE",
        help="serve HTTPS with this certificate chain (PEM)",
    )  # fmt: skip
    ssl_keyfile: str | None = flag(
        None, check=not_empty, metavar="FILE", needs=CERTIFIED,
        help="the certificate's private key (PEM, not encrypted); default: in the certificate's "
        "file",
    )  # fmt: skip
    cluster_key_file: str | None = flag(
        None, check=not_empty, metavar="FILE", needs=SERVERS,
        help="file with the secret that all nodes share to authenticate each other; readable by "
        "its owner only (chmod 600 or 400). It holds two secrets, one per line, during a "
        "rotation: node 0 uses the first, the others try both. Not needed on the loopback "
        "interface",
    )  # fmt: skip
    make_cluster_key: str | None = flag(
        None, check=not_empty, metavar="FILE",
        help="write a new secret for --cluster_key_file to FILE, which must not exist, and exit",
    )  # fmt: skip
    cors_allow_origins: tuple[str, ...] = flag(
        (), nargs="+", check=origin, metavar="ORIGIN",
        help="web origins whose pages may use the API, e.g. https://chat.example.org; *: all; POST "
        "and DELETE from pages of other origins are answered 403",
    )  # fmt: skip
    trust_forwarded_for: tuple[str, ...] = flag(
        (), nargs="+", check=network, metavar="ADDRESS", needs=KEYLESS,
        help="addresses or networks of reverse proxies: the client of a request from one of them "
        "is the last address in X-Forwarded-For (or Forwarded) that is not a proxy. Without API "
        "keys, waiting requests are served round-robin by client address",
    )  # fmt: skip
    max_body_size: int | None = flag(
        None, check=at_least(1), metavar="BYTES",
        help="maximum size of a request body, both as sent and decompressed; larger ones are "
        "answered 413; default: 24 bytes per token of --max_req_total_len, at least 4 MiB",
    )  # fmt: skip
    body_timeout: float = flag(
        60.0, check=above_zero, metavar="SECONDS",
        help="time limit for receiving a request body; slower ones are answered 408",
    )  # fmt: skip
    max_header_size: int = flag(
        8192, check=between(64, 1 << 20), metavar="BYTES",
        help="maximum length of the request line and of each header; longer ones are answered 431",
    )  # fmt: skip
    max_headers: int = flag(
        128, check=between(1, 4096),
        help="maximum number of headers of a request; more are answered 431",
    )  # fmt: skip
    keep_alive_timeout: float = flag(
        75.0, check=above_zero, metavar="SECONDS",
        help="close connections that have been without a request for this long",
    )  # fmt: skip
    sse_keep_alive: float = flag(
        15.0, check=at_least(0), metavar="SECONDS",
        help="send a comment on streams that have been silent for this long, so that proxies "
        "keep them open; 0: never. LightLLM's own routes only do so if this is given, since some "
        "of their clients cannot parse comments",
    )  # fmt: skip
