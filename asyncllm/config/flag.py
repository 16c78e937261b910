"""Declares command-line options: default, help, checks, and where they apply.

Knows no option by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from asyncllm.config.options import Config

Check = Callable[[Any], str | None]
Single = bool | int | float | str | None
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Requirement:
    """Where an option applies; elsewhere a value other than its default causes a warning.

    ``vital``: without it the server would be more open than asked for, so there it is an error.
    """

    text: str
    met: Callable[[Config], bool]
    vital: bool = False


@dataclass(frozen=True, slots=True)
class Flag:
    """One option of the command line.

    ``check`` and ``choices`` apply to each element of an option with several values. A ``secret``
    value is never shown.
    """

    default: object
    help: str
    choices: tuple[str, ...] = ()
    check: Check | None = None
    nargs: Literal["+"] | None = None
    metavar: str | None = None
    aliases: tuple[str, ...] = ()
    needs: Requirement | None = None
    secret: bool = False
    name: str = ""
    group: str = ""
    kind: type = str

    def complaint(self, value: Single | tuple[Single, ...]) -> str | None:
        """Why ``value`` is wrong whatever the other options are, or None."""
        for item in value if isinstance(value, tuple) else (value,):
            if item is None and self.default is None:
                continue
            if isinstance(item, float) and not math.isfinite(item):
                return f"must be a finite number, not {item!r}"
            if self.choices and item not in self.choices:
                return f"must be one of {', '.join(self.choices)}, not {item!r}"
            if self.check is not None and (wrong := self.check(item)) is not None:
                return wrong if self.secret else f"{wrong}, not {item!r}"
        return None


def flag(default: T, *, help: str, **more: Any) -> T:  # noqa: A002
    """A field of ``Config`` that is also an option; the keywords are the fields of ``Flag``."""
    made = Flag(default, help, **more)
    return field(default=default, repr=not made.secret, metadata={"flag": made})


def between(low: int, high: int) -> Check:
    return lambda value: None if low <= value <= high else f"must be from {low} to {high}"


def at_least(low: float) -> Check:
    return lambda value: None if value >= low else f"must be at least {low}"


def above_zero(value: float) -> str | None:
    return None if value > 0 else "must be above 0"


def unit_interval(value: float) -> str | None:
    return None if 0 < value < 1 else "must be above 0 and below 1"


def not_empty(value: str) -> str | None:
    return None if value.strip() else "must not be empty"


def api_key(value: str) -> str | None:
    fits = value.isascii() and value.isprintable() and " " not in value and value
    return None if fits else "must be printable ASCII without spaces"


def network(value: str) -> str | None:
    try:
        ip_network(value, strict=False)
    except ValueError:
        return "must be an address or a network such as 10.0.0.0/8"
    return None


def origin(value: str) -> str | None:
    scheme, _, rest = value.partition("://")
    fits = re.fullmatch("[a-z][a-z0-9+.-]*", scheme) and rest and not set(rest) & set("/?#@ ")
    return None if fits or value == "*" else "must be * or like https://host:port"
