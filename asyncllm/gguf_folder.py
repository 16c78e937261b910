"""Makes a model folder from a GGUF file: its metadata as transformers' files, and a link to it.

The rest of the server treats it like any other folder; weights are read from the original file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

from asyncllm.errors import StartupError, reason_of
from asyncllm.gguf_text import tokenizer_files
from asyncllm.models.checkpoint import GGUF
from asyncllm.models.gguf import GgufFile, read_gguf
from asyncllm.models.gguf_arch import read_config

_FORMAT = 1  # part of the path: raise it when the written files change, to leave old ones unused


def gguf_folder(file: Path, cache_dir: Path) -> Path:
    """The folder for ``file``, made at first use (takes a second; as large as the tokenizer).

    Its name is the file's; there is one for each path and header.

    Raises:
        StartupError: the file cannot be read, its model is not supported, or the cache cannot be
            written.
    """
    file = file.expanduser().absolute()
    found = read_gguf(file)
    digest = sha256(f"{file}\n".encode() + found.data[: found.header]).hexdigest()[:16]
    root = cache_dir / f"gguf-v{_FORMAT}"
    target = root / digest / file.stem
    if (target / GGUF).exists():
        return target
    contents = texts(found)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="tmp-") as scratch:
            work = Path(scratch) / file.stem
            work.mkdir()
            for name, text in contents.items():
                (work / name).write_text(text, encoding="utf-8")
            (work / GGUF).symlink_to(file)
            if target.exists():  # the file was moved
                shutil.rmtree(target)
            try:
                work.rename(target)
            except OSError:
                if not (target / GGUF).exists():  # otherwise another process was faster
                    raise
    except OSError as error:
        raise StartupError(
            f"cannot keep what {file} says of itself in {root}: {reason_of(error)} "
            "(ASYNCLLM_CACHE names another folder)"
        ) from error
    return target


def texts(file: GgufFile) -> dict[str, str]:
    """config.json and the tokenizer's files, by name.

    Raises:
        StartupError: the file's model is not supported.
    """
    contents = {"config.json": read_config(file), **tokenizer_files(file)}
    return {
        name: json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        for name, content in contents.items()
    }
