"""Reads what config.json says about quantised weights and K/V. Does not know tensors."""

from __future__ import annotations

from collections.abc import Mapping

from asyncllm.errors import StartupError

# of a quantization_config for 8-bit floats in blocks: what its values may be
_SERVED = {"fmt": ("e4m3", None), "activation_scheme": ("dynamic", None)}
# methods by which K/V alone may be quantised -> what says how weights are
_OF_WEIGHTS = {"compressed-tensors": "config_groups", "modelopt": "quant_algo"}
# what a kv_cache_scheme may say, beside its type: our scales are no coarser than these
_SCHEME = {
    "num_bits": (8,),
    "strategy": ("tensor", "token", "attn_head", None),
    "symmetric": (True, None),
}
_FORMATS = {"float": "triton_fp8kv", "int": "triton_int8kv"}
_ALGORITHMS = {"FP8": "triton_fp8kv", "INT8": "triton_int8kv"}


def weight_block(quantization: Mapping[str, object] | None) -> tuple[int, int] | None:
    """Rows and columns of 8-bit floats that share a scale; None: weights are not quantised.

    Args:
        quantization: ``quantization_config`` of config.json.

    Raises:
        StartupError: weights are quantised in another way.
    """
    if not quantization:
        return None
    method = str(quantization.get("quant_method", "?"))
    if method in _OF_WEIGHTS and not quantization.get(_OF_WEIGHTS[method]):
        return None
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


def kv_format(quantization: Mapping[str, object] | None) -> str | None:
    """Name of the format of K/V that a checkpoint asks for; None: it asks for none.

    Whether its scales are fixed or made of what is written: ours are each token's and head's.

    Args:
        quantization: ``quantization_config`` of config.json.

    Raises:
        StartupError: K/V are quantised in another way.
    """
    said = quantization or {}
    for key, read in (("kv_cache_scheme", _by_scheme), ("kv_cache_quant_algo", _by_algorithm)):
        if (value := said.get(key)) is not None:
            if (found := read(value)) is None:
                known = ", ".join(_ALGORITHMS)
                raise StartupError(
                    f"the checkpoint asks for K/V with {key} {value!r}, which is not served: what "
                    f"is are 8 bits ({known}) with one scale for a tensor, a token or a head"
                )
            return found
    return None


def _by_algorithm(name: object) -> str | None:
    return _ALGORITHMS.get(str(name))


def _by_scheme(scheme: object) -> str | None:
    if not isinstance(scheme, Mapping):
        return None
    if any(scheme.get(key) not in values for key, values in _SCHEME.items()):
        return None
    return _FORMATS.get(str(scheme.get("type")))
