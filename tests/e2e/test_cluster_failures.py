"""The failure contract of docs/operations.md on real processes, and other shapes of clusters.

Too slow for every day: ``make cluster`` runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import aiohttp
import pytest

from tests.e2e.answers import (
    COMPLETIONS,
    REQUESTS,
    TEXT,
    alike,
    long_body,
    ready,
    text_of,
    whole,
    with_an_accident,
)
from tests.e2e.cluster import COMMON, SLOTS, Cluster
from tests.e2e.process import Server, wait_until

DEAD_AFTER = "6"  # seconds; a server that says nothing for half of it is lost
IN_TIME_S = 10.0


pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def one(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server by itself."""
    log = tmp_path_factory.mktemp("one") / "log"
    with Server(tiny_dir, log, *COMMON, *SLOTS, "--chunked_prefill_size", "64") as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of each role, one of the decode nodes on two ranks."""
    logs = tmp_path_factory.mktemp("cluster")
    node = ("--chunked_prefill_size", "64")
    with Cluster(
        tiny_dir, logs, prefill=[(), ()], decode=[(), ()], node=node,
        master=("--httpserver_workers", "2", "--dead_after", DEAD_AFTER),
    ) as made:  # fmt: skip
        yield made


def test_a_stopped_prefill_node_is_left_and_comes_back(one: Server, cluster: Cluster) -> None:
    """It holds prompts that it will not compute; others do, within 10 s, and no later than that."""
    stopped = cluster.prefill[0]
    stopped.process.send_signal(signal.SIGSTOP)
    try:
        bodies = [long_body(i, 5) for i in range(20, 28)]
        wanted = [one.post(COMPLETIONS, body)["choices"][0]["text"] for body in bodies]
        begun = monotonic()

        async def go() -> list[str]:
            return await asyncio.gather(*(text_of(cluster.master.url, b) for b in bodies))

        assert asyncio.run(go()) == wanted
        assert monotonic() - begun < IN_TIME_S
    finally:
        stopped.process.send_signal(signal.SIGCONT)
    cluster.wait_for(2, 2)
    cluster.free(*cluster.prefill, *cluster.decode)


@pytest.mark.parametrize(
    ("role", "at_work", "first"),
    [
        ("prefill", "asyncllm_requests_running", 90),
        ("decode", "asyncllm_requests_importing", 120),
    ],
)
def test_a_node_that_is_killed_while_prompts_are_computed_is_replaced(
    one: Server, cluster: Cluster, role: str, at_work: str, first: int
) -> None:
    """Others do its requests, of which nobody has had a token."""
    bodies = [{**long_body(i, 20), "prompt": f"{i} {TEXT * 15}"} for i in range(first, first + 8)]
    wanted = [one.post(COMPLETIONS, body)["choices"][0]["text"] for body in bodies]
    nodes = {"prefill": cluster.prefill, "decode": cluster.decode}[role]
    retries = cluster.master.metric("asyncllm_pd_retries_total")
    begun = monotonic()

    async def go() -> list[str]:
        tasks = [asyncio.ensure_future(text_of(cluster.master.url, b)) for b in bodies]
        while not await asyncio.to_thread(nodes[0].metric, at_work):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        nodes[0].process.kill()
        return await asyncio.gather(*tasks)

    assert asyncio.run(asyncio.wait_for(go(), 60)) == wanted
    assert monotonic() - begun < IN_TIME_S
    assert cluster.master.metric("asyncllm_pd_retries_total") > retries
    nodes[0] = cluster.start_node(role)
    cluster.wait_for(2, 2)
    cluster.free(*cluster.prefill, *cluster.decode)


def test_a_decode_node_that_is_stopped_writes_into_nothing_when_it_wakes(
    one: Server, cluster: Cluster
) -> None:
    stopped = cluster.decode[0]
    bodies = [long_body(i, 250) for i in range(30, 36)]
    wanted = [one.post(COMPLETIONS, body)["choices"][0]["text"] for body in bodies]
    try:
        got = with_an_accident(
            cluster.master.url, bodies, lambda: stopped.process.send_signal(signal.SIGSTOP)
        )
        assert got == wanted
    finally:
        stopped.process.send_signal(signal.SIGCONT)
    cluster.wait_for(2, 2)
    assert [whole(cluster.master, n) for n in ("greedy", "seeded")] == [
        whole(one, n) for n in ("greedy", "seeded")
    ]
    cluster.free(*cluster.prefill, *cluster.decode)


def test_a_node_that_is_told_to_stop_ends_what_it_has(one: Server, cluster: Cluster) -> None:
    bodies = [long_body(i, 200) for i in range(40, 46)]
    wanted = [one.post(COMPLETIONS, body)["choices"][0]["text"] for body in bodies]
    leaving = cluster.decode.pop()
    retries = cluster.master.metric("asyncllm_pd_retries_total")
    got = with_an_accident(
        cluster.master.url, bodies, lambda: leaving.process.send_signal(signal.SIGTERM)
    )
    assert got == wanted
    assert leaving.process.wait(30) == 0
    assert cluster.master.metric("asyncllm_pd_retries_total") == retries
    cluster.wait_for(2, 1)


def test_what_a_node_does_not_end_in_time_goes_on_elsewhere(one: Server, cluster: Cluster) -> None:
    bodies = [long_body(i, 900) for i in range(100, 104)]
    wanted = [one.post(COMPLETIONS, body)["choices"][0]["text"] for body in bodies]
    leaving = cluster.start_node("decode", "--drain_timeout", "0.1")
    cluster.wait_for(2, 2)
    retries = cluster.master.metric("asyncllm_pd_retries_total")
    got = with_an_accident(
        cluster.master.url, bodies, lambda: leaving.process.send_signal(signal.SIGTERM)
    )
    assert got == wanted
    assert leaving.process.wait(30) == 0
    assert cluster.master.metric("asyncllm_pd_retries_total") > retries
    cluster.wait_for(2, 1)


def test_a_master_that_is_told_to_stop_ends_what_it_has(one: Server, cluster: Cluster) -> None:
    bodies = [long_body(i, 300) for i in range(110, 114)]
    wanted = [one.post(COMPLETIONS, body)["choices"][0]["text"] for body in bodies]
    leaving = cluster.master
    assert (
        with_an_accident(leaving.url, bodies, lambda: leaving.process.send_signal(signal.SIGTERM))
        == wanted
    )
    assert leaving.process.wait(30) == 0
    cluster.free(*cluster.prefill, *cluster.decode)
    cluster.master = cluster.start_master(leaving.port)
    cluster.wait_for(2, 1)


def test_nodes_outlive_their_master(one: Server, cluster: Cluster) -> None:
    """They drop what they did for it, and register with the one that comes in its place."""
    pids = [node.process.pid for node in (*cluster.prefill, *cluster.decode)]
    url, kill = cluster.master.url, cluster.master.process.kill
    with contextlib.suppress(aiohttp.ClientError):  # an HTTP worker still says so in the stream
        (text,) = with_an_accident(url, [long_body(50, 1500)], kill)
        assert text.startswith("error: ")
    cluster.free(*cluster.prefill, *cluster.decode)
    assert wait_until(lambda: not ready(cluster.decode[0]), 5)
    cluster.master = cluster.start_master(cluster.master.port)
    cluster.wait_for(2, 1)
    assert whole(cluster.master, "seeded") == whole(one, "seeded")
    assert [node.process.pid for node in (*cluster.prefill, *cluster.decode)] == pids


@pytest.mark.parametrize("after", [0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3])
def test_a_client_that_leaves_holds_nothing_for_a_second(after: float, cluster: Cluster) -> None:
    """In any phase: while room is found, while the prompt is computed or moved, while tokens come."""

    async def leave() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after):
                await text_of(cluster.master.url, {**long_body(70, 1000), "prompt": TEXT * 15})

    asyncio.run(leave())
    cluster.free(*cluster.prefill, *cluster.decode, timeout_s=1.5)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (("--tp", "2"), ()),
        ((), ("--tp", "2")),
        (("--tp", "2", "--dp", "2"), ("--tp", "2", "--dp", "2", "--httpserver_workers", "2")),
    ],
    ids=["tp 2 to tp 1", "tp 1 to tp 2", "groups"],
)
def test_nodes_may_differ_in_their_ranks(
    prefill: tuple[str, ...], decode: tuple[str, ...], one: Server, tiny_dir: Path, tmp_path: Path
) -> None:
    node = ("--chunked_prefill_size", "64")
    with Cluster(tiny_dir, tmp_path, prefill=[prefill], decode=[decode], node=node) as made:
        for name in REQUESTS:
            got, wanted = whole(made.master, name), whole(one, name)
            assert alike(got, wanted), (name, got, wanted)
        assert made.decode[0].metric("asyncllm_prompt_tokens_computed_total") == 0
        made.free(*made.prefill, *made.decode)


@pytest.mark.parametrize("mode", ["triton_int8kv", "triton_fp8kv"])
def test_k_and_v_in_8_bits_travel_so(mode: str, tiny_dir: Path, tmp_path: Path) -> None:
    args = ("--mode", mode, "--chunked_prefill_size", "64")
    logs = tmp_path / "logs"
    logs.mkdir()
    with Server(tiny_dir, tmp_path / "one", *COMMON, *SLOTS, *args) as alone:
        wanted = {name: whole(alone, name) for name in REQUESTS}
    with Cluster(tiny_dir, logs, node=args) as made:
        for name, answer in wanted.items():
            got = whole(made.master, name)
            assert alike(got, answer, 0.02), (name, got, answer)
        assert made.decode[0].metric("asyncllm_prompt_tokens_computed_total") == 0


def test_a_node_with_another_model_ends_and_names_what_differs(
    tiny_dir: Path, tmp_path: Path, cluster: Cluster
) -> None:
    other = shutil.copytree(tiny_dir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    port = ("--pd_master_port", str(cluster.master.port))
    name = f"pd_master 127.0.0.1:{cluster.master.port}"
    for folder, more, what in (
        (other, (), "config.json"),
        (tiny_dir, ("--max_req_total_len", "1000"), f"is 1000, that of {name}"),
        (tiny_dir, ("--mode", "triton_int8kv"), "K/V layout"),
    ):
        node = Server(folder, tmp_path / "log", "--run_mode", "decode", *COMMON, *port, *more)
        with node.failing():
            assert node.process.wait(60) == 2
            (line,) = (each for each in node.text().splitlines() if "does not take" in each)
            assert what in line
    assert "is not let in: config.json" in cluster.master.text()


def test_a_decode_node_without_room_computes_again_what_it_must(
    tiny_dir: Path, tmp_path: Path, one: Server
) -> None:
    """Eight requests where there is room for two or so: none of them fails behind its first token."""
    short = ("--max_req_total_len", "400")
    decode = ("--max_total_token_num", "600")
    bodies = [long_body(i, 250) for i in range(80, 88)]
    wanted = [one.post(COMPLETIONS, body)["choices"][0]["text"] for body in bodies]
    with Cluster(tiny_dir, tmp_path, decode=[decode], node=short, master=short) as made:

        async def go() -> list[str]:
            return await asyncio.gather(*(text_of(made.master.url, body) for body in bodies))

        assert asyncio.run(go()) == wanted
        assert made.decode[0].metric("asyncllm_preemptions_total") > 0
        assert made.decode[0].metric("asyncllm_prompt_tokens_computed_total") > 0
        made.free(*made.prefill, *made.decode)
