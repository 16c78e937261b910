"""Reads numbers from a config.json; refuses implausible ones with a line that names them.

Sizes are bounded: larger ones overflow, or take long to fail for lack of memory.
"""

from __future__ import annotations

from collections.abc import Mapping

from asyncllm.errors import StartupError

MOST = 1 << 22  # of any size
# by name, for values that are multiplied with sizes, or that are lengths
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1 << 12),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 1 << 12),
    **dict.fromkeys(("n_shared_experts", "num_nextn_predict_layers"), 1 << 12),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), 2**31 - 1),
    **dict.fromkeys(("sliding_window", "max_window_layers"), 2**31 - 1),
}
SMALLEST, LARGEST = 1e-12, 1e12  # float32 holds their products


def count(
    hf: Mapping[str, object], name: str, default: int | None = None, *, least: int = 1
) -> int:
    """The value of ``name``, a whole number from ``least`` on.

    Args:
        default: if it is missing or null; None: it must be there.

    Raises:
        StartupError: it is something else, or larger than anything known.
        KeyError: it is missing, and there is no default.
    """
    value = hf[name] if default is None else hf.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise StartupError(f"{name} is {_shown(value)}: not {kind}")
    if value > (most := _MOST.get(name, MOST)):
        raise StartupError(f"{name} is {_shown(value)}: more than {most:,}")
    return value


def number(name: str, value: object, *, zero: bool = False) -> float:
    """A value of ``name`` as a float above 0, or with ``zero`` 0 too. Raises StartupError."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if plain and zero and value == 0:
        return 0.0
    if not plain or not SMALLEST <= value <= LARGEST:  # type: ignore[operator]
        raise StartupError(
            f"{name} is {_shown(value)}: not a positive number, or beyond {SMALLEST} to {LARGEST}"
        )
    return float(value)  # type: ignore[arg-type]


def truth(hf: Mapping[str, object], name: str, default: bool = False) -> bool:
    """Whether ``name`` is true; null is false. Raises StartupError unless it says one or the
    other."""
    value = hf.get(name, default)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise StartupError(f"{name} is {_shown(value)}: neither true nor false")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
