"""Each row of the tables of failures in docs/ has tests, most of them on real processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
E2E, FAILURES, CONFIG = "e2e/test_cluster", "e2e/test_cluster_failures", "e2e/test_config_server"
DIRECTING, NODES, GROUPS = "core/test_request_director", "e2e/test_nodes", "e2e/test_groups"
GOES = f"{NODES}::test_a_node_that_goes_ends_the_others_and_is_named"
REPLICAS = f"{NODES}::test_replicas_on_lost_nodes_take_nothing_with_them_but_what_they_have_begun"
TABLES: dict[tuple[str, str], dict[str, list[str]]] = {
    ("operations.md", "## When a node of a cluster fails"): {
        "prefill node killed or stopped": [
            f"{FAILURES}::test_a_node_that_is_killed_while_prompts_are_computed_is_replaced",
            f"{FAILURES}::test_a_stopped_prefill_node_is_left_and_comes_back",
            f"{DIRECTING}::test_without_another_node_it_fails_by_name_in_time",
        ],
        "decode node killed or stopped, no token sent yet": [
            f"{FAILURES}::test_a_node_that_is_killed_while_prompts_are_computed_is_replaced",
            f"{DIRECTING}::test_a_decode_node_lost_before_it_has_given_a_token_is_replaced",
        ],
        "the same, tokens sent": [
            f"{E2E}::test_streams_go_on_when_their_decode_node_is_killed",
            f"{FAILURES}::test_a_decode_node_that_is_stopped_writes_into_nothing_when_it_wakes",
            f"{E2E}::test_without_another_decode_node_the_client_is_told_which_one_was_lost",
        ],
        "a K/V transfer makes no progress": [
            "actors/test_kv_fencing::test_slots_given_to_others_are_out_of_reach_of_a_stopped_sender",
            "actors/test_kv_listeners::test_a_transfer_without_progress_lapses_and_costs_no_other",
            f"{DIRECTING}::test_a_pair_that_failed_is_avoided_for_a_while",
            "e2e/test_gpus::test_a_node_that_is_stopped_while_nccl_moves_k_and_v",
        ],
        "node gets SIGTERM": [
            f"{FAILURES}::test_a_node_that_is_told_to_stop_ends_what_it_has",
            f"{FAILURES}::test_what_a_node_does_not_end_in_time_goes_on_elsewhere",
        ],
        "node restarts at the same address": [
            f"{E2E}::test_a_node_that_starts_again_at_its_address_is_a_new_one",
        ],
        "stopped node wakes up": [
            f"{FAILURES}::test_a_decode_node_that_is_stopped_writes_into_nothing_when_it_wakes",
            f"{FAILURES}::test_a_stopped_prefill_node_is_left_and_comes_back",
            "actors/test_kv_fencing::test_a_stopped_receiver_does_not_take_what_its_sender_has_for_others",
        ],
        "no node of a role": [
            f"{E2E}::test_without_another_decode_node_the_client_is_told_which_one_was_lost",
            f"{DIRECTING}::test_a_missing_role_is_told_at_once",
        ],
        "master killed": [f"{FAILURES}::test_nodes_outlive_their_master"],
        "client disconnects, in any phase": [
            f"{FAILURES}::test_a_client_that_leaves_holds_nothing_for_a_second",
            f"{E2E}::test_a_storm_of_aborts_leaves_nothing",
        ],
        "a node does not read": [
            "actors/test_channel::test_a_peer_that_does_not_read_is_dropped_and_blocks_nobody",
            "actors/test_kv_listeners::test_a_receiver_that_reads_nothing_is_given_up_and_holds_up_nobody",
            "actors/test_kv_listeners::test_a_receiver_that_does_not_read_keeps_no_pages_of_others",
        ],
    },
    ("operations.md", "## A config_server and several masters"): {
        "config_server killed, stopped or restarted": [
            f"{CONFIG}::test_a_config_server_that_dies_is_missed_by_nobody_and_learns_all_anew",
            "actors/test_registry::test_what_a_config_server_knew_comes_back_after_its_restart",
        ],
        "a master is killed, or gets SIGTERM": [
            f"{CONFIG}::test_a_master_that_is_killed_is_forgotten_and_another_takes_its_place",
            f"{FAILURES}::test_a_master_that_is_told_to_stop_ends_what_it_has",
        ],
        "a master is stopped, or unreachable": [
            f"{CONFIG}::test_a_master_that_stops_is_gone_and_comes_back",
        ],
        "a master starts": [
            f"{CONFIG}::test_a_master_that_is_killed_is_forgotten_and_another_takes_its_place",
        ],
        "a node starts, or ends": [
            "actors/test_registry::test_masters_and_nodes_are_told_who_comes_and_goes",
        ],
        "a server asks for an `--nccl_port` that another server uses": [
            f"{CONFIG}::test_two_nodes_meet_at_the_config_server_and_a_port_is_one_servers",
        ],
    },
    ("cluster.md", "## When a node goes"): {
        "a process of a node ends, or hangs (`--step_timeout`)": [
            f"{NODES}::test_a_child_of_another_node_ends_all_nodes",
            "server/test_culprit::test_a_process_whose_collective_failed_is_no_cause_if_one_is_known",
            "e2e/test_processes::test_a_hung_rank_is_ended_by_the_step_timeout",
        ],
        "a node's first process is killed": [GOES],
        "a node is stopped or unreachable (cable)": [GOES],
        "the disconnected node itself": [GOES],
        "the stopped node itself": [GOES],
        "a rank of the group ends, or hangs (`--step_timeout`)": [
            f"{GROUPS}::test_a_group_that_is_lost_takes_nothing_with_it_but_what_it_has_begun",
            f"{GROUPS}::test_a_group_one_of_whose_ranks_hangs_is_ended_by_the_step_timeout",
        ],
        "such a rank is silent": [
            f"{GROUPS}::test_a_group_that_is_lost_takes_nothing_with_it_but_what_it_has_begun",
        ],
        "a node that only has such groups is killed": [
            f"{NODES}::test_a_killed_node_costs_all_groups_that_it_has_and_nobody_elses",
        ],
        "it is stopped or unreachable": [REPLICAS],
        "the stopped or disconnected node itself": [REPLICAS],
        "the process that the user started on another node ends": [
            f"{NODES}::test_a_killed_node_costs_all_groups_that_it_has_and_nobody_elses",
        ],
        "SIGTERM on any node": [f"{NODES}::test_two_nodes_give_the_tokens_of_one"],
        "a node does not join": [
            "server/test_nodes::test_either_of_two_secrets_is_heard_and_no_other",
            "server/test_nodes::test_what_does_not_fit_is_the_same_line_on_every_node",
        ],
        "a port is closed to a node, or data ports of NCCL or gloo are": [
            f"{NODES}::test_an_interface_that_does_not_lead_there_is_named_before_weights_are_read",
            f"{NODES}::test_a_check_tries_all_ways_and_tells_them_on_every_node",
        ],
        "two nodes with the same `--node_rank`, a different `--nnodes` or model": [
            f"{NODES}::test_options_that_differ_end_every_node_with_one_line",
            "server/test_nodes::test_what_does_not_fit_is_the_same_line_on_every_node",
        ],
        "a node tries to join a complete server": [
            "server/test_nodes::test_a_late_comer_is_refused_and_nobody_else_notices",
        ],
    },
}


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t[1])
def test_each_row_has_its_tests(table: tuple[str, str]) -> None:
    page, title = table
    chapter = (ROOT / "docs" / page).read_text().split(f"{title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \|", chapter, re.MULTILINE)
    assert [row for row in rows if row != "event" and set(row) != {"-"}] == [*TABLES[table]]
    for tests in TABLES[table].values():
        for test in tests:
            file, _, name = test.partition("::")
            assert f"def {name}(" in (ROOT / "tests" / f"{file}.py").read_text(), test
