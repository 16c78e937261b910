"""Decides which rows of the next step try draft tokens, and whether speculation pays off.

A draft is a row of its own in the step, after the row that it follows, at its lane's next position.
All rows are sampled; a token sampled after a wrong draft is dropped. Knows probabilities and step
times; knows neither where guesses come from nor tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from asyncllm.core.steps import Lane, Step

MOST_ROWS = 256  # per step, including drafts, unless more requests than that may run
READ_TOKENS = 4096  # prompt tokens indexed per step: takes about a millisecond
LEAST_GAIN = 1.1  # required ratio of tokens per second with drafts to those without
GAP_S = 0.001  # initial estimate of the device's idle time before a step with drafts
FRESH = 4096  # steps for which a measurement is valid
SLOWER, FASTER = 0.1, 0.5  # weights of a new time that is longer or shorter than the average


def step_rows(num_lanes: int, most: int) -> int:
    """Maximum one-token rows in a step of ``num_lanes`` requests with ``most`` drafts each."""
    return max(num_lanes, min(num_lanes * (1 + most), MOST_ROWS))


class StepTimes:
    """Measured step times by number of rows, and the device's idle time between two steps.

    Rows are counted in powers of two. If a time is unknown or outdated, the next smaller known one
    is used, so that untried sizes seem to cost nothing.
    """

    def __init__(self) -> None:
        self.gap_s = GAP_S
        self.known: dict[int, tuple[float, int]] = {}  # by class: seconds, step measured last
        self._steps = 0

    def measured(self, num_rows: int, took_s: float, gap_s: float | None) -> None:
        """Record a finished step with that many rows.

        Args:
            gap_s: how long the device was idle before it; None: it was not, or not due to the host.
        """
        self._steps += 1
        kind = _class_of(num_rows)
        before = self.known.get(kind, (took_s, 0))[0]
        self.known[kind] = _mixed(before, took_s), self._steps
        if gap_s is not None:
            self.gap_s = _mixed(self.gap_s, gap_s)

    def of(self, num_rows: int) -> float:
        """Expected seconds; 0: unknown."""
        for kind in range(_class_of(num_rows), -1, -1):
            took_s, at = self.known.get(kind, (0.0, 0))
            if took_s and self._steps - at < FRESH:
                return took_s
        return 0.0


def _class_of(num_rows: int) -> int:
    return (num_rows - 1).bit_length()


def _mixed(old: float, new: float) -> float:
    return old + (new - old) * (FASTER if new < old else SLOWER)


class Speculation:
    """Decides for all requests together, since all of them wait for a longer step.

    A step with drafts cannot be planned before the previous step is over, nor can the step after
    it: the device waits for the host twice, which it otherwise does not. So drafts are only used in
    steps where they are worth that to the whole batch.

    Args:
        most: drafts per request and step.
        most_rows: rows per step, see :func:`step_rows`.

    Attributes:
        drafted: draft tokens tried, over all requests.
        accepted: draft tokens that were right.
        trying: drafts in launched steps.
        wrong: (lane, surplus slots) of wrong drafts.
    """

    def __init__(self, most: int, most_rows: int) -> None:
        self.most, self.most_rows = most, most_rows
        self.times = StepTimes()
        self.drafted = self.accepted = self.trying = 0
        self.wrong: list[tuple[Lane, int]] = []
        self._over_at = 0.0  # when the last step ended

    def settled(self, wrong: list[tuple[Lane, int]], num: int) -> None:
        """The results of a step with ``num`` drafts have arrived."""
        self.wrong += wrong
        self.trying -= num
        self.drafted += num
        self.accepted += num - sum(rows for _, rows in wrong)

    def over(self, step: Step, now: float) -> None:
        """A launched step has finished.

        Args:
            now: seconds, of the clock of ``step.launched_at``.
        """
        began = max(step.launched_at, self._over_at)
        if step.decodes and step.rows:
            gap_s = began - self._over_at if step.drafts else None
            self.times.measured(len(step.rows), now - began, gap_s)
        self._over_at = now

    def waits(self, chances: Sequence[Sequence[float]], num_rows: int) -> bool:
        """Whether to plan nothing before the running step is over, since the next has drafts.

        Args:
            chances: per request, of its drafts after that step, in order.
            num_rows: rows of the next step without drafts.
        """
        return bool(chances) and self._best(chances, num_rows, self.most_rows) > 0

    def choose(self, chances: Sequence[Sequence[float]], num_rows: int, room: int) -> list[int]:
        """The number of drafts to try for each request.

        Args:
            chances: per request: probability that the first n drafts are all right, for each n.
            room: maximum drafts in all.
        """
        least = self._best(chances, num_rows, room)
        taken = []
        for row in chances:
            num = 0
            if least > 0:
                num = sum(chance >= least for chance in row)
            num = min(num, room)
            room -= num
            taken.append(num)
        return taken

    def _best(self, chances: Sequence[Sequence[float]], num_rows: int, room: int) -> float:
        """The lowest probability a draft must have; 0: no drafts."""
        room = min(room, self.most_rows - num_rows)
        if room <= 0 or not num_rows:
            return 0.0
        falling = sorted(chain.from_iterable(chances), reverse=True)[:room]
        if not (plain_s := self.times.of(num_rows)):
            return 0.0  # measure it first
        best, least, gained = LEAST_GAIN * num_rows / plain_s, 0.0, 0.0
        for i, chance in enumerate(falling, 1):
            gained += chance
            rows = num_rows + i
            if rows & (rows - 1) and i < len(falling):
                continue  # the next one is free
            speed = (num_rows + gained) / (self.times.of(rows) + self.times.gap_s)
            if speed > best:
                best, least = speed, chance
        return least
