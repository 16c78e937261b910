"""What is made of the records of a run: percentiles, goodput under limits, a row per request.

Knows records; knows nothing of who served them, so that it is the same over HTTP and without.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.common import Record, percentile

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
TIMES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E"}
BOUNDED = ("ttft", "tpot", "e2e")  # times that an answer has one of
Figures = dict[str, Any]
Sla = Mapping[str, float]  # milliseconds by name of BOUNDED


def sla(text: str) -> dict[str, float]:
    """Limits from ``ttft=200,tpot=12``, milliseconds; the type of the option ``--sla``.

    Raises:
        ArgumentTypeError: a name that is unknown or comes twice, or a limit that is not above 0.
    """
    limits: dict[str, float] = {}
    for word in text.split(","):
        name, _, value = word.partition("=")
        if name not in BOUNDED or name in limits:
            names = ", ".join(BOUNDED)
            raise argparse.ArgumentTypeError(f"{word!r}: NAME=MS, each of {names} at most once")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if not 0 < limits[name] < math.inf:
            raise argparse.ArgumentTypeError(f"{word!r}: a limit is milliseconds above 0")
    return limits


def add_sla(p: argparse.ArgumentParser) -> None:
    """The option ``--sla``."""
    p.add_argument(
        "--sla",
        type=sla,
        default={},
        metavar="NAME=MS,...",
        help=f"limits ({', '.join(BOUNDED)}) of an answer that counts as goodput",
    )


def failure(record: Record) -> str:
    """Kind of the failure; "" for a good answer."""
    if record.kind:
        return record.kind
    return "no token" if not record.stamps else "" if record.done else "cut off"


def strain(limits: Sla, record: Record) -> float:
    """What all limits must be multiplied by for this good answer to keep them: at most 1 if it does."""
    times = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2e": record.end - record.start}
    return max(1e3 * times[name] / limit for name, limit in limits.items())


def goodput(limits: Sla, records: Sequence[Record], wall_s: float) -> Figures:
    """Good answers that kept all limits: a second, and as a share of all requests; {}: no limits."""
    if not limits:
        return {}
    kept = sum(failure(r) == "" and strain(limits, r) <= 1 for r in records)
    return {
        "sla": {f"{name}_ms": limit for name, limit in limits.items()},
        "goodput_req_s": round(kept / wall_s, 3),
        "sla_share": round(kept / len(records), 4),
    }


def goodput_line(figures: Figures) -> str:
    """For people; of figures that have it."""
    limits = ", ".join(f"{name} <= {limit:g}" for name, limit in figures["sla"].items())
    return f"{figures['goodput_req_s']:>10.3f} /s ({figures['sla_share']:.1%}) with {limits}"


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Percentiles in milliseconds; None where there is nothing to measure."""
    if not seconds:
        return dict.fromkeys(SHARES)
    return {name: round(1e3 * percentile(seconds, s), 2) for name, s in SHARES.items()}


def times(good: Sequence[Record]) -> Figures:
    """Percentiles of the times of good answers."""
    return {
        "ttft_ms": spread([r.ttft_s for r in good]),
        "tpot_ms": spread([r.tpot_s for r in good if r.num_tokens > 1]),
        "itl_ms": spread([gap for r in good for gap in r.gaps_s]),
        "e2e_ms": spread([r.end - r.start for r in good]),
    }


def requests_table(records: Sequence[Record], limits: Sla) -> list[dict[str, Any]]:
    """One entry per request, for the JSON file and the plot; times from the first request.

    ``strain`` is there with limits only, and None for an answer that is not good.
    """
    begin = min(r.start for r in records)
    rows = []
    for r in records:
        error = failure(r)
        row = {
            "at_s": round(r.start - begin, 4),
            "prompt": r.prompt_len,
            "output": r.num_tokens,
            "ttft_ms": round(1e3 * r.ttft_s, 2) if r.stamps else None,
            "tpot_ms": round(1e3 * r.tpot_s, 3) if r.num_tokens > 1 and r.stamps else None,
            "e2e_ms": round(1e3 * (r.end - r.start), 2),
            "error": error,
        }
        if limits:
            row["strain"] = None if error else strain(limits, r)
        rows.append(row)
    return rows
