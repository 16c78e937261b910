"""DeepSeek-V2, V2-Lite and V3 against transformers; what their readers refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

from asyncllm.core.windows import PerSpace
from asyncllm.engine.latent_cpu import TorchLatents
from asyncllm.errors import StartupError
from asyncllm.models.attention import decompressed_from
from asyncllm.models.kv_format import FORMATS, KvMode
from asyncllm.models.spec import ModelSpec
from tests.models.harness import Driver, Ranks, Sequence, make_device, random_ids
from tests.models.test_llama import VOCAB, check_against, expected_logprobs

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 60, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 5, "num_key_value_heads": 5, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "kv_lora_rank": 24, "q_lora_rank": 20,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 1,
    "moe_intermediate_size": 24, "num_experts_per_tok": 3, "routed_scaling_factor": 1.5,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "initializer_range": 0.25,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {"n_group": 4, "topk_group": 2}
V2 = (DeepseekV2Config, DeepseekV2ForCausalLM)
V3 = (DeepseekV3Config, DeepseekV3ForCausalLM)
Classes = tuple[type[Any], type[PreTrainedModel]]
VARIANTS: dict[str, tuple[Classes, dict[str, Any]]] = {
    "v2 lite": (V2, {"q_lora_rank": None, "rope_parameters": YARN}),
    "v2": (V2, {"topk_method": "group_limited_greedy", **GROUPED}),
    "v2 lite, biases": (V2, {"q_lora_rank": None, "attention_bias": True}),
    "v2, biases": (V2, {"attention_bias": True}),
    "v3": (V3, {**GROUPED, "rope_parameters": YARN}),
    "v3, halves": (V3, {**GROUPED, "rope_interleave": False, "norm_topk_prob": False}),
}


def make_checkpoint(folder: Path, classes: Classes, changes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config, model = classes
    made = model(config(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if name.endswith(("bias", "gate.weight")):
                tensor.normal_(std=0.3)
            elif name.endswith("norm.weight"):
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
    made.save_pretrained(folder)
    return made


# in chunks of 40 tokens, which are decompressed, their prefix too, and what remains, which is not
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_transformers(tmp_path: Path, variant: str) -> None:
    reference = make_checkpoint(tmp_path, *VARIANTS[variant])
    assert 31 < decompressed_from(ModelSpec.from_dir(tmp_path).layers[0]) <= 40
    check_against(reference, Driver(make_device(tmp_path, "fp32", "cpu"), 1024), 40, 2e-4)


@pytest.mark.parametrize("variant", ["v2 lite", "v3"])
def test_two_ranks_match_transformers(tmp_path: Path, variant: str) -> None:
    """Five heads on two ranks: one is padding."""
    reference = make_checkpoint(tmp_path, *VARIANTS[variant])
    check_against(reference, Driver(Ranks(tmp_path, 2), 1024), 40, 2e-4)


@pytest.mark.parametrize(
    ("variant", "size", "driven", "whole"),
    [("v2 lite", 1, 0, False), ("v3", 1, 1, True), ("v3", 2, 1, False)],
)
def test_groups_that_share_experts_match_transformers(
    tmp_path: Path, variant: str, size: int, driven: int, whole: bool
) -> None:
    """While the other group has no rows, a longer or a shorter step."""
    reference = make_checkpoint(tmp_path, *VARIANTS[variant])
    ranks = Ranks(tmp_path, size, groups=2, driven=driven, whole_experts=whole)
    check_against(reference, Driver(ranks, 1024), 40, 2e-4)


@pytest.mark.parametrize("new", [2, 50])
def test_cached_prefix_gives_the_same_tokens(tmp_path: Path, new: int) -> None:
    make_checkpoint(tmp_path, *VARIANTS["v2 lite"])
    driver = Driver(make_device(tmp_path, "fp32", "cpu"), 1024)
    prompt = random_ids(40 + new, VOCAB, 1)
    first, second = Sequence(0, prompt), Sequence(1, prompt)
    driver.generate([first], 6)
    second.slots = first.slots[:40]
    other = Sequence(2, random_ids(9, VOCAB, 2))
    driver.run([(other, 9, 0)])
    driver.run([(other, 1, 0), (second, new, 40)])
    driver.generate([second], 6)
    assert second.outputs == first.outputs


def test_layers_that_predict_further_tokens_are_not_read(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, V3, {**GROUPED, "num_mtp_layers": 1})
    config, path = (
        json.loads((tmp_path / "config.json").read_text()),
        tmp_path / "model.safetensors",
    )
    extra = {f"model.layers.3.{name}.weight": torch.ones(2) for name in ("eh_proj", "enorm")}
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    check_against(reference, Driver(make_device(tmp_path, "fp32", "cpu"), 1024), 40, 2e-4)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(StartupError, match=r"unknown tensors.*model.layers.3"):
        make_device(tmp_path, "fp32", "cpu")


def test_what_config_json_leaves_out_is_as_transformers_has_it() -> None:
    for config, name in ((DeepseekV2Config, "V2"), (DeepseekV3Config, "V3")):
        known = config(num_experts_per_tok=6)
        architectures = {"architectures": [f"Deepseek{name}ForCausalLM"]}
        given = {"num_experts_per_tok": 6}
        whole = ModelSpec.from_hf({**known.to_dict(), **architectures}, {})
        assert ModelSpec.from_hf({**given, **architectures}, {}) == whole


# of DeepSeek-V2-Lite, as published
LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400,
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "n_shared_experts": 2, "n_routed_experts": 64, "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 6, "moe_layer_freq": 1, "first_k_dense_replace": 1,
    "norm_topk_prob": False, "scoring_func": "softmax", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip


def test_a_token_is_held_once_for_all_heads_on_every_rank() -> None:
    spec = ModelSpec.from_hf(LITE, {})
    layer = spec.layers[0]
    assert layer.scale == pytest.approx(192**-0.5 * (1 + 0.0707 * 3.6888794541) ** 2)
    assert decompressed_from(layer) == 171
    layout = TorchLatents(spec.layers, torch.bfloat16)
    assert layout.bytes_per_slot() == PerSpace(27 * 576 * 2, 0)
    kv = layout.allocate(PerSpace(5, 0), CPU)
    assert [tuple(x.shape for x in layer) for layer in kv] == [((5, 576),)] * 27
    eights = TorchLatents(spec.layers, torch.bfloat16, FORMATS["triton_fp8kv"])
    assert eights.bytes_per_slot() == PerSpace(27 * (576 + 4), 0)
    [(rows, scales), *_] = eights.allocate(PerSpace(5, 0), CPU)
    assert (rows.nbytes, scales.nbytes) == (5 * 576, 5 * 4)


def test_latents_in_eight_bits(tmp_path: Path) -> None:
    """Near the model's own, and the same however long the chunks are that wrote them."""
    reference = make_checkpoint(tmp_path, V3, {**GROUPED, "initializer_range": 0.1})
    mode = KvMode.named(["triton_fp8kv"])
    found = []
    for chunk in (1000, 20):
        device = make_device(tmp_path, "fp32", "cpu", kv=mode)
        seq = Sequence(0, random_ids(60, VOCAB, 1))
        Driver(device, 256).generate([seq], 12, chunk)
        want = expected_logprobs(reference, seq.prompt + seq.outputs)[59:]
        got = torch.tensor(seq.logprobs)
        assert 1e-3 < float((got - want).abs().max()) < 0.2
        found.append(got)
    assert float((found[0] - found[1]).abs().max()) < 0.1


def test_what_does_not_go_with_latents_is_refused_by_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, *VARIANTS["v2"])
    with pytest.raises(
        StartupError,
        match="that has its latents in ppl_int8kv instead of triton_fp8kv is not supported",
    ):
        make_device(tmp_path, "fp32", "cpu", kv=KvMode.named(["ppl_int8kv"]))
    with pytest.raises(StartupError, match=r"^--mode triton_gqa_attention is for attention with"):
        make_device(tmp_path, "fp32", "cpu", kv=KvMode.named(["triton_gqa_attention"]))


@pytest.mark.parametrize(
    ("architecture", "changes", "line"),
    [
        ("V2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("V2", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ("V2", {"mlp_bias": True}, "mlp_bias True"),
        ("V2", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("V3", {"topk_method": "greedy", "scoring_func": None}, "topk_method 'greedy'"),
        ("V3", {"topk_method": None}, "scoring_func 'softmax'"),
    ],
)
def test_other_routing_is_refused_by_name(
    architecture: str, changes: dict[str, Any], line: str
) -> None:
    name = f"Deepseek{architecture}ForCausalLM"
    with pytest.raises(StartupError) as error:
        ModelSpec.from_hf({**LITE, "architectures": [name], **changes}, {})
    assert str(error.value) == f"{line} of {name} is not available yet"


def test_which_layers_have_experts() -> None:
    changed = {**LITE, "num_hidden_layers": 6, "moe_layer_freq": 2}
    kinds = [type(mlp).__name__ for mlp in ModelSpec.from_hf(changed, {}).mlps]
    assert kinds == ["MlpSpec", "MlpSpec", "ExpertsSpec", "MlpSpec", "ExpertsSpec", "MlpSpec"]
    without = ModelSpec.from_hf({**LITE, "n_routed_experts": None}, {})
    assert {type(mlp).__name__ for mlp in without.mlps} == {"MlpSpec"}
