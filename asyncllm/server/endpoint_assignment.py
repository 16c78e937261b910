"""Determines this process's endpoint and the server's topology, after meeting the other nodes."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from asyncllm.actors.transport import CurveKeys, tcp
from asyncllm.codec import protocol
from asyncllm.config import Config, ResolvedConfig, roles
from asyncllm.environment import use_interface
from asyncllm.errors import StartupError
from asyncllm.server import rendezvous
from asyncllm.server.facts import facts
from asyncllm.server.launch import NodeWires, ZmqAddresses, address_of
from asyncllm.server.nodes import NodeJoin, NodeJoined, NodeLink, NodeMember, NodeRendezvous
from asyncllm.server.secret import cluster_keys
from asyncllm.topology import Contract, Topology

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class EndpointAssignment:
    """The position in the server of the process that the user started.

    Attributes:
        endpoint: its number.
        topology: with the addresses known so far; its own is where it must listen.
        keys: the server's.
        wires: where it and its children listen.
        rendezvous: where torch.distributed's ranks meet; None for one rank.
        store_fd: on rank 0 the listening socket of the rendezvous; -1 elsewhere.
        node_link: to the other nodes; None: there are none.
        advertised: host by which they reach this one.
        interface: that NCCL and gloo use; "": there is one rank.
    """

    endpoint: int
    topology: Topology
    keys: CurveKeys
    wires: ZmqAddresses | NodeWires
    rendezvous: tuple[str, int] | None = None
    store_fd: int = -1
    node_link: NodeLink | None = None
    advertised: str = ""
    interface: str = ""

    def use_interface_to(self, host: str) -> None:
        """Have NCCL and gloo use the interface towards ``host``; the first call counts."""
        if not self.interface:
            self.interface = rendezvous.interface_to(host)
            use_interface(self.interface)


def assign_on_one_node(
    config: Config, topology: Topology, stack: contextlib.ExitStack
) -> EndpointAssignment:
    """The assignment on a server with one node.

    Args:
        stack: closes what must be closed.

    Raises:
        StartupError: a port cannot be used.
    """
    wires = ZmqAddresses(config.zmq_mode, alone=len(topology.endpoints) == 1)
    stack.callback(wires.close)
    first = topology.coordinator.id
    topology = topology.at(first, wires.address(first))
    assignment = EndpointAssignment(
        endpoint=first, topology=topology, keys=CurveKeys.make(), wires=wires
    )
    if len(topology.ranks) > 1:
        _open_rendezvous(config, assignment, stack)
    return assignment


def assign_on_nodes(
    config: Config,
    resolved: ResolvedConfig,
    model_dir: Path,
    topology: Topology,
    first_node: str | None,
    stack: contextlib.ExitStack,
) -> EndpointAssignment:
    """The assignment on one of several nodes: meets the others. Blocks until all are there.

    Args:
        topology: of the whole server.
        first_node: host by which node 0 is reached; None: --nccl_host.
        stack: closes what must be closed.

    Raises:
        StartupError: nodes do not join, do not match, or cannot be reached.
    """
    keys = cluster_keys(config)
    leads = config.node_rank == 0
    host = first_node or config.nccl_host
    own = leads and first_node is None
    bind = _own_address(config) if own else rendezvous.address_towards(config.nccl_host)
    advertised = config.advertise_host or (host if leads else bind)
    wires = NodeWires(bind, config.multinode_router_gloo_port, len(topology.ranks))
    first = topology.on(config.node_rank)[0].id
    assignment = EndpointAssignment(
        endpoint=first, topology=topology, keys=CurveKeys.make(), wires=wires, advertised=advertised
    )
    assignment.use_interface_to(_towards(config))
    contract = Contract(protocol=protocol(), options=config.digest(), shared=config.shared())
    about = (*facts(config, resolved, model_dir), ("--check", "on" if config.check else "off"))
    join = NodeJoin(node=config.node_rank, host=advertised, contract=contract, facts=about)
    port = config.multinode_httpmanager_port
    if leads:
        assignment.node_link = line = NodeRendezvous(
            join, (bind, port), keys[0], config.nnodes, config.dead_after
        )
        stack.callback(line.close)
        _open_rendezvous(config, assignment, stack)
        assert assignment.rendezvous is not None
        log.info("waiting for %d other nodes at %s:%d", config.nnodes - 1, advertised, port)
        for other in line.gather(config.node_timeout):
            topology = _reached_at(topology, other, config.multinode_router_gloo_port)
        assignment.topology = topology
        joined = NodeJoined(
            topology=assignment.topology,
            store_port=assignment.rendezvous[1],
            public=assignment.keys.public,
            secret=assignment.keys.secret,
        )
        line.place(joined)
    else:
        log.info("joining node 0 at %s:%d", host, port)
        member = NodeMember(join, host, port, keys, config.dead_after)
        assignment.node_link = member
        stack.callback(member.close)
        _take(assignment, member.join(config.node_timeout), config, host)
    assignment.topology = assignment.topology.at(first, wires.address(first))
    return assignment


def _take(assignment: EndpointAssignment, joined: NodeJoined, config: Config, host: str) -> None:
    """Apply the values that node 0, at ``host``, has sent."""
    assignment.keys = CurveKeys(joined.public, joined.secret)
    assignment.rendezvous = config.nccl_host, joined.store_port
    leader = joined.topology.coordinator.id
    address = tcp(host, config.multinode_router_gloo_port + leader)
    assignment.topology = joined.topology.at(leader, address)


def _reached_at(topology: Topology, join: NodeJoin, port: int) -> Topology:
    """``topology`` with the addresses of a node's ranks; ``port``: rank 0's."""
    for rank in topology.on(join.node):
        topology = topology.at(rank.id, tcp(join.host, port + rank.id))
    return topology


def _towards(config: Config) -> str:
    """The host used to find the network interface of the nodes.

    That is node 0; on node 0 itself, if --nccl_host means all of its addresses, the advertised one.
    """
    host, leads = config.nccl_host, config.node_rank == 0 and config.nnodes > 1
    if leads and config.advertise_host and _stands_for_all(address_of(host, "--nccl_host")):
        return config.advertise_host
    return host


def _stands_for_all(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_unspecified


def _own_address(config: Config) -> str:
    """Where node 0 listens: --nccl_host as an address."""
    host = config.nccl_host
    address = address_of(host, "--nccl_host")
    if _stands_for_all(address) and not config.advertise_host:
        raise StartupError(
            f"--nccl_host {host} means every address of this machine: specify the one by which the "
            "other nodes reach it (--advertise_host)"
        )
    return address


def _open_rendezvous(
    config: Config, assignment: EndpointAssignment, stack: contextlib.ExitStack
) -> None:
    """Open the rendezvous of the ranks: here, or at the config_server, which already listens."""
    if roles.meets_at_config_server(config):
        assignment.rendezvous = config.nccl_host, config.nccl_port
        assignment.use_interface_to(config.nccl_host)
        return
    meets = stack.enter_context(rendezvous.listen(config))
    host, port = meets.getsockname()[:2]
    assignment.rendezvous = str(host), int(port)
    assignment.use_interface_to(_towards(config))
    assignment.store_fd = os.dup(meets.fileno())  # torch closes the socket that it gets
