"""Which files of a model folder hold its weights, and which tensor is taken from which file.

Knows names and files; nothing is loaded here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from asyncllm.errors import StartupError
from asyncllm.models.spec import ModelSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# weights that are no model, or the same ones once more under the names of another library
_ASIDE = re.compile(r"(\.|adapter|consolidated).*", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*-)(\d{1,5})(-of-(\d{1,5})\.safetensors)")
_COMPARED_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor is.

    Attributes:
        files: that have it.
    """

    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of a folder.

    Attributes:
        folder: where they are.
        groups: all files, those together that hold shards of the same tensors.
        tensors: by name, those that are there.
        placed: by tensor, the file that has it, or that should, as the index says.
    """

    folder: Path
    groups: tuple[tuple[Path, ...], ...]
    tensors: Mapping[str, Stored]
    placed: Mapping[str, Path]


def weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """Files to read, and the tensors to take from each; None: all that it has.

    With an index, it decides. Without one, or where files that it names are gone, it is
    ``model.safetensors``; without that either, every other file that may hold a model.

    Raises:
        StartupError: there are none, some are missing, or the index cannot be read or names files
            outside the folder.
    """
    single = folder / SINGLE
    if (folder / INDEX).is_file():
        named = _index(folder / INDEX)
        missing = sorted(path for path in named if not os.path.isfile(path))
        if not missing:
            return dict(named)
        if single in named or not single.is_file():
            raise StartupError(f"{_lacks(folder, missing)}, named in {INDEX}")
    if single.is_file():
        return {single: None}
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    files = [path for path in found if not _ASIDE.fullmatch(path.name)]
    if not files:
        raise StartupError(_nothing(folder, [path.name for path in found]))
    if missing := sorted(set(_numbered(files)) - set(files)):
        raise StartupError(_lacks(folder, missing))
    return dict.fromkeys(files)


def read_checkpoint(folder: Path) -> Checkpoint:
    """The weights of ``folder``, by the headers of its files.

    Raises:
        StartupError: as :func:`weight_files`; a file cannot be read; or, without an index, two
            files hold the same tensor.
    """
    tensors: dict[str, Stored] = {}
    placed: dict[str, Path] = {}
    files = weight_files(folder)
    for path, named in files.items():
        held = _names(path)
        for name in held if named is None else held & named:
            tensors[name] = Stored((path,))
        for name in sorted(held if named is None else named):
            if name in placed:
                raise StartupError(
                    f"{placed[name]} and {path} both hold {name}, and there is no {INDEX} to tell "
                    f"which counts; remove one of the files"
                )
            placed[name] = path
    return Checkpoint(folder, tuple((path,) for path in files), tensors, placed)


def with_own_head(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """``spec``, without its tie where the checkpoint has an output matrix of its own.

    A tied checkpoint may hold the embedding a second time, as ``lm_head``. Where that is another
    matrix, it is the one that was trained.
    """
    embed, head = (checkpoint.placed.get(name) for name in (EMBED, HEAD))
    if not spec.tie_embeddings or embed is None or head is None:
        return spec
    return spec if _equal(embed, head) else replace(spec, tie_embeddings=False)


def _index(path: Path) -> dict[Path, frozenset[str]]:
    """By file that the index names, the tensors that it should hold."""
    try:
        placed = json.loads(path.read_bytes())["weight_map"]
        pairs = [(str(name), path.parent / file) for name, file in placed.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise StartupError(f"{path} is not a safetensors index: {err!r}") from err
    if not pairs:
        raise StartupError(f"{path} is not a safetensors index: it names no tensor")
    names: dict[Path, set[str]] = {}
    for name, file in pairs:
        if not file.is_relative_to(path.parent) or ".." in file.relative_to(path.parent).parts:
            raise StartupError(f"{path} names {str(file)[:200]}, which is outside the folder")
        names.setdefault(file, set()).add(name)
    return {file: frozenset(names[file]) for file in sorted(names)}


def _numbered(files: list[Path]) -> Iterator[Path]:
    """All files of the sets, such as model-00001-of-00003.safetensors, of which some are there."""
    matches = (_NUMBERED.fullmatch(path.name) for path in files)
    sets = {(m[1], len(m[2]), m[3], int(m[4])) for m in matches if m}
    for head, width, tail, total in sorted(sets):
        for i in range(1, total + 1):
            yield files[0].with_name(f"{head}{i:0{width}}{tail}")


def _lacks(folder: Path, missing: list[Path]) -> str:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"{folder} lacks {str(missing[0].relative_to(folder))[:200]}{more}"


def _nothing(folder: Path, aside: list[str]) -> str:
    if adapters := [name for name in aside if name.startswith("adapter")]:
        return (
            f"{folder} holds an adapter ({adapters[0]}), not a model: merge it into its base model "
            f"and serve that"
        )
    other = f" under the usual names, only {aside[0]}" if aside else ""
    return (
        f"{folder} holds no *.safetensors{other}; weights in other formats (.bin, .pt, .gguf) are "
        f"not read"
    )


def _names(path: Path) -> frozenset[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from None


def _equal(embed: Path, head: Path) -> bool:
    with safe_open(embed, framework="pt") as one, safe_open(head, framework="pt") as other:
        if EMBED not in one.keys() or HEAD not in other.keys():  # noqa: SIM118  # it has no "in"
            return True
        a, b = one.get_slice(EMBED), other.get_slice(HEAD)
        if a.get_shape() != b.get_shape() or a.get_dtype() != b.get_dtype():
            return False
        starts = range(0, a.get_shape()[0], _COMPARED_ROWS)
        parts = (slice(start, start + _COMPARED_ROWS) for start in starts)
        return all(torch.equal(a[part], b[part]) for part in parts)
