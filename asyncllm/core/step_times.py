"""Learns how long steps take from their tokens and K/V reads: fitted at warm-up, corrected while
serving.

Knows times and sizes of steps; knows neither their contents nor what the predictions are used for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GAP_S = 0.001  # assumed idle time of the device before a step with drafts
SLOWER, FASTER = 0.1, 0.5  # weights of a new gap that is longer or shorter than the average
KNOWN = 8  # steps of a kind after which the error of its predictions is known
FORGETS = 0.998  # forgetting factor per step of a kind
# variance of the coefficients, relative to the squared time of the first step: initial, maximum
PRIOR, MOST = 3e6, 3e4
UNIT_TOKENS, UNIT_READ = 1e3, 1e5
OUTLIER = 2.0  # a step that takes more than this times its prediction, or less than the inverse ...
STUBBORN = 3  # ... is ignored, unless this many follow one another


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a step's time depends on."""

    num_tokens: int
    num_read: int  # K/V read: tokens that its rows attend to
    num_rows: int
    decodes: bool  # whether every row has one token


class TimeFit:
    """Predicts the milliseconds of steps of one kind as a + b * tokens + c * K/V read. Fitted by
    recursive least squares of relative errors, with forgetting. Takes microseconds per step."""

    def __init__(self) -> None:
        self.num_seen = 0
        self.error = 0.0  # mean relative error of recent predictions
        self._coefficients = [0.0, 0.0, 0.0]
        self._covariance = [[0.0] * 3 for _ in range(3)]
        self._most = 0.0
        self._outliers = 0

    def predict(self, num_tokens: int, num_read: int) -> float:
        """Predicted milliseconds; 0: unknown."""
        if not self.num_seen:
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
        predicted = self.predict(num_tokens, num_read)
        if predicted and self.num_seen >= KNOWN:
            off = predicted > OUTLIER * ms or ms > OUTLIER * predicted
            self._outliers = self._outliers + 1 if off else 0
            if off and self._outliers < STUBBORN:
                return
            self.error += 0.05 * (min(abs(ms / predicted - 1), 1.0) - self.error)
        if not self.num_seen:
            self._most = MOST * ms * ms
            self._covariance = [[PRIOR * ms * ms * (i == j) for j in range(3)] for i in range(3)]
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
        most = max(p[i][i] for i in range(3))
        if most > self._most and self.num_seen >= KNOWN:
            scale = self._most / most
            self._covariance = [[v * scale for v in row] for row in p]
        self.num_seen += 1


class StepTimes:
    """Predicts a rank's step times by two fits, one for decode steps and one for the others.

    Args:
        measured: steps of the warm-up and their times in milliseconds.

    Attributes:
        gap_s: idle seconds of the device before a step with drafts.
    """

    def __init__(self, measured: Iterable[tuple[StepSize, float]] = ()) -> None:
        self.gap_s = GAP_S
        self._decode, self._mixed = TimeFit(), TimeFit()
        self._read = 0.0  # K/V reads per row of the last decode step
        self._over_at = 0.0
        for size, ms in measured:
            self._learn(size, ms)

    def over(
        self, now: float, launched_at: float, size: StepSize, device_ms: float, *, drafts: bool
    ) -> None:
        """Record a finished step.

        Args:
            now: seconds, of the clock of ``launched_at``.
            device_ms: its time on the device, without gaps; 0: not measured, so the time since its
                launch and the end of the previous step is used.
            drafts: whether it had drafts.
        """
        before, self._over_at = self._over_at, now
        ms = device_ms or 1e3 * (now - max(launched_at, before))
        if ms > 0 and size.num_tokens:
            self._learn(size, ms)
            if drafts:
                gap_s = max(now - before - ms / 1e3, 0.0)
                self.gap_s += (gap_s - self.gap_s) * (FASTER if gap_s < self.gap_s else SLOWER)

    def predict(self, size: StepSize) -> float:
        """Predicted milliseconds; 0: unknown. Decode steps are alike, so few of them suffice."""
        fit = self._fit(size)
        if fit.num_seen < KNOWN and not size.decodes:
            return 0.0
        return fit.predict(size.num_tokens, size.num_read)

    def error(self, size: StepSize) -> float:
        """Mean relative error of recent predictions for such steps; 1 if there were too few."""
        fit = self._fit(size)
        return fit.error if fit.num_seen >= KNOWN else 1.0

    def decoding(self, num_rows: int) -> float:
        """Predicted time of a decode step with this many rows that read as now; 0: unknown."""
        return self._decode.predict(num_rows, round(num_rows * self._read))

    def tokens_beside(self, num_rows: int, num_read: int, share: float) -> int | None:
        """Tokens of a step in which decode rows take only ``1 - share`` of the time.

        Args:
            num_rows: decode rows; ``num_read``: their K/V reads.

        Returns:
            None: not known.
        """
        alone = self.predict(StepSize(num_rows, num_read, num_rows, decodes=True))
        return self._mixed.tokens_within(alone / (1 - share), num_read) if alone else None

    def _learn(self, size: StepSize, ms: float) -> None:
        self._fit(size).learn(size.num_tokens, size.num_read, ms)
        if size.decodes:
            self._read = size.num_read / size.num_tokens

    def _fit(self, size: StepSize) -> TimeFit:
        return self._decode if size.decodes else self._mixed
