"""Which prefill node and which decode node get a request.

Knows nodes by the numbers of their connections, what they have been given and what they say about
themselves; knows neither connections nor what becomes of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from asyncllm.core.balancing import AHEAD, AHEAD_PART, WORTH, Seen, Span

CACHE_AWARE, ROUND_ROBIN, ADAPTIVE, RANDOM = (
    "cache_aware", "round_robin", "adaptive_load", "random",
)  # fmt: skip
STRATEGIES = (CACHE_AWARE, ROUND_ROBIN, ADAPTIVE, RANDOM)
PREFILL, DECODE = "prefill", "decode"

LEAST_WEIGHT = 0.02  # of a node without free K/V, for adaptive_load
AVOIDED_S = 10.0  # a pair between which a transfer has failed


@dataclass(slots=True)
class Node:
    """One prefill or decode node.

    Args:
        peer: number of its connection; a node that comes back has another.
        role: PREFILL or DECODE.
        name: how logs and answers call it.
        total: KV slots.
    """

    peer: int
    role: str
    name: str
    total: int
    # as it said last
    used: int = 0
    cached: int = 0
    running: int = 0
    waiting: int = 0
    draining: bool = False
    # what we have given it
    requests: int = 0
    tokens: int = 0  # that it is to compute, of a prefill node; that it holds, of a decode node
    seen: Seen = field(init=False)  # beginnings of prompts that should be in its prefix cache

    def __post_init__(self) -> None:
        self.seen = Seen(self.total)

    def give(self, spans: Sequence[Span], length: int) -> int:
        """A request for a prompt of ``length`` tokens. Returns: what :meth:`take` is told."""
        known = self.seen.common(spans) if self.role == PREFILL else 0
        self.seen.add(spans)
        tokens = length - min(known, length - 1)
        self.requests += 1
        self.tokens += tokens
        return tokens

    def take(self, tokens: int) -> None:
        """That request is over for this node."""
        self.requests -= 1
        self.tokens -= tokens

    def __str__(self) -> str:
        return f"{self.role} node {self.name}"

    @property
    def load(self) -> float:
        """Share of its K/V that is taken, by what it says or by what it was given since."""
        return max(self.used, self.tokens) / max(self.total, 1)


class Nodes:
    """The nodes of a master, and its choice among them.

    Args:
        strategy: one of ``STRATEGIES``. ``cache_aware``: as ``balancing.Balancer`` chooses among
            groups: the longest known beginning of the prompt unless that node is ahead of the
            others, then the least load. ``adaptive_load``: by chance, the likelier the more K/V is
            free.
        random: what chance is.
    """

    def __init__(self, strategy: str, random: Random | None = None) -> None:
        self._strategy, self._random = strategy, random or Random()
        self._nodes: dict[int, Node] = {}
        self._turns = dict.fromkeys((PREFILL, DECODE), -1)  # the peer that was last
        self._avoided: dict[tuple[int, int], float] = {}  # pair -> until when

    def __iter__(self) -> Iterator[Node]:
        return iter([*self._nodes.values()])

    def get(self, peer: int) -> Node | None:
        """The node with this number, if it is there."""
        return self._nodes.get(peer)

    def add(self, node: Node) -> None:
        self._nodes[node.peer] = node

    def remove(self, peer: int) -> None:
        self._nodes.pop(peer, None)
        self._avoided = {pair: at for pair, at in self._avoided.items() if peer not in pair}

    def of(self, role: str) -> list[Node]:
        """Nodes that take requests."""
        return [n for n in self._nodes.values() if n.role == role and not n.draining]

    def avoid(self, prefill: int, decode: int, now: float) -> None:
        """A transfer between the two has failed."""
        self._avoided = {pair: at for pair, at in self._avoided.items() if at > now}
        self._avoided[prefill, decode] = now + AVOIDED_S

    def choose(
        self,
        role: str,
        *,
        spans: Sequence[Span],
        length: int,
        blamed: Collection[int] = (),
        prefill: int = -1,
        wanted: int = -1,
        now: float = 0.0,
    ) -> Node | None:
        """A node for a prompt of ``length`` tokens; None: none of that role takes requests.

        Args:
            spans: of the prompt; none: it may not use prefix caches.
            blamed: nodes that have failed this request: only if there are no others.
            prefill: the prefill node, for a decode node.
            wanted: this one, if it takes requests and is not blamed.
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

    def _pick(self, role: str, among: Sequence[Node], spans: Sequence[Span], length: int) -> Node:
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

    def _turn(self, role: str) -> Callable[[Node], tuple[bool, int]]:
        """Those after the last one first."""
        return lambda node: (node.peer <= self._turns[role], node.peer)

    def _rank(
        self, role: str, among: Sequence[Node], spans: Sequence[Span], length: int
    ) -> Callable[[Node], tuple[object, ...]]:
        least, worth = min(node.requests for node in among), min(WORTH, length / 2)
        turn = self._turn(role)

        def rank(node: Node) -> tuple[object, ...]:
            crowded = node.requests > least + AHEAD + least // AHEAD_PART
            known = node.seen.common(spans) if spans else 0
            load = node.tokens if role == PREFILL else node.load
            return crowded, -known if known >= worth else 0, load, node.requests, turn(node)

        return rank
