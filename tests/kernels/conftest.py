"""Fixtures of the kernel tests: the interpreter where there is no GPU, poison, no hidden sync."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import hasten

CUDA = torch.cuda.is_available()
if not CUDA:
    # read when triton is first imported; the test files import it after this one
    os.environ["TRITON_INTERPRET"] = "1"
# newer Triton warns about the coming default when this is unset, and warnings are errors here
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture(scope="session", autouse=True)
def _hastened() -> None:
    if not CUDA:
        from triton.runtime import interpreter

        hasten(interpreter)


@pytest.fixture(autouse=True)
def _able(request: pytest.FixtureRequest) -> None:
    """Skips GPU cases without a GPU; refuses to run where triton was imported too early."""
    if CUDA:
        return
    if request.node.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA device")
    from triton.language import cdiv
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(cdiv, InterpretedFunction):
        pytest.fail("triton was imported before tests/kernels/conftest.py set TRITON_INTERPRET=1")


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` gives NaN, or absurd integers: what a kernel leaves unwritten shows."""
    empty: Callable[..., Tensor] = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)
        number = 0x3F if made.element_size() == 1 else 0x3F3F3F3F
        return made.fill_(float("nan") if made.is_floating_point() else number)

    monkeypatch.setattr(torch, "empty", poisoned)
