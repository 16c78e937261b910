"""Checkpoints that do not hold what config.json says: one clear line, naming file and tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from asyncllm.errors import StartupError
from asyncllm.models.spec import ModelSpec
from tests.models.harness import build
from tests.models.test_llama import make_checkpoint

FILE = "model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"


def load(model_dir: Path) -> None:
    build(model_dir, ModelSpec.from_dir(model_dir), "fp32", torch.device("cpu"), 64)


def change(model_dir: Path, **tensors: Tensor | None) -> None:
    """Set or drop tensors of the checkpoint; "__" in a name stands for a dot."""
    found = load_file(model_dir / FILE)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, model_dir / FILE)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    change(tmp_path, model__layers__1__input_layernorm__weight=None, model__norm__weight=None)
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert str(error.value) == f"{tmp_path} lacks 2 tensors, the first: {NORM}"


def test_an_unknown_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    change(tmp_path, model__layers__0__self_attn__q_norm__weight=torch.ones(16))
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / FILE} holds 1 unknown tensors, the first: "
        "model.layers.0.self_attn.q_norm.weight"
    )


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        (NORM, [95], [96]),
        ("model.layers.0.self_attn.q_proj.weight", [96, 95], [96, 96]),
        ("model.layers.0.self_attn.k_proj.weight", [16, 96], [32, 96]),
        ("model.layers.2.mlp.down_proj.weight", [96, 161], [96, 160]),
        ("model.embed_tokens.weight", [500, 96], [499, 96]),
        ("lm_head.weight", [499], [499, 96]),
    ],
)
def test_a_tensor_of_another_shape_is_named(
    tmp_path: Path, name: str, shape: list[int], wanted: list[int]
) -> None:
    make_checkpoint(tmp_path)
    change(tmp_path, **{name.replace(".", "__"): torch.zeros(shape)})
    with pytest.raises(StartupError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / FILE}: {name} has shape {shape}, config.json wants {wanted}"
    )


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    make_checkpoint(tmp_path)
    raw = (tmp_path / FILE).read_bytes()
    broken = {"cut": raw[:-100], "header": b"\xff" * 8 + raw[8:], "empty": b""}
    (tmp_path / FILE).write_bytes(broken[damage])
    with pytest.raises(StartupError, match=rf"^{tmp_path / FILE} cannot be read: .+") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(StartupError, match=rf"^{tmp_path} holds no \*\.safetensors files$"):
        load(tmp_path)


def test_a_tied_output_matrix_may_be_in_the_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    change(tmp_path, lm_head__weight=torch.zeros(499, 96))
    load(tmp_path)
