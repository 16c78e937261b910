"""Whole steps by the engine with our attention: the same tokens whether rows share reads or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asyncllm.engine import build
from asyncllm.engine.attention_cuda import TritonAttention, TritonPairs
from asyncllm.engine.latent_cuda import TritonLatentAttention, TritonLatents
from asyncllm.engine.ops_cpu import TorchOps
from asyncllm.models.attention import KvLayout
from asyncllm.models.kv_format import FORMATS, PLAIN, KvMode
from asyncllm.models.spec import AttentionSpec
from tests.kernels.harness import DEVICE
from tests.models import test_deepseek, test_llama
from tests.models.harness import Driver, Sequence, make_device
from tests.models.test_sharing import FREE, SAVED, rows_that_share, same_answers

ONE_LAYER = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="tests/models has the same in graphs")


class Here(TritonAttention):
    """In the interpreter."""

    @staticmethod
    def refuse(spec: AttentionSpec, layout: KvLayout, device: torch.device) -> str | None:
        return None


class LatentHere(TritonLatentAttention):
    """In the interpreter."""

    @staticmethod
    def refuse(spec: AttentionSpec, layout: KvLayout, device: torch.device) -> str | None:
        return None


def operators(
    layers: Any, kv: KvMode, dtype: Any, device: Any, max_len: int, where: Any
) -> tuple[Any, Any]:
    """Our attention beside torch's other operators."""
    if layers[0].kind == "mla":
        latents = TritonLatents(layers, dtype, kv.format)
        return TorchOps(), LatentHere(layers, latents, max_len, where)
    pairs = TritonPairs(layers, dtype, kv.format)
    return TorchOps(), Here(layers, pairs, max_len, where, kv.kernel)


@pytest.mark.parametrize(
    ("model", "fmt"), [("llama", None), ("llama", "triton_int8kv"), ("v2 lite", None)]
)
def test_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, fmt: str | None
) -> None:
    monkeypatch.setattr(build, "_operators", operators)
    if model == "llama":
        test_llama.make_checkpoint(tmp_path, num_hidden_layers=1)
    else:
        classes, changes = test_deepseek.VARIANTS[model]
        test_deepseek.make_checkpoint(tmp_path, classes, {**changes, **ONE_LAYER})
    found: list[list[Sequence]] = []
    for shares in (False, True):
        kv = PLAIN if fmt is None else KvMode(FORMATS[fmt])
        device = make_device(tmp_path, "fp32", "cpu", max_len=512, kv=kv, shares_prefixes=shares)
        assert (device.engine.sharing.costs is not None) == shares
        if shares:
            device.engine.sharing.costs = FREE
        found.append(rows_that_share(Driver(device, 4096)))
        assert device.engine.sharing.saved == (SAVED if shares else 0)
        device.close()
    same_answers(*found, 2e-4)
