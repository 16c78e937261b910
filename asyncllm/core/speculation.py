"""Speculation: which rows of the next step try tokens that are only guessed, and whether it pays.

A guessed token (a draft) is a row of its own in the step, behind the one that it follows: its
lane's next position. All of them are sampled; one whose input turns out to be wrong is dropped.
Knows chances and times of steps; knows neither where guesses come from nor tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from asyncllm.core.steps import Lane, Step

MOST_ROWS = 256  # of a step, drafts included, unless more requests than that may run
READ_TOKENS = 4096  # of prompts are read for a step: about a millisecond
LEAST_GAIN = 1.1  # tokens per second with drafts over those without, by which they must pay
GAP_S = 0.001  # the device waits for the host before a step with drafts, until it is measured
FRESH = 4096  # steps for which a measured time counts
SLOWER, FASTER = 0.1, 0.5  # weights of a time that is longer or shorter than those before


def step_rows(num_lanes: int, most: int) -> int:
    """Most rows of one token in a step of up to ``num_lanes`` requests and ``most`` drafts each."""
    return max(num_lanes, min(num_lanes * (1 + most), MOST_ROWS))


class StepTimes:
    """How long steps take by their number of rows, and how long the device waits between two.

    Rows are counted in powers of two. Of a time that is not known, or was measured long ago, the
    next one below that is known is taken: what has not been tried seems to cost nothing.
    """

    def __init__(self) -> None:
        self.gap_s = GAP_S
        self.known: dict[int, tuple[float, int]] = {}  # by class: seconds, the step of the last
        self._steps = 0

    def measured(self, num_rows: int, took_s: float, gap_s: float | None) -> None:
        """A step of as many rows is over.

        Args:
            gap_s: the device has waited for so long before it; None: not, or not for the host.
        """
        self._steps += 1
        kind = _class_of(num_rows)
        before = self.known.get(kind, (took_s, 0))[0]
        self.known[kind] = _mixed(before, took_s), self._steps
        if gap_s is not None:
            self.gap_s = _mixed(self.gap_s, gap_s)

    def of(self, num_rows: int) -> float:
        """Seconds; 0: nothing is known."""
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
    """Decides for all requests together, since all wait for a step that takes longer.

    A step with drafts cannot be planned before the one in front of it is over, nor the one behind
    it: the device waits for the host twice, where it otherwise does not. So drafts are for steps
    in which they are worth that to the whole batch.

    Args:
        most: drafts of one request in one step.
        most_rows: of one step, see :func:`step_rows`.

    Attributes:
        drafted: tokens that have been guessed and tried, of all requests.
        accepted: those of them that were right.
        trying: drafts in launched steps.
        wrong: lanes and how many slots they have too many, for drafts that were wrong.
    """

    def __init__(self, most: int, most_rows: int) -> None:
        self.most, self.most_rows = most, most_rows
        self.times = StepTimes()
        self.drafted = self.accepted = self.trying = 0
        self.wrong: list[tuple[Lane, int]] = []
        self._over_at = 0.0  # when the last step was

    def settled(self, wrong: list[tuple[Lane, int]], num: int) -> None:
        """The results of a step with ``num`` drafts are there."""
        self.wrong += wrong
        self.trying -= num
        self.drafted += num
        self.accepted += num - sum(rows for _, rows in wrong)

    def over(self, step: Step, now: float) -> None:
        """A launched step is over.

        Args:
            now: seconds, of the clock of ``step.launched_at``.
        """
        began = max(step.launched_at, self._over_at)
        if step.decodes and step.rows:
            gap_s = began - self._over_at if step.drafts else None
            self.times.measured(len(step.rows), now - began, gap_s)
        self._over_at = now

    def waits(self, chances: Sequence[Sequence[float]], num_rows: int) -> bool:
        """Whether to plan nothing before the running step is over: the next is to have drafts.

        Args:
            chances: by request, of its drafts once it is over, in order.
            num_rows: of the next step without drafts.
        """
        return bool(chances) and self._best(chances, num_rows, self.most_rows) > 0

    def choose(self, chances: Sequence[Sequence[float]], num_rows: int, room: int) -> list[int]:
        """How many drafts of each request are tried.

        Args:
            chances: by request, that the n-th draft is right and all before it, falling with n.
            room: most drafts in all.
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
        """The least chance that a draft must have; 0: none is tried."""
        room = min(room, self.most_rows - num_rows)
        if room <= 0 or not num_rows:
            return 0.0
        falling = sorted(chain.from_iterable(chances), reverse=True)[:room]
        if not (plain_s := self.times.of(num_rows)):
            return 0.0  # it is measured first
        best, least, gained = LEAST_GAIN * num_rows / plain_s, 0.0, 0.0
        for i, chance in enumerate(falling, 1):
            gained += chance
            rows = num_rows + i
            if rows & (rows - 1) and i < len(falling):
                continue  # the next one costs nothing more
            speed = (num_rows + gained) / (self.times.of(rows) + self.times.gap_s)
            if speed > best:
                best, least = speed, chance
        return least
