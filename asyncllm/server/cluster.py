"""How a server takes its place in a cluster: its channel to the others, and what it says of itself.

Knows options and files; what the channel carries belongs to director and agent.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

from asyncllm.actors.channel import Channel
from asyncllm.actors.peers import Card
from asyncllm.config import Config, roles
from asyncllm.config.options import MOST_PORT
from asyncllm.errors import StartupError
from asyncllm.server import meeting
from asyncllm.server.facts import Facts, kv_facts, model_facts, text_facts
from asyncllm.server.launch import Boot
from asyncllm.server.secret import CHANNEL, cluster_keys

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # as one to connect to: this machine
# options of masters and nodes that together decide what an answer is
TOGETHER = (
    "output_constraint_mode", "token_healing_mode", "tool_call_parser", "reasoning_parser",
)  # fmt: skip


def open_channel(config: Config, stack: contextlib.ExitStack) -> tuple[Channel | None, str]:
    """This server's end, and the host by which others reach it; (None, ""): it is in no cluster.

    A master listens from now on.

    Args:
        stack: closes what must be closed.

    Raises:
        StartupError: the secret or the port cannot be used, or there is no route to the master.
    """
    if config.run_mode not in (roles.MASTER, *roles.NODES):
        return None, ""
    leads = config.run_mode == roles.MASTER
    option = "host" if leads else "pd_master_ip"
    target = getattr(config, option)
    local = not leads and target in ANY_ADDRESS
    keys = cluster_keys(
        config, CHANNEL, ("advertise_host",) if local else (option, "advertise_host")
    )
    target = ANY_ADDRESS.get(target, target)
    host = config.advertise_host or (target if leads else meeting.address_towards(target))
    name = f"[{host}]:{config.port}" if ":" in host else f"{host}:{config.port}"
    channel = Channel(Card(role=config.run_mode, name=name), keys, config.dead_after)
    stack.callback(channel.close)
    if leads and not config.check:
        channel.listen(config.host, cluster_port(config))
    return channel, host


def cluster_port(config: Config) -> int:
    """Where a master listens for nodes.

    Raises:
        StartupError: there is no port after the last one.
    """
    if config.cluster_port is None and config.port == MOST_PORT:
        raise StartupError(f"--port {MOST_PORT} leaves no port for nodes: give --cluster_port")
    return config.cluster_port or config.port + 1


def master_of(config: Config) -> tuple[str, int]:
    """Host and HTTP port of a node's master."""
    return ANY_ADDRESS.get(config.pd_master_ip, config.pd_master_ip), config.pd_master_port


def introduce(channel: Channel, boot: Boot) -> str:
    """Let the others know what this server is. Returns: the actor to whom the channel belongs.

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
    channel.card = replace(channel.card, facts=tuple(dict(facts).items()))
    return "director" if leads else "agent"
