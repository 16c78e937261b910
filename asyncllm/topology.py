"""Which processes a server has, their roles, and which actors each of them runs: plain data.

The single source for where an actor lives and who is in a tensor-parallel group. Starts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from asyncllm.codec import record

# In start order; they stop in reverse order, so that the frontend's last answers still reach the
# others.
ACTORS = (
    "allocator", "grammar", "kv_transfer", "scheduler", "balancer", "lockstep", "runner",
    "director", "agent", "config_client", "registry",
    "detokenizer", "tokenizer", "frontend", "watchdog",
)  # fmt: skip

LEADER, FOLLOWER, HTTP, BALANCER, LOCKSTEP = "leader", "follower", "http", "balancer", "lockstep"
MASTER, NODE = "master", "node"  # of servers with prefill/decode disaggregation
KV_TRANSFER = "kv_transfer"  # of ranks that exchange K/V with other servers
CONFIG_CLIENT = "config_client"  # of masters and nodes that belong to a config_server
REGISTRY = "registry"  # of a config_server
WHOLE = (LEADER, HTTP)  # the roles of a process that is a complete server

# One row per role; an endpoint with several roles has the union of their actors.
PLACEMENT: Mapping[str, frozenset[str]] = {
    LEADER: frozenset({"allocator", "grammar", "scheduler", "runner", "watchdog"}),
    FOLLOWER: frozenset({"runner", "watchdog"}),
    HTTP: frozenset({"detokenizer", "tokenizer", "frontend", "watchdog"}),
    BALANCER: frozenset({"balancer"}),
    LOCKSTEP: frozenset({"lockstep"}),
    MASTER: frozenset({"director", "grammar"}),
    NODE: frozenset({"agent"}),
    KV_TRANSFER: frozenset({"kv_transfer"}),
    CONFIG_CLIENT: frozenset({"config_client"}),
    REGISTRY: frozenset({"registry"}),
}

# Actors that a leader's watchdog asks for metrics. Followers mirror their leader: not asked.
REPORTERS = ("scheduler", "allocator", "runner", "kv_transfer", "director")
WORKERS = ("scheduler", "director", "agent", "frontend")  # a drain waits for their requests


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One process of a server.

    Args:
        id: its number, never reused; messages and request ids refer to it.
        node: the machine that it runs on.
        address: where it can be reached; "" until it has bound a socket and reported it.
        roles: rows of ``PLACEMENT``.
        device: index of its accelerator on its node; None: it has none.
        group: its tensor-parallel group; meaningless without a device.
        group_rank: its rank in the group; -1 without a device.
    """

    id: int
    node: int = 0
    address: str = ""
    roles: tuple[str, ...] = WHOLE
    device: int | None = 0
    group: int = 0
    group_rank: int = 0

    @property
    def actors(self) -> tuple[str, ...]:
        """Names of the actors that live here, in start order."""
        names = frozenset[str]().union(*(PLACEMENT[role] for role in self.roles))
        return tuple(name for name in ACTORS if name in names)

    @property
    def replaceable(self) -> bool:
        """Whether another process may replace it: it owns no state that others need."""
        return self.roles == (HTTP,)


class Difference(NamedTuple):
    """A value in which two processes or servers differ."""

    name: str
    ours: str
    theirs: str


def first_difference(
    ours: Iterable[tuple[str, str]], theirs: Iterable[tuple[str, str]]
) -> Difference | None:
    """The first of these (name, value) in which both sides differ, or None."""
    own, other = dict(ours), dict(theirs)
    for name in (*own, *other):
        if own.get(name) != other.get(name):
            return Difference(name, own.get(name, "unknown"), other.get(name, "unknown"))
    return None


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What all processes of one server must have in common.

    Args:
        protocol: hash of the messages, see ``codec.protocol``.
        options: hash of the options that they share, see ``Config.digest``.
        shared: these options as (name, value), to name the one in which two processes differ.
    """

    protocol: str
    options: str
    shared: tuple[tuple[str, str], ...] = ()

    def difference(self, other: Contract) -> Difference | None:
        """The first difference from ``other``, or None."""
        if self.protocol != other.protocol:
            return Difference("protocol", self.protocol, other.protocol)
        if self.options == other.options:
            return None
        if found := first_difference(self.shared, other.shared):
            return found._replace(name=f"--{found.name}")
        return Difference("options", self.options, other.options)


@record
@dataclass(frozen=True, slots=True)
class Topology:
    """The endpoints of one server; the first of them coordinates it and is never replaced.

    Args:
        lost: groups that the server continues without. Their endpoints keep their numbers and
            names; no messages are sent to them.
    """

    endpoints: tuple[Endpoint, ...]
    lost: tuple[int, ...] = ()

    @staticmethod
    def on_one_node(tp: int = 1, http: int = 1, dp: int = 1, *, in_step: bool = False) -> Topology:
        """``tp`` ranks in ``dp`` groups; ``http`` processes serve HTTP, rank 0 among them.

        ``in_step``: the groups run each step together.
        """
        return Topology.on_nodes(1, tp, http, dp, in_step=in_step)

    @staticmethod
    def on_nodes(
        nnodes: int, tp: int = 1, http: int = 1, dp: int = 1, *, in_step: bool = False
    ) -> Topology:
        """The same on several nodes with equally many ranks; the first one serves HTTP."""
        per_node = tp // nnodes
        ranks = [
            Endpoint(
                id=i,
                node=i // per_node,
                roles=(FOLLOWER if i % (tp // dp) else LEADER,),
                device=i % per_node,
                group=i // (tp // dp),
                group_rank=i % (tp // dp),
            )
            for i in range(tp)
        ]
        more = (BALANCER, LOCKSTEP)[: (dp > 1) + (dp > 1 and in_step)]
        ranks[0] = replace(ranks[0], roles=(*WHOLE, *more))
        return Topology((*ranks, *(http_worker(tp + i) for i in range(http - 1))))

    @staticmethod
    def of_master(http: int = 1) -> Topology:
        """A server without a model: it passes its requests to prefill and decode nodes."""
        master = replace(http_worker(0), roles=(HTTP, MASTER))
        return Topology((master, *(http_worker(i) for i in range(1, http))))

    def as_node(self) -> Topology:
        """The same as a prefill or decode node: it works for masters."""
        made = self
        for rank in self.ranks:
            more = (KV_TRANSFER, NODE) if rank == self.coordinator else (KV_TRANSFER,)
            made = made.replaced_by(replace(rank, roles=(*rank.roles, *more)))
        return made

    @staticmethod
    def of_config_server() -> Topology:
        """One process, which serves no model."""
        return Topology((replace(http_worker(0), roles=(REGISTRY,)),))

    def with_config_client(self) -> Topology:
        """The same as a master or node that belongs to a config_server."""
        first = self.coordinator
        return self.replaced_by(replace(first, roles=(*first.roles, CONFIG_CLIENT)))

    @property
    def coordinator(self) -> Endpoint:
        """The endpoint whose watchdog waits for all, drains the server and answers scrapes."""
        return self.endpoints[0]

    @property
    def nodes(self) -> tuple[int, ...]:
        """Numbers of the machines."""
        return tuple(sorted({e.node for e in self.endpoints}))

    def on(self, node: int) -> tuple[Endpoint, ...]:
        """The endpoints of a node. The first is the process that the user started there; it starts
        the others."""
        return tuple(e for e in self.endpoints if e.node == node)

    def watched(self, number: int) -> frozenset[int]:
        """Endpoints whose heartbeats this one watches: the first process of a node watches the
        others there, and they watch it."""
        first, *others = (e.id for e in self.on(self[number].node))
        others = [each for each in others if self.lives(each)]
        return frozenset(others) if number == first else frozenset({first})

    @property
    def ranks(self) -> tuple[Endpoint, ...]:
        """Endpoints with a device, group by group; their indices are torch.distributed's ranks."""
        found = (e for e in self.endpoints if e.device is not None)
        return tuple(sorted(found, key=lambda e: (e.group, e.group_rank)))

    @property
    def groups(self) -> tuple[int, ...]:
        """Numbers of the tensor-parallel groups, without lost ones."""
        return tuple(sorted({e.group for e in self.ranks}.difference(self.lost)))

    @property
    def balanced(self) -> bool:
        """Whether there were several groups, so that a balancer assigns requests to them."""
        return any(BALANCER in e.roles for e in self.endpoints)

    def expendable(self, group: int) -> bool:
        """Whether the server can continue without a group: others serve, independently of it.

        A node of a cluster cannot: its master sends requests to the node as a whole.
        """
        needed = self.in_step or any(NODE in e.roles for e in self.endpoints)
        return group in self.groups and group != self.coordinator.group and not needed

    def lives(self, number: int) -> bool:
        """Whether an endpoint is not in a lost group."""
        return self[number].group not in self.lost

    @property
    def in_step(self) -> bool:
        """Whether the groups run each step together, because all ranks share the experts."""
        return any(LOCKSTEP in e.roles for e in self.endpoints)

    def __contains__(self, number: object) -> bool:
        return any(e.id == number for e in self.endpoints)

    def __getitem__(self, number: int) -> Endpoint:
        """The endpoint of this number. Raises KeyError."""
        for endpoint in self.endpoints:
            if endpoint.id == number:
                return endpoint
        raise KeyError(number)

    def group(self, group: int) -> tuple[Endpoint, ...]:
        """The ranks of a group, in order."""
        return tuple(e for e in self.ranks if e.group == group)

    def leader(self, group: int) -> Endpoint:
        """The first rank of a group: it schedules and samples for it."""
        return self.group(group)[0]

    def leads(self, number: int) -> bool:
        """Whether an endpoint is the first rank of its group."""
        return self[number].group_rank == 0

    def intake(self, actor: str) -> tuple[str, int]:
        """(actor, endpoint) to send to for ``actor`` on the leader of a request.

        That actor itself if there is one group, otherwise the balancer, which forwards. On a
        master, the director stands in for all schedulers.
        """
        if not self.groups:
            return "director" if actor == "scheduler" else actor, self.coordinator.id
        if self.balanced:
            return "balancer", self.coordinator.id
        return actor, self.leader(self.groups[0]).id

    def placed(self, actor: str) -> tuple[int, ...]:
        """Numbers of the endpoints where an actor of this name lives."""
        return tuple(e.id for e in self.endpoints if actor in e.actors and self.lives(e.id))

    def reporters(self) -> frozenset[tuple[str, int]]:
        """(actor, endpoint) of the actors that answer the coordinator's probes."""
        return frozenset(
            (actor, e.id)
            for e in self.endpoints
            if (LEADER in e.roles or MASTER in e.roles) and self.lives(e.id)
            for actor in REPORTERS
            if actor in e.actors
        )

    def peers(self, number: int) -> tuple[Endpoint, ...]:
        """The other endpoints that this one may send to."""
        me = self[number]
        near = set(self.endpoints) if me == self.coordinator else {self.coordinator}
        if self.leads(number):
            near |= {e for e in self.endpoints if e.group == me.group or HTTP in e.roles}
        elif KV_TRANSFER in me.roles:  # its leader waits for its transfers
            near.add(self.leader(me.group))
        return tuple(e for e in self.endpoints if e in near and e.id != number and self.lives(e.id))

    def served_here(self, number: int) -> tuple[str, ...]:
        """Actors of an endpoint that only actors of the same endpoint may send to.

        A message to one of them from another process is foreign.
        """
        if not self.leads(number):
            return ()
        if self[number] != self.coordinator:
            return ("runner",)
        if not self.balanced:
            return ("runner", "detokenizer", "tokenizer")
        return ("runner", "scheduler", "grammar")

    def name(self, number: int) -> str:
        """Name of an endpoint in logs and errors: "rank 1", or "HTTP worker 1" after the ranks."""
        ranks = self.ranks
        if self[number] in ranks:
            return f"rank {number}"
        if MASTER in self[number].roles:
            return "pd_master"
        return f"HTTP worker {number - max(len(ranks), 1) + 1}"

    def at(self, number: int, address: str) -> Topology:
        """A copy with the address of one endpoint set."""
        return self.replaced_by(replace(self[number], address=address))

    def replaced_by(self, changed: Endpoint) -> Topology:
        """A copy with ``changed`` in place of the endpoint of the same number."""
        endpoints = (changed if e.id == changed.id else e for e in self.endpoints)
        return replace(self, endpoints=tuple(endpoints))

    def replaced(self, number: int, by: Endpoint | None) -> Topology:
        """A copy without one endpoint, and with ``by`` if given."""
        left = tuple(e for e in self.endpoints if e.id != number)
        return replace(self, endpoints=left if by is None else (*left, by))

    def without(self, group: int) -> Topology:
        """A copy with one group lost."""
        return replace(self, lost=(*self.lost, group))

    def to_plain(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Topology:
        """The inverse of ``to_plain``."""
        endpoints = (Endpoint(**{**e, "roles": tuple(e["roles"])}) for e in plain["endpoints"])
        return Topology(tuple(endpoints), tuple(plain["lost"]))


def http_worker(number: int) -> Endpoint:
    """An endpoint that only serves HTTP."""
    return Endpoint(id=number, roles=(HTTP,), device=None, group=-1, group_rank=-1)
