"""Chooses the data-parallel group that serves a request.

Knows groups by number, requests by id and prompt, and the prompts recently sent to each group; does
not know what their caches really hold or how a request gets there.
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

# a known prefix counts from this length on, or half of a shorter prompt: chats share a preamble
WORTH = 128
AHEAD, AHEAD_PART = 4, 4  # lead over the least busy group: number of requests, and its fraction
MOST_SPANS = 1 << 16  # remembered per group; about 10 MB
FIRST_SPAN, LONGEST_PROMPT = 4, 1 << 24


def _ends() -> list[int]:
    """Ends of prompt spans: each span is an eighth of what precedes it, so there are few."""
    ends = [FIRST_SPAN]
    while ends[-1] < LONGEST_PROMPT:
        ends.append(ends[-1] + max(FIRST_SPAN, ends[-1] // 8))
    return ends


_SPANS = list(pairwise([0, *_ends()]))


class PromptPrefix(NamedTuple):
    """The end of a prompt prefix; equal keys mean that all tokens up to there are equal."""

    key: int
    end: int
    length: int


def spans_of(prompt: array[int]) -> list[PromptPrefix]:
    """The prompt's spans in order, without the remainder at its end. Hashes are keyed by a
    secret."""
    spans, key, ids = list[PromptPrefix](), 0, prompt.tobytes()
    for begin, end in _SPANS:
        if end > len(prompt):
            break
        key = hash((key, ids[begin * prompt.itemsize : end * prompt.itemsize]))
        spans.append(PromptPrefix(key, end, end - begin))
    return spans


class SeenPrefixes:
    """Prompt prefixes that one prefix cache should hold, least recently used first.

    Args:
        num_slots: its capacity in tokens.
    """

    def __init__(self, num_slots: int) -> None:
        self._room = num_slots
        self._spans: OrderedDict[int, int] = OrderedDict()  # key -> tokens

    def __len__(self) -> int:
        return len(self._spans)

    def common(self, spans: Sequence[PromptPrefix]) -> int:
        """Length in tokens of the longest known prefix, or up to an eighth less."""
        end = 0
        for key, last, _ in spans:
            if key not in self._spans:
                break
            end = last
        return end

    def add(self, spans: Sequence[PromptPrefix]) -> None:
        for key, _, length in reversed(spans):  # longer prefixes are evicted first
            if key in self._spans:
                self._spans.move_to_end(key)
            else:
                self._room -= length
                self._spans[key] = length
        while self._room < 0 or len(self._spans) > MOST_SPANS:
            self._room += self._spans.popitem(last=False)[1]


@dataclass(slots=True)
class _AssignedRequest:
    group: int
    waiting: int  # prompt tokens still to compute; 0: it is in the batch


class GroupBalancer:
    """Assigns each request to a group and tracks the load of the groups.

    ``cache_aware``: the longest known prefix of the prompt, if it is half the prompt or 128 tokens,
    then the least load: waiting prompt tokens plus requests in the batch. A group that has more
    than 4 and a quarter more requests than the one with the fewest gets none, so that a prefix
    shared by all requests does not send them all to one group. ``bs_balancer``: fewest requests,
    waiting ones included. ``round_robin``: in turn. Ties are broken in turn.

    Args:
        num_groups: groups 0, 1, ...
        policy: one of ``POLICIES``.
        num_slots: KV capacity of a group in tokens, which bounds the prefixes it can still hold.
        together: requests with the same prompt go to one group, which computes it once.
    """

    def __init__(
        self, num_groups: int, policy: str, *, num_slots: int, together: bool = False
    ) -> None:
        self._policy, self._together = policy, together
        self._requests: dict[int, _AssignedRequest] = {}
        self._groups: list[int] = [*range(num_groups)]  # lost groups excluded
        self._num = [0] * num_groups
        self._waiting = [0] * num_groups  # tokens
        self._running = [0] * num_groups
        self._seen = [SeenPrefixes(num_slots) for _ in range(num_groups)]
        self._next = 0  # whose turn it is

    @property
    def num_requests(self) -> list[int]:
        """Unfinished requests, per group."""
        return self._num.copy()

    @property
    def rids(self) -> list[int]:
        """Of all unfinished requests."""
        return [*self._requests]

    def __contains__(self, rid: object) -> bool:
        return rid in self._requests

    def group_of(self, rid: int) -> int | None:
        """The group of a request; None: it has ended or is unknown."""
        return request.group if (request := self._requests.get(rid)) else None

    def lose(self, group: int) -> list[int]:
        """Stop using a group; returns its requests, which are forgotten."""
        self._groups.remove(group)
        rids = [rid for rid, request in self._requests.items() if request.group == group]
        self.ended(rids)
        return rids

    def place(self, rid: int, prompt: array[int], *, after: int = -1, cached: bool = True) -> int:
        """Choose the group of a new request.

        Args:
            after: an earlier request with the same prompt, if any.
            cached: it may use the prefix cache.
        """
        spans = spans_of(prompt) if cached and self._policy == CACHE_AWARE else []
        common = [seen.common(spans) for seen in self._seen]
        first = self._requests.get(after) if self._together else None  # never in a lost group
        group = self._choose(len(prompt), common) if first is None else first.group
        self._seen[group].add(spans)
        request = _AssignedRequest(group, len(prompt) - min(common[group], len(prompt) - 1))
        self._requests[rid] = request
        self._num[group] += 1
        self._waiting[group] += request.waiting
        return group

    def began(self, rids: Iterable[int]) -> None:
        """These requests have left the queue; unknown ones are ignored."""
        for rid in rids:
            request = self._requests.get(rid)
            if request is not None and request.waiting:
                self._waiting[request.group] -= request.waiting
                self._running[request.group] += 1
                request.waiting = 0

    def ended(self, rids: Iterable[int]) -> None:
        """These requests have ended; unknown ones are ignored."""
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
