"""What masters, nodes and groups of ranks say to a config_server, and it to them."""

from __future__ import annotations

from dataclasses import dataclass

from asyncllm.codec import Message, message, record
from asyncllm.config.roles import MOST_PORT


def _is_port(value: int) -> bool:
    return 0 < value <= MOST_PORT


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class MasterAt:
    """A pd_master that has registered.

    Args:
        id: another one after each start of its process.
        address: of its HTTP, such as "10.0.0.1:8000".
        host, port: where nodes reach its channel.
        since: when it has registered, in seconds since 1970.
    """

    id: str
    address: str
    host: str
    port: int
    since: float


@message(120)
class Announce(Message):
    """guide of a master -> registry: nodes reach me there."""

    host: str
    port: int

    def valid(self) -> bool:
        return bool(self.host) and _is_port(self.port)


@message(121)
class Masters(Message):
    """registry -> guide, whenever it changes; guide -> agent, and frontends: all that there are."""

    masters: tuple[MasterAt, ...]
    away: bool = False  # the config_server is: this is what it said last

    def valid(self) -> bool:
        return all(each.host and _is_port(each.port) for each in self.masters)


@message(122)
class AskMasters(Message):
    """frontend -> guide: tell me with ``Masters``, now and whenever they change."""

    endpoint: int

    def valid(self) -> bool:
        return self.endpoint >= 0


@message(123)
class Claim(Message):
    """tenant -> registry: our ranks meet at this port of yours, which is to be nobody else's."""

    port: int
    host: str  # by which the ranks reach you
    meets: str = ""  # where the other nodes of this server find its first one; "": there are none
    again: bool = False  # the ranks have met already; they only keep others away

    def valid(self) -> bool:
        return _is_port(self.port) and bool(self.host)


@message(124)
class Claimed(Message):
    """registry -> tenant: it is yours until you go."""

    port: int


@message(125)
class Denied(Message):
    """registry -> tenant: it is not, or nobody can listen there."""

    port: int
    why: str


@message(126)
class Seek(Message):
    """tenant of another node -> registry: where is the first node of the server of this port?"""

    port: int

    def valid(self) -> bool:
        return _is_port(self.port)


@message(127)
class Sought(Message):
    """registry -> tenant, as soon as it is known."""

    port: int
    meets: str
