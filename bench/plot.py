"""A picture of one or several runs: how times are distributed, how they went, what kept the limits.

Knows rows of requests; knows nothing of how they were measured. Needs matplotlib when called only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.common import percentile
from bench.figures import TIMES

Request = dict[str, Any]
FACTORS = 3.0  # of the limits that are shown
MISSING = "--plot needs matplotlib: pip install matplotlib"


@dataclass(frozen=True, slots=True)
class Run:
    """Requests as ``requests_table`` gives them, the gaps between their tokens, and the time of all."""

    requests: Sequence[Request]
    itl_ms: Sequence[float]
    wall_s: float


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import_module("matplotlib")
    except ImportError:
        return False
    return True


def plot(path: Path, title: str, runs: Mapping[str, Run], sla: Mapping[str, float]) -> None:
    """Write a PNG: cumulative TTFT, TPOT, E2E and ITL, times over the run, and goodput.

    Args:
        runs: by name; each is a line.
        sla: limits in milliseconds, drawn beside their times. With them the last panel shows
            goodput under the limits times a factor: at 1 it is that of the table.

    Raises:
        ImportError: no matplotlib.
    """
    # by name: a type checker need not have it either
    figure = import_module("matplotlib.figure").Figure(figsize=(15, 8), layout="constrained")
    canvas = import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = iter(figure.subplots(2, 3).flat)
    for name in ("ttft", "tpot", "e2e", "itl"):
        values = {key: times(run, name) for key, run in runs.items()}
        distribution(next(panels), TIMES[f"{name}_ms"], values, sla.get(name))
    over_time(next(panels), runs)
    axes = next(panels)
    if sla:
        goodput(axes, runs)
    else:
        axes.set_axis_off()
    canvas.print_png(path)


def times(run: Run, name: str) -> list[float]:
    """In order of size, milliseconds."""
    return sorted(run.itl_ms) if name == "itl" else column(run.requests, f"{name}_ms")


def distribution(
    axes: Any, label: str, values: Mapping[str, Sequence[float]], limit: float | None
) -> None:
    """Cumulative distributions, with the median, the 99th percentile and the limit."""
    for name, ordered in values.items():
        line = axes.step(*cumulative(ordered), where="post", label=name)[0]
        for share in (0.5, 0.99) if ordered else ():
            at = percentile(ordered, share)
            axes.axvline(at, linestyle=":", color=line.get_color())
            axes.annotate(f"p{100 * share:g} {at:.4g}", (at, 0.02), rotation=90, fontsize=8)
    if limit is not None:
        axes.axvline(limit, linestyle="--", color="red", label=f"limit {limit:g}")
    share_of = "gaps" if label == TIMES["itl_ms"] else "requests"
    axes.set(xlabel=f"{label}, ms", ylabel=f"share of {share_of}", ylim=(0, 1))
    smallest = [ordered[0] for ordered in values.values() if ordered]
    if share_of == "gaps" and smallest and min(smallest) > 0:
        axes.set_xscale("log")
    _legend(axes)


def over_time(axes: Any, runs: Mapping[str, Run]) -> None:
    """TTFT and E2E by the time of sending; answers that broke a limit are crossed."""
    for name, run in runs.items():
        good = [r for r in run.requests if r["error"] == ""]
        sent = [r["at_s"] for r in good]
        for time in ("ttft_ms", "e2e_ms"):
            axes.plot(sent, [r[time] for r in good], ".", label=f"{name} {TIMES[time]}".strip())
        broke = [r for r in good if r.get("strain", 0) > 1]
        if broke:
            marks = [r["e2e_ms"] for r in broke]
            axes.plot([r["at_s"] for r in broke], marks, "x", color="red")
    axes.set(xlabel="sent at, s (x: a limit was broken)", ylabel="ms")
    _legend(axes)


def goodput(axes: Any, runs: Mapping[str, Run]) -> None:
    """Answers a second that keep all limits, when each limit is multiplied by a factor."""
    for name, run in runs.items():
        axes.step(*goodput_curve(run), where="post", label=name)
    axes.axvline(1, linestyle="--", color="red", label="the limits")
    axes.set(xlabel="all limits times", ylabel="goodput, answers/s", xlim=(0, FACTORS))
    axes.set_ylim(bottom=0)
    _legend(axes)


def goodput_curve(run: Run) -> tuple[list[float], list[float]]:
    """Factors, and answers a second that keep the limits times each: a corner per good answer.

    It begins at 0 and goes on to the end of the panel.
    """
    ordered = column(run.requests, "strain")
    rates = [i / run.wall_s for i in range(len(ordered) + 1)]
    return [0.0, *ordered, max([FACTORS, *ordered])], [*rates, rates[-1]]


def column(requests: Sequence[Request], name: str) -> list[float]:
    """The known values of a column, in order of size."""
    return sorted(r[name] for r in requests if r[name] is not None)


def cumulative(ordered: Sequence[float]) -> tuple[list[float], list[float]]:
    """Corners of the empirical distribution function: (values, share at or below each)."""
    return list(ordered), [(i + 1) / len(ordered) for i in range(len(ordered))]


def _legend(axes: Any) -> None:
    if any(label for label in axes.get_legend_handles_labels()[1]):
        axes.legend()
