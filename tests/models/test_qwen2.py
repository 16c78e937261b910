"""Qwen2 against transformers, with and without a sliding window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.models.harness import Driver, Ranks, make_device
from tests.models.test_llama import VOCAB, check_against


def make_checkpoint(path: Path, **changes: object) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(**{  # type: ignore[arg-type]
        "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": VOCAB,
        "num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.3, **changes,
    })  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("chunk", [1000, 7], ids=["whole", "chunked"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_matches_transformers(tmp_path: Path, tied: bool, chunk: int, tp: int) -> None:
    reference = make_checkpoint(tmp_path, tie_word_embeddings=tied)
    device = Ranks(tmp_path, 2) if tp == 2 else make_device(tmp_path, "fp32", "cpu")
    check_against(reference, Driver(device, 1024), chunk, 2e-4)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("chunk", [1000, 7], ids=["whole", "chunked"])
@pytest.mark.parametrize("window", [1, 8, 40])
def test_layers_with_a_sliding_window(tmp_path: Path, window: int, chunk: int, tp: int) -> None:
    reference = make_checkpoint(
        tmp_path, use_sliding_window=True, sliding_window=window, max_window_layers=1
    )
    device = Ranks(tmp_path, 2) if tp == 2 else make_device(tmp_path, "fp32", "cpu")
    check_against(reference, Driver(device, 1024), chunk, 2e-4)
