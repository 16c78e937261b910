"""Checks that a process belongs to a server."""

from __future__ import annotations

from asyncllm.errors import Mismatch
from asyncllm.topology import Contract, Difference, Topology


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
    difference = ours.difference(theirs)
    if difference is None and node != topology[endpoint].node:
        difference = Difference("node", str(topology[endpoint].node), str(node))
    if difference is not None:
        field, wanted, found = difference
        first, other = topology.name(topology.coordinator.id), topology.name(endpoint)
        raise Mismatch(
            f"{other} cannot belong to this server: "
            f"its {field} is {found}, that of {first} {wanted}"
        )
