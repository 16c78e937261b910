"""A picture of one run of ``serve.py``: how times are distributed, and how they went.

Knows the figures; knows nothing of how they were measured. Needs matplotlib when called only.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

WORK_SHOWN = ("n", "conc", "rate", "mix", "inp", "out", "shared")
Request = dict[str, Any]


def plot(
    path: Path, figures: dict[str, Any], requests: Sequence[Request], itl_ms: Sequence[float]
) -> None:
    """Write a PNG: cumulative TTFT, TPOT and ITL, and TTFT and end of requests over the run.

    Raises:
        ImportError: no matplotlib.
    """
    # by name: a type checker need not have it either
    figure = import_module("matplotlib.figure").Figure(figsize=(11, 7), layout="constrained")
    canvas = import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    work = figures["work"]
    title = " ".join(f"{name}={work[name]}" for name in WORK_SHOWN)
    figure.suptitle(f"{figures['tag']} {title}\n{figures['out_tok_s']} output tok/s".strip())
    panels = figure.subplots(2, 2).flat
    for name, label, values in (
        ("ttft_ms", "TTFT", column(requests, "ttft_ms")),
        ("tpot_ms", "TPOT", column(requests, "tpot_ms")),
        ("itl_ms", "ITL", sorted(itl_ms)),
    ):
        axes = next(panels)
        xs, ys = cumulative(values)
        axes.step(xs, ys, where="post")
        for share in ("p50", "p99"):
            if (at := figures[name][share]) is not None:
                axes.axvline(at, linestyle=":", color="grey")
                axes.annotate(f"{share} {at:g}", (at, 0.02), rotation=90, fontsize=8)
        axes.set(xlabel=f"{label}, ms", ylabel="share of requests", ylim=(0, 1))
        if name == "itl_ms":
            axes.set_ylabel("share of gaps")
            if values and values[0] > 0:
                axes.set_xscale("log")
    axes = next(panels)
    good = [r for r in requests if r["ttft_ms"] is not None]
    axes.plot([r["at_s"] for r in good], [r["ttft_ms"] for r in good], ".", label="TTFT")
    axes.plot([r["at_s"] for r in good], [r["e2e_ms"] for r in good], ".", label="E2E")
    axes.set(xlabel="sent at, s", ylabel="ms")
    axes.legend()
    canvas.print_png(path)


def column(requests: Sequence[Request], name: str) -> list[float]:
    """The known values of a column, in order of size."""
    return sorted(r[name] for r in requests if r[name] is not None)


def cumulative(ordered: Sequence[float]) -> tuple[list[float], list[float]]:
    """Corners of the empirical distribution function: (values, share at or below each)."""
    return list(ordered), [(i + 1) / len(ordered) for i in range(len(ordered))]
