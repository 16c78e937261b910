"""Balancer: gives each request to a group, and what is said about it later to the same one.

Owns which request is where; knows neither queues nor slots. Where there is one group there is none:
what it would pass on goes straight to the leader.
"""

from __future__ import annotations

from typing import assert_never

from asyncllm.actors.base import Actor
from asyncllm.core import balancing
from asyncllm.messages import (
    FRONTEND_SHIFT,
    MAX_COUNT,
    Abort,
    Begin,
    Compile,
    Gone,
    Progress,
    StopHit,
    Submit,
)

Inbox = Submit | Abort | StopHit | Begin | Compile | Progress | Gone


class Balancer(Actor[Inbox]):
    """One per server, on the coordinator, between those who take requests and the leaders.

    All that is said about a request comes this way, so it reaches the leader in order.

    Args:
        policy, num_slots, together: see ``core.balancing.Balancer``.
        vocab_size, max_len: what a request of another process is held against, as its own process
            has done already.
    """

    remote = frozenset({Submit, Abort, StopHit, Begin, Compile, Progress})

    def __init__(
        self,
        policy: str,
        *,
        num_slots: int,
        together: bool = False,
        vocab_size: int = MAX_COUNT,
        max_len: int = MAX_COUNT,
    ) -> None:
        super().__init__("balancer")
        self._policy, self._num_slots, self._together = policy, num_slots, together
        self._vocab_size, self._max_len = vocab_size, max_len
        self._gone: set[int] = set()  # endpoints whose processes have ended
        self.core: balancing.GroupBalancer

    def started(self) -> None:
        topology = self.system.topology
        leaders = [topology.leader(group).id for group in topology.groups]
        self._schedulers = [self.system.ref("scheduler", e) for e in leaders]
        self._grammars = [self.system.ref("grammar", e) for e in leaders]
        self.core = balancing.GroupBalancer(
            len(leaders), self._policy, num_slots=self._num_slots, together=self._together
        )

    def receive(self, batch: list[Inbox]) -> None:
        for msg in batch:
            match msg:
                case Submit():
                    self._submit(msg)
                case Abort() | StopHit() | Begin():
                    if (group := self.core.group_of(msg.rid)) is not None:
                        self._schedulers[group].tell(msg, urgent=True)
                case Compile():  # a request with it may come to any group
                    for grammar in self._grammars:
                        grammar.tell(msg)
                case Progress(begun, ended):
                    self.core.began(begun)
                    self.core.ended(ended)
                case Gone(endpoint):
                    self._gone.add(endpoint)
                    # the schedulers are told by the watchdog, and tell nobody
                    self.core.ended([r for r in self.core.rids if r >> FRONTEND_SHIFT == endpoint])
                case _:
                    assert_never(msg)

    def holds(self) -> str:
        return f"requests of the groups {self.core.num_requests}"

    def possible(self, msg: Inbox) -> bool:
        """Whether a request of another process is within the limits that it was checked against."""
        return not isinstance(msg, Submit) or msg.fits(self._vocab_size, self._max_len)

    def _submit(self, msg: Submit) -> None:
        if msg.rid >> FRONTEND_SHIFT in self._gone:
            return
        if msg.rid in self.core:
            self.system.reject(msg, f"request {msg.rid} is there already")
            return
        group = self.core.place(
            msg.rid, msg.prompt, after=msg.after, cached=msg.params.shares_prefix
        )
        self._schedulers[group].tell(msg)
