"""What is asked of the network before weights are loaded."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncllm import rank
from asyncllm.config import Config
from asyncllm.errors import StartupError
from asyncllm.server import preflight
from asyncllm.server.preflight import reach, within
from tests.e2e.process import free_port
from tests.server.test_start import Quiet


def test_a_port_that_opens_soon_is_waited_for_and_another_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "PORTS_S", 1.0)
    port = free_port()
    with pytest.raises(StartupError) as caught:
        reach("rank 1", "node 0", "127.0.0.1", port, "--nccl_port")
    assert str(caught.value) == (
        f"rank 1 does not reach node 0 at 127.0.0.1:{port} over lo within 1 s: Connection refused "
        "(--nccl_port; a firewall?)"
    )
    monkeypatch.setattr(preflight, "PORTS_S", 10.0)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        timer = threading.Timer(0.5, sock.listen)
        timer.start()
        way = reach("rank 1", "node 0", "127.0.0.1", port, "--nccl_port")
        assert (way.at, way.over) == (f"127.0.0.1:{port}", "lo")
        timer.join()


def test_work_that_hangs_or_fails_ends_in_time_with_one_line() -> None:
    ends = threading.Event()
    assert within(5, lambda: 7, "it") == 7
    with pytest.raises(StartupError, match=r"^sums over eth9: it takes longer than 0.1 s$"):
        within(0.1, lambda: ends.wait(20), "sums over eth9")
    ends.set()

    def fails() -> None:
        raise RuntimeError("Connect timeout\nfrom a.cc:1")

    with pytest.raises(StartupError, match=r"^sums over eth9: Connect timeout$"):
        within(5, fails, "sums over eth9")


def test_a_check_tells_a_nodes_own_ports_and_waits_for_the_others(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On node 1, where the address of node 0 is nobody's."""
    monkeypatch.setattr(rank, "SignalWatcher", lambda *_, **__: Quiet())
    options = {"nnodes": 2, "tp": 4, "node_rank": 1, "port": free_port(), "device": "cpu"}
    config = Config(
        model_dir=str(tiny_dir), nccl_host="127.0.0.77", check=True, node_timeout=0.5, **options
    )  # type: ignore[arg-type]
    with pytest.raises(StartupError, match=r"does not answer at 127.0.0.77:12345 within 0.5 s"):
        rank.serve(config)
    with pytest.raises(StartupError, match="--make_cluster_key"):
        rank.serve(Config(model_dir=str(tiny_dir), nccl_host="203.0.113.7", check=True, **options))  # type: ignore[arg-type]


def test_groups_that_share_experts_refuse_to_guess_tokens() -> None:
    """A step with guesses is held up, and theirs are the steps of all."""
    spec: Any = SimpleNamespace(shares_experts=True, architecture="DeepseekV2ForCausalLM")
    none: Any = None
    config = Config(tp=2, dp=2, speculative="ngram")
    with contextlib.ExitStack() as stack, pytest.raises(StartupError) as caught:
        rank._assign_endpoint(config, spec, none, Path(), stack)
    assert str(caught.value).startswith("--speculative ngram with --dp 2: ")
