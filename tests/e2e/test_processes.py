"""Servers of several processes: same answers, shared fate, orderly ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgpack
import pytest

from asyncllm.codec import encode
from asyncllm.messages import Drain, Halt
from bench.mkmodel import write_model
from tests.conftest import TINY
from tests.e2e.process import END_S, Server, alive, free_port, wait_until
from tests.raw import offer, raw

Answers = list[list[int]]

TP2 = ("--tp", "2", "--data_type", "fp32", "--device", "cpu", "--max_total_token_num", "4096")
SMALL = ("--device", "cpu", "--max_total_token_num", "4096")


@pytest.fixture(scope="module")
def uneven_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 query and 3 KV heads: half a rank is padding at 2, a whole one at 4."""
    folder = tmp_path_factory.mktemp("model") / "uneven"
    write_model({**TINY, "num_attention_heads": 9, "num_key_value_heads": 3}, folder)
    return folder


@pytest.fixture(scope="module")
def answers(uneven_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What one rank says to two greedy prompts and a drawn one."""
    log = tmp_path_factory.mktemp("alone") / "log"
    with Server(uneven_dir, log, "--data_type", "fp32", *SMALL) as server:
        return ask(server)


def ask(server: Server) -> Answers:
    short = [5, 3, 8, 1, 9]
    greedy = [server.tokens(p, 8, ignore_eos=True) for p in (short, [*range(100, 180)])]
    return [*greedy, server.tokens(short, 8, ignore_eos=True, do_sample=True, seed=3)]


@pytest.mark.parametrize(("tp", "zmq_mode"), [(2, "ipc:///tmp/"), (4, "tcp://")])
def test_tensor_parallel_ranks_give_the_tokens_of_one(
    uneven_dir: Path, tmp_path: Path, answers: Answers, tp: int, zmq_mode: str
) -> None:
    args = (*TP2, "--tp", str(tp), "--zmq_mode", zmq_mode, "--nccl_host", f"127.0.0.{tp}")
    with Server(uneven_dir, tmp_path / "log", *args) as server:
        children = server.children()
        assert len(children) == tp - 1
        send_as_stranger(server, Drain(0.0), Halt())
        hosts = {host for host, _ in server.listeners()}
        assert hosts == {"127.0.0.1", f"127.0.0.{tp}"}  # HTTP, gloo, ZMQ; where ranks meet
        assert ask(server) == answers
        assert server.stop() == 0, server.text()
        assert not any(map(alive, children))


def send_as_stranger(server: Server, *messages: object) -> None:
    """To every port but that of HTTP, as a local process could."""
    for host, port in server.listeners():
        if port != server.port:
            with raw(f"tcp://{host}:{port}", None, linger_ms=200) as sock:
                for msg in messages:
                    offer(sock, bytes(msgpack.packb("watchdog")) + encode(msg))


def test_a_dead_rank_ends_the_server_and_is_named(tiny_dir: Path, tmp_path: Path) -> None:
    with Server(tiny_dir, tmp_path / "log", *TP2) as server:
        (child,) = server.children()
        os.kill(child, signal.SIGKILL)
        assert server.process.wait(END_S) == 1
        assert "rank 1" in server.text()
        assert "exit code -9" in server.text()


def test_no_orphans_when_rank_0_is_killed(tiny_dir: Path, tmp_path: Path) -> None:
    with Server(tiny_dir, tmp_path / "log", *TP2, "--httpserver_workers", "2") as server:
        children = server.children()
        assert len(children) == 2
        server.process.kill()
        server.process.wait()
        assert wait_until(lambda: not any(map(alive, children)), END_S)
        assert "silent" not in server.text()  # which is noticed later


def test_a_hung_rank_is_ended_by_the_step_timeout(tiny_dir: Path, tmp_path: Path) -> None:
    with Server(tiny_dir, tmp_path / "log", *TP2, "--step_timeout", "2") as server:
        (child,) = server.children()
        os.kill(child, signal.SIGSTOP)
        with _asking(server, {"prompt": [3, 4, 5, 6, 7], "max_tokens": 8}):
            assert server.process.wait(END_S) == 70
        assert "rank 0: a step has not ended for " in server.text()
        assert "in flight: step 1: 1 rows (0 decode), 5 tokens" in server.text()
        assert "Thread 0x" in server.text()  # stacks
        assert wait_until(lambda: not alive(child), END_S)


def test_a_rank_that_waits_for_a_hung_leader_ends_itself(
    demo_dir: Path, tmp_path: Path, prose: list[int]
) -> None:
    """Rank 0 is stopped in the midst of a request, goes on later, and finds its follower gone."""
    with Server(demo_dir, tmp_path / "log", *TP2, "--step_timeout", "2") as server:
        (child,) = server.children()
        with _asking(
            server, {"prompt": prose[:5], "max_tokens": 4000, "stream": True, "ignore_eos": True}
        ) as connection:
            connection.getresponse().readline()
            os.kill(server.process.pid, signal.SIGSTOP)
            assert wait_until(lambda: not alive(child), END_S)
            os.kill(server.process.pid, signal.SIGCONT)
            assert server.process.wait(END_S) == 70
        assert "rank 1: a step has not ended for " in server.text()
        assert server.text().count("in flight: step ") >= 1


@contextmanager
def running(server: Server, count: int) -> Iterator[list[http.client.HTTPResponse]]:
    """Streams that have begun and would take long, with the ids r0, r1, ..."""
    connections = [
        http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(count)
    ]
    body = json.dumps({"inputs": "Hi", "parameters": {"max_new_tokens": 600, "ignore_eos": True}})
    try:
        streams = []
        for i, connection in enumerate(connections):
            connection.request("POST", "/generate_stream", body, {"X-Request-Id": f"r{i}"})
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


def test_http_workers_share_port_and_state(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *SMALL, "--httpserver_workers", "3") as server:
        workers = set()
        for _ in range(20):  # the kernel spreads connections over the processes that listen
            reply = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2})
            assert reply["usage"]["completion_tokens"] == 2
        served = 'asyncllm_http_requests_total{route="/v1/completions",status="200"}'
        assert wait_until(
            lambda: server.metric(served) == 20, END_S
        )  # workers tell it a turn later
        with running(server, 6) as streams:  # on any of the processes, as is the abort
            server.post("/abort_request", {"request_id": "r0"})
            assert ending(streams[0]) == "abort"
            server.post("/abort_request", {"abort_all": True})
            assert [ending(stream) for stream in streams[1:]] == ["abort"] * 5
        assert wait_until(lambda: server.metric("asyncllm_kv_slots_used") == 0, END_S)
        for pid in server.children():
            workers.add(pid)
        assert len(workers) == 2
        server.process.send_signal(signal.SIGUSR1)
        shown = ("HTTPworker2", "HTTP worker 2: watchdog: 0 messages wait", "rank 0: scheduler: ")
        assert wait_until(lambda: all(text in server.text() for text in shown), END_S), (
            server.text()
        )
        assert "rank 0: runner: 0 messages wait, busy for " in server.text()
        # stacks of each process
        assert wait_until(lambda: server.text().count("Current thread") == 3, END_S), server.text()
        server.get("/health")
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(END_S) == 0, server.text()
        assert not any(map(alive, workers))


def test_a_child_that_cannot_start_ends_the_server(tiny_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = Server(tiny_dir, log, *TP2)
    with server.failing():
        (child,) = server.first_children(1)
        os.kill(child, signal.SIGKILL)
        assert server.process.wait(60) == 1  # it has yet to import
    assert f"rank 1 (pid {child}) ended with exit code -9: stopping the server" in server.text()
    assert "Traceback" not in server.text()


def test_sigterm_while_loading_ends_it(demo_dir: Path, tmp_path: Path) -> None:
    server = Server(demo_dir, tmp_path / "log", *TP2)
    with server.failing():
        (child,) = server.first_children(1)

        def shown() -> bool:
            """Rank 0 tells a child only once it has started it, which it may be about to do."""
            server.process.send_signal(signal.SIGUSR1)
            said = ("rank 0: starting", "rank 1: starting")
            return wait_until(lambda: all(text in server.text() for text in said), 0.5)

        assert wait_until(shown, 60), server.text()
        assert server.stop(END_S) == 0
        assert not alive(child)
    assert "stopped while starting" in server.text()
    assert "Traceback" not in server.text()


# a rank 0 whose child is given other options than its own, and that tells the child's exit code
MISLED = """
import sys
from dataclasses import replace
from asyncllm import cli
from asyncllm.server.launch import Boot, Children
plain, ended = Boot.to_json, Children._ended
def misled(boot):
    return plain(replace(boot, config=replace(boot.config, max_waiting=7)))
def told(self, pidfd):
    process = self._running[pidfd][1]
    ended(self, pidfd)
    sys.stderr.write(f"the child's exit code: {process.returncode}\\n")
Boot.to_json, Children._ended = misled, told
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("option", "name"), [("--tp", "rank 1"), ("--httpserver_workers", "HTTP worker 1")]
)
def test_processes_that_do_not_fit_end_with_one_line_and_exit_code_2(
    tiny_dir: Path, option: str, name: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MISLED, "--model_dir", str(tiny_dir), "--port", str(free_port()),
         *SMALL, "--data_type", "fp32", option, "2"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "the child's exit code: 2\n" in done.stderr
    line = rf"{name} cannot belong to this server: its --max_waiting is 7, that of rank 0 1024\n"
    assert len(set(re.findall(line, done.stderr))) == 1, done.stderr
    assert len(re.findall(line, done.stderr)) == 2, "once on each side"
    assert "Traceback" not in done.stderr


def test_two_servers_side_by_side(tiny_dir: Path, tmp_path: Path) -> None:
    starting = [
        Server(tiny_dir, tmp_path / name, *SMALL, "--httpserver_workers", "2") for name in "ab"
    ]
    with starting[0] as a, starting[1] as b:
        for server in (a, b):
            assert server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2})["choices"]
        folders = [list(Path("/tmp").glob(f"asyncllm-{s.process.pid}-*")) for s in (a, b)]
        assert [len(found) for found in folders] == [1, 1]
        children = a.children()
        a.process.send_signal(signal.SIGQUIT)
        assert a.process.wait(END_S) == 128 + signal.SIGQUIT
        assert wait_until(lambda: not any(map(alive, children)), END_S)
        assert [found[0].exists() for found in folders] == [False, True]


def test_sigterm_lets_running_requests_finish(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *SMALL) as server:
        body = {"prompt": "Hello", "max_tokens": 40, "stream": True, "ignore_eos": True}
        with _asking(server, body) as connection:
            reply = connection.getresponse()
            first = reply.readline()  # it is running
            server.process.send_signal(signal.SIGTERM)
            rest = first + reply.read()
        assert rest.endswith(b"data: [DONE]\n\n"), rest[-300:]
        assert b'"finish_reason":"length"' in rest
        assert server.process.wait(END_S) == 0


def test_second_sigterm_ends_at_once(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *SMALL) as server:
        body = {"prompt": "Hello", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        with _asking(server, body) as connection:
            reply = connection.getresponse()
            reply.readline()
            server.process.send_signal(signal.SIGTERM)
            assert wait_until(lambda: "draining" in server.text(), END_S)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(END_S) == 0
            with suppress(http.client.IncompleteRead):
                assert b'"length"' not in reply.read()


def test_drain_timeout_aborts_what_runs(demo_dir: Path, tmp_path: Path) -> None:
    with Server(demo_dir, tmp_path / "log", *SMALL, "--drain_timeout", "1") as server:
        body = {"prompt": "Hello", "max_tokens": 3000, "stream": True, "ignore_eos": True}
        with _asking(server, body) as connection:
            reply = connection.getresponse()
            reply.readline()
            server.process.send_signal(signal.SIGTERM)
            rest = reply.read()
        assert b"[DONE]" in rest or b'"error"' in rest
        assert server.process.wait(END_S) == 0


def test_a_busy_port_is_one_line_and_exit_code_2(tiny_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "asyncllm", "--port", str(port), "--model_dir", str(tiny_dir)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_refused_start_of_several_ranks_leaves_no_process(tiny_dir: Path) -> None:
    """Other ranks have been started by then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncllm", "--model_dir", str(tiny_dir), "--eos_id", "320",
         "--port", str(free_port()), *TP2],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--eos_id 320" in said.splitlines()[-1]
    assert "rank 1" not in said
    sessions = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            sessions.add(int(path.read_text().rpartition(")")[2].split()[3]))
    assert os.getsid(0) in sessions
    assert process.pid not in sessions


def test_check_prints_the_plan_and_exits(demo_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "asyncllm", "--check", "--port", str(free_port()),
         "--model_dir", str(demo_dir), *SMALL],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4,096 slots" in done.stdout
    assert "max_req_total_len = 4096" in done.stdout


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--max_req_total_len", "5000"), "5,000 4,096"),
        (("--eos_id", "2", "49152"), "49152"),
    ],
    ids=str,
)
def test_what_the_model_does_not_allow_is_exit_code_2(
    demo_dir: Path, option: tuple[str, ...], words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "asyncllm", "--model_dir", str(demo_dir),
         "--port", str(free_port()), *option, *SMALL],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert option[0] in done.stderr
    assert all(word in done.stderr for word in words.split())


@contextmanager
def _asking(server: Server, body: dict[str, object]) -> Iterator[http.client.HTTPConnection]:
    """A connection with a completion on its way; leaving closes it."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        yield connection
    finally:
        connection.close()
