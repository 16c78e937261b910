"""Actor, mailbox and Ref: everything an actor author needs.

Knows how messages wait and are handed over; knows neither sockets nor what any message means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Coroutine
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from asyncllm.actors.system import ActorSystem

M = TypeVar("M")


class MailboxFull(Exception):
    """The receiver is behind; the sender sheds, waits or fails, but never drops silently."""


class Ref(Generic[M]):
    """Address of an actor; the same calls whether it lives here or on another endpoint."""

    __slots__ = ("_system", "endpoint", "name")

    def __init__(self, system: ActorSystem, endpoint: int, name: str) -> None:
        self._system, self.endpoint, self.name = system, endpoint, name

    def __repr__(self) -> str:
        return f"{self.name}@{self.endpoint}"

    def tell(self, msg: M, *, urgent: bool = False) -> None:
        """Send and forget; urgent messages go first and are never refused.

        Raises:
            MailboxFull: the receiver lives here and ``capacity`` messages wait for it.
            PeerLost: the receiver's endpoint has stopped reading.
        """
        self._system.deliver(self.endpoint, self.name, msg, urgent)


class Actor(Generic[M]):
    """Single owner of one piece of state.

    ``receive`` is synchronous on purpose: it runs to the end before any other handler of this
    process does, so no lock and no half-done state exists. Work that must wait is started with
    ``spawn`` and comes back as a message.

    Attributes:
        busy_s: seconds spent inside ``receive`` so far.
    """

    capacity = 4096
    vital = True  # a crash ends this endpoint's process; False: it ends this actor only

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy_s = 0.0
        self._queue: deque[M] = deque()
        self._urgent: deque[M] = deque()
        self._scheduled = True  # held until the system has called started()
        self.system: ActorSystem

    @property
    def depth(self) -> int:
        """Messages waiting in the mailbox."""
        return len(self._queue) + len(self._urgent)

    def started(self) -> None:
        """Called once, in order of registration; every ref resolves."""

    def receive(self, batch: list[M]) -> None:
        """Handle all waiting messages, urgent ones first."""
        raise NotImplementedError

    async def closing(self) -> None:
        """Finish what must be waited for; at most 5 s, on an orderly stop only, before stopped().

        Called in reverse order of registration, when no handler runs any more.
        """

    def stopped(self) -> None:
        """Called once, in reverse order of registration, also after a crash (of ``started`` too)."""

    def holds(self) -> str:
        """What it works on, for whoever looks into a running process. From any thread."""
        return ""

    def spawn(self, work: Coroutine[Any, Any, M | None]) -> None:
        """Run ``work`` beside the actor; what it returns is put into this mailbox."""
        self.system.spawn(self, work)

    def open(self) -> None:
        """Called by the system: start, then hand over what came in early."""
        self.started()
        self.system.loop.call_soon(self._deliver)

    def put(self, msg: M, urgent: bool = False) -> None:
        """Queue one message. Raises MailboxFull unless it is urgent."""
        if urgent:
            self._urgent.append(msg)
        elif len(self._queue) >= self.capacity:
            raise MailboxFull(f"{self.name}: {self.capacity} messages wait")
        else:
            self._queue.append(msg)
        if not self._scheduled:
            self._scheduled = True
            self.system.loop.call_soon(self._deliver)

    def take(self) -> list[M]:
        """Empty the mailbox: all waiting messages, urgent ones first."""
        batch = [*self._urgent, *self._queue]
        self._urgent.clear()
        self._queue.clear()
        return batch

    def _deliver(self) -> None:
        self._scheduled = False
        if self.system.over or not (batch := self.take()):
            return
        begin = perf_counter()
        try:
            self.receive(batch)
        except Exception as error:
            self.system.crashed(self, error)
        self.busy_s += perf_counter() - begin
