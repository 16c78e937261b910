"""Groups a step's rows to read shared K/V only once, where this saves more than it costs.

Knows plans and numpy. The kernels' inputs are in :mod:`asyncllm.kernels.attention.shared_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncllm.kernels.attention.shared_rows import MAX_GROUPS, MEMBERS, SharingCosts
from asyncllm.messages import StepPlan

I32 = NDArray[np.int32]
LEAST_ROWS = 4  # minimum decode rows of a step or graph with groups


class SharedColumns(NamedTuple):
    """The groups of a step's decode rows on the host, as :class:`SharedRows` describes them."""

    groups: I32  # [4, num_groups]
    order: I32
    places: I32
    owns: I32
    saved: int  # tokens per layer whose K/V are not reread


class SharedReads:
    """Forms the groups of steps; caches the last ones, since most steps change nothing.

    Attributes:
        saved: tokens whose K/V no layer had to reread, over all steps.
    """

    def __init__(self, costs: SharingCosts | None) -> None:
        self.costs = costs
        self.saved = 0
        self._last: tuple[object, ...] = ()
        self._found: SharedColumns | None = None

    def of(self, plan: StepPlan) -> SharedColumns | None:
        """None: no group pays off. Takes about 2 us if nothing has changed, else 30."""
        if self.costs is None or not plan.prefix_order or plan.num_decode < LEAST_ROWS:
            return None
        lanes = plan.lanes[: plan.num_decode]
        key = plan.prefix_order, plan.shared_lens, lanes
        if key != self._last:
            self._last = key
            order, shared_lens, rows = (np.frombuffer(column, np.int32) for column in key)
            self._found = shared_columns(order, shared_lens, rows, self.costs)
        if self._found is not None:
            self.saved += self._found.saved
        return self._found


def shared_columns(
    prefix_order: I32, shared_lens: I32, lanes: I32, costs: SharingCosts
) -> SharedColumns | None:
    """Groups of the rows of ``lanes``, ordered by ``prefix_order``; both columns as in
    ``StepPlan``."""
    row_of = np.full(int(max(prefix_order.max(), lanes.max())) + 1, -1, np.int32)
    row_of[lanes] = np.arange(len(lanes), dtype=np.int32)
    rows = row_of[prefix_order]
    kept = np.flatnonzero(rows >= 0)
    if len(kept) < 2:
        return None
    # common with the previous row: the minimum over the lanes in between
    common = np.minimum.reduceat(shared_lens[: kept[-1] + 1], kept[:-1] + 1)
    common[common < costs.row] = 0
    chosen = _choose(_runs(common), costs, 0.0, MEMBERS * len(lanes))
    if len(chosen) > MAX_GROUPS:
        least = sorted((gain for *_, gain in chosen), reverse=True)[MAX_GROUPS]
        chosen = _choose(_runs(common), costs, least, MEMBERS * len(lanes))[:MAX_GROUPS]
    if not chosen or sum(gain for *_, gain in chosen) <= costs.step:
        return None
    order = rows[kept]
    places, owns = np.full(len(lanes), -1, np.int32), np.zeros(len(lanes), np.int32)
    for _, stop, first, count, _ in chosen:  # inner groups after outer ones
        members = order[first : first + count]
        places[members] = np.arange(first, first + count, dtype=np.int32)
        owns[members] = stop
    groups = np.array([group[:4] for group in chosen], np.int32).T
    saved = sum((stop - begin) * (count - 1) for begin, stop, _, count, _ in chosen)
    return SharedColumns(groups, order, places, owns, saved)


Stretch = tuple[int, int, int]  # first and last of adjacent rows, and the length they share
Candidate = tuple[int, int, int, int, float]  # begin, stop; first member, number of members; gain


def _runs(common: I32) -> list[Stretch]:
    """The longest runs of neighbours for each number of common tokens, outer ones first.

    ``common[i]``: the length that rows i and i + 1 share.
    """
    found: list[Stretch] = []
    open_: list[tuple[int, int]] = []  # first, common
    changes = np.flatnonzero(np.diff(common, prepend=0, append=0))
    for at, value in zip(map(int, changes), map(int, np.append(common, 0)[changes]), strict=True):
        first = at
        while open_ and open_[-1][1] > value:
            first, depth = open_.pop()
            found.append((first, at, depth))
        if value and not (open_ and open_[-1][1] == value):
            open_.append((first, value))
    return sorted(found, key=lambda run: (run[0], -run[1], run[2]))


def _choose(
    runs: Sequence[Stretch], costs: SharingCosts, least: float, members: int
) -> list[Candidate]:
    """Groups that gain more than ``least``. A nested group begins where its outer one ends. There
    are at most ``members`` memberships, and ``costs.blocks`` blocks."""
    found: list[Candidate] = []
    blocks = costs.blocks
    around: list[Candidate] = []
    for first, last, depth in runs:
        while around and around[-1][2] + around[-1][3] <= first:
            around.pop()
        begin = around[-1][1] if around else 0
        count = last - first + 1
        gain = costs.gain(depth - begin, count)
        needed = costs.num_blocks(count)
        if gain > least and count <= members and needed <= blocks:
            members, blocks = members - count, blocks - needed
            around.append((begin, depth, first, count, gain))
            found.append(around[-1])
    return found
