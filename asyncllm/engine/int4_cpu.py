"""Matrix products with the low-bit weights of GGUF files on the CPU, in plain torch.

Few rows use torch's own product with 4-bit weights. For many rows, and for all dtypes other than
bfloat16 (for which torch has no fast product), the matrix is dequantised and multiplied part by
part.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from asyncllm.models.gguf_packed import GROUP, ROWS, PackedMatrix

FEW = 24  # up to this many rows dequantising costs more than it saves
FEW_LOGITS = 4  # the same for logits, which take two products each
_WIDENED = 1 << 20  # nibbles dequantised at a time, so that they stay in the CPU cache
_PACKED_ROWS = 1024  # rows of a matrix repacked at a time


class TorchPackedOps:
    """Implements :class:`asyncllm.models.ops.PackedOps`."""

    def pack(self, matrix: PackedMatrix) -> None:
        for first in range(0, len(matrix.data), _PACKED_ROWS):
            data = matrix.data[first : first + _PACKED_ROWS]
            columns = torch.stack((data & 15, data >> 4), -1).flatten(1).int()
            data.copy_(_to_torch(columns))

    def linear(
        self, x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        met = self._met(x, matrix)
        if len(x) > FEW or x.dtype != torch.bfloat16:
            made = _by_parts(met, matrix)
        else:
            made = _product(met, matrix.data, matrix.scales)[:, : matrix.rows]
        if bias is not None:
            made = made + bias
        if out is not None:
            return out.copy_(made)
        return made.contiguous()

    def linear_bytes(self, matrix: PackedMatrix, num_rows: int, itemsize: int) -> int:
        # rows as they meet nibbles and the runs of which they are made; the result before it is cut
        # and a bias is added; a part of the matrix, from bytes to numbers
        met = 2 * matrix.nibbles if matrix.planes.width else matrix.nibbles
        part = max(ROWS * matrix.nibbles, _WIDENED)
        rows = num_rows * (met + 2 * len(matrix.data))
        return (rows + 2 * part) * itemsize + 4 * part

    def rows(self, tokens: Tensor, matrix: PackedMatrix) -> Tensor:
        half, run = _layout()
        block, inside = tokens // (2 * half), tokens % (2 * half)
        pair, side, at = inside // (2 * run), inside % (2 * run) // run, inside % run
        blocks = matrix.data.view(len(matrix.data) // (2 * half), -1, half)
        found = blocks[block, : matrix.nibbles, pair * run + at]
        nibbles = (found >> (4 * side).to(torch.uint8)[:, None]) & 15
        scales = matrix.scales[: matrix.nibbles // GROUP, tokens].float()
        scale, shift = scales.transpose(0, 1).unsqueeze(-1).unbind(2)
        made = (nibbles.float() - 8).unflatten(1, (-1, GROUP)) * scale + shift
        planes = matrix.planes
        flat: Tensor = made.flatten(1)
        if planes.width:
            low, high = flat.unflatten(1, (-1, 2, planes.width)).unbind(2)
            flat = (low + high * planes.factor).flatten(1)
        return flat.to(matrix.scales.dtype)

    def logits(self, x: Tensor, matrix: PackedMatrix) -> Tensor:
        """Never rounded to bfloat16: a second product has the first one's result subtracted.

        Torch's product rounds its results but not its sums; in the spare group each output has a
        shift of its own, which is multiplied by an activation of 1.
        """
        met = self._met(x, matrix)
        if len(x) > FEW_LOGITS or x.dtype != torch.bfloat16 or not matrix.spare:
            return _by_parts(met.float(), matrix)
        row = torch.zeros(1, met.shape[1] + GROUP, dtype=x.dtype)
        out = torch.empty(len(x), matrix.rows)
        spare = matrix.scales[-1, :, 1]
        row[0, met.shape[1]] = 1
        for i, each in enumerate(met):
            row[0, : len(each)] = each
            spare.zero_()
            rounded = _product(row, matrix.data, matrix.scales)
            torch.neg(rounded[0], out=spare)
            rest = _product(row, matrix.data, matrix.scales)
            out[i] = rounded[0, : matrix.rows].float() + rest[0, : matrix.rows]
        return out

    def _met(self, x: Tensor, matrix: PackedMatrix) -> Tensor:
        """Activations in the order of the nibbles."""
        planes = matrix.planes
        if not planes.width:
            return x.contiguous()
        runs = x.unflatten(1, (-1, planes.width))
        return torch.stack((runs, runs * planes.factor), 2).flatten(1)


def _product(x: Tensor, data: Tensor, scales: Tensor) -> Tensor:
    made: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, data, GROUP, scales)
    return made


def _by_parts(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """x [T, nibbles] times the matrix, in the dtype of x."""
    out = x.new_empty(len(x), len(matrix.data))
    step = max(ROWS, _WIDENED // matrix.nibbles // ROWS * ROWS)
    for first in range(0, len(matrix.data), step):
        part = slice(first, min(first + step, len(matrix.data)))
        torch.mm(x, _widened(matrix, part, x.dtype), out=out[:, part])
    return out[:, : matrix.rows]


def _widened(matrix: PackedMatrix, rows: slice, dtype: torch.dtype) -> Tensor:
    """Dequantise some rows, as columns: [nibbles, rows]."""
    half, run = _layout()
    data = matrix.data[rows].reshape(-1, matrix.data.shape[1] * 2, half)[:, : matrix.nibbles]
    num = (rows.stop - rows.start) // (2 * half)
    runs = data.unflatten(2, (-1, run)).transpose(0, 1)  # [nibbles, blocks, pairs, run]
    made = torch.empty(matrix.nibbles, num, half // run, 2, run, dtype=dtype)
    made[:, :, :, 0] = runs & 15
    made[:, :, :, 1] = runs >> 4
    wide = made.view(-1, GROUP, rows.stop - rows.start).sub_(8)
    scales = matrix.scales[: len(wide), rows].to(dtype)
    wide.mul_(scales[:, None, :, 0].contiguous())
    if matrix.planes.shifted:
        wide.add_(scales[:, None, :, 1].contiguous())
    return wide.view(matrix.nibbles, -1)


def _to_torch(columns: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(columns, 1)
    return packed


@cache
def _layout() -> tuple[int, int]:
    """How torch packs nibbles on this processor: (half, run).

    Blocks of 2 * half rows follow each other. In one, column by column, there are half bytes; those
    from run * p on have rows from 2 * run * p on in their low nibbles, and the run after in high
    ones.
    """
    rows = torch.arange(ROWS, dtype=torch.int32)[:, None].expand(ROWS, 2)
    parts = [_to_torch(each.contiguous()) for each in (rows % 16, rows // 16)]
    low = sum((part & 15).flatten().int() << 4 * i for i, part in enumerate(parts))
    high = sum((part >> 4).flatten().int() << 4 * i for i, part in enumerate(parts))
    assert isinstance(low, Tensor)
    assert isinstance(high, Tensor)
    run = int(high[0])
    half = int((low == 0).nonzero()[1])  # where the second column begins
    wanted = torch.arange(ROWS).view(-1, half // run, 2, run)
    for side, found in enumerate((low, high)):
        columns = wanted[:, :, side].flatten(1)[:, None].expand(-1, 2, -1)
        if not torch.equal(found.long(), columns.flatten()):
            raise RuntimeError("torch packs 4-bit weights in an unknown order")
    return half, run
