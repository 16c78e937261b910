"""Actor, mailbox and Ref: everything an actor author needs.

Knows how messages wait and are handed over; knows neither sockets nor what any message means.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from asyncllm.actors.system import ActorSystem

M = TypeVar("M")
T = TypeVar("T")


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
        """Send and forget, in order; urgent messages are never refused.

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
        remote: types of messages that it takes from other processes; others are dropped there.
        busy_s: seconds spent inside ``receive`` so far.
    """

    capacity = 4096
    remote: Collection[type] = frozenset()
    vital = True  # a crash ends this endpoint's process; False: it ends this actor only

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy_s = 0.0
        self._longest_s = 0.0
        self._queue: list[M] = []
        self._scheduled = True  # held until the system has called started()
        self.system: ActorSystem

    @property
    def depth(self) -> int:
        """Messages waiting in the mailbox."""
        return len(self._queue)

    def started(self) -> None:
        """Called once, in order of registration; every ref resolves."""

    def receive(self, batch: list[M]) -> None:
        """Handle all waiting messages, in the order in which they came."""
        raise NotImplementedError

    def possible(self, msg: M) -> bool:
        """Whether a message of another process is one that it can have meant; if not, it is dropped.

        Asked of those in ``remote``, whose fields have been checked; here is what only the
        receiver knows.
        """
        return True

    async def closing(self) -> None:
        """Finish what must be waited for; at most 5 s, on an orderly stop only, before stopped().

        Called in reverse order of registration, when no handler runs any more.
        """

    async def failing(self) -> None:
        """Tell those outside that it is over; at most 1 s, after a failure only, before stopped().

        Other actors may be in any state, and no handler runs any more.
        """

    def stopped(self) -> None:
        """Called once, in reverse order of registration, also after a crash (of ``started`` too)."""

    def holds(self) -> str:
        """What it works on, for whoever looks into a running process. From any thread."""
        return ""

    def spawn(self, work: Coroutine[Any, Any, M | None]) -> None:
        """Run ``work`` beside the actor; what it returns is put into this mailbox."""
        self.system.spawn(self, work)

    def timed(self, work: Awaitable[T]) -> Awaitable[T]:
        """Await ``work``; what it does on the loop counts as callbacks of this actor."""
        return _Timed(work.__await__(), self._took)

    def take_longest(self) -> float:
        """CPU seconds of the longest callback since this was last called."""
        longest, self._longest_s = self._longest_s, 0.0
        return longest

    def open(self) -> None:
        """Called by the system: start, then hand over what came in early."""
        self.started()
        self.system.loop.call_soon(self._deliver)

    def put(self, msg: M, urgent: bool = False) -> None:
        """Queue one message. Raises MailboxFull unless it is urgent."""
        if len(self._queue) >= self.capacity and not urgent:
            raise MailboxFull(f"{self.name}: {self.capacity} messages wait")
        self._queue.append(msg)
        if not self._scheduled:
            self._scheduled = True
            self.system.loop.call_soon(self._deliver)

    def take(self) -> list[M]:
        """Empty the mailbox."""
        batch, self._queue = self._queue, []
        return batch

    def _deliver(self) -> None:
        self._scheduled = False
        if self.system.over or not (batch := self.take()):
            return
        begin, begin_cpu = perf_counter(), thread_time()
        try:
            self.receive(batch)
        except Exception as error:
            self.system.crashed(self, error)
        self.busy_s += perf_counter() - begin
        self._took(thread_time() - begin_cpu)

    def _took(self, cpu_s: float) -> None:
        self._longest_s = max(self._longest_s, cpu_s)


class _Timed(Generator[Any, Any, T], Awaitable[T]):
    """Passes on what is sent and thrown, and tells the CPU time of each turn."""

    def __init__(self, work: Generator[Any, Any, T], told: Callable[[float], None]) -> None:
        self._work, self._told = work, told

    def __await__(self) -> Generator[Any, Any, T]:
        return self

    def send(self, value: Any) -> Any:
        begin = thread_time()
        try:
            return self._work.send(value)
        finally:
            self._told(thread_time() - begin)

    def throw(self, *error: Any) -> Any:
        begin = thread_time()
        try:
            return self._work.throw(*error)
        finally:
            self._told(thread_time() - begin)
