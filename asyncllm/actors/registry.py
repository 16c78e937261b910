"""Registry: the one actor of a config_server.

Owns the list of masters, which it sends to all of them and to nodes, and the rendezvous ports of
other servers' ranks. Entries live as long as their owner is connected; after a restart they are
rebuilt when servers reconnect. Knows neither models nor requests.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from time import time
from typing import assert_never

from asyncllm.actors.base import Actor
from asyncllm.actors.channel import Channel
from asyncllm.actors.peer_messages import PeerInfo, PeerJoined, PeerLeft, PeerMessage, PeerRefused
from asyncllm.codec import Message
from asyncllm.core.metrics import ProcessCounters, RegistryMetrics
from asyncllm.errors import StartupError
from asyncllm.messages import (
    AnnounceMaster,
    Cancel,
    FindRendezvous,
    LeaseDenied,
    LeasePort,
    MasterAddress,
    MasterList,
    PortLeased,
    RendezvousFound,
)

MASTER, TENANT = "pd_master", "group"
CONFIG_CLIENTS = (MASTER, "prefill", "decode")  # roles that get the list of masters

Inbox = PeerMessage | PeerJoined | PeerLeft | PeerRefused

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _PortLease:
    """The rendezvous port of a server's ranks."""

    peer: int
    owner: str
    meets: str
    since: float
    store: object  # listens as long as it exists; None: the ranks met before this process started


class Registry(Actor[Inbox]):
    """One per config_server.

    Args:
        channel: to masters, nodes and servers that lease ports.
        open_store: creates the torch.distributed store that listens at (host, port) until nothing
            refers to it; raises StartupError.
    """

    capacity = 65536
    foreign = frozenset({AnnounceMaster, Cancel, LeasePort, FindRendezvous})

    def __init__(self, channel: Channel, open_store: Callable[[str, int], object]) -> None:
        super().__init__("registry")
        self._channel, self._open_store = channel, open_store
        self._infos: dict[int, PeerInfo] = {}  # of all connected servers
        self._masters: dict[int, MasterAddress] = {}  # masters that have registered
        self._ports: dict[int, _PortLease] = {}
        self._seeking: dict[int, int] = {}  # peer -> port
        self._gone = Counter(
            dict.fromkeys((*CONFIG_CLIENTS, TENANT), 0)
        )  # by role, since the start
        self._denied = 0

    def started(self) -> None:
        self._channel.admit = self._complaint

    def stopped(self) -> None:
        self._ports.clear()  # closes their stores

    def holds(self) -> str:
        return f"{len(self._masters)} masters, {len(self._infos)} peers, {len(self._ports)} ports"

    def receive(self, batch: list[Inbox]) -> None:
        for msg in batch:
            match msg:
                case PeerMessage(peer, told):
                    if peer in self._infos:
                        self._told(peer, told)
                case PeerJoined(peer, info):
                    self._infos[peer] = info
                    if info.role in CONFIG_CLIENTS:
                        self._say_masters(peer)
                case PeerLeft(peer, info, why):
                    self._left(peer, info, why)
                case PeerRefused():
                    pass  # it connects to nobody
                case _:
                    assert_never(msg)

    def _told(self, peer: int, told: Message) -> None:
        match told:
            case AnnounceMaster():
                self._announced(peer, told)
            case Cancel():
                for master in self._masters.keys() - {peer}:
                    self.system.ref("config_client", master).tell(told)
            case LeasePort():
                self._claim(peer, told)
            case FindRendezvous(port):
                self._seeking[peer] = port
                self._say_where(port)
            case other:
                raise AssertionError(other)  # it is not in ``foreign``

    def objects(self) -> bytes:
        """All that is registered, as JSON."""
        masters = [
            {
                "id": master.id,
                "address": master.address,
                "channel_host": master.host,
                "channel_port": master.port,
                "since": _iso(master.since),
            }
            for master in self._masters.values()
        ]
        nodes = [
            {"id": info.incarnation, "role": info.role, "address": info.name}
            for info in self._infos.values()
            if info.role in CONFIG_CLIENTS[1:]
        ]
        groups = [
            {"nccl_port": port, "owner": held.owner, "since": _iso(held.since)}
            for port, held in sorted(self._ports.items())
        ]
        return json.dumps({"pd_masters": masters, "nodes": nodes, "groups": groups}).encode()

    def registered(self, process: ProcessCounters) -> RegistryMetrics:
        """The same as metrics, with those of the process."""
        present = dict.fromkeys((*CONFIG_CLIENTS, TENANT), 0) | Counter(
            info.role for info in self._infos.values()
        )
        return RegistryMetrics(present, self._gone, len(self._ports), self._denied, process)

    # -- who comes and goes -----------------------------------------------------------------------

    def _complaint(self, info: PeerInfo) -> str | None:
        """Why a connecting server is refused, or None. One that has restarted replaces its former
        self."""
        if info.role not in (*CONFIG_CLIENTS, TENANT):
            return f"a config_server takes no {info.role!r}"
        for peer, other in [*self._channel.peers.items()]:
            same = (other.role, other.name) == (info.role, info.name)
            if same and other.incarnation != info.incarnation:
                self._channel.drop(peer, "another process has its address")
        return None

    def _left(self, peer: int, info: PeerInfo, why: str) -> None:
        self._gone[info.role] += self._infos.pop(peer, None) is not None
        self._seeking.pop(peer, None)
        for port in [port for port, held in self._ports.items() if held.peer == peer]:
            log.info("port %d is free again: %s has gone", port, info.name)
            del self._ports[port]  # and the store with it
        if self._masters.pop(peer, None) is not None:
            log.warning("%s is lost: %s", info, why)
            self._say_masters(*self._infos)

    def _announced(self, peer: int, msg: AnnounceMaster) -> None:
        info = self._infos[peer]
        if info.role != MASTER:
            self._channel.drop(peer, f"it is no {MASTER}, but {info.role}")
            return
        self._masters[peer] = MasterAddress(
            id=info.incarnation, address=info.name, host=msg.host, port=msg.port, since=time()
        )
        log.info("%s has registered; nodes reach it at %s:%d", info, msg.host, msg.port)
        self._say_masters(*self._infos)

    def _say_masters(self, *peers: int) -> None:
        msg = MasterList(tuple(self._masters.values()))
        for peer in peers:
            if self._infos[peer].role in CONFIG_CLIENTS:
                self.system.ref("config_client", peer).tell(msg)

    # -- where ranks meet -------------------------------------------------------------------------

    def _claim(self, peer: int, msg: LeasePort) -> None:
        """Lease a port to a server for as long as it is connected."""
        owner = self._infos[peer].name
        held = self._held_by(peer, msg.port)
        if held is None:
            if any(other.peer == peer for other in self._ports.values()):
                self._deny(peer, msg.port, f"{owner} has another port already")
                return
            try:
                store = None if msg.again else self._open_store(msg.host, msg.port)
            except StartupError as error:
                self._deny(peer, msg.port, str(error))
                return
            held = self._ports[msg.port] = _PortLease(peer, owner, msg.meets, time(), store)
            log.info("the ranks of %s meet at port %d", owner, msg.port)
        elif held.peer != peer:
            self._deny(peer, msg.port, f"the ranks of {held.owner} meet there")
            return
        held.meets = msg.meets
        self.system.ref("tenant", peer).tell(PortLeased(msg.port))
        self._say_where(msg.port)

    def _held_by(self, peer: int, port: int) -> _PortLease | None:
        """Who holds a port. A server that has connected again before the end of its former
        connection was noticed keeps its own, with the store that its ranks may be using."""
        held = self._ports.get(port)
        if held is not None and held.peer in self._infos:
            former = self._infos[held.peer]
            if former.incarnation == self._infos[peer].incarnation:
                held.peer = peer
        return held

    def _deny(self, peer: int, port: int, why: str) -> None:
        self._denied += 1
        log.warning("port %d is not for %s: %s", port, self._infos[peer].name, why)
        self.system.ref("tenant", peer).tell(LeaseDenied(port, why))

    def _say_where(self, port: int) -> None:
        """Send a server's first node's address to those of its nodes that have asked."""
        held = self._ports.get(port)
        for peer in [p for p, sought in self._seeking.items() if sought == port] if held else ():
            assert held is not None
            if held.meets:
                del self._seeking[peer]
                self.system.ref("tenant", peer).tell(RendezvousFound(port, held.meets))


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
