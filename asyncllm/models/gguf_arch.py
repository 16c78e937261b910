"""Translates a GGUF file's metadata to config.json, and the names of its tensors.

Does not import torch: processes that only serve HTTP read model specs too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from asyncllm.errors import StartupError
from asyncllm.models.gguf import GgufFile, Meta
from asyncllm.models.rope import ConfigDict

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA = _ATTENTION | _MLP
# small tensors that become part of config.json: divisors of rotary frequencies
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# keys that change the computation, and that no model of these architectures has
_UNSERVED = (
    "attention.clamp_kqv",
    "attention.scale",
    "attention.temperature_scale",
    "embedding_scale",
    "expert_count",
    "logit_scale",
    "residual_scale",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "decoder_block_count",
)
_WHOLE_DTYPES = {
    "F32": "float32",
    "F16": "float16",
}  # if a model has no other types; else bfloat16


@dataclass(frozen=True, slots=True)
class Arch:
    """An architecture by its name in GGUF files.

    Attributes:
        hf: its name in config.json.
        names: parts of layers -> transformers' names.
        config: returns what is specific in config.json.
        pairs_apart: rows of q and k alternate between the halves of a rotary pair.
        norm_offset: already included in the weights of norms.
    """

    hf: str
    model_type: str
    names: dict[str, str]
    config: Callable[[ConfigDict, Meta], ConfigDict] = field(default=lambda config, said: {})
    pairs_apart: bool = False
    norm_offset: float = 0.0


def arch_of(file: GgufFile) -> Arch:
    """Raises StartupError: the architecture is not supported."""
    name = file.meta.get("general.architecture")
    if name not in ARCHS:
        served = ", ".join(ARCHS)
        raise StartupError(
            f"{file.path}: architecture {str(name)[:100]!r} is not served from GGUF files; "
            f"{served} are"
        )
    return ARCHS[name]


def hf_name(arch: Arch, name: str) -> str | None:
    """transformers' name of a tensor; None: it is not a weight of the model.

    ``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj.weight``.
    """
    match name.split("."):
        case ["blk", layer, part, kind] if part in arch.names and layer.isdecimal():
            return f"model.layers.{int(layer)}.{arch.names[part]}.{kind}"
        case [part, kind] if part in _TOP:
            return f"{_TOP[part]}.{kind}"
        case _:
            return None


def is_weight(name: str) -> bool:
    """Whether a tensor is needed by the decoder rather than by config.json."""
    return name not in _ROPE_TENSORS


def read_config(file: GgufFile) -> ConfigDict:
    """Build the model's config.json.

    Raises:
        StartupError: the architecture is not supported, or something is missing or unsupported.
    """
    arch, name = arch_of(file), file.meta["general.architecture"]
    said = {
        key.removeprefix(f"{name}."): value
        for key, value in file.meta.items()
        if key.startswith(f"{name}.")
    }
    for key in _UNSERVED:
        if said.get(key):
            raise StartupError(f"{file.path}: {name}.{key} {said[key]!r} is not served")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise StartupError(f"{file.path} has no matrix token_embd.weight")
    need = _RequiredMeta(file, name, said)
    heads, hidden = need.count("attention.head_count"), need.count("embedding_length")
    head_dim = said.get("attention.key_length", hidden // heads)
    if said.get("attention.value_length", head_dim) != head_dim:
        raise StartupError(f"{file.path}: {name}: keys and values of different lengths")
    kinds = {place.kind for place in file.tensors.values() if len(place.shape) > 1}
    dtype = _WHOLE_DTYPES.get(next(iter(kinds)), "bfloat16") if len(kinds) == 1 else "bfloat16"
    config: ConfigDict = {
        "architectures": [arch.hf],
        "model_type": arch.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": need.count("feed_forward_length"),
        "num_hidden_layers": need.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": said.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": need.count("context_length"),
        "rope_theta": _short(said.get("rope.freq_base", 10000.0)),
        "rope_scaling": _rope(file, said, head_dim),
        "rms_norm_eps": _short(need.value("attention.layer_norm_rms_epsilon")),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": dtype,
    }
    turned = said.get("rope.dimension_count", head_dim)
    if turned != head_dim:
        config["partial_rotary_factor"] = turned / head_dim
    return config | arch.config(config, said)


def _short(value: object) -> object:
    """The intended decimal value of a float32: the float32 nearest to 1e-5 becomes 1e-5."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


@dataclass(frozen=True, slots=True)
class _RequiredMeta:
    file: GgufFile
    name: str
    said: ConfigDict

    def value(self, key: str) -> object:
        if key not in self.said:
            raise StartupError(f"{self.file.path} does not say {self.name}.{key}")
        return self.said[key]

    def count(self, key: str) -> int:
        value = self.value(key)
        if type(value) is not int or value < 1:
            raise StartupError(
                f"{self.file.path}: {self.name}.{key} is {str(value)[:100]}, which is not served; "
                f"one number of at least 1 is"
            )
        return value


def _rope(file: GgufFile, said: ConfigDict, head_dim: int) -> ConfigDict | None:
    """``rope_scaling`` of config.json."""
    context = said["context_length"]
    trained = said.get("rope.scaling.original_context_length")
    factor = said.get("rope.scaling.factor", said.get("rope.scale_linear"))
    attention = _short(said.get("rope.scaling.attn_factor"))  # multiplies cosines and sines
    long, short, divisors = (
        file.floats(name)
        for name in ("rope_factors_long.weight", "rope_factors_short.weight", _ROPE_TENSORS[0])
    )
    by_tensors = divisors is not None or (long is not None and short is not None)
    key, value = ("factor", factor) if by_tensors else ("attn_factor", attention)
    if value not in (None, 0, 1):
        raise StartupError(
            f"{file.path}: rope.scaling.{key} {str(value)[:100]} is not served "
            f"{'beside' if by_tensors else 'without'} divisors of frequencies"
        )
    if long is not None and short is not None:
        scaling: ConfigDict = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        scaling["original_max_position_embeddings"] = trained or context
        if attention is not None:
            scaling["attention_factor"] = attention
        else:
            scaling["factor"] = context / (trained or context)
        return scaling
    if divisors is not None:  # of llama3: each frequency has one, whatever the length
        return {
            "rope_type": "longrope",
            "long_factor": divisors,
            "short_factor": divisors,
            "original_max_position_embeddings": context,
            "attention_factor": 1.0 if attention is None else attention,
        }
    match said.get("rope.scaling.type", "none" if factor is None else "linear"):
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": _short(factor)} if factor else None
        case "yarn":
            scaling = {"rope_type": "yarn", "factor": _short(factor) or 1.0}
            scaling["original_max_position_embeddings"] = trained or context
            for name in ("beta_fast", "beta_slow"):
                scaling[name] = _short(said.get(f"rope.scaling.yarn_{name}"))
            return scaling
        case other:
            raise StartupError(
                f"{file.path}: rope.scaling.type {str(other)[:100]!r} is not served; none, linear "
                f"and yarn are, and divisors of frequencies"
            )


def _window(config: ConfigDict, said: Meta) -> ConfigDict:
    return {"sliding_window": said.get("attention.sliding_window") or None}


def _phi3(config: ConfigDict, said: Meta) -> ConfigDict:
    scaling = config["rope_scaling"] or {}
    trained = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
    return {**_window(config, said), "original_max_position_embeddings": trained}


def _gemma2(config: ConfigDict, said: Meta) -> ConfigDict:
    # llama.cpp detects the largest model by its layers; for the others the scale is head_dim
    large = config["num_hidden_layers"] == 46
    return {
        "sliding_window": said.get("attention.sliding_window", 4096) or None,
        "query_pre_attn_scalar": _query_scalar(config, large),
        "attn_logit_softcapping": _short(said.get("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": _short(said.get("final_logit_softcapping", 30.0)),
    }


def _gemma3(config: ConfigDict, said: Meta) -> ConfigDict:
    made: ConfigDict = {
        **_window(config, said),
        "query_pre_attn_scalar": _query_scalar(config, config["num_hidden_layers"] == 62),
        "rope_theta": _short(said.get("rope.freq_base", 1e6)),
        "rope_local_base_freq": _short(said.get("rope.freq_base_swa", 10000.0)),
        "final_logit_softcapping": _short(said.get("final_logit_softcapping")) or None,
    }
    pattern = said.get("attention.sliding_window_pattern", 6 if made["sliding_window"] else 1)
    if isinstance(pattern, list):
        types = {True: "sliding_attention", False: "full_attention"}
        made["layer_types"] = [types[bool(slides)] for slides in pattern]
    else:
        made["sliding_window_pattern"] = pattern
    return made


def _query_scalar(config: ConfigDict, large: bool) -> int:
    per_head: int = config["hidden_size"] // config["num_attention_heads"]
    return per_head if large else int(config["head_dim"])


ARCHS = {
    "llama": Arch("LlamaForCausalLM", "llama", _LLAMA, pairs_apart=True),
    "qwen2": Arch("Qwen2ForCausalLM", "qwen2", _LLAMA),
    "qwen3": Arch("Qwen3ForCausalLM", "qwen3", _LLAMA | _QK_NORMS),
    "gemma2": Arch(
        "Gemma2ForCausalLM", "gemma2", _ATTENTION | _MLP | _SANDWICH, _gemma2, norm_offset=1.0
    ),
    "gemma3": Arch(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _ATTENTION | _MLP | _SANDWICH | _QK_NORMS,
        _gemma3,
        norm_offset=1.0,
    ),
    "phi3": Arch(
        "Phi3ForCausalLM",
        "phi3",
        _LLAMA | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        _phi3,
    ),
}
