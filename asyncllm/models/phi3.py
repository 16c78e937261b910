"""Phi-3, Phi-3.5 and Phi-4: q, k and v, and gate and up, are one tensor each; longrope, over a part
of each head in the small ones."""

from __future__ import annotations

from dataclasses import replace

from asyncllm.models.mistral import with_windows
from asyncllm.models.rope import rope_values
from asyncllm.models.spec import ConfigDict, ModelSpec

_DEFAULTS: ConfigDict = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,  # also where only the scaling names another
    "eos_token_id": 32000,
}


def config(hf: ConfigDict) -> ConfigDict:
    """config.json of Phi-3, whose first versions name longrope differently."""
    hf = with_windows(_DEFAULTS | hf, alike=True)
    scaling = rope_values(hf)
    if (scaling.get("rope_type") or scaling.get("type")) in {"su", "yarn"}:
        hf["rope_scaling"] = {**scaling, "rope_type": "longrope"}
    return hf


def read(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """Reads what is specific in config.json."""
    return replace(spec, fused_projections=True)
