"""A server on several machines: the tokens of one, and one fate."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.nodes import Network, Node, network
from tests.e2e.process import free_port
from tests.e2e.test_groups import PROMPTS, alone, ending, of_groups, running

CPU = ("--device", "cpu", "--data_type", "fp32", "--max_total_token_num", "6000")


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    with network(3) as found:
        yield found


def start(
    net: Network,
    stack: ExitStack,
    model_dir: Path,
    folder: Path,
    *args: str,
    nodes: int = 2,
    tp: int = 0,
) -> list[Node]:
    """All nodes, ready: the first rank of each listens where the option says."""
    ports = ("--multinode_httpmanager_port", str(free_port()), "--nccl_port", str(free_port()))
    ranks, messages = tp or nodes, free_port()
    common = (*CPU, "--nnodes", str(nodes), "--tp", str(ranks), *ports, *args)
    common += ("--multinode_router_gloo_port", str(messages))
    found = [Node(net, i, model_dir, folder, *common) for i in range(nodes)]
    for node in found:
        stack.enter_context(node)
        port = messages + node.node * ranks // nodes
        assert (node.host, port) in node.listeners(), node.text()
    return found


@pytest.mark.parametrize("dp", [1, 2])
def test_two_nodes_give_the_tokens_of_one(
    dp: int, net: Network, tiny_dir: Path, tmp_path: Path
) -> None:
    """As one group, and as a group on each; a stop of either node stops both."""
    want = [alone(tiny_dir, prompt, 12) for prompt in PROMPTS]
    with ExitStack() as stack:
        first, second = start(net, stack, tiny_dir, tmp_path, "--dp", str(dp))
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            got = pool.map(lambda ids: first.tokens(ids, 12, ignore_eos=True), PROMPTS)
            assert [*got] == want
        if dp == 2:
            assert min(of_groups(first, "steps_total")) > 10
        assert second.get("/health") == first.get("/health").replace(":", ": ")
        assert 'asyncllm_mailbox_depth{actor="runner"' in second.get("/metrics")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            second.get("/v1/models")
        (stream,) = stack.enter_context(running(first, 1, 60))
        second.process.send_signal(signal.SIGTERM)
        assert ending(stream) == "length"
        assert [node.process.wait(20) for node in (first, second)] == [0, 0], first.text()
        for node in (first, second):
            assert "foreign frame" not in node.text()
            assert "stopping the server" not in node.text()


def test_a_child_of_another_node_ends_all_nodes(
    net: Network, tiny_dir: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        first, second = start(net, stack, tiny_dir, tmp_path, tp=4)
        want = alone(tiny_dir, PROMPTS[0], 12)
        assert first.tokens(PROMPTS[0], 12, ignore_eos=True) == want
        (child,) = second.children()
        os.kill(child, signal.SIGKILL)
        assert [node.process.wait(8) for node in (first, second)] == [1, 1]
        said = f"rank 3 (pid {child}) ended with exit code -9"
        assert f"node 1 ({net.hosts[1]}): {said}" in first.text()
        assert f"{said}: stopping the server" in second.text()


def test_options_that_differ_end_every_node_with_one_line(
    net: Network, tiny_dir: Path, tmp_path: Path
) -> None:
    """Before weights are read; and a node without the key is not even heard."""
    ports = ("--multinode_httpmanager_port", str(free_port()), "--nccl_port", str(free_port()))
    common = (*CPU, "--nnodes", "2", "--tp", "2", *ports, "--node_timeout", "60")
    with ExitStack() as stack:
        nodes = [
            Node(net, i, tiny_dir, tmp_path, *common, "--max_req_total_len", str(1024 + i))
            for i in (0, 1)
        ]
        for node in nodes:
            stack.enter_context(node.failing())
        assert [node.process.wait(60) for node in nodes] == [2, 2], nodes[0].text()
        line = (
            f"asyncllm: node 1 ({net.hosts[1]}) cannot belong to this server: its "
            "--max_req_total_len is 1025, that of node 0 1024\n"
        )
        for node in nodes:
            assert line in node.text()
            assert "load weights" not in node.text()


def test_an_interface_that_does_not_lead_there_is_named_before_weights_are_read(
    net: Network, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not net.namespaces:
        pytest.skip("addresses of one machine all lie on its loopback interface")
    ports = ("--multinode_httpmanager_port", str(free_port()), "--nccl_port", str(free_port()))
    common = (*CPU, "--nnodes", "2", "--tp", "2", *ports)
    with ExitStack() as stack:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        nodes = [Node(net, i, tiny_dir, tmp_path, *common) for i in (0, 1)]
        for node in nodes:
            stack.enter_context(node.failing())
        assert [node.process.wait(60) for node in nodes] == [2, 2], nodes[0].text()
        said = "cannot add up with the others over lo (GLOO_SOCKET_IFNAME): "
        assert any(said in node.text() for node in nodes)
        assert not any("load weights" in node.text() for node in nodes)


def kill(net: Network, node: Node) -> None:
    node.process.send_signal(signal.SIGKILL)


def stop(net: Network, node: Node) -> None:
    node.process.send_signal(signal.SIGSTOP)


def cut(net: Network, node: Node) -> None:
    if not net.namespaces:
        pytest.skip("addresses of one machine have no cable")
    net.cut(node.node)


@pytest.fixture(autouse=True)
def mended(net: Network) -> Iterator[None]:
    yield
    net.mend()


@pytest.mark.parametrize(
    ("event", "victim", "said"),
    [
        (kill, 1, "has gone: its connection is closed"),
        (kill, 0, "has gone: its connection is closed"),
        (stop, 1, "has been silent for"),
        (cut, 1, "has been silent for"),
    ],
)
def test_a_node_that_goes_ends_the_others_and_is_named(
    event: Callable[[Network, Node], None],
    victim: int,
    said: str,
    net: Network,
    tiny_dir: Path,
    tmp_path: Path,
) -> None:
    """Within --dead_after, while a request runs; its client hears of it. Nobody hangs on."""
    dead_after = 8.0
    with ExitStack() as stack:
        nodes = start(net, stack, tiny_dir, tmp_path, "--dead_after", str(dead_after))
        other = nodes[1 - victim]
        (stream,) = stack.enter_context(running(nodes[0], 1, 2000))
        event(net, nodes[victim])
        began = time.monotonic()
        assert other.process.wait(2 * dead_after) == 1, other.text()
        assert time.monotonic() - began < dead_after
        line = f"node {victim} ({net.hosts[victim]}) {said}"
        assert line in other.text()
        if victim:
            assert b"server has failed" in stream.read()
        if event is cut:
            assert nodes[1].process.wait(dead_after) == 1
            assert f"node 0 ({net.hosts[0]}) {said}" in nodes[1].text()
