"""Collects API keys from the command line, a file and the environment."""

from __future__ import annotations

import logging
import stat
from dataclasses import replace
from pathlib import Path

from asyncllm.config import FLAGS, Config
from asyncllm.environment import API_KEY, take_api_key
from asyncllm.errors import StartupError

log = logging.getLogger(__name__)


def with_all_keys(config: Config) -> Config:
    """``config`` whose ``api_key`` also has the keys of --api_key_file and ASYNCLLM_API_KEY.

    Raises:
        StartupError: a given source has no key, which would leave the server open; a file cannot be
            read; a key is malformed (it is not shown).
    """
    keys = list(config.api_key)
    if config.api_key_file is not None:
        keys += _from_file(Path(config.api_key_file))
    if (given := take_api_key()) is not None:
        keys += _checked(given.split(), API_KEY)
    return replace(config, api_key=tuple(dict.fromkeys(keys)))


def _from_file(path: Path) -> list[str]:
    source = f"--api_key_file {path}"
    try:
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise StartupError(f"{source}: {reason}") from None
    if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("%s is readable by others (mode %03o); chmod 600", source, mode & 0o777)
    lines = (line.strip() for line in text.splitlines())
    return _checked([line for line in lines if line and not line.startswith("#")], source)


def _checked(keys: list[str], source: str) -> list[str]:
    if not keys:
        raise StartupError(f"{source} has no key: the server would be open to everybody")
    if (wrong := FLAGS["api_key"].complaint(tuple(keys))) is not None:
        raise StartupError(f"{source}: a key {wrong}")
    return keys
