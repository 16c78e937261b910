"""The GPU that is opened while torch is being imported."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from asyncllm.server import cuda_context


class Driver:
    """Notes the calls; ``cuInit`` returns ``code``."""

    def __init__(self, code: int) -> None:
        self.code, self.calls = code, list[tuple[Any, ...]]()

    def cuInit(self, flags: int) -> int:
        self.calls.append(("init", flags))
        return self.code

    def cuDeviceGet(self, handle: Any, device: int) -> int:
        handle._obj.value = 100 + device
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, handle: ctypes.c_int) -> int:
        self.calls.append(("retain", handle.value))
        return 0


@pytest.mark.parametrize(
    ("code", "calls"), [(0, [("init", 0), ("retain", 103)]), (100, [("init", 0)])]
)
def test_the_context_that_torch_will_use_is_made(
    code: int, calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(code)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    cuda_context.open_early(3).join(10)
    assert driver.calls == calls, "nothing more after an error, which torch will report"


def test_without_a_driver_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_context, "DRIVER", "libno-such-driver.so")
    cuda_context._open(0)
