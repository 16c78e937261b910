"""The interface of a constraint: which tokens may come next in one request.

Schedulers and threads know only this. Knows token ids and masks; knows no grammar.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol


class ResampleToken(Exception):
    """A token was sampled before its mask was known, and is not allowed: sample it again."""


class Verdict(IntEnum):
    """What a constraint made of a token."""

    GOES_ON = 0
    WHOLE = 1  # accept has said True
    AGAIN = 2
    REFUSED = 3  # RequestError
    UNDONE = 4  # the thread had no time for it


@dataclass(slots=True)
class Path:
    """Tokens that are likely to come next.

    Attributes:
        tokens: each allowed after those before it.
        chances: for each n, the probability that the first n of them come.
        masks: what may follow each; empty: not known.
        num_predicted: how many of the first tokens are here because the request's prediction has
            them.
    """

    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    masks: list[bytes] = field(default_factory=list)
    num_predicted: int = 0


NO_PATH = Path()


class Constraint(Protocol):
    """Which tokens may come next in one request.

    :meth:`start`, and :meth:`accept` of a token for which :meth:`slow` is True, run in a thread,
    one at a time; nothing else is called meanwhile. All the rest runs on the event loop and takes
    microseconds.
    """

    def slow(self, token: int | None) -> bool:
        """``accept(token)``, or ``start()`` for None, may take long: it is work for a thread."""
        return False

    def start(self) -> None:
        """Called once, before everything but :meth:`slow`: makes the first mask.

        Raises:
            RequestError: no token can begin.
        """
        return None

    def mask(self) -> bytes:
        """Bit ``t % 32`` of int32 word ``t // 32`` is set where token ``t`` may come next;
        b"": all.

        At least one is set, from :meth:`start` until :meth:`accept` says True or raises.
        """

    def mask_is_stable_for(self, ahead: int) -> bool:
        """The mask will be the same after ``ahead`` more tokens; if not,
        :meth:`accept` raises ResampleToken.

        True for 0, and never takes back what it has said of the same token.
        """

    def accept(self, token: int) -> bool:
        """Advance by ``token``, and make the next mask. True: only an end token could follow.

        Raises:
            RequestError: ``token`` was not allowed, or no token can follow.
            ResampleToken: ``token`` is not taken; the mask says now what may come in its place.
        """

    def look_ahead(self, guess: Path, most: int) -> None:
        """Find the masks after up to ``most`` tokens that are likely to come, by ``guess`` and by
        what is allowed. Work for a thread, after :meth:`start` or :meth:`accept`."""
        return None

    @property
    def path(self) -> Path:
        """What :meth:`look_ahead` has found, without the tokens that have come since."""
        return NO_PATH
