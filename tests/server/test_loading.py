"""The thread that reads weights beside warm-up and capture."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asyncllm.core.windows import PerSpace
from asyncllm.server import loading


def test_weights_are_read_and_prepared_on_the_rank_s_own_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread begins on GPU 0, and Triton launches on the thread's."""
    device_of = dict[int, torch.device]()
    read_on = list[torch.device | None]()

    def build(*_: object, begin: Callable[[Callable[[], None]], object], **__: object) -> None:
        begin(lambda: read_on.append(device_of.get(threading.get_ident())))

    replaced: dict[str, Any] = {
        "build_model": build,
        "weight_files": lambda *_: [],
        "engine_of": lambda *_: None,
        "make_device": lambda *_: None,
        "num_threads": lambda _: torch.get_num_threads(),
        "warm": lambda *_: None,
        "measure": lambda *_: [],
        "_longest": lambda _: (1, 1),
        "share_memory": lambda *_: False,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(loading, name, value)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: device_of.update({threading.get_ident(): d})
    )
    where = torch.device("cuda", 1)
    resolved = SimpleNamespace(dtype="bf16", max_req_total_len=8, kv_mode=("16", ""), quant="")
    config = SimpleNamespace(load_way="HF", enable_ep_moe=False, disable_symm_mem_allreduce=False)
    topology = SimpleNamespace(in_step=False)
    boot: Any = SimpleNamespace(
        resolved=resolved,
        config=config,
        topology=topology,
        model_dir="",
        me=SimpleNamespace(group=0),
    )
    spec: Any = SimpleNamespace(has_experts=False)
    plan: Any = SimpleNamespace(linears=SimpleNamespace(served={}), num=PerSpace(1, 1))
    monkeypatch.setattr(loading, "KvMode", SimpleNamespace(named=lambda _: None))
    monkeypatch.setattr("asyncllm.config.quantisation.from_text", lambda _: None)
    loading._load_device(boot, spec, None, where, plan, None)
    assert read_on == [where]
