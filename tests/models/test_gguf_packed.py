"""GGUF weights in their own bits: products, whole models, memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize

from asyncllm.engine import quant_torch
from asyncllm.engine.build import build_model, make_model
from asyncllm.engine.int4_cpu import FEW, FEW_LOGITS, TorchPackedOps
from asyncllm.engine.ops_cpu import TorchOps
from asyncllm.engine.parallel import SingleRank
from asyncllm.gguf_folder import gguf_folder
from asyncllm.models.gguf_packed import PLANES, PackedMatrix, PackedTarget
from asyncllm.models.gguf_tensors import PACKED, GgufWeights
from asyncllm.models.quantization import WeightTypes
from tests.models.families import CASES, Reference, largest_difference, make
from tests.models.gguf_files import convert, random_blocks, write
from tests.models.harness import Ranks, build, make_device, read_spec

CPU = torch.device("cpu")
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 8}
MIXED = {"q_proj": "Q4_K", "v_proj": "Q6_K", "down_proj": "Q6_K", "up_proj": "Q5_K"}


def packed(
    kind: str, path: Path, rows: int, columns: int, dtype: torch.dtype, *, spare: bool
) -> tuple[PackedMatrix, torch.Tensor]:
    """A random matrix, packed, and its values."""
    raw = random_blocks(kind, (rows, columns), 3)
    write(path, "llama", {}, [("token_embd.weight", raw, kind)])
    matrix = PackedMatrix(site(dtype), (rows, columns), kind, spare=spare)
    source = GgufWeights(path).tensor("model.embed_tokens.weight")
    PackedTarget(matrix, 0, rows, ((0, 0, rows),)).fill(source)
    TorchPackedOps().pack(matrix)
    return matrix, torch.from_numpy(np.array(dequantize(raw, GGMLQuantizationType[kind])))


def site(dtype: torch.dtype, device: str = "cpu"):
    from types import SimpleNamespace

    return SimpleNamespace(device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize("kind", sorted(PACKED))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_those_of_the_values(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """By few rows and many; columns of 70 outputs are filled up to 128, which nobody sees."""
    matrix, values = packed(kind, tmp_path / "x.gguf", 70, 512, dtype, spare=False)
    ops, few = TorchPackedOps(), 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert set(PLANES) == PACKED
    for num in (1, 3, FEW + 1):
        x = torch.randn(num, 512, generator=torch.Generator().manual_seed(num)).to(dtype)
        want = x.float() @ values.t()
        bias = torch.randn(70).to(dtype)
        out = torch.empty(num, 70, dtype=dtype)
        for got in (
            ops.linear(x, matrix).float(),
            ops.linear(x, matrix, bias, out).float() - bias.float(),
        ):
            assert (got - want).norm() < few * want.norm()
        assert out.shape == (num, 70)
    matrix, _ = packed(kind, tmp_path / "x.gguf", 70, 512, dtype, spare=True)
    for num in (1, FEW_LOGITS, FEW_LOGITS + 1):
        x = torch.randn(num, 512).to(dtype)
        logits, rounded = ops.logits(x, matrix), ops.rows(torch.arange(70), matrix).float()
        assert logits.dtype == torch.float32
        want = x.float() @ values.t()
        assert (logits - want).norm() < (5e-3 if dtype == torch.bfloat16 else 1e-5) * want.norm()
        assert (rounded - values).norm() < (
            5e-3 if dtype == torch.bfloat16 else 1e-6
        ) * values.norm()
    if dtype == torch.bfloat16:  # both ways use the same weights, and neither rounds its sums
        x = torch.randn(FEW_LOGITS + 1, 512).to(dtype)
        many, one = ops.logits(x, matrix), ops.logits(x[:1], matrix)
        assert (many[:1] - one).norm() < 1e-4 * one.norm()


@pytest.mark.parametrize("kind", [*sorted(PACKED), "mixed"])
def test_a_model_is_that_of_the_widened_weights(kind: str, tmp_path: Path) -> None:
    """In float32; "mixed" as most files have it: several types, F32 among them."""

    def choose(name: str) -> str:
        if kind != "mixed":
            return kind
        return MIXED.get(name.rpartition(".weight")[0].rpartition(".")[2], "F32")

    tied = {"tie_word_embeddings": kind in ("Q4_K", "Q8_0")}
    case = replace(CASES["llama"], changes=CASES["llama"].changes | WIDE | tied)
    model = make(case, tmp_path / "hf", spread=0.5)
    convert(tmp_path / "hf", "llama", tmp_path / "x.gguf", choose)
    loaded = type(model).from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    reference, folder = Reference(loaded), gguf_folder(tmp_path / "x.gguf", tmp_path)
    device = make_device(folder, "fp32", "cpu", num_slots=1024, max_len=1024)
    assert largest_difference(reference, device) < 1e-3
    device.close()
    if kind in ("mixed", "Q8_0"):
        ranks = Ranks(folder, 2, max_len=1024)
        assert largest_difference(reference, ranks) < 1e-3
        ranks.close()


@pytest.mark.parametrize("asked", [None, "fp8w8a8"])
@pytest.mark.parametrize(
    ("where", "kind"),
    [
        *(("cpu", kind) for kind in ("Q4_K", "Q8_0")),
        *(pytest.param("cuda", kind, marks=pytest.mark.gpu) for kind in sorted(PACKED)),
    ],
)
def test_where_there_are_no_packed_products_weights_are_widened(
    where: str, kind: str, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. Exactly, in float32; or to 8 bits, if these are asked for."""
    case = replace(CASES["qwen2"], changes=CASES["qwen2"].changes | WIDE)
    make(case, tmp_path / "hf", spread=0.5)
    convert(tmp_path / "hf", "qwen2", tmp_path / "x.gguf", lambda name: kind)
    folder = gguf_folder(tmp_path / "x.gguf", tmp_path)
    spec, single = read_spec(folder), SingleRank()
    options: dict[str, Any] = {"dtype": "fp32", "max_len": 64}
    wide = build_model(folder, spec, single, device=CPU, asked=WeightTypes("none"), **options)
    monkeypatch.setattr(TorchOps, "packed", None)
    options |= {"device": torch.device(where), "asked": WeightTypes(asked)}
    model = build_model(folder, spec, single, **options)
    paper = make_model(spec, single, where=torch.device("meta"), **options)
    assert paper.nbytes == model.nbytes
    served = model.site.quantisation.tally.served
    assert set(served) == ({"fp8_channel"} if asked else set())
    mine, theirs = model.blocks[0].mlp.down, wide.blocks[0].mlp.down
    if asked:
        want = theirs.weight
        error = (quant_torch.dequantize(mine.weight).cpu() - want).norm() / want.norm()
        assert 1e-3 < error < 0.04
    else:
        assert torch.equal(mine.weight.cpu(), theirs.weight)
        assert torch.equal(model.embedding.table.cpu(), wide.embedding.table)


@pytest.mark.gpu
def test_a_gpu_answers_as_transformers(tmp_path: Path) -> None:
    case = replace(CASES["llama"], changes=CASES["llama"].changes | WIDE)
    model = make(case, tmp_path / "hf", spread=0.5)
    convert(tmp_path / "hf", "llama", tmp_path / "x.gguf", lambda name: MIXED.get(name, "Q8_0"))
    loaded = type(model).from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    folder = gguf_folder(tmp_path / "x.gguf", tmp_path)
    device = make_device(folder, "fp32", "cuda", num_slots=1024, max_len=1024)
    assert largest_difference(Reference(loaded), device) < 1e-3
    device.close()


def test_the_plan_counts_what_is_allocated(tmp_path: Path) -> None:
    case = replace(CASES["qwen2"], changes=CASES["qwen2"].changes | WIDE)
    make(case, tmp_path / "hf")
    convert(tmp_path / "hf", "qwen2", tmp_path / "x.gguf", lambda name: "Q4_0")
    folder = gguf_folder(tmp_path / "x.gguf", tmp_path)
    spec = read_spec(folder)
    assert spec.dtype == "bf16"
    options = {"dtype": "bf16", "device": CPU, "max_len": 64}
    paper = make_model(spec, SingleRank(), where=torch.device("meta"), **options)  # type: ignore[arg-type]
    real = build(folder, spec, "bf16", CPU, 64)
    assert paper.nbytes == real.nbytes
    widened = make_model(
        spec,
        SingleRank(),
        where=torch.device("meta"),
        asked=WeightTypes("none"),
        **options,  # type: ignore[arg-type]
    )
    assert real.nbytes < 0.36 * widened.nbytes  # 5 bits of 16, norms, rows that are filled up
    assert "bits of the GGUF file" in real.site.quantisation.tally.text("bf16")
