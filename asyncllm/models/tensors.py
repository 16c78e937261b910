"""Tensors of weight files, read slice by slice: of one file, or put together from several tensors.

Knows formats of files; knows no parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asyncllm.errors import StartupError
from asyncllm.models.checkpoint import Checkpoint

FP8 = "F8_E4M3"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # types whose values are weights as they are

Index = tuple[slice, ...]  # one of each dimension, with start and stop


class Source(Protocol):
    """A tensor that has not been read yet.

    Attributes:
        kind: its type, as safetensors calls it.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def kind(self) -> str: ...

    def read(self, index: Index, device: torch.device) -> Tensor:
        """Its slice ``index``; on ``device`` if there is something to compute, else anywhere."""


class OpenFiles:
    """The files of a checkpoint, each opened when a tensor of it is asked for.

    A context manager; of one thread.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stack = ExitStack()
        self._opened: dict[Path, object] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tensor(self, name: str) -> Source:
        """The checkpoint's tensor ``name``.

        Raises:
            StartupError: its file cannot be read.
        """
        (path,) = self._checkpoint.tensors[name].files
        with reading(path):
            if path not in self._opened:
                file = safe_open(path, framework="pt", device="cpu")
                self._opened[path] = self._stack.enter_context(file)
            return _Mapped(path, self._opened[path].get_slice(name))  # type: ignore[attr-defined]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong with the file is one line."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from None


class _Mapped:
    """A tensor of a safetensors file."""

    def __init__(self, path: Path, found: object) -> None:
        self._path, self._found = path, found
        self.shape = tuple(found.get_shape())  # type: ignore[attr-defined]
        self.kind: str = found.get_dtype()  # type: ignore[attr-defined]

    def read(self, index: Index, device: torch.device) -> Tensor:
        with reading(self._path):
            part: Tensor = self._found[index]  # type: ignore[index]
            return part


class BlockScaled:
    """8-bit floats times the scale of their block; blocks are in the last two dimensions.

    What is read is float32, whether the slice begins with a block or not.
    """

    kind = "F32"

    def __init__(self, values: Source, scales: Source, block: tuple[int, int]) -> None:
        self._values, self._scales, self._block = values, scales, block
        self.shape = values.shape

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """That the scales must have."""
        *first, rows, columns = self.shape
        return (*first, -(-rows // self._block[0]), -(-columns // self._block[1]))

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
