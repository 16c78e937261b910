"""What a GPU cannot serve is refused in one line, before weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asyncllm.engine.build import Sizes, model_on_paper
from asyncllm.errors import StartupError
from asyncllm.kernels import autotune
from asyncllm.kernels.autotune import DeviceFacts
from asyncllm.models.kv_format import KvMode
from asyncllm.models.quantization import WeightTypes
from tests.models.harness import read_spec
from tests.models.test_deepseek import VARIANTS as LATENTS
from tests.models.test_deepseek import make_checkpoint as make_latents
from tests.models.test_llama import make_checkpoint

GPU = torch.device("cuda")


def build(folder: Path, weights: str | None, kv: str) -> None:
    """A model as a start measures it."""
    sizes = Sizes(
        tp=1, ranks=1, dtype="bf16", max_len=64, num_lanes=8, batch_max_tokens=64, mem_fraction=0.9,
        max_total_token_num=None, asked=WeightTypes(weights), kv=KvMode.named((), kv),
    )  # fmt: skip
    model_on_paper(read_spec(folder), sizes, GPU)


@pytest.mark.parametrize(
    ("latent", "weights", "kv", "reason"),
    [
        (False, "fp8w8a8", "None", "weights in fp8 (a scale per output channel) are not"),
        (False, "fp8w8a8-b128", "None", "weights in fp8 (blocks of 128 x 128) are not"),
        (True, "fp8w8a8", "None", "weights in fp8 (a scale per output channel) are not"),
        (False, None, "fp8kv", "that has its K/V in 8-bit floats on Old GPU is not"),
        (True, None, "fp8kv", "that has its latents in 8-bit floats on Old GPU is not"),
        (False, "w8a8", "int8kv", ""),
        (True, "w8a8", "None", ""),
    ],
)
def test_a_gpu_without_8_bit_floats(
    latent: bool, weights: str | None, kv: str, reason: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if latent:
        make_latents(tmp_path, *LATENTS["v2"])
    else:
        make_checkpoint(tmp_path)
    monkeypatch.setattr(autotune, "_assumed", [DeviceFacts("New GPU", 100, 89)])
    build(tmp_path, weights, kv)
    monkeypatch.setattr(autotune, "_assumed", [DeviceFacts("Old GPU", 100, 80)])
    if not reason:
        build(tmp_path, weights, kv)
        return
    with pytest.raises(StartupError) as error:
        build(tmp_path, weights, kv)
    assert reason in str(error.value)
    assert "Old GPU" in str(error.value)
