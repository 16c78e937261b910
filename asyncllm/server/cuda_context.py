"""Opens a GPU while torch is being imported. Does not import torch."""

from __future__ import annotations

import ctypes
import threading

DRIVER = "libcuda.so.1"


def open_early(device: int) -> threading.Thread:
    """Create the context of GPU ``device`` (of those that are visible), in a thread that does not
    hold the GIL meanwhile. The driver takes up to a second for it; torch will find it there. What
    fails here is left to torch, which says why."""
    thread = threading.Thread(target=_open, args=(device,), daemon=True, name="cuda context")
    thread.start()
    return thread


def _open(device: int) -> None:
    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError:
        return
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(handle), device) == 0:
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
