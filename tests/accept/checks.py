"""Named checks, one line each, and how many failed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NoReturn


def agree(one: object, other: object) -> None:
    """Raises ValueError where they are not equal."""
    if one != other:
        raise ValueError(f"{one!r} is not {other!r}")


def run_all(checks: dict[str, Callable[[], object]]) -> NoReturn:
    """Run every check, then exit: 1 if one raised, else 0."""
    failed = 0
    for name, run in checks.items():
        start = time.monotonic()
        try:
            found = run()
            line = f"PASS {name} {time.monotonic() - start:.1f} s {found}"
        except Exception as error:
            failed += 1
            line = f"FAIL {name} {type(error).__name__} {error}"
        sys.stdout.write(line.replace("\n", " ")[:200] + "\n")
    sys.stdout.write(f"{len(checks) - failed} passed, {failed} failed\n")
    sys.exit(failed > 0)
