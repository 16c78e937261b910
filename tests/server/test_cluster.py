"""A server's place in a cluster: secrets, ports, and what it says of itself."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asyncllm.config import Config
from asyncllm.errors import StartupError
from asyncllm.server.cluster import cluster_port, master_of, open_channel
from asyncllm.server.secret import make_key_file


def test_a_server_by_itself_has_no_channel() -> None:
    with contextlib.ExitStack() as stack:
        assert open_channel(Config(), stack) == (None, "")


def test_a_master_listens_behind_its_http_port_unless_told_otherwise(free_port: int) -> None:
    config = Config(run_mode="pd_master", port=9000)
    assert cluster_port(config) == 9001
    with pytest.raises(
        StartupError, match="--port 65535 leaves no port for other servers: give --cluster"
    ):
        cluster_port(Config(run_mode="pd_master", port=65535))
    config = Config(run_mode="pd_master", port=65535, cluster_port=free_port)
    assert cluster_port(config) == free_port
    with contextlib.ExitStack() as stack:
        channel, host = open_channel(config, stack)
        assert channel is not None
        assert (channel.port, host) == (free_port, "127.0.0.1")
        assert (channel.info.role, channel.info.name) == ("pd_master", "127.0.0.1:65535")
        with pytest.raises(StartupError, match=f"127.0.0.1:{free_port}"):
            open_channel(config, stack)


def test_a_host_may_be_a_name(free_port: int, tmp_path: Path) -> None:
    make_key_file(tmp_path / "key")
    key = str(tmp_path / "key")
    with contextlib.ExitStack() as stack:
        config = Config(run_mode="pd_master", host="localhost", cluster_port=free_port)
        channel, host = open_channel(config, stack)
        assert channel is not None
        assert (channel.port, host) == (free_port, "localhost")
        for option, more in (
            ("pd_master_ip", {}),
            ("config_server_host", {"config_server_port": 1}),
        ):
            words: dict[str, Any] = {option: "no-such-host.invalid", **more}
            lost = Config(run_mode="prefill", cluster_key_file=key, **words)
            with pytest.raises(StartupError, match=rf"^no route to no-such.*\(--{option}\)$"):
                open_channel(lost, stack)


@pytest.mark.parametrize(("given", "meant"), [("0.0.0.0", "127.0.0.1"), ("::", "::1")])
def test_any_address_of_the_master_is_this_machine(given: str, meant: str) -> None:
    config = Config(run_mode="decode", pd_master_ip=given, pd_master_port=9000)
    assert master_of(config) == (meant, 9000)


def test_nodes_of_this_machine_need_no_secret() -> None:
    with contextlib.ExitStack() as stack:
        channel, host = open_channel(Config(run_mode="prefill", port=9100), stack)
        assert channel is not None
        assert (channel.port, host, channel.info.name) == (0, "127.0.0.1", "127.0.0.1:9100")


@pytest.mark.parametrize(
    ("role", "options", "named"),
    [
        ("pd_master", {"host": "0.0.0.0"}, "host 0.0.0.0"),
        ("prefill", {"pd_master_ip": "10.0.0.1"}, "pd_master_ip 10.0.0.1"),
        ("decode", {"advertise_host": "10.0.0.2"}, "advertise_host 10.0.0.2"),
    ],
)
def test_others_do(role: str, options: dict[str, str], named: str) -> None:
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(StartupError, match=f"^--{named} can be reached from other machines: that"),
    ):
        open_channel(Config(run_mode=role, **options), stack)


def test_with_a_secret_a_master_may_serve_all(tmp_path: Path, free_port: int) -> None:
    make_key_file(tmp_path / "key")
    config = Config(
        run_mode="pd_master",
        host="0.0.0.0",
        cluster_port=free_port,
        cluster_key_file=str(tmp_path / "key"),
    )
    with contextlib.ExitStack() as stack:
        channel, _ = open_channel(config, stack)
        assert channel is not None
        assert channel.port == free_port


def test_a_master_needs_no_weights(tiny_dir: Path, tmp_path: Path, free_port: int) -> None:
    folder = tmp_path / "texts"
    shutil.copytree(tiny_dir, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    done = subprocess.run(
        [sys.executable, "-m", "asyncllm", "--run_mode", "pd_master", "--model_dir", str(folder),
         "--port", str(free_port), "--cluster_port", "9001", "--check"],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert "device: none; 1 for HTTP\n" in done.stdout
    assert f"ports: HTTP 127.0.0.1:{free_port}, nodes 127.0.0.1:9001\n" in done.stdout
