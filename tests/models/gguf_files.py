"""GGUF files of tiny checkpoints, written by the ``gguf`` package as llama.cpp's converter would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    dequantize,
    get_tensor_name_map,
    quant_shape_to_byte_shape,
    quantize,
)
from safetensors.torch import load_file, save_file

from asyncllm.models.gguf import KINDS

ARCHS = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
Choose = Callable[[str], str]  # type of a tensor by its name


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp has them: halves of a rotary pair beside each other."""
    shape = heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Blocks of any type, with small scales."""
    _, block, nbytes = next(each for each in KINDS.values() if each[0] == kind)
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, nbytes), dtype=np.uint8)
    where = {"Q6_K": [208], "Q4_0": [0], "Q5_0": [0], "Q8_0": [0]}.get(kind, [0, 2])
    size = 0.1 / {"Q8_0": 64, "Q6_K": 600, "Q4_K": 250, "Q5_K": 500}.get(kind, 8)
    for at in where:
        scales = (rng.uniform(0.5, 1.0, raw.shape[:-1]) * size).astype(np.float16)
        raw[..., at : at + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(quant_shape_to_byte_shape(shape, GGMLQuantizationType[kind]))


def metadata(config: dict[str, Any], arch: str) -> dict[str, Any]:
    """What the file says of the model."""
    said = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
    }
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    said["rope.freq_base"] = float(full["rope_theta"])
    if "sliding_attention" in rope:
        said["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    if full["rope_type"] in ("linear", "yarn"):
        said["rope.scaling.type"] = full["rope_type"]
        said["rope.scaling.factor"] = float(full["factor"])
    for name in ("beta_fast", "beta_slow"):
        if name in full:
            said[f"rope.scaling.yarn_{name}"] = float(full[name])
    if "partial_rotary_factor" in full:
        said["rope.dimension_count"] = int(config["head_dim"] * full["partial_rotary_factor"])
    trained = full.get("original_max_position_embeddings")
    trained = config.get("original_max_position_embeddings", trained)
    if trained:
        said["rope.scaling.original_context_length"] = trained
    if config.get("sliding_window"):
        said["attention.sliding_window"] = config["sliding_window"]
    if config.get("layer_types") and arch == "gemma3":
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        said["attention.sliding_window_pattern"] = slides
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name):
            said[name] = config[name]
    return {f"{arch}.{name}": value for name, value in said.items()}


def write(
    path: Path,
    arch: str,
    said: dict[str, Any],
    tensors: Iterable[tuple[str, np.ndarray, str | None]],
) -> None:
    """A file. Tensors are (name, values, type of blocks or None)."""
    writer = GGUFWriter(path, arch)
    for name, value in said.items():
        add = {
            bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
            str: writer.add_string, list: writer.add_array,
        }[type(value)]  # fmt: skip
        add(name, value)
    for name, values, kind in tensors:
        raw = None if kind is None else GGMLQuantizationType[kind]
        writer.add_tensor(name, values, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(folder: Path, arch: str, out: Path, choose: Choose | None = None, **more: Any) -> None:
    """The checkpoint of ``folder`` as a GGUF file; weights in few bits go back into the folder.

    Args:
        choose: types; K types get random blocks. None: all is float32.
        more: what the file says beyond this, with _ for dots.
    """
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    names = get_tensor_name_map(ARCHS[arch], config["num_hidden_layers"])
    tensors: list[tuple[str, np.ndarray, str | None]] = []
    for number, (name, weight) in enumerate(sorted(weights.items())):
        stem, _, kind = name.rpartition(".")
        ours, values = names.get_name(stem), weight.float().numpy()
        assert ours is not None, name
        heads = config[HEADS[stem[-6:]]] if arch == "llama" and stem[-6:] in HEADS else 0
        if arch in ("gemma2", "gemma3") and stem.endswith("norm"):
            values = values + 1
        wanted = choose(name) if choose and values.ndim == 2 else "F32"
        if wanted == "F32":
            raw = permuted(values, heads) if heads else values
            tensors.append((f"{ours}.{kind}", raw, None))
            continue
        if wanted in ("Q4_K", "Q5_K", "Q6_K"):
            raw = random_blocks(wanted, values.shape, number)
        else:
            raw = quantize(values, GGMLQuantizationType[wanted])
        weights[name] = torch.from_numpy(dequantize(raw, GGMLQuantizationType[wanted]).copy())
        tensors.append((f"{ours}.{kind}", permuted(raw, heads) if heads else raw, wanted))
    if choose:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tensors += _rope_tensors(config)
    write(out, arch, metadata(config, arch) | TOKENIZER | more, tensors)


def _rope_tensors(config: dict[str, Any]) -> list[tuple[str, np.ndarray, None]]:
    rope = config["rope_parameters"]
    made = {}
    if rope.get("rope_type") == "longrope":
        for name in ("long", "short"):
            made[f"rope_factors_{name}.weight"] = rope[f"{name}_factor"]
    if rope.get("rope_type") == "llama3":
        dim, low, high = config["head_dim"], rope["low_freq_factor"], rope["high_freq_factor"]
        trained, factor = rope["original_max_position_embeddings"], rope["factor"]
        waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
        smooth = (trained / waves - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        found = np.where(
            waves < trained / high, 1.0, np.where(waves > trained / low, factor, between)
        )
        made["rope_freqs.weight"] = found
    return [(name, np.array(values, np.float32), None) for name, values in made.items()]


# 211 tokens: bytes as GPT-2 spells them would be 256, so these are letters only
_WORDS = ["<s>", "</s>", *(chr(0x21 + i) for i in range(94)), *(chr(0x100 + i) for i in range(115))]
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": _WORDS,
    "tokenizer.ggml.token_type": [3, 3, *[1] * 209],
    "tokenizer.ggml.merges": ["! #"],
    "tokenizer.ggml.eos_token_id": 1,
}
assert MODEL_ARCH.LLAMA in ARCHS.values()
