"""Copies a step's inputs to the device, all in one transfer.

The only tensors here are the buffers and their columns. Those that CUDA graphs read come first,
padded, at offsets that depend only on the graph; inputs that only some steps have follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from asyncllm.engine.sampling_table import SamplingBatch
from asyncllm.engine.sharing import SharedColumns
from asyncllm.engine.step_inputs import (
    Bucket,
    HostColumn,
    OptionalInputs,
    Penalties,
    RowColumns,
    SamplingColumns,
    SharedRowColumns,
    StepColumns,
    StepRows,
)
from asyncllm.kernels.attention.shared_rows import MAX_GROUPS

C = TypeVar("C", HostColumn, Tensor)
RING = 4  # buffers: more than steps in flight on any rank
FIXED_WORDS = 1 << 20  # int32 words of the fixed buffer on the device
NUM_SAMPLING, NUM_PENALTIES = 7, 8  # columns


class Layout:
    """The offsets of a shape's columns, in int32 words of the buffer.

    Columns are padded to 16 bytes, which keeps loads wide. Those of sampling come first, so their
    offsets depend only on the number of rows, not on the shape of the step.

    Args:
        fixed: includes penalties of all rows.
        two_spaces: includes slots of the second space.
        shares: includes the shared prefixes of decode rows.
    """

    def __init__(
        self, num_rows: int, shape: Bucket, *, fixed: bool, two_spaces: bool, shares: bool
    ) -> None:
        blocks = (
            (num_rows, NUM_SAMPLING),
            (num_rows, NUM_PENALTIES if fixed else 0),
            (shape.num_tokens, 4 + two_spaces),
            (shape.num_decode, 2 + 3 * shares),
            (shape.num_prefill + 1, 3),
            (4 * MAX_GROUPS, int(shares)),
        )
        self._blocks: list[tuple[slice, int, int]] = []  # words, columns, entries in each
        self.words = 0
        for size, count in blocks:
            begin, self.words = self.words, self.words + count * _padded(size)
            self._blocks.append((slice(begin, self.words), count, size))

    def columns(self, buffer: C, as_float: Callable[[C], C]) -> StepColumns[C]:
        """Views of ``buffer``."""
        blocks: list[list[C]] = []
        for words, count, size in self._blocks:
            columns = buffer[words].reshape(count, -1) if count else ()
            blocks.append([column[:size] for column in columns])
        sampling, penalties, tokens, decode, prefill, groups = blocks
        sampling[:4] = map(as_float, sampling[:4])
        penalties[4:7] = map(as_float, penalties[4:7])
        prefill[1:] = [column[:-1] for column in prefill[1:]]  # shorter than the prefix sums
        return StepColumns(
            SamplingColumns(*sampling),
            Penalties(*penalties) if penalties else None,
            RowColumns(*tokens[:4], *decode[:2], *prefill, *tokens[4:]),
            SharedRowColumns(*decode[2:], *groups) if groups else None,
        )


def _float_column(column: HostColumn) -> HostColumn:
    return column.view(np.float32)


def _float_tensor(column: Tensor) -> Tensor:
    return column.view(torch.float32)


def _padded(size: int) -> int:
    return -(-size // 4) * 4


def _fill(column: HostColumn, values: HostColumn, padding: float) -> None:
    column[: len(values)] = values
    if len(values) < len(column):
        column[len(values) :] = padding


def _fill_shared(columns: SharedRowColumns[HostColumn], shared: SharedColumns | None) -> None:
    columns.groups[:] = 0
    if shared is None:
        columns.order[:], columns.places[:], columns.owns[:] = 0, -1, 0
        return
    columns.groups.reshape(4, -1)[:, : shared.groups.shape[1]] = shared.groups
    _fill(columns.order, shared.order, 0)
    _fill(columns.places, shared.places, -1)
    _fill(columns.owns, shared.owns, 0)


@dataclass(slots=True)
class Staged:
    """A step's inputs on the host, ready for the copy."""

    host: Tensor
    layout: Layout
    columns: StepColumns[HostColumn]
    extras: OptionalInputs[HostColumn]  # written after the columns
    bucket: Bucket | None  # whose graph reads the columns


class Uploader:
    """The inputs of each step: written on the host, then on the device in one copy.

    With ``fixed``, the copy goes through buffers that are not reused before their step is done
    (pinned memory on CUDA) to one fixed address: graphs captured with :meth:`captured` read their
    bucket's columns where :meth:`write` and :meth:`upload` put them, since both use the same
    :class:`Layout`. The next step's copy follows this step in the stream, so the address can be
    reused. Without ``fixed``, each step has a buffer of its own.

    Args:
        num_lanes: padding uses lane ``num_lanes`` and slot ``dump_slot``.
        num_rows: maximum sampled rows per step; None: one per request.
        dump_sliding: the same in the second slot space; None: there is none.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        num_lanes: int,
        dump_slot: int,
        fixed: bool,
        dump_sliding: int | None = None,
        num_rows: int | None = None,
    ) -> None:
        self._device, self._cuda, self._fixed = device, device.type == "cuda", fixed
        self._dump_lane, self._dump_slot = num_lanes, dump_slot
        self._num_rows = num_rows or num_lanes
        self._dump_sliding = dump_sliding
        self._place = torch.empty(FIXED_WORDS if fixed else 0, dtype=torch.int32, device=device)
        self._buffers = [torch.empty(0, dtype=torch.int32) for _ in range(RING)]
        self._events: list[torch.cuda.Event | None] = [None] * RING
        self._turn = 0
        # columns of buckets, in each of the buffers and on the device: finding them takes longer
        # than filling them
        self._written: list[dict[Bucket, StepColumns[HostColumn]]] = [{} for _ in range(RING)]
        self._captured: dict[Bucket, tuple[Layout, StepColumns[Tensor]]] = {}

    def write(
        self,
        rows: StepRows,
        batch: SamplingBatch,
        extras: OptionalInputs[HostColumn],
        bucket: Bucket | None = None,
        shape: Bucket | None = None,
    ) -> Staged:
        """Write a step into the next buffer; penalties that are not extras go into the columns.

        Args:
            bucket: the graph that reads the columns, which are padded to its size.
            shape: what to pad them to if there is no graph; None: no padding.
        """
        if bucket is not None:
            layout = self._captured[bucket][0]
        else:
            graphs = bool(self._captured)
            num_rows = self._num_rows if graphs else len(batch.lanes)
            shares = rows.shared is not None
            layout = self._layout(num_rows, shape or rows.shape, fixed=graphs, shares=shares)
        behind: list[HostColumn] = []
        extras.map(behind.append)
        words = layout.words + sum(_padded(column.size) for column in behind)
        host, at = self._next(words), layout.words
        view = host.numpy()
        written = self._written[self._turn]
        if bucket is None or (columns := written.get(bucket)) is None:
            columns = layout.columns(view, _float_column)
            if bucket is not None:
                written[bucket] = columns
        self._write(columns, rows, batch)
        for column in behind:
            view[at : at + column.size] = column.reshape(-1).view(np.int32)
            at += _padded(column.size)
        return Staged(host[:words], layout, columns, extras, bucket)

    def _write(
        self, columns: StepColumns[HostColumn], rows: StepRows, batch: SamplingBatch
    ) -> None:
        s, p, r, shared = columns
        # padding rows are greedy
        _fill(s.temperature, batch.temperature, 0)
        _fill(s.top_p, batch.top_p, 1)
        _fill(s.min_p, batch.min_p, 0)
        _fill(s.uniform, batch.uniform, 0.5)
        _fill(s.top_k, batch.top_k, 1)
        _fill(s.logit_rows, batch.logit_rows, 0)
        _fill(s.lanes, batch.lanes, self._dump_lane)
        if p is not None and batch.penalties is not None:
            for column, values in zip(p, batch.penalties, strict=True):
                column[:] = 0
                column[batch.penalties.rows] = values
            p.rows[:], p.lanes[:] = np.arange(len(s.lanes)), s.lanes
        decode, dump = rows.num_decode, self._dump_lane
        _fill(r.tokens, rows.tokens, 0)
        _fill(r.token_lanes, rows.token_lanes, dump)
        _fill(r.positions, rows.positions, 0)
        _fill(r.slots, rows.slots, self._dump_slot)
        if r.sliding_slots is not None and rows.sliding is not None:
            _fill(r.sliding_slots, rows.sliding, self._dump_sliding or 0)
        _fill(r.decode_lanes, rows.lanes[:decode], dump)
        _fill(r.decode_lens, rows.starts[:decode] + 1, 0)
        _fill(r.prefill_cu, rows.cu[decode:], rows.cu[-1])
        _fill(r.prefill_lanes, rows.lanes[decode:], dump)
        _fill(r.prefill_starts, rows.starts[decode:], 0)
        if shared is not None:
            _fill_shared(shared, rows.shared)

    def upload(self, staged: Staged) -> tuple[StepColumns[Tensor], OptionalInputs[Tensor]]:
        """The step's inputs on the device."""
        at = staged.layout.words

        def behind(column: HostColumn) -> Tensor:
            nonlocal at
            part = device[at : at + column.size].view(column.shape)
            at += _padded(column.size)
            return _float_tensor(part) if column.dtype == np.float32 else part

        if not self._fixed:
            device, (sampling, _, rows, shared) = staged.host, staged.columns
            columns = StepColumns(
                SamplingColumns(*map(torch.from_numpy, sampling)),
                None,
                RowColumns(*(torch.from_numpy(c) for c in rows if c is not None)),
                None if shared is None else SharedRowColumns(*map(torch.from_numpy, shared)),
            )
        else:
            device = self._to_device(staged.host)
            if staged.bucket is None:
                columns = staged.layout.columns(device, _float_tensor)
            else:
                columns = self._captured[staged.bucket][1]
        return columns, staged.extras.map(behind)

    def captured(self, bucket: Bucket) -> StepColumns[Tensor]:
        """The fixed address of a bucket's columns, for capturing a graph; start-up only.

        They hold zeros: rows without tokens, and tokens that write to lane 0 and slot 0.
        """
        assert self._fixed
        layout = self._layout(self._num_rows, bucket, fixed=True, shares=bucket.shares)
        columns = layout.columns(self._place, _float_tensor)
        self._captured[bucket] = layout, columns
        self._place.zero_()
        return columns

    def _layout(self, num_rows: int, shape: Bucket, *, fixed: bool, shares: bool) -> Layout:
        two_spaces = self._dump_sliding is not None
        return Layout(num_rows, shape, fixed=fixed, two_spaces=two_spaces, shares=shares)

    def _to_device(self, host: Tensor) -> Tensor:
        if len(host) <= FIXED_WORDS:
            device = self._place[: len(host)].copy_(host, non_blocking=True)
        else:
            device = host.to(self._device, non_blocking=True)
            self._place.copy_(device[:FIXED_WORDS])  # a graph reads its columns there
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
            self._events[self._turn] = event
        return device

    def _next(self, size: int) -> Tensor:
        if not self._fixed:
            return torch.empty(size, dtype=torch.int32)
        self._turn = (self._turn + 1) % RING
        event = self._events[self._turn]
        if event is not None and not event.query():
            event.synchronize()  # only reached by a follower that lags behind by the whole ring
        if len(self._buffers[self._turn]) < size:
            room = max(4096, 2 * size)
            self._buffers[self._turn] = torch.empty(room, dtype=torch.int32, pin_memory=self._cuda)
            self._written[self._turn].clear()
        return self._buffers[self._turn]
