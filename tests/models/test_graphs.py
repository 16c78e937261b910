"""CUDA graphs: the same answers as eager steps, for every kind of step, padded or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from asyncllm.engine.device import CudaDevice
from asyncllm.engine.graphs import MAX_DECODE_ROWS, decode_sizes, mixed_sizes
from tests.models.harness import Driver, Sequence, make_device, random_ids
from tests.models.test_llama import VOCAB, make_checkpoint


@pytest.mark.parametrize("most", [1, 3, 100, 1000, 5000])
def test_sizes_rise_and_reach_the_most(most: int) -> None:
    for sizes in (decode_sizes(most), mixed_sizes(most)):
        assert sizes == sorted(set(sizes))
    assert decode_sizes(most)[-1] == min(most, MAX_DECODE_ROWS)
    assert mixed_sizes(most)[-1] == most
    waste = [b / (a + 1) for a, b in zip(decode_sizes(most), decode_sizes(most)[1:], strict=False)]
    assert all(w <= 2 for w in waste)


@pytest.mark.gpu
def test_graphs_give_what_eager_steps_give(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    answers = []
    for graphs in (False, True):
        device = make_device(tmp_path, "bf16", "cuda", num_lanes=40)
        assert isinstance(device, CudaDevice)
        if graphs:
            device.capture(300)
            torch.cuda.set_sync_debug_mode("error")
        driver = Driver(device, 4096)
        # 1 row, then odd numbers of rows beside chunks that do and do not fill a bucket
        seqs = [Sequence(lane, random_ids(size, VOCAB, lane)) for lane, size in
                enumerate([5, 64, 130, 1, 17, 250, *range(30, 50)])]  # fmt: skip
        running: list[Sequence] = []
        try:
            for seq in seqs:
                driver.run([*((s, 1, 0) for s in running), (seq, len(seq.prompt), 0)])
                running.append(seq)
            for _ in range(6):
                driver.run([(s, 1, 0) for s in running])
            for _ in range(6):
                driver.run([(s, 1, 0) for s in running[:3]])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        answers.append(seqs)
    eager, graphed = answers
    same = [e.outputs == g.outputs for e, g in zip(eager, graphed, strict=True)]
    assert np.mean(same) > 0.8  # buckets change the shape of products, so near-ties may flip
    for e, g in zip(eager, graphed, strict=True):
        until = next((i for i, (a, b) in enumerate(zip(e.outputs, g.outputs, strict=True)) if a != b), len(e.outputs))  # fmt: skip
        torch.testing.assert_close(
            torch.tensor(g.logprobs[:until]), torch.tensor(e.logprobs[:until]), atol=0.1, rtol=0.02
        )
