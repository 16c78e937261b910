"""Quantised products as a CUDA device runs them, against those of plain torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncllm.engine import quant_cuda, quant_torch
from asyncllm.engine.quant_cuda import KernelThresholds
from asyncllm.kernels.quant import parts
from asyncllm.kernels.quant.four_bits import FourBitsConfig, four_bits
from asyncllm.kernels.quant.product import ProductConfig, product
from asyncllm.kernels.quant.rows import quantize_rows, quantize_rows_ref
from asyncllm.kernels.quant.wide import WideConfig, wide
from asyncllm.models.quantization import QuantKind, QuantRows, QuantWeight
from tests.kernels.harness import DEVICE, assert_close, randn, replayed

KINDS: list[tuple[QuantKind, int]] = [
    ("fp8_channel", 0),
    ("fp8_block", 128),
    ("int8_channel", 0),
    ("int4_group", 32),
    ("int4_group", 128),
    ("int4_group", 24),
]
NONE = KernelThresholds(0, 1 << 30)


def make_weight(
    kind: QuantKind, group: int, shape: tuple[int, int], dtype: torch.dtype
) -> QuantWeight:
    n, k = shape
    matrix, zeros = randn(n, k, dtype=torch.float32, seed=1), None
    if kind == "int4_group":
        data = randn(n, k // 2, dtype=torch.float32, seed=1).mul(60).to(torch.uint8)
        scales = (randn(k // group, n, dtype=torch.float32, seed=2) / 16).to(dtype)
        zeros = randn(k // group, n, dtype=torch.float32, seed=3).mul(9).clamp(0, 16).round()
        return QuantWeight(kind, data, scales, zeros.to(dtype), group, n, k)
    kind8 = torch.int8 if kind == "int8_channel" else torch.float8_e4m3fn
    data, scales = quant_torch.quantize_rows(matrix, kind8)
    scales = scales[:, 0].contiguous()
    if kind == "fp8_block":
        scales = randn(-(-n // 128), -(-k // 128), dtype=torch.float32, seed=2).abs() / 100
    return QuantWeight(kind, data, scales, zeros, group or k, n, k)


@pytest.mark.parametrize("num_rows", [1, 9])
@pytest.mark.parametrize(("kind", "group"), KINDS, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_rows_in_8_bits_as_in_plain_torch(kind: QuantKind, group: int, num_rows: int) -> None:
    weight = make_weight(kind, group, (72, 768), torch.float16)
    x, bias = randn(num_rows, 768, dtype=torch.float16), randn(72, dtype=torch.float16, seed=7)
    packed = quant_cuda.pack_quant(weight)
    assert packed.nbytes <= weight.nbytes * 1.2
    got = quant_cuda.quant_linear(x, packed, bias, ways=NONE)
    assert_close("out", quant_torch.quant_linear(x, weight, bias), got)


@pytest.mark.parametrize(("kind", "group"), KINDS[:3], ids=str)
def test_few_rows_stay_as_they_are(kind: QuantKind, group: int) -> None:
    weight = make_weight(kind, group, (72, 768), torch.float16)
    x, out = randn(2, 768, dtype=torch.float16), randn(2, 72, dtype=torch.float16, seed=7)
    exact = x.float() @ quant_torch.dequantize(weight).t()
    assert quant_cuda.quant_linear(x, weight, out=out, ways=KernelThresholds(2, 9)) is out
    assert_close("out", exact.half(), out)
    # odd inputs cannot be read in pairs
    narrow = make_weight(kind, group, (72, 767), torch.float16)
    got = quant_cuda.quant_linear(x[:, :767], narrow)
    assert_close("odd", quant_torch.quant_linear(x[:, :767], narrow), got)


@pytest.mark.parametrize("zeros", [False, True])
def test_many_rows_of_four_bits_by_way_of_the_library(
    zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of the outputs; into what may be a part of something wider."""
    monkeypatch.setattr(quant_cuda, "WIDENED", 20 * 768)
    made = make_weight("int4_group", 64, (72, 768), torch.float16)
    weight = QuantWeight(
        made.kind, made.data, made.scales, made.zeros if zeros else None, 64, 72, 768
    )
    x, bias = randn(5, 768, dtype=torch.float16), randn(72, dtype=torch.float16, seed=7)
    space = torch.full((5, 80), 7.0, dtype=torch.float16, device=DEVICE)
    packed = quant_cuda.pack_quant(weight)
    got = quant_cuda.quant_linear(x, packed, bias, space[:, 4:76], KernelThresholds(0, 4))
    want = quant_torch.quant_linear(x, weight, bias)
    assert_close("out", want, got.contiguous(), 3e-3)
    assert (space[:, :4] == 7).all()
    assert (space[:, 76:] == 7).all()


def test_preparing_meets_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kernel that a kind has."""
    from asyncllm.kernels.quant import four_bits, product, wide

    seen: list[tuple[str, int]] = []

    def spied(name: str) -> object:
        def call(x: Tensor, *args: object, out: Tensor, **more: object) -> Tensor:
            seen.append((name, len(x)))
            return out

        return call

    def library(x: QuantRows, *args: object) -> None:
        seen.append(("_library", len(x)))

    for name in ("four_bits", "product", "wide"):
        monkeypatch.setattr(quant_cuda, name, spied(name))
    monkeypatch.setattr(quant_cuda, "_library", library)
    monkeypatch.setattr(quant_cuda, "quantize_rows", lambda x, *a, **k: (x, x))
    for kind, group in KINDS[:4]:
        weight = make_weight(kind, group, (32, 256), torch.float16)
        quant_cuda.prepare(quant_cuda.pack_quant(weight), torch.float16)
    rows = {name: [n for used, n in seen if used == name] for name in ("four_bits", "product")}
    wide_rows = [n for used, n in seen if used == "wide"]
    assert {product.row_class(n) for n in rows["product"]} == {*product._CONFIGS}
    assert {four_bits.row_class(n) for n in rows["four_bits"]} == {*["8", "16", "32", "64", "many"]}
    assert {wide.row_class(n) for n in wide_rows} == {"8", "16", "many"}


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 20, 300])
@pytest.mark.parametrize(("kind", "group"), KINDS, ids=str)
def test_model_shapes_in_a_cuda_graph(kind: QuantKind, group: int, num_rows: int) -> None:
    k = 4104 if group == 24 else 4096
    weight = make_weight(kind, group, (1536, k), torch.bfloat16)
    packed = quant_cuda.pack_quant(weight)
    # not the numbers of the weight: products of equal rows are sums of one sign
    x, fresh = (randn(num_rows, k, dtype=torch.bfloat16, seed=i) for i in (20, 21))
    out = torch.empty(num_rows, 1536, dtype=torch.bfloat16, device=DEVICE)
    replayed(lambda: quant_cuda.quant_linear(x, packed, out=out), before=lambda: x.copy_(fresh))
    exact = (fresh.float() @ quant_torch.dequantize(weight).t()).bfloat16()
    assert_close("out", exact, out, 0.04 if kind != "int4_group" else 8e-3)
    if num_rows > quant_cuda.ways_of(kind, x.device).wide:
        assert_close("rounded", quant_torch.quant_linear(fresh, weight), out, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_rows", "k", "bound"),
    [(20, 4096, 1e-2), (300, 1024, 2e-2), (300, 4096, 8e-2), (300, 14336, 1e-2)],
)
def test_sums_of_one_sign(num_rows: int, k: int, bound: float) -> None:
    """What the 14 bits of the tensor cores' own sums cut off grows with the inputs, so those of many
    inputs are summed in fp32; our own kernel always does that."""
    weight = make_weight("fp8_channel", 0, (1536, k), torch.bfloat16)
    positive = weight.data.view(torch.uint8).bitwise_and(0x7F).view(weight.data.dtype)
    weight = dataclasses.replace(weight, data=positive)
    x = randn(num_rows, k, dtype=torch.bfloat16, seed=20).abs()
    got = quant_cuda.quant_linear(x, weight)
    assert_close("out", quant_torch.quant_linear(x, weight), got, bound)


@pytest.mark.parametrize(
    ("kind", "k", "fast"),
    [("fp8_channel", 4096, True), ("fp8_channel", 4112, False), ("fp8_block", 4096, False)],
)
def test_the_library_sums_many_inputs_in_float32(
    kind: QuantKind, k: int, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def scaled_mm(x: Tensor, *args: object, use_fast_accum: bool, **more: object) -> None:
        asked.append(use_fast_accum)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    weight = make_weight(kind, 128 if kind == "fp8_block" else 0, (16, k), torch.bfloat16)
    x = torch.ones(4, k, dtype=torch.bfloat16)
    rows = QuantRows(
        "fp8_block" if kind == "fp8_block" else "fp8",
        *quantize_rows_ref(x, torch.float8_e4m3fn, blocked=kind == "fp8_block"),
        torch.bfloat16,
    )
    quant_cuda.quant_linear(rows, weight, ways=KernelThresholds(0, 0))
    assert asked == [fast]


EARLY: list[tuple[QuantKind, Any]] = [
    ("int4_group", FourBitsConfig(8, 128, 4, 5, 2)),
    ("fp8_channel", WideConfig(8, 64, 256, 4, 3, 4)),
    ("fp8_channel", ProductConfig(16, 64, 256, 4, 4, 2)),
    ("fp8_block", ProductConfig(16, 64, 128, 4, 4, 2)),
    ("int8_channel", ProductConfig(16, 64, 256, 4, 3, 2, copy=True)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "config"), EARLY, ids=str)
def test_rows_are_read_when_they_have_been_written(
    kind: QuantKind, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products that begin while the kernel before, which writes their rows, still runs: the same as
    those that do not."""
    monkeypatch.setattr(parts, "num_parts", lambda *_, early: 4)
    made = make_weight(kind, 128 if "int4" in kind else 0, (4096, 4096), torch.bfloat16)
    first = quant_cuda.pack_quant(made)
    rolled = [first.data.view(torch.uint8).roll(i, 0) for i in range(8)]
    weights = [dataclasses.replace(first, data=bits.view(first.data.dtype)) for bits in rolled]
    rows = [randn(5, 4096, dtype=torch.bfloat16, seed=i) for i in range(9)]

    def run(config: Any) -> None:
        for x, weight, out in zip(rows, weights, rows[1:], strict=False):
            if isinstance(config, FourBitsConfig):
                four_bits(x, weight.data, weight.scales, out=out, config=config)
            elif isinstance(config, WideConfig):
                wide(x, weight.data, weight.scales, out=out, config=config)
            else:
                values, scales = quantize_rows(x, weight.data.dtype, blocked=kind == "fp8_block")
                product(values, scales, weight.data, weight.scales, out=out, config=config)

    early = dataclasses.replace(config, early=256)
    for each in (config, early):  # compiled outside of the capture
        run(each)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(early)
    for turn in range(10):
        rows[0].copy_(randn(5, 4096, dtype=torch.bfloat16, seed=turn))
        graph.replay()
        got = [row.clone() for row in rows[1:]]
        run(config)
        assert all(map(torch.equal, rows[1:], got)), turn
