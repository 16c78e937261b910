"""The steps before serving: whatever a request may ask of sampling has run once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncllm.core.step_times import StepTimes
from asyncllm.engine.build import warm_up
from asyncllm.engine.step_timing import measure, plans
from asyncllm.messages import StepPlan
from tests.models.harness import make_device
from tests.models.test_llama import make_checkpoint


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_part_of_sampling_has_run(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path)
    made = make_device(tmp_path, "fp32", device, max_len=256)
    called: set[str] = set()
    sampler = made.engine.sampler

    def spy(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            called.add(name)
            return call(*args)

        return run

    parts = {"sample", "add_bias", "penalize", "log_probs"}
    for name in parts:
        monkeypatch.setattr(sampler, name, spy(name, getattr(sampler, name)), raising=False)
    warm_up(made, 64, max_len=256, graphs=False)
    assert called == parts


@pytest.mark.parametrize("max_len", [2, 3, 19, 20])
def test_the_shortest_sequences_are_long_enough(tmp_path: Path, max_len: int) -> None:
    make_checkpoint(tmp_path)
    made = make_device(tmp_path, "fp32", "cpu", num_slots=max_len, num_lanes=1, max_len=max_len)
    warm_up(made, max_len // 2, max_len=max_len)
    made.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_steps_that_are_measured_run_and_make_times_known(tmp_path: Path, device: str) -> None:
    make_checkpoint(tmp_path)
    made = make_device(tmp_path, "fp32", device, num_slots=300, num_lanes=8, max_len=256)
    some = plans(8, 128, 256)
    assert [plan.num_decode for plan in some] == [1, 2, 4, 8, 0]
    for plan in some:
        assert len(made.launch(plan).wait().tokens) == len(plan.lanes)
    measured = measure(made, 128, 256)
    assert bool(measured) == (device == "cuda"), "a CPU measures no steps"
    times = StepTimes(measured)
    assert bool(times.decoding(8)) == (device == "cuda")
    made.close()


def test_steps_that_are_measured_have_no_more_rows_than_serving_has() -> None:
    """The columns of graphs have room for no more."""
    launched: list[int] = []

    def launch(plan: StepPlan) -> Any:
        launched.append(plan.num_decode)
        return SimpleNamespace(wait=lambda: SimpleNamespace(device_ms=1.0))

    engine = SimpleNamespace(table=[0] * 101, num_rows=5)
    made: Any = SimpleNamespace(engine=engine, launch=launch)
    assert len(measure(made, 128, 256)) == len(launched)
    assert max(launched) == 4
