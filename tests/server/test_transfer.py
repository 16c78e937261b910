"""Where ranks of a decode node take K/V, and what cannot be had."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from asyncllm.actors.kv_listener import KvListener
from asyncllm.config import Config, resolve_limits
from asyncllm.core.windows import Window
from asyncllm.engine.kv_transports import AUTO, P2P, TCP, make_ways
from asyncllm.errors import StartupError
from asyncllm.server.launch import Boot
from asyncllm.server.transfer import open_kv_listener, refuse, transfer_keys
from asyncllm.topology import Topology


def boot(host: str = "127.0.0.1", endpoint: int = 0, **options: object) -> Boot:
    config = Config(**{"run_mode": "decode", "tp": 2, **options})  # type: ignore[arg-type]
    resolved = resolve_limits(
        config,
        device="cpu",
        checkpoint_dtype="float32",
        model_limit=512,
        model_eos=(2,),
        model_dir_names=("m",),
        has_experts=False,
        kv_format=None,
    )
    return Boot(
        endpoint=endpoint,
        topology=Topology.on_one_node(tp=2).as_node(),
        keys=("public", "secret"),
        config=config,
        resolved=resolved,
        model_dir="/models/m",
        rendezvous=None,
        listen_fd=-1,
        parent=0,
        cluster_host=host,
    )


@contextmanager
def opened(boot: Boot) -> Iterator[KvListener]:
    listener = open_kv_listener(boot)
    assert listener is not None
    try:
        yield listener
    finally:
        listener.close()


@contextmanager
def taken(host: str = "127.0.0.1") -> Iterator[int]:
    """A port on which somebody listens, with a free one before it."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind((host, 0))
            port = one.getsockname()[1]
            try:
                other.bind((host, port + 1))
            except (OSError, OverflowError):
                continue
            one.close()
            other.listen()
            yield port + 1
            return


def test_each_rank_has_the_port_behind_the_one_before_it() -> None:
    with taken() as busy:
        with opened(boot(pd_decode_rpyc_port=busy - 1)) as listener:
            assert listener.port == busy - 1
        with pytest.raises(StartupError, match=rf"127.0.0.1:{busy}: .*--pd_decode_rpyc_port"):
            open_kv_listener(boot(endpoint=1, pd_decode_rpyc_port=busy - 1))


def test_a_busy_default_gives_way_to_a_free_port() -> None:
    with taken() as busy:
        config = boot(pd_decode_rpyc_port=busy).config
        object.__setattr__(config, "explicit", frozenset())  # as if it had been the default
        with opened(replace(boot(), config=config)) as listener:
            assert listener.port not in (0, busy)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_http_port_is_busy(host: str, free_port: int) -> None:
    """It is bound already, and listens later."""
    config = boot(host=host, pd_decode_rpyc_port=free_port, port=free_port).config
    with pytest.raises(StartupError, match=rf":{free_port}: HTTP is served there \(--port\)"):
        open_kv_listener(replace(boot(), config=config))
    object.__setattr__(config, "explicit", frozenset())
    with opened(replace(boot(), config=config)) as listener:
        assert listener.port != free_port


def test_a_host_without_an_address_is_named() -> None:
    with pytest.raises(
        StartupError, match=r"no-such-host.invalid has no address: .*advertise_host"
    ):
        open_kv_listener(boot("no-such-host.invalid"))


def test_a_port_beyond_the_last_one_is_an_error() -> None:
    with pytest.raises(StartupError, match="there is no such port"):
        open_kv_listener(boot(endpoint=1, pd_decode_rpyc_port=65535))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "192.0.2.1"])
def test_it_listens_where_others_are_told_to_connect(host: str, free_port: int) -> None:
    with opened(boot(host, pd_decode_rpyc_port=free_port)) as listener:
        # 192.0.2.1 is nowhere: what leads there, such as a gateway, leads to any address here
        reached = "127.0.0.1" if host == "192.0.2.1" else host
        socket.create_connection((reached, listener.port), timeout=10).close()


def test_a_prefill_node_listens_nowhere() -> None:
    assert open_kv_listener(boot(run_mode="prefill")) is None


def test_without_a_secret_only_this_machine_is_spoken_to() -> None:
    assert transfer_keys(boot(pd_master_ip="0.0.0.0").config)
    with pytest.raises(StartupError, match=r"--pd_master_ip 192\.0\.2\.7 can be reached"):
        transfer_keys(boot(pd_master_ip="192.0.2.7").config)


def test_what_this_machine_has_not_got_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match=r"--pd_trans_mode nccl .* computes on the CPU"):
        refuse(boot(pd_trans_mode="nccl"), None)
    with pytest.raises(StartupError, match="128 tokens cannot be moved"):
        refuse(boot(), Window(128))
    refuse(boot(pd_trans_mode="p2p"), None)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(StartupError, match=r"--pd_trans_mode p2p .* this is aarch64 \(tcp\)"):
        refuse(boot(pd_trans_mode="p2p"), None)


def test_each_mode_has_its_ways() -> None:
    cpu = torch.device("cpu")
    assert {mode: make_ways(mode, 2, 8, cpu)[1].names for mode in (AUTO, P2P, TCP)} == {
        AUTO: (TCP,),
        P2P: (P2P,),
        TCP: (TCP,),
    }
