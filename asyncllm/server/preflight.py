"""Checks that nodes can reach each other before loading weights, which may take minutes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import astuple, dataclass
from time import monotonic
from typing import TypeVar

import torch

from asyncllm.config import roles
from asyncllm.engine.parallel import Ranks, meet
from asyncllm.environment import interface
from asyncllm.errors import StartupError
from asyncllm.server.launch import Boot
from asyncllm.server.rendezvous import interface_to

PORTS_S = 10.0
SUM_S = 30.0
LEAVING_S = 2.0
RETRY_S = 0.2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TestedConnection:
    """A connection between two processes that was tested and works."""

    of: str
    to: str
    at: str
    over: str  # network interface
    ms: float


def join_ranks(
    boot: Boot, where: torch.device, ways: list[TestedConnection] | None = None
) -> Ranks:
    """Block until all ranks of the server have joined, and return them.

    Args:
        ways: collects the connections that were tested.

    Raises:
        StartupError: a node does not reach another one.
    """
    assert boot.rendezvous is not None
    ways = [] if ways is None else ways
    listen_fd = boot.store_fd if boot.store_fd >= 0 else None
    topology = boot.topology
    if boot.me.node != topology.coordinator.node:
        far = roles.meets_at_config_server(boot.config)
        host = "the config_server" if far else "node 0"
        ways.append(reach(boot.name, host, *boot.rendezvous, "--nccl_port"))
    store = meet(topology, boot.me, boot.rendezvous, listen_fd)
    if len(topology.nodes) == 1:
        return Ranks(topology, boot.me, store, where)
    for peer in topology.peers(boot.endpoint):  # they exist now, and listen
        if peer.node != boot.me.node and peer.device is not None:
            host, port = peer.address.removeprefix("tcp://").rsplit(":", 1)
            other = f"{topology.name(peer.id)} of node {peer.node}"
            option = "--multinode_router_gloo_port"
            ways.append(reach(boot.name, other, host.strip("[]"), int(port), option))

    def joined() -> Ranks:
        if where.type == "cuda":
            torch.cuda.set_device(where)  # the thread's
        ranks = Ranks(topology, boot.me, store, where)
        total = ranks.group.sum(torch.ones(1, device=where)).item()
        if total != ranks.group.size:
            raise RuntimeError(f"the sum of {ranks.group.size} ones is {total:g}")
        return ranks

    variable, name = interface(cuda=where.type == "cuda")
    begin = monotonic()
    ranks = within(
        SUM_S, joined, f"{boot.name} cannot all-reduce with the others over {name} ({variable})"
    )
    if ranks.group.size > 1:
        group = f"a sum of {ranks.group.size} ranks"
        ways.append(
            TestedConnection(boot.name, group, f"({variable})", name, 1e3 * (monotonic() - begin))
        )
    return ranks


def try_ways(boot: Boot, where: torch.device) -> str:
    """For --check: a table of the connections between all processes. Blocks.

    Raises:
        StartupError: one of them does not work.
    """
    mine: list[TestedConnection] = []
    ranks = join_ranks(boot, where, mine)
    said = ranks.exchange(json.dumps([astuple(way) for way in mine]))
    leaving = threading.Thread(target=ranks.close, daemon=True)  # NCCL ranks wait for each other
    leaving.start()
    leaving.join(LEAVING_S)
    found = [TestedConnection(*way) for text in said for way in json.loads(text)]
    rows = [("from", "to", "at", "over", "ms")]
    rows += [(way.of, way.to, way.at, way.over, f"{way.ms:.1f}") for way in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{text:<{width}}" for text, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(
        ["connections between nodes:", *(f"  {'  '.join(row)}".rstrip() for row in cells)]
    )


def reach(name: str, other: str, host: str, port: int, option: str) -> TestedConnection:
    """Connect to a port of another node that is open now or will be soon.

    Args:
        name, other: names of the two processes.
        option: the option that sets the port.

    Raises:
        StartupError: no connection within ``PORTS_S``.
    """
    begin = monotonic()
    deadline = begin + PORTS_S
    while True:
        try:
            left = max(RETRY_S, deadline - monotonic())
            with socket.create_connection((host, port), timeout=left):
                took = 1e3 * (monotonic() - begin)
                return TestedConnection(name, other, f"{host}:{port}", interface_to(host), took)
        except OSError as error:
            if monotonic() < deadline - RETRY_S:
                threading.Event().wait(RETRY_S)
                continue
            reason = error.strerror or str(error)
        raise StartupError(
            f"{name} does not reach {other} at {host}:{port} over {interface_to(host)} within "
            f"{PORTS_S:g} s: {reason} ({option}; a firewall?)"
        )


def within(seconds: float, work: Callable[[], T], what: str) -> T:
    """The result of ``work``, which runs in a thread that is abandoned on timeout.

    Raises:
        StartupError: it takes longer, or raises RuntimeError; ``what`` begins the message.
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
