"""Allocator: answers reservations from the slot ledger.

Owns slots, prefix cache and eviction order; knows lanes, not requests.
"""

from __future__ import annotations

from typing import assert_never

from asyncllm.actors.base import Actor
from asyncllm.core.shared_prefixes import SharedPrefixIndex
from asyncllm.core.slots import Ledger
from asyncllm.core.window_slots import WindowLedger
from asyncllm.core.windows import PerSpace, Window
from asyncllm.messages import AllocatorStats, Probe, ReleaseSlots, ReserveSlots


class Allocator(Actor[ReserveSlots | ReleaseSlots | Probe]):
    """One per KV pool, beside its scheduler.

    Args:
        num_slots: tokens the KV pool holds.
        use_tree: False: no prefix cache (--disable_dynamic_prompt_cache).
        window: of layers that have a slot space of their own, if there are any.
        num_sliding: slots of that space.
        shared_prefixes: report with each grant which lanes share their first slots.
    """

    orders = frozenset({Probe})

    def __init__(
        self,
        num_slots: int,
        *,
        use_tree: bool = True,
        window: Window | None = None,
        num_sliding: int = 0,
        shared_prefixes: bool = False,
    ) -> None:
        super().__init__("allocator")
        known = SharedPrefixIndex() if shared_prefixes else None
        self.ledger = Ledger(num_slots, use_tree=use_tree, shared_prefixes=known)
        if window is not None:
            num = PerSpace(num_slots, num_sliding)
            self.ledger = WindowLedger(num, window, use_tree=use_tree, shared_prefixes=known)

    def started(self) -> None:
        self._scheduler = self.system.ref("scheduler")
        self._watchdog = self.system.at_coordinator("watchdog")

    def receive(self, batch: list[ReserveSlots | ReleaseSlots | Probe]) -> None:
        for msg in batch:
            match msg:
                case ReserveSlots():
                    self._reserve(msg)
                case ReleaseSlots(items, launched):
                    self.ledger.launched(launched)
                    for lane, generated in items:
                        self.ledger.release(lane, generated)
                case Probe(query):
                    self._watchdog.tell(self._stats(query))
                case _:
                    assert_never(msg)

    def _reserve(self, msg: ReserveSlots) -> None:
        ledger = self.ledger
        ledger.launched(msg.launched)
        for lane, num in msg.trimmed:
            ledger.trim(lane, num)
        opened = {lane: (ids, may_share) for lane, ids, may_share in msg.opened}
        self._scheduler.tell(ledger.reserve(msg.lanes, msg.counts, opened))

    def _stats(self, query: int) -> AllocatorStats:
        ledger = self.ledger
        return AllocatorStats(
            query=query,
            endpoint=self.system.endpoint,
            used=ledger.used,
            cached=ledger.cached,
            total=ledger.total,
            hit_tokens=ledger.hit_tokens,
            looked_up_tokens=ledger.looked_up_tokens,
            evicted_tokens=ledger.evicted_tokens,
            **sliding_numbers(ledger),
        )


def sliding_numbers(ledger: Ledger) -> dict[str, int]:
    """The fields of ``AllocatorStats`` that are about the second space."""
    if not isinstance(ledger, WindowLedger):
        return {}
    return {
        "sliding_used": ledger.sliding_used,
        "sliding_cached": ledger.sliding_cached,
        "sliding_total": ledger.sliding.total,
        "evicted_sliding": ledger.evicted_sliding,
    }
