"""Compiles kernels ahead of their first launch, several at a time, into Triton's cache.

Steps run on tensors without memory (:class:`DryDevice`), so that launches are only noted
(:func:`noted`); what they need is then compiled by :func:`compile_noted`. A process that does this
needs no GPU of its own and never initialises CUDA.
"""

from __future__ import annotations

import contextlib
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

if TYPE_CHECKING:  # where there is no GPU there may be no Triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel

WARP_SIZE = 32
_scaled_on_paper = torch.library.Library("aten", "IMPL")  # of products that torch knows no shape of


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel, for the types and values of one launch."""

    name: str
    compile: Callable[[], CompiledKernel]


class DryPending:
    """A step of which nothing will come."""

    gap_ms: float | None = None

    def __init__(self, step: int) -> None:
        self._step = step

    def wait(self) -> StepDone:
        return StepDone(step=self._step, tokens=i32([]), logprobs=None, prompt=(), device_ms=0.0)


class DryDevice:
    """Goes through the motions of steps, on tensors without memory.

    Args:
        engine: of a model on the meta device.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def launch(self, plan: StepPlan) -> DryPending:
        self.engine.execute(self.engine.prepare(plan))
        return DryPending(plan.step)

    def capture(self, most_tokens: int) -> None:
        """Run once what would be captured."""
        self.engine.capture(lambda run: (lambda: None, run()), most_tokens)


@dataclass(slots=True)
class _Pointer:
    """What a kernel is specialised on of a tensor without memory."""

    dtype: torch.dtype
    offset: int  # bytes; storages are aligned

    def data_ptr(self) -> int:
        return self.offset


class _Driver:
    """Of a GPU that is not here: what Triton asks for before it compiles."""

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
def noted(facts: DeviceFacts) -> Iterator[list[Variant]]:
    """Tensors made here have no memory, and kernels launched on them are noted, each variant once.

    Changes Triton for the whole process and for good.

    Args:
        facts: of the GPU that the kernels are for.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: list[Variant] = []
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
        found.append(Variant(self.fn.__name__, make))
        self.device_caches[device][0][key] = found  # anything: the variant is known
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
    variants: list[Variant], num_processes: int, begin: Callable[[], None] = lambda: None
) -> None:
    """Compile what is not in Triton's cache yet.

    Forks, so no other thread may run. A variant that does not compile is left to its first launch.

    Args:
        begin: called first in each process.
    """
    context = multiprocessing.get_context("fork")
    turn = context.Value("i", 0)
    work = [_load_utils, *(partial(_prepare, variant) for variant in variants)]

    def take_turns() -> None:
        begin()
        while True:
            with turn.get_lock():
                mine, turn.value = turn.value, turn.value + 1
            if mine >= len(work):
                return
            with contextlib.suppress(Exception):
                work[mine]()

    workers = [context.Process(target=take_turns) for _ in range(min(num_processes, len(work)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _load_utils() -> None:
    """What Triton builds in C for itself, at its first launch."""
    from triton.backends.nvidia.driver import CudaUtils

    CudaUtils()


def _prepare(variant: Variant) -> None:
    """Compile a kernel and what launches it, which some versions of Triton build in C for each."""
    from triton.backends.nvidia.driver import CudaLauncher

    kernel = variant.compile()
    CudaLauncher(kernel.src, kernel.metadata)
