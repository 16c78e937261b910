"""Quantised checkpoints that the published tools have made, and weights that are quantised at load.

Checkpoints and expected logits are in tests/data/quantised, with the script that made them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from asyncllm.core.request import SamplingParams
from asyncllm.engine.build import build_model
from asyncllm.engine.device import CpuDevice
from asyncllm.engine.engine import Engine
from asyncllm.engine.parallel import SingleRank
from asyncllm.engine.quant_torch import dequantize
from asyncllm.models.linear import QuantLinear, SideBySide
from asyncllm.models.model import Model
from asyncllm.models.quantization import AS_STORED, Asked
from tests.models.harness import Driver, Ranks, Sequence, read_spec

DATA = Path(__file__).parents[1] / "data" / "quantised"
CPU = torch.device("cpu")
NONE = Asked("none")
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
KINDS = {
    "awq": "int4_group", "gptq": "int4_group", "gptq-ordered": "int4_group", "ct-int8": "int8_channel",
    "ct-w4a16": "int4_group", "ct-w4a16-zeros": "int4_group", "ct-fp8-channel": "fp8_channel",
    "ct-fp8-tensor": "fp8_channel",
}  # fmt: skip


def build(folder: Path, asked: Asked = AS_STORED, dtype: str = "fp32") -> Model:
    return build_model(
        folder, read_spec(folder), SingleRank(), dtype=dtype, device=CPU, max_len=256, asked=asked
    )


def scores(folder: Path, asked: Asked = AS_STORED, size: int = 1) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the expected ids but the first, and what they are to be."""
    expected = load_file(folder / "expected.safetensors")
    ids, want = expected["ids"], expected.get("rounded", expected["plain"])
    if asked == NONE:
        want = expected["plain"]
    if size == 1:
        model = build(folder, asked)
        engine = Engine(model, SingleRank(), num_slots=64, num_lanes=8, max_len=256, eos_ids=())
        device: CpuDevice | Ranks = CpuDevice(engine, 1)
    else:
        device = Ranks(folder, size, asked=asked, max_len=256)
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


@pytest.mark.parametrize("name", NAMES)
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
