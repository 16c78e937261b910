"""Mixtures of experts by themselves, against the blocks of transformers: routing, shares, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from asyncllm.engine.attention_cpu import TorchAttention, TorchPairs
from asyncllm.engine.ops_cpu import TorchOps
from asyncllm.engine.parallel import SingleRank
from asyncllm.errors import StartupError
from asyncllm.models.checkpoint import read_checkpoint
from asyncllm.models.experts import Experts
from asyncllm.models.model import Site
from asyncllm.models.ops import Product
from asyncllm.models.spec import ExpertNames, ExpertsSpec
from asyncllm.models.weights import load

CPU = torch.device("cpu")
HIDDEN, INNER = 48, 20
QWEN = {"moe_intermediate_size": INNER, "num_experts": 7, "num_experts_per_tok": 3}
DEEPSEEK = {
    "moe_intermediate_size": INNER, "n_routed_experts": 12, "num_experts_per_tok": 4,
    "n_shared_experts": 2, "num_attention_heads": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
}  # fmt: skip

# name -> block of transformers, its spec
Case = tuple[Callable[[], nn.Module], ExpertsSpec]
CASES: dict[str, Case] = {
    "mixtral": (
        lambda: MixtralSparseMoeBlock(
            MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=5)
        ),
        ExpertsSpec(
            num_experts=5,
            top_k=2,
            inner=INNER,
            renormalise=True,
            names=ExpertNames(gate="w1", up="w3", down="w2"),
        ),
    ),
    "qwen2": (
        lambda: Qwen2MoeSparseMoeBlock(
            Qwen2MoeConfig(hidden_size=HIDDEN, shared_expert_intermediate_size=33, **QWEN)
        ),
        ExpertsSpec(
            num_experts=7,
            top_k=3,
            inner=INNER,
            shared_inner=33,
            shared_gate=True,
            names=ExpertNames(shared="shared_expert"),
        ),
    ),
    "qwen3": (
        lambda: Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(hidden_size=HIDDEN, norm_topk_prob=True, **QWEN)
        ),
        ExpertsSpec(num_experts=7, top_k=3, inner=INNER, renormalise=True),
    ),
    "deepseek_v2": (
        lambda: DeepseekV2Moe(
            DeepseekV2Config(hidden_size=HIDDEN, topk_method="group_limited_greedy", **DEEPSEEK)
        ),
        ExpertsSpec(
            num_experts=12,
            top_k=4,
            inner=INNER,
            groups=4,
            top_groups=2,
            scale=2.5,
            shared_inner=2 * INNER,
        ),
    ),
    "deepseek_v3": (
        lambda: DeepseekV3MoE(
            DeepseekV3Config(hidden_size=HIDDEN, norm_topk_prob=True, **DEEPSEEK)
        ),
        ExpertsSpec(
            num_experts=12,
            top_k=4,
            inner=INNER,
            scoring="sigmoid",
            bias=True,
            groups=4,
            top_groups=2,
            group_score="top2",
            renormalise=True,
            scale=2.5,
            shared_inner=2 * INNER,
        ),
    ),
}


class Rank:
    """A rank whose part of the sum is its answer."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather_tokens(self, x: Tensor) -> Tensor:
        return x

    def sum_tokens(self, product: Product, x: Tensor) -> Tensor:
        out = torch.full_like(x, float("nan"))
        return product(x, out)


def make(spec: ExpertsSpec, rank: int = 0, size: int = 1, ep: bool = False) -> Experts:
    site = Site(
        comm=SingleRank(), world=Rank(rank, size), whole_experts=ep, ops=TorchOps(),
        attention=TorchAttention([], TorchPairs([], torch.float32), 1, CPU),
        dtype=torch.float32, device=CPU,
    )  # fmt: skip
    return Experts(site, HIDDEN, spec)


def reference(name: str, folder: Path) -> nn.Module:
    """The block with large random weights, saved in ``folder`` by the names of checkpoints."""
    torch.manual_seed(0)
    block, names = CASES[name][0]().eval(), CASES[name][1].names
    state: dict[str, Tensor] = block.state_dict()
    for tensor in state.values():
        nn.init.normal_(tensor, std=0.5)
    saved = {}
    for key, tensor in state.items():
        if key == "experts.gate_up_proj":
            for i, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                saved[f"experts.{i}.{names.gate}.weight"] = gate.clone()
                saved[f"experts.{i}.{names.up}.weight"] = up.clone()
        elif key == "experts.down_proj":
            for i, down in enumerate(tensor):
                saved[f"experts.{i}.{names.down}.weight"] = down.clone()
        else:
            saved[key] = tensor
    save_file(saved, folder / "model.safetensors")
    return block


def loaded(experts: Experts, folder: Path) -> Experts:
    load(read_checkpoint(folder), experts.targets(""), lambda name: False, lambda done, total: None)
    experts.pack()
    return experts


@pytest.mark.parametrize("shares", ["whole", "tp 3", "ep 3"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_sum_over_ranks_is_what_transformers_computes(
    tmp_path: Path, name: str, shares: str
) -> None:
    block, (_, spec) = reference(name, tmp_path), CASES[name]
    x = torch.randn(1, 50, HIDDEN)
    size = 1 if shares == "whole" else 3
    ranks = [make(spec, rank, size, shares == "ep 3") for rank in range(size)]
    parts = [loaded(experts, tmp_path)(x[0]) for experts in ranks]
    torch.testing.assert_close(torch.stack(parts).sum(0), block(x)[0], rtol=1e-4, atol=1e-4)
    assert len({experts.nbytes for experts in ranks}) == 1, "the plan is that of rank 0"


@torch.no_grad()
def test_padding_goes_to_no_expert(tmp_path: Path) -> None:
    reference("mixtral", tmp_path)
    experts, x = loaded(make(CASES["mixtral"][1]), tmp_path), torch.randn(6, HIDDEN)
    found = experts(x, torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.int32))
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(found[kept], experts(x)[kept])
    assert (found[[1, 4]] == 0).all()


CHANGES: dict[str, Any] = {
    "top_k": 3, "scoring": "softmax", "bias": False, "groups": 2, "top_groups": 3,
    "group_score": "max", "renormalise": False, "scale": 2.0, "shared_inner": 0,
    "activation": "gelu_tanh",
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
@torch.no_grad()
def test_every_field_matters(tmp_path: Path, field: str) -> None:
    block, (_, spec) = reference("deepseek_v3", tmp_path), CASES["deepseek_v3"]
    others = {"num_experts", "inner", "shared_gate", "names"}  # weights would not fit
    assert set(CHANGES) | others == {f.name for f in fields(spec)}
    x = torch.randn(1, 50, HIDDEN)
    changed = make(replace(spec, **{field: CHANGES[field]}))
    load(
        read_checkpoint(tmp_path), changed.targets(""), lambda name: True, lambda done, total: None
    )
    assert not torch.allclose(changed(x[0]), block(x)[0], atol=1e-2)


def test_more_ranks_than_experts(tmp_path: Path) -> None:
    block, (_, spec) = reference("mixtral", tmp_path), CASES["mixtral"]
    x = torch.randn(1, 9, HIDDEN)
    parts = [loaded(make(spec, r, 8, True), tmp_path)(x[0]) for r in range(8)]
    torch.testing.assert_close(torch.stack(parts).sum(0), block(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 7},
        {"top_k": 0},
        {"groups": 5},
        {"top_groups": 5},
        {"groups": 12, "top_groups": 12},
    ],
    ids=str,
)
def test_what_cannot_be_chosen_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(StartupError, match=r"groups: config\.json asks for what cannot be chosen"):
        replace(CASES["deepseek_v3"][1], **{"top_k": 4, **changes})


@pytest.mark.parametrize("changes", [{"inner": 0}, {"shared_inner": -1}], ids=str)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(StartupError, match=r"experts of size .* asks for what cannot be"):
        replace(CASES["deepseek_v3"][1], **changes)
