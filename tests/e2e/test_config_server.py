"""A config_server with masters and nodes, and ranks that meet at it, in processes of their own."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.answers import REQUESTS, alike, ready, whole
from tests.e2e.process import END_S, START_S, Server, free_port, stream_text, wait_until

COMMON = ("--device", "cpu", "--running_max_req_size", "8", "--max_req_total_len", "1024")
NODE = (*COMMON, "--max_total_token_num", "2048")
IDS = [5, 6, 7, 8, 9]
LONG = {"max_tokens": 400, "temperature": 0, "ignore_eos": True}
HOST = "127.0.0.9"  # of the config_server
SOON_S = 15.0  # what is promised within 5 s, on a machine that is busy


class Site:
    """A config_server, and what belongs to it."""

    def __init__(self, model_dir: Path, logs: Path, stack: ExitStack) -> None:
        self.model_dir, self.logs, self.stack, self.started = model_dir, logs, stack, 0
        self.port = free_port()
        self.there = ("--config_server_host", HOST, "--config_server_port", str(self.port))
        self.meets = ("--use_config_server_to_init_nccl", "--nccl_host", HOST, *self.there)
        self.server = self.start_config_server()

    def begin(self) -> None:
        """Start all, and wait until both masters have both nodes."""
        self.one, self.two = self.start_master("127.0.0.2"), self.start_master("127.0.0.3")
        self.prefill = self.start_node(
            "prefill", "--tp", "2", *self.meets, "--nccl_port", str(free_port())
        )
        self.decode = self.start_node("decode")
        both = {address(self.prefill), address(self.decode)}
        found = wait_until(lambda: nodes_of(self.one) == nodes_of(self.two) == both, START_S)
        assert found, self.text()

    def start(self, *args: str) -> Server:
        self.started += 1
        server = Server(self.model_dir, self.logs / f"{self.started}", *args)
        self.stack.enter_context(server.failing())
        return server

    def start_config_server(self) -> Server:
        server = self.start("--run_mode", "config_server", *self.there, "--port", str(self.port))
        server.url = f"http://{HOST}:{self.port}"
        return server

    def start_master(self, host: str) -> Server:
        """On an address of its own, where no port is taken."""
        master = self.start("--run_mode", "pd_master", *COMMON, *self.there, "--host", host)
        master.host, master.url = host, f"http://{host}:{master.port}"
        return master

    def start_node(self, role: str, *more: str) -> Server:
        return self.start("--run_mode", role, *NODE, *self.there, *more)

    def objects(self) -> dict[str, Any]:
        with suppress(urllib.error.URLError, ConnectionError):
            return dict(json.loads(self.server.get("/registered_objects")))
        return {"pd_masters": [], "nodes": [], "groups": []}

    def masters(self) -> set[str]:
        return {str(each["address"]) for each in self.objects()["pd_masters"]}

    def text(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text()}" for p in sorted(self.logs.iterdir()))


@pytest.fixture(scope="module")
def site(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two masters, a prefill node of two ranks that meet at the config_server, a decode node."""
    with ExitStack() as stack:
        made = Site(tiny_dir, tmp_path_factory.mktemp("logs"), stack)
        made.begin()
        yield made


def nodes_of(master: Server) -> set[str]:
    """Those that take requests of a master."""
    with suppress(urllib.error.URLError, ConnectionError):
        rows = json.loads(master.get("/pd_nodes"))
        return {row["address"] for row in rows if row["state"] == "serving"}
    return set()


def address(server: Server) -> str:
    return f"{server.host}:{server.port}"


def error_of(server: Server, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and message of an answer that is an error."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.get(path) if body is None else server.post(path, body)
    with caught.value as error:
        return error.code, str(json.loads(error.read())["error"]["message"])


def streamed(server: Server, body: dict[str, Any], meanwhile: Callable[[], object]) -> list[str]:
    """Finish reasons of a completion during which something else is done."""

    async def go() -> list[str]:
        reasons, first = [], True
        async with aiohttp.ClientSession() as session:
            url = f"{server.url}/v1/completions"
            async for chunk in stream_text(session, url, {"prompt": IDS, **body}):
                if first:
                    first = False
                    await asyncio.to_thread(meanwhile)
                reasons += [c["finish_reason"] for c in chunk["choices"] if c["finish_reason"]]
        return reasons

    return asyncio.run(asyncio.wait_for(go(), 60))


def test_a_config_server_needs_no_model_and_tells_who_is_there(site: Site) -> None:
    for path in ("/health", "/healthz", "/ping", "/liveness", "/readiness", "/version"):
        assert site.server.get(path)
    told = json.loads(site.server.get("/cluster"))
    assert [*told] == ["port"]
    port = told["port"]
    assert ("127.0.0.9", port) in site.server.listeners()
    assert 'asyncllm_members{role="pd_master"} 2.0' in site.server.get("/metrics")
    status, message = error_of(site.server, "/v1/models")
    assert (status, message) == (
        404, "there is nothing at /v1/models: this is a config_server; send requests to a pd_master"
    )  # fmt: skip
    told = site.objects()
    one = next(m for m in told["pd_masters"] if m["address"] == address(site.one))
    assert (one["channel_host"], one["channel_port"]) == (site.one.host, site.one.port + 1)
    assert len(one["id"]) == 16
    age = datetime.now(UTC) - datetime.fromisoformat(one["since"])
    assert timedelta(seconds=-2) < age < timedelta(minutes=10)
    assert {n["address"] for n in told["nodes"]} == {address(site.prefill), address(site.decode)}
    (group,) = told["groups"]
    assert group["owner"] == f"prefill {address(site.prefill)}"
    assert (HOST, group["nccl_port"]) in site.server.listeners()


def test_nodes_serve_all_masters_and_say_where_these_are(site: Site) -> None:
    both = [server.tokens(IDS, 12) for server in (site.one, site.two)]
    assert both[0] == both[1]
    assert len(both[0]) == 12
    status, message = error_of(site.decode, "/v1/completions", {"prompt": IDS})
    assert status == 400
    assert address(site.one) in message
    assert address(site.two) in message


@pytest.mark.cluster
def test_both_masters_answer_as_one_server(site: Site, tmp_path: Path) -> None:
    with Server(site.model_dir, tmp_path / "one", *NODE) as alone:
        for name in REQUESTS:
            wanted = whole(alone, name)
            for master in (site.one, site.two):
                got = whole(master, name)
                assert alike(got, wanted), (name, got, wanted)
    assert site.decode.metric("asyncllm_prompt_tokens_computed_total") == 0


def test_a_stored_response_is_at_one_master_and_others_say_at_which(site: Site) -> None:
    body = {"input": "abc", "max_output_tokens": 2, "model": "tiny"}
    made = str(site.one.post("/v1/responses", body)["id"])
    assert json.loads(site.one.get(f"/v1/responses/{made}"))["id"] == made
    there = f"the pd_master at {address(site.one)}"
    status, message = error_of(site.two, f"/v1/responses/{made}")
    assert status == 404
    assert there in message
    status, message = error_of(site.two, "/v1/responses", {**body, "previous_response_id": made})
    assert status == 400
    assert there in message
    assert "pd_master" not in error_of(site.two, "/v1/responses/resp_0123456789abcdef")[1]
    site.one.post("/v1/responses", {**body, "previous_response_id": made})


def test_an_abort_reaches_its_request_behind_any_master(site: Site) -> None:
    async def go() -> list[str]:
        headers = {"X-Request-Id": "mine"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            aiohttp.ClientSession() as other,
        ):
            reasons: list[str] = []
            url, body = f"{site.one.url}/v1/completions", {"prompt": IDS, **LONG}
            async for chunk in stream_text(session, url, body):
                if not reasons:
                    abort = {"request_id": "mine"}
                    async with other.post(f"{site.two.url}/abort_request", json=abort) as reply:
                        assert reply.status == 200, await reply.text()
                reasons += [c["finish_reason"] for c in chunk["choices"] if c["finish_reason"]]
            return reasons

    assert asyncio.run(asyncio.wait_for(go(), 60)) == ["abort"]


def test_two_nodes_meet_at_the_config_server_and_a_port_is_one_servers(site: Site) -> None:
    """The first node is found there too; it need not be on the same machine. When it is killed the
    other one ends, and the port is free."""
    port, meeting, messages = free_port(), free_port(), free_port()
    more = ("--tp", "2", *site.meets, "--nccl_port", str(port), "--nnodes", "2")
    more += ("--multinode_httpmanager_port", str(meeting))
    more += ("--multinode_router_gloo_port", str(messages))
    first, second = (site.start(*NODE, *more, "--node_rank", str(i)) for i in range(2))
    assert wait_until(lambda: len(site.objects()["groups"]) == 2, START_S), site.text()
    owner = next(g["owner"] for g in site.objects()["groups"] if g["nccl_port"] == port)
    assert owner == f"normal {address(first)}"
    other = subprocess.run(
        [sys.executable, "-m", "asyncllm", "--port", "8999", "--model_dir", str(site.model_dir),
         *NODE, *more[:-4], "--nnodes", "1"],
        capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip
    assert other.returncode == 2, f"{other.stderr}\n{site.text()}"
    assert f"port {port} of the config_server" in other.stderr
    assert f"the ranks of normal {address(first)} meet there (--nccl_port)" in other.stderr
    with first:
        assert first.tokens(IDS, 12) == site.one.tokens(IDS, 12)
        first.process.kill()
        assert second.process.wait(END_S) == 1
        assert "node 0 (127.0.0.1) has gone: its connection was closed" in second.text()
    assert wait_until(lambda: len(site.objects()["groups"]) == 1, SOON_S)


# -- what goes away, as in the table of docs/operations.md ---------------------------------------


def test_a_config_server_that_dies_is_missed_by_nobody_and_learns_all_anew(site: Site) -> None:
    def restart() -> None:
        site.server.process.kill()
        site.server.process.wait()
        assert wait_until(lambda: not told(site.two), SOON_S)
        assert site.one.tokens(IDS, 2)
        site.server = site.start_config_server()
        assert wait_until(lambda: ready(site.server), START_S), site.text()
        there = {address(site.one), address(site.two)}
        assert wait_until(lambda: site.masters() == there, SOON_S), site.text()

    def told(server: Server) -> bool:
        """Whether an abort reaches the other masters as well."""
        try:
            return server.post("/abort_request", {"request_id": "nobody"}) == {"success": True}
        except urllib.error.HTTPError as error:
            with error:
                return not (error.code == 503 and b"config_server is away" in error.read())

    assert told(site.two)
    assert streamed(site.one, LONG, restart) == ["length"]
    assert wait_until(lambda: told(site.two), SOON_S)
    both = {address(site.prefill), address(site.decode)}
    assert nodes_of(site.one) == nodes_of(site.two) == both  # of the same processes

    def owners() -> set[object]:
        return {g["owner"] for g in site.objects()["groups"]}

    assert wait_until(lambda: owners() == {f"prefill {address(site.prefill)}"}, SOON_S), owners()


def test_a_master_that_stops_is_gone_and_comes_back(site: Site) -> None:
    both = {address(site.prefill), address(site.decode)}
    site.two.process.send_signal(signal.SIGSTOP)
    try:
        assert wait_until(lambda: site.masters() == {address(site.one)}, SOON_S)
        assert site.one.tokens(IDS, 2)
    finally:
        site.two.process.send_signal(signal.SIGCONT)
    assert wait_until(lambda: len(site.masters()) == 2, SOON_S)
    assert wait_until(lambda: nodes_of(site.two) == both, SOON_S)


def test_a_master_that_is_killed_is_forgotten_and_another_takes_its_place(site: Site) -> None:
    both = {address(site.prefill), address(site.decode)}
    site.two.process.kill()
    assert wait_until(lambda: site.masters() == {address(site.one)}, SOON_S)
    third = site.start_master("127.0.0.4")
    assert wait_until(lambda: nodes_of(third) == both, START_S), site.text()
    assert third.tokens(IDS, 12) == site.one.tokens(IDS, 12)
