"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a sliding window if it is turned on."""

from __future__ import annotations

from dataclasses import replace

from asyncllm.models.spec import Json, ModelSpec


def read(spec: ModelSpec, hf: Json) -> ModelSpec:
    """What config.json says beyond the common names."""
    window = int(hf["sliding_window"]) if hf.get("use_sliding_window") else None
    first = int(hf.get("max_window_layers", 28))
    layers = tuple(
        replace(layer, window=window if i >= first else None) for i, layer in enumerate(spec.layers)
    )
    return replace(spec, qkv_bias=True, out_bias=False, layers=layers)
