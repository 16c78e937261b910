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

Span = tuple[int, int, int]  # (start in the checkpoint tensor, start in the parameter, length)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes: spans of it along ``dim``, where it has ``size``, of a parameter."""

    param: Tensor
    dim: int
    size: int
    spans: tuple[Span, ...]


def whole(param: Tensor) -> Target:
    """The checkpoint tensor as it is."""
    return Target(param, 0, param.shape[0], ((0, 0, param.shape[0]),))


def load(
    model_dir: Path,
    targets: Iterable[tuple[str, Target]],
    ignores: Callable[[str], bool],
    progress: Callable[[int, int], None],
    num_threads: int = 4,
) -> None:
    """Fill every target from the ``*.safetensors`` of ``model_dir``.

    Files are memory-mapped and read once; nothing but the slices that this rank keeps is copied.

    Args:
        progress: told (bytes done, bytes in all) after each file.

    Raises:
        StartupError: no files, a damaged file, a tensor of unexpected shape, a parameter that no
            file fills, or a tensor that nobody wants.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise StartupError(f"{model_dir} holds no *.safetensors files")
    wanted = dict(targets)
    total, done = sum(f.stat().st_size for f in files), 0
    found: set[str] = set()
    strangers: list[tuple[Path, str]] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for path, names in zip(
            files, pool.map(lambda f: _load_file(f, wanted), files), strict=True
        ):
            found |= names & wanted.keys()
            strangers += [(path, n) for n in names if n not in wanted and not ignores(n)]
            done += path.stat().st_size
            progress(done, total)
    if missing := sorted(wanted.keys() - found):
        raise StartupError(f"{model_dir} lacks {len(missing)} tensors, the first: {missing[0]}")
    if strangers:
        path, name = min(strangers)
        raise StartupError(f"{path} holds {len(strangers)} unknown tensors, the first: {name}")


def _load_file(path: Path, wanted: dict[str, Target]) -> set[str]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
            for name in names & wanted.keys():
                _copy(f"{path}: {name}", file.get_slice(name), wanted[name])
    except SafetensorError as error:
        raise StartupError(f"{path} cannot be read: {error}") from None
    return names


@torch.no_grad()
def _copy(name: str, source: object, target: Target) -> None:
    shape = list(source.get_shape())  # type: ignore[attr-defined]
    param = target.param
    wanted = list(param.shape)
    wanted[target.dim] = target.size
    if shape != wanted:
        raise StartupError(f"{name} has shape {shape}, config.json wants {wanted}")
    for start, into, length in target.spans:
        pick = slice(start, start + length)
        part = source[pick] if target.dim == 0 else source[:, pick]  # type: ignore[index]
        param.narrow(target.dim, into, length).copy_(part)
