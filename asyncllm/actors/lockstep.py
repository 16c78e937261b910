"""Lockstep: makes the schedulers of several groups take each step together, in a common size.

Owns which step is due and which groups have offered it; knows neither requests nor devices.
"""

from __future__ import annotations

from typing import assert_never

from asyncllm.actors.base import Actor
from asyncllm.core import lockstep
from asyncllm.messages import JoinStep, OfferStep, StepAgreed


class Lockstep(Actor[OfferStep]):
    """One per server whose groups share experts, on the coordinator.

    It answers while the previous step runs: schedulers plan two steps ahead, so no device idles.
    """

    remote = frozenset({OfferStep})

    def __init__(self) -> None:
        super().__init__("lockstep")
        self.core: lockstep.StepAgreement

    def started(self) -> None:
        topology = self.system.topology
        leaders = [topology.leader(group).id for group in topology.groups]
        self._group_of = {endpoint: group for group, endpoint in enumerate(leaders)}
        self._schedulers = [self.system.ref("scheduler", endpoint) for endpoint in leaders]
        self.core = lockstep.StepAgreement(len(leaders))

    def receive(self, batch: list[OfferStep]) -> None:
        for msg in batch:
            match msg:
                case OfferStep():
                    self._offer(msg)
                case _:
                    assert_never(msg)

    def possible(self, msg: OfferStep) -> bool:
        """Whether it is from a leader."""
        return msg.endpoint in self._group_of

    def _offer(self, msg: OfferStep) -> None:
        group = self._group_of[msg.endpoint]
        try:
            asked, common = self.core.offer(group, msg.step, msg.num_tokens, msg.mixed)
        except ValueError as error:
            self.system.reject(msg, str(error))
            return
        for other in asked:
            self._schedulers[other].tell(JoinStep(msg.step))
        if common is not None:
            agreed = StepAgreed(step=common.step, num_tokens=common.num_tokens, mixed=common.mixed)
            for scheduler in self._schedulers:
                scheduler.tell(agreed)
