"""Balancer: assigns each request to a group, and forwards later messages about it there.

Owns which group has which request; knows neither queues nor slots. With a single group there is no
balancer: messages go straight to the leader.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import assert_never

from asyncllm.actors.base import Actor, Ref
from asyncllm.codec import INT64
from asyncllm.core import balancing
from asyncllm.core.request import FinishReason
from asyncllm.messages import (
    FRONTEND_SHIFT,
    MAX_COUNT,
    Abort,
    BeginDecode,
    CompileGrammar,
    EndpointGone,
    Finished,
    GroupProgress,
    GroupRemoved,
    RequestsOrphaned,
    ResubmitRequests,
    StopHit,
    Submit,
)

Inbox = (
    Submit
    | Abort
    | StopHit
    | BeginDecode
    | CompileGrammar
    | GroupProgress
    | EndpointGone
    | GroupRemoved
    | ResubmitRequests
)


class Balancer(Actor[Inbox]):
    """One per server, on the coordinator, between the tokenizers and the leaders.

    All messages about a request take this route, so they reach the leader in order. The requests of
    a lost group are orphans: the detokenizers report which of them have no token yet, and those go
    to other groups.

    Args:
        policy, num_slots, together: see ``core.balancing.GroupBalancer``.
        vocab_size, max_len: what a request of another process is held against, as its own process
            has done already.
    """

    remote = frozenset(
        {Submit, Abort, StopHit, BeginDecode, CompileGrammar, GroupProgress, ResubmitRequests}
    )

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
        self._submitted: dict[int, Submit] = {}  # of requests that have not ended
        self._orphans: dict[int, Submit] = {}
        self.core: balancing.GroupBalancer

    def started(self) -> None:
        topology = self.system.topology
        leaders = [topology.leader(group).id for group in topology.groups]
        self._group_of = {leader: group for group, leader in enumerate(leaders)}  # that live
        self._schedulers = [self.system.ref("scheduler", e) for e in leaders]
        self.core = balancing.GroupBalancer(
            len(leaders), self._policy, num_slots=self._num_slots, together=self._together
        )

    def receive(self, batch: list[Inbox]) -> None:
        for msg in batch:
            match msg:
                case Submit():
                    self._submit(msg)
                case Abort() | StopHit() | BeginDecode():
                    if (group := self.core.group_of(msg.rid)) is not None:
                        self._schedulers[group].tell(msg)
                    elif isinstance(msg, Abort) and msg.rid in self._orphans:
                        del self._orphans[msg.rid]
                        end = Finished(msg.rid, FinishReason.ABORT)
                        self._detokenizer(msg.rid).tell(end)
                case CompileGrammar():  # any group may get a request with it
                    for leader in self._group_of:
                        self.system.ref("grammar", leader).tell(msg)
                case GroupProgress(leader, begun, ended):
                    if leader in self._group_of:
                        self.core.began(begun)
                        self._ended(ended)
                case EndpointGone(endpoint):
                    self._gone.add(endpoint)
                    # the watchdog tells the schedulers, which do not report it
                    theirs = [*self.core.rids, *self._orphans]
                    self._ended([rid for rid in theirs if rid >> FRONTEND_SHIFT == endpoint])
                case GroupRemoved(_, endpoint, why):
                    self._lose(self._group_of.pop(endpoint), why)
                case ResubmitRequests(rids, over):
                    self._ended(over)
                    for rid in rids:
                        if (submit := self._orphans.pop(rid, None)) is not None:
                            self._submit(submit)
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
        self._submitted[msg.rid] = msg
        self._schedulers[group].tell(msg)

    def _ended(self, rids: Iterable[int]) -> None:
        self.core.ended(rids)
        for rid in rids:
            self._submitted.pop(rid, None)
            self._orphans.pop(rid, None)

    def _lose(self, group: int, why: str) -> None:
        orphans = {rid: self._submitted.pop(rid) for rid in self.core.lose(group)}
        self._orphans |= orphans
        for endpoint in sorted({rid >> FRONTEND_SHIFT for rid in orphans}):
            rids = array(INT64, [rid for rid in orphans if rid >> FRONTEND_SHIFT == endpoint])
            self._detokenizer(rids[0]).tell(RequestsOrphaned(rids, why))

    def _detokenizer(self, rid: int) -> Ref:
        return self.system.ref("detokenizer", rid >> FRONTEND_SHIFT)
