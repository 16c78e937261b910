"""Grammar keeper: makes grammars ready before a request with one is submitted.

Owns the threads that compile and the questions that wait for them. Knows neither requests nor
what a grammar means.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, assert_never

from asyncllm.actors.base import Actor
from asyncllm.errors import RequestError, ServerBusy
from asyncllm.messages import Built, Compile, Compiled

OFF = "constrained output is off on this server (--output_constraint_mode none)"

Inbox = Compile | Built
Key = tuple[str, str]  # kind and text


class Builder(Protocol):
    """Grammars of one vocabulary."""

    def __contains__(self, key: Key) -> bool:
        """Whether it is kept."""

    def build(self, kind: str, text: str) -> Any:
        """Compile, in a thread. Raises RequestError."""

    def keep(self, kind: str, text: str, compiled: Any) -> None:
        """Remember what has been built."""


class GrammarKeeper(Actor[Inbox]):
    """Every Compile is answered by one Compiled.

    Args:
        builder: None: constrained output is off.
        workers: threads that compile.
        time_limit_s: for one grammar; the thread stays taken until it is done.
        max_queue: grammars that may wait for a thread.
    """

    remote = frozenset({Compile})

    def __init__(
        self,
        builder: Builder | None,
        *,
        workers: int = 2,
        time_limit_s: float = 10.0,
        max_queue: int = 64,
    ) -> None:
        super().__init__("grammar")
        self._builder, self._time_limit_s, self._max_queue = builder, time_limit_s, max_queue
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="grammar")
        self._workers = self._free = workers
        self._asking: dict[Key, list[Compile]] = {}  # being compiled or in line
        self._late: set[Key] = set()  # being compiled, answered already
        self._line: deque[Key] = deque()

    def receive(self, batch: list[Inbox]) -> None:
        for msg in batch:
            match msg:
                case Compile():
                    self._compile(msg)
                case Built():
                    self._built(msg)
                case _:
                    assert_never(msg)

    def stopped(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, msg: Compile) -> None:
        key = msg.kind, msg.text
        if self._builder is None:
            self._answer(msg, RequestError(OFF))
        elif key in self._builder:
            self._answer(msg, None)
        elif key in self._late:
            self._answer(msg, self._too_slow())
        elif asking := self._asking.get(key):
            asking.append(msg)
        elif len(self._late) == self._workers or len(self._line) >= self._max_queue:
            self._answer(msg, self._busy())
        else:
            self._asking[key] = [msg]
            self._line.append(key)
            self._start_some()

    def _start_some(self) -> None:
        while self._free and self._line:
            self._free -= 1
            self.spawn(self._run(*self._line.popleft()))

    async def _run(self, kind: str, text: str) -> Built:
        assert self._builder is not None
        work = self.system.loop.run_in_executor(self._pool, self._builder.build, kind, text)
        try:
            async with asyncio.timeout(self._time_limit_s):
                compiled = await asyncio.shield(work)
        except TimeoutError:
            self._late.add((kind, text))
            self.spawn(self._wait(kind, text, work))
            return Built(kind, text, self._too_slow().message, False)
        except RequestError as error:
            return Built(kind, text, error.message, True)
        self._builder.keep(kind, text, compiled)
        return Built(kind, text, "", True)

    async def _wait(self, kind: str, text: str, work: asyncio.Future[Any]) -> Built:
        """Frees the thread of a grammar that has been answered already."""
        assert self._builder is not None
        with contextlib.suppress(RequestError):
            self._builder.keep(kind, text, await work)
        self._late.discard((kind, text))
        return Built(kind, text, "", True)

    def _built(self, msg: Built) -> None:
        error = RequestError(msg.detail) if msg.detail else None
        for one in self._asking.pop((msg.kind, msg.text), ()):
            self._answer(one, error)
        if msg.frees:
            self._free += 1
        elif len(self._late) == self._workers:
            # nobody knows when a thread will be free again
            while self._line:
                for one in self._asking.pop(self._line.popleft()):
                    self._answer(one, self._busy())
        self._start_some()

    def _answer(self, msg: Compile, error: RequestError | None) -> None:
        tokenizer = self.system.ref("tokenizer", msg.endpoint)
        if error is None:
            tokenizer.tell(Compiled(msg.job, "", "", 0))
        else:
            tokenizer.tell(Compiled(msg.job, error.message, error.code or "", error.status))

    def _too_slow(self) -> RequestError:
        return RequestError(f"the grammar could not be compiled in {self._time_limit_s:g} s")

    def _busy(self) -> ServerBusy:
        return ServerBusy("other grammars are being compiled, try again later")
