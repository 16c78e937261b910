"""Tuned configurations per device, from the JSON files beside this one.

Owns reading them, once per device; nothing is tuned here or while serving (``bench/kernels.py``
writes the files). A kernel's literal table serves shapes and devices that have no entry.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

Entry = dict[str, Any]


def tuned(device: torch.device, kernel: str, key: str) -> Entry | None:
    """Fields of the configuration tuned for ``kernel`` and shape ``key`` on this kind of device."""
    if device.type != "cuda":
        return None
    return _read(torch.cuda.get_device_name(device)).get(kernel, {}).get(key)


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; 2 where kernels are only interpreted."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def config_path(device_name: str) -> Path:
    """Where the tuned configurations of a device lie."""
    return Path(__file__).parent / "configs" / f"{device_name.replace(' ', '_')}.json"


@functools.cache
def _read(device_name: str) -> dict[str, dict[str, Entry]]:
    path = config_path(device_name)
    if not path.exists():
        return {}
    found: dict[str, dict[str, Entry]] = json.loads(path.read_text())
    return found
