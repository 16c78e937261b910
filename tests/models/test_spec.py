"""What a checkpoint's config.json may say, and the one line for what it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncllm.errors import StartupError
from asyncllm.models.spec import ModelSpec
from tests.models.harness import make_device
from tests.models.test_llama import make_checkpoint

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 499, "hidden_size": 96,
    "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "eos_token_id": 2, "torch_dtype": "float16",
}  # fmt: skip


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
        ({"partial_rotary_factor": 0.01}, "partial_rotary_factor 0.01 of heads of 16 gives no"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not available yet"),
        ({"torch_dtype": "int8"}, "checkpoint dtype 'int8' is not available yet"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised weights \(awq\) are not"),
        ({"hidden_size": "many"}, "value of another type: .*'many'"),
        ({"num_hidden_layers": None}, "value of another type"),
        ({"rope_scaling": "yes"}, "value of another type"),
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
