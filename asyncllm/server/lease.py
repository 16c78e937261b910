"""Leases a port of the config_server as the rendezvous of this server's ranks.

The lease is needed before anything is loaded and held until the process ends, so its connection has
a thread of its own. The actors of the server know nothing of it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Coroutine

from asyncllm.actors.channel import Channel, ChannelCallbacks
from asyncllm.actors.config_client import WHAT
from asyncllm.actors.peer_connector import PeerConnector
from asyncllm.actors.peer_messages import PeerInfo, PeerJoined, PeerLeft, PeerRefused
from asyncllm.actors.registry import TENANT
from asyncllm.actors.transport import netloc
from asyncllm.codec import Message, encode
from asyncllm.config import Config, roles
from asyncllm.errors import StartupError
from asyncllm.messages import FindRendezvous, LeaseDenied, LeasePort, PortLeased, RendezvousFound
from asyncllm.server import rendezvous
from asyncllm.server.cluster import config_server_of, silence_s
from asyncllm.server.secret import CHANNEL, cluster_keys

ANSWER_S = 60.0  # for the config_server to appear and answer
CLOSE_S = 3.0

log = logging.getLogger(__name__)


class Lease:
    """The connection that holds the port; a daemon thread keeps it.

    Args:
        channel: to the config_server.
        server: the config_server's host and HTTP port.
        asks: to lease the port, or on the other nodes for the address of the first node.
    """

    def __init__(
        self, channel: Channel, server: tuple[str, int], asks: LeasePort | FindRendezvous
    ) -> None:
        self._channel, self._server, self._asks = channel, server, asks
        self._answer: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._search = PeerConnector(channel, server, WHAT, self._look)
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def take(self, seconds: float = ANSWER_S) -> str:
        """Block until the lease is granted; returns the first node's address ("": this one).

        Raises:
            StartupError: the port was denied, or nobody answers.
        """
        self._thread.start()
        try:
            return self._answer.result(seconds)
        except TimeoutError:
            host, port = self._server
            what = "no config_server has answered"
            if isinstance(self._asks, FindRendezvous):
                what = f"{what}, or no node 0 has come to --nccl_port {self._asks.port} of it"
            raise StartupError(
                f"{netloc(host, port)}: {what} within {seconds:g} s: {WHAT}"
            ) from None

    def close(self) -> None:
        """Release the port."""
        with contextlib.suppress(RuntimeError):  # already closed
            self._loop.call_soon_threadsafe(self._over.set)
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    # -- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        self._loop.run_until_complete(self._hold())
        self._loop.close()

    async def _hold(self) -> None:
        self._channel.start(ChannelCallbacks(self._changed, self._told))
        self._search.look()
        await self._over.wait()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait((self._looking,))
        self._channel.close()

    def _look(self, work: Coroutine[None, None, None]) -> None:
        self._looking = self._loop.create_task(work)

    def _changed(self, msg: PeerJoined | PeerLeft | PeerRefused) -> None:
        match msg:
            case PeerJoined(peer, _, where):
                if self._search.joined(peer, where):
                    self._channel.send(peer, "registry", encode(self._asks))
            case PeerLeft(peer):
                self._search.left(peer)
            case PeerRefused(where, why):
                self._fail(f"the config_server at {where} does not take this server: {why}")

    def _told(self, peer: int, name: str, msg: Message) -> str | None:
        match msg:
            case PortLeased():
                # servers that come later must not join this rendezvous
                assert isinstance(self._asks, LeasePort)
                self._asks = LeasePort(
                    port=self._asks.port, host=self._asks.host, meets=self._asks.meets, again=True
                )
                self._done("")
            case RendezvousFound(_, meets):
                self._done(meets)
            case LeaseDenied(port, why):
                self._fail(
                    f"the ranks cannot meet at port {port} of the config_server "
                    f"{netloc(*self._server)}: {why} (--nccl_port)"
                )
            case other:
                return f"{type(other).__name__} is not for {name}"
        return None

    def _done(self, meets: str) -> None:
        if not self._answer.done():
            self._answer.set_result(meets)

    def _fail(self, why: str) -> None:
        """Fail the start; once the ranks have met, this no longer matters."""
        if self._answer.done():
            log.error("%s", why)
        else:
            self._answer.set_exception(StartupError(why))


def take_lease(config: Config, stack: contextlib.ExitStack) -> str | None:
    """Lease --nccl_port at the config_server for the ranks of this server. Blocks.

    Args:
        stack: releases the port.

    Returns:
        The address at which this server's nodes meet; None: ranks do not meet at the config_server.

    Raises:
        StartupError: another server holds the port, or nobody answers.
    """
    if not roles.meets_at_config_server(config):
        return None
    host, port = config_server_of(config)
    keys = cluster_keys(config, CHANNEL, ("config_server_host", "advertise_host"))
    own = config.advertise_host or rendezvous.address_towards(host, "--config_server_host")
    name = f"{config.run_mode} {netloc(own, config.port)}"
    channel = Channel(PeerInfo(role=TENANT, name=name), keys, silence_s(config))
    asks: LeasePort | FindRendezvous = FindRendezvous(config.nccl_port)
    if config.node_rank == 0:
        asks = LeasePort(port=config.nccl_port, host=host, meets=own if config.nnodes > 1 else "")
    lease = Lease(channel, (host, port), asks)
    stack.callback(channel.close)
    stack.callback(lease.close)
    return lease.take() or own
