"""JSON values as a type, for values read from files, request bodies and schemas.

Carries no meaning: readers must check a value's type before using it.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TypeAlias, TypeVar

# Decimal: from readers that keep numbers exact
Json: TypeAlias = bool | int | float | Decimal | str | list["Json"] | dict[str, "Json"] | None
JsonObject: TypeAlias = dict[str, Json]

T = TypeVar("T")


def typed(value: Json, kind: type[T]) -> T:
    """``value``, which must be of this type. Raises TypeError."""
    if not isinstance(value, kind):
        raise TypeError(f"{str(value)[:40]!r} is not {kind.__name__}")
    return value
