"""A GGUF file as a model folder: what it says of itself in files of transformers, and a link to it.

Nothing behind it treats such a folder differently; its weights are read where they are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

from asyncllm.errors import StartupError
from asyncllm.gguf_text import tokenizer_files
from asyncllm.models.checkpoint import GGUF
from asyncllm.models.gguf import read_gguf
from asyncllm.models.gguf_arch import read_config

_FORMAT = (
    1  # part of the path: raise it when other files are written, so that old ones are not used
)


def gguf_folder(file: Path, cache_dir: Path) -> Path:
    """The folder of ``file``, made at its first use (a second, and no more room than a tokenizer).

    It is named as the file; one for each path and header.

    Raises:
        StartupError: the file cannot be read, is not of a model that is served, or the cache cannot
            be written.
    """
    file = file.expanduser().absolute()
    found = read_gguf(file)
    config = read_config(found)
    digest = sha256(f"{file}\n".encode() + found.data[: found.header]).hexdigest()[:16]
    root = cache_dir / f"gguf-v{_FORMAT}"
    target = root / digest / file.stem
    if (target / GGUF).exists():
        return target
    contents = {"config.json": config, **tokenizer_files(found)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="tmp-") as scratch:
            work = Path(scratch) / file.stem
            work.mkdir()
            for name, content in contents.items():
                text = json.dumps(content, ensure_ascii=False, indent=1)
                (work / name).write_text(text + "\n", encoding="utf-8")
            (work / GGUF).symlink_to(file)
            if target.exists():  # the file has been at another place
                shutil.rmtree(target)
            try:
                work.rename(target)
            except OSError:
                if not (target / GGUF).exists():  # else another process was faster
                    raise
    except OSError as error:
        raise StartupError(
            f"cannot keep what {file} says of itself in {root}: {error} (ASYNCLLM_CACHE names "
            f"another folder)"
        ) from error
    return target
