"""Messages between a config_server and masters, nodes, and servers that lease ports."""

from __future__ import annotations

from dataclasses import dataclass

from asyncllm.codec import Message, message, record
from asyncllm.config.roles import MOST_PORT


def _is_port(value: int) -> bool:
    return 0 < value <= MOST_PORT


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class MasterAddress:
    """A pd_master that has registered.

    Args:
        id: different after each start of its process.
        address: of its HTTP server, such as "10.0.0.1:8000".
        host, port: where nodes reach its channel.
        since: when it registered, in seconds since 1970.
    """

    id: str
    address: str
    host: str
    port: int
    since: float


@message(120)
class AnnounceMaster(Message):
    """config_client of a master -> registry: nodes can reach me there."""

    host: str
    port: int

    def valid(self) -> bool:
        return bool(self.host) and _is_port(self.port)


@message(121, urgent=True)
class MasterList(Message):
    """registry -> config_client -> agent and frontends, on every change: all registered masters."""

    masters: tuple[MasterAddress, ...]
    away: bool = False  # the config_server is unreachable: this is its last list

    def valid(self) -> bool:
        return all(each.host and _is_port(each.port) for each in self.masters)


@message(122, urgent=True)
class AskMasters(Message):
    """frontend -> config_client: send me ``MasterList``, now and on every change."""

    endpoint: int

    def valid(self) -> bool:
        return self.endpoint >= 0


@message(123)
class LeasePort(Message):
    """tenant -> registry: lease this port to us as our rendezvous."""

    port: int
    host: str  # by which the ranks reach the registry
    meets: str = ""  # where the server's other nodes find its first one; "": no other nodes
    again: bool = False  # the ranks have already met; the port just stays reserved

    def valid(self) -> bool:
        return _is_port(self.port) and bool(self.host)


@message(124)
class PortLeased(Message):
    """registry -> tenant: the port is leased until you disconnect."""

    port: int


@message(125)
class LeaseDenied(Message):
    """registry -> tenant: the port is taken or cannot be listened on."""

    port: int
    why: str


@message(126)
class FindRendezvous(Message):
    """tenant on another node -> registry: where is the first node of this port's server?"""

    port: int

    def valid(self) -> bool:
        return _is_port(self.port)


@message(127)
class RendezvousFound(Message):
    """registry -> tenant: the answer to ``FindRendezvous``, as soon as it is known."""

    port: int
    meets: str
