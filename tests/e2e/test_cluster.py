"""A master, a prefill and two decode nodes: the answers of one server, and what happens when one goes.

More of it is in test_cluster_failures.py, which ``make cluster`` runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import aiohttp
import pytest

from tests.e2e.answers import (
    COMPLETIONS,
    REQUESTS,
    alike,
    body_of,
    long_body,
    ready,
    refusal,
    streamed,
    whole,
    with_an_accident,
)
from tests.e2e.cluster import COMMON, SLOTS, Cluster
from tests.e2e.process import END_S, Server, free_port, stream_text, wait_until

DEAD_AFTER = "6"  # seconds; a server that says nothing for half of it is lost
IN_TIME_S = 10.0
TAKES = free_port()  # of the second decode node


@pytest.fixture(scope="module")
def one(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server by itself."""
    log = tmp_path_factory.mktemp("one") / "log"
    with Server(tiny_dir, log, *COMMON, *SLOTS, "--chunked_prefill_size", "64") as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The tests of this file kill decode nodes one after the other: their order counts."""
    logs = tmp_path_factory.mktemp("cluster")
    node, takes = ("--chunked_prefill_size", "64"), ("--pd_decode_rpyc_port", str(TAKES))
    with Cluster(tiny_dir, logs, decode=[(), takes], node=node) as made:
        yield made


def test_k_and_v_are_taken_at_the_port_that_was_given(cluster: Cluster) -> None:
    assert ("127.0.0.1", TAKES) in cluster.decode[1].listeners()


@pytest.mark.parametrize("name", REQUESTS)
def test_the_answer_is_that_of_one_server(name: str, one: Server, cluster: Cluster) -> None:
    got, wanted = whole(cluster.master, name), whole(one, name)
    assert alike(got, wanted), (got, wanted)
    if name not in ("no token", "of the prompt", "generate"):
        assert streamed(cluster.master, name) == streamed(one, name)


def test_decode_nodes_compute_no_prompt_and_all_slots_are_free(cluster: Cluster) -> None:
    cluster.free(*cluster.prefill, *cluster.decode)
    assert [d.metric("asyncllm_prompt_tokens_computed_total") for d in cluster.decode] == [0, 0]
    assert all(d.metric("asyncllm_generated_tokens_total") for d in cluster.decode)
    assert cluster.prefill[0].metric("asyncllm_prompt_tokens_computed_total") > 0
    assert cluster.master.metric("asyncllm_pd_retries_total") == 0
    assert cluster.master.metric("asyncllm_pd_decode_nodes") == 2


def test_only_what_a_decode_node_does_not_have_travels(cluster: Cluster) -> None:
    """All of a new prompt, and of one that it has seen the last token only."""
    master, taken = cluster.master, list[float]()
    for _ in range(2):
        before = sum(d.metric("asyncllm_kv_transferred_tokens_total") for d in cluster.decode)
        usage = master.complete([*range(40, 240)], 4)["usage"]
        after = sum(d.metric("asyncllm_kv_transferred_tokens_total") for d in cluster.decode)
        taken.append(after - before)
    assert (usage["prompt_tokens"], taken) == (200, [200, 1])
    told = wait_until(lambda: master.metric("asyncllm_pd_kv_tokens_total") == after, END_S)
    assert told, "the master is told twice a second"
    assert master.metric("asyncllm_pd_kv_sent_bytes_total") > 0


def test_the_clients_name_for_a_request_is_in_the_log_of_each_node(cluster: Cluster) -> None:
    headers = {"Content-Type": "application/json", "X-Request-Id": "find-me-7"}
    body = json.dumps(body_of("greedy")[1]).encode()
    request = urllib.request.Request(cluster.master.url + COMPLETIONS, body, headers)
    urllib.request.urlopen(request, timeout=60).close()
    assert wait_until(
        lambda: all(
            sum("request find-me-7: " in node.text() for node in nodes) == 1
            for nodes in ([cluster.master], cluster.prefill, cluster.decode)
        ),
        10,
    )


def test_a_node_sends_its_callers_to_its_master(cluster: Cluster) -> None:
    for node in (cluster.prefill[0], cluster.decode[0]):
        assert node.process.stdout is not None
        said = node.process.stdout.readline().decode()
        assert re.fullmatch(rf"asyncllm is ready: \w+ node {node.url}; requests go to .*\n", said)
        status, _, text = refusal(node, "greedy")
        assert status == 400
        assert f"pd_master at 127.0.0.1:{cluster.master.port}" in text
        assert json.loads(node.get("/readiness")) == {"status": "ok"}
        assert json.loads(node.get("/v1/models"))["data"]


def test_a_storm_of_aborts_leaves_nothing(cluster: Cluster) -> None:
    """200 streams, half of them left in any phase by their clients."""

    async def one(session: aiohttp.ClientSession, i: int) -> bool:
        reasons: list[object] = []
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(None if i % 2 else 0.01 * (i % 60)):
                url = cluster.master.url + COMPLETIONS
                async for event in stream_text(session, url, long_body(i, 12)):
                    assert "choices" in event, event
                    reasons += [choice["finish_reason"] for choice in event["choices"]]
        return not i % 2 or reasons[-1] == "length"

    async def storm() -> list[bool]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await asyncio.gather(*(one(session, i) for i in range(200)))

    assert all(asyncio.run(storm()))
    cluster.free(*cluster.prefill, *cluster.decode)
    assert cluster.master.metric("asyncllm_pd_requests") == 0


def test_streams_go_on_when_their_decode_node_is_killed(one: Server, cluster: Cluster) -> None:
    bodies = [long_body(i, 300) for i in range(6)]
    wanted = [one.post(COMPLETIONS, body)["choices"][0]["text"] for body in bodies]
    got = with_an_accident(cluster.master.url, bodies, cluster.decode[0].process.kill)
    assert got == wanted
    assert cluster.master.metric("asyncllm_pd_retries_total") > 0
    assert cluster.master.metric("asyncllm_pd_failed_total") == 0
    cluster.free(*cluster.prefill, cluster.decode[1])


def test_a_node_that_starts_again_at_its_address_is_a_new_one(cluster: Cluster) -> None:
    (before,) = (r["incarnation"] for r in cluster.nodes() if r["role"] == "decode")
    dead = cluster.decode[0]
    again = cluster.start_node("decode", "--port", str(dead.port))
    again.port, again.url = dead.port, dead.url
    cluster.decode[0] = again
    cluster.wait_for(1, 2)
    assert before in {r["incarnation"] for r in cluster.nodes() if r["role"] == "decode"}
    assert f"127.0.0.1:{dead.port}" in cluster.serving("decode")


def test_without_another_decode_node_the_client_is_told_which_one_was_lost(
    cluster: Cluster,
) -> None:
    last, other = cluster.decode
    other.process.kill()
    cluster.wait_for(1, 1)
    begun = monotonic()
    (text,) = with_an_accident(cluster.master.url, [long_body(60, 1500)], last.process.kill)
    assert text.startswith(f"error: decode node 127.0.0.1:{last.port} is lost")
    assert "there is no decode node" in text
    assert monotonic() - begun < IN_TIME_S + 5
    begun = monotonic()
    status, again, text = refusal(cluster.master, "greedy")
    assert (status, "there is no decode node" in text) == (503, True)
    assert again is not None
    assert monotonic() - begun < 2
    assert not ready(cluster.master)
    cluster.free(*cluster.prefill)
