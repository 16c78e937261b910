"""Tuned configurations per device, from the JSON files beside this one.

Owns reading them, once per device; nothing is tuned here or while serving (``bench/kernels.py``
writes the files). A kernel's literal table serves shapes and devices that have no entry.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The properties of a GPU by which kernels are chosen."""

    name: str
    num_sms: int
    capability: int  # 90 for 9.0


# capabilities with much shared memory (CUDA programming guide, technical specifications)
_WIDE = (80, 87, 90, 100, 101, 103, 110)
_assumed: list[DeviceFacts] = []


def assume(facts: DeviceFacts) -> None:
    """Treat every device but a CPU as such a GPU from now on, in this process."""
    _assumed[:] = [facts]


def is_assumed() -> bool:
    """Whether :func:`assume` has been called: then there may be no GPU."""
    return bool(_assumed)


def device_facts(device: torch.device) -> DeviceFacts:
    """The facts of ``device``, a GPU or a device treated as one."""
    return _assumed[0] if _assumed else _facts(device)


@functools.cache
def _facts(device: torch.device) -> DeviceFacts:
    found = torch.cuda.get_device_properties(device)
    return DeviceFacts(found.name, found.multi_processor_count, 10 * found.major + found.minor)


def capability(device: torch.device) -> int:
    """The compute capability, 90 for 9.0; 0 where kernels are only interpreted."""
    return 0 if device.type == "cpu" else device_facts(device).capability


def is_narrow(device: torch.device) -> bool:
    """Whether a program may have no more than 99 KiB of shared memory there, as on GPUs for
    desktops and for inference; others have 163 or 227."""
    found = capability(device)
    return found not in _WIDE and found != 0


def without_fp8(device: torch.device) -> str | None:
    """The name of a GPU that has no 8-bit floats, as before compute capability 8.9; None: it has
    them, or there is no GPU to ask."""
    if not (is_assumed() or torch.cuda.is_available()):
        return None
    facts = device_facts(device)
    return facts.name if facts.capability < 89 else None


def tuned(device: torch.device, kernel: str, key: str) -> Entry | None:
    """Fields of the configuration tuned for ``kernel`` and shape ``key`` on this kind of device."""
    if device.type == "cpu":
        return None
    return _read(device_facts(device).name).get(kernel, {}).get(key)


# kernels that can begin early; products with quantised weights have configurations of their own
EARLY = (
    *("norm", "norm of heads", "activation", "rows in 8 bits", "rotation", "decode attention"),
    "product of a row",
)


def launches_early(device: torch.device, kernel: str) -> bool:
    """Whether ``kernel``, one of ``EARLY``, begins here while the one before still runs, and lets
    the next one begin (programmatic dependent launch, from compute capability 9.0 on): where it
    was measured to pay."""
    return tuned(device, "launch", kernel) == {"early": True}


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; 2 where kernels are only interpreted."""
    if device.type == "cpu":
        return 2
    return device_facts(device).num_sms


def config_path(device_name: str) -> Path:
    """The file with the tuned configurations of a device."""
    return Path(__file__).parent / "configs" / f"{device_name.replace(' ', '_')}.json"


@functools.cache
def _read(device_name: str) -> dict[str, dict[str, Entry]]:
    path = config_path(device_name)
    if not path.exists():
        return {}
    found: dict[str, dict[str, Entry]] = json.loads(path.read_text())
    return found
