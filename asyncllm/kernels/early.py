"""Kernels that begin while the previous one still runs (programmatic dependent launch, from compute
capability 9.0 on).

A kernel with ``launch_pdl`` begins once all programs of the previous kernel have allowed it or have
ended. Until it has waited, it must not access anything written earlier in the stream, however long
ago: the previous kernel may have begun early too. After waiting it sees all of it, since the
previous kernel ended after its own wait. Each kernel asks ``launches_early`` whether to do so.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begun(EARLY: tl.constexpr):
    """At the top of a kernel that has nothing to do before what was written before it is there;
    the next kernel may begin."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def waited(EARLY: tl.constexpr):
    """At the top of a kernel that lets the next one begin when it likes, by ``let_next``."""
    if EARLY:
        gdc_wait()


@triton.jit
def let_next(when, EARLY: tl.constexpr):
    """The next kernel may begin if ``when`` is true; else when this one ends."""
    if EARLY:  # noqa: SIM102 - `and` of a constant and a number is none in Triton
        if when:
            gdc_launch_dependents()


@triton.constexpr_function
def _prefetching(rows):
    """Instructions that ask for a row of each of the first ``rows`` threads: those behind them hold
    the same rows again."""
    return (
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; "
        f"setp.lt.u32 p, t, {rows}; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
    )


@triton.jit
def begun_early(rows_at, num_bytes, EARLY: tl.constexpr):
    """For a kernel that reads weights: the first EARLY bytes of their rows, of which a program
    needs ``num_bytes``, are on their way to the cache when this returns, and all that was written
    before is there. The next kernel may begin likewise."""
    tl.inline_asm_elementwise(
        _prefetching(rows_at.shape[0]),
        "=r,l,r",
        [rows_at.to(tl.int64), tl.minimum(num_bytes, EARLY)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    gdc_launch_dependents()
    gdc_wait()


def launched_early(early: int, x: Tensor) -> dict[str, bool]:
    """Options of a launch of a kernel that begins early."""
    return {"launch_pdl": True} if early and x.device.type != "cpu" else {}
