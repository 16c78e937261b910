"""Settings of a frontend: its limits, and its place in a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from asyncllm.api.common.errors import NotServing
from asyncllm.messages import MasterAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendLimits:
    """The limits of the frontend.

    Args:
        max_running: choices that may be generated at once.
        max_waiting: additional choices that may wait; more are answered 429 (see ``Admission``).
        max_body: bytes of a request body; more are answered 413.
        max_header: bytes of the request line, and of each header; more are answered 431.
        max_headers: per request; more are answered 431.
        idle_s: seconds after which a connection without a request is closed.
        body_s: seconds for a request body to arrive; slower ones are answered 408.
        max_unsent: bytes buffered for a slow client beyond its largest write; it is dropped then.
        keep_alive_s: seconds after which a silent stream gets a comment; 0: never.
        native_keep_alive: also on LightLLM's own routes; some of their clients know no comments.
        flush_s: seconds of writing to streams before yielding to other work.
        query_s: seconds to wait for another actor's answer (metrics, token counts).
        shutdown_s: seconds for open connections when the server stops.
    """

    max_running: int = 1000
    max_waiting: int = 1024
    max_body: int = 4 << 20
    max_header: int = 8 << 10
    max_headers: int = 128
    idle_s: float = 75.0
    body_s: float = 60.0
    max_unsent: int = 1 << 20
    keep_alive_s: float = 15.0
    native_keep_alive: bool = False
    flush_s: float = 0.0005
    query_s: float = 5.0
    shutdown_s: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """The place of this server in a cluster.

    Args:
        asks: the actor at the coordinator that reports whether requests can be served, see
            ``Serving``; "": they always can.
        elsewhere: why requests are not accepted here, and where to send them; "": they are.
        cluster_port: where a master's nodes connect; 0: this is no master.
        has_config_server: the config_client at the coordinator knows the other masters.
        mark: prefix of the ids of answers, so that other masters know whose they are, see
            :func:`mark_of`; "": there are no others.
    """

    asks: str = ""
    elsewhere: str = ""
    cluster_port: int = 0
    has_config_server: bool = False
    mark: str = ""


def mark_of(address: str) -> str:
    """The mark in the ids of answers that identifies their master's HTTP address."""
    return blake2b(address.encode(), digest_size=4).hexdigest()


class KnownMasters:
    """The masters known to a server with a config_server.

    Attributes:
        masters: as last listed by the config_server.
        away: it is unreachable, so it cannot forward anything.
    """

    def __init__(self, place: ClusterSettings) -> None:
        self._place = place
        self.masters: tuple[MasterAddress, ...] = ()
        self.away = place.has_config_server  # until it reports

    def who_serves(self) -> str:
        """Why requests are not accepted here, and where to send them."""
        known = ", ".join(master.address for master in self.masters)
        return f"{self._place.elsewhere}: {known}" if known else self._place.elsewhere

    def owner_of(self, name: str) -> str:
        """The other master that gave an answer this id, as text to append to an error; "":
        unknown."""
        own = self._place.mark
        mark = name.rpartition("_")[2][: len(own)]
        there = [each.address for each in self.masters if mark_of(each.address) == mark != own]
        return f"; it is for the pd_master at {there[0]} to know" if there else ""

    def check_told(self) -> None:
        """Raises NotServing (503) if nothing can be forwarded to the other masters."""
        if self.away:
            raise NotServing(
                "requests of this pd_master are aborted, those of others are not: the "
                "config_server is away, through which they are told",
                code="config_server_away",
            )
