"""Several GPUs: the same answers as one, through NCCL and CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Reference
from tests.e2e.process import Server

MARGIN = 0.05  # Triton's float32 products are tf32


@pytest.mark.multigpu
@pytest.mark.parametrize(
    "more",
    [(), ("--disable_cudagraph",), ("--disable_symm_mem_allreduce",)],
    ids=["graphs", "eager", "nccl"],
)
def test_tp_2_on_gpus(
    demo_dir: Path, tmp_path: Path, reference: Reference, prose: list[int], more: tuple[str, ...]
) -> None:
    args = ("--tp", "2", "--device", "cuda", "--data_type", "fp32", "--mem_fraction", "0.3", *more)
    with Server(demo_dir, tmp_path / "log", *args) as server:
        for size in (1, 40, 700):
            prompt = prose[size : 2 * size]
            answer = server.tokens(prompt, 16, ignore_eos=True)
            assert len(answer) == 16
            reference.check_greedy(prompt, answer, MARGIN)
        assert server.metric("asyncllm_jit_after_warmup_total") == 0
        assert server.stop() == 0, server.text()
