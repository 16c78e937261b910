"""What config.json says of quantised weights. Knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping

from asyncllm.errors import StartupError

# of a quantization_config for 8-bit floats in blocks: what its values may be
_SERVED = {"fmt": ("e4m3", None), "activation_scheme": ("dynamic", None)}


def weight_block(quantization: Mapping[str, object] | None) -> tuple[int, int] | None:
    """Rows and columns of 8-bit floats that share a scale; None: weights are not quantised.

    Args:
        quantization: ``quantization_config`` of config.json.

    Raises:
        StartupError: weights are quantised in another way.
    """
    if not quantization:
        return None
    method = quantization.get("quant_method", "?")
    if method != "fp8":
        raise StartupError(
            f"quantised weights ({method}) are not available yet; fp8 with weight_block_size is"
        )
    for key, values in _SERVED.items():
        if quantization.get(key) not in values:
            raise StartupError(
                f"quantised weights (fp8) with {key} {quantization[key]!r} are not available yet"
            )
    size = quantization.get("weight_block_size")
    match size:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case _:
            raise StartupError(
                f"quantised weights (fp8) with weight_block_size {size!r} are not available yet; "
                f"two numbers of at least 1 are"
            )
