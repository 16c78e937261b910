"""Options for several GPUs, machines and servers."""

from __future__ import annotations

from dataclasses import dataclass

from asyncllm.config import roles
from asyncllm.config.flag import Requirement, above_zero, at_least, between, flag, not_empty
from asyncllm.core import balancing, node_selection

PORT = between(1, roles.MOST_PORT)
PD_NODE = Requirement("--run_mode prefill or decode", lambda c: c.run_mode in roles.NODES)
PD_DECODE = Requirement("--run_mode decode", lambda c: c.run_mode == roles.DECODE)
PD_MASTER = Requirement("--run_mode pd_master", lambda c: c.run_mode == roles.MASTER)
PD_LISTENS = Requirement(
    "--run_mode pd_master or config_server", lambda c: c.run_mode in roles.LISTEN
)
PD_MODES = Requirement(
    "--run_mode prefill, decode, pd_master or config_server, or --use_config_server_to_init_nccl",
    lambda c: c.run_mode != roles.NORMAL or c.use_config_server_to_init_nccl,
)
NODES = Requirement("--nnodes above 1", lambda c: c.nnodes > 1)
SERVERS = Requirement(
    "--nnodes above 1, --use_config_server_to_init_nccl, or --run_mode other than normal",
    lambda c: c.nnodes > 1 or c.use_config_server_to_init_nccl or c.run_mode != roles.NORMAL,
)
A_NODE = Requirement("--nnodes above 1", lambda c: c.nnodes > 1, vital=True)
RANKS = Requirement("--tp above 1", lambda c: c.tp > 1)
DP_GROUPS = Requirement("--dp above 1", lambda c: c.dp > 1)


@dataclass(frozen=True, kw_only=True)
class SeparationOptions:
    """Prefill and decode nodes, their masters, and the config_server."""

    pd_master_ip: str = flag(
        "0.0.0.0", check=not_empty, needs=PD_NODE,
        help="address of the pd_master that this node registers with; 0.0.0.0: this machine",
    )  # fmt: skip
    pd_master_port: int = flag(
        1212, check=PORT, needs=PD_NODE, help="HTTP port (--port) of that pd_master"
    )
    cluster_port: int | None = flag(
        None, check=PORT, needs=PD_LISTENS,
        help="port for other servers: on a pd_master for prefill and decode nodes, on a "
        "config_server for these and pd_masters; default: --port + 1",
    )  # fmt: skip
    pd_master_mode: str = flag(
        roles.ELASTIC, check=roles.fixed_or_elastic, needs=PD_MASTER, metavar="MODE",
        help="elastic: nodes may join and leave; ready with one of each role; <P>p<D>d, such as "
        "2p1d: ready with exactly so many prefill and decode nodes; no more are accepted",
    )  # fmt: skip
    select_p_d_node_strategy: str = flag(
        node_selection.CACHE_AWARE, choices=node_selection.STRATEGIES, needs=PD_MASTER,
        help="how nodes are chosen for a request; cache_aware: the prefill node that has most of "
        "its prompt cached, then the least loaded one, and the decode node with most free K/V; "
        "round_robin: in turn; adaptive_load: at random, weighted by free K/V; random",
    )  # fmt: skip
    pd_decode_rpyc_port: int = flag(
        42000, check=PORT, needs=PD_DECODE,
        help="port on which the first rank of a decode node receives K/V; the other ranks use the "
        "following ones. A busy default is replaced by a free port; a given port must be free "
        "(LightLLM has dropped this option)",
    )  # fmt: skip
    pd_trans_mode: str = flag(
        "auto", choices=("auto", "nccl", "p2p", "tcp"), needs=PD_NODE,
        help="how K/V are transferred; tcp: through host memory and encrypted sockets; p2p: a "
        "decode node reads the pages of prefill nodes on the same machine; nccl: from GPU to GPU, "
        "not encrypted; auto: the first of p2p, nccl, tcp that both sides support (on a CPU: tcp)",
    )  # fmt: skip
    pd_kv_page_num: int = flag(
        8, check=between(2, 4096), needs=PD_NODE,
        help="buffer pages for K/V transfers on each rank; bounds the memory used",
    )  # fmt: skip
    pd_kv_page_size: int = flag(
        2048, check=between(1, 65536), needs=PD_NODE,
        help="tokens per page; smaller pages take less memory and are slower over a fast link",
    )  # fmt: skip
    config_server_host: str | None = flag(
        None, check=not_empty, needs=PD_MODES,
        help="address of the config_server that knows all pd_masters: pd_masters register there, "
        "and nodes get their list there, instead of by --pd_master_ip. On the config_server "
        "itself the same as --host",
    )  # fmt: skip
    config_server_port: int | None = flag(
        None, check=PORT, needs=PD_MODES,
        help="HTTP port of that config_server; on the config_server itself the same as --port",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Nodes and ranks of one server, and their rendezvous."""

    nnodes: int = flag(
        1, check=between(1, 1024),
        help="number of machines (nodes) of this server; each runs the same number of the --tp "
        "ranks and is started with the same options except its own",
    )  # fmt: skip
    node_rank: int = flag(
        0, check=at_least(0), needs=A_NODE,
        help="number of this machine; node 0 serves HTTP and schedules, the others only answer "
        "/health and /metrics",
    )  # fmt: skip
    multinode_httpmanager_port: int = flag(
        12345, check=PORT, needs=NODES,
        help="port of --nccl_host at which the other nodes connect to node 0",
    )  # fmt: skip
    multinode_router_gloo_port: int = flag(
        20001, check=PORT, needs=NODES,
        help="port on which rank 0 receives messages; rank r listens on the r-th port after it",
    )  # fmt: skip
    node_timeout: float = flag(
        300.0, check=above_zero, metavar="SECONDS", needs=NODES,
        help="time limit for all nodes to join; if one is missing, the start fails on all nodes",
    )  # fmt: skip
    advertise_host: str | None = flag(
        None, check=not_empty, metavar="HOST", needs=SERVERS,
        help="host name or address by which other nodes reach this one; default: --nccl_host on "
        "node 0, elsewhere this machine's address on the route to it, or to its pd_master",
    )  # fmt: skip
    tp: int = flag(
        1, check=between(1, 1024), aliases=("tensor-parallel-size",),
        help="number of ranks, with one process and one GPU each, among which the model is divided "
        "(with --dp: the ranks of all groups together)",
    )  # fmt: skip
    dp: int = flag(
        1, check=between(1, 1024),
        help="number of data-parallel groups into which the --tp ranks are divided, each with "
        "its own requests, K/V and scheduling; --tp must be a multiple of it. "
        "--max_total_token_num, --running_max_req_size and --batch_max_tokens apply to each group",
    )  # fmt: skip
    dp_balancer: str = flag(
        "cache_aware", choices=balancing.POLICIES, needs=DP_GROUPS,
        help="how a request's group is chosen; cache_aware: the one that has most of its prompt "
        "cached, then the least loaded one; bs_balancer: the one with the fewest requests; "
        "round_robin: in turn (LightLLM's default is bs_balancer)",
    )  # fmt: skip
    nccl_host: str = flag(
        "127.0.0.1", check=not_empty, needs=RANKS,
        help="address of the torch.distributed rendezvous (NCCL, gloo on CPU), with --nnodes "
        "that of node 0; the ranks only listen there, and use the network interface that leads "
        "there",
    )  # fmt: skip
    nccl_port: int = flag(
        28765, check=PORT, needs=RANKS,
        help="port of that rendezvous; a busy default is replaced by a free port, a given port "
        "must be free (LightLLM's default is now a free port)",
    )  # fmt: skip
    use_config_server_to_init_nccl: bool = flag(
        False, needs=RANKS,
        help="put the torch.distributed rendezvous on the config_server, which then listens on "
        "--nccl_port; --nccl_host must be --config_server_host. A port in use by another server is "
        "refused, with that server's name",
    )  # fmt: skip
    enable_ep_moe: bool = flag(
        False, needs=RANKS,
        help="for mixture-of-experts models: each rank holds whole experts (their numbers differ "
        "by at most one) instead of a slice of each expert",
    )  # fmt: skip
    disable_symm_mem_allreduce: bool = flag(
        False, needs=RANKS,
        help="use NCCL for all all-reduces, never symmetric memory",
    )  # fmt: skip
