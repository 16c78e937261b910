"""Decides when to launch the next step and its number of prompt tokens, by predicted step times.

Does not know the contents of steps.
"""

from __future__ import annotations

from asyncllm.core.step_times import StepSize, StepTimes

MARGIN_S = 0.0025  # lead before the running step ends: one launch plus a timer's millisecond
LEAST_SHARE, MOST_SHARE = 0.05, 0.25  # safety margin as a share of the running step
ERRORS = 3.0  # that share, in mean errors of recent predictions
ROW_S = 30e-6  # publishing cost per row, which keeps the loop busy
LEAST_S = 0.001  # shorter waits are not worth a timer
NEXT_S = 0.01  # within which clients that send one request after another send the next
LEAST_ROOM = 64  # prompt tokens allowed in any step, whatever the share


class Pacer:
    """Paces a pipeline of two steps.

    A launched step can no longer take in requests. If it were launched as soon as there is room in
    the pipeline, it would sit in the device's queue for the length of a step, and requests that
    arrive meanwhile would wait for it too. So while no request waits, it is launched shortly before
    the running step ends. If that ends earlier than predicted, the next one is launched at once: a
    wrong prediction leaves the device idle for one launch at most.

    Clients often send their next request as soon as one has ended. While such are expected, the
    step is not launched for the first of them: prompts of requests whose predecessors ended
    together run in one step, and decoding requests wait for it once.

    Args:
        times: of steps.
        prefill_share: share of the time of a mixed step that prompts may take; 1: all of it.
    """

    def __init__(self, times: StepTimes, prefill_share: float = 1.0) -> None:
        self.times = times
        self._prefill_share = prefill_share
        self._began = 0.0  # when the running step began, approximately
        self._expected, self._ended_at = 0, 0.0  # newcomers in the place of requests that ended
        self._timed = False  # whether the device measures steps; a CPU does not, and is not paced

    def launched(self, now: float, *, idle: bool) -> None:
        """A step has been launched; ``idle``: the device had nothing to do."""
        if idle:
            self._began = now

    def over(self, now: float, device_ms: float) -> None:
        """A step has finished.

        Args:
            now: seconds, of any monotonic clock.
            device_ms: its time on the device; 0: unknown.
        """
        self._began, self._timed = now, device_ms > 0

    def ended(self, now: float, num: int) -> None:
        """So many requests have ended."""
        if num:
            self._expected = num + (self._expected if self._expects(now) else 0)
            self._ended_at = now

    def came(self) -> None:
        """A request has come."""
        self._expected = max(self._expected - 1, 0)

    def _expects(self, now: float) -> bool:
        return self._expected > 0 and now - self._ended_at < NEXT_S

    def pause(self, now: float, running: StepSize, *, waiting: bool = False) -> float:
        """Seconds until the step after ``running`` must be launched; 0: now.

        Args:
            waiting: whether a request waits.
        """
        if waiting and not self._expects(now):
            return 0.0
        takes = self.times.predict(running) / 1e3
        if not takes or not self._timed:
            return 0.0
        share = min(max(LEAST_SHARE, ERRORS * self.times.error(running)), MOST_SHARE)
        margin = max(MARGIN_S, share * takes) + ROW_S * running.num_rows
        due = self._began + takes - margin
        return due - now if due - now >= LEAST_S else 0.0

    def prompt_room(self, num_rows: int, num_read: int) -> int | None:
        """Prompt tokens that a step with ``num_rows`` decode rows may have; None: any number."""
        if self._prefill_share >= 1:
            return None
        most = self.times.tokens_beside(num_rows, num_read, self._prefill_share)
        return None if most is None else max(most - num_rows, LEAST_ROOM)
