"""Who is where: one node as it is served today, several nodes and groups as data."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from asyncllm.codec import protocol
from asyncllm.config import Config
from asyncllm.topology import (
    BALANCER,
    FOLLOWER,
    HTTP,
    LEADER,
    MASTER,
    WHOLE,
    Contract,
    Endpoint,
    Topology,
    http_worker,
)

# two nodes of two GPUs, a group of two ranks on each; an HTTP worker on either
NODES = Topology(
    (
        Endpoint(id=0, address="tcp://a:1", roles=(*WHOLE, BALANCER), device=0, group=0,
                 group_rank=0),
        Endpoint(id=1, address="tcp://a:2", roles=(FOLLOWER,), device=1, group=0, group_rank=1),
        Endpoint(id=2, node=1, address="tcp://b:1", roles=(FOLLOWER,), device=1, group=1,
                 group_rank=1),
        Endpoint(id=3, node=1, address="tcp://b:2", roles=(LEADER,), device=0, group=1,
                 group_rank=0),
        replace(http_worker(4), address="tcp://a:3"),
        replace(http_worker(5), node=1, address="tcp://b:3"),
    )
)  # fmt: skip


def ids(endpoints: tuple[Endpoint, ...]) -> list[int]:
    return [endpoint.id for endpoint in endpoints]


def test_one_process_is_a_whole_server() -> None:
    (alone,) = Topology.on_one_node().endpoints
    assert alone.actors == (
        "allocator", "grammar", "scheduler", "runner", "detokenizer", "tokenizer", "frontend",
        "watchdog",
    )  # fmt: skip
    assert not alone.replaceable


def test_ranks_come_first_on_one_node_then_http_workers() -> None:
    topology = Topology.on_one_node(tp=2, http=3)
    assert [e.roles for e in topology.endpoints] == [WHOLE, (FOLLOWER,), (HTTP,), (HTTP,)]
    assert [e.device for e in topology.endpoints] == [0, 1, None, None]
    assert [topology.name(i) for i in range(4)] == [
        "rank 0", "rank 1", "HTTP worker 1", "HTTP worker 2",
    ]  # fmt: skip
    assert topology[1].actors == ("runner", "watchdog")
    assert topology[2].actors == ("detokenizer", "tokenizer", "frontend", "watchdog")
    assert [e.replaceable for e in topology.endpoints] == [False, False, True, True]
    assert topology.placed("frontend") == (0, 2, 3)
    assert topology.groups == (0,)


def test_ranks_are_divided_among_groups_in_order() -> None:
    topology = Topology.on_one_node(tp=6, dp=3, http=2)
    assert [(e.group, e.group_rank) for e in topology.ranks] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    assert [e.device for e in topology.ranks] == [0, 1, 2, 3, 4, 5]
    assert [topology.leader(group).id for group in topology.groups] == [0, 2, 4]
    assert topology[2].roles == (LEADER,)
    assert topology[3].roles == (FOLLOWER,)
    assert topology.placed("balancer") == (0,)
    assert Topology.on_one_node(tp=6).placed("balancer") == ()


def test_ranks_are_divided_among_nodes_and_the_first_of_each_looks_after_the_others() -> None:
    topology = Topology.on_nodes(2, 4, 2)
    assert topology.nodes == (0, 1)
    assert [(e.node, e.device) for e in topology.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [ids(topology.on(node)) for node in topology.nodes] == [[0, 1, 4], [2, 3]]
    assert [e.roles for e in topology.on(1)] == [(FOLLOWER,), (FOLLOWER,)]
    assert topology.placed("frontend") == (0, 4)
    watched = {0: {1, 4}, 1: {0}, 4: {0}, 2: {3}, 3: {2}}
    assert {number: set(topology.watched(number)) for number in watched} == watched
    groups = Topology.on_nodes(2, 4, dp=2)
    assert [e.roles for e in groups.on(1)] == [(LEADER,), (FOLLOWER,)]
    assert Topology.on_nodes(1, 4, 2) == Topology.on_one_node(4, 2)


def test_what_requests_say_goes_by_the_balancer_where_there_are_groups() -> None:
    assert Topology.on_one_node(tp=2, http=2).intake("grammar") == ("grammar", 0)
    assert NODES.intake("grammar") == NODES.intake("scheduler") == ("balancer", 0)


def test_everybody_talks_to_the_coordinator_alone_in_one_group() -> None:
    topology = Topology.on_one_node(tp=2, http=2)
    assert ids(topology.peers(0)) == [1, 2]
    assert ids(topology.peers(1)) == ids(topology.peers(2)) == [0]


def test_each_group_has_its_ranks_in_their_order_and_a_leader() -> None:
    assert NODES.groups == (0, 1)
    assert [ids(NODES.group(g)) for g in NODES.groups] == [[0, 1], [3, 2]]
    assert [NODES.leader(g).id for g in NODES.groups] == [0, 3]
    assert [e.id for e in NODES.endpoints if NODES.leads(e.id)] == [0, 3]
    assert ids(NODES.ranks) == [0, 1, 3, 2]


def test_each_group_schedules_for_itself_and_reports() -> None:
    assert NODES[3].actors == ("allocator", "grammar", "scheduler", "runner", "watchdog")
    assert NODES.placed("scheduler") == (0, 3)
    assert NODES.reporters() == {
        (actor, endpoint) for actor in ("scheduler", "allocator", "runner") for endpoint in (0, 3)
    }


def test_leaders_send_to_their_group_and_who_serves_http_others_to_the_coordinator() -> None:
    assert ids(NODES.peers(0)) == [1, 2, 3, 4, 5]
    assert ids(NODES.peers(1)) == ids(NODES.peers(2)) == [0]
    assert ids(NODES.peers(3)) == [0, 2, 4, 5]
    assert ids(NODES.peers(4)) == ids(NODES.peers(5)) == [0]


def test_what_nobody_elsewhere_talks_to_depends_on_the_groups() -> None:
    alone = Topology.on_one_node(tp=2, http=2)
    assert set(alone.served_here(0)) == {"runner", "detokenizer", "tokenizer"}
    assert alone.served_here(1) == alone.served_here(2) == ()
    # another group's leader may have tokens for whom the coordinator serves, but nothing to submit
    assert set(NODES.served_here(0)) == {"runner", "scheduler", "grammar"}
    assert NODES.served_here(3) == ("runner",)


def test_another_takes_the_place_of_one_and_no_number_comes_again() -> None:
    topology = Topology.on_one_node(tp=2, http=2).replaced(2, http_worker(3)).at(3, "ipc://x")
    assert 2 not in topology
    assert topology[3].address == "ipc://x"
    assert topology.name(3) == "HTTP worker 2"
    assert topology.placed("frontend") == (0, 3)
    assert topology.replaced(3, None).placed("frontend") == (0,)
    with pytest.raises(KeyError):
        topology[2]


def test_it_survives_json() -> None:
    for topology in (NODES, NODES.without(1)):
        assert Topology.from_plain(json.loads(json.dumps(topology.to_plain()))) == topology


def test_nobody_talks_to_a_lost_group_and_all_keep_their_names() -> None:
    whole = Topology.on_one_node(tp=4, http=2, dp=2)
    assert [whole.expendable(group) for group in (0, 1, 2)] == [False, True, False]
    left = whole.without(1)
    assert not left.expendable(1)
    assert (left.groups, left.lost) == ((0,), (1,))
    assert left.placed("scheduler") == (0,)
    assert left.intake("scheduler") == ("balancer", 0), "requests still come to it"
    assert {endpoint for _, endpoint in left.reporters()} == {0}
    assert [e.id for e in left.peers(0)] == [1, 4]
    assert left.watched(0) == {1, 4}
    assert left.served_here(0) == whole.served_here(0)
    assert [left.name(e.id) for e in left.endpoints] == [whole.name(e.id) for e in whole.endpoints]
    assert left.at(4, "ipc://x").replaced(4, None).lost == (1,)
    assert not Topology.on_one_node(tp=2, dp=2, in_step=True).expendable(1)


# -- what processes must have in common ------------------------------------------------------------


def test_a_breach_is_named_with_both_values() -> None:
    ours = Contract(protocol="p1", options="o1")
    assert ours.difference(ours) is None
    assert ours.difference(replace(ours, options="o2")) == ("options", "o1", "o2")
    assert ours.difference(Contract(protocol="p2", options="o2")) == ("protocol", "p1", "p2")


def contract(config: Config) -> Contract:
    return Contract(protocol="p", options=config.digest(), shared=config.shared())


@pytest.mark.parametrize(
    ("changes", "breach"),
    [
        ({"tp": 2}, ("--tp", "1", "2")),
        ({"data_type": "bf16", "host": "::"}, ("--data_type", '"auto"', '"bf16"')),
        ({"eos_id": (7, 8)}, ("--eos_id", "[]", "[7, 8]")),
        ({"host": "::", "log_level": "debug"}, None),
    ],
)
def test_options_that_differ_are_named(changes: dict[str, Any], breach: object) -> None:
    assert contract(Config()).difference(contract(Config(**changes))) == breach


def test_of_a_secret_option_no_value_is_told() -> None:
    ours, theirs = contract(Config()), contract(Config(api_key=("sk-1", "sk-2")))
    name, *values = ours.difference(theirs) or ()
    assert (name, len(set(values))) == ("--api_key", 2)
    assert "sk-1" not in str(theirs)


def test_an_option_that_one_side_does_not_know_is_named() -> None:
    ours = contract(Config())
    theirs = replace(ours, options="o", shared=(*ours.shared, ("new_one", "3")))
    assert ours.difference(theirs) == ("--new_one", "unknown", "3")


def test_options_count_unless_they_are_those_of_a_node() -> None:
    assert Config(tp=2).digest() == Config(tp=2).digest()
    assert Config(tp=2).digest() != Config().digest()
    assert Config(eos_id=(1,)).digest() != Config(eos_id=(2,)).digest()
    assert Config(host="::", port=1, log_level="debug").digest() == Config().digest()


def test_the_protocol_changes_with_any_field(monkeypatch: pytest.MonkeyPatch) -> None:
    from asyncllm.messages import EndpointGone

    before = protocol()
    assert protocol() == before
    field = EndpointGone.__dataclass_fields__["endpoint"]  # type: ignore[attr-defined]
    monkeypatch.setattr(field, "type", "str")
    assert protocol() != before


def test_a_master_computes_nothing_and_its_director_stands_for_all_schedulers() -> None:
    topology = Topology.of_master(http=3)
    assert [e.roles for e in topology.endpoints] == [(HTTP, MASTER), (HTTP,), (HTTP,)]
    assert topology.ranks == topology.groups == ()
    assert topology[0].actors == (
        "grammar", "director", "detokenizer", "tokenizer", "frontend", "watchdog",
    )  # fmt: skip
    assert topology.intake("scheduler") == ("director", 0)
    assert topology.intake("grammar") == ("grammar", 0)
    assert topology.reporters() == {("director", 0)}
    assert [topology.name(i) for i in range(3)] == ["pd_master", "HTTP worker 1", "HTTP worker 2"]
    assert [e.replaceable for e in topology.endpoints] == [False, True, True]
    assert ids(topology.peers(0)) == [1, 2]
    assert ids(topology.peers(1)) == [0]
    assert topology.served_here(0) == ()


def test_a_node_has_an_agent_beside_what_it_is() -> None:
    plain = Topology.on_one_node(tp=4, dp=2, http=2)
    node = plain.as_node()
    assert node.placed("agent") == (0,)
    assert {*node[0].actors} - {*plain[0].actors} >= {"agent"}
    assert node.intake("scheduler") == ("balancer", 0)
    assert node.placed("grammar") == (0, 2)
