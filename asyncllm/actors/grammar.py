"""Grammar compiler: compiles a grammar before a request that needs it is submitted.

Owns the threads that compile and the pending CompileGrammar messages. Knows neither requests nor
what a grammar means.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, assert_never

from asyncllm.actors.base import Actor
from asyncllm.constrain.factory import OFF
from asyncllm.core.admission import FairQuota
from asyncllm.core.fair_queue import FairQueue
from asyncllm.core.faults import contained
from asyncllm.errors import RequestError, ServerBusy
from asyncllm.messages import CompileGrammar, GrammarBuilt, GrammarReady
from asyncllm.records import Failure

Inbox = CompileGrammar | GrammarBuilt
Key = tuple[str, str]  # kind and text


class GrammarBuilder(Protocol):
    """Grammars of one vocabulary."""

    def __contains__(self, key: Key) -> bool:
        """Whether it is cached."""

    def build(self, kind: str, text: str) -> Any:
        """Compile, in a thread. Raises RequestError."""

    def keep(self, kind: str, text: str, compiled: Any) -> None:
        """Cache a compiled grammar."""


@dataclass(frozen=True, slots=True)
class _QueuedGrammar:
    number: int
    client: int
    key: Key


class GrammarCompiler(Actor[Inbox]):
    """Every CompileGrammar is answered by one GrammarReady.

    Args:
        builder: None: constrained output is off. The cost of building a grammar is bounded.
        asks: the actor that it answers.
        workers: threads that compile.
        max_queue: grammars that may wait for a thread, half of them one client's while others wait.
    """

    remote = frozenset({CompileGrammar})

    def __init__(
        self,
        builder: GrammarBuilder | None,
        *,
        asks: str = "tokenizer",
        workers: int = 2,
        max_queue: int = 64,
    ) -> None:
        super().__init__("grammar")
        self._builder, self._asks = builder, asks
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="grammar")
        self._free = workers
        self._asking: dict[Key, list[CompileGrammar]] = {}  # being compiled or queued
        self._line: FairQueue[_QueuedGrammar] = FairQueue()
        self._places = FairQuota(max_queue)
        self._last = 0

    def receive(self, batch: list[Inbox]) -> None:
        for msg in batch:
            match msg:
                case CompileGrammar():
                    self._compile(msg)
                case GrammarBuilt():
                    self._built(msg)
                case _:
                    assert_never(msg)

    def stopped(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, msg: CompileGrammar) -> None:
        key = msg.kind, msg.text
        if self._builder is None:
            self._answer(msg, Failure(OFF, param="grammar"))
        elif key in self._builder:
            self._answer(msg, None)
        elif asking := self._asking.get(key):
            asking.append(msg)
        elif self._places.room(msg.client) <= 0:
            self._answer(msg, self._busy(msg.client))
        else:
            self._asking[key] = [msg]
            self._last += 1
            self._line.append(msg.client, self._last, _QueuedGrammar(self._last, msg.client, key))
            self._places.take(msg.client)
            self._start_some()

    def _start_some(self) -> None:
        while self._free and self._line:
            self._free -= 1
            first = next(iter(self._line))
            self._line.serve(first.client, first.number)
            self._places.give(first.client)
            self.spawn(self._run(*first.key))

    async def _run(self, kind: str, text: str) -> GrammarBuilt:
        assert self._builder is not None
        try:
            compiled = await self.system.loop.run_in_executor(
                self._pool, contained, self._builder.build, kind, text
            )
        except RequestError as error:
            return GrammarBuilt(kind, text, Failure.of(error, "grammar"))
        self._builder.keep(kind, text, compiled)
        return GrammarBuilt(kind, text)

    def _built(self, msg: GrammarBuilt) -> None:
        self._free += 1
        for one in self._asking.pop((msg.kind, msg.text)):
            self._answer(one, msg.failure)
        self._start_some()

    def _answer(self, msg: CompileGrammar, failure: Failure | None) -> None:
        answer = GrammarReady(msg.job, failure, self.system.endpoint)
        self.system.ref(self._asks, msg.endpoint).tell(answer)

    def _busy(self, client: int) -> Failure:
        places = self._places
        error = ServerBusy(
            f"{places.of(client)} grammars of this client and {places.total} together wait to be "
            f"compiled, at most {places.most} may, half of them of one client while others wait; "
            "try again later"
        )
        return Failure.of(error)
