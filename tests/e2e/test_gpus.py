"""Several GPUs: the same answers as one, through NCCL and CUDA graphs."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import pytest
import torch

from tests.e2e.cluster import Cluster
from tests.e2e.conftest import Reference
from tests.e2e.process import Server, wait_until
from tests.models.harness import random_ids

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


@pytest.mark.multigpu
@pytest.mark.parametrize(
    "more",
    [(), ("--disable_cudagraph",), ("--enable_ep_moe",)],
    ids=["graphs", "eager", "whole experts"],
)
def test_groups_that_share_experts_on_gpus(
    tiny_experts_dir: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """One request alone, so that the other group steps along, and several of other lengths."""
    check_groups(tiny_experts_dir, tmp_path / "log", "--device", "cuda", *more)


def check_groups(model_dir: Path, log: Path, *more: str) -> None:
    reference = Reference(model_dir)
    args = ("--tp", "2", "--dp", "2", "--data_type", "fp32", "--mem_fraction", "0.3", *more)
    with Server(model_dir, log, *args) as server:

        def check(size: int) -> None:
            prompt = random_ids(size, 256, size)
            answer = server.tokens(prompt, 16, ignore_eos=True)
            assert len(answer) == 16
            reference.check_greedy(prompt, answer, MARGIN)

        check(300)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(check, (1, 2, 17, 40, 63, 100, 513, 900)))
        steps = [server.metric(f'asyncllm_group_steps_total{{group="{g}"}}') for g in (0, 1)]
        assert steps[0] == steps[1] > 30
        assert server.metric("asyncllm_jit_after_warmup_total") == 0, server.text()
        assert server.stop() == 0, server.text()


OWN, SAME = ("0", "1", "2"), ("0", "0", "0")  # GPUs of a prefill node and two decode nodes
VISIBLE = "CUDA_VISIBLE_DEVICES"
DEAD_AFTER = "6"  # seconds; a server that says nothing for half of it is lost
IN_TIME_S = 10.0


@pytest.mark.multigpu
@pytest.mark.parametrize(
    ("way", "gpus"),
    [("tcp", OWN), ("p2p", SAME), ("nccl", OWN), ("auto", OWN)],
    ids=["tcp", "p2p on one GPU", "nccl", "auto"],
)
def test_k_and_v_between_gpus(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, gpus: tuple[str, ...]
) -> None:
    """A decode node that is new, or lost, while others move K/V, disturbs nobody."""
    second = torch.cuda.device_count() > 2 or gpus is SAME
    reference = Reference(tiny_dir)
    receivers = gpus[1 : 2 + second]
    with GpuCluster(tiny_dir, tmp_path, way, (gpus[:1], receivers), monkeypatch) as cluster:

        def check(size: int) -> None:
            prompt = random_ids(size, 256, size)
            answer = cluster.master.tokens(prompt, 16, ignore_eos=True)
            assert len(answer) == 16
            reference.check_greedy(prompt, answer, MARGIN)

        check(300)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(check, (1, 2, 17, 40, 63, 100, 513, 900)))
        cluster.free(*cluster.prefill, *cluster.decode)
        assert cluster.master.metric("asyncllm_pd_retries_total") == 0
        for node in cluster.decode:
            assert node.metric("asyncllm_prompt_tokens_computed_total") == 0
            assert node.metric("asyncllm_kv_transferred_tokens_total") > 0
        for server in (*cluster.prefill, *cluster.decode):
            assert server.metric("asyncllm_jit_after_warmup_total") == 0
            assert server.stop() == 0, server.text()


@pytest.mark.multigpu
@pytest.mark.parametrize(
    ("role", "moved", "gpus"),
    [
        ("prefill", "asyncllm_kv_sent_pages_total", (("0", "0"), ("1",))),
        ("decode", "asyncllm_kv_taken_pages_total", (("0",), ("1", "1"))),
    ],
    ids=["prefill", "decode"],
)
def test_a_node_that_is_stopped_while_nccl_moves_k_and_v(
    role: str,
    moved: str,
    gpus: tuple[tuple[str, ...], tuple[str, ...]],
    tiny_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others do its requests within 10 s; when it wakes it writes into nothing of theirs."""
    reference = Reference(tiny_dir)
    small = ("--pd_kv_page_num", "2", "--pd_kv_page_size", "16")  # something is always on its way
    with GpuCluster(tiny_dir, tmp_path, "nccl", gpus, monkeypatch, *small) as cluster:
        stopped = {"prefill": cluster.prefill, "decode": cluster.decode}[role][0]

        def check(size: int) -> float:
            begun, prompt = monotonic(), random_ids(size, 256, size)
            reference.check_greedy(
                prompt, cluster.master.tokens(prompt, 8, ignore_eos=True), MARGIN
            )
            return monotonic() - begun

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(check, range(100, 116)))  # all communicators have been made
            before = stopped.metric(moved)
            assert before > 0
            answers = [pool.submit(check, size) for size in range(600, 640)]
            assert wait_until(lambda: stopped.metric(moved) > before + 20, 30)
            stopped.process.send_signal(signal.SIGSTOP)
            try:
                assert max(answer.result(60) for answer in answers) < IN_TIME_S
            finally:
                stopped.process.send_signal(signal.SIGCONT)
            cluster.wait_for(len(gpus[0]), len(gpus[1]))
            list(pool.map(check, range(700, 716)))
        cluster.free(*cluster.prefill, *cluster.decode)
        for server in (*cluster.prefill, *cluster.decode):
            assert server.stop() == 0, server.text()


class GpuCluster(Cluster):
    """A prefill node on each of the first of ``gpus``, a decode node on each of the second."""

    def __init__(
        self,
        model_dir: Path,
        logs: Path,
        way: str,
        gpus: tuple[tuple[str, ...], tuple[str, ...]],
        env: pytest.MonkeyPatch,
        *more: str,
    ) -> None:
        named = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
        self.gpus = iter([named[int(i)] if named else i for i in gpus[0] + gpus[1]])
        self.env = env
        node = ("--device", "cuda", "--data_type", "fp32", "--pd_trans_mode", way, *more)
        prefill, decode = ([()] * len(some) for some in gpus)
        super().__init__(
            model_dir, logs, prefill=prefill, decode=decode, node=node,
            master=("--dead_after", DEAD_AFTER),
        )  # fmt: skip

    def start_node(self, role: str, *args: str) -> Server:
        self.env.setenv(VISIBLE, next(self.gpus))
        return super().start_node(role, *args)
