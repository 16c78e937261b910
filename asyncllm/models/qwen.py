"""Qwen2, Qwen2.5 and Qwen3: sliding windows if enabled; biases on q, k and v, or norms
of q and k."""

from __future__ import annotations

from dataclasses import replace

from asyncllm.models.config_numbers import count, truth
from asyncllm.models.spec import ConfigDict, ModelSpec

_DEFAULTS: ConfigDict = {"num_key_value_heads": 32, "max_position_embeddings": 32768}


def config2(hf: ConfigDict) -> ConfigDict:
    """config.json of Qwen2."""
    return with_windows(_DEFAULTS | hf)


def config3(hf: ConfigDict) -> ConfigDict:
    """config.json of Qwen3."""
    return with_windows(_DEFAULTS | {"head_dim": 128} | hf)


def with_windows(hf: ConfigDict) -> ConfigDict:
    """``hf`` with the type of each layer: those from ``max_window_layers`` on slide, if any."""
    window = hf.get("sliding_window", 4096) if truth(hf, "use_sliding_window") else None
    slides = count(hf, "max_window_layers", 28, least=0) if window is not None else 1 << 30
    types = [
        "sliding_attention" if layer >= slides else "full_attention"
        for layer in range(count(hf, "num_hidden_layers"))
    ]
    return {**hf, "sliding_window": window, "layer_types": hf.get("layer_types") or types}


def read2(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """Reads what is specific in config.json."""
    return replace(spec, qkv_bias=True, out_bias=False)


def read3(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """What config.json says beyond the common names."""
    return replace(spec, qk_norm=True)
