"""Checks that a process belongs to a server."""

from __future__ import annotations

from asyncllm.errors import Mismatch
from asyncllm.topology import Contract, Topology


def check_member(
    topology: Topology, endpoint: int, node: int, ours: Contract, theirs: Contract
) -> None:
    """Check that a process is the endpoint that it claims to be; both sides do.

    Args:
        topology, ours: as the coordinator has them.
        node, theirs: as the endpoint has them.

    Raises:
        Mismatch: with the same line on both sides.
    """
    breach = ours.breach(theirs)
    if breach is None and node != topology[endpoint].node:
        breach = "node", str(topology[endpoint].node), str(node)
    if breach is not None:
        field, wanted, found = breach
        first, other = topology.name(topology.coordinator.id), topology.name(endpoint)
        raise Mismatch(
            f"{other} cannot belong to this server: "
            f"its {field} is {found}, that of {first} {wanted}"
        )
