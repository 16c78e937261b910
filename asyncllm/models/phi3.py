"""Phi-3, Phi-3.5 and Phi-4: q, k and v, and gate and up, are one tensor each; longrope, over a part
of each head in the small ones."""

from __future__ import annotations

from dataclasses import replace

from asyncllm.models.mistral import with_windows
from asyncllm.models.spec import ConfigDict, ModelSpec

_DEFAULTS: ConfigDict = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "eos_token_id": 32000,
}


def config(hf: ConfigDict) -> ConfigDict:
    """config.json of Phi-3, whose first versions name longrope differently."""
    hf = with_windows(_DEFAULTS | hf)
    if scaling := hf.get("rope_scaling"):
        if (scaling.get("rope_type") or scaling.get("type")) in {"su", "yarn"}:
            scaling = {**scaling, "rope_type": "longrope"}
        hf["rope_scaling"] = scaling
        hf.setdefault("original_max_position_embeddings", 4096)
    return hf


def read(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """Reads what is specific in config.json."""
    return replace(spec, fused_projections=True)
