"""Nodes meet: who belongs to a server, who does not, and who has gone."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import zmq

from asyncllm.actors.transport import CurveKeys
from asyncllm.codec import encode, protocol
from asyncllm.errors import StartupError
from asyncllm.server.nodes import (
    JoinRefused,
    NodeAlive,
    NodeJoin,
    NodeJoined,
    NodeLink,
    NodeMember,
    NodeRendezvous,
)
from asyncllm.server.secret import derive
from asyncllm.topology import Contract, Topology
from tests.e2e.process import free_port, wait_until
from tests.raw import mutated, offer, raw, scream

KEYS = derive(b"s" * 32)
TIMEOUT_S = 20.0
DEAD_AFTER_S = 4.0
OPTIONS = (("nnodes", "3"), ("tp", "6"))
FACTS = (("tokenizer", "t1"), ("max_req_total_len", "2048"))


def a_node(number: int, **changes: object) -> NodeJoin:
    contract = Contract(protocol="p", options="o", shared=OPTIONS)
    join = NodeJoin(node=number, host=f"10.0.0.{number}", contract=contract, facts=FACTS)
    return replace(join, **changes)  # type: ignore[arg-type]


class World:
    """Node 0 in one thread, others in further ones; what became of each."""

    def __init__(self, nnodes: int, timeout_s: float = TIMEOUT_S) -> None:
        self.port, self.nnodes = free_port(), nnodes
        self.lines: dict[object, NodeLink] = {}
        self.said: dict[object, str] = {}
        self.joined: dict[object, NodeJoined] = {}
        self.ended: dict[object, tuple[int, str]] = {}
        self.threads: list[threading.Thread] = []
        self.timeout_s = timeout_s
        self.meeting = NodeRendezvous(
            a_node(0), ("127.0.0.1", self.port), KEYS, nnodes, DEAD_AFTER_S
        )
        self.lines[0] = self.meeting
        self.go(0, self._lead)

    def go(self, name: object, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except StartupError as error:
                self.said[name] = str(error)

        thread = threading.Thread(target=run)
        thread.start()
        self.threads.append(thread)

    def _lead(self) -> None:
        self.meeting.gather(self.timeout_s)
        topology = Topology.on_nodes(self.nnodes, self.nnodes)
        self.meeting.place(NodeJoined(topology, 7, "public", "secret"))
        self.watch(0, self.meeting)

    def watch(self, name: object, line: NodeLink) -> None:
        line.watch(lambda code, why: self.ended.setdefault(name, (code, why)))

    def add(self, name: object, join: NodeJoin, *keys: CurveKeys) -> None:
        member = NodeMember(join, "127.0.0.1", self.port, keys or (KEYS,), DEAD_AFTER_S)
        self.lines[name] = member

        def work() -> None:
            self.joined[name] = member.join(self.timeout_s)
            self.watch(name, member)

        self.go(name, work)

    def settle(self) -> None:
        """Until everybody knows what is."""
        for thread in self.threads:
            thread.join(TIMEOUT_S)


@contextmanager
def world(nnodes: int, timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    made = World(nnodes, timeout_s)
    try:
        yield made
    finally:
        made.settle()
        for line in made.lines.values():
            line.close()


def test_all_nodes_get_the_same_keys_and_stay_until_one_says_why_it_ends() -> None:
    with world(3) as w:
        for i in (2, 1):
            w.add(i, a_node(i))
        w.settle()
        assert w.said == {}
        assert {(j.public, j.secret, j.store_port) for j in w.joined.values()} == {
            ("public", "secret", 7)
        }
        assert w.joined[1].topology == Topology.on_nodes(3, 3)
        time.sleep(1.0)  # several signs of life
        assert w.ended == {}
        w.lines[2].fail(70, "it hangs")
        assert wait_until(lambda: len(w.ended) == 2, TIMEOUT_S)
        assert w.ended[0] == w.ended[1] == (70, "node 2 (10.0.0.2): it hangs")


def test_either_of_two_secrets_is_heard_and_no_other() -> None:
    with world(2, timeout_s=1.5) as w:
        w.add("stranger", a_node(1), derive(b"x" * 32))
        w.settle()
        assert w.said["stranger"].startswith("node 0 does not answer at 127.0.0.1:")
        assert w.said[0] == "node 1 did not join within 1.5 s (--node_timeout)"
    with world(2) as w:
        w.add(1, a_node(1), derive(b"x" * 32), KEYS)
        w.settle()
        assert w.said == {}
        assert w.joined[1].secret == "secret"


@pytest.mark.parametrize(
    ("join", "line"),
    [
        (
            a_node(2, facts=(FACTS[0], ("max_req_total_len", "4096"))),
            "node 2 (10.0.0.2) cannot belong to this server: its max_req_total_len is 4096, "
            "node 0's is 2048",
        ),
        (
            a_node(2, contract=Contract(protocol="p", options="p",
                                        shared=(("nnodes", "2"), ("tp", "6")))),
            "node 2 (10.0.0.2) cannot belong to this server: its --nnodes is 2, node 0's is 3",
        ),
        (a_node(1, host="10.0.0.9"), "two nodes have --node_rank 1: 10.0.0.1, 10.0.0.9"),
        (a_node(0, host="10.0.0.9"), "two nodes have --node_rank 0: 10.0.0.0, 10.0.0.9"),
        (None, "node 2 did not join within 1.5 s (--node_timeout)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_the_same_line_on_every_node(join: NodeJoin | None, line: str) -> None:
    with world(3, timeout_s=TIMEOUT_S if join else 1.5) as w:
        w.add(1, a_node(1))
        if join is not None:
            assert wait_until(lambda: w.meeting._peers, TIMEOUT_S)
            w.add("new", join)
        else:
            w.lines[1]._limit_s = TIMEOUT_S
        w.settle()
        assert set(w.said.values()) == {line}
        assert w.said[0] == line
        assert len(w.said) == (3 if join else 2)


def test_a_late_comer_is_refused_and_nobody_else_notices() -> None:
    with world(2) as w:
        w.add(1, a_node(1))
        w.settle()
        w.add("late", a_node(1, host="10.0.0.9"))
        w.add("other", a_node(1, facts=()))
        w.settle()
        refused = "this server already has all its nodes: node 1 (10.0.0.9) cannot join"
        assert w.said["late"] == refused
        assert w.said["other"] == refused.replace("10.0.0.9", "10.0.0.1")
        assert w.ended == {}


@pytest.mark.parametrize("gone", [0, 1])
def test_a_node_that_is_silent_ends_the_others(gone: int) -> None:
    with world(3) as w:
        for i in (1, 2):
            w.add(i, a_node(i))
        w.settle()
        w.lines[gone]._beat = lambda now, late: None  # type: ignore[method-assign]
        left = {0, 1, 2} - {gone}
        assert wait_until(lambda: left <= w.ended.keys(), TIMEOUT_S)
        host = "127.0.0.1" if gone == 0 else "10.0.0.1"
        for i in left:
            said = re.search(  # the first to see it tells the others, who name it
                rf"node {gone} \({host}\) has been silent for ([\d.]+) s", w.ended[i][1]
            )
            assert said, w.ended[i]
            # a machine with other work to do looks late
            assert DEAD_AFTER_S / 2 <= float(said[1]) < 2 * DEAD_AFTER_S


def test_a_node_that_can_be_spared_is_missed_and_nobody_else_notices() -> None:
    """It is told so if it comes back to its senses."""
    gone: list[tuple[int, str]] = []
    with world(4) as w:
        for i in (1, 2, 3):
            w.add(i, a_node(i))
        w.settle()
        w.meeting.spare([1, 2, 3], lambda node, why: gone.append((node, why)))
        beat, w.lines[1]._beat = w.lines[1]._beat, lambda now, late: None  # type: ignore[method-assign]
        assert wait_until(lambda: gone, TIMEOUT_S)
        assert gone[0][0] == 1
        assert "has been silent" in gone[0][1]
        assert not {0, 2} & w.ended.keys()
        w.lines[1]._beat = beat  # type: ignore[method-assign]
        assert wait_until(lambda: 1 in w.ended, TIMEOUT_S)
        w.lines[2].fail(70, "it hangs")
        assert wait_until(lambda: len(gone) == 2, TIMEOUT_S)
        assert gone[1] == (2, "node 2 (10.0.0.2): it hangs")
        w.lines[3].close()
        assert wait_until(lambda: len(gone) == 3, TIMEOUT_S)
        assert gone[2] == (3, "node 3 (10.0.0.3) has gone: its connection was closed")
        assert 0 not in w.ended


def test_noise_harms_nobody_with_the_key_or_without() -> None:
    draw = random.Random(5)
    valid = [[protocol().encode(), encode(m)] for m in (NodeAlive(), JoinRefused("x"), a_node(1))]
    with world(2) as w:
        w.add(1, a_node(1))
        w.settle()
        scream("127.0.0.1", w.port, draw, 20)
        for keys in (None, derive(b"x" * 32), KEYS):
            assert w.meeting.foreign_frames == 0
            with raw(f"tcp://127.0.0.1:{w.port}", keys, zmq.DEALER) as sock:
                for _ in range(200):
                    taken = offer(sock, *mutated(draw, draw.choice(valid)))
                    taken &= offer(sock, draw.randbytes(draw.randint(0, 99)))
                    assert taken or keys is not KEYS
                wait_until(lambda: sock.poll(0), 1.0 if keys is KEYS else 0.1)
        w.add("late", a_node(1))  # it is still answered
        w.settle()
        assert w.said["late"].startswith("this server already has all its nodes")
        assert w.ended == {}
        assert wait_until(lambda: w.meeting.failed_handshakes, TIMEOUT_S)
        assert w.meeting.foreign_frames > 100
