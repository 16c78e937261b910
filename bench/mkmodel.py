"""Write a checkpoint of a named shape with random weights, for speed measurements.

    python bench/mkmodel.py llama31_8b /tmp/m8b

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


SHAPES = {
    "llama31_8b": _llama3(4096, 14336, 32, 128, 8.0),
    "llama32_1b": _llama3(2048, 8192, 16, 64, 32.0),
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
            for name, size in _layer_shapes(shape).items():
                tensors[f"model.layers.{layer}.{name}.weight"] = (
                    ones.clone() if len(size) == 1 else draw(*size)
                )
        put(f"model-{first:03d}.safetensors", tensors)
    weight_map = {"metadata": {"total_size": 0}, "weight_map": index}
    _dump(out / "model.safetensors.index.json", weight_map)


def _layer_shapes(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Size of each weight of a layer, in the order in which they are drawn."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    q = shape["num_attention_heads"] * shape["head_dim"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    return {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


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
    a = parser.parse_args(argv)
    write_model(SHAPES[a.shape], a.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
