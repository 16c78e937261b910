"""What attention backends refuse, and how often a model plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncllm.engine.attention_cpu import TorchAttention, TorchPairs
from asyncllm.engine.build import make_model
from asyncllm.engine.parallel import Alone
from asyncllm.errors import StartupError
from asyncllm.models.attention import AttentionBackend, Batch, KvPairs
from asyncllm.models.rope import Rope
from asyncllm.models.spec import AttentionSpec, ModelSpec
from tests.models.harness import Driver, Sequence, make_device, random_ids
from tests.models.test_llama import VOCAB, make_checkpoint, make_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = AttentionSpec(
    kind="gqa", num_q_heads=6, num_kv_heads=2, head_dim=16, v_dim=16, scale=0.25,
    rope=Rope(theta=10000.0, dim=16),
)  # fmt: skip
BEYOND: list[tuple[dict[str, Any], str]] = [
    ({"window": 128}, "has a sliding window of 128"),
    ({"softcap": 50.0}, "has logits capped at 50.0"),
    ({"sinks": True}, "has attention sinks"),
    ({"kind": "mla"}, "is of kind 'mla'"),
    ({"rope": None}, "has no rotary embedding"),
    ({"rope": Rope(theta=1e4, dim=16, interleaved=True)}, "turns neighbouring elements"),
    ({"v_dim": 8}, "has values of 8 and keys of 16"),
]


def backend(device: torch.device) -> tuple[type[AttentionBackend], type[KvPairs]]:
    if device.type == "cpu":
        return TorchAttention, TorchPairs
    # not at the top: tests of kernels want to be the first to import Triton
    from asyncllm.engine.attention_cuda import TritonAttention, TritonPairs

    return TritonAttention, TritonPairs


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize(("changes", "reason"), BEYOND, ids=str)
def test_nothing_of_a_spec_is_ignored(
    device: torch.device, changes: dict[str, Any], reason: str
) -> None:
    attention, pairs = backend(device)
    layout = pairs([PLAIN], torch.float32)
    assert attention.refuse(PLAIN, layout, device) is None
    assert attention.refuse(replace(PLAIN, **changes), layout, device) == reason


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_layout_or_device_of_another_kind_is_refused(device: torch.device) -> None:
    attention, pairs = backend(device)
    other = KvPairs([PLAIN], torch.float32)
    reason = attention.refuse(PLAIN, other, device)
    assert reason == f"has its K/V in KvPairs on {device.type}"
    elsewhere = CUDA if device is CPU else CPU
    assert attention.refuse(PLAIN, pairs([PLAIN], torch.float32), elsewhere) is not None


def test_the_kernels_refuse_large_heads() -> None:
    attention, pairs = backend(CUDA)
    large = replace(PLAIN, head_dim=320, v_dim=320)
    reason = attention.refuse(large, pairs([large], torch.float32), CUDA)
    assert reason == "has heads of 320, more than 256"


def test_one_layer_that_cannot_run_ends_the_start() -> None:
    spec = ModelSpec.from_hf(make_config().to_dict(), {})
    odd = replace(spec, layers=(*spec.layers[:2], replace(spec.layers[2], window=64)))
    with pytest.raises(StartupError) as error:
        make_model(odd, Alone(), dtype="fp32", device=CPU, max_len=64, where=torch.device("meta"))
    assert str(error.value) == (
        "attention of LlamaForCausalLM that has a sliding window of 64: not available yet"
    )


def test_layers_that_attend_alike_share_the_plan_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path)
    planned: list[AttentionSpec] = []
    plan = TorchAttention.plan

    def noted(self: TorchAttention, spec: AttentionSpec, batch: Batch) -> Any:
        planned.append(spec)
        return plan(self, spec, batch)

    monkeypatch.setattr(TorchAttention, "plan", noted)
    read = ModelSpec.from_dir
    alike = Sequence(0, random_ids(9, VOCAB, 0))
    Driver(make_device(tmp_path, "fp32", "cpu"), 1024).generate([alike], 4)
    assert len(planned) == 4  # steps
    assert len(set(planned)) == 1

    def two_kinds(folder: Path) -> ModelSpec:
        spec = read(folder)
        first, *others = spec.layers
        return replace(spec, layers=(replace(first, scale=first.scale / 2), *others))

    monkeypatch.setattr(ModelSpec, "from_dir", two_kinds)
    planned.clear()
    differ = Sequence(0, random_ids(9, VOCAB, 0))
    Driver(make_device(tmp_path, "fp32", "cpu"), 1024).generate([differ], 4)
    assert len(planned) == 8
    assert len(set(planned)) == 2
    assert differ.logprobs != alike.logprobs
