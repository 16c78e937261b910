"""Checkpoint tensors to parameters: streamed file by file, only this rank's share of each tensor.

Knows names and spans; knows neither models nor formats of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from asyncllm.errors import StartupError
from asyncllm.models.checkpoint import Checkpoint
from asyncllm.models.tensors import FLOATS, FP8, BlockScaled, Index, OpenFiles, Source

SCALE = "_scale_inv"  # what the name of a block-quantised weight's scales ends with
_CHUNK = 1 << 24  # elements that are read at a time

SliceSpan = tuple[int, int, int]  # (start in the checkpoint tensor, start in the parameter, length)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes: spans along ``dim``, of which it has ``size``, to ours.

    ``param`` may be a view, such as one expert of a stack or a transposed weight, and have any
    number of dimensions. A checkpoint tensor that has several targets goes to all of them.
    """

    param: Tensor
    dim: int
    size: int
    spans: tuple[SliceSpan, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the checkpoint tensor."""
        wanted = list(self.param.shape)
        wanted[self.dim] = self.size
        return tuple(wanted)

    def pieces(self) -> Iterator[tuple[Index, Tensor]]:
        """Slices of the checkpoint tensor, each with its place; none has too many elements."""
        for start, into, length in self.spans:
            place = self.param.narrow(self.dim, into, length)
            index = [slice(0, size) for size in self.shape]
            index[self.dim] = slice(start, start + length)
            first, num_rows = index[0].start, len(place)
            step = max(1, _CHUNK * num_rows // max(1, place.numel()))
            for row in range(0, num_rows, step):
                end = min(row + step, num_rows)
                yield (slice(first + row, first + end), *index[1:]), place[row:end]


def whole(param: Tensor) -> Target:
    """The checkpoint tensor as it is."""
    return Target(param, 0, param.shape[0], ((0, 0, param.shape[0]),))


@dataclass(frozen=True, slots=True)
class _Load:
    """What is to be loaded from where."""

    checkpoint: Checkpoint
    wanted: dict[str, list[Target]]
    block: tuple[int, int] | None


def load(
    checkpoint: Checkpoint,
    targets: Iterable[tuple[str, Target]],
    ignores: Callable[[str], bool],
    progress: Callable[[int, int], None],
    *,
    block: tuple[int, int] | None = None,
    num_threads: int = 4,
) -> None:
    """Fill every target from the files of ``checkpoint``.

    Files are memory-mapped where they can be, and read once; nothing but the slices that this rank
    keeps is copied.

    Args:
        progress: told (bytes done, bytes in all) after each file.
        block: rows and columns that share a scale; 8-bit weights become the parameter's dtype.
            None: the checkpoint is not quantised.

    Raises:
        StartupError: a damaged file, a tensor of unexpected shape or type, a scale that is missing
            or too many, a parameter that no file fills, or a tensor that nobody wants.
    """
    wanted: dict[str, list[Target]] = {}
    for name, target in targets:
        wanted.setdefault(name, []).append(target)
    _check_names(checkpoint, wanted, ignores, block is not None)
    groups: dict[tuple[Path, ...], list[str]] = {files: [] for files in checkpoint.groups}
    of = {path: files for files in groups for path in files}
    for name in sorted(wanted):
        groups[of[checkpoint.tensors[name].files[0]]].append(name)
    sizes = {files: sum(f.stat().st_size for f in files) for files in groups}
    work, done = _Load(checkpoint, wanted, block), 0
    # pickles come from one process, and those that cannot be mapped are whole in its memory
    mapped = all(path.suffix == ".safetensors" for path in of)
    with ThreadPoolExecutor(num_threads if mapped else 1) as pool:
        for files in pool.map(lambda files: _load_files(work, files, groups[files]), groups):
            done += sizes[files]
            progress(done, sum(sizes.values()))


def _check_names(
    checkpoint: Checkpoint,
    wanted: dict[str, list[Target]],
    ignores: Callable[[str], bool],
    scaled: bool,
) -> None:
    found = checkpoint.tensors.keys()
    if missing := sorted(wanted.keys() - found):
        where = checkpoint.placed.get(missing[0], checkpoint.folder)
        raise StartupError(f"{where} lacks {len(missing)} tensors, the first: {missing[0]}")

    def known(name: str) -> bool:
        of = name.removesuffix(SCALE)
        return ignores(name) or (scaled and of != name and (of in wanted or ignores(of)))

    if strangers := sorted(n for n in found - wanted.keys() if not known(n)):
        where = checkpoint.placed[strangers[0]]
        raise StartupError(
            f"{where} holds {len(strangers)} unknown tensors, the first: {_said(strangers[0])}"
        )


def _said(name: str) -> str:
    """A name of a stranger's making, for one line on a terminal."""
    return (name if name.isprintable() else ascii(name))[:200]


def _load_files(work: _Load, files: tuple[Path, ...], names: list[str]) -> tuple[Path, ...]:
    with work.checkpoint.open() as opened:
        for name in names:
            label = f"{files[0]}: {name}"
            source = _source(work, opened, name, label)
            for target in work.wanted[name]:
                _copy(label, source, target)
    return files


def _source(work: _Load, opened: OpenFiles, name: str, label: str) -> Source:
    """The tensor ``name`` in numbers that can be copied, by its scales where it has some."""
    tensors = work.checkpoint.tensors
    source = opened.tensor(tensors[name])
    scale_name = f"{name}{SCALE}"
    scaled = work.block is not None and scale_name in tensors
    if source.kind == FP8 and work.block is not None:
        if not scaled:
            raise StartupError(f"{label} has type {FP8}, and there are no scales ({scale_name})")
        if len(source.shape) < 2:
            raise StartupError(f"{label} has type {FP8} and one dimension: blocks need two")
        scales = opened.tensor(tensors[scale_name])
        made = BlockScaled(source, scales, work.block)
        if scales.shape != made.scale_shape or scales.kind not in FLOATS:
            raise StartupError(
                f"{label}{SCALE} has type {scales.kind} and shape {list(scales.shape)}; blocks of "
                f"{work.block[0]} x {work.block[1]} of {list(source.shape)} want float32 and "
                f"{list(made.scale_shape)}"
            )
        return made
    if scaled:
        raise StartupError(f"{label} has scales ({scale_name}), and type {source.kind}, not {FP8}")
    if source.kind == FP8:
        raise StartupError(
            f"{label} has type {FP8}, and config.json has no quantization_config that says how it "
            f"is scaled"
        )
    if source.kind not in FLOATS:
        raise StartupError(
            f"{label} has type {source.kind}: weights of quantized integers are not read"
        )
    return source


@torch.no_grad()
def _copy(label: str, source: Source, target: Target) -> None:
    if source.shape != target.shape:
        raise StartupError(
            f"{label} has shape {list(source.shape)}, config.json wants {list(target.shape)}"
        )
    for index, place in target.pieces():
        place.copy_(source.read(index, place.device))
