"""Names of files and tensors in a Llama checkpoint written by DeepSpeed's pipeline.

Layer 1 is the embedding; layers 3 and up are the blocks, followed by the last norm and the output
matrix, each after a layer without weights. Opens no files.
"""

from __future__ import annotations

import re
from pathlib import Path

from asyncllm.errors import StartupError

ARCHITECTURES = ("LlamaForCausalLM",)  # architectures with these layers
USUAL = "layer_XX-model_YY-model_states.pt"
EMBED_LAYER, FIRST_BLOCK = 1, 3

_FILE = re.compile(r"layer_(\d{1,5})(?:-model_(\d{1,5}))?(?:-\w*)*\.pt")
# the dimension along which shards of a block's weight are joined; others are replicated
_DIMS = {
    "self_attn.q_proj": 0,
    "self_attn.k_proj": 0,
    "self_attn.v_proj": 0,
    "self_attn.o_proj": 1,
    "mlp.gate_proj": 0,
    "mlp.up_proj": 0,
    "mlp.down_proj": 1,
}


def layer_files(folder: Path) -> dict[int, tuple[Path, ...]]:
    """By layer, the files of its shards in order.

    Raises:
        StartupError: there are none, or a shard is missing.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("layer_*.pt")):
        if match := _FILE.fullmatch(path.name):
            shards = found.setdefault(int(match[1]), {})
            if (other := shards.setdefault(int(match[2] or 0), path)) != path:
                raise StartupError(f"{other} and {path} are both the same shard of a layer")
    if not found:
        raise StartupError(f"{folder} holds no {USUAL}, which --load_way DS reads")
    num = max(len(shards) for shards in found.values())
    for layer, shards in sorted(found.items()):
        if missing := [i for i in range(num) if i not in shards]:
            raise StartupError(
                f"{folder} lacks shard {missing[0]} of layer {layer}: there are {num} of others"
            )
    return {layer: tuple(found[layer][i] for i in range(num)) for layer in sorted(found)}


def place(layer: int, num_layers: int, keys: frozenset[str]) -> dict[str, tuple[str, int | None]]:
    """Hugging Face's name of each tensor of a layer -> its key, and the dimension of its shards.

    None: all shards are equal. Unexpected tensors are named by their layer.

    Args:
        keys: the tensors in each file of the layer.

    Raises:
        StartupError: a layer of one tensor has several.
    """
    single: dict[int, tuple[str, int | None]] = {
        EMBED_LAYER: ("model.embed_tokens.weight", 0),
        num_layers + 4: ("model.norm.weight", None),
        num_layers + 5: ("lm_head.weight", 0),
    }
    if layer in single:
        if len(keys) != 1:
            raise StartupError(
                f"layer {layer} ({single[layer][0]}) holds {len(keys)} tensors, 1 is expected: "
                f"{', '.join(sorted(keys))[:200]}"
            )
        name, dim = single[layer]
        return {name: (next(iter(keys)), dim)}
    if not FIRST_BLOCK <= layer < FIRST_BLOCK + num_layers:
        return {f"layer_{layer}.{key}": (key, None) for key in keys}
    return {f"model.layers.{layer - FIRST_BLOCK}.{key}": (key, _dim(key)) for key in keys}


def _dim(key: str) -> int | None:
    module, _, kind = key.rpartition(".")
    dim = _DIMS.get(module)
    return None if kind == "bias" and dim == 1 else dim  # row-parallel biases are replicated
