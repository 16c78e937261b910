"""DeepSeek-V2, V2-Lite and V3 (R1 too): reads what is specific in their config.json."""

from __future__ import annotations

from dataclasses import replace

from asyncllm.errors import StartupError
from asyncllm.models.config_numbers import count, number, truth
from asyncllm.models.rope import read_rope, rope_values, yarn_mscale
from asyncllm.models.spec import AttentionSpec, ConfigDict, ExpertsSpec, ModelSpec

_DEFAULTS: ConfigDict = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_DEFAULTS2: ConfigDict = {
    **_DEFAULTS,
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
}
_DEFAULTS3: ConfigDict = {
    **_DEFAULTS,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "num_nextn_predict_layers": 1,
}


def config2(hf: ConfigDict) -> ConfigDict:
    """config.json of DeepSeek-V2."""
    return _DEFAULTS2 | hf


def config3(hf: ConfigDict) -> ConfigDict:
    """config.json of DeepSeek-V3."""
    return _DEFAULTS3 | hf


def read2(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """Routing by softmax, over all experts or those of the best groups."""
    method = hf.get("topk_method") or "greedy"
    _known("topk_method", method, ("greedy", "group_limited_greedy"), spec)
    _known("scoring_func", hf.get("scoring_func") or "softmax", ("softmax",), spec)
    # the published code divides by the sum instead of scaling; transformers only scales
    _known("norm_topk_prob", truth(hf, "norm_topk_prob"), (False,), spec)
    _known("mlp_bias", spec.mlps[0].bias, (False,), spec)  # shared experts would have one too
    spec = replace(spec, layers=(_attention(hf, interleaved=True),) * len(spec.layers))
    if not hf.get("n_routed_experts"):
        return spec
    experts = _experts(spec, hf)
    if method == "group_limited_greedy":
        experts = _grouped(experts, hf)
    return _mixed(spec, experts, hf)


def read3(spec: ModelSpec, hf: ConfigDict) -> ModelSpec:
    """Routing by sigmoid with a selection bias; multi-token-prediction layers follow."""
    _known("topk_method", hf.get("topk_method") or "noaux_tc", ("noaux_tc",), spec)
    _known("scoring_func", hf.get("scoring_func") or "sigmoid", ("sigmoid",), spec)
    _known("mlp_bias", spec.mlps[0].bias, (False,), spec)
    attention, num = _attention(hf, interleaved=truth(hf, "rope_interleave")), len(spec.layers)
    ahead = range(num, num + count(hf, "num_nextn_predict_layers", 0, least=0))
    ignored = tuple(f"{spec.prefix}layers.{layer}." for layer in ahead)
    spec = replace(spec, layers=(attention,) * num, ignored=(*spec.ignored, *ignored))
    if not hf.get("n_routed_experts"):
        return spec
    experts = replace(
        _grouped(_experts(spec, hf), hf),
        scoring="sigmoid",
        bias=True,
        group_score="top2",
        renormalise=truth(hf, "norm_topk_prob"),
    )
    return _mixed(spec, experts, hf)


def _attention(hf: ConfigDict, *, interleaved: bool) -> AttentionSpec:
    heads, turned = count(hf, "num_attention_heads"), count(hf, "qk_rope_head_dim")
    head_dim = count(hf, "qk_nope_head_dim") + turned
    return AttentionSpec(
        kind="mla",
        num_q_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        v_dim=count(hf, "v_head_dim"),
        scale=head_dim**-0.5 * _yarn(hf) ** 2,
        rope=replace(read_rope(hf, turned), interleaved=interleaved),
        kv_rank=count(hf, "kv_lora_rank"),
        q_rank=None if hf["q_lora_rank"] is None else count(hf, "q_lora_rank"),
    )


def _yarn(hf: ConfigDict) -> float:
    """The factor of queries and keys if the context is extended."""
    given = rope_values(hf)
    kind = given.get("rope_type") or given.get("type") or "default"
    every = given.get("mscale_all_dim") or 0
    if not every or kind == "default":
        return 1.0
    return yarn_mscale(number("factor", given["factor"]), number("mscale_all_dim", every))


def _experts(spec: ModelSpec, hf: ConfigDict) -> ExpertsSpec:
    inner = count(hf, "moe_intermediate_size")
    return ExpertsSpec(
        num_experts=count(hf, "n_routed_experts"),
        top_k=count(hf, "num_experts_per_tok"),
        inner=inner,
        scale=number("routed_scaling_factor", hf.get("routed_scaling_factor", 1.0)),
        shared_inner=inner * count(hf, "n_shared_experts", 0, least=0),
        activation=spec.mlps[0].activation,
    )


def _grouped(experts: ExpertsSpec, hf: ConfigDict) -> ExpertsSpec:
    return replace(experts, groups=count(hf, "n_group", 1), top_groups=count(hf, "topk_group", 1))


def _mixed(spec: ModelSpec, experts: ExpertsSpec, hf: ConfigDict) -> ModelSpec:
    """``spec`` with experts in all layers but the first ones."""
    first = count(hf, "first_k_dense_replace", 0, least=0)
    every = count(hf, "moe_layer_freq", 1)
    mlps = (experts if i >= first and i % every == 0 else mlp for i, mlp in enumerate(spec.mlps))
    return replace(spec, mlps=tuple(mlps))


def _known(name: str, value: object, served: tuple[object, ...], spec: ModelSpec) -> None:
    if value not in served:
        raise StartupError(f"{name} {value!r} of {spec.architecture} is not available yet")
