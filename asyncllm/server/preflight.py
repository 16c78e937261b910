"""Can the nodes reach each other? Asked before weights are loaded, which may take minutes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

import torch

from asyncllm.engine.parallel import Ranks, meet
from asyncllm.environment import interface
from asyncllm.errors import StartupError
from asyncllm.server.launch import Boot
from asyncllm.server.meeting import interface_to

PORTS_S = 10.0
SUM_S = 30.0
RETRY_S = 0.2

T = TypeVar("T")


def join_ranks(boot: Boot, where: torch.device) -> Ranks:
    """The ranks of the server, as soon as all are there. Blocks.

    Raises:
        StartupError: several nodes, of which one does not reach another.
    """
    assert boot.rendezvous is not None
    listen_fd = boot.store_fd if boot.store_fd >= 0 else None
    topology = boot.topology
    if boot.me.node != topology.coordinator.node:
        reach(f"{boot.name} does not reach node 0", *boot.rendezvous, "--nccl_port")
    store = meet(topology, boot.me, boot.rendezvous, listen_fd)
    if len(topology.nodes) == 1:
        return Ranks(topology, boot.me, store, where)
    for peer in topology.peers(boot.endpoint):  # they are there now, and listen
        if peer.node != boot.me.node and peer.device is not None:
            host, port = peer.address.removeprefix("tcp://").rsplit(":", 1)
            what = f"{boot.name} does not reach {topology.name(peer.id)} of node {peer.node}"
            reach(what, host.strip("[]"), int(port), "--multinode_router_gloo_port")

    def joined() -> Ranks:
        if where.type == "cuda":
            torch.cuda.set_device(where)  # the thread's
        ranks = Ranks(topology, boot.me, store, where)
        total = ranks.group.sum(torch.ones(1, device=where)).item()
        if total != ranks.group.size:
            raise RuntimeError(f"the sum of {ranks.group.size} ones is {total:g}")
        return ranks

    variable, name = interface(cuda=where.type == "cuda")
    return within(
        SUM_S, joined, f"{boot.name} cannot add up with the others over {name} ({variable})"
    )


def reach(what: str, host: str, port: int, option: str) -> None:
    """Connect to a port of another node that is open now, or soon.

    Args:
        what: it is that there is no way.
        option: that says which port it is.

    Raises:
        StartupError: there is none within ``PORTS_S``.
    """
    deadline = monotonic() + PORTS_S
    while True:
        try:
            left = max(RETRY_S, deadline - monotonic())
            with socket.create_connection((host, port), timeout=left):
                return
        except OSError as error:
            if monotonic() < deadline - RETRY_S:
                threading.Event().wait(RETRY_S)
                continue
            reason = error.strerror or str(error)
        raise StartupError(
            f"{what} at {host}:{port} over {interface_to(host)} within {PORTS_S:g} s: {reason} "
            f"({option}; a firewall?)"
        )


def within(seconds: float, work: Callable[[], T], what: str) -> T:
    """What ``work`` gives. It runs in a thread that is left alone when the time is over.

    Raises:
        StartupError: it takes longer, or fails with a RuntimeError; ``what`` is what that means.
    """
    done: list[T] = []
    failed: list[str] = []

    def run() -> None:
        try:
            done.append(work())
        except RuntimeError as error:
            failed.append(str(error).strip().partition("\n")[0])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if done:
        return done[0]
    raise StartupError(f"{what}: {failed[0] if failed else f'it takes longer than {seconds:g} s'}")
