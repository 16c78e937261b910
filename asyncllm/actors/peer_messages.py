"""Records and messages by which the servers of a cluster identify and notify each other."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from asyncllm.codec import Message, message, record
from asyncllm.topology import Difference


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """How a server identifies itself to others.

    Args:
        role: its role in the cluster, e.g. "prefill".
        name: its name in others' logs and answers, e.g. "10.0.0.2:8000".
        facts: (name, value) of facts that must be equal on both sides if both have them.
        incarnation: different after each start of the process.
    """

    role: str
    name: str
    facts: tuple[tuple[str, str], ...] = ()
    incarnation: str = field(default_factory=lambda: secrets.token_hex(8))

    def __str__(self) -> str:
        return f"{self.role} {self.name}"

    def difference(self, other: PeerInfo) -> Difference | None:
        """A fact that both have and in which they differ, or None."""
        theirs = dict(other.facts)
        for name, value in self.facts:
            if theirs.get(name, value) != value:
                return Difference(name, value, theirs[name])
        return None


@message(65)
class PeerHello(Message):
    """Both directions, first: identifies the sender."""

    info: PeerInfo


@message(66)
class PeerGoodbye(Message):
    """Both directions, last: disconnects, or refuses the other end."""

    why: str
    refused: bool = False


@message(67)
class PeerHeartbeat(Message):
    """Both directions, periodically: heartbeat."""


@dataclass(frozen=True, slots=True)
class PeerJoined(Message):
    """channel -> its owner: a peer has joined and can be sent messages.

    Never sent, like the next three. ``dialled``: where we connected; "": it connected to us.
    """

    _urgent = True
    peer: int
    info: PeerInfo
    dialled: str


@dataclass(frozen=True, slots=True)
class PeerLeft(Message):
    """channel -> its owner: it disconnected, died, or was dropped; messages to it are dead letters.

    The same process may come back, as another peer.
    """

    _urgent = True
    peer: int
    info: PeerInfo
    why: str


@dataclass(frozen=True, slots=True)
class PeerRefused(Message):
    """channel -> its owner: the server that was dialled refuses us. We try again."""

    _urgent = True
    dialled: str
    why: str


@dataclass(frozen=True, slots=True)
class PeerMessage(Message):
    """channel -> the actor that a peer has sent ``msg``."""

    peer: int
    msg: Message

    @property
    def urgent(self) -> bool:
        return self.msg.urgent
