"""Servers of several processes: same answers, shared fate, orderly ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.process import Server, alive, free_port, wait_until

TP2 = ("--tp", "2", "--data_type", "fp32", "--device", "cpu", "--max_total_token_num", "4096")
SMALL = ("--device", "cpu", "--max_total_token_num", "4096")


@pytest.mark.parametrize("zmq_mode", ["ipc:///tmp/", "tcp://"])
def test_tp_2_gives_the_tokens_of_tp_1(
    demo_dir: Path, tmp_path: Path, prose: list[int], zmq_mode: str
) -> None:
    prompts = [prose[:5], prose[100:180]]
    with Server(demo_dir, tmp_path / "one", "--data_type", "fp32", *SMALL) as one:
        want = [one.tokens(p, 8, ignore_eos=True) for p in prompts]
        drawn = one.tokens(prompts[0], 8, ignore_eos=True, do_sample=True, seed=3)
        one.stop()
    with Server(demo_dir, tmp_path / "two", *TP2, "--zmq_mode", zmq_mode) as two:
        children = two.children()
        assert len(children) == 1
        assert [two.tokens(p, 8, ignore_eos=True) for p in prompts] == want
        assert two.tokens(prompts[0], 8, ignore_eos=True, do_sample=True, seed=3) == drawn
        assert two.stop() == 0, two.text()
        assert not alive(children[0])


def test_a_dead_rank_ends_the_server_and_is_named(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *TP2) as server:
        (child,) = server.children()
        os.kill(child, signal.SIGKILL)
        assert server.process.wait(5) == 1
        assert "rank 1" in server.text()
        assert "exit code -9" in server.text()


def test_no_orphans_when_rank_0_is_killed(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *TP2, "--httpserver_workers", "2") as server:
        children = server.children()
        assert len(children) == 2
        server.process.kill()
        server.process.wait()
        assert wait_until(lambda: not any(map(alive, children)), 5)


def test_a_hung_rank_is_ended_by_the_step_timeout(
    demo_dir: Path, tmp_path: Path, prose: list[int]
) -> None:
    with Server(demo_dir, tmp_path / "log", *TP2, "--step_timeout", "2") as server:
        (child,) = server.children()
        os.kill(child, signal.SIGSTOP)
        _send(server, {"prompt": prose[:5], "max_tokens": 8})
        assert server.process.wait(15) == 70
        assert "--step_timeout" in server.text()
        assert "Thread 0x" in server.text()  # stacks
        assert "in flight: step " in server.text()
        assert wait_until(lambda: not alive(child), 5)


def test_http_workers_share_port_and_state(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *SMALL, "--httpserver_workers", "3") as server:
        workers = set()
        for _ in range(60):  # the kernel spreads connections over the processes that listen
            reply = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2})
            assert reply["usage"]["completion_tokens"] == 2
        served = server.metric('asyncllm_http_requests_total{route="/v1/completions",status="200"}')
        assert served == 60
        for pid in server.children():
            workers.add(pid)
        assert len(workers) == 2
        assert server.metric("asyncllm_kv_slots_used") == 0
        assert server.stop() == 0, server.text()
        assert not any(map(alive, workers))


def test_two_servers_side_by_side(demo_dir: Path, tmp_path: Path) -> None:
    with (
        Server(demo_dir, tmp_path / "a", *TP2) as a,
        Server(demo_dir, tmp_path / "b", *SMALL) as b,
    ):
        for server in (a, b):
            assert server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2})["choices"]


def test_sigterm_lets_running_requests_finish(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *SMALL) as server:
        connection = _send(
            server, {"prompt": "Hello", "max_tokens": 40, "stream": True, "ignore_eos": True}
        )
        reply = connection.getresponse()
        first = reply.readline()  # it is running
        server.process.send_signal(signal.SIGTERM)
        rest = first + reply.read()
        assert rest.count(b'"text":') == 41 or rest.endswith(b"data: [DONE]\n\n"), rest[-300:]
        assert b'"finish_reason":"length"' in rest
        assert server.process.wait(10) == 0


def test_second_sigterm_ends_at_once(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *SMALL) as server:
        connection = _send(
            server, {"prompt": "Hello", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        )
        connection.getresponse().readline()
        server.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: "draining" in server.text(), 5)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(10)
        assert time.monotonic() - begin < 8
        connection.close()


def test_drain_timeout_aborts_what_runs(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *SMALL, "--drain_timeout", "1") as server:
        connection = _send(
            server, {"prompt": "Hello", "max_tokens": 3000, "stream": True, "ignore_eos": True}
        )
        reply = connection.getresponse()
        reply.readline()
        server.process.send_signal(signal.SIGTERM)
        rest = reply.read()
        assert b"[DONE]" in rest or b'"error"' in rest
        assert server.process.wait(10) == 0


def test_a_busy_port_is_one_line_and_exit_code_2(demo_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "asyncllm", "--port", str(port), "--model_dir", str(demo_dir)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert done.stderr.count("\n") == 1


def test_check_prints_the_plan_and_exits(demo_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "asyncllm", "--check", "--port", str(free_port()),
         "--model_dir", str(demo_dir), *SMALL],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4,096 slots" in done.stdout
    assert "max_req_total_len = 4096" in done.stdout


def test_an_explicit_limit_above_the_models_is_exit_code_2(demo_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "asyncllm", "--model_dir", str(demo_dir),
         "--port", str(free_port()), "--max_req_total_len", "9000", *SMALL],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "9,000" in done.stderr
    assert "8,192" in done.stderr


def _send(server: Server, body: dict[str, object]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection
