"""What the servers of a cluster say about themselves, and what actors are told of each other's."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from asyncllm.codec import Message, message, record


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What one end says about its server.

    Args:
        role: what it is in the cluster, e.g. "prefill".
        name: how others call it in logs and answers, e.g. "10.0.0.2:8000".
        facts: (name, value) of what those must have in common who name it.
        incarnation: another one after each start of the process.
    """

    role: str
    name: str
    facts: tuple[tuple[str, str], ...] = ()
    incarnation: str = field(default_factory=lambda: secrets.token_hex(8))

    def __str__(self) -> str:
        return f"{self.role} {self.name}"

    def difference(self, other: Card) -> tuple[str, str, str] | None:
        """(name, our value, theirs) of a fact that both name and that is not the same."""
        theirs = dict(other.facts)
        for name, value in self.facts:
            if theirs.get(name, value) != value:
                return name, value, theirs[name]
        return None


@message(65)
class Greeting(Message):
    """The first message each way: who I am."""

    card: Card


@message(66)
class Bye(Message):
    """The last one: I hang up, or do not let you in."""

    why: str
    refused: bool


@message(67)
class Beat(Message):
    """Each way, all the time."""


@dataclass(frozen=True, slots=True)
class PeerJoined(Message):
    """channel -> its owner: from now on this one can be told something.

    Never on the wire, as the three below. ``dialled``: where we have found it; "": it has found us.
    """

    peer: int
    card: Card
    dialled: str


@dataclass(frozen=True, slots=True)
class PeerLeft(Message):
    """channel -> its owner: it hung up, died, or was dropped; what is told to it is a dead letter.

    The same process may come back, as another peer.
    """

    peer: int
    card: Card
    why: str


@dataclass(frozen=True, slots=True)
class PeerRefused(Message):
    """channel -> its owner: the one that was dialled does not let us in. We try again."""

    dialled: str
    why: str


@dataclass(frozen=True, slots=True)
class Received(Message):
    """channel -> the actor whom a peer has told ``msg``."""

    peer: int
    msg: Message
