"""When to launch the next step: early enough for the device, late enough for new requests.

Knows times; knows no steps' contents.
"""

from __future__ import annotations

MARGIN_S = 0.0025  # before the end of the step in front: a launch, and a timer's millisecond
SHARE = 0.25  # and this much of the step, which may be shorter than the last one
ROW_S = 30e-6  # and this for each row: passing on its token keeps the loop busy
LEAST_S = 0.001  # shorter pauses are not worth a timer


class Pacer:
    """Of a pipeline of two steps.

    A launched step cannot take in a request any more. Launched as soon as the step before the last
    is over, it lies in front of the device for the length of a step, and whoever comes meanwhile
    waits for it too. So while nobody waits, it is launched shortly before its turn.
    """

    def __init__(self) -> None:
        self._began = 0.0  # the step in flight, about
        self._takes = 0.0  # what the last one took; 0: no decode step, or the device cannot tell
        self._margin = 0.0

    def over(self, now: float, device_ms: float, num_decode: int) -> None:
        """A step is over.

        Args:
            now: seconds, of any clock that does not go back.
            device_ms: what it took on the device, without gaps; 0: not known.
            num_decode: rows of a step that decodes only; 0: another.
        """
        self._began = now
        self._takes = device_ms / 1e3 if num_decode else 0.0
        self._margin = max(MARGIN_S, SHARE * self._takes) + ROW_S * num_decode

    def pause(self, now: float) -> float:
        """Seconds until a step must be launched behind the decode step that is in flight;
        0: now."""
        due = self._began + self._takes - self._margin
        return due - now if due - now >= LEAST_S else 0.0
