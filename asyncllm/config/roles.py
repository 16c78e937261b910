"""Roles of a process in a cluster (``--run_mode``), and which options work in which role.

``docs/cluster.md`` has the same as a table. Knows only names and values of options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncllm.config.options import Config

NORMAL, PREFILL, DECODE, MASTER = "normal", "prefill", "decode", "pd_master"
CONFIG_SERVER = "config_server"
ROLES = (NORMAL, PREFILL, DECODE, MASTER, CONFIG_SERVER)
NODES = (PREFILL, DECODE)
GENERATE = (NORMAL, DECODE)  # those that generate more than a first token
LISTEN = (MASTER, CONFIG_SERVER)  # those that other servers connect to

MOST_PORT = 65535
_ANY_ADDRESS = ("0.0.0.0", "::")
ELASTIC = "elastic"
_FIXED = re.compile(r"([1-9]\d{0,3})p([1-9]\d{0,3})d")

# role -> options that it cannot honour, each with the reason
_REFUSED = {
    CONFIG_SERVER: {
        "nnodes": "it is a single process",
        "tp": "it runs no model: --tp belongs to the prefill and decode nodes",
        "dp": "it runs no model: --dp belongs to the prefill and decode nodes",
        "use_config_server_to_init_nccl": "it hosts the rendezvous of other servers",
    },
    MASTER: {
        "nnodes": "it runs on one machine; prefill and decode nodes connect to it",
        "tp": "it runs no model: --tp belongs to the prefill and decode nodes",
        "dp": "it runs no model: --dp belongs to the prefill and decode nodes",
        "mode": "it holds no K/V: --mode belongs to the prefill and decode nodes",
        "llm_kv_type": "it holds no K/V: --llm_kv_type belongs to the prefill and decode nodes",
        "use_config_server_to_init_nccl": "it has no ranks",
    },
    **{
        role: {
            "nnodes": "a prefill or decode node runs on one machine; start several, each with its "
            "--tp and --dp",
        }
        for role in NODES
    },
}
# options used by a config_server; the others belong to the servers that register there
_OF_CONFIG_SERVER = (
    "run_mode", "host", "port", "config_server_host", "config_server_port", "cluster_port",
    "advertise_host", "api_key", "api_key_file", "ssl_certfile", "ssl_keyfile", "cluster_key_file",
    "make_cluster_key", "cors_allow_origins", "max_header_size", "max_headers",
    "keep_alive_timeout", "dead_after", "check", "log_level", "log_json",
)  # fmt: skip
# options that only computing roles use
_UNUSED = (
    "max_total_token_num", "mem_fraction", "batch_max_tokens", "chunked_prefill_size", "prefill_share",
    "device", "data_type", "quant_type", "quant_cfg", "load_way", "disable_cudagraph", "disable_dynamic_prompt_cache", "diverse_mode",
)  # fmt: skip


def indivisible(config: Config) -> str | None:
    """Why the ranks cannot be divided among groups and nodes; None: they can."""
    tp, dp, nnodes = config.tp, config.dp, config.nnodes
    if tp % dp:
        return (
            f"--tp {tp} ranks cannot be divided among --dp {dp} groups: --tp must be a multiple of "
            "--dp"
        )
    if nnodes == 1:
        return None
    if config.node_rank >= nnodes:
        return f"--node_rank {config.node_rank} must be below --nnodes {nnodes}"
    if tp % nnodes:
        return (
            f"--tp {tp} ranks cannot be divided among --nnodes {nnodes} nodes: --tp counts the "
            "ranks of all nodes, and must be a multiple of --nnodes"
        )
    last = config.multinode_router_gloo_port + tp - 1
    if last > MOST_PORT:
        return (
            f"--multinode_router_gloo_port {config.multinode_router_gloo_port} leaves no port for "
            f"the last of --tp {tp} ranks: {last} is above {MOST_PORT}"
        )
    return None


def refusal(config: Config) -> str | None:
    """Why these options cannot be honoured in this role; None: they can."""
    for name, why in _REFUSED.get(config.run_mode, {}).items():
        value = getattr(config, name)
        if value is True or value not in (1, (), "None", False):
            shown = " ".join(value) if isinstance(value, tuple) else value
            given = f"--{name}" if value is True else f"--{name} {shown}"
            return f"{given} with --run_mode {config.run_mode}: {why}"
    return _same_port(config) or (None if config.run_mode == CONFIG_SERVER else _towards(config))


def _same_port(config: Config) -> str | None:
    """Which two options give one port of one address to two listeners; None: no two do.

    The HTTP port is bound first and listens last, so the system reports nothing before the model
    is loaded.
    """
    if config.run_mode in LISTEN and config.cluster_port == config.port:
        return f"--cluster_port {config.port} is --port: HTTP is served there; give another"
    if config.nnodes == 1:
        return None
    joining, first = config.multinode_httpmanager_port, config.multinode_router_gloo_port
    per_node, leads = config.tp // config.nnodes, config.node_rank == 0
    ranks = range(per_node * config.node_rank, per_node * (config.node_rank + 1))
    if same_address(config.host, config.nccl_host):
        if leads and joining == config.port:
            return (
                f"--multinode_httpmanager_port {joining} is --port: HTTP is served there; give "
                "another"
            )
        if (rank := config.port - first) in ranks:
            return (
                f"--port {config.port} is the port of rank {rank} "
                f"(--multinode_router_gloo_port {first}); give another"
            )
    if leads and (rank := joining - first) in ranks:
        return (
            f"--multinode_httpmanager_port {joining} is a port of rank {rank} "
            f"(--multinode_router_gloo_port {first}); give another"
        )
    return None


def same_address(one: str, other: str) -> bool:
    """Whether two listeners at these hosts, of this machine, cannot have the same port."""
    return one == other or not {one, other}.isdisjoint(_ANY_ADDRESS)


def second_names(config: Config) -> Iterator[tuple[str, str | int]]:
    """(option, value) given to a config_server under the name that other servers use."""
    if config.run_mode == CONFIG_SERVER:
        for name in ("host", "port"):
            if (value := getattr(config, f"config_server_{name}")) is not None:
                yield name, value


def _towards(config: Config) -> str | None:
    """Why these options do not specify a config_server, or None."""
    host, port = config.config_server_host, config.config_server_port
    counts = config.run_mode != NORMAL or config.use_config_server_to_init_nccl
    if counts and (host is None) != (port is None):
        one, other = ("host", "port") if port is None else ("port", "host")
        return f"--config_server_{one} needs --config_server_{other} as well"
    if host is not None and config.run_mode in NODES:
        both = [
            f"--{name}" for name in ("pd_master_ip", "pd_master_port") if name in config.explicit
        ]
        if both:
            return (
                f"{' and '.join(both)} with --config_server_host: this node serves all pd_masters "
                "of the config_server; give one or the other"
            )
    if config.use_config_server_to_init_nccl and config.tp > 1:
        if host is None:
            return (
                "--use_config_server_to_init_nccl needs --config_server_host and "
                "--config_server_port"
            )
        if host != config.nccl_host:
            return (
                f"--use_config_server_to_init_nccl: --nccl_host {config.nccl_host} must be "
                f"--config_server_host {host}: the rendezvous is there"
            )
    return None


def asks_config_server(config: Config) -> bool:
    """Whether this is a master or a node that belongs to a config_server."""
    return config.config_server_host is not None and config.run_mode in (MASTER, *NODES)


def meets_at_config_server(config: Config) -> bool:
    """Whether its rendezvous is at a config_server."""
    return config.use_config_server_to_init_nccl and config.tp > 1


def unused(config: Config) -> Iterator[str]:
    """A line for each given option that this role does not use."""
    if config.run_mode == CONFIG_SERVER:
        for name in sorted(config.explicit.difference(_OF_CONFIG_SERVER)):
            yield f"--{name} has no effect: --run_mode {CONFIG_SERVER} serves no model"
    if config.run_mode == MASTER:
        for name in sorted(config.explicit.intersection(_UNUSED)):
            yield f"--{name} has no effect: --run_mode {MASTER} runs no model"


def counts(mode: str) -> tuple[int, int] | None:
    """(prefill nodes, decode nodes) that --pd_master_mode requires; None: any."""
    if mode == ELASTIC:
        return None
    found = _FIXED.fullmatch(mode)
    assert found is not None, mode  # Config has checked it
    return int(found[1]), int(found[2])


def fixed_or_elastic(mode: str) -> str | None:
    """A check of --pd_master_mode's value."""
    if mode == ELASTIC or _FIXED.fullmatch(mode):
        return None
    return "must be elastic or numbers of nodes such as 2p1d (from 1 to 9999 each)"
