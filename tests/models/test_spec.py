"""What a checkpoint's config.json may say, and the one line for what it may not."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from asyncllm.errors import StartupError
from asyncllm.models.checkpoint import as_stored, read_checkpoint
from asyncllm.models.registry import MODELS
from asyncllm.models.rope import LinearScaling, LongRope, Rope, Yarn
from asyncllm.models.spec import AttentionSpec, ExpertNames, ExpertsSpec, ModelSpec, QueryGrowth
from tests.models.harness import make_device
from tests.models.test_llama import make_checkpoint

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 499, "hidden_size": 96,
    "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "eos_token_id": 2, "torch_dtype": "float16",
}  # fmt: skip
DEEPSEEK = {"architectures": ["DeepseekV3ForCausalLM"], "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


FACTORS = [1.0 + i / 8 for i in range(48)]
# config.json as published, without what only concerns training
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-7B-Instruct": ("Qwen2Config", {
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "vocab_size": 152064,
    }),
    "Qwen3-8B": ("Qwen3Config", {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
        "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        },
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
    }),
    "Mistral-7B-v0.1": ("MistralConfig", {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 32000,
    }),
    "Mistral-Nemo-Instruct-2407": ("MistralConfig", {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 14336,
        "max_position_embeddings": 1024000, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 131072,
    }),
    "Ministral-3-8B-Base-2512": ("Mistral3Config", {
        "architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16",
        "image_token_index": 10, "model_type": "mistral3", "spatial_merge_size": 2,
        "text_config": {
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 262144, "model_type": "ministral3",
            "num_attention_heads": 32, "num_hidden_layers": 34, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
                "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
                "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn",
            },
            "sliding_window": None, "vocab_size": 131072,
        },
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "head_dim": 64},
    }),
    "gemma-3-1b-it": ("Gemma3TextConfig", {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "vocab_size": 262144,
    }),
    "gemma-3-27b-it": ("Gemma3Config", {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": {
            "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504,
            "model_type": "gemma3_text", "num_attention_heads": 32, "num_hidden_layers": 62,
            "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    }),
    "Phi-3-mini-4k-instruct": ("Phi3Config", {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "bos_token_id": 1,
        "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "vocab_size": 32064, "pad_token_id": 32000,
    }),
    "Phi-4-mini-instruct": ("Phi3Config", {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "bos_token_id": 199999,
        "eos_token_id": 199999, "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "model_type": "phi3",
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": FACTORS, "short_factor": FACTORS, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "vocab_size": 200064, "pad_token_id": 199999,
    }),
    "Mixtral-8x7B-v0.1": ("MixtralConfig", {
        "architectures": ["MixtralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    }),
    "Qwen1.5-MoE-A2.7B": ("Qwen2MoeConfig", {
        "architectures": ["Qwen2MoeForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632,
        "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
        "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "vocab_size": 151936, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60,
        "norm_topk_prob": False,
    }),
    "Qwen3-30B-A3B": ("Qwen3MoeConfig", {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "vocab_size": 151936,
    }),
}  # fmt: skip


def read(config: dict[str, Any]) -> ModelSpec:
    return ModelSpec.from_hf(config, {})


def as_transformers_says(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` as transformers 5 writes it, with all that it adds."""
    made = getattr(transformers, kind)(**config).to_dict()
    return {
        **made,
        "architectures": config["architectures"],
        "dtype": config.get("dtype", "bfloat16"),
    }


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_files_say_what_transformers_reads_in_them(model: str) -> None:
    kind, config = PUBLISHED[model]
    assert read(config) == read(as_transformers_says(kind, config))
    assert read(config).dtype == "bf16"


# of transformers' configurations: what only concerns training, other tasks, names or memory, and
# what layer types or rope parameters say in its place
HARMLESS = {
    "_name_or_path", "_sliding_window_pattern", "attention_dropout", "bos_token_id",
    "cache_implementation", "chunk_size_feed_forward", "embd_pdrop", "initializer_range",
    "is_encoder_decoder", "max_window_layers", "model_type", "original_max_position_embeddings",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "partial_rotary_factor", "problem_type", "resid_pdrop", "return_dict", "router_aux_loss_coef",
    "router_jitter_noise", "sliding_window_pattern",
    "transformers_version", "use_cache", "use_sliding_window",
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_nothing_that_counts_is_ignored(model: str) -> None:
    kind, config = PUBLISHED[model]
    full = as_transformers_says(kind, config)
    text, spec, ignored = full.get("text_config"), read(full), set()
    for name, value in (text or full).items():
        if isinstance(value, dict | list) or name in {"architectures", "sliding_window"}:
            continue
        other = not value if isinstance(value, bool) else "x" if isinstance(value, str) else 3
        changed = {**(text or full), name: other}
        try:
            counts = read({**full, "text_config": changed} if text else changed) != spec
        except (StartupError, ValueError):
            continue
        if not counts:
            ignored.add(name)
    shared = {"dtype", "eos_token_id", "tie_word_embeddings"} if text else set()  # by the outer one
    # what layers without experts have
    dense = {"intermediate_size"} if kind in {"Qwen2MoeConfig", "Qwen3MoeConfig"} else set()
    rope = spec.layers[0].rope
    stretched = rope is not None and isinstance(rope.scaling, Yarn)  # which says how far
    told = {"max_position_embeddings"} if stretched else set()
    assert ignored <= HARMLESS | shared | dense | told


SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 7,
    "num_attention_heads": 32, "torch_dtype": "bfloat16", "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("Qwen2Config", "Qwen2ForCausalLM"), ("Qwen3Config", "Qwen3ForCausalLM"),
        ("MistralConfig", "MistralForCausalLM"), ("MinistralConfig", "MinistralForCausalLM"),
        ("Ministral3Config", "Ministral3ForCausalLM"), ("Gemma2Config", "Gemma2ForCausalLM"),
        ("Gemma3TextConfig", "Gemma3ForCausalLM"), ("Phi3Config", "Phi3ForCausalLM"),
        ("LlamaConfig", "LlamaForCausalLM"), ("MixtralConfig", "MixtralForCausalLM"),
        ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"), ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    ],
)  # fmt: skip
def test_what_a_file_leaves_out_is_the_default_of_its_architecture(
    kind: str, architecture: str
) -> None:
    config = {"architectures": [architecture], **SMALL}
    ours, theirs = read(config), read(as_transformers_says(kind, config))
    assert replace(ours, eos_ids=()) == replace(theirs, eos_ids=())


@pytest.mark.parametrize(("kind", "text"), [("Mistral3Config", "mistral"), ("Gemma3Config", "")])
def test_what_a_text_part_leaves_out_is_the_default_of_its_architecture(
    kind: str, text: str
) -> None:
    inner = {**SMALL, "model_type": text or "gemma3_text"}
    name = kind.replace("Config", "ForConditionalGeneration")
    config = {"architectures": [name], "text_config": inner}
    ours, theirs = read(config), read(as_transformers_says(kind, config))
    assert replace(ours, eos_ids=()) == replace(theirs, eos_ids=())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Phi3", {"rope_parameters": LONGROPE}),  # the trained length is 4096, whatever it says
        ("Phi3", {"rope_parameters": {**LONGROPE, "rope_type": "su"}}),
        ("Phi3", {"rope_parameters": {**LONGROPE, "rope_type": "yarn"}}),
        ("Ministral3", {"rope_parameters": None}),
        (
            "DeepseekV3",
            {"num_key_value_heads": 32, "rope_scaling": {**YARN, "mscale_all_dim": 0.7},
             "rope_parameters": {**YARN, "mscale_all_dim": 0.9}},
        ),
    ],
)  # fmt: skip
def test_where_angles_are_told_twice_or_not_transformers_decides(
    kind: str, changes: dict[str, Any]
) -> None:
    config = {"architectures": [f"{kind}ForCausalLM"], **SMALL, **changes}
    ours, theirs = read(config), read(as_transformers_says(f"{kind}Config", config))
    assert replace(ours, eos_ids=()) == replace(theirs, eos_ids=())


def test_lengths_told_beside_angles() -> None:
    """They win, but not over those of a type of layers."""
    beside = {**SMALL, "original_max_position_embeddings": 32}
    growing = {**beside, "rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}}
    layer = read({"architectures": ["Ministral3ForCausalLM"], **growing}).layers[0]
    assert (layer.query_growth, layer.rope.scaling.trained) == (QueryGrowth(0.1, 32), 32)
    of_types = {**beside, "rope_parameters": {"full_attention": YARN}}
    layer = read({"architectures": ["Gemma3ForCausalLM"], **of_types}).layers[5]
    assert layer.rope.scaling.trained == 16


def layers_of(model: str) -> tuple[AttentionSpec, ...]:
    return read(PUBLISHED[model][1]).layers


def test_windows_of_published_models() -> None:
    windows = {model: [layer.window for layer in layers_of(model)] for model in PUBLISHED}
    assert set(windows["Qwen2.5-7B-Instruct"]) == set(windows["Qwen3-8B"]) == {None}
    assert windows["Mistral-7B-v0.1"] == [4096] * 32
    assert set(windows["Mistral-Nemo-Instruct-2407"]) == {None}
    assert windows["gemma-3-1b-it"][:7] == [512] * 5 + [None, 512]
    assert windows["gemma-3-27b-it"].count(None) == 10
    assert windows["Phi-3-mini-4k-instruct"] == [2047] * 32


def test_experts_of_published_models() -> None:
    mixtral, qwen2, qwen3 = (
        read(PUBLISHED[model][1])
        for model in ("Mixtral-8x7B-v0.1", "Qwen1.5-MoE-A2.7B", "Qwen3-30B-A3B")
    )
    assert mixtral.mlp_name == "block_sparse_moe"
    names = ExpertNames(gate="w1", up="w3", down="w2")
    assert set(mixtral.mlps) == {
        ExpertsSpec(num_experts=8, top_k=2, inner=14336, renormalise=True, names=names)
    }
    assert set(qwen2.mlps) == {
        ExpertsSpec(
            num_experts=60, top_k=4, inner=1408, shared_inner=5632, shared_gate=True,
            names=ExpertNames(shared="shared_expert"),
        )
    }  # fmt: skip
    [experts] = set(qwen3.mlps)
    assert isinstance(experts, ExpertsSpec)
    assert (experts.num_experts, experts.top_k, experts.inner) == (128, 8, 768)
    assert experts.renormalise
    config = {**PUBLISHED["Qwen3-30B-A3B"][1], "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    sparse = [isinstance(mlp, ExpertsSpec) for mlp in read(config).mlps]
    assert sparse[:6] == [False, True, False, False, False, True]
    with pytest.raises(StartupError, match="decoder_sparse_step is 0: not a positive integer"):
        read({**config, "decoder_sparse_step": 0})


def test_angles_and_scales_of_published_models() -> None:
    near, full = layers_of("gemma-3-27b-it")[4:6]
    assert (near.rope, full.rope) == (
        Rope(theta=1e4, dim=128), Rope(theta=1e6, dim=128, scaling=LinearScaling(8.0, 131072))
    )  # fmt: skip
    assert near.scale == full.scale == 168**-0.5
    assert read(PUBLISHED["gemma-3-27b-it"][1]).embed_scale == 5376**0.5
    ministral = layers_of("Ministral-3-8B-Base-2512")[0]
    assert ministral.query_growth == QueryGrowth(0.1, 16384)
    assert ministral.rope == Rope(theta=1e6, dim=128, scaling=Yarn(16.0, 16384))
    qwen = layers_of("Qwen3-8B")[0].rope
    assert qwen is not None
    assert qwen.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    phi = layers_of("Phi-4-mini-instruct")[0]
    assert (phi.head_dim, phi.rope) == (
        128,
        Rope(
            theta=1e4, dim=96, scaling=LongRope(tuple(FACTORS), tuple(FACTORS), 4096),
            attention_factor=math.sqrt(1 + math.log(32) / math.log(4096)),
        ),
    )  # fmt: skip
    assert layers_of("Mistral-Nemo-Instruct-2407")[0].head_dim == 128


def test_how_long_sequences_may_be_is_what_angles_are_good_for() -> None:
    """Qwen's instructions add YaRN and leave max_position_embeddings; so do files with dynamic
    angles, which would never be used otherwise."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    told: dict[str, dict[str, Any]] = {
        "LlamaForCausalLM": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "Qwen2ForCausalLM": {"rope_scaling": yarn, "max_position_embeddings": 32768},
        "Qwen3ForCausalLM": {"max_position_embeddings": 32768},
        "MistralForCausalLM": {"rope_scaling": yarn, "max_position_embeddings": 262144},
        "MixtralForCausalLM": {"rope_scaling": {"type": "linear", "factor": 2.5}},
        "Phi3ForCausalLM": {
            "rope_scaling": {
                "type": "linear", "factor": 4.0, "original_max_position_embeddings": 1024,
            }
        },
    }  # fmt: skip
    common = LLAMA | {"num_key_value_heads": 2, "max_position_embeddings": 4096}
    limits = [
        read(common | {"architectures": [name], **more}).max_position for name, more in told.items()
    ]
    assert limits == [8192, 131072, 32768, 262144, 10240, 4096]
    assert read(PUBLISHED["Qwen3-8B"][1]).max_position == 131072


def test_first_names_of_longrope() -> None:
    _, config = PUBLISHED["Phi-4-mini-instruct"]
    for name in ("su", "yarn", "longrope"):
        scaling = {**config["rope_scaling"], "type": name}
        assert read({**config, "rope_scaling": scaling}) == read(config)


@pytest.mark.parametrize(
    ("architecture", "model_type", "near"),
    [
        ("Qwen3VLForConditionalGeneration", "qwen3_vl", "Qwen3ForCausalLM"),
        ("GemmaForCausalLM", "gemma", "Gemma[23]ForCausalLM"),
        ("Phi4MMForCausalLM", None, "Phi3ForCausalLM"),
        ("MistralModel", "mistral", "MistralForCausalLM"),
    ],
)
def test_the_nearest_families_are_named(
    architecture: str, model_type: str | None, near: str
) -> None:
    line = rf"^architecture '{architecture}' is not available yet \(the nearest that are: .*{near}"
    with pytest.raises(StartupError, match=line):
        read({"architectures": [architecture], "model_type": model_type})


def test_reading_a_config_needs_no_torch() -> None:
    """Processes that only serve HTTP read it."""
    modules = {
        place.partition(":")[0] for f in MODELS.values() for place in (f.reader, f.opener) if place
    }
    code = f"import sys, {', '.join(sorted(modules))}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize("missing", [{}, {"architectures": None}, {"architectures": []}], ids=str)
def test_a_file_without_an_architecture_is_told_by_its_type(missing: dict[str, Any]) -> None:
    for name, (_, config) in PUBLISHED.items():
        known = {key: value for key, value in config.items() if key != "architectures"}
        assert read(known | missing) == read(config), name
    with pytest.raises(StartupError, match=r"^model_type 'qwen3_vl' is not .*: Qwen3ForCausalLM"):
        read(missing | {"model_type": "qwen3_vl"})


@pytest.mark.parametrize(
    ("spelled", "plain"),
    [
        ({"architectures": ["LLaMAForCausalLM"]}, {}),
        ({"architectures": ["OursForCausalLM", "LlamaForCausalLM"]}, {}),
        ({"torch_dtype": "torch.float16"}, {}),
        ({"torch_dtype": "half"}, {}),
        ({"torch_dtype": "torch.float32"}, {"torch_dtype": "float32"}),
        ({"torch_dtype": "auto"}, {"torch_dtype": None}),
        ({"hidden_act": "swish"}, {"hidden_act": "silu"}),
        ({"hidden_act": "gelu_new"}, {"hidden_act": "gelu_pytorch_tanh"}),
    ],
    ids=str,
)
def test_other_spellings(spelled: dict[str, Any], plain: dict[str, Any]) -> None:
    assert read(LLAMA | spelled) == read(LLAMA | plain)
    assert read(LLAMA | spelled).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_dtype_that_is_left_open_is_that_of_the_weights(
    tmp_path: Path, stored: torch.dtype
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"torch_dtype": "auto"}))
    weights = {"model.embed_tokens.weight": torch.zeros(4, 4, dtype=stored)}
    save_file(weights, tmp_path / "model.safetensors")
    found = as_stored(ModelSpec.from_dir(tmp_path), read_checkpoint(tmp_path))
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    assert names[found.dtype] == stored


def spec(folder: Path, config: Any, generation: str = "{}") -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(generation)
    return ModelSpec.from_dir(folder)


def test_both_files_count(tmp_path: Path) -> None:
    found = spec(tmp_path, LLAMA, '{"eos_token_id": [2, 7]}')
    assert (found.eos_ids, found.dtype) == ((2, 7), "fp16")
    assert {(layer.num_kv_heads, layer.head_dim) for layer in found.layers} == {(6, 16)}
    assert len(found.layers) == 3


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope scaling 'mrope' is not available yet"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling 'linear' has no 'factor'"),
        ({"layer_types": ["full_attention"]}, "layer_types are 1, num_hidden_layers is 3"),
        ({"layer_types": ["chunked_attention"] * 3}, "layers of type 'chunked_attention' are not"),
        (
            {"layer_types": ["sliding_attention"] * 3, "sliding_window": 0},
            "sliding_window is 0: not a positive integer",
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": True},
            "Gemma2ForCausalLM with use_bidirectional_attention True is not available yet",
        ),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "num_key_value_heads": 2,
                "attn_logit_softcapping": 50.0,
            },
            "Gemma3ForCausalLM with attn_logit_softcapping 50.0 is not available yet",
        ),
        (
            {
                "architectures": ["Gemma3ForConditionalGeneration"],
                "text_config": {**LLAMA, "num_key_value_heads": 2, "final_logit_softcapping": 30.0},
            },
            "Generation with final_logit_softcapping 30.0 is not available yet",
        ),
        ({"full_attn_mod": 2}, "LlamaForCausalLM with full_attn_mod 2 is not available yet"),
        (
            {
                "architectures": ["Mistral3ForConditionalGeneration"],
                "text_config": {"model_type": "mistral4"},
            },
            r"text of type 'mistral4' is not available yet \(mistral and ministral3 are\)",
        ),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "has no 'text_config'"),
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor 0.01 of heads of 16 gives no"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not available yet"),
        ({"torch_dtype": "int8"}, "checkpoint dtype 'int8' is not available yet"),
        ({"quantization_config": {"quant_method": "hqq"}}, r"quantised weights \(hqq\) are not"),
        ({"hidden_size": "many"}, "hidden_size is 'many': not a positive integer"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None: not a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: not a positive integer"),
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4 heads of K and V"),
        ({"head_dim": -8}, "head_dim is -8: not a positive integer"),
        ({"hidden_size": 3}, "head_dim is 0: not a positive integer"),
        ({"vocab_size": 9.5}, "vocab_size is 9.5: not a positive integer"),
        (
            {
                "architectures": ["Gemma2ForCausalLM"],
                "num_key_value_heads": 2,
                "attn_logit_softcapping": 0,
            },
            "attn_logit_softcapping is 0: not a positive number",
        ),
        (
            {
                "architectures": ["Phi3ForCausalLM"],
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            "layer_types with 'sliding_attention' where sliding_window None makes all layers 'full",
        ),
        (
            {
                "architectures": ["Ministral3ForCausalLM"],
                "layer_types": ["full_attention"] * 3,
                "sliding_window": 8,
            },
            "layer_types with 'full_attention' where sliding_window 8 makes all layers 'sliding_a",
        ),
        ({"final_logit_softcapping": 9}, "LlamaForCausalLM with final_logit_softcapping 9 is not"),
        ({"is_causal": False}, "LlamaForCausalLM with is_causal False is not available yet"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"LlamaForCausalLM that turns 8 of 16 elements of a head \(partial_rotary_factor\)",
        ),
        (
            {
                "max_position_embeddings": 9,
                "rope_scaling": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 1,
                    "short_factor": [1] * 8,
                    "long_factor": [1] * 8,
                },
            },
            "has a number that cannot be used: (float )?division by zero",
        ),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps is 10{39}\.\.\.: not a positive number"),
        ({"rope_theta": 0}, "rope_theta of the rotary embedding is 0: not a positive number"),
        (
            {
                "architectures": ["Gemma2ForCausalLM"],
                "num_key_value_heads": 2,
                "query_pre_attn_scalar": 0,
            },
            "query_pre_attn_scalar is 0: not a positive integer",
        ),
        ({"rope_scaling": "yes"}, "value of another type"),
        (
            {"max_position_embeddings": 1},
            "max_position_embeddings is 1: not an integer of at least 2",
        ),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan: not a positive number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05: not a positive number"),
        ({"rope_theta": "10000"}, "rope_theta of the rotary embedding is '10000': not a positive"),
        ({"rope_theta": 1}, "rope_theta 1.0 is not more than 1"),
        ({"rope_theta": 1e-300}, "is 1e-300: not a positive number, or beyond 1e-12 to"),
        ({"hidden_size": 10**30}, r"hidden_size is 10{30}: more than 4,194,304"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648: more than 4,096"),
        ({"num_attention_heads": 2**31}, "num_attention_heads is 2147483648: more than 4,096"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': neither true nor"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 2**31}},
            "original_max_position_embeddings is 2147483648: more than 2,147,483,647",
        ),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4}},
            "low_freq_factor 4.0 is not less than high_freq_factor 4.0",
        ),
        (DEEPSEEK | {"kv_lora_rank": -1}, "kv_lora_rank is -1: not a positive integer"),
        (DEEPSEEK | {"n_routed_experts": 10**30}, "n_routed_experts is 10{30}: more than 4,096"),
        (DEEPSEEK | {"routed_scaling_factor": math.inf}, "routed_scaling_factor is inf: not a"),
        (DEEPSEEK | {"norm_topk_prob": "no"}, "norm_topk_prob is 'no': neither true nor false"),
    ],
    ids=str,
)
def test_what_is_not_served_is_named(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(StartupError, match=line):
        spec(tmp_path, LLAMA | changes)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"generation_config\.json is not JSON"):
        spec(tmp_path, LLAMA, "{")
    with pytest.raises(StartupError, match=r"config\.json holds no JSON object"):
        spec(tmp_path, [])
    with pytest.raises(StartupError, match="has no 'vocab_size'"):
        spec(tmp_path, {k: v for k, v in LLAMA.items() if k != "vocab_size"})
    with pytest.raises(StartupError, match="does not exist"):
        ModelSpec.from_dir(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"num_attention_heads": 4}, "_proj.weight"),
        ({"vocab_size": 400}, "embed_tokens.weight|lm_head.weight"),
        ({"intermediate_size": 96}, "mlp"),
    ],
    ids=str,
)
def test_weights_larger_than_the_config_says_are_refused(
    tmp_path: Path, changes: dict[str, Any], tensor: str
) -> None:
    """They would fit where only their beginning is read."""
    make_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": 16} | changes))
    with pytest.raises(StartupError, match=f"({tensor}).*config.json wants"):
        make_device(tmp_path, "fp32", "cpu", max_len=64)
