"""Both backends agree, step by step: formats, kernels, windows, chunks."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from asyncllm.engine.attention_cuda import TritonAttention, TritonPairs
from asyncllm.models.kv_format import DECODE_KERNELS, FORMATS, DecodeKernel, KvFormat
from asyncllm.models.spec import AttentionSpec
from tests.kernels.harness import DEVICE
from tests.models.test_attention import CPU, PLAIN, run_two_rows

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the engine's own tests run there")


def by_triton(
    spec: AttentionSpec, fmt: KvFormat | None, kernel: DecodeKernel | None
) -> TritonAttention:
    return TritonAttention([spec], TritonPairs([spec], torch.float32, fmt), 64, CPU, kernel)


@pytest.mark.parametrize(
    ("fmt", "window", "kernel"),
    [
        (None, None, "ppl_fp16"),
        ("triton_int8kv", 16, None),
        ("ppl_int8kv", None, "triton_gqa_attention"),
        ("triton_fp8kv", None, "triton_flashdecoding"),
    ],
)
def test_the_same_on_both(fmt: str | None, window: int | None, kernel: str | None) -> None:
    kind, named = fmt and FORMATS[fmt], kernel and DECODE_KERNELS[kernel]
    spec = replace(PLAIN, window=window)
    want, _ = run_two_rows(spec, kind)
    got, _ = run_two_rows(spec, kind, partial(by_triton, kernel=named))
    for left, right in zip(want, got, strict=True):
        torch.testing.assert_close(torch.cat(left), torch.cat(right), atol=2e-5, rtol=1e-4)
