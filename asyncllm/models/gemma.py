"""Gemma 2, Gemma 3 and the text part of multimodal Gemma 3: norms before and after attention and
MLP, sliding windows in most layers, with separate rotary angles in Gemma 3."""

from __future__ import annotations

from dataclasses import replace

from asyncllm.models.config_numbers import count
from asyncllm.models.spec import VISION, ConfigDict, ModelSpec, optional, text_part

_DEFAULTS: ConfigDict = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
_DEFAULTS2 = _DEFAULTS | {
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_DEFAULTS3 = _DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072}


def config2(hf: ConfigDict) -> ConfigDict:
    """config.json of Gemma 2."""
    return _with_windows(_DEFAULTS2 | hf, 2)


def config3(hf: ConfigDict) -> ConfigDict:
    """config.json of Gemma 3: with rotary angles per layer type, in any spelling."""
    hf = _DEFAULTS3 | hf
    told = hf.pop("rope_parameters", None) or {}
    full = {"rope_theta": hf.get("rope_theta", 1e6), **(told.get("full_attention") or {})}
    full |= hf.pop("rope_scaling", None) or {}
    if "linear" in (
        full.get("rope_type"),
        full.get("type"),
    ):  # max_position_embeddings counts scaled positions
        full.setdefault("original_max_position_embeddings", count(hf, "max_position_embeddings"))
    near = {"rope_theta": hf.get("rope_local_base_freq", 1e4)}
    near |= told.get("sliding_attention") or {}
    hf["rope_parameters"] = {"full_attention": full, "sliding_attention": near}
    return _with_windows(hf, count(hf, "sliding_window_pattern", 6))


def config_text(hf: ConfigDict) -> ConfigDict:
    """The text part of config.json."""
    return config3(text_part(hf, tied=True))


def _with_windows(hf: ConfigDict, period: int) -> ConfigDict:
    """``hf`` with the type of each layer: every ``period``-th layer has full attention; and with
    the activation under the common name."""
    types = [
        "sliding_attention" if (layer + 1) % period else "full_attention"
        for layer in range(count(hf, "num_hidden_layers"))
    ]
    activation = hf["hidden_activation"] or _DEFAULTS["hidden_activation"]
    return {**hf, "layer_types": hf.get("layer_types") or types, "hidden_act": activation}


def read(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """Reads what is specific in config.json."""
    scale, cap = count(hf, "query_pre_attn_scalar") ** -0.5, optional(hf, "attn_logit_softcapping")
    return replace(
        spec,
        layers=tuple(replace(layer, scale=scale, softcap=cap) for layer in spec.layers),
        logit_softcap=optional(hf, "final_logit_softcapping"),
        norm_offset=1.0,
        sandwich_norms=True,
        embed_scale=spec.hidden_size**0.5,
    )


def read3(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """Reads what differs from Gemma 2 in config.json: heads are normed instead of capped."""
    spec = read(spec, hf)
    layers = tuple(replace(layer, softcap=None) for layer in spec.layers)
    return replace(spec, layers=layers, qk_norm=True)


def read_text(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """Reads what differs from Gemma 2 in the text part of config.json."""
    return replace(read3(spec, hf), logit_softcap=None, ignored=VISION)
