"""Quantised checkpoints that the published tools have made, and weights that are quantised at load.

Checkpoints and expected logits are in tests/data/quantised, with the script that made them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from asyncllm.core.request import SamplingParams
from asyncllm.engine import quant_torch
from asyncllm.engine.build import build_model, make_device
from asyncllm.engine.device import CpuDevice, CudaDevice
from asyncllm.engine.engine import Engine
from asyncllm.engine.ops_cpu import TorchOps
from asyncllm.engine.parallel import SingleRank
from asyncllm.engine.quant_torch import dequantize
from asyncllm.models.linear import QuantLinear, SideBySide
from asyncllm.models.model import Model
from asyncllm.models.quantization import AS_STORED, Override, QuantRows, RowForm, WeightTypes
from asyncllm.models.quantize import quantize_blocks
from tests.models.families import CASES, make
from tests.models.harness import Driver, Ranks, Sequence, Together, random_ids, read_spec

DATA = Path(__file__).parents[1] / "data" / "quantised"
CPU = torch.device("cpu")
NONE = WeightTypes("none")
NAMES = sorted(path.name for path in DATA.iterdir() if (path / "config.json").exists())
KINDS = {
    "awq": "int4_group", "gptq": "int4_group", "gptq-ordered": "int4_group", "ct-int8": "int8_channel",
    "ct-w4a16": "int4_group", "ct-w4a16-zeros": "int4_group", "ct-fp8-channel": "fp8_channel",
    "ct-fp8-tensor": "fp8_channel", "ct-moe-fp8": "fp8_channel",
}  # fmt: skip
MIXTURE = "ct-moe-fp8"


def build(
    folder: Path, asked: WeightTypes = AS_STORED, dtype: str = "fp32", where: torch.device = CPU
) -> Model:
    return build_model(
        folder, read_spec(folder), SingleRank(), dtype=dtype, device=where, max_len=256, asked=asked
    )


def scores(
    folder: Path,
    asked: WeightTypes = AS_STORED,
    size: int = 1,
    dtype: str = "fp32",
    where: torch.device = CPU,
    whole_experts: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the expected ids but the first, and what they are to be."""
    expected = load_file(folder / "expected.safetensors")
    ids, want = expected["ids"], expected.get("rounded", expected["plain"])
    if asked == NONE:
        want = expected["plain"]
    if size == 1:
        model = build(folder, asked, dtype, where)
        engine = Engine(model, SingleRank(), num_slots=64, num_lanes=8, max_len=256, eos_ids=())
        device: CpuDevice | CudaDevice | Ranks = make_device(engine, 1)
    else:
        device = Ranks(folder, size, asked=asked, max_len=256, whole_experts=whole_experts)
    seq = Sequence(0, list(map(int, ids)), SamplingParams(temperature=0.0, prompt_logprobs=0))
    try:
        Driver(device, 64).generate([seq], 1)
    finally:
        device.close()
    chosen = want.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    return torch.tensor(seq.prompt_logprobs), chosen


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_that_the_tool_means(name: str, size: int) -> None:
    """--quant_type none: what they stand for, in float32."""
    got, want = scores(DATA / name, NONE, size)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)
    assert want.std() > 0.5


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_served_as_they_are(name: str, size: int) -> None:
    """In 8 bits activations are rounded as compressed-tensors does, whose int8 has scales of
    max / 127.5 rather than 127; two ranks round halves of rows by scales of their own."""
    got, want = scores(DATA / name, size=size)
    error = (got - want).square().mean().sqrt()
    exact = {"int4_group": 1e-3, "fp8_channel": 0.015, "int8_channel": 0.05}[KINDS[name]]
    assert error < (exact if size == 1 or KINDS[name] == "int4_group" else 0.1)


def test_experts_stay_in_few_bits() -> None:
    """The same values as dequantised ones, but for rounding; the router as the checkpoint has it."""
    model, wide = build(DATA / MIXTURE), build(DATA / MIXTURE, NONE)
    (held, plain), (mlp, dense) = zip(
        *((m.blocks[0].mlp._held, m.blocks[0].mlp) for m in (model, wide)), strict=True
    )
    for stack, values in ((held.gate_up, plain.gate_up), (held.down, plain.down)):
        assert stack.kind == "fp8_channel"
        for expert in range(4):
            torch.testing.assert_close(
                dequantize(stack[expert]), values[expert], rtol=1e-6, atol=1e-7
            )
    assert torch.equal(mlp._router, dense._router)
    tally = model.site.quantisation.tally
    assert (tally.served, tally.plain) == ({"fp8_channel": 3 + 3}, 1), "q, and k, v, o"
    assert mlp.nbytes < 0.3 * dense.nbytes


@pytest.mark.parametrize("whole", [False, True])
def test_experts_of_ranks(whole: bool) -> None:
    """Each with some, or a slice of every one."""
    got, want = scores(DATA / MIXTURE, size=2, whole_experts=whole)
    assert (got - want).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("name", [name for name in NAMES if name != MIXTURE])
def test_weights_stay_in_few_bits(name: str) -> None:
    """Every layer but those that the checkpoint leaves; the same values as dequantised ones."""
    model, wide = build(DATA / name), build(DATA / name, NONE)
    for block, plain in zip(model.blocks, wide.blocks, strict=True):
        for part in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"):
            found, dense = block, plain
            for step in part.split("."):
                found, dense = getattr(found, step), getattr(dense, step)
            rows = []
            for linear in found._linears if isinstance(found, SideBySide) else [found]:
                if not isinstance(linear, QuantLinear):
                    rows.append(linear.weight)
                    continue
                assert linear.weight.kind == KINDS[name]
                values = dequantize(linear.weight)
                if linear._order is not None:
                    values = values[:, linear._order.argsort()]
                rows.append(values)
            torch.testing.assert_close(torch.cat(rows), dense.weight, rtol=1e-6, atol=1e-7)
    left = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    leaves = "k_proj" in str(left.get("ignore")) + str(left.get("modules_to_not_convert"))
    assert model.site.quantisation.tally.plain == leaves
    assert sum(model.site.quantisation.tally.served.values()) == 7 - leaves
    assert model.nbytes < 0.7 * wide.nbytes


# -- weights that are quantised while they are read --------------------------------------------

SIZES = {"hidden_size": 160, "intermediate_size": 224}  # no multiples of 128
TYPES = {"fp8w8a8": 0.04, "fp8w8a8-b128": 0.04, "w8a8": 0.015}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32 with biases, whose heads and slices do not divide by 128."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=96, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5,
        attention_bias=True, initializer_range=0.08, max_position_embeddings=256, **SIZES,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def linears(model: Model) -> Iterator[Any]:
    """All linear layers, those beside each other one by one."""
    for block in model.blocks:
        for linear in (block.attention.qkv, block.attention.out, block.mlp.gate_up, block.mlp.down):
            yield from linear._linears if isinstance(linear, SideBySide) else [linear]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", TYPES)
def test_every_layer_is_near_its_weights(plain: Path, kind: str, size: int) -> None:
    """Whatever the shards; a weight is never off by more than half a step of its row or block."""
    served: dict[str, list[Tensor]] = {"wide": [], "quantised": []}
    for rank in range(size):
        for name, asked in (("wide", NONE), ("quantised", WeightTypes(kind))):
            group = Together(rank, threading.Barrier(1), [None] * size)
            model = build_model(
                plain, read_spec(plain), group, dtype="fp32", device=CPU, max_len=64, asked=asked
            )
            for linear in linears(model):
                quantised = isinstance(linear, QuantLinear)
                assert quantised == (name == "quantised")
                served[name].append(dequantize(linear.weight) if quantised else linear.weight)
        # q, k and v lie beside each other where blocks of 128 rows would be of two of them
        parts = len(served["quantised"]) // (rank + 1)
        assert parts == {"fp8w8a8-b128": 2 * 7, "fp8w8a8": 8, "w8a8": 8}[kind]
    wide, quantised = (torch.cat([w.flatten() for w in served[n]]) for n in ("wide", "quantised"))
    most = wide.abs().max()
    assert (wide - quantised).abs().max() < most / (250 if kind == "w8a8" else 26)
    error = (wide - quantised).norm() / wide.norm()
    assert 1e-3 < error < (0.01 if kind == "w8a8" else 0.03)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", TYPES)
def test_answers_are_near_those_of_the_weights(plain: Path, kind: str, size: int) -> None:
    ids = torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(1))
    model = transformers.LlamaForCausalLM.from_pretrained(plain).eval()
    with torch.no_grad():
        logits = model(ids[None]).logits[0].contiguous()
    save_file({"ids": ids, "plain": logits}, plain / "expected.safetensors")
    exact, want = scores(plain, NONE, size)
    torch.testing.assert_close(exact, want, atol=1e-4, rtol=0)
    (got, _), noise = scores(plain, WeightTypes(kind), size), want.std()
    assert 1e-4 < (got - want).square().mean().sqrt() < 8 * TYPES[kind] * noise


@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek v2 lite", "deepseek v3"])
@pytest.mark.parametrize("kind", TYPES)
def test_rows_in_8_bits_from_norms_change_no_number(
    tmp_path: Path, kind: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what a pass of each product over the same rows would make of them."""
    make(CASES[family], tmp_path)
    ids, made, passes = random_ids(24, 90, 1), [], 0
    quantised = quant_torch.in_8_bits

    def counted(x: Tensor, form: RowForm) -> QuantRows:
        nonlocal passes
        passes += 1
        return quantised(x, form)

    monkeypatch.setattr(quant_torch, "in_8_bits", counted)
    for once in (True, False):
        if not once:
            monkeypatch.setattr(TorchOps, "row_form", lambda *_: None)
        model = build(tmp_path, WeightTypes(kind))
        engine = Engine(model, SingleRank(), num_slots=64, num_lanes=8, max_len=256, eos_ids=())
        device, passes = make_device(engine, 1), 0
        seq = Sequence(0, ids, SamplingParams(temperature=0.0, prompt_logprobs=0))
        Driver(device, 64).generate([seq], 2)
        device.close()
        made.append((seq.prompt_logprobs, seq.outputs, passes))
    assert made[0][:2] == made[1][:2]
    # three products side by side, whose blocks are of one each, read the same rows
    if kind == "fp8w8a8-b128" and family == "llama":
        assert made[0][2] < made[1][2]
    assert 0 < made[0][2] <= made[1][2]


def test_overrides_choose_layer_by_layer(plain: Path) -> None:
    """Different types in one fused projection, and in one layer of two."""
    asked = WeightTypes(
        "fp8w8a8",
        (
            Override("none", frozenset({"k_proj"}), frozenset({1})),
            Override("w8a8", frozenset({"down_proj"}), None),
        ),
    )
    model = build(plain, asked)
    kinds = [
        linear.weight.kind if isinstance(linear, QuantLinear) else None for linear in linears(model)
    ]
    fp8, int8 = "fp8_channel", "int8_channel"
    assert kinds == [fp8, fp8, fp8, int8, fp8, None, fp8, fp8, fp8, int8]
    tally = model.site.quantisation.tally
    assert tally.text("bf16") == (
        "linear layers: 11 in fp8 (a scale per output channel), 2 in int8 (a scale per output "
        "channel), 1 in bf16"
    )


def test_no_more_memory_than_the_plan_and_a_piece(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While weights are quantised: of no layer is there more than a piece in another type."""
    monkeypatch.setattr("asyncllm.models.weights._CHUNK", 128 * 160)
    seen: list[int] = []
    zeros = torch.zeros

    def noted(*size: Any, **how: Any) -> Tensor:
        made = zeros(*size, **how)
        seen.append(made.numel())
        return made

    monkeypatch.setattr("asyncllm.models.weights.torch.zeros", noted)
    model = build(plain, WeightTypes("fp8w8a8"))
    planned = sum(linear.nbytes for linear in linears(model))
    widest = 128 * 224
    assert max(seen) <= widest
    weights = 2 * (4 * 160 * 160 + 3 * 160 * 224)
    assert planned < 1.1 * weights + 4 * 2 * 4 * 160 * 2, "a byte each, scales, biases"


def test_blocks_that_shards_cut_are_widened(tmp_path: Path) -> None:
    """Blocks of 128 x 128 stay where they lie in one rank; elsewhere they become what they are."""
    folder = tmp_path / "model"
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=384, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(said))
    wide, whole = build(folder, NONE), build(folder)
    for dense, linear in zip(linears(wide), linears(whole), strict=True):
        assert linear.weight.kind == "fp8_block"
        assert torch.equal(dequantize(linear.weight), dense.weight)
    for rank in range(2):
        shards = []
        for asked in (NONE, AS_STORED):
            group = Together(rank, threading.Barrier(1), [None, None])
            model = build_model(
                folder, read_spec(folder), group, dtype="fp32", device=CPU, max_len=64, asked=asked
            )
            shards.append(model.blocks[0].attention.qkv)
        tally = model.site.quantisation.tally
        # a rank has 64 rows of k and v, and 192 of the inner channels
        cut = [name.rpartition(".")[2] for name in tally.widened]
        assert cut == ["k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
        assert tally.served == {"fp8_block": 2}
        (line,) = tally.warnings("bf16")
        assert line.startswith("5 linear layers are widened to bf16, since this --tp cuts")
        rows = [dequantize(each.weight) if isinstance(each, QuantLinear) else each.weight
                for each in shards[1]._linears]  # fmt: skip
        assert torch.equal(torch.cat(rows), shards[0].weight)


# -- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_as_near_as_the_cpu(name: str) -> None:
    """In bfloat16, whose rounding decides."""
    cpu, want = scores(DATA / name, dtype="bf16")
    cuda, _ = scores(DATA / name, dtype="bf16", where=torch.device("cuda"))
    far, near = ((got - want).square().mean().sqrt() for got in (cuda, cpu))
    assert far < 2 * near + 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_quantised_alike_on_a_gpu(plain: Path, kind: str) -> None:
    models = [build(plain, WeightTypes(kind), "bf16", torch.device(d)) for d in ("cpu", "cuda")]
    for cpu, cuda in zip(*map(linears, models), strict=True):
        assert torch.equal(cpu.weight.scales, cuda.weight.scales.cpu())
        off = (dequantize(cpu.weight) - dequantize(cuda.weight).cpu()).abs()
        assert (off > 0).float().mean() < 1e-3, "but for what lies between two values"
