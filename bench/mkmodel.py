"""Write a checkpoint of a named shape with random weights, for speed measurements.

    python bench/mkmodel.py llama31_8b /tmp/m8b
    python bench/mkmodel.py deepseek_v2_lite /tmp/lite --layers 8    # instead of 27

Hugging Face layout, bfloat16 safetensors, and a tokenizer that works. Weights are N(0, 0.02), so
that activations stay finite; the tokenizer is byte-level BPE without merges, its vocabulary padded
to the shape's size. Uses the first CUDA device to draw numbers if there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS_PER_FILE = 8
STD = 0.02

_LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": STD,
    "use_cache": True,
}


def _llama3(hidden: int, inner: int, layers: int, head_dim: int, factor: float) -> dict[str, Any]:
    return {
        **_LLAMA3,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "head_dim": head_dim,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


_QWEN3: dict[str, Any] = {
    "num_attention_heads": 32,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151644,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "initializer_range": STD,
    "use_cache": True,
}
_QWEN3_8B: dict[str, Any] = {
    **_QWEN3,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
}
_QWEN3_30B: dict[str, Any] = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_DEEPSEEK_V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 102400,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 163840,
    "torch_dtype": "bfloat16",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "initializer_range": STD,
    "use_cache": True,
}


_TINY: dict[str, Any] = {
    **_LLAMA3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "torch_dtype": "float32",
    "bos_token_id": 500,
    "eos_token_id": 501,
}


SHAPES = {
    "tiny": _TINY,  # 0.2 M weights, for what is not about speed
    "llama31_8b": _llama3(4096, 14336, 32, 128, 8.0),
    "llama32_1b": _llama3(2048, 8192, 16, 64, 32.0),
    "qwen3_8b": _QWEN3_8B,
    "qwen3_30b_a3b": _QWEN3_30B,  # 57 GiB
    "deepseek_v2_lite": _DEEPSEEK_V2_LITE,
}


def write_model(shape: dict[str, Any], out: Path) -> None:
    """The whole folder ``out`` for one ``config.json``; the same weights for the same shape and
    device."""
    out.mkdir(parents=True, exist_ok=True)
    bos, eos = shape["bos_token_id"], shape["eos_token_id"]
    _dump(out / "config.json", shape)
    _dump(out / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
    _write_weights(shape, out)
    _write_tokenizer(shape["vocab_size"], bos, out)


def _write_weights(shape: dict[str, Any], out: Path) -> None:
    hidden, vocab, layers = shape["hidden_size"], shape["vocab_size"], shape["num_hidden_layers"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        wide = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
        return (wide * STD).to(torch.bfloat16).cpu()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    index: dict[str, str] = {}

    def put(name: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, out / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    put(
        "model-embed.safetensors",
        {
            "model.embed_tokens.weight": draw(vocab, hidden),
            "lm_head.weight": draw(vocab, hidden),
            "model.norm.weight": ones,
        },
    )
    for first in range(0, layers, LAYERS_PER_FILE):
        tensors: dict[str, Tensor] = {}
        for layer in range(first, min(layers, first + LAYERS_PER_FILE)):
            for name, size in _layer_shapes(shape, layer).items():
                tensors[f"model.layers.{layer}.{name}.weight"] = (
                    ones[:1].repeat(size[0]) if len(size) == 1 else draw(*size)
                )
        put(f"model-{first:03d}.safetensors", tensors)
    weight_map = {"metadata": {"total_size": 0}, "weight_map": index}
    _dump(out / "model.safetensors.index.json", weight_map)


def _layer_shapes(shape: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """Size of each weight of a layer, in the order in which they are drawn."""
    hidden = shape["hidden_size"]
    attend = _latent_shapes if "kv_lora_rank" in shape else _grouped_shapes
    return {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        **{f"self_attn.{name}": size for name, size in attend(shape).items()},
        **{f"mlp.{name}": size for name, size in _mlp_shapes(shape, layer).items()},
    }


def _grouped_shapes(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, dim = shape["hidden_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * dim, shape["num_key_value_heads"] * dim
    norms: dict[str, tuple[int, ...]] = {}
    if shape["model_type"].startswith("qwen3"):
        norms = {"q_norm": (dim,), "k_norm": (dim,)}
    return {
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, q),
        **norms,
    }


def _latent_shapes(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of DeepSeek's attention without a latent of q."""
    hidden, heads, latent = (
        shape["hidden_size"],
        shape["num_attention_heads"],
        shape["kv_lora_rank"],
    )
    nope, rope, v = (shape[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    return {
        "q_proj": (heads * (nope + rope), hidden),
        "kv_a_proj_with_mqa": (latent + rope, hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (nope + v), latent),
        "o_proj": (hidden, heads * v),
    }


def _mlp_shapes(shape: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden = shape["hidden_size"]

    def gated(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}gate_proj": (inner, hidden),
            f"{prefix}up_proj": (inner, hidden),
            f"{prefix}down_proj": (hidden, inner),
        }

    num_experts = shape.get("n_routed_experts") or shape.get("num_experts")
    if not num_experts or layer < shape.get("first_k_dense_replace", 0):
        return gated("", shape["intermediate_size"])
    inner, sizes = shape["moe_intermediate_size"], {"gate": (num_experts, hidden)}
    for expert in range(num_experts):
        sizes |= gated(f"experts.{expert}.", inner)
    if shared := shape.get("n_shared_experts"):
        sizes |= gated("shared_experts.", shared * inner)
    return sizes


def _write_tokenizer(vocab_size: int, num_plain: int, out: Path) -> None:
    """``num_plain`` ordinary tokens (256 of them real bytes), then the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate(alphabet)}
    vocab |= {f"w{i}": i for i in range(len(vocab), num_plain)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    special += [f"<|reserved_{i}|>" for i in range(vocab_size - num_plain - len(special))]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.save(str(out / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    _dump(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special[0],
            "eos_token": special[1],
            "model_max_length": 131072,
            "chat_template": template,
        },
    )


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    a = parser.parse_args(argv)
    shape = SHAPES[a.shape]
    write_model(shape | {"num_hidden_layers": a.layers} if a.layers else shape, a.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
