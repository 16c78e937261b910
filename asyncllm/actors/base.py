"""Actor, mailbox and Ref: everything an actor author needs.

Knows how messages are queued and delivered; knows neither sockets nor messages' meaning.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Generic, Never, TypeVar

from asyncllm.codec import Message

if TYPE_CHECKING:
    from asyncllm.actors.system import ActorSystem

M = TypeVar("M", bound=Message, contravariant=True)
T = TypeVar("T")


MARK_S = 0.001  # how old a reading of the thread's CPU time may be


class MailboxFull(Exception):
    """The receiver is overloaded; the sender sheds load, waits or fails, never drops silently."""


class Ref:
    """Address of an actor; the same calls whether it lives here or on another endpoint."""

    __slots__ = ("_system", "endpoint", "name")

    def __init__(self, system: ActorSystem, endpoint: int, name: str) -> None:
        self._system, self.endpoint, self.name = system, endpoint, name

    def __repr__(self) -> str:
        return f"{self.name}@{self.endpoint}"

    def tell(self, msg: Message) -> None:
        """Send and forget, in order; urgent messages are never refused.

        Raises:
            MailboxFull: the receiver lives here and ``capacity`` messages wait for it.
            PeerLost: the receiver's endpoint has stopped reading.
        """
        self._system.deliver(self.endpoint, self.name, msg)


class Actor(Generic[M]):
    """Single owner of one piece of state; ``M``: the messages that it accepts.

    ``receive`` is synchronous on purpose: it runs to the end before any other handler of this
    process does, so no lock and no half-done state exists. Work that must wait is started with
    ``spawn`` and comes back as a message.

    Attributes:
        remote: message types that it accepts from other processes; others are dropped.
        orders: types that are accepted from the coordinator's process only, in addition to
            ``remote``.
        foreign: types that it accepts from other servers of the cluster, as ``PeerMessage``.
        busy_s: seconds spent inside ``receive`` so far.
    """

    capacity = 4096
    remote: Collection[type] = frozenset()
    orders: Collection[type] = frozenset()
    foreign: Collection[type] = frozenset()
    vital = True  # a crash ends this endpoint's process; False: it ends this actor only

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy_s = 0.0
        self._clock = _Clock()
        self._queue: list[Message] = []
        self._scheduled = True  # held until the system has called started()
        self.system: ActorSystem

    @property
    def depth(self) -> int:
        """Messages waiting in the mailbox."""
        return len(self._queue)

    @property
    def failed_handshakes(self) -> int:
        """Connections to a port of its own that failed to authenticate."""
        return 0

    def started(self) -> None:
        """Called once, in order of registration; every ref resolves."""

    def receive(self, batch: list[M]) -> None:
        """Handle all waiting messages, in the order in which they came."""
        raise NotImplementedError

    def possible(self, msg: M) -> bool:
        """Whether a message from another process is plausible; otherwise it is dropped.

        Called for types in ``remote``, and for ``PeerMessage`` from other servers, after their
        fields have been checked; this is for checks that need the receiver's state.
        """
        return True

    async def closing(self) -> None:
        """Clean up what must be awaited; at most 5 s, only on an orderly stop, before stopped().

        Called in reverse order of registration, when no handler runs any more.
        """

    async def failing(self) -> None:
        """Notify clients of the failure; at most 1 s, only after a failure, before stopped().

        Other actors may be in any state, and no handler runs any more.
        """

    def stopped(self) -> None:
        """Called once, in reverse order of registration,
        also after a crash (of ``started`` too)."""

    def holds(self) -> str:
        """What it is working on, for diagnostics. Thread-safe."""
        return ""

    def spawn(self, work: Coroutine[None, None, Message | None]) -> None:
        """Run ``work`` beside the actor; what it returns is put into this mailbox."""
        self.system.spawn(self, work)

    def repeat(self, period_s: float, work: Callable[[], object]) -> None:
        """Call ``work`` every ``period_s`` from then on, until the system is over."""

        def turn() -> None:
            if not self.system.over:
                self.repeat(period_s, work)
                work()

        self.system.loop.call_later(period_s, turn)

    def timed(self, work: Awaitable[T]) -> Awaitable[T]:
        """Await ``work``; what it does on the loop counts as callbacks of this actor."""
        return _Timed(work.__await__(), self._clock)

    def take_longest(self) -> float:
        """CPU seconds of the longest callback since this was last called."""
        longest, self._clock.longest_s = self._clock.longest_s, 0.0
        return longest

    def open(self) -> None:
        """Called by the system: start, then deliver messages that arrived early."""
        self.started()
        self.system.loop.call_soon(self._deliver)

    def put(self, msg: Message) -> None:
        """Queue one message. Raises MailboxFull unless it is urgent."""
        if len(self._queue) >= self.capacity and not msg.urgent:
            raise MailboxFull(f"{self.name}: {self.capacity} messages wait")
        self._queue.append(msg)
        if not self._scheduled:
            self._scheduled = True
            self.system.loop.call_soon(self._deliver)

    def take(self) -> list[Message]:
        """Empty the mailbox."""
        batch, self._queue = self._queue, []
        return batch

    def _deliver(self) -> None:
        self._scheduled = False
        if self.system.over or not (batch := self.take()):
            return
        begin = self._clock.begin()
        try:
            self.receive(batch)  # type: ignore[arg-type]  # who tells knows what it takes
        except Exception as error:
            self.system.crashed(self, error)
        self.busy_s += self._clock.end(begin)


AnyActor = Actor[Never]  # whatever it accepts


class _Clock:
    """Wall time of one actor's callbacks on the loop, and CPU time of the longest.

    The kernel is asked for the thread's CPU time (a sixth of what a small message costs) only when
    a turn took longer, in wall time, than the longest so far. It is held against a reading that was
    at most ``MARK_S`` old when the turn began, so what a turn had to wait for its core is left out,
    but for that much.
    """

    __slots__ = ("_cpu_s", "_fresh_until", "longest_s")

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._cpu_s = self._fresh_until = 0.0

    def begin(self) -> float:
        """A callback begins; returns the argument of :meth:`end`."""
        now = perf_counter()
        if now > self._fresh_until:
            self._cpu_s, self._fresh_until = thread_time(), now + MARK_S
        return now

    def end(self, begin: float) -> float:
        """Seconds since ``begin``."""
        took_s = perf_counter() - begin
        if took_s > self.longest_s:
            self.longest_s = max(self.longest_s, min(took_s, thread_time() - self._cpu_s))
        return took_s


class _Timed(Generator[object, None, T], Awaitable[T]):
    """Wraps a coroutine and times each of its callbacks."""

    def __init__(self, work: Generator[object, None, T], clock: _Clock) -> None:
        self._work, self._clock = work, clock

    def __await__(self) -> Generator[object, None, T]:
        return self

    def send(self, value: None) -> object:
        begin = self._clock.begin()
        try:
            return self._work.send(value)
        finally:
            self._clock.end(begin)

    def throw(self, error: BaseException) -> object:  # type: ignore[override]
        begin = self._clock.begin()
        try:
            return self._work.throw(error)
        finally:
            self._clock.end(begin)
