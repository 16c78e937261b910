"""Mixtures of experts by themselves, against the blocks of transformers: routing, shares, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from asyncllm.engine.quant_torch import dequantize
from asyncllm.errors import StartupError
from asyncllm.models.checkpoint import read_checkpoint
from asyncllm.models.experts import Experts
from asyncllm.models.model import ModelContext
from asyncllm.models.ops import Product
from asyncllm.models.quant_config import StoredForm
from asyncllm.models.quantization import Quantisation, QuantStack, WeightTypes
from asyncllm.models.quantize import quantize_blocks, quantize_rows
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


def make(
    spec: ExpertsSpec,
    rank: int = 0,
    size: int = 1,
    ep: bool = False,
    quantisation: Quantisation | None = None,
) -> Experts:
    site = ModelContext(
        comm=SingleRank(), world=Rank(rank, size), whole_experts=ep, ops=TorchOps(),
        attention=TorchAttention([], TorchPairs([], torch.float32), 1, CPU),
        dtype=torch.float32, device=CPU, quantisation=quantisation or Quantisation(),
        path="layers.0.mlp.",
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
    form = experts._site.quantisation.stored
    load(
        read_checkpoint(folder),
        experts.targets(""),
        lambda name: False,
        lambda done, total: None,
        form=form,
    )
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


# -- in 8 bits -----------------------------------------------------------------------------------

FORMS = {
    "fp8w8a8": StoredForm("scaled", "fp8_channel", (1, 0)),
    "fp8w8a8-b128": StoredForm("scaled", "fp8_block", (128, 128), suffix="_scale_inv"),
    "w8a8": StoredForm("scaled", "int8_channel", (1, 0), element="I8"),
}


def quantised(name: str, kind: str, folder: Path) -> tuple[dict[str, Tensor], StoredForm]:
    """A checkpoint whose experts are in 8 bits, beside ``folder``'s wide one, and what each of
    their weights stands for."""
    form, tensors, wide = FORMS[kind], load_file(folder / "model.safetensors"), {}
    names, layers = CASES[name][1].names, set()
    ends = tuple(f".{each}.weight" for each in (names.gate, names.up, names.down))
    for key in [key for key in tensors if key.startswith("experts.") and key.endswith(ends)]:
        layers.add(key.removesuffix(".weight"))
        if form.kind == "fp8_block":
            tensors[key], scales = quantize_blocks(tensors[key])
            each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
            each = each[: len(tensors[key]), : tensors[key].shape[1]]
        else:
            element = torch.int8 if kind == "w8a8" else torch.float8_e4m3fn
            tensors[key], scales = quantize_rows(tensors[key], element)
            each = scales
        tensors[f"{key}{form.suffix}"] = scales
        wide[key] = tensors[key].float() * each
    others = {key.removesuffix(".weight") for key in tensors} - layers
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return wide, replace(form, plain=frozenset(f"layers.0.mlp.{each}" for each in others))


@pytest.mark.parametrize("shares", ["whole", "tp 3", "ep 3"])
@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@torch.no_grad()
def test_stored_in_8_bits(tmp_path: Path, name: str, kind: str, shares: str) -> None:
    """Scales go with their weights; only rows are rounded, each by a scale of its own."""
    block, spec = reference(name, tmp_path), CASES[name][1]
    wide, form = quantised(name, kind, tmp_path)
    state = block.state_dict()
    for expert in range(spec.num_experts):
        gate, up, down = (
            wide[f"experts.{expert}.{each}.weight"]
            for each in (spec.names.gate, spec.names.up, spec.names.down)
        )
        state["experts.gate_up_proj"][expert] = torch.cat((gate, up))
        state["experts.down_proj"][expert] = down
    size = 1 if shares == "whole" else 3
    ranks = [make(spec, rank, size, shares == "ep 3", Quantisation(form)) for rank in range(size)]
    x = torch.randn(1, 50, HIDDEN)
    got = torch.stack([loaded(experts, tmp_path)(x[0]) for experts in ranks]).sum(0)
    for experts in ranks:
        for stack in (experts._held.gate_up, experts._held.down):
            assert isinstance(stack, QuantStack)
            assert stack.kind == form.kind
    want = block(x)[0]
    error = (got - want).norm() / want.norm()
    assert 1e-4 < error < (0.015 if kind == "w8a8" else 0.05)
    assert len({experts.nbytes for experts in ranks}) == 1, "the plan is that of rank 0"
    parts = [experts._held for experts in ranks]
    for expert in range(spec.num_experts):  # what ranks have is what the checkpoint stands for
        mine = [held for held in parts if expert in held.numbers]
        found = [dequantize(held.gate_up[held.numbers.index(expert)]) for held in mine]  # type: ignore[arg-type]
        gates = torch.cat([each[: len(each) // 2] for each in found])[:INNER]
        if shares == "tp 3" and form.kind != "fp8_block":
            local = -(-INNER // 3)
            gates = torch.cat([each[:local] for each in found])[:INNER]
        torch.testing.assert_close(gates, wide[f"experts.{expert}.{spec.names.gate}.weight"])


@pytest.mark.parametrize("shares", ["whole", "tp 3", "ep 3"])
@pytest.mark.parametrize("kind", FORMS)
@torch.no_grad()
def test_made_at_load(tmp_path: Path, kind: str, shares: str) -> None:
    """--quant_type: near the wide ones, a byte each; routers and shared gates stay as they are."""
    block, spec = reference("qwen2", tmp_path), CASES["qwen2"][1]
    asked = Quantisation(asked=WeightTypes(kind))
    size = 1 if shares == "whole" else 3
    ranks = [make(spec, rank, size, shares == "ep 3", asked) for rank in range(size)]
    x = torch.randn(1, 50, HIDDEN)
    got = torch.stack([loaded(experts, tmp_path)(x[0]) for experts in ranks]).sum(0)
    want = block(x)[0]
    error = (got - want).norm() / want.norm()
    assert 1e-4 < error < (0.03 if kind == "w8a8" else 0.08)
    assert {experts._router.dtype for experts in ranks} == {torch.float32}
    elements = {
        stack.data.element_size() for e in ranks for stack in (e._held.gate_up, e._held.down)
    }  # type: ignore[union-attr]
    assert elements == {1}


@pytest.mark.parametrize("size", [1, 2, 4])
@torch.no_grad()
def test_slices_of_blocks_are_whole_blocks(tmp_path: Path, size: int) -> None:
    """Of 300 channels in blocks of 128, two ranks have 256 and 44, and of four one has none."""
    spec = ExpertsSpec(num_experts=3, top_k=2, inner=300)
    tensors, wide = {"gate.weight": torch.randn(3, HIDDEN)}, []
    for expert in range(3):
        for name, shape in (
            ("gate", (300, HIDDEN)),
            ("up", (300, HIDDEN)),
            ("down", (HIDDEN, 300)),
        ):
            values, scales = quantize_blocks(torch.randn(shape) * torch.arange(1, 1 + shape[1]))
            key = f"experts.{expert}.{name}_proj.weight"
            tensors |= {key: values.contiguous(), f"{key}_scale_inv": scales.contiguous()}
            each = scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)
            wide.append(values.float() * each[:, : shape[1]])
    save_file(tensors, tmp_path / "model.safetensors")
    form = replace(FORMS["fp8w8a8-b128"], plain=frozenset({"layers.0.mlp.gate"}))
    ranks = [
        loaded(make(spec, rank, size, quantisation=Quantisation(form)), tmp_path)
        for rank in range(size)
    ]
    for expert in range(3):
        stacks = [
            [dequantize(stack[expert]) for stack in (each._held.gate_up, each._held.down)]  # type: ignore[arg-type]
            for each in ranks
        ]
        gates, ups = zip(*(gate_up.chunk(2) for gate_up, _ in stacks), strict=True)
        assert torch.equal(torch.cat(gates)[:300], wide[3 * expert])
        assert torch.equal(torch.cat(ups)[:300], wide[3 * expert + 1])
        down = torch.cat([down for _, down in stacks], 1)
        assert torch.equal(down[:, :300], wide[3 * expert + 2])
        assert not torch.cat(gates)[300:].any()
        assert not down[:, 300:].any()
    assert len({each.nbytes for each in ranks}) == 1


@torch.no_grad()
def test_an_expert_that_is_left_out_widens_its_product(tmp_path: Path) -> None:
    """modules_to_not_convert may name single ones: then the stack is what all stand for."""
    reference("mixtral", tmp_path)
    wide, form = quantised("mixtral", "fp8w8a8", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    left = "experts.2.w2.weight"
    del tensors[f"{left}_scale"]
    tensors[left] = wide[left]
    save_file(tensors, tmp_path / "model.safetensors")
    form = replace(form, plain=form.plain | {"layers.0.mlp.experts.2.w2"})
    experts = loaded(make(CASES["mixtral"][1], quantisation=Quantisation(form)), tmp_path)
    held = experts._held
    assert isinstance(held.gate_up, QuantStack)
    assert not isinstance(held.down, QuantStack)
    for expert in range(5):
        torch.testing.assert_close(held.down[expert], wide[f"experts.{expert}.w2.weight"])
    assert experts(torch.randn(9, HIDDEN)).isfinite().all()


def test_4_bits_are_widened() -> None:
    form = StoredForm("awq", "int4_group", (1, 4))
    experts = make(CASES["qwen3"][1], quantisation=Quantisation(form))
    assert isinstance(experts._held.gate_up, Tensor)


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
