"""--quant_type and --quant_cfg: names, the file, and what a model has of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asyncllm.config import Config, quantisation
from asyncllm.errors import StartupError
from asyncllm.models.quantization import WeightTypes
from asyncllm.models.spec import ModelSpec

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "decoder_sparse_step": 2, "head_dim": 16,
    "num_key_value_heads": 4, "mlp_only_layers": [],
}  # fmt: skip
DOWN_13 = {"layer_name": "down_proj", "quant_type": "no_quant", "layer_nums": [1, 3]}
YAML = """\
quant_type: vllm-w8a8
mix_bits:
  - layer_name: "down_proj"
    quant_type: "no_quant"
    layer_nums: [1, 3] # defaults to all layers
  - layer_name: qkv_proj
    quant_type: fp8w8a8
"""


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec.from_hf(LLAMA | changes, {})


def asked(tmp_path: Path, said: object, kind: str | None = None, **changes: Any) -> WeightTypes:
    """By a file that holds ``said``."""
    path = tmp_path / "quant.yaml"
    path.write_text(said if isinstance(said, str) else json.dumps(said))
    given: dict[str, Any] = {} if kind is None else {"quant_type": kind}
    found = quantisation.asked(Config(quant_cfg=str(path), **given), spec(**changes))
    assert quantisation.from_text(quantisation.to_text(found)) == found
    return found


def test_not_given_is_not_none() -> None:
    assert quantisation.asked(Config(), spec()) == WeightTypes(None)
    given = Config(quant_type="none", explicit=frozenset({"quant_type"}))
    assert quantisation.asked(given, spec()) == WeightTypes("none")
    assert quantisation.from_text("") == WeightTypes(None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("w8a8", "w8a8"), ("w8a8-vllm", "w8a8"), ("vllm-w8a8", "w8a8"),
        ("fp8w8a8-vllm", "fp8w8a8"), ("vllm-fp8w8a8", "fp8w8a8"),
        ("fp8w8a8-b128-deepgemm", "fp8w8a8-b128"), ("triton-fp8w8a8-block128", "fp8w8a8-b128"),
        ("fp8w8a8-b128-triton", "fp8w8a8-b128"), ("vllm-fp8w8a8-b128", "fp8w8a8-b128"),
    ],
)  # fmt: skip
def test_other_names(name: str, kind: str) -> None:
    assert quantisation.asked(Config(quant_type=name), spec()) == WeightTypes(kind)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("fp8w8a8-pt", "--quant_type must be .* .nearest to this is fp8w8a8 .*, not 'fp8w8a8-pt'"),
        ("fp8w8a8-pt-sgl", "nearest to this is fp8w8a8 "), ("fp8w8a8g64", "or fp8w8a8-b128 "),
        ("fp4fp8-b32-deepgemm", "nearest to this is fp8w8a8-b128"), ("ao-int8wo", "w8a8 or fp8w8a8"),
        ("flashllm-w6a16", "w8a8 or fp8w8a8"), ("ppl-w4a16-128", "a checkpoint of AWQ, GPTQ or"),
        ("gptq", "a checkpoint of GPTQ is served as it is"), ("fp8w8a9", "did you mean fp8w8a8"),
        ("zzz", "--quant_type must be none, fp8w8a8, fp8w8a8-b128, w8a8 or awq, not 'zzz'"),
    ],
)  # fmt: skip
def test_what_is_not_served_names_what_is(name: str, line: str) -> None:
    with pytest.raises(StartupError, match=line):
        Config(quant_type=name)


def test_the_file_of_lightllm(tmp_path: Path) -> None:
    found = asked(tmp_path, YAML)
    for layer in range(4):
        of = {
            name: found.of(f"model.layers.{layer}.{name}")
            for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj")
        }
        down = "none" if layer in (1, 3) else "w8a8"
        assert list(of.values()) == [down, "w8a8", "fp8w8a8", "w8a8"]
    assert found.of("lm_head") == "w8a8", "which is no layer's, so that nothing asks"


def test_files_in_json_and_without_a_type(tmp_path: Path) -> None:
    found = asked(tmp_path, {"mix_bits": [DOWN_13]}, "fp8w8a8")
    assert found.of("layers.1.mlp.down_proj") == "none"
    assert found.of("layers.2.mlp.down_proj") == "fp8w8a8"
    assert asked(tmp_path, {"mix_bits": [DOWN_13]}).of("layers.2.mlp.down_proj") is None
    both = [DOWN_13, {"layer_name": "down_proj", "quant_type": "w8a8", "layer_nums": [3]}]
    assert asked(tmp_path, {"mix_bits": both}).of("layers.3.mlp.down_proj") == "w8a8", (
        "the last one"
    )


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("[1, 2]", "quant.yaml is not an object"), ("a: [", "is neither JSON nor YAML: while"),
        ("", "is not an object"), ({"bits": 8}, "has 'bits'; known are mix_bits, quant_type"),
        ({"quant_type": "fp8w8a8-pt"}, "quant.yaml: quant_type must be none, .*, not 'fp8w8a8-pt'"),
        ({"quant_type": 8}, "quant_type 8 is not a name"), ({"mix_bits": {}}, None),
        ({"mix_bits": {"a": 1}}, "mix_bits is not a list"), ({"mix_bits": [1]}, "mix_bits 1 is not an obj"),
        ({"mix_bits": [DOWN_13 | {"bits": 1}]}, "mix_bits 1 has 'bits'; known are layer_name"),
        ({"mix_bits": [DOWN_13 | {"layer_name": "down"}]}, "layer_name 'down' is none of .*down_proj\\?"),
        ({"mix_bits": [DOWN_13 | {"layer_name": "lm_head"}]}, "layer_name 'lm_head' is none of"),
        ({"mix_bits": [DOWN_13 | {"layer_name": "fused_moe"}]}, "layer_name 'fused_moe' is none of"),
        ({"mix_bits": [DOWN_13 | {"layer_nums": [4]}]}, "layer_nums has 4; layers are 0 to 3"),
        ({"mix_bits": [DOWN_13 | {"layer_nums": [True]}]}, "layer_nums has True; layers are"),
        ({"mix_bits": [DOWN_13 | {"layer_nums": "1"}]}, "layer_nums '1' is not a list"),
        ({"mix_bits": [DOWN_13, {"layer_name": "o_proj"}]}, "mix_bits 2: quant_type None is not a name"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_say(tmp_path: Path, said: object, line: str | None) -> None:
    if line is None:
        assert asked(tmp_path, said).overrides == ()
        return
    with pytest.raises(StartupError, match=line) as error:
        asked(tmp_path, said)
    assert "\n" not in str(error.value)


def test_a_file_must_be_there_and_agree(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"^--quant_cfg nowhere cannot be read: No such .*y$"):
        quantisation.asked(Config(quant_cfg="nowhere"), spec())
    with pytest.raises(
        StartupError, match=r"--quant_type fp8w8a8 and quant_type w8a8 of .* differ"
    ):
        asked(tmp_path, {"quant_type": "w8a8"}, "fp8w8a8")


def test_awq_is_for_its_checkpoints() -> None:
    stored = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    for name in ("awq", "awq_marlin"):
        found = quantisation.asked(Config(quant_type=name), spec(quantization_config=stored))
        assert found == WeightTypes("awq")
        with pytest.raises(StartupError, match="is for AWQ checkpoints, and this one is not quan"):
            quantisation.asked(Config(quant_type=name), spec())
    other = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    with pytest.raises(StartupError, match=r"quantised in another way \(gptq\)"):
        quantisation.asked(Config(quant_type="awq"), spec(quantization_config=other))


def test_experts_are_one_projection(tmp_path: Path) -> None:
    """Whatever their layers are called; a shared MLP is none of them."""
    other = {"layer_name": "fused_moe", "quant_type": "w8a8", "layer_nums": [1]}
    found = asked(tmp_path, {"quant_type": "fp8w8a8", "mix_bits": [other]}, **MOE)
    of = {
        name: found.of(f"model.layers.{name}")
        for name in (
            "1.mlp.experts.3.down_proj",
            "1.block_sparse_moe.experts.11.w1",
            "3.mlp.experts.3.down_proj",
            "1.mlp.shared_experts.down_proj",
            "1.self_attn.o_proj",
        )
    }
    assert list(of.values()) == ["w8a8", "w8a8", "fp8w8a8", "fp8w8a8", "fp8w8a8"]


def test_what_becomes_of_stored_experts_is_said() -> None:
    """8 bits stay, 4 bits are widened."""
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert not [*quantisation.notes(WeightTypes(), spec(**MOE, quantization_config=blocks), "cuda")]
    four = {"quant_method": "awq", "bits": 4, "group_size": 32}
    for kind, num in ((None, 1), ("awq", 1), ("fp8w8a8", 0)):
        lines = [
            *quantisation.notes(WeightTypes(kind), spec(**MOE, quantization_config=four), "cuda")
        ]
        assert len(lines) == num
        assert not lines or lines[0].startswith("experts use the type of --data_type")
    assert not [*quantisation.notes(WeightTypes(), spec(quantization_config=four), "cuda")]


@pytest.mark.parametrize(("device", "becomes"), [("cpu", "keep their"), ("cuda", "are converted")])
def test_what_becomes_of_a_gguf_file_is_said_of_this_device(device: str, becomes: str) -> None:
    file = replace(spec(), gguf=(("model.layers.0.mlp.up_proj.weight", "Q4_K"),))
    (line,) = quantisation.notes(WeightTypes(), file, device)
    assert line.startswith(f"low-bit weights of the GGUF file {becomes}")
    assert not [*quantisation.notes(WeightTypes("fp8w8a8"), file, device)]
