"""What rank 0 prepares before any process runs."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asyncllm import rank
from asyncllm.config import Config, resolve_limits
from asyncllm.errors import StartupError
from asyncllm.server import launch
from asyncllm.server.launch import Boot, ZmqAddresses, bind_http
from asyncllm.topology import Topology


def boot() -> Boot:
    config = Config(tp=2, served_model_name=("a", "b"))
    resolved = resolve_limits(
        config,
        device="cpu",
        checkpoint_dtype="bfloat16",
        model_limit=8192,
        model_eos=(2,),
        model_dir_names=("m",),
        has_experts=False,
        kv_format="triton_fp8kv",
    )
    resolved = replace(resolved, generation_config={"top_p": 0.9, "do_sample": True})
    return Boot(
        endpoint=1,
        topology=Topology.on_one_node(tp=2, http=3).at(0, "ipc:///tmp/x/0").at(1, "ipc:///tmp/x/1"),
        keys=("public", "secret"),
        config=config,
        resolved=resolved,
        model_dir="/models/m",
        rendezvous=("127.0.0.1", 28765),
        listen_fd=-1,
        parent=77,
    )


def test_a_boot_survives_json() -> None:
    assert Boot.from_json(boot().to_json()) == boot()
    assert boot().name == "rank 1"
    assert replace(boot(), endpoint=3).name == "HTTP worker 2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plain: plain | {"protocol": "abc"}, "its protocol is abc, here it is"),
        (lambda plain: plain | {"late": 1}, "late"),
        (lambda plain: {k: v for k, v in plain.items() if k != "keys"}, "keys"),
        (
            lambda plain: (
                plain | {"topology": {"endpoints": [{"id": 0, "roles": [], "planet": 3}]}}
            ),
            "planet",
        ),
        (lambda plain: [plain], "TypeError"),
    ],
)
def test_a_child_ends_with_one_line_where_rank_0_is_of_another_version(
    change: Callable[[Any], Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = change(json.loads(boot().to_json()))
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(plain)))
    assert rank.child() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_sockets_lie_in_a_private_folder_that_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "FOLDERS", tmp_path)
    wires, other = (
        ZmqAddresses("ipc:///tmp/", alone=False),
        ZmqAddresses("ipc:///tmp/", alone=False),
    )
    assert len({w.address(i) for w in (wires, other) for i in (0, 1)}) == 4
    (folder, _) = sorted(tmp_path.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    wires.close()
    other.close()
    assert not list(tmp_path.iterdir())


def test_folders_of_killed_servers_are_swept_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "FOLDERS", tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = [f"asyncllm-{os.getpid()}-abc", "asyncllm-notes", "other-1-x", "asyncllm-x-y"]
    for name in (f"asyncllm-{dead.pid}-abc", *kept):
        (tmp_path / name).mkdir()
    # of another container that shares the folder, which has its own process numbers
    wires = ZmqAddresses("ipc:///tmp/", alone=False)
    (own,) = {f.name for f in tmp_path.iterdir()} - {*kept, f"asyncllm-{dead.pid}-abc"}
    there = (tmp_path / own).rename(tmp_path / f"asyncllm-{dead.pid}-lives")
    ZmqAddresses("ipc:///tmp/", alone=False).close()
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([*kept, there.name])
    wires.close()
    ZmqAddresses("ipc:///tmp/", alone=False).close()
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(kept)


def test_alone_needs_no_wires() -> None:
    for mode in ("ipc:///tmp/", "tcp://"):
        assert ZmqAddresses(mode, alone=True).address(0) == ""


def test_no_port_is_guessed() -> None:
    assert ZmqAddresses("tcp://", alone=False).address(3) == "tcp://127.0.0.1:*"


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(boot())


def test_a_busy_http_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"127.0.0.1:{port}.*--port"):
            bind_http("127.0.0.1", port)
