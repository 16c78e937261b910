"""Questions of one actor to others that somebody awaits the answers to.

Knows numbers and futures; knows neither what is asked nor who answers.
"""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

from asyncllm.api.common.errors import NotServing

T = TypeVar("T")


class Queries(Generic[T]):
    """The questions that have not been answered yet.

    Args:
        seconds: time for an answer.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, 0
        self._futures: dict[int, asyncio.Future[T]] = {}

    def new(self) -> int:
        """The number of a new question; :meth:`forget` or :meth:`answer_to` follows."""
        self._last += 1
        self._futures[self._last] = asyncio.get_running_loop().create_future()
        return self._last

    def forget(self, query: int) -> None:
        """It could not be asked."""
        del self._futures[query]

    def answered(self, query: int, answer: T) -> None:
        """Ignored where nobody waits any more."""
        future = self._futures.get(query)
        if future is not None and not future.done():
            future.set_result(answer)

    async def answer_to(self, query: int, who: str) -> T:
        """Wait for the answer. Raises NotServing (503): ``who`` does not give it in time."""
        future = self._futures[query]
        try:
            done, _ = await asyncio.wait((future,), timeout=self._seconds)
        finally:
            del self._futures[query]
        if not done or future.cancelled():
            raise NotServing(f"{who} did not answer within {self._seconds:g} s")
        return future.result()

    def cancel(self) -> None:
        """No more answers will come."""
        for future in self._futures.values():
            future.cancel()
