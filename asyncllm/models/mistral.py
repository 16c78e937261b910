"""Mistral and Ministral: Llama with a sliding window, or with queries scaled by position; also the
text part of multimodal ones."""

from __future__ import annotations

from dataclasses import replace

from asyncllm.errors import StartupError
from asyncllm.models.config_numbers import count, number
from asyncllm.models.rope import trained_positions
from asyncllm.models.spec import VISION, ConfigDict, ModelSpec, QueryGrowth, text_part

_DEFAULTS: ConfigDict = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "eos_token_id": 2,
}
_DEFAULTS3: ConfigDict = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}


def config(hf: ConfigDict) -> ConfigDict:
    """config.json of Mistral and Ministral: without layer types all have the window."""
    return with_windows(_DEFAULTS | hf)


def config3(hf: ConfigDict) -> ConfigDict:
    """config.json of Ministral 3, whose query scaling is among the rotary parameters."""
    hf = with_windows(_DEFAULTS3 | hf, alike=True)
    told = hf.pop("rope_scaling", None) or hf["rope_parameters"]
    given = dict(told or _DEFAULTS3["rope_parameters"])
    beta = given.pop("llama_4_scaling_beta", None)
    return {**hf, "rope_parameters": given, "llama_4_scaling_beta": beta}


def config_text(hf: ConfigDict) -> ConfigDict:
    """The text part of config.json."""
    text = text_part(hf, tied=True)
    kind = text.get("model_type", "mistral")
    makers = {"mistral": config, "ministral3": config3}
    if kind not in makers:
        known = " and ".join(makers)
        raise StartupError(f"text of type {kind!r} is not available yet ({known} are)")
    return makers[kind](text)


def with_windows(hf: ConfigDict, *, alike: bool = False) -> ConfigDict:
    """``hf`` with the type of each layer.

    Args:
        alike: the window decides for all layers, whatever ``layer_types`` says.

    Raises:
        StartupError: it says something else then.
    """
    kind = "full_attention" if hf.get("sliding_window") is None else "sliding_attention"
    types = hf.get("layer_types") or [kind] * count(hf, "num_hidden_layers")
    if alike and (others := [each for each in types if each != kind]):
        raise StartupError(
            f"layer_types with {others[0]!r} where sliding_window {hf.get('sliding_window')} makes "
            f"all layers {kind!r} are not available yet"
        )
    return {**hf, "layer_types": types}


def read3(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """Reads what is specific in config.json: how queries are scaled."""
    if not (beta := hf.get("llama_4_scaling_beta")):
        return spec
    trained = trained_positions(hf["rope_parameters"], hf)
    growth = QueryGrowth(number("llama_4_scaling_beta", beta), trained)
    layers = tuple(replace(layer, query_growth=growth) for layer in spec.layers)
    return replace(spec, layers=layers)


def read_text(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """Reads what is specific in the text part of config.json."""
    spec = read3(spec, hf) if hf.get("model_type") == "ministral3" else spec
    return replace(spec, ignored=VISION)
