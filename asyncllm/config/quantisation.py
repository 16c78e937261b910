"""Interprets --quant_type and --quant_cfg for a model; knows LightLLM's names and file format.

Does not use torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from asyncllm.errors import StartupError, reason_of
from asyncllm.models.quantization import TYPES, Override, WeightTypes
from asyncllm.models.spec import MlpSpec, ModelSpec

if TYPE_CHECKING:
    from asyncllm.config.options import Config

HELP = (
    "8-bit weights of linear layers; fp8w8a8: e4m3, one scale per output channel, activations in "
    "e4m3 with one scale per token; fp8w8a8-b128: e4m3 in blocks of 128 x 128, activations per "
    "token and 128 channels; w8a8: int8 with scales as in fp8w8a8; awq: the checkpoint's 4 bits. "
    "Default: as in the checkpoint; none, if given: the type of --data_type whatever the "
    "checkpoint has. LightLLM's other names are in docs/models.md"
)
FILE_HELP = (
    "YAML or JSON file: a quant_type, and in mix_bits other types by layer_name and layer_nums"
)
# LightLLM's other names, current and former, for the same types here: some also name a kernel
ALIASES = {
    "no_quant": "none",
    "w8a8-vllm": "w8a8",
    "vllm-w8a8": "w8a8",
    "fp8w8a8-vllm": "fp8w8a8",
    "vllm-fp8w8a8": "fp8w8a8",
    "fp8w8a8-b128-triton": "fp8w8a8-b128",
    "fp8w8a8-b128-vllm": "fp8w8a8-b128",
    "fp8w8a8-b128-deepgemm": "fp8w8a8-b128",
    "vllm-fp8w8a8-b128": "fp8w8a8-b128",
    "triton-fp8w8a8-block128": "fp8w8a8-b128",
    "deepgemm-fp8w8a8-b128": "fp8w8a8-b128",
    "awq_marlin": "awq",
}
# unsupported names, by prefix -> the nearest supported type
_NEAR = {
    "fp8w8a8-pt": "fp8w8a8 (one scale per channel rather than one for all)",
    "triton-fp8w8a8-pt": "fp8w8a8 (one scale per channel rather than one for all)",
    "fp8w8a8g": "fp8w8a8 (activations per token) or fp8w8a8-b128 (weights in blocks)",
    "triton-fp8w8a8g": "fp8w8a8 (activations per token) or fp8w8a8-b128 (weights in blocks)",
    "fp4fp8": "fp8w8a8-b128",
    "ppl-w4a16": "a checkpoint of AWQ, GPTQ or compressed-tensors in 4 bits",
    "flashllm-w6a16": "w8a8 or fp8w8a8",
    "ao-int4": "a checkpoint of AWQ, GPTQ or compressed-tensors in 4 bits",
    "ao-": "w8a8 or fp8w8a8",
    "gptq": "no --quant_type: a checkpoint of GPTQ is served as it is",
}
# LightLLM's names for fused projections -> the checkpoints'
_TOGETHER = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "kv_proj": ("k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_moe": ("experts",),
}
_KEYS = frozenset({"quant_type", "mix_bits"})
_ENTRY_KEYS = frozenset({"layer_name", "quant_type", "layer_nums"})


def complaint(name: str) -> str | None:
    """Why a type's name is wrong, or None."""
    if name in TYPES or name in ALIASES:
        return None
    known = f"must be {', '.join(list(TYPES)[:-1])} or {list(TYPES)[-1]}"
    for begin, near in _NEAR.items():
        if name.startswith(begin):
            return f"{known} (nearest to this is {near})"
    close = get_close_matches(name, [*TYPES, *ALIASES], n=2)
    return f"{known} (did you mean {' or '.join(close)}?)" if close else known


def asked(config: Config, spec: ModelSpec) -> WeightTypes:
    """The weight types that the options request for a model of ``spec``.

    Raises:
        StartupError: a file that cannot be read or has unknown contents; a type that the model's
            layers do not support.
    """
    given = "quant_type" in config.explicit
    found = WeightTypes(ALIASES.get(config.quant_type, config.quant_type) if given else None)
    if config.quant_cfg is not None:
        found = _with_file(found, Path(config.quant_cfg), spec)
    for name in {found.type, *(override.type for override in found.overrides)}:
        stored = None if spec.stored is None else spec.stored.method
        if name == "awq" and stored != "awq":
            has = "not quantised" if stored is None else f"quantised in another way ({stored})"
            raise StartupError(
                f"--quant_type awq is for AWQ checkpoints, and this one is {has}; 4-bit weights "
                f"cannot be made at start"
            )
    return found


def notes(asked: WeightTypes, spec: ModelSpec, device: str) -> Iterator[str]:
    """Lines for the log about surprising choices of weight types."""
    if spec.gguf and asked.type is None:
        yield (
            "low-bit weights of the GGUF file keep their bits (--quant_type none: converted to "
            "--data_type)"
            if device == "cpu"
            else "low-bit weights of the GGUF file are converted to --data_type (--quant_type "
            "fp8w8a8 or w8a8: to 8 bits)"
        )
    if spec.stored is None:
        return
    if spec.stored.kind == "int4_group" and any(
        asked.of(f"layers.{layer}.experts") in (None, "awq")
        for layer, mlp in enumerate(spec.mlps)
        if not isinstance(mlp, MlpSpec)
    ):
        yield (
            "experts use the type of --data_type: the checkpoint's 4-bit experts are converted at "
            "start (--quant_type fp8w8a8 or w8a8: to 8 bits)"
        )
    if spec.stored.kind is None and asked.type is None:
        yield (
            "the checkpoint's quantised weights are converted to the type of --data_type: there "
            "are no kernels for their kind"
        )


def to_text(asked: WeightTypes) -> str:
    """As JSON, for other processes."""
    overrides = [
        [each.type, sorted(each.projections), None if each.layers is None else sorted(each.layers)]
        for each in asked.overrides
    ]
    return json.dumps([asked.type, overrides])


def from_text(text: str) -> WeightTypes:
    """The inverse of ``to_text``; "": as the checkpoint has them."""
    if not text:
        return WeightTypes()
    kind, overrides = json.loads(text)
    return WeightTypes(
        kind,
        tuple(
            Override(name, frozenset(projections), None if layers is None else frozenset(layers))
            for name, projections, layers in overrides
        ),
    )


def _with_file(asked: WeightTypes, path: Path, spec: ModelSpec) -> WeightTypes:
    found, label = _read(path), f"--quant_cfg {path}"
    if unknown := sorted(map(str, found.keys() - _KEYS)):
        raise StartupError(f"{label} has {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
    if found.get("quant_type") is not None:
        kind = _type(label, found["quant_type"])
        if asked.type is not None and asked.type != kind:
            raise StartupError(
                f"--quant_type {asked.type} and quant_type {kind} of {path} differ: give one"
            )
        asked = replace(asked, type=kind)
    entries = found.get("mix_bits") or []
    if not isinstance(entries, list):
        raise StartupError(f"{label}: mix_bits is not a list")
    places = (f"{label}, mix_bits {number}" for number, _ in enumerate(entries, 1))
    overrides = tuple(_override(at, entry, spec) for at, entry in zip(places, entries, strict=True))
    return replace(asked, overrides=overrides)


def _type(label: str, name: object) -> str:
    if not isinstance(name, str):
        raise StartupError(f"{label}: quant_type {name!r} is not a name")
    if (wrong := complaint(name)) is not None:
        raise StartupError(f"{label}: quant_type {wrong}, not {name!r}")
    return ALIASES.get(name, name)


def _override(label: str, entry: object, spec: ModelSpec) -> Override:
    if not isinstance(entry, Mapping):
        raise StartupError(f"{label} is not an object with layer_name and quant_type")
    if unknown := sorted(map(str, entry.keys() - _ENTRY_KEYS)):
        keys = ", ".join(sorted(_ENTRY_KEYS))
        raise StartupError(f"{label} has {unknown[0]!r}; known are {keys}")
    name, known = entry.get("layer_name"), _projections(spec)
    projections = frozenset((*_TOGETHER.get(str(name), ()), str(name))) & known
    if not projections:
        close = get_close_matches(str(name), [*known, *_TOGETHER], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise StartupError(
            f"{label}: layer_name {name!r} is none of {', '.join(sorted(known))}{hint}"
        )
    return Override(_type(label, entry.get("quant_type")), projections, _layers(label, entry, spec))


def _layers(label: str, entry: Mapping[str, object], spec: ModelSpec) -> frozenset[int] | None:
    """None: all."""
    if (given := entry.get("layer_nums")) is None:
        return None
    num = len(spec.layers)
    if not isinstance(given, list) or not given:
        raise StartupError(f"{label}: layer_nums {given!r} is not a list of numbers")
    for layer in given:
        if type(layer) is not int or not 0 <= layer < num:
            raise StartupError(f"{label}: layer_nums has {layer!r}; layers are 0 to {num - 1}")
    return frozenset(given)


def _projections(spec: ModelSpec) -> frozenset[str]:
    """The names of linear layers that ``spec`` has; "experts" for those of a mixture."""
    fused = spec.fused_projections
    found = {"o_proj", "down_proj"}
    found |= {"gate_up_proj"} if fused else {"gate_proj", "up_proj"}
    for layer in set(spec.layers):
        if layer.kind == "mla":
            found |= {"q_proj"} if layer.q_rank is None else {"q_a_proj", "q_b_proj"}
            found |= {"kv_a_proj_with_mqa"}
        else:
            found |= {"qkv_proj"} if fused else {"q_proj", "k_proj", "v_proj"}
    return frozenset(found | ({"experts"} if spec.has_experts else set()))


def _read(path: Path) -> Mapping[str, object]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--quant_cfg {path} cannot be read: {reason_of(error)}") from None
    try:
        found = json.loads(text)
    except ValueError:
        found = _read_yaml(path, text)
    except RecursionError:
        found = None
    if not isinstance(found, Mapping):
        raise StartupError(f"--quant_cfg {path} is not an object with quant_type and mix_bits")
    return found


def _read_yaml(path: Path, text: str) -> object:
    import yaml  # comes with transformers

    try:
        found: object = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        line = " ".join(str(error).split())[:200]
        raise StartupError(f"--quant_cfg {path} is neither JSON nor YAML: {line}") from None
    return found
