"""Config client: connects a master or node to the config_server, and keeps its list of masters.

Owns that connection. Nobody here waits for the config_server: while it is unreachable, its last
list stays in use.
"""

from __future__ import annotations

import logging
from typing import assert_never

from asyncllm.actors.base import Actor
from asyncllm.actors.channel import Channel
from asyncllm.actors.peer_connector import PeerConnector
from asyncllm.actors.peer_messages import PeerJoined, PeerLeft, PeerMessage, PeerRefused
from asyncllm.codec import Message
from asyncllm.errors import StartupError
from asyncllm.messages import (
    AnnounceMaster,
    AskMasters,
    Cancel,
    EndpointGone,
    MasterAddress,
    MasterList,
)

WHAT = "the config_server (--config_server_host, --config_server_port)"

log = logging.getLogger(__name__)


Inbox = PeerMessage | PeerJoined | PeerLeft | PeerRefused | AskMasters | Cancel | EndpointGone


class ConfigServerClient(Actor[Inbox]):
    """One per master or node that belongs to a config_server, on its coordinator.

    Args:
        channel: to other servers; it connects to the config_server's.
        server: host and HTTP port of the config_server.
        announces: what a master registers; None: this is a node.
    """

    remote = frozenset({AskMasters, Cancel})
    foreign = frozenset({MasterList, Cancel})

    def __init__(
        self, channel: Channel, server: tuple[str, int], announces: AnnounceMaster | None = None
    ) -> None:
        super().__init__("config_client")
        self._search = PeerConnector(channel, server, WHAT, self.spawn)
        self._announces, self._joined_once = announces, False
        self._masters: tuple[MasterAddress, ...] = ()
        self._asking: set[int] = set()  # endpoints that asked for the masters

    def started(self) -> None:
        self._search.look()

    def holds(self) -> str:
        return f"{len(self._masters)} masters" + ", no config_server" * (not self._search.peer)

    def receive(self, batch: list[Inbox]) -> None:
        for msg in batch:
            match msg:
                case PeerMessage(peer, told):
                    if peer == self._search.peer:
                        self._told(told)
                case PeerJoined(peer, _, where):
                    if self._search.joined(peer, where):
                        self._joined(peer)
                case PeerLeft(peer, _, why):
                    if self._search.left(peer):
                        self._left(why)
                case PeerRefused(where, why):
                    if where == self._search.where:
                        self._refused(where, why)
                case AskMasters(endpoint):
                    self._asking.add(endpoint)
                    self._say(endpoint)
                case Cancel():
                    if self._search.peer:
                        self.system.ref("registry", self._search.peer).tell(msg)
                case EndpointGone(endpoint):
                    self._asking.discard(endpoint)
                case _:
                    assert_never(msg)

    def _joined(self, peer: int) -> None:
        self._joined_once = True
        if self._announces is not None:
            self.system.ref("registry", peer).tell(self._announces)
        self._say(*self._asking)

    def _left(self, why: str) -> None:
        log.warning("the config_server is away: %s; masters and nodes go on as they are", why)
        self._say(*self._asking)

    def _refused(self, where: str, why: str) -> None:
        """Raises StartupError if it has never accepted us."""
        if not self._joined_once:
            raise StartupError(f"the config_server at {where} does not take this server: {why}")
        log.error("the config_server at %s does not take this server: %s", where, why)

    def _told(self, told: Message) -> None:
        match told:
            case MasterList(masters):
                self._masters = masters
                if self._announces is None:
                    self.system.ref("agent").tell(told)
                self._say(*self._asking)
            case Cancel():
                self.system.ref("watchdog").tell(told)
            case other:
                raise AssertionError(other)  # it is not in ``foreign``

    def _say(self, *endpoints: int) -> None:
        msg = MasterList(self._masters, not self._search.peer)
        for endpoint in endpoints:
            self.system.ref("frontend", endpoint).tell(msg)
