"""Qwen2-MoE (and Qwen1.5-MoE) and Qwen3-MoE: mixtures of experts in all layers, or in some."""

from __future__ import annotations

from dataclasses import replace

from asyncllm.errors import StartupError
from asyncllm.models import mistral, qwen
from asyncllm.models.spec import ExpertNames, ExpertsSpec, Json, MlpSpec, ModelSpec

_DEFAULTS: Json = {
    "max_position_embeddings": 32768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
}
_DEFAULTS2: Json = {
    **_DEFAULTS,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
_DEFAULTS3: Json = {
    **_DEFAULTS,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


def config2(hf: Json) -> Json:
    """config.json of Qwen2-MoE: of the first ``max_window_layers`` every second slides, if any."""
    hf = {**_DEFAULTS2, **hf, "num_experts": _num_experts(hf, 60)}
    slides = int(hf.get("max_window_layers", 28)) if hf.get("use_sliding_window") else 0
    types = [
        "sliding_attention" if layer < slides and layer % 2 == 0 else "full_attention"
        for layer in range(int(hf["num_hidden_layers"]))
    ]
    window = hf.get("sliding_window", 4096)
    return {**hf, "sliding_window": window, "layer_types": hf.get("layer_types") or types}


def config3(hf: Json) -> Json:
    """config.json of Qwen3-MoE: all layers slide, if any."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    own = {"num_experts": _num_experts(hf, 128), "sliding_window": window}
    return mistral.with_windows({**_DEFAULTS3, **hf, **own})


def _num_experts(hf: Json, default: int) -> int:
    named = [hf[name] for name in ("num_experts", "num_local_experts") if name in hf]
    return int([*named, default][0])


def read2(spec: ModelSpec, hf: Json) -> ModelSpec:
    """What config.json says beyond the common names."""
    spec = replace(spec, qkv_bias=bool(hf["qkv_bias"]), out_bias=False)
    inner = int(hf["shared_expert_intermediate_size"])
    return _with_experts(spec, hf, shared_inner=inner, shared_gate=True, shared="shared_expert")


def read3(spec: ModelSpec, hf: Json) -> ModelSpec:
    """What config.json says beyond the common names."""
    return _with_experts(qwen.read3(spec, hf), hf)


def _with_experts(
    spec: ModelSpec,
    hf: Json,
    *,
    shared_inner: int = 0,
    shared_gate: bool = False,
    shared: str = "",
) -> ModelSpec:
    plain, step = frozenset(hf["mlp_only_layers"] or ()), int(hf["decoder_sparse_step"])
    if step < 1:
        raise StartupError(f"decoder_sparse_step {step}: experts in every such layer cannot be")

    def mlp(layer: int, dense: MlpSpec | ExpertsSpec) -> MlpSpec | ExpertsSpec:
        if layer in plain or not hf["num_experts"] or (layer + 1) % step:
            return dense
        return ExpertsSpec(
            num_experts=hf["num_experts"],
            top_k=int(hf["num_experts_per_tok"]),
            inner=int(hf["moe_intermediate_size"]),
            renormalise=bool(hf["norm_topk_prob"]),
            shared_inner=shared_inner,
            shared_gate=shared_gate,
            activation=dense.activation,
            names=ExpertNames(shared=shared),
        )

    return replace(spec, mlps=tuple(mlp(i, dense) for i, dense in enumerate(spec.mlps)))
