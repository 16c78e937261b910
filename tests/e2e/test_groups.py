"""Servers of several data-parallel groups: the answers of one, and one server to all outside."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.process import END_S, Server, alive, wait_until
from tests.models.harness import Driver, Sequence, make_device

CPU = ("--device", "cpu", "--data_type", "fp32", "--max_total_token_num", "6000")
GROUPS = (*CPU, "--tp", "2", "--dp", "2")
PROMPTS = [[random.Random(i).randrange(256) for _ in range(20 + 10 * i)] for i in range(6)]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}

Answers = list[Any]


def ask(server: Server) -> Answers:
    """Greedy, drawn, and with several choices; all at once."""
    asked: list[dict[str, Any]] = [{"prompt": ids, "temperature": 0} for ids in PROMPTS]
    asked += [{"prompt": ids, "temperature": 1, "seed": 7, "n": 2} for ids in PROMPTS[:3]]
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    asked += [{"prompt": i, "temperature": 0, "response_format": form} for i in PROMPTS[:3]]
    stopped = server.complete(PROMPTS[0], 12, ignore_eos=True)["choices"][0]["text"]
    asked += [{"prompt": PROMPTS[0], "temperature": 0, "stop": [stopped[6:8]]}]
    common = {"max_tokens": 12, "logprobs": 0}

    def answer(body: dict[str, Any]) -> list[Any]:
        ends = {} if "response_format" in body else {"ignore_eos": True}
        choices = server.post("/v1/completions", {**common, **ends, **body})["choices"]
        return [(c["text"], c["logprobs"]["tokens"], c["finish_reason"]) for c in choices]

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(answer, asked))


@pytest.fixture(scope="module")
def answers(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What one rank says; the name of a decode kernel changes nothing on a CPU."""
    kernel = ("--mode", "ppl_fp16")
    with Server(tiny_dir, tmp_path_factory.mktemp("alone") / "log", *CPU, *kernel) as server:
        found = ask(server)
    assert found[-1][0][2] == "stop"
    return found


@contextmanager
def running(server: Server, count: int, tokens: int) -> Iterator[list[http.client.HTTPResponse]]:
    """Streams that have begun."""
    connections = [
        http.client.HTTPConnection(server.host, server.port, timeout=60) for _ in range(count)
    ]
    body = {"inputs": "", "parameters": {"max_new_tokens": tokens, "ignore_eos": True}}
    try:
        streams = []
        for i, connection in enumerate(connections):
            body["inputs"] = f"number {i} says"
            connection.request("POST", "/generate_stream", json.dumps(body))
            streams.append(connection.getresponse())
            assert streams[-1].readline().startswith(b"data:")
        yield streams
    finally:
        for connection in connections:
            connection.close()


def ending(stream: http.client.HTTPResponse) -> str:
    """Why a stream ended, from its last event."""
    event = stream.read().split(b"\n\n")[-2].strip()
    return str(json.loads(event.removeprefix(b"data:"))["finish_reason"])


def of_groups(server: Server, name: str) -> list[float]:
    return [server.metric(f'asyncllm_group_{name}{{group="{group}"}}') for group in (0, 1)]


def test_groups_share_one_port_and_answer_as_one(
    tiny_dir: Path, tmp_path: Path, answers: Answers
) -> None:
    """Through another process that serves HTTP too; requests, aborts and the end reach all groups."""
    with Server(tiny_dir, tmp_path / "log", *GROUPS, "--httpserver_workers", "2") as server:
        children = server.children()
        assert ask(server) == answers
        assert ask(server) == answers  # with what is cached
        assert min(of_groups(server, "steps_total")) > 10
        assert min(of_groups(server, "kv_slots_cached")) > 100
        assert min(of_groups(server, "prefix_hit_tokens_total")) > 50
        slots = of_groups(server, "kv_slots_total")
        assert slots == [6000, 6000]
        assert server.metric("asyncllm_kv_slots_total") == 12000
        with running(server, 4, 2000) as streams:
            assert of_groups(server, "requests_running") == [2, 2]
            load = json.loads(server.get("/token_load"))
            assert all(0 < share < 1 for share in load["current_load"])
            assert len(load["logical_max_load"]) == 2
            server.post("/abort_request", {"abort_all": True})
            assert [ending(stream) for stream in streams] == ["abort"] * 4
        assert wait_until(lambda: of_groups(server, "kv_slots_used") == [0, 0], END_S)
        with running(server, 4, 60) as streams:
            server.process.send_signal(signal.SIGTERM)
            assert [ending(stream) for stream in streams] == ["length"] * 4
        assert server.process.wait(END_S) == 0, server.text()
        assert not any(map(alive, children))
        assert "foreign frame" not in server.text()
        assert "dead letter" not in server.text()


def alone(model_dir: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """A greedy answer of one rank, without a server."""
    device = make_device(model_dir, "fp32", "cpu", num_slots=1000)
    sequence = Sequence(0, prompt)
    Driver(device, 1000).generate([sequence], num_tokens)
    device.close()
    return sequence.outputs


def test_groups_that_share_experts_step_together_and_end_together(
    tiny_experts_dir: Path, tmp_path: Path
) -> None:
    want = [alone(tiny_experts_dir, prompt, 12) for prompt in PROMPTS]
    with Server(tiny_experts_dir, tmp_path / "log", *GROUPS) as server:
        (child,) = server.children()
        # one request at a time: the other group has no rows
        one_by_one = [server.tokens(ids, 12, ignore_eos=True) for ids in PROMPTS]
        assert one_by_one == want
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            together = pool.map(lambda ids: server.tokens(ids, 12, ignore_eos=True), PROMPTS)
            assert [*together] == want
        assert min(of_groups(server, "kv_slots_cached")) > 100
        assert min(of_groups(server, "generated_tokens_total")) >= 12
        first, second = of_groups(server, "steps_total")
        assert first == second >= 6 * 12
        assert of_groups(server, "steps_total") == [first, first], "nobody steps without need"
        with running(server, 2, 2000) as streams:
            assert of_groups(server, "requests_running") == [1, 1]
            os.kill(child, signal.SIGKILL)
            assert [b"server has failed" in stream.read() for stream in streams] == [True, True]
        assert server.process.wait(END_S) == 1
        assert f"rank 1 (pid {child}) ended with exit code -9" in server.text()


@pytest.mark.cluster
def test_a_group_one_of_whose_ranks_hangs_is_ended_by_the_step_timeout(
    tiny_dir: Path, tmp_path: Path
) -> None:
    """Its leader waits for the hung one and ends; the rest serves on. Silence would be noticed much
    later."""
    args = (*CPU, "--tp", "4", "--dp", "2", "--dp_balancer", "round_robin", "--dead_after", "60")
    with Server(tiny_dir, tmp_path / "log", *args, "--step_timeout", "2") as server:
        _, leader, hung = server.children()
        with running(server, 4, 1500) as streams:
            os.kill(hung, signal.SIGSTOP)
            ends = [stream.read() for stream in streams]
        lost = [end for end in ends if b"group_lost" in end]
        assert len(lost) == 2
        said = f"rank 2 (pid {leader}) ended with exit code 70"
        assert all(said.encode() in end for end in lost)
        assert sum(b'"finish_reason":"length"' in end for end in ends) == 2
        assert "rank 2: a step has not ended for " in server.text()
        assert json.loads(server.get("/readiness")) == {"status": "ok", "lost_groups": [1]}
        assert wait_until(lambda: not any(map(alive, (leader, hung))), END_S)
        want = [alone(tiny_dir, prompt, 12) for prompt in PROMPTS[:2]]
        assert [server.tokens(ids, 12, ignore_eos=True) for ids in PROMPTS[:2]] == want
        assert server.stop() == 0, server.text()


def test_a_group_that_is_lost_takes_nothing_with_it_but_what_it_has_begun(
    tiny_dir: Path, tmp_path: Path
) -> None:
    """One is killed, one is stopped; the last one serves on, through another process too."""
    args = (*CPU, "--tp", "3", "--dp", "3", "--dp_balancer", "round_robin", "--dead_after", "4")
    want = [alone(tiny_dir, prompt, 12) for prompt in PROMPTS]
    with Server(tiny_dir, tmp_path / "log", *args, "--httpserver_workers", "2") as server:
        killed, stopped, _ = server.children()
        with running(server, 6, 500) as streams:
            os.kill(killed, signal.SIGKILL)
            ends = [stream.read() for stream in streams]
        lost = [end for end in ends if b"group_lost" in end]
        assert len(lost) == 2
        assert all(f"rank 1 (pid {killed}) ended with".encode() in end for end in lost)
        assert sum(b'"finish_reason":"length"' in end for end in ends) == 4
        assert json.loads(server.get("/readiness")) == {"status": "ok", "lost_groups": [1]}
        assert json.loads(server.get("/health"))["lost_groups"] == [1]
        os.kill(stopped, signal.SIGSTOP)
        with ThreadPoolExecutor(len(PROMPTS)) as pool:  # those that it is given are begun again
            got = pool.map(lambda ids: server.tokens(ids, 12, ignore_eos=True), PROMPTS)
            assert [*got] == want
        up = [server.metric(f'asyncllm_group_up{{group="{group}"}}') for group in range(3)]
        assert up == [1, 0, 0]
        form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
        answer = server.complete(PROMPTS[0], 40, response_format=form)["choices"][0]
        assert answer["text"].startswith('{"a": '), "all leaders that live have compiled it"
        assert json.loads(server.get("/token_load"))["current_load"][1:] == [1, 1]
        assert server.stop() == 0, server.text()
        assert "rank 2 has been silent for" in server.text()
        assert "group 2 is lost: rank 2" in server.text()
        assert not any(map(alive, (killed, stopped)))
