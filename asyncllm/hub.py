"""From ``--model_dir`` to a folder with a model in it: a path, a GGUF file, a hub id or the
embedded model.

Owns the decision and the check that the folder can be served at all; knows nothing of what the
files contain.
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
# the same weights once more under another name or for another runtime
_UNWANTED = ["consolidated*", "original/*", "onnx/*", "openvino/*"]


def resolve_model_dir(
    model_dir: str | None, cache_dir: Path, bar: Bar = ProgressBar, *, load_way: str | None = "HF"
) -> Path:
    """The folder to serve from.

    Args:
        model_dir: a folder, a GGUF file, a hub id ``org/name``, or None for the embedded model. A
            folder wins over a hub id of the same spelling.
        cache_dir: where the embedded model is kept, and what GGUF files say of themselves; hub
            models go to huggingface_hub's own cache.
        bar: draws the progress of the embedded model; huggingface_hub has bars of its own.
        load_way: "HF" or "DS", the format of the weights; the hub gives safetensors only. None:
            none are wanted.

    Raises:
        StartupError: nothing there, not a servable folder, or the hub did not give it.
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
    """What the model in ``folder`` is called: as the folder, whatever path leads there, or as its
    repository where it lies in the hub's cache, with and without the owner. Empty: it has no name.
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
    """Refuse a folder that cannot be served, naming what it lacks.

    Raises:
        StartupError: no ``config.json``, no weights in the format of ``load_way``, or shards that
            are missing.
    """
    if not (folder / "config.json").is_file():
        if load_way is not None and (found := sorted(folder.glob("*.gguf"))):
            raise StartupError(
                f"{folder} is no Hugging Face model folder, and holds GGUF files: give one of them "
                f"(--model_dir {found[0]})"
            )
        own = " but params.json, Mistral's own format" if (folder / "params.json").is_file() else ""
        raise StartupError(f"{folder} holds no config.json{own}: not a Hugging Face model folder")
    if load_way is None:
        return
    if set(weight_files(folder, load_way)) == {folder / SINGLE} and (folder / INDEX).is_file():
        _log.info("%s: all weights are taken from %s", folder, SINGLE)


class _TerminalBar(tqdm):  # type: ignore[misc]  # it has no types
    """The hub client's bars, on a terminal only and whatever quietens its other bars."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{**options, "disable": None})


def _download(repo: str, *, weights: bool) -> Path:
    # imported here: a local folder needs none of it
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
            f"--model_dir {repo}: no such folder, and not to be had from the Hugging Face hub: "
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
            return "its terms must be accepted on its hub page first, then HF_TOKEN set"
        case RepositoryNotFoundError():
            return "there is no such model, or it is private and HF_TOKEN is not set"
        case LocalEntryNotFoundError() if hub_offline():
            return "HF_HUB_OFFLINE is set, and the model is not in the local hub cache"
        case LocalEntryNotFoundError():
            return "no connection, and the model is not in the local hub cache"
        case _:
            return str(err).strip().partition("\n")[0].rstrip(".") or type(err).__name__
