"""Connects a server to its cluster: opens its channel, and identifies it to the other servers.

Knows options and files; the messages on the channel belong to director and agent.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

from asyncllm.actors.channel import Channel
from asyncllm.actors.peer_messages import PeerInfo
from asyncllm.actors.transport import netloc
from asyncllm.config import Config, roles
from asyncllm.core.request_director import SILENT_S
from asyncllm.errors import StartupError
from asyncllm.server import rendezvous
from asyncllm.server.facts import Facts, kv_facts, model_facts, text_facts
from asyncllm.server.launch import Boot, address_of
from asyncllm.server.secret import CHANNEL, cluster_keys, is_loopback

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # as an address to connect to: this machine
# options of masters and nodes that affect answers, so must be equal
TOGETHER = (
    "output_constraint_mode", "token_healing_mode", "tool_call_parser", "reasoning_parser",
)  # fmt: skip


def open_channel(config: Config, stack: contextlib.ExitStack) -> tuple[Channel | None, str]:
    """This server's end of the channel and the host by which others reach it; (None, ""): none.

    A master or config_server starts listening.

    Args:
        stack: closes the channel.

    Raises:
        StartupError: the secret or the port cannot be used, or there is no route to the master.
    """
    if config.run_mode == roles.NORMAL:
        return None, ""
    leads = config.run_mode not in roles.NODES
    keys = cluster_keys(config, CHANNEL, meets_others(config))
    host = config.advertise_host or _own_host(config)
    info = PeerInfo(role=config.run_mode, name=netloc(host, config.port))
    channel = Channel(info, keys, silence_s(config))
    stack.callback(channel.close)
    if leads and not config.check:
        channel.listen(address_of(config.host, "--host"), cluster_port(config))
    return channel, host


def silence_s(config: Config) -> float:
    """The channel's ``dead_after_s``: it detects silence in half of that time."""
    return min(config.dead_after, 2 * SILENT_S)


def meets_others(config: Config) -> tuple[str, ...]:
    """The options with the addresses of this server's cluster connections."""
    own = ("advertise_host",) if config.run_mode in roles.NODES else ("host", "advertise_host")
    if config.config_server_host is not None:
        return (*own, "config_server_host")
    if config.run_mode in roles.NODES and config.pd_master_ip not in ANY_ADDRESS:
        return (*own, "pd_master_ip")
    return own


def _own_host(config: Config) -> str:
    """The address by which others reach this server, if no option gives it.

    Raises:
        StartupError: no route to the other server, or only this machine can reach this one.
    """
    if config.run_mode in roles.NODES:
        if config.config_server_host is None:
            return rendezvous.address_towards(master_of(config)[0], "--pd_master_ip")
        return rendezvous.address_towards(config.config_server_host, "--config_server_host")
    host, towards = config.host, config.config_server_host
    if towards is None or config.run_mode == roles.CONFIG_SERVER:
        return ANY_ADDRESS.get(host, host)
    if host in ANY_ADDRESS:
        return rendezvous.address_towards(towards, "--config_server_host")
    if is_loopback(host) and not is_loopback(towards):
        raise StartupError(
            f"--host {host} is reached from this machine only, and --config_server_host {towards} "
            "is not: nodes would not find this pd_master"
        )
    return host


def config_server_of(config: Config) -> tuple[str, int]:
    """Host and HTTP port of the config_server of this server."""
    assert config.config_server_host is not None
    assert config.config_server_port is not None
    return config.config_server_host, config.config_server_port


def cluster_port(config: Config) -> int:
    """Where a master or config_server listens for others.

    Raises:
        StartupError: there is no port after the last one.
    """
    if config.cluster_port is None and config.port == roles.MOST_PORT:
        raise StartupError(
            f"--port {roles.MOST_PORT} leaves no port for other servers: give --cluster_port"
        )
    return config.cluster_port or config.port + 1


def master_of(config: Config) -> tuple[str, int]:
    """Host and HTTP port of a node's master."""
    return ANY_ADDRESS.get(config.pd_master_ip, config.pd_master_ip), config.pd_master_port


def introduce(channel: Channel, boot: Boot) -> tuple[str, dict[str, str]]:
    """Set how this server identifies itself to others.

    Returns:
        The actor that owns the channel, and other owners by the role of the peer.

    Raises:
        StartupError: a file cannot be read.
    """
    config, resolved, model_dir = boot.config, boot.resolved, Path(boot.model_dir)
    leads = config.run_mode == roles.MASTER
    facts: Facts = (
        *text_facts(model_dir),
        ("max_req_total_len", str(resolved.max_req_total_len)),
        ("eos_ids", str(sorted(resolved.eos_ids))),
        *((f"--{name}", json.dumps(getattr(config, name))) for name in TOGETHER),
    )
    if not leads:
        facts = (*facts, *model_facts(config, model_dir), *kv_facts(resolved))
    channel.info = replace(channel.info, facts=tuple(dict(facts).items()))
    owners = {roles.CONFIG_SERVER: "config_client"} if roles.asks_config_server(config) else {}
    return "director" if leads else "agent", owners
