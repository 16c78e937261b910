"""Whatever can refuse the start does so before weights are read, which may take minutes."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncllm import rank
from asyncllm.config import Config
from asyncllm.engine.build import MemoryPlan, Sizes
from asyncllm.errors import StartupError
from asyncllm.models.spec import ModelSpec
from asyncllm.server import loading


class WeightsRead(Exception):
    """The start has come to the weights."""


@contextmanager
def starting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[..., None]]:
    """Starts servers in this process, up to the weights."""

    def read(*_: Any, **__: Any) -> None:
        raise WeightsRead

    def start(**options: Any) -> None:
        chosen: dict[str, Any] = {"model_dir": str(folder), "device": "cpu", "port": free()}
        rank.serve(Config(**{**chosen, "max_total_token_num": 4096, **options}))

    monkeypatch.setattr(loading, "build_model", read)
    monkeypatch.setattr(rank, "SignalWatcher", lambda *_, **__: Quiet())
    monkeypatch.delenv("ASYNCLLM_API_KEY", raising=False)
    with caplog.at_level(logging.INFO):
        yield start


class Quiet:
    """Instead of the watch over signals, which is the whole process's."""


def free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def break_template(folder: Path) -> None:
    rewrite(folder / "tokenizer_config.json", chat_template="{% if %}")


def break_template_filter(folder: Path) -> None:
    rewrite(folder / "tokenizer_config.json", chat_template="{{ messages | no_such_filter }}")


def break_tool_template(folder: Path) -> None:
    both = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "{% for %}"}]
    rewrite(folder / "tokenizer_config.json", chat_template=both)


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")


def break_eos(folder: Path) -> None:
    rewrite(folder / "generation_config.json", eos_token_id=["</s>"])


def break_dtype(folder: Path) -> None:
    rewrite(folder / "config.json", torch_dtype="float8_e4m3fn")


def break_architecture(folder: Path) -> None:
    rewrite(folder / "config.json", architectures=["BloomForCausalLM"])


BROKEN = [
    (break_tokenizer, {}, "tokenizer.json"),
    (break_config, {}, "config.json is not JSON"),
    (break_generation, {}, "generation_config.json is not JSON"),
    (break_eos, {}, "eos_token_id '</s>'"),
    (break_dtype, {}, "float8_e4m3fn"),
    (break_architecture, {}, "BloomForCausalLM"),
    (None, {"eos_id": (320,)}, "--eos_id 320"),
    (None, {"ssl_certfile": "/nowhere.pem"}, "/nowhere.pem"),
    (None, {"api_key_file": "/nowhere.keys"}, "/nowhere.keys"),
    (None, {"max_req_total_len": 1500, "max_total_token_num": 1000}, "--max_req_total_len 1,500"),
    (None, {"max_total_token_num": 10**12}, "--max_total_token_num"),
    (None, {"host": "203.0.113.7"}, "203.0.113.7"),
    (None, {"tp": 2, "nccl_host": "203.0.113.7"}, "203.0.113.7"),
    (None, {"max_req_input_len": 2048}, "--max_req_input_len 2,048"),
]


@pytest.mark.parametrize(("harm", "options", "said"), BROKEN)
def test_it_is_refused_before_weights_are_read(
    harm: Callable[[Path], None] | None,
    options: dict[str, Any],
    said: str,
    tiny_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    if harm is not None:
        harm(folder)
    with (
        starting(folder, monkeypatch, caplog) as start,
        pytest.raises(StartupError) as caught,
    ):
        start(**options)
    assert said in str(caught.value)
    assert "load weights" not in caplog.text


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (break_template, "chat template, line 1"),
        (break_template_filter, "no_such_filter"),
        (break_tool_template, "chat template, line 1"),
    ],
)
def test_a_template_that_does_not_compile_stops_chats_only(
    harm: Callable[[Path], None],
    said: str,
    tiny_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    harm(folder)
    with starting(folder, monkeypatch, caplog) as start, pytest.raises(WeightsRead):
        start()
    (told,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "chats are refused, other prompts are not" in told.getMessage()
    assert said in told.getMessage()


@pytest.mark.parametrize("option", ["port", "nccl_port"])
def test_a_busy_port_is_refused_before_weights_are_read(
    option: str, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with (
        taken,
        starting(tiny_dir, monkeypatch, caplog) as start,
        pytest.raises(StartupError) as caught,
    ):
        start(tp=2, **{option: port})
    assert str(port) in str(caught.value)
    assert "load weights" not in caplog.text


def test_a_start_without_fault_comes_to_the_weights(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with starting(tiny_dir, monkeypatch, caplog) as start, pytest.raises(WeightsRead):
        start()
    order = [r.getMessage() for r in caplog.records]
    begins = [next(i for i, line in enumerate(order) if what in line) for what in PHASES]
    assert begins == sorted(begins)


PHASES = ("load tokenizer", "load grammars", "slots")


@pytest.mark.parametrize("whole", [False, True])
def test_whole_experts_reach_the_plan_and_the_model(
    tiny_experts_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    whole: bool,
) -> None:
    seen, plan = [], loading.plan_memory

    def planned(spec: ModelSpec, sizes: Sizes, device: torch.device) -> MemoryPlan:
        seen.append(sizes.whole_experts)
        return plan(spec, sizes, device)

    def read(*_: Any, whole_experts: bool, **__: Any) -> None:
        seen.append(whole_experts)
        raise WeightsRead

    with starting(tiny_experts_dir, monkeypatch, caplog) as start:
        monkeypatch.setattr(loading, "plan_memory", planned)
        monkeypatch.setattr(loading, "build_model", read)
        with pytest.raises(WeightsRead):
            start(enable_ep_moe=whole)
    assert seen == [whole, whole]
