"""K/V in 8 bits: which names go together, what it costs; a model with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncllm.core.windows import PerSpace
from asyncllm.engine import build
from asyncllm.engine.build import Sizes
from asyncllm.errors import StartupError
from asyncllm.models.attention import KvPairs
from asyncllm.models.kv_format import DECODE_KERNELS, FORMATS, KvFormat, KvMode
from asyncllm.models.spec import ModelSpec
from bench.mkmodel import SHAPES
from tests.models.harness import Driver, Ranks, Sequence, make_device, random_ids, read_spec
from tests.models.test_attention import PLAIN
from tests.models.test_llama import VOCAB, expected_logprobs, make_checkpoint, make_config

CPU = torch.device("cpu")
FORMAT = pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))


def test_every_format_goes_with_every_kernel_that_reads_it() -> None:
    for name, fmt in FORMATS.items():
        assert KvMode.named([name]) == KvMode(fmt)
        for other, kernel in DECODE_KERNELS.items():
            assert KvMode.named([other]) == KvMode(None, kernel)
            if not kernel.halves:
                assert KvMode.named([other, name]) == KvMode(fmt, kernel)
    assert KvMode.named([], "None") == KvMode.named([]) == KvMode()
    assert KvMode.named([], "int8kv") == KvMode.named(["triton_int8kv"], "int8kv")
    assert KvMode.named([], "fp8kv") == KvMode(FORMATS["triton_fp8kv"])


def test_the_page_says_what_goes_together() -> None:
    page = Path(__file__).parents[2] / "docs" / "kv-formats.md"
    lines = page.read_text().partition("## What can be combined\n\n")[2].partition("\n\n")[0]
    head, _, *rows = ([c.strip().strip("`") for c in r.split("|")[1:-1]] for r in lines.split("\n"))
    assert head[1:] == ["no format", *FORMATS]
    assert [row[0] for row in rows] == ["no kernel", *DECODE_KERNELS]
    for kernel, *cells in rows:
        for fmt, cell in zip(head[1:], cells, strict=True):
            names = [name for name in (fmt, kernel) if not name.startswith("no ")]
            if cell == "yes":
                KvMode.named(names)
            else:
                with pytest.raises(StartupError, match=f"{kernel} does not read --mode {fmt}"):
                    KvMode.named(names)


@pytest.mark.parametrize(
    ("modes", "kv_type", "line"),
    [
        (["triton_int8kv", "ppl_int8kv"], "None",
         "--mode triton_int8kv and --mode ppl_int8kv are two formats of K/V: give one"),
        (["triton_fp8kv"], "int8kv",
         "--mode triton_fp8kv and --llm_kv_type int8kv are two formats of K/V: give one"),
        (["ppl_fp16", "triton_flashdecoding"], "None",
         "--mode ppl_fp16 and --mode triton_flashdecoding are two decode kernels: give one"),
        (["ppl_fp16"], "fp8kv",
         "--mode ppl_fp16 does not read --llm_kv_type fp8kv: it is for K/V in 16 bits"),
        (["triton_int4kv"], "None", "--mode triton_int4kv is none of triton_int8kv, ppl_int8kv, "
         "triton_fp8kv, ppl_fp16, triton_flashdecoding, triton_gqa_attention, "
         "triton_gqa_flashdecoding"),
        ([], "int4kv", "--llm_kv_type int4kv is none of None, int8kv, fp8kv"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(modes: list[str], kv_type: str, line: str) -> None:
    with pytest.raises(StartupError) as error:
        KvMode.named(modes, kv_type)
    assert str(error.value) == line


def test_a_kernel_for_16_bits_does_not_run_in_float32() -> None:
    mode = KvMode.named(["ppl_fp16"])
    assert mode.refuse("bf16") is None
    assert mode.refuse("fp32") == "--mode ppl_fp16 is for K/V in 16 bits, and these are in fp32"


SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
ONLY_KV = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME}
MODELOPT = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (ONLY_KV, "triton_fp8kv"),
        (ONLY_KV | {"kv_cache_scheme": SCHEME | {"type": "int", "dynamic": True}}, "triton_int8kv"),
        (ONLY_KV | {"kv_cache_scheme": SCHEME | {"strategy": "token"}}, "triton_fp8kv"),
        (ONLY_KV | {"kv_cache_scheme": None}, None),
        (MODELOPT, "triton_fp8kv"),
        (MODELOPT | {"kv_cache_quant_algo": None}, None),
        (None, None),
    ],
)
def test_what_a_checkpoint_asks_for(said: dict[str, Any] | None, wanted: str | None) -> None:
    hf = make_config().to_dict()
    spec = ModelSpec.from_hf(hf | {"quantization_config": said}, {})
    assert (spec.kv_format, spec.stored) == (wanted, None)
    assert ModelSpec.from_hf(hf | {"compression_config": said}, {}).kv_format == wanted


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (ONLY_KV | {"kv_cache_scheme": SCHEME | {"num_bits": 4}}, "with kv_cache_scheme .*: 4"),
        (ONLY_KV | {"kv_cache_scheme": SCHEME | {"symmetric": False}}, "'symmetric': False"),
        (ONLY_KV | {"kv_cache_scheme": SCHEME | {"strategy": "channel"}}, "'strategy': 'channel'"),
        (ONLY_KV | {"kv_cache_scheme": "static"}, "with kv_cache_scheme 'static', which is not"),
        (MODELOPT | {"kv_cache_quant_algo": "NVFP4"}, "with kv_cache_quant_algo 'NVFP4', which is"),
        (ONLY_KV | {"config_groups": {"group_0": {}}}, r"\(compressed-tensors, group_0\) with"),
        (MODELOPT | {"quant_algo": "FP8"}, r"weights \(modelopt\) are not"),
    ],
)
def test_what_a_checkpoint_asks_for_and_is_not_served(said: dict[str, Any], line: str) -> None:
    with pytest.raises(StartupError, match=line):
        ModelSpec.from_hf(make_config().to_dict() | {"quantization_config": said}, {})


@pytest.mark.parametrize("by_modelopt", [False, True])
def test_calibrated_scales_of_a_checkpoint_are_left_out(tmp_path: Path, by_modelopt: bool) -> None:
    """They are what it asks for, or strangers."""
    make_checkpoint(tmp_path)
    want = Sequence(0, random_ids(9, VOCAB, 1))
    Driver(make_device(tmp_path, "fp32", "cpu"), 64).generate([want], 2)
    path = tmp_path / "model.safetensors"
    names = ("k_proj.k_scale", "v_proj.v_scale") if by_modelopt else ("k_scale", "v_scale")
    scales = {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in names}
    save_file(load_file(path) | scales, path)
    with pytest.raises(StartupError, match=f"2 unknown tensors, the first: .*{names[0]}"):
        make_device(tmp_path, "fp32", "cpu")
    if by_modelopt:
        said = {key: value for key, value in MODELOPT.items() if key != "quant_method"}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    else:
        path = tmp_path / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": ONLY_KV}
        path.write_text(json.dumps(config))
    assert read_spec(tmp_path).kv_format == "triton_fp8kv"
    got = Sequence(0, want.prompt)
    Driver(make_device(tmp_path, "fp32", "cpu"), 64).generate([got], 2)
    assert got.outputs == want.outputs


@FORMAT
def test_a_slot_costs_what_is_allocated(fmt: KvFormat) -> None:
    spec = replace(PLAIN, head_dim=128, v_dim=128)
    layers = [spec, replace(spec, window=9), spec]
    layout, plain = KvPairs(layers, torch.bfloat16, fmt), KvPairs(layers, torch.bfloat16)
    made = layout.allocate(PerSpace(7, 3), CPU)
    sizes = [sum(tensor.nbytes for tensor in layer) for layer in made]
    assert layout.bytes_per_slot() == PerSpace((sizes[0] + sizes[2]) // 7, sizes[1] // 3)
    assert all(
        len(tensor) == n for n, layer in zip((7, 3, 7), made, strict=True) for tensor in layer
    )
    gain = sum(plain.bytes_per_slot()) / sum(layout.bytes_per_slot())
    assert gain == pytest.approx(1.6 if fmt.group else 2 * 128 / 130)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("tp", [1, 4])
def test_an_8b_model_has_as_many_more_slots(
    monkeypatch: pytest.MonkeyPatch, tp: int, sliding: bool
) -> None:
    monkeypatch.setattr(build, "memory_available", lambda: 1 << 38)
    spec = ModelSpec.from_hf(SHAPES["llama31_8b"], {})
    if sliding:
        slides = replace(spec.layers[0], window=1024)
        spec = replace(spec, layers=(slides, spec.layers[0]) * 16)
    sizes = Sizes(
        tp=tp, ranks=tp, dtype="bf16", max_len=16384, num_lanes=100, batch_max_tokens=4096,
        mem_fraction=0.9, max_total_token_num=None,
    )  # fmt: skip
    plain = build.plan_memory(spec, sizes, CPU)
    assert (plain.window is not None) is sliding
    for name, least in {"triton_int8kv": 1.9, "ppl_int8kv": 1.55, "triton_fp8kv": 1.9}.items():
        plan = build.plan_memory(spec, replace(sizes, kv=KvMode(FORMATS[name])), CPU)
        assert plan.num.full >= least * plain.num.full
        assert plan.num.sliding >= least * plain.num.sliding * (0.98 if sliding else 1)
        assert plan.kv <= plain.kv * 1.001


@FORMAT
@pytest.mark.parametrize("tp", [1, 2])
def test_a_model_with_rows_in_8_bits(tmp_path: Path, fmt: KvFormat, tp: int) -> None:
    """A whole prompt reads none of them; chunks, a cached prefix and decode read them, alike."""
    reference = make_checkpoint(tmp_path, head_dim=32, initializer_range=0.1)
    mode = KvMode(fmt)

    def driver() -> Driver:
        if tp == 2:
            return Driver(Ranks(tmp_path, 2, mode), 1024)
        return Driver(make_device(tmp_path, "fp32", "cpu", kv=mode), 1024)

    prompt = random_ids(90, VOCAB, 1)
    whole, chunked, hit = (Sequence(lane, prompt) for lane in range(3))
    driver().generate([whole], 1)
    first = driver()
    first.generate([chunked], 20, chunk=16)
    hit.slots = chunked.slots[:80]
    first.run([(hit, 10, 80)])
    first.generate([hit], 20)
    assert hit.outputs == chunked.outputs
    assert hit.logprobs == pytest.approx(chunked.logprobs, abs=1e-3)
    want = expected_logprobs(reference, prompt + chunked.outputs)[len(prompt) - 1 :]
    assert whole.logprobs[0] == pytest.approx(float(want[0]), abs=2e-4)
    off = (torch.tensor(chunked.logprobs) - want).abs()
    assert 1e-4 < float(off.max()) < 0.3
