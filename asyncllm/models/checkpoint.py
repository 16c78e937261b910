"""Finds the weight files of a model folder, and the file from which each tensor is read.

Knows names and files; loads nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from asyncllm.errors import StartupError
from asyncllm.models import deepspeed
from asyncllm.models.gguf_tensors import PACKED, GgufTensor
from asyncllm.models.spec import ModelSpec
from asyncllm.models.tensors import OpenFiles, StoredTensor
from asyncllm.models.unpickle import Pickles

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GGUF = "model.gguf"
_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
_HEADS = ("language_model.lm_head", "lm_head")
_DTYPES = {"BF16": "bf16", "F16": "fp16"}  # by the dtype of the embedding; else fp32

_NUMBERED = re.compile(r"(.*-)(\d{1,5})(-of-(\d{1,5})\.(?:safetensors|bin))")
_COMPARED_ROWS = 8192


@dataclass(frozen=True, slots=True)
class _FileLayout:
    """File names of a checkpoint format."""

    index: str
    single: str
    suffix: str
    aside: re.Pattern[str]  # weights that are not a model, or duplicates under other names


_ASIDE = r"\.|adapter|consolidated"
_STYLES = (
    _FileLayout(INDEX, SINGLE, ".safetensors", re.compile(f"({_ASIDE}).*", re.IGNORECASE)),
    _FileLayout(
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
        ".bin",
        re.compile(f"({_ASIDE}|training_args|optimizer|scheduler|scaler|rng|random).*", re.I),
    ),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of a folder. Use it as a context manager: a process may read its files.

    Attributes:
        folder: where they are.
        groups: all files; files with shards of the same tensors are grouped.
        tensors: all tensors, by name.
        placed: by tensor, the file that has it, or should have it according to the index.
    """

    folder: Path
    groups: tuple[tuple[Path, ...], ...]
    tensors: Mapping[str, StoredTensor]
    placed: Mapping[str, Path]
    pickles: Pickles

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pickles.close()

    def open(self) -> OpenFiles:
        """Open its files, for reading in one thread."""
        return OpenFiles(self.pickles)


def weight_files(folder: Path, load_way: str = "HF") -> dict[Path, frozenset[str] | None]:
    """Files to read, and the tensors to take from each; None: all of them.

    Safetensors are preferred to pickles. If there is an index, it decides. Otherwise, or if files
    that it names are missing, ``model.safetensors`` is read; if that is missing too, every other
    file that may hold a model.

    Raises:
        StartupError: no files, missing files, an index that cannot be read or that names files
            outside the folder.
    """
    if load_way == "DS":
        return dict.fromkeys(
            path for files in deepspeed.layer_files(folder).values() for path in files
        )
    aside: list[str] = []
    for style in _STYLES:
        if found := _files_of(folder, style, aside):
            return found
    if (folder / GGUF).is_file():
        return {folder / GGUF: None}
    raise StartupError(_nothing(folder, aside))


def _files_of(
    folder: Path, style: _FileLayout, aside: list[str]
) -> dict[Path, frozenset[str] | None]:
    """The files of one style, possibly none; ``aside`` collects the names of ignored files."""
    single = folder / style.single
    if (folder / style.index).is_file():
        named = _index(folder / style.index)
        missing = sorted(path for path in named if not os.path.isfile(path))
        if not missing:
            return dict(named)
        if single in named or not single.is_file():
            raise StartupError(f"{_lacks(folder, missing)}, named in {style.index}")
    if single.is_file():
        return {single: None}
    found = sorted(path for path in folder.glob(f"*{style.suffix}") if path.is_file())
    files = [path for path in found if not style.aside.fullmatch(path.name)]
    aside += [path.name for path in found]
    if missing := sorted(set(_numbered(files)) - set(files)):
        raise StartupError(_lacks(folder, missing))
    return dict.fromkeys(files)


def read_checkpoint(
    folder: Path, load_way: str = "HF", spec: ModelSpec | None = None
) -> Checkpoint:
    """The weights of ``folder``, by the headers of its files.

    Args:
        load_way: "HF", or "DS" for the files of DeepSpeed, which need ``spec``.

    Raises:
        StartupError: as :func:`weight_files`; a file cannot be read; without an index, two files
            hold the same tensor; or a model that is not in DeepSpeed's format.
    """
    pickles = Pickles()
    try:
        if load_way == "DS":
            assert spec is not None
            return _deepspeed(folder, spec, pickles)
        return _huggingface(folder, pickles)
    except StartupError:
        pickles.close()
        raise


def _names(path: Path, pickles: Pickles) -> frozenset[str]:
    with OpenFiles(pickles) as opened:  # one at a time: unmapped files are loaded whole
        return opened.names(path)


def _huggingface(folder: Path, pickles: Pickles) -> Checkpoint:
    tensors: dict[str, StoredTensor] = {}
    placed: dict[str, Path] = {}
    files = weight_files(folder)
    for path, named in files.items():
        held = _names(path, pickles)
        for name in held if named is None else held & named:
            tensors[name] = StoredTensor((path,), name)
        for name in sorted(held if named is None else named):
            if name in placed:
                raise StartupError(
                    f"{placed[name]} and {path} both hold {name}, and there is no {INDEX} to tell "
                    f"which counts; remove one of the files"
                )
            placed[name] = path
    return Checkpoint(folder, tuple((path,) for path in files), tensors, placed, pickles)


def _deepspeed(folder: Path, spec: ModelSpec, pickles: Pickles) -> Checkpoint:
    if spec.architecture not in deepspeed.ARCHITECTURES:
        served = ", ".join(deepspeed.ARCHITECTURES)
        raise StartupError(f"--load_way DS reads {served}, and this is {spec.architecture}")
    groups = deepspeed.layer_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for layer, files in groups.items():
        keys = _names(files[0], pickles)
        for path in files[1:]:
            if more := sorted(_names(path, pickles) - keys):
                raise StartupError(f"{path} holds {more[0][:200]}, and {files[0].name} does not")
        found = deepspeed.place(layer, len(spec.layers), keys)
        for name, (key, dim) in found.items():
            tensors[name] = StoredTensor(files[:1] if dim is None else files, key, dim or 0)
    placed = {name: stored.files[0] for name, stored in tensors.items()}
    return Checkpoint(folder, tuple(groups.values()), tensors, placed, pickles)


def as_stored(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """``spec`` adjusted to the checkpoint: tensor names, the dtype if config.json leaves it open,
    the layers that are not quantised, and untied if it has a separate output matrix.

    The text part of a multimodal model has one of two prefixes. A tied checkpoint may contain the
    embedding a second time, as ``lm_head``; if the two differ, ``lm_head`` is the one that was
    trained.
    """
    for prefix in _PREFIXES:
        if f"{prefix}embed_tokens.weight" in checkpoint.tensors:
            spec = replace(spec, prefix=prefix)
            break
    if (form := spec.stored) is not None:
        layers = (name.removesuffix(".weight") for name in checkpoint.tensors)
        plain = frozenset(
            layer
            for layer in layers
            if f"{layer}.weight" in checkpoint.tensors
            and f"{layer}.{form.main}" not in checkpoint.tensors
        )
        spec = replace(spec, stored=replace(form, plain=plain))
    if any(path.suffix == ".gguf" for path in checkpoint.placed.values()):
        spec = replace(spec, gguf=_gguf_types(checkpoint))
    for head in _HEADS:
        if f"{head}.weight" in checkpoint.tensors:
            spec = replace(spec, head=head)
            break
    names = f"{spec.prefix}embed_tokens.weight", f"{spec.head}.weight"
    embed, matrix = (checkpoint.tensors.get(name) for name in names)
    with checkpoint.open() as opened:
        if spec.dtype == "auto":
            kind = "" if embed is None else opened.tensor(embed).kind
            spec = replace(spec, dtype=_DTYPES.get(kind, "fp32"))
        if not spec.tie_embeddings or embed is None or matrix is None:
            return spec
        return spec if _equal(opened, embed, matrix) else replace(spec, tie_embeddings=False)


def _gguf_types(checkpoint: Checkpoint) -> tuple[tuple[str, str], ...]:
    with checkpoint.open() as opened:
        tensors = ((name, opened.tensor(stored)) for name, stored in checkpoint.tensors.items())
        return tuple(
            (name, tensor.type)
            for name, tensor in sorted(tensors, key=lambda item: item[0])
            if isinstance(tensor, GgufTensor) and tensor.type in PACKED and len(tensor.shape) == 2
        )


def _index(path: Path) -> dict[Path, frozenset[str]]:
    """The tensors that each file should hold according to the index."""
    try:
        placed = json.loads(path.read_bytes())["weight_map"]
        pairs = [(str(name), path.parent / file) for name, file in placed.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise StartupError(f"{path} is not an index of weights: {err!r}") from err
    if not pairs:
        raise StartupError(f"{path} is not an index of weights: it names no tensor")
    names: dict[Path, set[str]] = {}
    for name, file in pairs:
        if not file.is_relative_to(path.parent) or ".." in file.relative_to(path.parent).parts:
            raise StartupError(f"{path} names {str(file)[:200]}, which is outside the folder")
        names.setdefault(file, set()).add(name)
    return {file: frozenset(names[file]) for file in sorted(names)}


def _numbered(files: list[Path]) -> Iterator[Path]:
    """All files of numbered sets (model-00001-of-00003.safetensors) that have any file present."""
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
    if layers := sorted(path.name for path in folder.glob("layer_*.pt")):
        return f"{folder} holds a checkpoint of DeepSpeed ({layers[0]}): --load_way DS reads it"
    other = f" under the usual names, only {aside[0]}" if aside else ""
    if found := sorted(folder.glob("*.gguf")):
        return f"{folder} holds GGUF files: --model_dir {found[0]} serves the first of them"
    return (
        f"{folder} holds no *.safetensors and no *.bin{other}; weights in other formats (.pt) are "
        f"not read"
    )


def _equal(opened: OpenFiles, embed: StoredTensor, head: StoredTensor) -> bool:
    a, b = opened.tensor(embed), opened.tensor(head)
    if a.shape != b.shape or a.kind != b.kind or len(a.shape) != 2:
        return False
    rows, columns = a.shape
    cpu = torch.device("cpu")
    return all(
        torch.equal(*(each.read((part, slice(0, columns)), cpu) for each in (a, b)))
        for part in (
            slice(start, min(start + _COMPARED_ROWS, rows))
            for start in range(0, rows, _COMPARED_ROWS)
        )
    )
