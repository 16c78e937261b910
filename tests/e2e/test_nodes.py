"""A server on several machines: the tokens of one, and one fate."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from asyncllm.server.process import FAIL_S
from tests.e2e.nodes import Network, Node, network
from tests.e2e.process import END_S, free_port, wait_until
from tests.e2e.test_groups import PROMPTS, alone, ending, of_groups, running
from tests.raw import scream

CPU = ("--device", "cpu", "--data_type", "fp32", "--max_total_token_num", "6000")
SLACK_S = 6.0  # of a machine that is busy


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
        # on one machine the way to node 0 may begin at another address of the loopback interface
        hosts = {host for host, each in node.listeners() if each == port}
        assert hosts == {node.host} if net.namespaces else hosts, node.text()
    return found


def scream_at_all(*nodes: Node) -> None:
    """Noise at every port of ours; the caller sees that nobody has heard it."""
    draw = random.Random(3)
    for node in nodes:
        for host, port in sorted(node.listeners()):
            if f"--nccl_port {port}" not in " ".join(node.process.args):  # type: ignore[arg-type]
                scream(host, port, draw, 6)
    assert wait_until(lambda: nodes[0].metric("asyncllm_strangers_total") > 0, END_S)


def test_two_nodes_give_the_tokens_of_one(net: Network, tiny_dir: Path, tmp_path: Path) -> None:
    """Two groups on each; noise at their ports reaches nobody; one group more or less on another
    node ends nothing, and a stop of either node stops both."""
    want = [alone(tiny_dir, prompt, 12) for prompt in PROMPTS]
    with ExitStack() as stack:
        first, second = start(net, stack, tiny_dir, tmp_path, "--dp", "4", tp=4)
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            got = pool.map(lambda ids: first.tokens(ids, 12, ignore_eos=True), PROMPTS)
            assert [*got] == want
        assert min(of_groups(first, "steps_total")) > 10
        assert json.loads(second.get("/health")) == json.loads(first.get("/health"))
        assert 'asyncllm_mailbox_depth{actor="runner"' in second.get("/metrics")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            second.get("/v1/models")
        scream_at_all(first, second)
        (child,) = second.children()
        os.kill(child, signal.SIGKILL)
        lost = {"status": "ok", "lost_groups": [3]}
        assert wait_until(lambda: json.loads(first.get("/readiness")) == lost, END_S), first.text()
        assert f"rank 3 (pid {child}) ended with exit code -9: group 3 is lost" in second.text()
        (stream,) = stack.enter_context(running(first, 1, 60))
        second.process.send_signal(signal.SIGTERM)
        assert ending(stream) == "length"
        assert [node.process.wait(END_S) for node in (first, second)] == [0, 0], first.text()
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
        assert [node.process.wait(END_S) for node in (first, second)] == [1, 1]
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
            "--max_req_total_len is 1025, node 0's is 1024\n"
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
        said = "cannot all-reduce with the others over lo (GLOO_SOCKET_IFNAME): "
        assert any(said in node.text() for node in nodes)
        assert not any("load weights" in node.text() for node in nodes)


def test_one_group_on_two_nodes_where_node_0_may_listen_everywhere_and_be_called_by_a_name_of_ipv6(
    net: Network, tiny_dir: Path, tmp_path: Path
) -> None:
    """As in a container: the name that others know it by is --advertise_host."""
    if not net.namespaces:
        pytest.skip("names of IPv6 addresses are those of namespaces")
    ports = ("--multinode_httpmanager_port", str(free_port()), "--nccl_port", str(free_port()))
    common = (*CPU, "--nnodes", "2", "--tp", "2", *ports)
    name, want = net.names[0], [alone(tiny_dir, prompt, 12) for prompt in PROMPTS]
    with ExitStack() as stack:
        advertised = ("--advertise_host", name)
        first = Node(net, 0, tiny_dir, tmp_path, *common, *advertised, leader="::")
        second = Node(net, 1, tiny_dir, tmp_path, *common, leader=name)
        for node in (first, second):
            stack.enter_context(node)
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            got = pool.map(lambda ids: first.tokens(ids, 12, ignore_eos=True), PROMPTS)
            assert [*got] == want
        assert ("::", 20001) in first.listeners()
        assert first.stop() == 0, first.text()
        assert second.process.wait(END_S) == 0, second.text()


def test_a_check_tries_all_ways_and_tells_them_on_every_node(
    net: Network, tiny_dir: Path, tmp_path: Path
) -> None:
    """Both ways between node 0 and the ranks of another, and a sum; then all end."""
    http, store, messages = free_port(), free_port(), free_port()
    common = (*CPU, "--nnodes", "2", "--tp", "4", "--multinode_httpmanager_port", str(http),
              "--nccl_port", str(store), "--multinode_router_gloo_port", str(messages),
              "--node_timeout", "60", "--check")  # fmt: skip
    with ExitStack() as stack:
        nodes = [Node(net, i, tiny_dir, tmp_path, *common) for i in (0, 1)]
        for node in nodes:
            stack.enter_context(node.failing())
        assert [node.process.wait(60) for node in nodes] == [0, 0], nodes[0].text()
        first, second = net.hosts[:2]
        for node in nodes:
            assert node.process.stdout is not None
            said = node.process.stdout.read().decode()
            assert f"messages {messages + 2 * node.node}, {messages + 2 * node.node + 1}" in said
            table = said.partition("connections between nodes:\n")[2].splitlines()
            rows = {tuple(re.split(r"\s{2,}", line.strip())[:3]) for line in table[1:]}
            assert rows == {
                ("rank 0", "rank 2 of node 1", f"{second}:{messages + 2}"),
                ("rank 0", "rank 3 of node 1", f"{second}:{messages + 3}"),
                *((f"rank {i}", "node 0", f"{first}:{store}") for i in (2, 3)),
                *((f"rank {i}", "rank 0 of node 0", f"{first}:{messages}") for i in (2, 3)),
                *((f"rank {i}", "a sum of 4 ranks", "(GLOO_SOCKET_IFNAME)") for i in range(4)),
            }
            assert "load weights" not in node.text()


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


def test_replicas_on_lost_nodes_take_nothing_with_them_but_what_they_have_begun(
    net: Network, tiny_dir: Path, tmp_path: Path
) -> None:
    """Three nodes, a group on each: one is stopped, one is cut off, node 0 serves on."""
    want = [alone(tiny_dir, prompt, 12) for prompt in PROMPTS]
    with ExitStack() as stack:
        args = ("--dp", "3", "--dp_balancer", "round_robin", "--dead_after", "5")
        nodes = start(net, stack, tiny_dir, tmp_path, *args, nodes=3)
        first, stopped, other = nodes
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            got = pool.map(lambda ids: first.tokens(ids, 12, ignore_eos=True), PROMPTS)
            assert [*got] == want
        assert all(first.metric(f'asyncllm_group_steps_total{{group="{i}"}}') for i in range(3))
        with running(first, 3, 700) as streams:
            stop(net, stopped)
            (cut if net.namespaces else kill)(net, other)
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                got = pool.map(lambda ids: first.tokens(ids, 12, ignore_eos=True), PROMPTS)
                assert [*got] == want
            ends = [stream.read() for stream in streams]
        assert sum(b"group_lost" in end for end in ends) == 2
        assert sum(b'"finish_reason":"length"' in end for end in ends) == 1
        assert json.loads(first.get("/readiness"))["lost_groups"] == [1, 2]
        stopped.process.send_signal(signal.SIGCONT)
        assert stopped.process.wait(END_S) == 1, stopped.text()
        assert other.process.wait(END_S) == (1 if net.namespaces else -9), other.text()
        assert first.stop() == 0, first.text()
        for i in (1, 2):
            assert f"group {i} is lost: node {i} ({net.hosts[i]}) has " in first.text()


@pytest.mark.cluster
def test_a_killed_node_costs_all_groups_that_it_has_and_nobody_elses(
    net: Network, tiny_dir: Path, tmp_path: Path
) -> None:
    want = [alone(tiny_dir, prompt, 12) for prompt in PROMPTS]
    with ExitStack() as stack:
        args = ("--dp", "4", "--dp_balancer", "round_robin")
        first, killed = start(net, stack, tiny_dir, tmp_path, *args, tp=4)
        with running(first, 4, 1500) as streams:
            kill(net, killed)
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                got = pool.map(lambda ids: first.tokens(ids, 12, ignore_eos=True), PROMPTS)
                assert [*got] == want
            ends = [stream.read() for stream in streams]
        assert sum(b"group_lost" in end for end in ends) == 2
        assert sum(b'"finish_reason":"length"' in end for end in ends) == 2
        assert json.loads(first.get("/readiness"))["lost_groups"] == [2, 3]
        assert first.stop() == 0, first.text()
        for group in (2, 3):
            assert f"group {group} is lost: node 1 ({net.hosts[1]}) has gone" in first.text()


@pytest.mark.parametrize(
    ("event", "victim", "said"),
    [
        (kill, 1, "has gone: its connection was closed"),
        (cut, 1, "has been silent for"),
        pytest.param(kill, 0, "has gone: its connection was closed", marks=pytest.mark.cluster),
        pytest.param(stop, 1, "has been silent for", marks=pytest.mark.cluster),
        pytest.param(stop, 0, "has been silent for", marks=pytest.mark.cluster),
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
    """In time, while a request runs; its client hears of it. Nobody hangs on."""
    dead_after = 6.0
    with ExitStack() as stack:
        nodes = start(net, stack, tiny_dir, tmp_path, "--dead_after", str(dead_after))
        other = nodes[1 - victim]
        (stream,) = stack.enter_context(running(nodes[0], 1, 2000))
        event(net, nodes[victim])
        began = time.monotonic()
        assert other.process.wait(20) == 1, other.text()
        assert time.monotonic() - began < dead_after / 2 + FAIL_S + SLACK_S
        line = f"node {victim} ({net.hosts[victim]}) {said}"
        assert line in other.text()
        if victim:
            assert b"server has failed" in stream.read()
        if event is stop:
            nodes[victim].process.send_signal(signal.SIGCONT)
        if event is not kill:
            assert nodes[victim].process.wait(20) == 1
            # one that was stopped is told why the others have ended
            named = 0 if event is cut else victim
            assert f"node {named} ({net.hosts[named]}) {said}" in nodes[victim].text()
