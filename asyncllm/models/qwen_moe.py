"""Qwen2-MoE (and Qwen1.5-MoE) and Qwen3-MoE: mixtures of experts in all layers, or in some."""

from __future__ import annotations

from dataclasses import replace

from asyncllm.models import mistral, qwen
from asyncllm.models.config_numbers import count, truth
from asyncllm.models.spec import ConfigDict, ExpertNames, ExpertsSpec, MlpSpec, ModelSpec

_DEFAULTS: ConfigDict = {
    "max_position_embeddings": 32768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
}
_DEFAULTS2: ConfigDict = {
    **_DEFAULTS,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
_DEFAULTS3: ConfigDict = {
    **_DEFAULTS,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


def config2(hf: ConfigDict) -> ConfigDict:
    """config.json of Qwen2-MoE: of the first ``max_window_layers`` every second slides, if any."""
    hf = {**_DEFAULTS2, **hf, "num_experts": _num_experts(hf, 60)}
    slides = count(hf, "max_window_layers", 28, least=0) if truth(hf, "use_sliding_window") else 0
    types = [
        "sliding_attention" if layer < slides and layer % 2 == 0 else "full_attention"
        for layer in range(count(hf, "num_hidden_layers"))
    ]
    window = hf.get("sliding_window", 4096)
    return {**hf, "sliding_window": window, "layer_types": hf.get("layer_types") or types}


def config3(hf: ConfigDict) -> ConfigDict:
    """config.json of Qwen3-MoE: all layers slide, if any."""
    window = hf.get("sliding_window", 4096) if truth(hf, "use_sliding_window") else None
    own = {"num_experts": _num_experts(hf, 128), "sliding_window": window}
    return mistral.with_windows({**_DEFAULTS3, **hf, **own}, alike=True)


def _num_experts(hf: ConfigDict, default: int) -> int:
    name = "num_experts" if "num_experts" in hf else "num_local_experts"
    return count(hf, name, default, least=0)


def read2(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """What config.json says beyond the common names."""
    spec = replace(spec, qkv_bias=truth(hf, "qkv_bias"), out_bias=False)
    inner = count(hf, "shared_expert_intermediate_size")
    return _with_experts(spec, hf, shared_inner=inner, shared_gate=True, shared="shared_expert")


def read3(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """What config.json says beyond the common names."""
    return _with_experts(qwen.read3(spec, hf), hf)


def _with_experts(
    spec: ModelSpec,
    hf: ConfigDict,
    *,
    shared_inner: int = 0,
    shared_gate: bool = False,
    shared: str = "",
) -> ModelSpec:
    plain, step = frozenset(hf["mlp_only_layers"] or ()), count(hf, "decoder_sparse_step")

    def mlp(layer: int, dense: MlpSpec | ExpertsSpec) -> MlpSpec | ExpertsSpec:
        if layer in plain or not hf["num_experts"] or (layer + 1) % step:
            return dense
        return ExpertsSpec(
            num_experts=hf["num_experts"],
            top_k=count(hf, "num_experts_per_tok"),
            inner=count(hf, "moe_intermediate_size"),
            renormalise=truth(hf, "norm_topk_prob"),
            shared_inner=shared_inner,
            shared_gate=shared_gate,
            activation=dense.activation,
            names=ExpertNames(shared=shared),
        )

    return replace(spec, mlps=tuple(mlp(i, dense) for i, dense in enumerate(spec.mlps)))
