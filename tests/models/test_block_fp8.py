"""Checkpoints with 8-bit floats in scaled blocks: read as a plain loop over the blocks says."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from asyncllm.engine.build import build_model
from asyncllm.errors import StartupError
from asyncllm.models.checkpoint import INDEX, read_checkpoint
from asyncllm.models.model import Model
from asyncllm.models.quant_config import StoredForm, stored_form
from asyncllm.models.weights import Target, load, whole
from tests.models.harness import Together, read_spec
from tests.models.test_deepseek import VARIANTS
from tests.models.test_deepseek import make_checkpoint as make_deepseek
from tests.models.test_llama import make_checkpoint

DEEPSEEK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
BLOCK = (128, 128)
FP8 = torch.float8_e4m3fn
FILE = "model.safetensors"
SCALE = "_scale_inv"


def quantised(shape: list[int], block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """Random weights and their scales."""
    values = (torch.randn(shape) * 100).clamp(-448, 448).to(FP8)  # beyond: NaN in torch 2.11
    blocks = [-(-size // by) for size, by in zip(shape[-2:], block, strict=True)]
    return values, torch.rand(*shape[:-2], *blocks) + 0.5


def plain(values: Tensor, scales: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """Block after block."""
    out = values.float()
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            rows, columns = (
                slice(k * by, (k + 1) * by) for k, by in zip((i, j), block, strict=True)
            )
            out[..., rows, columns] *= scales[..., i : i + 1, j : j + 1]
    return out


def save(folder: Path, **tensors: Tensor) -> None:
    save_file({name.replace("__", "."): t for name, t in tensors.items()}, folder / FILE)


def read(folder: Path, targets: list[tuple[str, Target]], block: tuple[int, int] | None) -> None:
    form = None if block is None else StoredForm("scaled", None, block, suffix=SCALE)
    load(read_checkpoint(folder), targets, lambda name: False, lambda *_: None, form=form)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 128)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    "span", [(0, 0, 300), (0, 0, 128), (100, 3, 57), (127, 0, 2), (250, 9, 50)]
)
def test_spans_need_not_begin_with_a_block(
    tmp_path: Path, block: tuple[int, int], dim: int, span: tuple[int, int, int], device: str
) -> None:
    values, scales = quantised([300, 300], block)
    save(tmp_path, a__weight=values, a__weight_scale_inv=scales)
    shape = [300, 300]
    shape[dim] = span[1] + span[2]
    param = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    read(tmp_path, [("a.weight", Target(param, dim, 300, (span,)))], block)
    start, into, length = span
    want = plain(values, scales, block).narrow(dim, start, length).bfloat16().to(device)
    assert torch.equal(param.narrow(dim, into, length), want)
    assert not param.narrow(dim, 0, into).any()


def test_long_weights_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncllm.models.weights._CHUNK", 1000)
    values, scales = quantised([300, 200])
    save(tmp_path, a__weight=values, a__weight_scale_inv=scales)
    rows, columns = torch.empty(130, 200), torch.empty(300, 77)
    targets = Target(rows, 0, 300, ((170, 0, 130),)), Target(columns, 1, 200, ((99, 0, 77),))
    read(tmp_path, [("a.weight", target) for target in targets], BLOCK)
    want = plain(values, scales)
    assert torch.equal(rows, want[170:])
    assert torch.equal(columns, want[:, 99:176])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_stack_of_experts_is_cut_along_any_dimension(tmp_path: Path, dim: int) -> None:
    values, scales = quantised([3, 140, 130])
    save(tmp_path, a__weight=values, a__weight_scale_inv=scales)
    param = torch.empty(3, 140, 130).narrow(dim, 0, 2).clone()
    size = values.shape[dim]
    read(tmp_path, [("a.weight", Target(param, dim, size, ((1, 0, 2),)))], BLOCK)
    assert torch.equal(param, plain(values, scales).narrow(dim, 1, 2))


def test_an_expert_is_a_view_of_the_stack_and_may_be_transposed(tmp_path: Path) -> None:
    values, scales = quantised([140, 130])
    save(tmp_path, a__weight=values, a__weight_scale_inv=scales)
    stack, turned = torch.zeros(2, 140, 130), torch.zeros(130, 140)
    read(tmp_path, [("a.weight", whole(stack[1])), ("a.weight", whole(turned.T))], BLOCK)
    assert torch.equal(stack[1], plain(values, scales))
    assert torch.equal(turned, plain(values, scales).T)
    assert not stack[0].any()


def test_scales_may_be_in_another_file(tmp_path: Path) -> None:
    values, scales = quantised([140, 130])
    save_file({"a.weight": values}, tmp_path / "1.safetensors")
    save_file({"a.weight_scale_inv": scales}, tmp_path / "2.safetensors")
    placed = {"a.weight": "1.safetensors", "a.weight_scale_inv": "2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": placed}))
    param = torch.empty(140, 130)
    read(tmp_path, [("a.weight", whole(param))], BLOCK)
    assert torch.equal(param, plain(values, scales))


def quantise(folder: Path, plainly: Path, block: tuple[int, int]) -> None:
    """Make the projections of a checkpoint 8-bit floats; another becomes what they stand for."""
    tensors, want = {}, {}
    for name, tensor in load_file(folder / FILE).items():
        if name.endswith("_proj.weight"):
            values, scales = quantised(list(tensor.shape), block)
            tensors |= {name: values, f"{name}{SCALE}": scales * 0.01}
            want[name] = plain(values, scales * 0.01, block)
        else:
            tensors[name] = want[name] = tensor
    save_file(tensors, folder / FILE)
    save_file(want, plainly / FILE)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = DEEPSEEK | {"weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))


def make(folder: Path, family: str) -> None:
    if family == "llama":
        make_checkpoint(folder)
    else:
        make_deepseek(folder, *VARIANTS["v3"])


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_a_model_is_what_its_blocks_say(tmp_path: Path, family: str, whole_experts: bool) -> None:
    """On two ranks, whose slices begin anywhere, with experts in slices and whole."""
    make(tmp_path / "8", family)
    make(tmp_path / "16", family)
    quantise(tmp_path / "8", tmp_path / "16", (14, 10))
    for rank in range(2):
        told, plainly = (
            dict(params(tmp_path / name, rank, whole_experts).targets()) for name in ("8", "16")
        )
        assert told.keys() == plainly.keys()
        assert all(torch.equal(told[name].param, plainly[name].param) for name in told)
        assert sum(name.endswith("_proj.weight") for name in told) > 20


def params(folder: Path, rank: int, whole_experts: bool) -> Model:
    """The model of one of two ranks, with which nothing is computed."""
    group = Together(rank, threading.Barrier(1), [None, None])
    return build_model(
        folder, read_spec(folder), group, dtype="fp32", device=torch.device("cpu"), max_len=64,
        whole_experts=whole_experts,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "block", "message"),
    [
        ({"a__weight": FP8}, BLOCK, r"a\.weight has type F8_E4M3, and there are no scales \(a\."),
        ({"a__weight": FP8}, None, r"a\.weight has type F8_E4M3, and config\.json has no quanti"),
        ({"a__weight": torch.float8_e5m2}, BLOCK, r"a\.weight has type F8_E5M2: weights of"),
        ({"a__weight": torch.bfloat16, "a__weight_scale_inv": [2, 2]}, BLOCK,
         r"a\.weight has scales \(a\.weight_scale_inv\), and type BF16, not F8_E4M3"),
        ({"a__weight": FP8, "a__weight_scale_inv": [1, 2]}, BLOCK,
         r"a\.weight_scale_inv has type F32 and shape \[1, 2\]; blocks of 128 x 128 of \[140, 130\] "
         r"want float32 and \[2, 2\]"),
        ({"a__weight": FP8, "a__weight_scale_inv": [2, 2]}, None,
         "holds 1 unknown tensors, the first: a.weight_scale_inv"),
        ({"a__weight": FP8, "a__weight_scale_inv": [2, 2], "b__weight_scale_inv": [2, 2]}, BLOCK,
         "holds 1 unknown tensors, the first: b.weight_scale_inv"),
    ],
)  # fmt: skip
def test_scales_and_types_must_fit(
    tmp_path: Path,
    tensors: dict[str, torch.dtype | list[int]],
    block: tuple[int, int] | None,
    message: str,
) -> None:
    made = {
        name: torch.ones(140, 130).to(how) if isinstance(how, torch.dtype) else torch.ones(how)
        for name, how in tensors.items()
    }
    save(tmp_path, **made)
    with pytest.raises(StartupError, match=f"^{tmp_path / FILE}:? {message}") as error:
        read(tmp_path, [("a.weight", whole(torch.empty(140, 130)))], block)
    assert "\n" not in str(error.value)


def test_which_quantisations_are_read() -> None:
    assert stored_form(None) is None
    form = stored_form(DEEPSEEK)
    assert form is not None
    assert (form.kind, form.block, form.suffix) == ("fp8_block", (128, 128), SCALE)
    assert stored_form(DEEPSEEK | {"scale_fmt": "ue8m0"}) == form
    other = stored_form(DEEPSEEK | {"weight_block_size": [64, 128]})
    assert other is not None
    assert other.kind is None, "dequantised: there are no products with such blocks"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq", "bits": 4}, r"quantised weights \(hqq\) are not available yet"),
        ({"bits": 4}, r"quantised weights \(\?\) are not"),
        (DEEPSEEK | {"fmt": "e5m2"}, r"\(fp8\) with fmt 'e5m2' are not"),
        (DEEPSEEK | {"activation_scheme": "static"}, r"activation_scheme 'static' are not"),
        (DEEPSEEK | {"weight_block_size": None}, r"weight_block_size None are not"),
        (DEEPSEEK | {"weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\] are not"),
    ],
)
def test_other_quantisations_end_the_start(config: dict[str, object], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        stored_form(config)
