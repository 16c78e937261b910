"""A communicator of two ranks of different servers, for pages: NCCL, or gloo in tests.

It does not belong to torch.distributed's default group; its rendezvous uses the existing connection
between the two. Owns a thread, since communicators block; knows neither the owners of pages nor
sockets.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroupGloo, Store, Work

from asyncllm.engine.kv_pages import CopyWaiter, QueuedCopy, recorded

NEVER = timedelta(days=365)  # torch's timeouts end the process; ours end the pair


class Communicator(Protocol):
    """What torch's backends have in common, as far as they are used here."""

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Work:
        """Queue a tensor for the other rank."""

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Work:
        """Queue a tensor that comes from the other rank."""

    def abort(self) -> None:
        """Abort hanging operations."""


class PairStore(Store):
    """A store through which two processes exchange what their communicators need to connect.

    Values set here must be sent to the other side, and values read here come from there.
    """

    def __init__(self, timeout_s: float, wake: Callable[[], None]) -> None:
        super().__init__()
        self._timeout_s, self._wake, self._over = timeout_s, wake, False
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self.outbox: deque[tuple[str, bytes]] = deque()

    def known(self, key: str, value: bytes) -> None:
        """Record a value that the other side has set."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def close(self) -> None:
        """Wake everyone who waits for a key."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    # -- torch's names -----------------------------------------------------------------------------

    def set(self, key: str, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else bytes(value)
        self.known(key, raw)
        self.outbox.append((key, raw))
        self._wake()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        with self._changed:
            found = self._changed.wait_for(
                lambda: self._over or all(key in self._values for key in keys), self._timeout_s
            )
        if self._over or not found:
            raise RuntimeError(f"the other side has not said {keys}")


class RankPair:
    """Two ranks, each of which has one of these; pages go from place 0 to place 1.

    Args:
        make: the communicator, as soon as both are there; blocks.
        queued: what can be waited for of a work of it.
        abort: have works that hang end.
        timeout_s: for the meeting, and for a page.
        wake: called in threads of this pair when there is something to look at.

    Attributes:
        ready: pages can be sent.
        failed: why they no longer can; "": they can, or will.
        closed: no page is read or written any longer.
    """

    def __init__(
        self,
        make: Callable[[PairStore], Communicator],
        queued: Callable[[Work], QueuedCopy],
        abort: Callable[[Communicator], None],
        timeout_s: float,
        wake: Callable[[], None],
    ) -> None:
        self._make, self._queued, self._abort = make, queued, abort
        self._timeout_s, self._wake = timeout_s, wake
        self.ready = self.closed = False
        self.failed = ""
        self._over = False
        self._meeting = PairStore(timeout_s, wake)
        self._waiter = CopyWaiter(wake)
        self._jobs: queue.SimpleQueue[tuple[int, Tensor, bool] | None] = queue.SimpleQueue()
        self._under_way, self._moved = 0, 0.0
        self._done: deque[int] = deque()
        self._group: Communicator | None = None
        threading.Thread(target=self._run, name="kv pair", daemon=True).start()

    def to_tell(self) -> Iterable[tuple[str, bytes]]:
        """Keys and values to send to the other side."""
        while self._meeting.outbox:
            yield self._meeting.outbox.popleft()

    def known(self, key: str, value: bytes) -> None:
        """Record a key and value from the other side."""
        self._meeting.known(key, value)

    def send(self, number: int, page: Tensor) -> None:
        """Queue a page; the other side must receive as many bytes, in the same order."""
        self._under_way += 1
        self._jobs.put((number, page, True))

    def receive(self, number: int, page: Tensor) -> None:
        """Queue receiving a page."""
        self._under_way += 1
        self._jobs.put((number, page, False))

    def done(self, now: float) -> Iterable[int]:
        """The numbers of pages sent or received since the last call."""
        try:
            for then in self._waiter.over():
                then()
        except RuntimeError as error:
            self._fail(error)
        if self._done or not self._under_way:
            self._moved = now
        elif now - self._moved > self._timeout_s:
            self._fail(RuntimeError(f"a page has not gone in {self._timeout_s:g} s"))
        while self._done:
            self._under_way -= 1
            yield self._done.popleft()

    def _fail(self, error: RuntimeError) -> None:
        if not self._over:
            self.failed = self.failed or f"its communicator failed: {error}".splitlines()[0]

    def close(self) -> None:
        """End it, without waiting; ``closed`` is set when it has ended."""
        self._over = True
        self._meeting.close()
        self._jobs.put(None)
        if (group := self._group) is not None and not self.closed:
            threading.Thread(
                target=self._abort, args=(group,), name="kv pair's end", daemon=True
            ).start()

    def _run(self) -> None:
        try:
            self._group = group = self._make(self._meeting)
            self.ready = True
            self._wake()
            while (job := self._jobs.get()) is not None and not self._over:
                number, page, sends = job
                work = group.send([page], 1, 0) if sends else group.recv([page], 0, 0)
                self._waiter.watch(self._queued(work), partial(self._done.append, number))
        except RuntimeError as error:  # all of torch's are
            self._fail(error)
        finally:
            self._waiter.close()
            self._group = None  # ending it may take a while, and nobody needs to wait for it
            self.closed = True
            self._wake()


@dataclass(frozen=True, slots=True)
class _BackendWork:
    """One that the host waits for."""

    work: Work
    timeout: timedelta

    def wait(self) -> None:
        self.work.wait(self.timeout)


def nccl_pair(
    place: int, device: torch.device, timeout_s: float, wake: Callable[[], None]
) -> RankPair:
    """Over NCCL, on a stream of its own."""
    stream = torch.cuda.Stream(device)

    def make(meeting: PairStore) -> Communicator:
        torch.cuda.set_device(device)  # the thread's
        torch.cuda.set_stream(stream)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = NEVER
        return cast("Communicator", dist.ProcessGroupNCCL(meeting, place, 2, options))

    def queued(work: Work) -> QueuedCopy:
        work.wait()  # the stream does
        return recorded(stream)

    return RankPair(make, queued, lambda group: group.abort(), timeout_s, wake)


def gloo_pair(
    place: int, device: torch.device, timeout_s: float, wake: Callable[[], None]
) -> RankPair:
    """Over gloo on the loopback interface: the same on a CPU, for tests."""

    def make(meeting: PairStore) -> Communicator:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=timeout_s)
        return cast("Communicator", ProcessGroupGloo(meeting, place, 2, options))

    def queued(work: Work) -> QueuedCopy:
        return _BackendWork(work, timedelta(seconds=timeout_s))

    return RankPair(make, queued, lambda group: None, timeout_s, wake)
