"""From a step plan to the columns a step needs, computed on the host, uploaded in one copy.

Knows plans and numpy; the only tensors here are the staging buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncllm.messages import StepPlan

I32 = NDArray[np.int32]
Column = NDArray[np.int32] | NDArray[np.float32]
Columns = dict[str, Column]
RING = 4  # staging buffers: more than steps in flight on any rank
FIXED_WORDS = 1 << 20  # int32 words of the place on the device


@dataclass(slots=True)
class Rows:
    """A step plan unpacked: one entry per row, per new token or per cached token."""

    lanes: I32
    starts: I32
    counts: I32
    num_decode: int
    tokens: I32  # [num_tokens], -1: the lane's last token
    positions: I32  # [num_tokens]
    token_lanes: I32  # [num_tokens]
    slots: I32  # [num_tokens]
    cached_where: I32  # flat table indices (lane * max_len + position) of cached tokens
    cached_slots: I32  # their slots; both are empty in most steps
    cu: I32  # [num_rows + 1] prefix sums of counts
    samples: NDArray[np.bool_]  # [num_rows]

    @property
    def sampled_lens(self) -> I32:
        """Position of the token that each sampled row yields."""
        ends: I32 = (self.starts + self.counts)[self.samples]
        return ends


def unpack(plan: StepPlan, max_len: int) -> Rows:
    """Spread the columns of ``plan`` over its tokens; ~50 us at 256 rows."""
    lanes, starts, counts, heads, slots, tokens = (
        np.frombuffer(column, np.int32)
        for column in (
            plan.lanes, plan.starts, plan.counts, plan.heads, plan.slots, plan.tokens,
        )
    )  # fmt: skip
    cu = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=cu[1:])
    span = np.arange(cu[-1], dtype=np.int32)
    positions = span + np.repeat(starts - cu[:-1], counts)
    token_lanes = np.repeat(lanes, counts)
    cached_where, cached_slots, new_slots = slots[:0], slots[:0], slots
    if heads.any():
        totals = heads + counts
        ends = np.cumsum(totals, dtype=np.int32)
        where = np.arange(ends[-1], dtype=np.int32) + np.repeat(starts + counts - ends, totals)
        cached = where < np.repeat(starts, totals)
        cached_where = (np.repeat(lanes, totals) * np.int32(max_len) + where)[cached]
        cached_slots, new_slots = slots[cached], slots[~cached]
    return Rows(
        lanes=lanes,
        starts=starts,
        counts=counts,
        num_decode=plan.num_decode,
        tokens=tokens,
        positions=positions,
        token_lanes=token_lanes,
        slots=new_slots,
        cached_where=cached_where,
        cached_slots=cached_slots,
        cu=cu,
        samples=np.frombuffer(plan.samples, np.uint8).astype(bool),
    )


class Uploader:
    """Many small host columns to the device in one copy.

    On CUDA they go through pinned memory, a buffer of which is not touched again before its step
    is done, into one fixed place on the device: CUDA graphs find their columns, which come first
    and have fixed sizes, at the addresses that they were captured with. The next step's
    copy is behind this step in the stream, so the place can be used again.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._place = torch.empty(
            FIXED_WORDS if self._cuda else 0, dtype=torch.int32, device=device
        )
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.int32) for _ in range(RING)]
        self._events: list[torch.cuda.Event | None] = [None] * RING
        self._turn = 0

    def upload(self, columns: Columns) -> Placed:
        """Device tensors of the same dtypes and shapes (int32 or float32)."""
        where: dict[str, tuple[int, Column]] = {}
        total = 0
        for name, column in columns.items():
            where[name] = total, column
            total += -(-column.size // 4) * 4  # 16-byte alignment keeps loads wide
        host = self._next(total)
        view = host.numpy()
        for at, column in where.values():
            view[at : at + column.size] = column.reshape(-1).view(np.int32)
        device = host[:total]
        if self._cuda:
            if total <= FIXED_WORDS:
                device = self._place[:total].copy_(device, non_blocking=True)
            else:
                device = device.to(self._device, non_blocking=True)
                self._place.copy_(device[:FIXED_WORDS])  # a graph reads its columns there
            event = torch.cuda.Event()
            event.record()
            self._events[self._turn] = event
        return Placed(device, where)

    def _next(self, size: int) -> Tensor:
        if not self._cuda:
            return torch.empty(size, dtype=torch.int32)
        self._turn = (self._turn + 1) % RING
        event = self._events[self._turn]
        if event is not None and not event.query():
            event.synchronize()  # only a follower that lags a whole ring behind comes here
        if len(self._buffers[self._turn]) < size:
            room = max(4096, 2 * size)
            self._buffers[self._turn] = torch.empty(room, dtype=torch.int32, pin_memory=True)
        return self._buffers[self._turn]


class Placed:
    """Columns on the device by name; a view costs some us, so it is made when it is asked for.

    Args:
        where: the place in ``device``, and the column on the host, by name.
    """

    def __init__(self, device: Tensor, where: dict[str, tuple[int, Column]]) -> None:
        self._device, self._where = device, where

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        """The column; KeyError if there is none."""
        at, column = self._where[name]
        part = self._device[at : at + column.size].view(column.shape)
        return part.view(torch.float32) if column.dtype == np.float32 else part
