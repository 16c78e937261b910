"""Messages of a step: reserving slots for its rows, the plan, the result."""

from __future__ import annotations

from array import array
from dataclasses import field

from asyncllm.codec import INT32, Message, message
from asyncllm.messages.checks import MAX_COUNT, are_counts, are_natural
from asyncllm.records import Logprobs, OpenedLane, int32s, int64s


@message(10)
class ReserveSlots(Message):
    """scheduler -> allocator: slots for the next ``counts[i]`` tokens of each lane, in this order.

    ``opened`` names lanes seen for the first time, with their tokens; the allocator looks those up
    in the prefix cache. ``launched`` names lanes whose granted prompt tokens have been launched
    since the last ReserveSlots, so that they may be shared from now on.
    """

    lanes: array[int]
    counts: array[int]
    opened: tuple[tuple[int, array[int], bool], ...]  # (lane, prompt ids, may use the prefix cache)
    launched: array[int]
    # (lane, number): it frees its last slots, those of wrong drafts
    trimmed: tuple[tuple[int, int], ...] = ()


@message(11)
class SlotsGranted(Message):
    """allocator -> scheduler: slots for the first ``len(counts)`` rows of the reservation.

    Row i has ``hits[i]`` cached tokens (0 unless it was opened) and room for ``counts[i]`` new
    ones (fewer than requested if the hit leaves less to compute).
    """

    hits: array[int]
    counts: array[int]
    slots: array[int]  # int32[sum(hits + counts)], row by row: cached slots, then new ones
    available: int  # free slots plus evictable ones, after this grant
    # if layers with a window have a slot space of their own: the same for that space; cached tokens
    # outside every window have a dummy slot there that nobody reads
    sliding: array[int] = field(default_factory=int32s)
    sliding_available: int = 0
    prefix_order: array[int] = field(default_factory=int32s)  # as in StepPlan, of all open lanes
    shared_lens: array[int] = field(default_factory=int32s)


@message(12)
class ReleaseSlots(Message):
    """scheduler -> allocator: these lanes are over; no launched step touches them.

    ``items``: (lane, generated ids whose KV is valid). Prompt and generated tokens stay in the
    prefix cache.
    """

    items: tuple[tuple[int, array[int]], ...]
    launched: array[int]  # as in ReserveSlots; a request may end before another is sent


@message(13)
class StepPlan(Message):
    """scheduler -> runner of every tp rank. Rows with one new token come first.

    A lane may have several of these at consecutive positions: all but the first are draft tokens.

    Row i computes tokens at positions [starts[i], starts[i] + counts[i]) of lane i. Its slots are
    written to the lane's table from position starts[i] - cached_counts[i] on.
    """

    step: int  # 1, 2, 3, ... without a gap
    num_decode: int  # this many leading rows have counts == 1
    lanes: array[int] = field(default_factory=int32s)
    starts: array[int] = field(default_factory=int32s)
    counts: array[int] = field(default_factory=int32s)
    # cached tokens before the new ones: > 0 only in a lane's first step
    cached_counts: array[int] = field(default_factory=int32s)
    slots: array[int] = field(default_factory=int32s)  # sum(cached_counts + counts)
    tokens: array[int] = field(default_factory=int32s)  # sum(counts); -1: the lane's last token
    samples: bytearray = field(default_factory=bytearray)  # 1 if the row reaches the last known
    # token, so that a token is sampled
    opened: list[OpenedLane] = field(default_factory=list)
    masked: array[int] = field(default_factory=int32s)  # rows with a constrained token
    masks: bytearray = field(
        default_factory=bytearray
    )  # int32[len(masked), ceil(vocab_size / 32)]:
    # bit t % 32 of word t // 32 is 1 if token t is allowed; empty on ranks that do not sample
    # if groups step together: the largest number of tokens of any group, including this one, and
    # whether any group has rows of several tokens
    common: int = 0
    mixed: bool = False
    sliding: array[int] = field(default_factory=int32s)  # parallel to slots, for layers with a
    # window; empty: these use ``slots`` like all others
    # lanes, of this step or not, ordered so that those with the same first slots are adjacent, and
    # the length that each shares with the previous one (core/shared_prefixes.py)
    prefix_order: array[int] = field(default_factory=int32s)
    shared_lens: array[int] = field(default_factory=int32s)

    def valid(self) -> bool:
        rows = len(self.lanes)
        if not (
            self.step > 0
            and are_natural(
                self.lanes, self.starts, self.counts, self.cached_counts, self.slots, self.masked
            )
            and are_natural(self.sliding, self.prefix_order, self.shared_lens)
            and len(self.prefix_order) == len(self.shared_lens)
            and len(self.starts) == len(self.counts) == len(self.cached_counts) == rows
            and len(self.samples) == rows
            and 0 <= self.num_decode <= rows
        ):
            return False
        num_new = sum(self.counts)
        return (
            0 not in self.counts
            and self.counts[: self.num_decode] == array(INT32, [1]) * self.num_decode
            and len(self.tokens) == num_new
            and len(self.slots) == num_new + sum(self.cached_counts)
            and len(self.sliding) in (0, len(self.slots))
            and len(self.masks) % 4 == 0
            and (self.common == 0 or num_new <= self.common <= MAX_COUNT)
        )


@message(14)
class StepDone(Message):
    """runner@leader -> scheduler: a launched step has finished on the device."""

    step: int
    tokens: array[int]  # int32[num_rows], -1 if the row has none
    logprobs: Logprobs | None  # one per row; None if no row wants any
    prompt: tuple[tuple[int, Logprobs], ...] = ()  # (row, those of its prompt tokens starts + 1 ..)
    device_ms: float = 0.0  # between its first and last operation; 0: not measured


@message(15, urgent=True)
class LaunchDue(Message):
    """scheduler -> itself: launch the delayed step."""


@message(16)
class GroupProgress(Message):
    """scheduler -> balancer, if there is one: requests that have begun or ended."""

    endpoint: int  # of the leader
    begun: array[int] = field(default_factory=int64s)  # rids that have been placed on a lane
    ended: array[int] = field(default_factory=int64s)


@message(17, urgent=True)
class OfferStep(Message):
    """scheduler -> lockstep, if groups step together: the size of the group's next step."""

    endpoint: int
    step: int
    num_tokens: int  # 0: none, but another group needs the step
    mixed: bool  # some rows have more than one token

    def valid(self) -> bool:
        return self.step > 0 and are_counts(self.endpoint, self.num_tokens)


@message(18, urgent=True)
class JoinStep(Message):
    """lockstep -> scheduler: another group needs this step; offer it too, even if without rows."""

    step: int


@message(19, urgent=True)
class StepAgreed(Message):
    """lockstep -> every scheduler: every group has offered this step; launch it."""

    step: int
    num_tokens: int  # the most of any group
    mixed: bool
