"""Checkpoint files to parameters: streamed file by file, only this rank's share of each tensor.

Knows names, spans and files; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asyncllm.errors import StartupError
from asyncllm.models.checkpoint import Checkpoint

Span = tuple[int, int, int]  # (start in the checkpoint tensor, start in the parameter, length)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes: spans along ``dim``, of which it has ``size``, to ours."""

    param: Tensor
    dim: int
    size: int
    spans: tuple[Span, ...]


def whole(param: Tensor) -> Target:
    """The checkpoint tensor as it is."""
    return Target(param, 0, param.shape[0], ((0, 0, param.shape[0]),))


def load(
    checkpoint: Checkpoint,
    targets: Iterable[tuple[str, Target]],
    ignores: Callable[[str], bool],
    progress: Callable[[int, int], None],
    num_threads: int = 4,
) -> None:
    """Fill every target from the files of ``checkpoint``.

    Files are memory-mapped and read once; nothing but the slices that this rank keeps is copied.

    Args:
        progress: told (bytes done, bytes in all) after each file.

    Raises:
        StartupError: a damaged file, a tensor of unexpected shape or type, a parameter that no file
            fills, or a tensor that nobody wants.
    """
    wanted, files = dict(targets), checkpoint.files
    total, done = sum(f.stat().st_size for f in files), 0
    found = frozenset().union(*files.values())
    if missing := sorted(wanted.keys() - found):
        where = checkpoint.placed.get(missing[0], checkpoint.folder)
        raise StartupError(f"{where} lacks {len(missing)} tensors, the first: {missing[0]}")
    if strangers := sorted(n for n in found - wanted.keys() if not ignores(n)):
        where = checkpoint.placed[strangers[0]]
        raise StartupError(
            f"{where} holds {len(strangers)} unknown tensors, the first: {strangers[0]}"
        )
    with ThreadPoolExecutor(num_threads) as pool:
        for path in pool.map(lambda f: _load_file(f, files[f] & wanted.keys(), wanted), files):
            done += path.stat().st_size
            progress(done, total)


def _load_file(path: Path, names: frozenset[str], wanted: dict[str, Target]) -> Path:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in sorted(names):
                _copy(f"{path}: {name}", file.get_slice(name), wanted[name])
    except (SafetensorError, OSError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from None
    return path


@torch.no_grad()
def _copy(name: str, source: object, target: Target) -> None:
    shape = list(source.get_shape())  # type: ignore[attr-defined]
    param = target.param
    wanted = list(param.shape)
    wanted[target.dim] = target.size
    if shape != wanted:
        raise StartupError(f"{name} has shape {shape}, config.json wants {wanted}")
    kind = source.get_dtype()  # type: ignore[attr-defined]
    if not kind.startswith(("F", "BF")):
        raise StartupError(f"{name} has type {kind}: weights of quantized integers are not read")
    for start, into, length in target.spans:
        pick = slice(start, start + length)
        part = source[pick] if target.dim == 0 else source[:, pick]  # type: ignore[index]
        param.narrow(target.dim, into, length).copy_(part)
