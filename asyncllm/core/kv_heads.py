"""Decides which rank of one server sends which K/V heads to which rank of another.

Heads are told by their numbers in the whole model, so the two may be divided in different ways.
Knows heads; knows neither tensors nor who the ranks are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HeldHeads = Sequence[
    Sequence[int]
]  # of each rank: its heads in local order, negative ones are padding


@dataclass(frozen=True, slots=True)
class HeadRange:
    """Adjacent heads, with their local start index at each end."""

    sent: int  # index of the first at the sender
    taken: int  # index of the first at the receiver
    count: int


def part(held: HeldHeads, wanted: HeldHeads, sender: int, receiver: int) -> HeadRange | None:
    """The heads that ``sender`` (of ``held``) sends to ``receiver`` (of ``wanted``).

    Every receiver gets each of its heads from one sender. Where several hold one, the receivers
    take turns among them. Padding does not travel. None: nothing does.
    """
    ours, theirs = held[sender], wanted[receiver]
    common = [
        (ours.index(head), place)
        for place, head in enumerate(theirs)
        if head >= 0 and _sender(held, head, receiver) == sender
    ]
    if not common:
        return None
    sent, taken = common[0]
    # a rank has neighbouring heads, or a single one that others have as well
    assert common == [(sent + i, taken + i) for i in range(len(common))], (held, wanted)
    return HeadRange(sent, taken, len(common))


def senders(held: HeldHeads, wanted: HeldHeads, receiver: int) -> tuple[int, ...]:
    """The ranks that send something to ``receiver``, in order."""
    heads = {head for head in wanted[receiver] if head >= 0}
    return tuple(sorted({_sender(held, head, receiver) for head in heads}))


def _sender(held: HeldHeads, head: int, receiver: int) -> int:
    holders = [rank for rank, heads in enumerate(held) if head in heads]
    assert holders, f"nobody holds head {head}"
    return holders[receiver % len(holders)]
