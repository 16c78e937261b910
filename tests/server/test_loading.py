"""Reading weights beside warm-up and capture: on which GPU, in which order, and what an error does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asyncllm.core.windows import PerSpace
from asyncllm.errors import StartupError
from asyncllm.server import loading

WAIT_S = 20.0  # for another thread; only what fails takes so long
HERE = torch.device("cuda", 1)

Read = Callable[[Callable[[int, int], None]], None]
Start = Callable[[Read, Callable[[], None]], None]


@pytest.fixture
def said() -> list[str]:
    """What has happened, in order."""
    return []


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> Start:
    """Loads a rank that reads and warms up by these functions, without a GPU."""
    work: dict[str, Any] = {}

    def build(
        *_: object, begin: Callable[[Callable[[], None]], object],
        progress: Callable[[int, int], None], **__: object,
    ) -> None:  # fmt: skip
        begin(lambda: work["read"](progress))

    def measured(*_: object) -> list[Any]:
        said.append("measured")
        return []

    replaced: dict[str, Any] = {
        "build_model": build,
        "weight_files": lambda *_: [],
        "engine_of": lambda *_: None,
        "make_device": lambda *_: None,
        "num_threads": lambda _: torch.get_num_threads(),
        "warm": lambda *_: work["warm"](),
        "measure": measured,
        "_longest": lambda _: (1, 1),
        "share_memory": lambda *_: False,
        "KvMode": SimpleNamespace(named=lambda _: None),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(loading, name, value)
    monkeypatch.setattr("asyncllm.config.quantisation.from_text", lambda _: None)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: said.append(f"{threading.current_thread().name} on {d}")
    )
    stream = SimpleNamespace(synchronize=lambda: said.append("waited for copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    boot: Any = SimpleNamespace(
        resolved=SimpleNamespace(dtype="bf16", max_req_total_len=8, kv_mode=("16", ""), quant=""),
        config=SimpleNamespace(
            load_way="HF", enable_ep_moe=False, disable_symm_mem_allreduce=False
        ),
        topology=SimpleNamespace(in_step=False),
        model_dir="",
        me=SimpleNamespace(group=0),
    )
    spec: Any = SimpleNamespace(has_experts=False)
    plan: Any = SimpleNamespace(linears=SimpleNamespace(served={}), num=PerSpace(1, 1))

    def run(read: Read, warm: Callable[[], None]) -> None:
        work.update(read=read, warm=warm)
        loading._load_device(boot, spec, None, HERE, plan, None)

    return run


def test_all_of_it_runs_on_the_rank_s_own_gpu_and_is_over_before_steps_are_measured(
    start: Start, said: list[str]
) -> None:
    """A thread begins on GPU 0, and Triton launches on the thread's."""
    start(lambda _: said.append("read"), lambda: said.append("warm"))
    assert {"weights_0 on cuda:1", "warm-up_0 on cuda:1"} <= set(said)
    reading = [said.index(what) for what in ("weights_0 on cuda:1", "read", "waited for copies")]
    assert reading == sorted(reading)
    assert said.index("warm-up_0 on cuda:1") < said.index("warm")
    assert said[-1] == "measured"


def test_an_error_of_the_warm_up_ends_the_reading(start: Start, said: list[str]) -> None:
    begun = threading.Event()

    def read(progress: Callable[[int, int], None]) -> None:
        try:
            while True:
                progress(1, 2)
                begun.set()
        finally:
            said.append("stopped")

    def warm() -> None:
        assert begun.wait(WAIT_S)
        raise ValueError("no such kernel")

    with pytest.raises(ValueError, match="no such kernel"):
        start(read, warm)
    assert said[-1] == "stopped"
    assert "measured" not in said


def test_an_error_of_reading_is_told_while_the_warm_up_still_runs(
    start: Start, said: list[str]
) -> None:
    told, ended = threading.Event(), threading.Event()

    def read(_: object) -> None:
        raise StartupError("model.safetensors cannot be read")

    def warm() -> None:
        said.append("told first" if told.wait(WAIT_S) else "told last")
        ended.set()

    with pytest.raises(StartupError, match="cannot be read"):
        start(read, warm)
    told.set()
    assert ended.wait(WAIT_S)
    assert said[-1] == "told first"


@pytest.mark.parametrize(
    ("speculative", "batch", "chunk", "rows", "largest"),
    [
        ("none", 16384, 4096, 1000, 4096),
        ("none", 256, 64, 256, 320),  # no step has more rows than tokens, nor has a graph
        ("ngram", 700, 700, 700, 956),
        ("none", 16384, 64, 1000, 1000),  # steps that decode are the largest
    ],
)
def test_rows_and_graphs_are_as_large_as_a_step_can_be(
    speculative: str, batch: int, chunk: int, rows: int, largest: int
) -> None:
    boot: Any = SimpleNamespace(
        config=SimpleNamespace(
            speculative=speculative, speculative_tokens=16, disable_cudagraph=False
        ),
        resolved=SimpleNamespace(
            running_max_req_size=1000, batch_max_tokens=batch, chunked_prefill_size=chunk
        ),
    )
    assert loading.most_rows(boot) == rows
    assert loading._graph_tokens(boot) == largest
    boot.config.disable_cudagraph = True
    assert loading._graph_tokens(boot) == 0
