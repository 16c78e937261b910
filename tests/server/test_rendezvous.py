"""Where ranks meet: on one address only, and over the interface that leads there."""

from __future__ import annotations

import socket

import pytest

from asyncllm.config import Config
from asyncllm.errors import StartupError
from asyncllm.server.rendezvous import interface_to, listen


def by_default(**options: object) -> Config:
    """Options that the user did not give."""
    config = Config(**options)  # type: ignore[arg-type]
    object.__setattr__(config, "explicit", frozenset())
    return config


def test_a_busy_default_port_gives_way_and_a_given_one_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}.*in use.*--nccl_port"):
            listen(Config(tp=2, nccl_port=port))
        with pytest.raises(StartupError, match="HTTP is served there"):
            listen(Config(tp=2, nccl_port=port + 1, port=port + 1))
        with listen(by_default(tp=2, nccl_port=port)) as sock:
            host, other = sock.getsockname()
            assert host == "127.0.0.1"
            assert other != port


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "localhost"])
def test_only_the_given_address_listens(host: str) -> None:
    with listen(by_default(tp=2, nccl_host=host)) as sock:
        address, port = sock.getsockname()[:2]
        assert address == ("127.0.0.1" if host == "localhost" else host)
        with socket.create_connection((address, port), timeout=5):
            pass
        elsewhere = "127.0.0.3"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((elsewhere, port), timeout=5)


@pytest.mark.parametrize("host", ["203.0.113.9", "no-such-host.invalid", "a" * 64, "a..b"])
def test_a_host_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(StartupError, match=rf"{host}.*--nccl_host"):
        listen(by_default(tp=2, nccl_host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0"])
def test_the_loopback_interface_leads_to_this_machine(host: str) -> None:
    names = {name for _, name in socket.if_nameindex()}
    assert interface_to(host) in names
    assert interface_to(host) == interface_to("127.0.0.1")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64, "a..b"])
def test_a_host_without_a_route_is_named(host: str) -> None:
    with pytest.raises(StartupError, match=rf"no route to {host}: .*--nccl_host"):
        interface_to(host)
