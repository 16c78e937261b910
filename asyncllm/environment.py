"""Reads environment variables, and the machine's cores and memory.

The only module that reads environment variables. Knows no command-line options.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """Where models are kept: ASYNCLLM_CACHE, else asyncllm/ in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("ASYNCLLM_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "asyncllm"


def triton_cache() -> Path:
    """Where Triton keeps compiled kernels."""
    home = os.environ.get("TRITON_HOME") or "~"
    given = os.environ.get("TRITON_CACHE_DIR")
    return Path(given or Path(home) / ".triton" / "cache").expanduser()


API_KEY = "ASYNCLLM_API_KEY"


def take_api_key() -> str | None:
    """Remove ASYNCLLM_API_KEY, so that nothing here inherits it. None: not set."""
    return os.environ.pop(API_KEY, None)


CUDA_VISIBLE = "CUDA_VISIBLE_DEVICES"


def cuda_visible() -> str | None:
    """The value of CUDA_VISIBLE_DEVICES; None: not set, all are visible."""
    return os.environ.get(CUDA_VISIBLE)


def has_cuda() -> bool:
    """Whether a CUDA driver is installed; devices may still be hidden or absent."""
    return any(
        Path(path).exists() for path in ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg")
    )


def cpu_count() -> int:
    """Cores this process may use, at least 1; respects affinity masks (taskset, cpuset)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def cores_each(num_ranks: int) -> int:
    """Threads for each of a machine's ranks, which share its cores."""
    return max(1, cpu_count() // max(1, num_ranks))


def memory_available(root: Path = Path("/")) -> int:
    """Bytes of main memory this process may still use without swapping.

    The smaller of the machine's available memory (MemAvailable) and what is left of a container's
    limit (cgroup 2 or 1; its file cache counts as free, since it is reclaimable). ``root`` is for
    tests.
    """
    lines = _read(root / "proc/meminfo").splitlines()
    left = [1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")]
    for folder, limit, usage, cache in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        group = root / "sys/fs/cgroup" / folder
        bound, used = _read(group / limit).strip(), _read(group / usage).strip()
        if bound.isdigit() and used.isdigit():  # "max" or no file: no limit
            stats = dict(x.split() for x in _read(group / "memory.stat").splitlines())
            left.append(max(int(bound) - int(used) + int(stats.get(cache, 0)), 0))
    return min(left) if left else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def child_environment(**extra: str) -> dict[str, str]:
    """This process's environment with ``extra`` on top, e.g. OMP_NUM_THREADS, for a child; without
    keys, which a child that serves is told."""
    kept = {name: value for name, value in os.environ.items() if name != API_KEY}
    return kept | extra


def python_command(*words: str) -> list[str]:
    """A command that starts this Python with these arguments.

    Given ``-m``, Python would import from the current folder first. That may be a downloaded
    model's, whose code must not run, or hold a clone named asyncllm: it only counts if this package
    is in it.
    """
    ours = False
    with contextlib.suppress(OSError):  # a folder that this user may not enter, such as root's
        ours = Path(__file__).parents[1].samefile(os.curdir)
    return [sys.executable, *(() if ours else ("-P",)), *words]


# search paths for programs and libraries
_SEARCHED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TMPDIR")


def bare_environment(**extra: str) -> dict[str, str]:
    """An environment without secrets for a child, with ``extra`` on top."""
    return {name: os.environ[name] for name in _SEARCHED if name in os.environ} | extra


def use_interface(name: str) -> None:
    """Make NCCL and gloo use this network interface, here and in children.

    The user's own setting of these variables wins.
    """
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without "=" it is a prefix
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface(*, cuda: bool) -> tuple[str, str]:
    """(variable, value) that sets the network interface of NCCL, or of gloo."""
    name = "NCCL_SOCKET_IFNAME" if cuda else "GLOO_SOCKET_IFNAME"
    return name, os.environ.get(name, "").removeprefix("=")


def hub_offline() -> bool:
    """Whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids downloads."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(n, "").lower() in {"1", "true", "yes", "on"} for n in names)


def quiet_libraries() -> None:
    """Turn off the hub's own progress bars and telemetry, here and in children.

    The user's own setting of these variables wins. Call before ``huggingface_hub`` is imported.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")


@contextlib.contextmanager
def imports_that_stay() -> Iterator[None]:
    """Around imports that take seconds: no garbage collection looks at what they leave."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
