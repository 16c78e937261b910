"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from asyncllm.models.config_numbers import count
from asyncllm.models.mistral import with_windows
from asyncllm.models.spec import ConfigDict, ExpertNames, ExpertsSpec, MlpSpec, ModelSpec

_DEFAULTS: ConfigDict = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "num_experts_per_tok": 2,
}


def config(hf: ConfigDict) -> ConfigDict:
    """config.json of Mixtral: all layers have the window, if there is one."""
    num_experts = hf.get("num_local_experts") or hf.get("num_experts") or 8
    return with_windows({**_DEFAULTS, **hf, "num_local_experts": num_experts}, alike=True)


def read(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """Reads what is specific in config.json."""

    def experts(plain: MlpSpec | ExpertsSpec) -> ExpertsSpec:
        return ExpertsSpec(
            num_experts=count(hf, "num_local_experts"),
            top_k=count(hf, "num_experts_per_tok"),
            inner=count(hf, "intermediate_size"),
            renormalise=True,
            activation=plain.activation,
            names=ExpertNames(gate="w1", up="w3", down="w2"),
        )

    return replace(spec, mlps=tuple(experts(mlp) for mlp in spec.mlps), mlp_name="block_sparse_moe")
