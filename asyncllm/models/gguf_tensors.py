"""Presents GGUF tensors in transformers' conventions: names, order of rows, offsets of norms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asyncllm.errors import StartupError
from asyncllm.models.gguf import GgufFile, TensorPlace, read_gguf
from asyncllm.models.gguf_arch import arch_of, hf_name, is_weight
from asyncllm.models.gguf_types import GroupedValues, floats, groups, is_float

# types that CPUs take as they are: all in groups
PACKED = frozenset({"Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"})
_CHUNK = 1 << 22  # elements decoded at a time


class GgufWeights:
    """A file, read by transformers' names; tensors without one keep their own.

    Raises:
        StartupError: it cannot be read, or its architecture is not served.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = read_gguf(path)
        self._arch = arch_of(self._file)
        self._names = {
            hf_name(self._arch, name) or name: name
            for name in self._file.tensors
            if is_weight(name)
        }

    def names(self) -> frozenset[str]:
        return frozenset(self._names)

    def tensor(self, key: str) -> GgufTensor:
        if key not in self._names:
            raise StartupError(f"{self._path} lacks {key}")
        name = self._names[key]
        place, part = self._file.tensors[name], key.rpartition(".")[0]
        heads = 0
        if self._arch.pairs_apart and part.endswith(("q_proj", "k_proj")):
            kind = "" if part.endswith("q_proj") else "_kv"
            prefix = self._file.meta["general.architecture"]
            heads = self._file.meta.get(f"{prefix}.attention.head_count{kind}", 0)
            if type(heads) is not int or heads < 1 or place.shape[0] % (2 * heads):
                raise StartupError(
                    f"{self._path}: {name} has shape {list(place.shape)}, and there are "
                    f"{str(heads)[:100]} heads"
                )
        is_norm = part.endswith("norm")
        return GgufTensor(self._file, place, heads, self._arch.norm_offset if is_norm else 0.0)


class GgufTensor:
    """Implements :class:`asyncllm.models.tensors.TensorSource`, with dequantised values.

    Args:
        heads: in each of which rows alternate between two halves that transformers keeps apart;
            0: rows are as transformers has them.
        offset: subtracted from the values.
    """

    def __init__(self, file: GgufFile, place: TensorPlace, heads: int, offset: float) -> None:
        self._file, self._place, self._heads, self._offset = file, place, heads, offset
        self.shape = place.shape
        self.type = place.kind
        self.nbytes = place.nbytes
        self.kind = place.kind if is_float(place.kind) else "F32"

    def read(self, index: tuple[slice, ...], device: torch.device) -> Tensor:
        if len(self.shape) == 1:
            made = floats_of(self._place, self._raw(slice(0, self.shape[0]), whole=True))
            if self._heads:
                made = made[self._order(slice(0, self.shape[0]))]
            return made[index[0]].sub(self._offset) if self._offset else made[index[0]]
        rows, *between, columns = index
        if between:
            raise StartupError(f"{self._file.path}: a tensor of shape {list(self.shape)}")
        if is_float(self.type):
            return floats(self.type, self._raw(rows))[:, columns]
        step = max(1, _CHUNK // self.shape[-1])
        parts = [
            self.groups(slice(first, min(first + step, rows.stop))).widened()[:, columns]
            for first in range(rows.start, rows.stop, step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def groups(self, rows: slice) -> GroupedValues:
        """Some rows of a matrix in its low-bit format."""
        return groups(self.type, self._raw(rows))

    def _raw(self, rows: slice, whole: bool = False) -> Tensor:
        """uint8 [rows, bytes of a row], a copy; ``whole``: a single row."""
        place = self._place
        table = np.frombuffer(self._file.data, np.uint8, place.nbytes, place.start)
        if whole:
            return torch.from_numpy(table.copy()).unsqueeze(0)
        table = table.reshape(self.shape[0], -1)
        if self._heads:
            return torch.from_numpy(table[self._order(rows).numpy()])
        return torch.from_numpy(table[rows].copy())

    def _order(self, rows: slice) -> Tensor:
        """The positions in the file of transformers' ``rows``."""
        half = self.shape[0] // self._heads // 2
        wanted = torch.arange(rows.start, rows.stop)
        head, inner = wanted // (2 * half), wanted % (2 * half)
        return head * 2 * half + inner % half * 2 + inner // half


def floats_of(place: TensorPlace, raw: Tensor) -> Tensor:
    """Values of a vector, which is one row."""
    if is_float(place.kind):
        return floats(place.kind, raw)[0]
    return groups(place.kind, raw).widened()[0]
