"""Reads tensors of weight files slice by slice, from one file or assembled from several.

Knows file formats; knows no parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asyncllm.errors import StartupError, reason_of
from asyncllm.models.gguf_tensors import GgufWeights
from asyncllm.models.unpickle import Pickles

FP8 = "F8_E4M3"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # types whose values are weights as they are

Index = tuple[slice, ...]  # one of each dimension, with start and stop


class TensorSource(Protocol):
    """A tensor that has not been read yet.

    Attributes:
        kind: its type, as safetensors calls it.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def kind(self) -> str: ...

    def read(self, index: Index, device: torch.device) -> Tensor:
        """Read its slice ``index``; computations, if any, run on ``device``.

        Returns:
            The slice on ``device`` or on the CPU. On a GPU it may still be being copied: use it on
            the current stream.
        """


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is.

    Attributes:
        files: that hold its shards, in order.
        key: its name in them.
        dim: along which they are joined.
    """

    files: tuple[Path, ...]
    key: str
    dim: int = 0


class PinnedBuffers:
    """Copies tensors to a GPU through pinned memory, in two buffers taken in turn; for one thread.

    A copy from memory that is not pinned would hold up every other thread that uses the GPU, above
    all those that allocate memory or load kernels.
    """

    def __init__(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._device: torch.device | None = None  # of the last copy

    def to(self, device: torch.device, found: Tensor) -> Tensor:
        """``found`` on ``device``; its copy is queued on the current stream."""
        turn = 1 - self._turn
        self._turn, self._device = turn, device
        if (copied := self._copied[turn]) is not None:
            copied.synchronize()
        with torch.cuda.device(device):
            if len(self._buffers[turn]) < found.nbytes:
                self._buffers[turn] = torch.empty(found.nbytes, dtype=torch.uint8, pin_memory=True)
            place = self._buffers[turn][: found.nbytes]
            # numpy copies in this thread alone, where torch would start one per core
            np.copyto(place.numpy(), found.contiguous().view(-1).view(torch.uint8).numpy())
            moved = place.view(found.dtype).view(found.shape).to(device, non_blocking=True)
            self._copied[turn] = _marked()
        return moved

    def wait(self) -> None:
        """Wait for all that this thread has queued on the GPU, if it has copied anything to it."""
        if self._device is not None:
            with torch.cuda.device(self._device):
                _marked().synchronize()


def _marked() -> torch.cuda.Event:
    """An event behind what is queued on the current stream."""
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event


class OpenFiles:
    """Weight files, each opened on first use.

    A context manager, at whose end all copies to a GPU are done; of one thread.
    """

    def __init__(self, pickles: Pickles) -> None:
        self._pickles = pickles
        self._pinned = PinnedBuffers()
        self._stack = ExitStack()
        self._stack.callback(self._pinned.wait)
        self._opened: dict[Path, _File] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self, path: Path) -> frozenset[str]:
        """Of the tensors in a file. Raises StartupError: it cannot be read."""
        return self._file(path).names()

    def tensor(self, stored: StoredTensor) -> TensorSource:
        """Raises StartupError: a file cannot be read, or its shard does not fit the others."""
        parts = [self._file(path).tensor(stored.key) for path in stored.files]
        return parts[0] if len(parts) == 1 else JoinedShards(stored, parts)

    def _file(self, path: Path) -> _File:
        if path not in self._opened:
            self._opened[path] = self._open(path)
        return self._opened[path]

    def _open(self, path: Path) -> _File:
        match path.suffix:
            case ".safetensors":
                return _Mapped(path, self._stack, self._pinned)
            case ".gguf":
                return GgufWeights(path)
            case _:
                return _Pickled(path, self._stack, self._pickles)


class _File(Protocol):
    def names(self) -> frozenset[str]: ...

    def tensor(self, key: str) -> TensorSource:
        """Raises StartupError: there is none, or the file cannot be read."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Reports any fault of the file in one line."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise StartupError(f"{path} cannot be read: {reason_of(error)}") from None


class _Mapped:
    """A safetensors file."""

    def __init__(self, path: Path, stack: ExitStack, pinned: PinnedBuffers) -> None:
        self._path, self._pinned = path, pinned
        with reading(path):
            self._file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))

    def names(self) -> frozenset[str]:
        return frozenset(self._file.keys())

    def tensor(self, key: str) -> TensorSource:
        with reading(self._path):
            return _MappedTensor(self._path, self._file.get_slice(key), self._pinned)


class _MappedTensor:
    def __init__(self, path: Path, found: object, pinned: PinnedBuffers) -> None:
        self._path, self._found, self._pinned = path, found, pinned
        self.shape = tuple(found.get_shape())  # type: ignore[attr-defined]
        self.kind: str = found.get_dtype()  # type: ignore[attr-defined]

    def read(self, index: Index, device: torch.device) -> Tensor:
        with reading(self._path):
            part: Tensor = self._found[index]  # type: ignore[index]
        return self._pinned.to(device, part) if device.type == "cuda" else part


class _Pickled:
    """A file that torch.save has written."""

    def __init__(self, path: Path, stack: ExitStack, pickles: Pickles) -> None:
        self._path, self._pickles = path, pickles
        self._found = pickles.open(path)
        stack.callback(pickles.forget, path)

    def names(self) -> frozenset[str]:
        return frozenset(self._found)

    def tensor(self, key: str) -> TensorSource:
        if key not in self._found:
            raise StartupError(f"{self._path} lacks {key}")
        return _PickledTensor(self._path, self._pickles, key, *self._found[key])


class _PickledTensor:
    def __init__(
        self, path: Path, pickles: Pickles, key: str, kind: str, shape: tuple[int, ...]
    ) -> None:
        self._path, self._pickles, self._key = path, pickles, key
        self.kind, self.shape = kind, shape

    def read(self, index: Index, device: torch.device) -> Tensor:
        return self._pickles.read(self._path, self._key, index, self.kind)


class JoinedShards:
    """The shards of a tensor, presented as the whole tensor."""

    def __init__(self, stored: StoredTensor, shards: Sequence[TensorSource]) -> None:
        self._shards, self._dim, self.kind = shards, stored.dim, shards[0].kind
        for path, shard in zip(stored.files, shards, strict=True):
            if shard.kind != self.kind or self._others(shard) != self._others(shards[0]):
                raise StartupError(
                    f"{path}: {stored.key} has type {shard.kind} and shape {list(shard.shape)}, "
                    f"its other shard {self.kind} and {list(shards[0].shape)}"
                )
        sizes = list(shards[0].shape)
        if self._dim >= len(sizes):
            raise StartupError(
                f"{stored.files[0]}: {stored.key} has shape {sizes}: its shards cannot be joined "
                f"along dimension {self._dim}"
            )
        sizes[self._dim] = sum(shard.shape[self._dim] for shard in shards)
        self.shape = tuple(sizes)

    def read(self, index: Index, device: torch.device) -> Tensor:
        dim, cut, parts, first = self._dim, index[self._dim], [], 0
        for shard in self._shards:
            start, stop = (min(max(i - first, 0), shard.shape[dim]) for i in (cut.start, cut.stop))
            if start < stop:
                part = (*index[:dim], slice(start, stop), *index[dim + 1 :])
                parts.append(shard.read(part, device))
            first += shard.shape[dim]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def _others(self, shard: TensorSource) -> list[int]:
        """Sizes of the dimensions that are not joined; empty for one that cannot be joined."""
        sizes = list(shard.shape)
        if self._dim < len(sizes):
            del sizes[self._dim]
            return sizes
        return [-1]


class BlockScaled:
    """8-bit floats times the scale of their block; blocks are in the last two dimensions.

    The result is float32, whether or not the slice starts at a block boundary.
    """

    kind = "F32"

    def __init__(self, values: TensorSource, scales: TensorSource, block: tuple[int, int]) -> None:
        self._values, self._scales, self._block = values, scales, block
        self.shape = values.shape

    def read(self, index: Index, device: torch.device) -> Tensor:
        made = self._values.read(index, device).to(device).float()
        blocks = [
            slice(cut.start // size, -(-cut.stop // size))
            for cut, size in zip(index[-2:], self._block, strict=True)
        ]
        scales = self._scales.read((*index[:-2], *blocks), device).to(device).float()
        for dim, cut, size in zip((-2, -1), index[-2:], self._block, strict=True):
            first = cut.start // size
            of = torch.arange(cut.start, cut.stop, device=device) // size - first
            scales = scales.index_select(dim, of)
        return made.mul_(scales)
