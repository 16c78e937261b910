"""Resolves ``--model_dir`` to a model folder: a path, a GGUF file, a hub id, or the embedded model.

Also checks that the folder can be served; does not read what the files contain.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from tqdm import tqdm

from asyncllm.demo import Bar, ensure_demo_model
from asyncllm.environment import hub_offline
from asyncllm.errors import StartupError
from asyncllm.gguf_folder import gguf_folder
from asyncllm.log import ProgressBar
from asyncllm.models.checkpoint import INDEX, SINGLE, weight_files

_log = logging.getLogger("asyncllm.hub")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# what a server reads: config, tokenizer, template and safetensors
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "tokeniz*.py"]
# copies of the same weights under another name or for another runtime
_UNWANTED = ["consolidated*", "original/*", "onnx/*", "openvino/*"]


def resolve_model_dir(
    model_dir: str | None, cache_dir: Path, bar: Bar = ProgressBar, *, load_way: str | None = "HF"
) -> Path:
    """The folder to serve from.

    Args:
        model_dir: a folder, a GGUF file, a hub id ``org/name``, or None for the embedded model. A
            folder wins over a hub id of the same spelling.
        cache_dir: where the embedded model and the folders for GGUF files are kept; hub models go
            to huggingface_hub's own cache.
        bar: draws the progress of the embedded model; huggingface_hub has bars of its own.
        load_way: "HF" or "DS", the format of the weights; the hub has safetensors only. None: no
            weights are needed.

    Raises:
        StartupError: nothing found, a folder that cannot be served, or a failed download.
    """
    if model_dir is None:
        return ensure_demo_model(cache_dir, bar)
    folder = Path(model_dir).expanduser()
    if folder.is_dir():
        check_model_dir(folder, load_way)
        return folder
    if folder.exists() or folder.suffix == ".gguf":
        return _of_file(folder, cache_dir, load_way)
    if not _HUB_ID.fullmatch(model_dir):
        raise StartupError(
            f"--model_dir {model_dir}: no such folder (a model on the Hugging Face hub is named "
            f"org/name)"
        )
    folder = _download(model_dir, weights=load_way is not None)
    check_model_dir(folder, load_way)
    return folder


def _of_file(file: Path, cache_dir: Path, load_way: str | None) -> Path:
    if file.suffix != ".gguf":
        raise StartupError(f"--model_dir {file} is a file; give the folder that holds it")
    if load_way == "DS":
        raise StartupError(f"--load_way DS: {file} is a GGUF file")
    return gguf_folder(file, cache_dir)


def names_of(folder: Path) -> tuple[str, ...]:
    """The names of the model in ``folder``: the folder's own name (links resolved), or for a folder
    in the hub's cache that of its repository, with and without owner. May be empty.
    """
    parts = Path(os.path.abspath(folder)).parts[1:]
    if parts[-2:-1] == ("snapshots",):
        parts = parts[:-2]
    while parts and _COMMIT.fullmatch(parts[-1]):
        parts = parts[:-1]
    if not parts:
        return ()
    repo = parts[-1].removeprefix("models--").replace("--", "/")
    if not parts[-1].startswith("models--"):
        return (parts[-1],)
    return tuple(dict.fromkeys((repo.rpartition("/")[2], repo)))


def check_model_dir(folder: Path, load_way: str | None = "HF") -> None:
    """Refuse a folder that cannot be served, and say what it lacks.

    Raises:
        StartupError: no ``config.json``, no weights in the format of ``load_way``, or shards that
            are missing.
    """
    if not (folder / "config.json").is_file():
        if load_way is not None and (found := sorted(folder.glob("*.gguf"))):
            raise StartupError(
                f"{folder} is not a Hugging Face model folder, but has GGUF files: name one "
                f"of them (--model_dir {found[0]})"
            )
        own = " but params.json, Mistral's own format" if (folder / "params.json").is_file() else ""
        raise StartupError(f"{folder} has no config.json{own}: not a Hugging Face model folder")
    if load_way is None:
        return
    if set(weight_files(folder, load_way)) == {folder / SINGLE} and (folder / INDEX).is_file():
        _log.info("%s: all weights are read from %s", folder, SINGLE)


class _TerminalBar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """The hub client's progress bar: on terminals only, even if its other bars are off."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{**options, "disable": None})


def _download(repo: str, *, weights: bool) -> Path:
    # imported here: a local folder does not need it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's

    _log.info("looking for %s on the Hugging Face hub", repo)
    try:
        return Path(
            snapshot_download(
                repo,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED if weights else [*_UNWANTED, "*.safetensors"],
                tqdm_class=_TerminalBar,
            )
        )
    except (OSError, ValueError, HTTPError) as err:
        raise StartupError(
            f"--model_dir {repo}: no such folder, and not available from the Hugging Face hub: "
            f"{_reason(err)}. Give a local folder with config.json and *.safetensors instead"
        ) from err


def _reason(err: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    match err:
        case GatedRepoError():
            return "its licence must be accepted on its hub page, and HF_TOKEN set"
        case RepositoryNotFoundError():
            return "there is no such model, or it is private and HF_TOKEN is not set"
        case LocalEntryNotFoundError() if hub_offline():
            return "HF_HUB_OFFLINE is set, and the model is not in the local hub cache"
        case LocalEntryNotFoundError():
            return "no connection, and the model is not in the local hub cache"
        case _:
            return str(err).strip().partition("\n")[0].rstrip(".") or type(err).__name__
