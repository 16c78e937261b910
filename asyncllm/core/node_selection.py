"""Chooses the prefill node and the decode node of a request.

Knows nodes by connection number, what they were assigned and what they report; knows neither
connections nor how requests fare.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from asyncllm.core.balancing import AHEAD, AHEAD_PART, WORTH, PromptPrefix, SeenPrefixes

CACHE_AWARE, ROUND_ROBIN, ADAPTIVE, RANDOM = (
    "cache_aware", "round_robin", "adaptive_load", "random",
)  # fmt: skip
STRATEGIES = (CACHE_AWARE, ROUND_ROBIN, ADAPTIVE, RANDOM)
PREFILL, DECODE = "prefill", "decode"

LEAST_WEIGHT = 0.02  # weight of a node without free KV slots, for adaptive_load
AVOIDED_S = 10.0  # how long a pair is avoided after a failed transfer


@dataclass(slots=True)
class EngineNode:
    """One prefill or decode node.

    Args:
        peer: number of its connection; a node that reconnects gets a new one.
        role: PREFILL or DECODE.
        name: its name in logs and answers.
        total: KV slots.
    """

    peer: int
    role: str
    name: str
    total: int
    # as last reported
    used: int = 0
    cached: int = 0
    running: int = 0
    waiting: int = 0
    draining: bool = False
    # what it has been assigned
    requests: int = 0
    tokens: int = 0  # tokens to compute on a prefill node; tokens held on a decode node
    seen: SeenPrefixes = field(init=False)  # prompt prefixes that should be in its prefix cache

    def __post_init__(self) -> None:
        self.seen = SeenPrefixes(self.total)

    def give(self, spans: Sequence[PromptPrefix], length: int) -> int:
        """Assign a request with a prompt of ``length`` tokens; returns the argument of
        :meth:`take`."""
        known = self.seen.common(spans) if self.role == PREFILL else 0
        self.seen.add(spans)
        tokens = length - min(known, length - 1)
        self.requests += 1
        self.tokens += tokens
        return tokens

    def take(self, tokens: int) -> None:
        """The request no longer counts for this node."""
        self.requests -= 1
        self.tokens -= tokens

    def __str__(self) -> str:
        return f"{self.role} node {self.name}"

    @property
    def load(self) -> float:
        """Share of its KV slots in use: the higher of what it reports and what it has been
        assigned."""
        return max(self.used, self.tokens) / max(self.total, 1)


class NodeSelector:
    """The nodes of a master, and its choice among them.

    Args:
        strategy: one of ``STRATEGIES``. ``cache_aware``: as ``GroupBalancer`` chooses among
            groups: the longest known prefix of the prompt unless that node is ahead of the others,
            then the least load. ``adaptive_load``: at random, weighted by free KV slots.
        random: source of randomness.
    """

    def __init__(self, strategy: str, random: Random | None = None) -> None:
        self._strategy, self._random = strategy, random or Random()
        self._nodes: dict[int, EngineNode] = {}
        self._turns = dict.fromkeys((PREFILL, DECODE), -1)  # the last chosen peer
        self._avoided: dict[tuple[int, int], float] = {}  # pair -> avoided until

    def __iter__(self) -> Iterator[EngineNode]:
        return iter([*self._nodes.values()])

    def get(self, peer: int) -> EngineNode | None:
        """The node with this number, if it is there."""
        return self._nodes.get(peer)

    def add(self, node: EngineNode) -> None:
        self._nodes[node.peer] = node

    def remove(self, peer: int) -> None:
        self._nodes.pop(peer, None)
        self._avoided = {pair: at for pair, at in self._avoided.items() if peer not in pair}

    def of(self, role: str) -> list[EngineNode]:
        """Nodes that accept requests."""
        return [n for n in self if n.role == role and not n.draining]

    def avoid(self, prefill: int, decode: int, now: float) -> None:
        """A transfer between the two has failed."""
        self._avoided = {pair: at for pair, at in self._avoided.items() if at > now}
        self._avoided[prefill, decode] = now + AVOIDED_S

    def choose(
        self,
        role: str,
        *,
        spans: Sequence[PromptPrefix],
        length: int,
        blamed: Collection[int] = (),
        prefill: int = -1,
        wanted: int = -1,
        now: float = 0.0,
    ) -> EngineNode | None:
        """A node for a prompt of ``length`` tokens; None: no node of that role accepts requests.

        Args:
            spans: of the prompt; empty: it may not use prefix caches.
            blamed: nodes that have failed this request; used only if there are no others.
            prefill: the prefill node, for a decode node.
            wanted: preferred if it accepts requests and is not blamed.
        """
        there = self.of(role)
        good = [n for n in there if n.peer not in blamed]
        best = [n for n in good if self._avoided.get((prefill, n.peer), 0.0) <= now]
        among = best or good or there
        if not among:
            return None
        chosen = next((n for n in best if n.peer == wanted), None) or self._pick(
            role, among, spans, length
        )
        self._turns[role] = chosen.peer
        return chosen

    def _pick(
        self, role: str, among: Sequence[EngineNode], spans: Sequence[PromptPrefix], length: int
    ) -> EngineNode:
        match self._strategy:
            case "random":
                return self._random.choice(among)
            case "adaptive_load":
                weights = [max(1 - node.load, LEAST_WEIGHT) for node in among]
                return self._random.choices(among, weights)[0]
            case "round_robin":
                return min(among, key=self._turn(role))
            case _:
                return min(among, key=self._rank(role, among, spans, length))

    def _turn(self, role: str) -> Callable[[EngineNode], tuple[bool, int]]:
        """Rotated so that those after the last chosen one come first."""
        return lambda node: (node.peer <= self._turns[role], node.peer)

    def _rank(
        self, role: str, among: Sequence[EngineNode], spans: Sequence[PromptPrefix], length: int
    ) -> Callable[[EngineNode], tuple[object, ...]]:
        least, worth = min(node.requests for node in among), min(WORTH, length / 2)
        turn = self._turn(role)

        def rank(node: EngineNode) -> tuple[object, ...]:
            crowded = node.requests > least + AHEAD + least // AHEAD_PART
            known = node.seen.common(spans) if spans else 0
            load = node.tokens if role == PREFILL else node.load
            return crowded, -known if known >= worth else 0, load, node.requests, turn(node)

        return rank
