"""When to launch the next step: early enough for the device, late enough for new requests.

Knows times; does not know the contents of steps.
"""

from __future__ import annotations

MARGIN_S = 0.0025  # lead before the running step ends: one launch plus a timer's millisecond
SHARE = 0.25  # safety margin as a share of the last step, since this one may be shorter
ROW_S = 30e-6  # publishing cost per row, which keeps the loop busy
LEAST_S = 0.001  # shorter waits are not worth a timer


class Pacer:
    """Paces a pipeline of two steps.

    A launched step can no longer take in requests. If it were launched as soon as there is room in
    the pipeline, it would sit in the device's queue for the length of a step, and requests that
    arrive meanwhile would wait for it too. So while no request waits, it is launched shortly before
    the running step ends.
    """

    def __init__(self) -> None:
        self._began = 0.0  # when the step in flight began, approximately
        self._takes = 0.0  # duration of the last one; 0: not a decode step, or not measured
        self._margin = 0.0

    def over(self, now: float, device_ms: float, num_decode: int) -> None:
        """A step is over.

        Args:
            now: seconds, of any clock that does not go back.
            device_ms: its time on the device, without gaps; 0: unknown.
            num_decode: rows of a decode-only step; 0: any other step.
        """
        self._began = now
        self._takes = device_ms / 1e3 if num_decode else 0.0
        self._margin = max(MARGIN_S, SHARE * self._takes) + ROW_S * num_decode

    def pause(self, now: float) -> float:
        """Seconds until the step after the running decode step must be launched; 0: now."""
        due = self._began + self._takes - self._margin
        return due - now if due - now >= LEAST_S else 0.0
