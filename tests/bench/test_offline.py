"""The engine without HTTP, and profiles of it, on a tiny random model."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncllm import cli
from asyncllm.errors import StartupError
from asyncllm.server.loading import Loaded
from bench import breakdown, offline
from bench.breakdown import Event, by_group, by_name, device_events, group_of, span_and_busy, table
from bench.common import Record

BENCH = Path(__file__).parents[2] / "bench"
LIMITS = ("--max_total_token_num", "2048", "--max_req_total_len", "512", "--device", "cpu")


@pytest.fixture
def parts(tiny_dir: Path) -> Loaded:
    return offline.load(cli.parse(["--model_dir", str(tiny_dir), *LIMITS]))


def work(**changes: Any) -> argparse.Namespace:
    fields = {"n": 3, "inp": 40, "out": 7, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    return argparse.Namespace(**{**fields, **changes})


def test_three_runs_count_their_tokens(parts: Loaded) -> None:
    prefill, decode, whole = asyncio.run(offline.measure(work(), parts))
    assert [p.name for p in (prefill, decode, whole)] == ["prefill", "decode", "whole"]
    assert (prefill.computed_tokens, prefill.output_tokens) == (120, 3)
    assert (decode.computed_tokens, decode.output_tokens) == (3, 21)  # the rest was in the cache
    assert (whole.computed_tokens, whole.output_tokens) == (120, 21)
    assert sum(step.num_tokens for step in prefill.steps) == 120
    assert all(step.num_decode == step.num_rows for step in decode.steps)
    assert sum(step.num_tokens for step in decode.steps) == 21
    for phase in (prefill, decode, whole):
        figures = phase.figures({})
        assert [r.num_tokens for r in phase.records] == [phase.output_tokens // 3] * 3
        assert len(phase.records[0].stamps) == phase.output_tokens // 3
        assert (
            0 < figures["ttft_ms"]["p50"] <= figures["e2e_ms"]["max"] <= 1e3 * phase.wall_s + 0.01
        )
        assert figures["gpu_gap_ms"] is None
        assert 0 < figures["launch_ms"]["p50"] <= figures["launch_ms"]["max"]
        assert sum(step.step_ms for step in phase.steps) <= 1e3 * phase.wall_s
        assert set(figures["handler_ms_per_step"]) == {
            "allocator", "scheduler", "runner", "detokenizer",
        }  # fmt: skip
    assert len(offline.table([prefill, decode, whole], {}).splitlines()) == 4

    for limit, kept in ((1e7, 3), (1e-3, 0)):
        shown = offline.table([prefill, decode, whole], {"ttft": limit}).splitlines()[4:]
        assert [line.split()[1] for line in shown] == ["prefill", "decode", "whole"]
        for phase, line in zip((prefill, decode, whole), shown, strict=True):
            figures = phase.figures({"ttft": limit})
            assert figures["goodput_req_s"] == round(kept / phase.wall_s, 3)
            assert figures["sla_share"] == kept / 3
            assert f"({kept / 3:.1%}) with ttft_ms <= {limit:g}" in line


def test_a_picture_of_the_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [Record(0.0, 40, 2, stamps=[0.1 * i, 0.2 * i], done=True, end=1.0) for i in (1, 2)]
    phases = [offline.Phase(name, 1.0, 0.1, 80, 0, 4, [], records) for name in ("prefill", "whole")]
    offline.draw(tmp_path / "x.png", phases, work(sla={"ttft": 100.0}))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_before_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert offline.main(["--plot", "x.png", "--model_dir", "/nowhere"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_request_that_cannot_be_served_is_an_error(parts: Loaded) -> None:
    async def scene() -> None:
        async with offline.engine(parts) as running:
            load = offline.Workload([array("i", range(4)) * 600], 4)
            await running.run("long", load)

    with pytest.raises(StartupError):
        asyncio.run(scene())


def test_a_crash_ends_the_run(parts: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plan: object) -> None:
        raise StartupError("no device")

    async def scene() -> None:
        async with offline.engine(parts) as running:
            monkeypatch.setattr(parts.device, "launch", broken)
            await running.run("x", offline.Workload([array("i", [1, 2, 3])], 2))

    with pytest.raises(StartupError, match="no device"):
        asyncio.run(scene())


def test_several_ranks_are_refused(tiny_dir: Path) -> None:
    with pytest.raises(StartupError, match="several processes"):
        offline.load(cli.parse(["--model_dir", str(tiny_dir), *LIMITS, "--tp", "2"]))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "gemm"),
        ("void splitKreduce_kernel<32, 16, int, float>", "gemm"),
        ("aten::addmm", "gemm"),
        ("_decode_kernel", "attention decode"),
        ("_merge_kernel", "attention decode"),
        ("_plan_kernel", "attention decode"),
        ("_prefill_kernel", "attention prefill"),
        ("aten::scaled_dot_product_attention", "attention mixed"),
        ("_product_kernel", "experts"),
        ("_route_kernel", "experts"),
        ("_order_kernel", "experts"),
        ("_sum_kernel", "experts"),
        ("_rmsnorm_kernel", "norm, rope, activation"),
        ("_rope_kv_kernel", "norm, rope, activation"),
        ("_gated_kernel", "norm, rope, activation"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float, ArgMaxOps<float>>>", "sampling"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4>", "sampling"),
        ("void at_cuda_detail::DeviceRadixSortOnesweepKernel", "sampling"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_gather_kernel<16, long>", "copies"),
        ("void at::native::index_elementwise_kernel<128, 4>", "copies"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>",
         "other elementwise"),
        ("something_new", "other"),
    ],
)  # fmt: skip
def test_kernels_belong_to_their_part(name: str, group: str) -> None:
    assert group_of(name, "mixed") == group


def kernel(name: str, start: float, end: float) -> Event:
    return Event(name, group_of(name, "decode"), start, end, end - start)


CANNED = [
    kernel("nvjet_a", 1000, 1600),
    kernel("nvjet_b", 1500, 1700),  # beside the first, on another stream
    kernel("_decode_kernel", 1800, 2100),
    kernel("nvjet_a", 2100, 2400),
    kernel("_rope_kv_kernel", 2900, 3000),
]


def test_a_profile_is_summed_by_part() -> None:
    shares = by_group(CANNED)
    assert [(s.name, s.total_us, s.calls) for s in shares] == [
        ("gemm", 1100, 3), ("attention decode", 300, 1), ("norm, rope, activation", 100, 1),
    ]  # fmt: skip
    assert [(s.name, s.total_us) for s in by_name(CANNED)][:2] == [
        ("nvjet_a", 900), ("_decode_kernel", 300),
    ]  # fmt: skip


def test_gaps_are_where_nothing_ran() -> None:
    assert span_and_busy(CANNED) == (2000, 1400)
    assert span_and_busy(list(reversed(CANNED))) == (2000, 1400)
    assert span_and_busy([]) == (0, 0)
    lines = table(CANNED, num_steps=2).splitlines()
    (gaps,) = [line.split() for line in lines if line.startswith("gaps")]
    assert gaps == ["gaps", "0.300", "30.0%"]
    (gemm,) = [line.split() for line in lines if line.startswith("gemm")]
    assert gemm == ["gemm", "0.550", "55.0%", "1.5"]


def raw(name: str, start: float, end: float, own: float, **more: Any) -> SimpleNamespace:
    """As torch's FunctionEvent."""
    fields: dict[str, Any] = {
        "name": name, "time_range": SimpleNamespace(start=start, end=end), "thread": 2,
        "self_cpu_time_total": own, "device_type": SimpleNamespace(name="CPU"), "cpu_parent": None,
        "is_user_annotation": False, **more,
    }  # fmt: skip
    return SimpleNamespace(**fields)


def test_operators_belong_to_their_outermost_caller() -> None:
    linear = raw("aten::linear", 0, 100, 5)
    attention = raw("aten::scaled_dot_product_attention", 100, 200, 10)
    events = device_events(
        [
            linear,
            raw("aten::t", 1, 5, 4, cpu_parent=linear),
            raw("aten::mm", 5, 100, 91, cpu_parent=linear),
            attention,
            raw("aten::softmax", 110, 200, 90, cpu_parent=attention),
            raw("aten::sort", 0, 150, 150, thread=1),  # another thread: not the device
            raw("label", 0, 900, 900, is_user_annotation=True),
        ],
        "decode",
    )
    shares = [(s.name, s.total_us) for s in by_group(events)]
    assert shares == [("gemm", 100), ("attention decode", 100)]


def test_kernels_are_taken_where_there_are_some() -> None:
    on_gpu = {"device_type": SimpleNamespace(name="CUDA")}
    events = [raw("aten::mm", 0, 10, 10), raw("nvjet", 20, 50, 0, **on_gpu)]
    (device,) = device_events(events, "decode")
    assert (device.name, device.own) == ("nvjet", 30)
    (host,) = breakdown.host_events(events, [device])
    assert (host.name, host.total_us) == ("aten::mm", 10)


def test_work_that_does_not_fit_is_refused(parts: Loaded) -> None:
    for changes, message in (({"n": 4096}, "running_max_req_size"), ({"n": 40}, "K/V slots")):
        with pytest.raises(StartupError, match=message):
            breakdown.check_fit(work(decode_steps=30, **changes), parts)
    assert parts.device is not None
    parts.device.close()


@pytest.mark.slow
def test_the_profile_command_shows_both_phases(tiny_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "profile.py"), "--n", "2", "--inp", "24", "--decode-steps", "6",
         "--prefill-steps", "1", "--batch_max_tokens", "128", "--trace", str(tmp_path / "t.json"),
         "--model_dir", str(tiny_dir), *LIMITS],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "decode: 6 steps of 2 rows, 2 tokens" in done.stdout
    for part in ("gemm", "attention prefill", "attention decode", "gaps", "step"):
        assert part in done.stdout
    assert (tmp_path / "t.prefill.json").stat().st_size > 0
    assert (tmp_path / "t.decode.json").stat().st_size > 0


def test_the_folder_does_not_hide_the_standard_profile() -> None:
    code = "import cProfile, profile; print(profile.__file__, profile.run)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(BENCH)!r}); {code}"],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(BENCH) not in done.stdout
