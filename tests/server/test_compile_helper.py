"""Kernels that are compiled beside the start: which ones, and what becomes of the helper."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from asyncllm import rank  # noqa: F401  # with all of a server's messages
from asyncllm.config import Config, quantisation, resolve_limits
from asyncllm.environment import child_environment
from asyncllm.kernels.autotune import DeviceFacts
from asyncllm.models.spec import ModelSpec
from asyncllm.server.compile_helper import CompileHelper
from asyncllm.server.compile_kernels import job_name
from asyncllm.server.launch import Boot
from asyncllm.topology import Topology

# in a process of its own: Triton decides at its import whether kernels are interpreted
FIND = """
import json, sys
from dataclasses import replace
from asyncllm.engine.kernel_recording import KernelVariant, compile_noted
from asyncllm.kernels.autotune import DeviceFacts
from asyncllm.models.spec import ModelSpec
from asyncllm.server.compile_kernels import variants
from asyncllm.server.launch import Boot
boot = Boot.from_json(sys.stdin.read())
spec = ModelSpec.from_hf(json.loads(sys.argv[1]), {})
facts = DeviceFacts("NVIDIA H100 80GB HBM3", 132, 90)
found = variants(boot, spec, facts)
[first] = [v for v in found if v.name == "_stage_kernel"]
compile_noted([KernelVariant("damaged", lambda: 1 / 0), first, first], 2)
eight_bits = replace(boot, resolved=replace(boot.resolved, quant=sys.argv[2]))
more = variants(eight_bits, spec, facts)
print(json.dumps([[v.name for v in some] for some in (found, more)]))
"""
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip


def boot() -> Boot:
    config = Config(model_dir="/m", max_req_total_len=2048, running_max_req_size=64)
    resolved = resolve_limits(
        config, device="cuda", checkpoint_dtype="bf16", model_limit=4096, model_eos=(2,),
        model_dir_names=("m",), has_experts=False, kv_format=None,
    )  # fmt: skip
    return Boot(
        endpoint=0, topology=Topology.on_one_node(tp=1, http=1), keys=("", ""), config=config,
        resolved=resolved, model_dir="/m", rendezvous=None, listen_fd=-1, parent=0,
    )  # fmt: skip


def test_what_a_warm_up_launches_is_found_and_compiled_without_a_gpu(tmp_path: Path) -> None:
    quant = quantisation.to_text(
        quantisation.asked(Config(quant_type="fp8w8a8"), ModelSpec.from_hf(LLAMA, {}))
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIND, json.dumps(LLAMA), quant],
        input=boot().to_json(),
        env=child_environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr
    names, more = json.loads(found.stdout)
    # a step of prompts, of decoding, by graphs and without; each way to choose a token
    assert {"_stage_kernel", "_prefill_kernel", "_decode_kernel", "_rope_kv_kernel"} <= {*names}
    assert {"best_kernel", "draw_kernel", "_log_prob_kernel", "_bias_kernel"} <= {*names}
    assert len(names) > 20
    assert "damaged was not compiled ahead: ZeroDivisionError" in found.stderr
    # the first, of products that no step need launch, are prepared with the weights
    assert {"_eight_bits_kernel", "_rows_kernel"} <= {*more}
    assert [path.name for path in tmp_path.rglob("*.cubin")] == ["_stage_kernel.cubin"]


def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> Path:
    """Has the helper be a shell that does this, and writes what it read into a file; Triton's cache
    is empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    script = tmp_path / "helper"
    script.write_text(f"#!/bin/sh\ncat > {tmp_path}/job\n{does}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path / "job"


def test_the_start_waits_for_the_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = helper(tmp_path, monkeypatch, "exit 0")
    with CompileHelper() as ahead:
        ahead.give("a job", "its-name")
        ahead.wait()
        assert read.read_text() == "a job"


def test_a_helper_that_fails_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    helper(tmp_path, monkeypatch, "exit 3")
    with CompileHelper() as ahead:
        ahead.give("a job", "its-name")
        ahead.wait()
    assert "not compiled ahead (exit code 3)" in caplog.text
    with CompileHelper() as again:
        assert again.pid is not None, "what failed is tried again"


def test_what_has_been_compiled_is_not_waited_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = helper(tmp_path, monkeypatch, "exit 0")

    def start(job: str) -> bool:
        """Whether a start with this job had it compiled."""
        read.unlink(missing_ok=True)
        with CompileHelper() as ahead:
            ahead.give(job, f"name-of-{job}")
            ahead.wait()
            assert read.exists() == (ahead.pid is not None)
        return read.exists() and read.read_text() == job

    assert start("first")
    assert not start("first")
    assert start("second"), "with other kernels the helper starts late"
    assert not start("second")
    assert not start("first")
    shutil.rmtree(tmp_path / "triton")
    assert start("first")


def test_a_stamp_is_for_one_model_one_gpu_and_one_set_of_options() -> None:
    spec, gpu = ModelSpec.from_hf(LLAMA, {}), DeviceFacts("NVIDIA H100 80GB HBM3", 132, 90)
    other = replace(boot(), config=replace(boot().config, disable_cudagraph=True))
    moved = replace(boot(), config=replace(boot().config, port=9000))
    names = [
        job_name(boot(), spec, gpu),
        job_name(other, spec, gpu),
        job_name(boot(), replace(spec, hidden_size=512), gpu),
        job_name(boot(), spec, replace(gpu, num_sms=114)),
    ]
    assert len({*names}) == 4
    assert job_name(moved, spec, gpu) == names[0]


def test_a_start_that_ends_leaves_no_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(tmp_path, monkeypatch, "sleep 600")
    with CompileHelper() as ahead:
        pid = ahead.pid
        assert pid is not None
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
