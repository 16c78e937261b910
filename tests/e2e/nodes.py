"""Nodes of a server: network namespaces on a bridge, or addresses of the loopback interface."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from asyncllm.server.secret import make_key_file
from tests.e2e.process import Server, free_port


@dataclass
class Network:
    """Addresses of the nodes, and how to run something on one.

    ``namespaces`` is empty where the kernel has none for us: all nodes then share this machine's
    loopback interface.
    """

    hosts: list[str]
    namespaces: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # lead to IPv6 addresses; on the nodes alone
    links: list[str] = field(default_factory=list)

    def command(self, node: int) -> list[str]:
        """In front of what is to run there."""
        return ["ip", "netns", "exec", self.namespaces[node]] if self.namespaces else []

    def cut(self, node: int) -> None:
        """Pull the cable."""
        ip("link", "set", self.links[node], "down")

    def mend(self) -> None:
        """Put all cables back."""
        for link in self.links:
            ip("link", "set", link, "up")


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=20)


@contextmanager
def network(nodes: int) -> Iterator[Network]:
    """As many nodes; says which kind they are."""
    with ExitStack() as stack:
        try:
            found = _namespaces(nodes, stack)
        except (OSError, subprocess.CalledProcessError) as error:
            stack.close()
            found = Network([f"127.0.0.{i + 2}" for i in range(nodes)])
            sys.stderr.write(f"no network namespaces ({error}): addresses of 127.0.0.0/8\n")
        else:
            sys.stderr.write("nodes are network namespaces\n")
        yield found


def _namespaces(nodes: int, stack: ExitStack) -> Network:
    tag = f"{os.getpid() % 100000}"
    sixth = [f"fd00:a11::{os.getpid() % 0xFFF0:x}:{i + 1}" for i in range(nodes)]
    bridge, net = f"al{tag}b", f"10.231.{os.getpid() % 250}"
    ip("link", "add", bridge, "type", "bridge")
    stack.callback(ip, "link", "del", bridge)
    ip("addr", "add", f"{net}.254/24", "dev", bridge)
    ip("link", "set", bridge, "up")
    found = Network([f"{net}.{i + 1}" for i in range(nodes)])
    for i, host in enumerate(found.hosts):
        name, link = f"al{tag}n{i}", f"al{tag}v{i}"
        ip("netns", "add", name)
        stack.callback(ip, "netns", "del", name)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", link, "master", bridge, "up")
        ip("-n", name, "addr", "add", f"{host}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "addr", "add", f"{sixth[i]}/64", "dev", "eth0", "nodad")
        hosts_file = Path("/etc/netns") / name / "hosts"  # what the node sees as /etc/hosts
        hosts_file.parent.mkdir(parents=True)
        stack.callback(shutil.rmtree, hosts_file.parent)
        lines = ["127.0.0.1 localhost", *(f"{a} node-{n}" for n, a in enumerate(sixth))]
        hosts_file.write_text("\n".join(lines) + "\n")
        found.names.append(f"node-{i}")
        found.namespaces.append(name)
        found.links.append(link)
    return found


class Node(Server):
    """``python -m asyncllm`` on a node."""

    def __init__(
        self,
        net: Network,
        node: int,
        model_dir: Path,
        folder: Path,
        *args: str,
        leader: str = "",
    ) -> None:
        """``leader``: how node 0 is called instead of by its address."""
        self.host = host = net.hosts[node]
        self.node = node
        key = folder / "key"
        if not key.exists():
            make_key_file(key)
        self.port = free_port()
        self.url = f"http://{host}:{self.port}"
        self.log = folder / f"log{node}"
        words = [
            *net.command(node), sys.executable, "-m", "asyncllm", "--host", host,
            "--port", str(self.port), "--model_dir", str(model_dir), "--node_rank", str(node),
            "--nccl_host", leader or net.hosts[0], "--cluster_key_file", str(key), *args,
        ]  # fmt: skip
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=out)
