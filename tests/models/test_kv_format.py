"""K/V in 8 bits: which names go together, what it costs; a model with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asyncllm.core.windows import PerSpace
from asyncllm.errors import StartupError
from asyncllm.models.attention import KvPairs
from asyncllm.models.kv_format import DECODE_KERNELS, FORMATS, KvFormat, KvMode
from tests.models.harness import Driver, Ranks, Sequence, make_device, random_ids
from tests.models.test_attention import PLAIN
from tests.models.test_llama import VOCAB, expected_logprobs, make_checkpoint

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
