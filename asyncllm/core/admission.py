"""Admission control: a bounded queue shared fairly among clients, and its Retry-After estimate.

A client is a number that stands for an API key or an address. Knows counts and a clock that is
passed in; knows neither HTTP nor what a request asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic

from asyncllm.errors import RequestError, ServerBusy

LIMITS = "(--running_max_req_size, --max_waiting)"
HALF_LIFE_S = 30.0  # time constant of the measured rate's decay
FIRST_S = 1.0  # assumed duration of a request until one has been measured
MOST_S = 60  # OpenAI's and Anthropic's clients do not follow a longer Retry-After


class FairQuota:
    """The places of a queue. One client may take them all, but only half while others wait.

    A client that arrives while another holds more than half still gets its own half. So the queue
    may briefly hold more than ``most``, by at most half: no client grows beyond half while others
    wait.

    Args:
        most: places.
    """

    def __init__(self, most: int) -> None:
        self.most, self.half = most, max(most // 2, 1)
        self.total = 0
        self._held: dict[int, int] = {}  # clients that wait -> places, never 0

    def of(self, client: int) -> int:
        """Places that ``client`` holds."""
        return self._held.get(client, 0)

    def alone(self, client: int) -> bool:
        """Whether nobody else waits."""
        return len(self._held) == (client in self._held)

    def room(self, client: int, extra: int = 0) -> int:
        """Places that ``client`` could take now; ``extra``: free places outside the queue."""
        most, share, mine = self.most + extra, self.half + extra, self.of(client)
        if self.alone(client):
            return most - mine
        total = self.total
        if total + share > most:  # the excess of one client does not reduce others' shares
            total = sum(min(held, share) for held in self._held.values())
        return min(share - mine, most - total)

    def take(self, client: int, places: int = 1) -> None:
        self.total += places
        self._held[client] = self.of(client) + places

    def give(self, client: int, places: int = 1) -> None:
        """Free these places."""
        self.total -= places
        self._held[client] -= places
        if not self._held[client]:
            del self._held[client]


class ServiceRate:
    """The rate at which a full batch finishes requests.

    Time with a partly filled batch is weighted by the filled share, as if more requests would have
    cost nothing; a full batch soon outweighs that. The last half minute counts most.

    Args:
        places: size of the batch. Until a request has ended, each is assumed to take FIRST_S.
    """

    def __init__(self, places: int, now: float) -> None:
        self._full_s, self._ended = FIRST_S / max(places, 1), 1.0
        self._at, self._load = now, 0.0

    def pass_time(self, now: float, load: float) -> None:
        """``load``: the share of the batch in use from now on, 0 to 1."""
        spent = (now - self._at) * self._load
        kept = 0.5 ** (spent / HALF_LIFE_S)
        self._full_s = self._full_s * kept + (1 - kept) * HALF_LIFE_S / math.log(2)
        self._ended *= kept
        self._at, self._load = now, load

    def count(self) -> None:
        """A request has ended."""
        self._ended += 1

    def seconds_for(self, num: int) -> float:
        """Seconds until ``num`` requests have ended, assuming a full batch."""
        return num * self._full_s / max(self._ended, 1e-9)


class Admission:
    """Requests (choices, where one asks for several) from admission to their end.

    A request waits until its first token arrives. Requests in the batch without a token yet look
    the same as queued ones, so free places in the batch count as well.

    Args:
        max_running: places in the batch.
        max_waiting: places in the queue.

    Attributes:
        max_running: as above; it may change.
    """

    def __init__(
        self, *, max_running: int, max_waiting: int, clock: Callable[[], float] = monotonic
    ) -> None:
        self.max_running, self._clock = max_running, clock
        self._waiting = FairQuota(max_waiting)
        self._begun = 0
        self._rate = ServiceRate(max_running, clock())

    def enter(self, client: int, wanted: int) -> None:
        """Queue ``wanted`` requests of one client.

        Raises:
            RequestError: 400, more than the queue ever holds. ServerBusy: 429, no room at the
                moment.
        """
        waiting = self._waiting
        most = self.max_running + waiting.most
        if wanted > most:
            raise RequestError(
                f"n for each prompt: {wanted} choices in one request, at most {most} may run or"
                f" wait {LIMITS}",
                param="n",
                code="invalid_value",
            )
        extra = max(self.max_running - self._begun, 0)
        if wanted > waiting.room(client, extra):
            raise ServerBusy(self._refusal(client, wanted))
        waiting.take(client, wanted)
        self._pass_time()

    def begin(self, client: int) -> None:
        """A request has produced its first token."""
        self._waiting.give(client)
        self._begun += 1

    def leave(self, client: int, *, begun: bool, served: bool) -> None:
        """A request has ended; ``served``: it completed, rather than being aborted."""
        if begun:
            self._begun -= 1
        else:
            self._waiting.give(client)
        self._pass_time()
        if served:
            self._rate.count()

    def retry_after_s(self) -> int:
        """Estimated seconds until the current queue has been served, 1 to 60."""
        self._pass_time()
        queued = self._begun + self._waiting.total - self.max_running
        return min(max(math.ceil(self._rate.seconds_for(max(queued, 1))), 1), MOST_S)

    def _pass_time(self) -> None:
        live = self._waiting.total + self._begun
        self._rate.pass_time(self._clock(), min(live / max(self.max_running, 1), 1.0))

    def _refusal(self, client: int, wanted: int) -> str:
        waiting, again = self._waiting, f"try again in {self.retry_after_s()} s"
        mine, live = waiting.of(client), waiting.total + self._begun
        if mine + wanted > waiting.half and not waiting.alone(client):
            return (
                f"this client has {mine} choices waiting and asks for {wanted} more: one may hold "
                f"{waiting.half} places, half of --max_waiting, while others wait; {again}"
            )
        most = self.max_running + waiting.most
        return f"{live} choices are being generated or wait, at most {most} may {LIMITS}; {again}"
