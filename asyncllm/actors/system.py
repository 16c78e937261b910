"""Runs the actors of one process: starts, addresses, supervises and stops them.

Knows names, endpoints and failures; does not know what actors do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping
from typing import Any

from asyncllm.actors.base import AnyActor, MailboxFull, Ref
from asyncllm.actors.channel import FIRST_PEER, Channel, ChannelCallbacks
from asyncllm.actors.peer_messages import PeerJoined, PeerLeft, PeerMessage, PeerRefused
from asyncllm.actors.transport import Transport, TransportSettings
from asyncllm.codec import Message, decode, encode
from asyncllm.errors import ActorCrashed, FatalError, PeerLost, StartupError
from asyncllm.log import RateLimitedLog
from asyncllm.topology import Endpoint, Topology

CLOSING_S = 5.0
LAST_WORDS_S = 1.0

log = logging.getLogger(__name__)


class ActorSystem:
    """Owns every actor, task and socket of one endpoint (a rank or an HTTP worker).

    Args:
        endpoint: number of this process.
        wire: how it communicates with others; None if there are none.
        topology: the server's endpoints, including this one; None: this is the only one.
        encode_local: send local messages through the codec as well (enabled by tests).

    Attributes:
        topology: as far as it is known here, see :meth:`join`.
        dead_letters: messages for a name, or an endpoint, that is gone.
        on_failure: called when the system fails, before anything else.
        on_overrun: called with the number of an endpoint that does not read and can be replaced.

    Raises:
        StartupError: the own address cannot be bound.
    """

    def __init__(
        self,
        endpoint: int = 0,
        wire: TransportSettings | None = None,
        *,
        topology: Topology | None = None,
        encode_local: bool = False,
    ) -> None:
        self.endpoint, self._encode_local = endpoint, encode_local
        self.dead_letters = 0
        self.on_failure: Callable[[], object] = lambda: None
        self.on_overrun: Callable[[int], object] = lambda _: None
        self.loop = asyncio.get_running_loop()
        self._actors: dict[str, AnyActor] = {}
        self._tasks: dict[asyncio.Task[None], AnyActor] = {}
        self._ended: asyncio.Future[None] = self.loop.create_future()
        self._wire = Transport(wire, self._arrive) if wire else None
        self._channel: Channel | None = None
        self._channel_owner = ""
        self._channel_owners: Mapping[str, str] = {}
        topology = topology or Topology((Endpoint(id=endpoint),))
        self.topology = topology.at(endpoint, self.address)
        self._dead_log = RateLimitedLog(log)
        self.loop.set_exception_handler(self._loop_error)

    @property
    def actors(self) -> Collection[AnyActor]:
        """The actors that live here, in order of registration."""
        return self._actors.values()

    @property
    def over(self) -> bool:
        """Whether it has stopped or crashed: no handler runs any more."""
        return self._ended.done()

    @property
    def foreign_frames(self) -> int:
        """Number of foreign frames received."""
        return sum(way.foreign_frames for way in (self._wire, self._channel) if way)

    @property
    def failed_handshakes(self) -> int:
        """Connections to our ports that failed authentication."""
        ways = (way for way in (self._wire, self._channel) if way)
        return sum(end.failed_handshakes for end in (*ways, *self._actors.values()))

    def counted(self, others: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Foreign frames and failed handshakes, with those of ``others``."""
        return self.foreign_frames + others[0], self.failed_handshakes + others[1]

    def state(self) -> Iterator[str]:
        """A line per actor: its mailbox, busy time and work. Thread-safe."""
        for actor in [*self._actors.values()]:
            line = f"{actor.name}: {actor.depth} messages wait, busy for {actor.busy_s:.2f} s"
            holds = actor.holds()
            yield f"{line}; {holds}" if holds else line

    @property
    def address(self) -> str:
        """Where other endpoints reach this one; "" if there are no others."""
        return self._wire.address if self._wire else ""

    def use_channel(
        self, channel: Channel, owner: str, owners: Mapping[str, str] | None = None
    ) -> None:
        """Also communicate with other servers while :meth:`run` runs; closes the channel.

        Args:
            owner: the actor that is told which peers join and leave.
            owners: another one for servers of these roles. The role of a server that refuses us is
                unknown: all owners are told.
        """
        self._channel, self._channel_owner = channel, owner
        self._channel_owners = owners or {}

    def join(self, topology: Topology) -> None:
        """Set the server's endpoints; messages to others are dead letters from now on.

        Raises:
            ValueError: the address of a peer is invalid; nothing has changed.
        """
        if wire := self._wire:
            for peer in topology.peers(self.endpoint):
                if peer.address and not wire.knows(peer.id):
                    wire.connect(peer.id, peer.address)
            left = {peer.id for peer in topology.peers(self.endpoint)}
            for peer in self.topology.peers(self.endpoint):
                if peer.id not in left:
                    wire.disconnect(peer.id)
        self.topology = topology

    def reject(self, msg: Message, why: str) -> None:
        """Called by an actor that got a message that no correct sender could have sent."""
        if self._wire:
            self._wire.reject(f"{type(msg).__name__}: {why}")

    def add(self, actor: AnyActor) -> Ref:
        """Register an actor; its ``started`` is called by :meth:`run`."""
        if actor.name in self._actors:
            raise ValueError(f"actor {actor.name!r} exists")
        actor.system = self
        self._actors[actor.name] = actor
        return self.ref(actor.name)

    def ref(self, name: str, endpoint: int | None = None) -> Ref:
        """Address of ``name`` on ``endpoint`` (None: here), whether it is there or not.

        ``endpoint`` may also be the number of a peer, see :meth:`use_channel`.
        """
        endpoint = self.endpoint if endpoint is None else endpoint
        return Ref(self, endpoint, name)

    def at_coordinator(self, name: str) -> Ref:
        """Address of ``name`` on the server's coordinator."""
        return self.ref(name, self.topology.coordinator.id)

    def at_intake(self, name: str) -> Ref:
        """Address for messages to ``name`` on a request's leader, see ``Topology.intake``."""
        return self.ref(*self.topology.intake(name))

    async def run(self) -> None:
        """Run until ``stop``.

        Raises:
            FatalError: ActorCrashed with the cause chained, or the FatalError that was raised.
            StartupError: raised by an actor.
        """
        opened: list[AnyActor] = []
        orderly = False
        try:
            if self._wire:
                self._wire.start()
            for actor in list(self._actors.values()):
                if self.over:
                    break
                opened.append(actor)
                self._open(actor)
            if self._channel and not self.over:
                self._channel.start(ChannelCallbacks(self._peer_changed, self._arrive_from))
            await self._ended
            orderly = True
        finally:
            self._ended.cancel()  # when run() itself was cancelled: no handler runs any more
            await self._close(opened, orderly)

    def stop(self) -> None:
        """End :meth:`run` in order; once this has returned no handler runs."""
        if not self.over:
            self._ended.set_result(None)

    def fail(self, error: FatalError) -> None:
        """End :meth:`run` with ``error``; once this has returned no handler runs."""
        self._fail(str(error), error)

    def close(self) -> None:
        """Close the wire and the channel; :meth:`run` does so too."""
        if self._channel:
            self._channel.close()
        if self._wire and not self._wire.closed:
            self._wire.close()

    def crashed(self, actor: AnyActor, error: Exception) -> None:
        """Called when ``actor`` raised: ends the system, or only the actor if it is not vital."""
        if self.over or self._actors.get(actor.name) is not actor:
            log.error("%s@%d failed while stopping", actor.name, self.endpoint, exc_info=error)
            return
        if not isinstance(error, StartupError):  # which is one line, logged by the caller
            log.error("%s@%d crashed", actor.name, self.endpoint, exc_info=error)
        if actor.vital or isinstance(error, FatalError):
            self._fail(f"{actor.name}@{self.endpoint}: {error!r}", error)
            return
        del self._actors[actor.name]
        for task, owner in self._tasks.items():
            if owner is actor:
                task.cancel()
        for msg in actor.take():
            self._dead_letter(actor.name, msg)
        self._stop_one(actor)

    def spawn(self, actor: AnyActor, work: Coroutine[None, None, Message | None]) -> None:
        """Run ``work``; its result goes into the actor's mailbox, its exception is the actor's."""
        task = self.loop.create_task(self._run(actor, work))
        self._tasks[task] = actor  # a bare task may be garbage-collected
        task.add_done_callback(self._tasks.pop)

    def deliver(self, endpoint: int, name: str, msg: Message) -> None:
        """Put ``msg`` into a mailbox here or send it. Raises MailboxFull or PeerLost."""
        if endpoint >= FIRST_PEER:
            if self._channel is None or not self._channel.knows(endpoint):
                self._dead_letter(name, msg)
            else:
                self._channel.send(endpoint, name, encode(msg))
        elif endpoint != self.endpoint:
            if self._wire is None or self._wire.closed or not self._wire.knows(endpoint):
                self._dead_letter(name, msg)
            else:
                self._send(self._wire, endpoint, name, msg)
        elif (actor := self._actors.get(name)) is None:
            self._dead_letter(name, msg)
        else:
            actor.put(decode(encode(msg)) if self._encode_local else msg)

    def _send(self, wire: Transport, endpoint: int, name: str, msg: Message) -> None:
        """Send to another endpoint; one that can be replaced, and does not read, gets nothing any
        more. Raises PeerLost: another does not."""
        try:
            wire.send(endpoint, name, encode(msg))
        except PeerLost as error:
            if endpoint not in self.topology or not self.topology[endpoint].replaceable:
                raise
            log.error("%s is given up: %s", self.topology.name(endpoint), error)
            wire.disconnect(endpoint)
            self.on_overrun(endpoint)

    def _open(self, actor: AnyActor) -> None:
        try:
            actor.open()
        except Exception as error:
            self.crashed(actor, error)

    async def _run(self, actor: AnyActor, work: Coroutine[None, None, Message | None]) -> None:
        try:
            msg = await actor.timed(work)
            if msg is None:
                return
            if self._actors.get(actor.name) is actor:
                actor.put(msg)
            else:
                self._dead_letter(actor.name, msg)
        except Exception as error:
            self.crashed(actor, error)

    def _arrive(self, name: str, msg: Message) -> None:
        try:
            if (actor := self._actors.get(name)) is None:
                self._dead_letter(name, msg)
            elif type(msg) not in actor.remote:
                self.reject(msg, f"not for {name}@{self.endpoint} from another process")
            elif not actor.possible(msg):  # type: ignore[arg-type]  # it is in ``remote``
                self.reject(msg, f"beyond the limits of {name}@{self.endpoint}")
            else:
                actor.put(msg)
        except MailboxFull as error:  # the sender cannot be told: an internal bound was violated
            log.error("%s@%d overrun by a peer", name, self.endpoint)
            self._fail(f"{name}@{self.endpoint}: {error!r}", error)

    def _arrive_from(self, peer: int, name: str, msg: Message) -> str | None:
        """Deliver a message from another server; returns the reason if it is invalid."""
        if self.over or (actor := self._actors.get(name)) is None:
            self._dead_letter(name, msg)
            return None
        if type(msg) not in actor.foreign:
            return f"{type(msg).__name__} is not for {name} from another server"
        received = PeerMessage(peer, msg)
        if not actor.possible(received):  # type: ignore[arg-type]  # it is in ``foreign``
            return f"{type(msg).__name__} is beyond the limits of {name}"
        try:
            actor.put(received)
        except MailboxFull:
            return f"{name} is overrun"
        return None

    def _peer_changed(self, msg: PeerJoined | PeerLeft | PeerRefused) -> None:
        names = {self._channel_owner, *self._channel_owners.values()}
        if not isinstance(msg, PeerRefused):
            names = {self._channel_owners.get(msg.info.role, self._channel_owner)}
        for name in names:
            if (owner := self._actors.get(name)) is not None and not self.over:
                owner.put(msg)

    def _dead_letter(self, name: str, msg: Message) -> None:
        self.dead_letters += 1
        self._dead_log.warning("dead letter for %s: %s", name, type(msg).__name__)

    def _fail(self, message: str, error: BaseException | None) -> None:
        """End run() with ``error`` if its type determines the exit code, else with ActorCrashed."""
        if self.over:
            return
        if isinstance(error, StartupError):
            self._ended.set_exception(error)
            return
        if isinstance(error, FatalError):
            self._ended.set_exception(error)
        else:
            crash = ActorCrashed(message)
            crash.__cause__ = error
            self._ended.set_exception(crash)
        self.on_failure()

    def _loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Errors in plain callbacks reach no task: make them end the process, not a log line.

        Except those of one client's connection, which the loop has already closed.
        """
        message, error = context["message"], context.get("exception")
        if isinstance(error, FatalError):  # it explains itself, and is logged at the end
            self._fail(str(error), error)
            return
        log.error("event loop: %s", message, exc_info=error)
        of_connection = "transport" in context or "protocol" in context
        if of_connection or ("handle" not in context and isinstance(error, OSError)):
            return
        self._fail(f"{message}: {error!r}", error)

    async def _close(self, opened: list[AnyActor], orderly: bool) -> None:
        if self._wire:
            self._wire.pause()
        living = [a for a in reversed(opened) if a in self._actors.values()]
        if not orderly and not self._ended.cancelled():
            await asyncio.gather(*(self._last_words(actor) for actor in living))
        if tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CLOSING_S)
        if orderly:
            for actor in living:
                await self._close_one(actor)
        for actor in living:
            self._stop_one(actor)
        self.close()
        self.loop.set_exception_handler(None)

    async def _close_one(self, actor: AnyActor) -> None:
        await self._bounded(actor, actor.closing(), CLOSING_S)

    async def _last_words(self, actor: AnyActor) -> None:
        await self._bounded(actor, actor.failing(), LAST_WORDS_S)

    async def _bounded(
        self, actor: AnyActor, work: Coroutine[None, None, None], seconds: float
    ) -> None:
        try:
            async with asyncio.timeout(seconds):
                await work
        except TimeoutError:
            log.warning("%s@%d did not close in %g s", actor.name, self.endpoint, seconds)
        except Exception as error:
            log.error("%s@%d failed to close", actor.name, self.endpoint, exc_info=error)

    def _stop_one(self, actor: AnyActor) -> None:
        try:
            actor.stopped()
        except Exception as error:
            log.error("%s@%d failed to stop", actor.name, self.endpoint, exc_info=error)
