"""Chooses the group that serves a request, where a server has several.

Knows groups by number, requests by id and prompt, and the prompts that each group was sent of late;
knows neither what their caches really hold nor who carries a request there.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

CACHE_AWARE, ROUND_ROBIN, FEWEST = "cache_aware", "round_robin", "bs_balancer"
POLICIES = (CACHE_AWARE, ROUND_ROBIN, FEWEST)

# a known beginning counts from so many tokens on, or half of a shorter prompt: chats begin alike
WORTH = 128
AHEAD, AHEAD_PART = 4, 4  # requests that a group may have more than the idlest, and a part of those
MOST_SPANS = 1 << 16  # kept of a group's prompts; some 10 MB
FIRST_SPAN, LONGEST_PROMPT = 4, 1 << 24


def _ends() -> list[int]:
    """Where spans of prompts end: each is an eighth of what is before it, so that they are few."""
    ends = [FIRST_SPAN]
    while ends[-1] < LONGEST_PROMPT:
        ends.append(ends[-1] + max(FIRST_SPAN, ends[-1] // 8))
    return ends


_SPANS = list(pairwise([0, *_ends()]))


class Span(NamedTuple):
    """The end of a beginning of a prompt; equal keys: all tokens up to there are equal."""

    key: int
    end: int
    length: int


def spans_of(prompt: array[int]) -> list[Span]:
    """The prompt's spans in order, but for a rest at its end. Bytes are hashed with a secret."""
    spans, key, ids = list[Span](), 0, prompt.tobytes()
    for begin, end in _SPANS:
        if end > len(prompt):
            break
        key = hash((key, ids[begin * prompt.itemsize : end * prompt.itemsize]))
        spans.append(Span(key, end, end - begin))
    return spans


class Seen:
    """Beginnings of prompts that one prefix cache should have, least recent first.

    Args:
        num_slots: tokens that it holds.
    """

    def __init__(self, num_slots: int) -> None:
        self._room = num_slots
        self._spans: OrderedDict[int, int] = OrderedDict()  # key -> tokens

    def __len__(self) -> int:
        return len(self._spans)

    def common(self, spans: Sequence[Span]) -> int:
        """Tokens at the beginning that have been seen, up to an eighth less."""
        end = 0
        for key, last, _ in spans:
            if key not in self._spans:
                break
            end = last
        return end

    def add(self, spans: Sequence[Span]) -> None:
        for key, _, length in reversed(spans):  # so that ends are forgotten before beginnings
            if key in self._spans:
                self._spans.move_to_end(key)
            else:
                self._room -= length
                self._spans[key] = length
        while self._room < 0 or len(self._spans) > MOST_SPANS:
            self._room += self._spans.popitem(last=False)[1]


@dataclass(slots=True)
class _Request:
    group: int
    waiting: int  # prompt tokens that are to be computed; 0: it is in the batch


class GroupBalancer:
    """Gives each request to a group and counts what the groups have.

    ``cache_aware``: the longest known beginning of the prompt, if it is half of it or 128 tokens,
    then the least load: prompt tokens that wait plus requests in the batch. A group that is ahead
    of the one with fewest requests by more than 4 and a quarter gets none, so that a beginning that
    all share does not bring all to one group. ``bs_balancer``: fewest requests, those that wait
    included. ``round_robin``: in turn. Where groups are equal they take turns.

    Args:
        num_groups: groups 0, 1, ...
        policy: one of ``POLICIES``.
        num_slots: tokens that the K/V of a group holds: of many prompts it has but the last.
        together: requests for one prompt go to one group, which computes it once.
    """

    def __init__(
        self, num_groups: int, policy: str, *, num_slots: int, together: bool = False
    ) -> None:
        self._policy, self._together = policy, together
        self._requests: dict[int, _Request] = {}
        self._groups: list[int] = [*range(num_groups)]  # without those that are lost
        self._num = [0] * num_groups
        self._waiting = [0] * num_groups  # tokens
        self._running = [0] * num_groups
        self._seen = [Seen(num_slots) for _ in range(num_groups)]
        self._next = 0  # whose turn it is

    @property
    def num_requests(self) -> list[int]:
        """Of each group: requests that have not ended."""
        return self._num.copy()

    @property
    def rids(self) -> list[int]:
        """Of the requests that have not ended."""
        return [*self._requests]

    def __contains__(self, rid: object) -> bool:
        return rid in self._requests

    def group_of(self, rid: int) -> int | None:
        """Where a request is; None: it has ended, or never was."""
        return request.group if (request := self._requests.get(rid)) else None

    def lose(self, group: int) -> list[int]:
        """Give it nothing any more; the requests that it had, which are forgotten."""
        self._groups.remove(group)
        rids = [rid for rid, request in self._requests.items() if request.group == group]
        self.ended(rids)
        return rids

    def place(self, rid: int, prompt: array[int], *, after: int = -1, cached: bool = True) -> int:
        """The group of a new request.

        Args:
            after: an earlier request for the same prompt, if any.
            cached: it may use the prefix cache.
        """
        spans = spans_of(prompt) if cached and self._policy == CACHE_AWARE else []
        common = [seen.common(spans) for seen in self._seen]
        first = self._requests.get(after) if self._together else None  # never in a lost group
        group = self._choose(len(prompt), common) if first is None else first.group
        self._seen[group].add(spans)
        request = _Request(group, len(prompt) - min(common[group], len(prompt) - 1))
        self._requests[rid] = request
        self._num[group] += 1
        self._waiting[group] += request.waiting
        return group

    def began(self, rids: Iterable[int]) -> None:
        """These requests wait no longer; unknown ones are ignored."""
        for rid in rids:
            request = self._requests.get(rid)
            if request is not None and request.waiting:
                self._waiting[request.group] -= request.waiting
                self._running[request.group] += 1
                request.waiting = 0

    def ended(self, rids: Iterable[int]) -> None:
        """These requests are over; unknown ones are ignored."""
        for rid in rids:
            if (request := self._requests.pop(rid, None)) is not None:
                self._num[request.group] -= 1
                self._waiting[request.group] -= request.waiting
                self._running[request.group] -= not request.waiting

    def _choose(self, prompt_len: int, common: Sequence[int]) -> int:
        num, turn = len(self._num), self._next
        least, worth = min(self._num[g] for g in self._groups), min(WORTH, prompt_len / 2)

        def rank(group: int) -> tuple[int, ...]:
            after_turn = (group - turn) % num
            match self._policy:
                case "round_robin":
                    return (after_turn,)
                case "bs_balancer":
                    return self._num[group], after_turn
                case _:
                    crowded = self._num[group] > least + AHEAD + least // AHEAD_PART
                    known = common[group] if common[group] >= worth else 0
                    load = self._waiting[group] + self._running[group]
                    return crowded, -known, load, after_turn

        group = min(self._groups, key=rank)
        self._next = (group + 1) % num
        return group
