"""Kernels that are compiled while serving are counted."""

from __future__ import annotations

import logging

import pytest

from asyncllm.engine.jit_monitor import JitMonitor


def test_a_compilation_is_counted_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from triton import knobs  # not at the top: tests of kernels want to import Triton first

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    monitor = JitMonitor()
    monitor.arm()
    hook = knobs.runtime.jit_post_compile_hook
    assert hook is not None
    with caplog.at_level(logging.WARNING):
        hook(key="", repr="stage[...]", fn=None, compile=None, is_manual_warmup=False)
    assert monitor.count == 1
    assert "stage[...] was compiled while serving" in caplog.text
