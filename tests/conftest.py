"""Fixtures that more than one test folder uses."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from asyncllm.actors.transport import CurveKeys, TransportSettings
from asyncllm.demo import ensure_demo_model
from asyncllm.environment import cache_dir
from bench.mkmodel import write_model

# the same examples in each run, however long a busy machine takes over one
settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


def pytest_configure() -> None:
    """A server started by a test ignores signals only if the test says so, not because the suite
    runs under nohup or in the background of a script."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need GPUs are skipped where there are too few; those of ``make cluster`` are left
    out unless they are asked for."""
    if "cluster" not in config.getoption("markexpr"):
        left = [item for item in items if item.get_closest_marker("cluster")]
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)
    num_gpus = torch.cuda.device_count()
    for item in items:
        for mark, needed in (("gpu", 1), ("multigpu", 2)):
            if item.get_closest_marker(mark) and num_gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))


# of tests/e2e, those that compute much and look at no times
EMBEDDED = ("test_model", "test_grammar", "test_constraints", "test_load")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Who runs what with -n: files stay whole, and one worker has all tests of servers but those
    that ask the embedded model, so that no two tests that kill and time processes meet."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if not file.startswith("tests/e2e/"):
                return file
            return "embedded" if Path(file).stem in EMBEDDED else "servers"

    return Scheduling(config, log)


@pytest.fixture
def wires(tmp_path: Path) -> Callable[[int], list[TransportSettings]]:
    """How each of ``n`` processes talks to the others, in a folder of this test."""
    keys = CurveKeys.make()

    def make(n: int) -> list[TransportSettings]:
        addresses = {i: f"ipc://{tmp_path}/{i}" for i in range(n)}
        return [
            TransportSettings(addresses[i], keys, {j: a for j, a in addresses.items() if j != i})
            for i in range(n)
        ]

    return make


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "torch_dtype": "float32", "bos_token_id": 300,
    "eos_token_id": 301, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokens are the bytes; it loads in no time. Do not change it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_model(TINY, folder)
    return folder


TINY_EXPERTS = {
    **TINY, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "num_hidden_layers": 3, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 6,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "greedy", "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
    "scoring_func": "softmax",
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_experts_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with attention over latents, a dense layer and two of experts: a DeepSeek-V2."""
    folder = tmp_path_factory.mktemp("model") / "tiny_experts"
    write_model(TINY_EXPERTS, folder)
    return folder


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """Folder of the embedded model, fetched and converted once per machine (about 12 s).

    It is kept in ASYNCLLM_CACHE, else in the checkout's .venv, else in the user's cache.
    """
    venv = Path(__file__).parents[1] / ".venv"
    if "ASYNCLLM_CACHE" not in os.environ and venv.is_dir():
        return ensure_demo_model(venv / "asyncllm-cache")
    return ensure_demo_model(cache_dir())
