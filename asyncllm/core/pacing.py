"""Decides when to launch the next step and its number of prompt tokens, by predicted step times.

Knows times and counts of tokens; does not know the contents of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

MARGIN_S = 0.0025  # lead before the running step ends: one launch plus a timer's millisecond
LEAST_SHARE, MOST_SHARE = 0.05, 0.25  # safety margin as a share of the running step
ERRORS = 3.0  # that share, in mean errors of recent predictions
ROW_S = 30e-6  # publishing cost per row, which keeps the loop busy
LEAST_S = 0.001  # shorter waits are not worth a timer
LEAST_ROOM = 64  # prompt tokens allowed in any step, whatever the share
KNOWN = 8  # steps of a kind after which its times are predicted
FORGETS = 0.998  # forgetting factor per step of a kind
PRIOR = 1e6  # prior variance of the coefficients, in ms by the units below
UNIT_TOKENS, UNIT_READ = 1e3, 1e5
OUTLIER = 2.0  # a step that takes more than this times its prediction, or less than the inverse ...
STUBBORN = 3  # ... is ignored, unless this many follow one another


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a step's time depends on."""

    num_tokens: int
    num_read: int  # K/V read: tokens that its rows attend to
    num_rows: int
    decodes: bool  # every row has one token


class TimeFit:
    """Predicts the milliseconds of steps of one kind as a + b * tokens + c * K/V read. Fitted by
    recursive least squares of relative errors, with forgetting. Takes microseconds per step."""

    def __init__(self) -> None:
        self.num_seen = 0
        self.error = 0.0  # mean relative error of recent predictions
        self._coefficients = [0.0, 0.0, 0.0]
        self._covariance = [[PRIOR * (i == j) for j in range(3)] for i in range(3)]
        self._outliers = 0

    def predict(self, num_tokens: int, num_read: int) -> float:
        """Predicted milliseconds; 0: not known yet."""
        if self.num_seen < KNOWN:
            return 0.0
        a, b, c = self._coefficients
        return max(a + b * num_tokens / UNIT_TOKENS + c * num_read / UNIT_READ, 0.0)

    def tokens_within(self, ms: float, num_read: int) -> int | None:
        """The most tokens that a step of ``ms`` can have; None: not known."""
        a, b, c = self._coefficients
        if self.num_seen < KNOWN or b <= 0:
            return None
        return int((ms - a - c * num_read / UNIT_READ) / b * UNIT_TOKENS)

    def learn(self, num_tokens: int, num_read: int, ms: float) -> None:
        """Learn that a step took ``ms`` > 0."""
        if foretold := self.predict(num_tokens, num_read):
            off = foretold > OUTLIER * ms or ms > OUTLIER * foretold
            self._outliers = self._outliers + 1 if off else 0
            if off and self._outliers < STUBBORN:
                return
            self.error += 0.05 * (min(abs(ms / foretold - 1), 1.0) - self.error)
        x = [1 / ms, num_tokens / UNIT_TOKENS / ms, num_read / UNIT_READ / ms]
        p = self._covariance
        px = [sum(row[j] * x[j] for j in range(3)) for row in p]
        gain = [v / (FORGETS + sum(map(float.__mul__, x, px))) for v in px]
        missed = 1.0 - sum(map(float.__mul__, x, self._coefficients))
        for i in range(3):
            self._coefficients[i] += gain[i] * missed
            for j in range(3):
                # forget without bound only what steps provide information about
                p[i][j] = (p[i][j] - gain[i] * px[j]) / FORGETS
        if max(p[i][i] for i in range(3)) > PRIOR:
            scale = PRIOR / max(p[i][i] for i in range(3))
            self._covariance = [[v * scale for v in row] for row in p]
        self.num_seen += 1


class Pacer:
    """Paces a pipeline of two steps.

    A launched step can no longer take in requests. If it were launched as soon as there is room in
    the pipeline, it would sit in the device's queue for the length of a step, and requests that
    arrive meanwhile would wait for it too. So while no request waits, it is launched shortly before
    the running step ends. If that ends earlier than predicted, the next one is launched at once: a
    wrong prediction leaves the device idle for one launch at most.

    Args:
        prefill_share: share of the time of a mixed step that prompts may take; 1: all of it.
    """

    def __init__(self, prefill_share: float = 1.0) -> None:
        self._prefill_share = prefill_share
        self._began = 0.0  # when the running step began, approximately
        self._decode, self._mixed = TimeFit(), TimeFit()
        self._last = 0.0  # milliseconds of the last step with decode rows

    def launched(self, now: float, *, idle: bool) -> None:
        """A step has been launched; ``idle``: the device had nothing to do."""
        if idle:
            self._began = now

    def over(self, now: float, device_ms: float, size: StepSize) -> None:
        """A step is over.

        Args:
            now: seconds, of any monotonic clock.
            device_ms: its time on the device, without gaps; 0: unknown.
        """
        self._began = now
        if device_ms > 0 and size.num_tokens:
            self._times(size).learn(size.num_tokens, size.num_read, device_ms)
            if size.decodes:
                self._last = device_ms

    def pause(self, now: float, running: StepSize) -> float:
        """Seconds until the step after ``running`` must be launched; 0: now."""
        times = self._times(running)
        share = min(max(LEAST_SHARE, ERRORS * times.error), MOST_SHARE)
        takes = times.predict(running.num_tokens, running.num_read) / 1e3
        if not takes and running.decodes:  # the first ones
            takes, share = self._last / 1e3, MOST_SHARE
        margin = max(MARGIN_S, share * takes) + ROW_S * running.num_rows
        due = self._began + takes - margin
        return due - now if due - now >= LEAST_S else 0.0

    def prompt_room(self, num_rows: int, num_read: int) -> int | None:
        """Prompt tokens that a step with ``num_rows`` decode rows may have; None: any number."""
        if self._prefill_share >= 1:
            return None
        alone = self._decode.predict(num_rows, num_read)
        most = self._mixed.tokens_within(alone / (1 - self._prefill_share), num_read)
        if not alone or most is None:
            return None
        return max(most - num_rows, LEAST_ROOM)

    def _times(self, size: StepSize) -> TimeFit:
        return self._decode if size.decodes else self._mixed
