"""Compiles kernels before their first launch, several at a time, into Triton's cache.

Steps run on tensors without memory (:class:`DryDevice`), so launches are only recorded
(:func:`noted`); :func:`compile_noted` then compiles what they need. A process that does this needs
no GPU of its own and never initialises CUDA.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from asyncllm.codec import i32
from asyncllm.engine.engine import Engine
from asyncllm.kernels.autotune import DeviceFacts, assume
from asyncllm.messages import StepDone, StepPlan

if TYPE_CHECKING:  # without a GPU there may be no Triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel

WARP_SIZE = 32
logger = logging.getLogger(__name__)
_scaled_on_paper = torch.library.Library("aten", "IMPL")  # of products that torch knows no shape of


@dataclass(frozen=True, slots=True)
class KernelVariant:
    """A kernel, specialised for the types and values of one launch."""

    name: str
    compile: Callable[[], CompiledKernel | None]


class DryPending:
    """A step without a result."""

    gap_ms: float | None = None

    def __init__(self, step: int) -> None:
        self._step = step

    def wait(self) -> StepDone:
        return StepDone(step=self._step, tokens=i32([]), logprobs=None, prompt=(), device_ms=0.0)


class DryDevice:
    """Runs steps on tensors without memory, to record their launches.

    Args:
        engine: of a model on the meta device.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def launch(self, plan: StepPlan) -> DryPending:
        self.engine.execute(self.engine.prepare(plan))
        return DryPending(plan.step)

    def capture(self, chunk: int) -> None:
        """Run what would be captured once."""
        self.engine.capture(lambda run: (lambda: None, run()), chunk)


@dataclass(slots=True)
class _Pointer:
    """The properties of a tensor without memory that kernels are specialised on."""

    dtype: torch.dtype
    offset: int  # bytes; storages are aligned

    def data_ptr(self) -> int:
        return self.offset


class _Driver:
    """Stands in for the driver of an absent GPU: answers what Triton asks before compiling."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, WARP_SIZE)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextlib.contextmanager
def noted(facts: DeviceFacts) -> Iterator[list[KernelVariant]]:
    """Inside, new tensors have no memory, and kernel launches are only recorded, each variant once.

    Modifies Triton permanently for the whole process.

    Args:
        facts: of the target GPU.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: list[KernelVariant] = []
    run, compile_one = JITFunction.run, JITFunction._do_compile

    def note(
        self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object
    ) -> object:
        given = [_pointer(arg) for arg in args]
        named = {name: _pointer(arg) for name, arg in kwargs.items()}
        return run(self, *given, grid=grid, warmup=True, **named)

    def note_variant(
        self: JITFunction, key: str, signature: object, device: int, *rest: object
    ) -> object:
        make = partial(compile_one, self, key, signature, device, *rest)
        found.append(KernelVariant(self.fn.__name__, make))
        self.device_caches[device][0][key] = found  # any value: marks the variant as known
        return found

    _scaled_on_paper.impl("_scaled_mm.out", lambda *_, out, **__: out, "Meta")
    driver.set_active(_Driver(facts.capability))
    JITFunction.run, JITFunction._do_compile = note, note_variant
    assume(facts)
    yield found
    JITFunction.run, JITFunction._do_compile = run, compile_one


def _pointer(arg: object) -> object:
    if not isinstance(arg, torch.Tensor):
        return arg
    return _Pointer(arg.dtype, int(arg.storage_offset()) * arg.element_size())


def compile_noted(
    variants: list[KernelVariant], num_processes: int, begin: Callable[[], None] = lambda: None
) -> None:
    """Compile the variants that are not in Triton's cache yet.

    Forks, so no other thread may run. A variant that fails to compile is left to its first launch.

    Args:
        begin: called first in each process.
    """
    context = multiprocessing.get_context("fork")
    work = [KernelVariant("what launches", _load_utils), *variants]
    turn = context.Value("i", 0)

    def take_turns() -> None:
        begin()
        while True:
            with turn.get_lock():
                mine, turn.value = turn.value, turn.value + 1
            if mine >= len(work):
                return
            try:
                _prepare(work[mine])
            except Exception as error:
                logger.warning("%s was not compiled ahead: %r", work[mine].name, error)

    workers = [context.Process(target=take_turns) for _ in range(min(num_processes, len(work)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _load_utils() -> None:
    """Build the C helpers that Triton otherwise builds at its first launch."""
    from triton.backends.nvidia.driver import CudaUtils

    CudaUtils()


def _prepare(variant: KernelVariant) -> None:
    """Compile a kernel and its launcher, which some versions of Triton build in C per kernel."""
    from triton.backends.nvidia.driver import CudaLauncher

    if (kernel := variant.compile()) is not None:
        CudaLauncher(kernel.src, kernel.metadata)
