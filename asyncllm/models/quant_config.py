"""Reads what config.json says about quantised weights and K/V. Does not know tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn

from asyncllm.errors import StartupError
from asyncllm.models.quantization import BLOCK, QuantKind

Method = Literal["scaled", "packed", "awq", "gptq"]
ConfigValues = Mapping[str, object]

# methods that may quantise K/V only -> the key that describes weights
_OF_WEIGHTS = {"compressed-tensors": "config_groups", "modelopt": "quant_algo"}
# accepted values in a kv_cache_scheme: our scales are at least as fine as these
_SCHEME = {
    "num_bits": (8,),
    "strategy": ("tensor", "token", "attn_head", None),
    "symmetric": (True, None),
}
_FORMATS = {"float": "triton_fp8kv", "int": "triton_int8kv"}
_ALGORITHMS = {"FP8": "triton_fp8kv", "INT8": "triton_int8kv"}
# accepted values in a quantization_config, by method
_FP8 = {"fmt": ("e4m3", None), "activation_scheme": ("dynamic", None)}
_AWQ = {
    "bits": (4,),
    "version": ("gemm", "GEMM", None),
    "zero_point": (True, None),
    "backend": ("autoawq", None),
}
_GPTQ = {
    "bits": (4,),
    "pack_dtype": ("int32", None),
    "checkpoint_format": ("gptq", "gptq_v2", None),
    "format": ("gptq", "gptq_v2", None),
    "is_marlin_format": (False, None),
}
_COMPRESSED: dict[str, tuple[object, ...]] = {
    "quantization_status": ("compressed", None),
    "transform_config": (None, {}),
}
_ELEMENTS = {"float": "F8_E4M3", "int": "I8"}


@dataclass(frozen=True, slots=True)
class StoredForm:
    """How a checkpoint holds the weights of its quantised linear layers.

    A layer X has, by method:

    scaled: ``X.weight`` [out, in] in 8 bits and ``X.weight{suffix}``.
    packed: ``X.weight_packed`` int32 [out, in / 8], ``X.weight_scale`` [out, in / group], and of
        compressed-tensors ``X.weight_zero_point`` int32 [out / 8, in / group], ``X.weight_g_idx``.
    awq: ``X.qweight`` int32 [in, out / 8], ``X.qzeros`` int32 [in / group, out / 8], ``X.scales``.
    gptq: ``X.qweight`` int32 [in / 8, out], ``X.qzeros`` and ``X.scales`` as these, ``X.g_idx``.

    Attributes:
        kind: of the stored weights; None: they are served in the activations' dtype.
        block: rows and columns that share a scale; 0: all of them.
        element: type of scaled values, as safetensors calls it.
        suffix: of the name of their scales.
        shift: added to stored zeros.
        symmetric: zeros are all 8, whether stored or not.
        ordered: columns belong to groups in an arbitrary order, given by a tensor of the layer.
        plain: layers that are not quantised. Empty until the checkpoint has been read.
    """

    method: Method
    kind: QuantKind | None
    block: tuple[int, int]
    element: str = "F8_E4M3"
    suffix: str = "_scale"
    shift: int = 0
    symmetric: bool = False
    ordered: bool = False
    plain: frozenset[str] = frozenset()

    @property
    def main(self) -> str:
        """Suffix of the tensor that marks a layer as quantised."""
        names = {"packed": "weight_packed", "awq": "qweight", "gptq": "qweight"}
        return names.get(self.method, f"weight{self.suffix}")

    @property
    def parts(self) -> frozenset[str]:
        """The name suffixes of all tensors of a quantised layer."""
        match self.method:
            case "scaled":
                return frozenset({"weight", f"weight{self.suffix}"})
            case "packed":
                more = ("packed", "scale", "zero_point", "g_idx", "shape")
                return frozenset(f"weight_{name}" for name in more)
            case "awq" | "gptq":
                return frozenset({"qweight", "qzeros", "scales", "g_idx"})


def stored_form(quantization: ConfigValues | None) -> StoredForm | None:
    """How weights are quantised; None: they are not.

    Args:
        quantization: ``quantization_config`` of config.json.

    Raises:
        StartupError: in an unsupported way.
    """
    if not quantization:
        return None
    method = str(quantization.get("quant_method", "?"))
    if method in _OF_WEIGHTS and not quantization.get(_OF_WEIGHTS[method]):
        return None
    match method:
        case "fp8":
            return _fp8(quantization)
        case "compressed-tensors":
            return _compressed(quantization)
        case "awq":
            _known(method, quantization, _AWQ)
            return StoredForm("awq", "int4_group", (1, _group(method, quantization)))
        case "gptq":
            return _gptq(quantization)
        case _:
            raise StartupError(
                f"quantised weights ({method}) are not available yet; fp8 with weight_block_size, "
                f"compressed-tensors, awq and gptq are"
            )


def _known(method: str, config: ConfigValues, served: Mapping[str, tuple[object, ...]]) -> None:
    for key, values in served.items():
        if config.get(key) not in values:
            _refuse(method, key, config.get(key))


def _refuse(method: str, key: str, value: object, known: str = "") -> NoReturn:
    raise StartupError(
        f"quantised weights ({method}) with {key} {repr(value)[:200]} are not available yet"
        f"{'; ' * bool(known)}{known}"
    )


def _group(method: str, config: ConfigValues) -> int:
    """Columns that share a scale; 0: all."""
    size = config.get("group_size")
    if size == -1:
        return 0
    if type(size) is not int or size < 2 or size % 2:
        _refuse(method, "group_size", size, "an even number, or -1 for whole rows, is")
    return size


def _fp8(config: ConfigValues) -> StoredForm:
    """Of DeepSeek: blocks with ``weight_scale_inv``."""
    _known("fp8", config, _FP8)
    match config.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return _in_blocks((rows, columns), "_scale_inv")
        case size:
            _refuse("fp8", "weight_block_size", size, "two numbers of at least 1 are")


def _in_blocks(block: tuple[int, int], suffix: str) -> StoredForm:
    kind: QuantKind | None = "fp8_block" if block == (BLOCK, BLOCK) else None
    return StoredForm("scaled", kind, block, suffix=suffix)


def _gptq(config: ConfigValues) -> StoredForm:
    _known("gptq", config, _GPTQ)
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(not str(key).startswith("-:") for key in dynamic):
        _refuse("gptq", "dynamic", dynamic, "modules that are left out ('-:...') are")
    said = config.get("checkpoint_format") or config.get("format")
    return StoredForm(
        "gptq",
        "int4_group",
        (1, _group("gptq", config)),
        shift=0 if said == "gptq_v2" else 1,
        symmetric=config.get("sym") is True,
        ordered=config.get("desc_act") is True,
    )


def _compressed(config: ConfigValues) -> StoredForm:
    """compressed-tensors: one form for all quantised layers."""
    method = "compressed-tensors"
    _known(method, config, _COMPRESSED)
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        _refuse(method, "sparsity_config", sparsity)
    groups = config["config_groups"]
    if not isinstance(groups, Mapping):
        _refuse(method, "config_groups", groups, "an object is")
    forms = {
        name: _scheme(name, group, str(config.get("format"))) for name, group in groups.items()
    }
    if len(set(forms.values())) > 1:
        _refuse(method, "config_groups", ", ".join(map(str, forms)), "one way for all layers is")
    return next(iter(forms.values()))


def _scheme(name: str, group: object, form: str) -> StoredForm:
    """One of the config_groups."""
    method = f"compressed-tensors, {name}"
    group = group if isinstance(group, Mapping) else {}
    weights, inputs = group.get("weights"), group.get("input_activations")
    form = str(group.get("format") or form)
    if not isinstance(weights, Mapping):
        _refuse(method, "weights", weights, "an object is")
    if group.get("output_activations"):
        _refuse(method, "output_activations", group.get("output_activations"))
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    said = f"{bits} bits, {kind}, {strategy}"
    symmetric, inputs_said = weights.get("symmetric", True) is True, _inputs(inputs, strategy)
    if (bits, kind, form) == (4, "int", "pack-quantized") and inputs_said == "none":
        if strategy not in ("group", "channel"):
            _refuse(method, "weights", said)
        columns = _group(method, weights) if strategy == "group" else 0
        ordered = weights.get("actorder") in ("group", True)
        return StoredForm(
            "packed", "int4_group", (1, columns), symmetric=symmetric, ordered=ordered
        )
    formats = ("float-quantized", "int-quantized", "naive-quantized")
    if bits != 8 or kind not in _ELEMENTS or not symmetric or form not in formats:
        _refuse(method, "weights", f"{said}, symmetric {symmetric}, format {form}")
    if strategy == "block" and kind == "float":
        match weights.get("block_structure"):
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                stored = _in_blocks((rows, columns), "_scale")
            case size:
                _refuse(method, "block_structure", size, "two numbers of at least 1 are")
    elif strategy in ("tensor", "channel"):
        stored = StoredForm(
            "scaled",
            "fp8_channel" if kind == "float" else "int8_channel",
            (0 if strategy == "tensor" else 1, 0),
            element=_ELEMENTS[str(kind)],
        )
    else:
        _refuse(method, "weights", said)
    wanted = f"8 bits, {kind}"
    if inputs_said not in ("none", wanted):
        _refuse(method, "input_activations", inputs_said, f"none are, or each token's in {wanted}")
    if inputs_said == "none":  # activations stay as they are, and so are weights served
        return StoredForm("scaled", None, stored.block, stored.element, stored.suffix)
    return stored


def _inputs(inputs: object, weights: object) -> str:
    """What is said of activations: "none", "8 bits, float" where ours are as fine, or how they
    are; ``weights``: what share a scale of these."""
    if inputs is None:
        return "none"
    if not isinstance(inputs, Mapping):
        return str(inputs)
    bits, kind = inputs.get("num_bits"), inputs.get("type")
    strategy, size = inputs.get("strategy"), inputs.get("group_size")
    blocks = weights == "block" and strategy == "group" and size == BLOCK
    coarse = blocks or strategy in ("tensor", "token")
    if inputs.get("dynamic") is True and coarse and inputs.get("symmetric", True) is True:
        return f"{bits} bits, {kind}"
    return (
        f"{bits} bits, {kind}, {strategy}, dynamic {inputs.get('dynamic')}, symmetric "
        f"{inputs.get('symmetric', True)}"
    )


def kv_format(quantization: ConfigValues | None) -> str | None:
    """Name of the K/V format that a checkpoint specifies, or None.

    Whether its scales are static or dynamic does not matter: ours are per token and head.

    Args:
        quantization: ``quantization_config`` of config.json.

    Raises:
        StartupError: an unsupported quantisation of K/V.
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
