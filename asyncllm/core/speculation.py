"""Decides which rows of the next step try draft tokens, and whether speculation pays off.

A draft is a row of its own in the step, after the row that it follows, at its lane's next position.
All rows are sampled; a token sampled after a wrong draft is dropped. Knows probabilities and step
times; knows neither where guesses come from nor tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from asyncllm.core.step_times import StepTimes
from asyncllm.core.steps import Lane

MOST_ROWS = 256  # per step, including drafts, unless more requests than that may run
READ_TOKENS = 4096  # prompt tokens indexed per step: takes about a millisecond
LEAST_GAIN = 1.1  # required ratio of tokens per second with drafts to those without
FREE_GAIN = 1.02  # the same if no step waits for them
FRESH = 4096  # steps without drafts after which their cost is tried again


def step_rows(num_lanes: int, most: int) -> int:
    """Maximum one-token rows in a step of ``num_lanes`` requests with ``most`` drafts each."""
    return max(num_lanes, min(num_lanes * (1 + most), MOST_ROWS))


class Speculation:
    """Decides for all requests together, since all of them wait for a longer step.

    A step with drafts cannot be planned before the previous step is over, nor can the step after
    it: the device waits for the host twice, which it otherwise does not. So drafts are only used in
    steps where they are worth that to the whole batch. Requests that have to wait for their next
    mask anyway only cost rows.

    Args:
        most: drafts per request and step.
        most_rows: rows per step, see :func:`step_rows`.
        times: step times. The cost of drafts is only known after some have been tried: until then,
            and again long after the last ones, they are assumed to cost nothing.

    Attributes:
        drafted: draft tokens tried, over all requests.
        accepted: draft tokens that were right.
        trying: drafts in launched steps for which the next step waits.
        wrong: (lane, surplus slots) of wrong drafts.
    """

    def __init__(self, most: int, most_rows: int, times: StepTimes) -> None:
        self.most, self.most_rows, self.times = most, most_rows, times
        self.drafted = self.accepted = self.trying = 0
        self.wrong: list[tuple[Lane, int]] = []
        self._without = FRESH  # decode steps since the last one with drafts

    def settled(self, wrong: list[tuple[Lane, int]], num: int) -> None:
        """The results of a step with ``num`` drafts have arrived."""
        self.wrong += wrong
        self.drafted += num
        self.accepted += num - sum(rows for _, rows in wrong)

    def over(self, *, drafts: bool) -> None:
        """A decode step has finished; ``drafts``: whether it had drafts."""
        self._without = 0 if drafts else self._without + 1

    def waits(self, chances: Sequence[Sequence[float]], num_rows: int) -> bool:
        """Whether to plan nothing before the running step is over, since the next has drafts.

        Args:
            chances: per request, of its drafts after that step, in order.
            num_rows: rows of the next step without drafts.
        """
        return bool(chances) and self._best(chances, num_rows, self.most_rows, waits=True) > 0

    def ahead(self, num_rows: int) -> int:
        """How many tokens to look ahead in each of ``num_rows`` requests: there is room for half of
        them."""
        return min(self.most, 2 * max(self.most_rows - num_rows, 0) // max(num_rows, 1))

    def choose(
        self, chances: Sequence[Sequence[float]], num_rows: int, room: int, *, waits: bool = True
    ) -> list[int]:
        """The number of drafts to try for each request.

        Args:
            chances: per request: probability that the first n drafts are all right, for each n.
            room: maximum drafts in all; there may be none, or slots may even be lacking (< 0).
            waits: whether steps wait for some of them.
        """
        least = self._best(chances, num_rows, room, waits=waits)
        taken = []
        for row in chances:
            num = min(sum(chance >= least for chance in row), room) if least else 0
            room -= num
            taken.append(num)
        return taken

    def _best(
        self, chances: Sequence[Sequence[float]], num_rows: int, room: int, *, waits: bool
    ) -> float:
        """The lowest probability a draft must have; 0: no drafts."""
        room = min(room, self.most_rows - num_rows)
        if room <= 0 or not num_rows:
            return 0.0
        falling = sorted(chain.from_iterable(chances), reverse=True)[:room]
        if not (plain_s := self.times.decoding(num_rows) / 1e3):
            return 0.0  # measure it first
        gain, gap_s = (LEAST_GAIN, self.times.gap_s) if waits else (FREE_GAIN, 0.0)
        best, least, gained = gain * num_rows / plain_s, 0.0, 0.0
        for i, chance in enumerate(falling, 1):
            gained += chance
            rows = num_rows + i
            if rows & (rows - 1) and i < len(falling):
                continue  # the next one is free
            takes_s = plain_s
            if self._without < FRESH:
                takes_s = max(takes_s, self.times.decoding(rows) / 1e3)
            speed = (num_rows + gained) / (takes_s + gap_s)
            if speed > best:
                best, least = speed, chance
        return least
