"""Signals, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

LEADER = """
import sys, threading, logging
from asyncllm.server import signals
logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
signals.hold()
watch = signals.SignalWatcher("rank 0", leads=True)
watch.state = lambda: ["runner: 3 messages wait"]
print([int(n) for n in signals.draining()], flush=True)
threading.Event().wait(60)
"""
# one that holds the main thread, as a hung loop does, and that was started like a child
CHILD = """
import sys, subprocess
from asyncllm.server import signals
signals.hold()
code = '''
import sys, threading
from asyncllm.server import signals
sys.stdin.readline()  # loads; a signal may come already
signals.leave_to_leader()
watch = signals.SignalWatcher("rank 1", leads=False)
print("child", flush=True)
threading.Event().wait(60)
'''
with signals.for_child():
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
print(child.pid, flush=True)
child.communicate(sys.stdin.readline().encode())
"""


@contextmanager
def process(code: str, *, nohup: bool = False) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    running = subprocess.Popen(
        ["nohup", *command] if nohup else command, env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with running:
        try:
            yield running
        finally:
            running.kill()


def line(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def logged(running: subprocess.Popen[str], words: str) -> list[str]:
    """Lines of the log up to one with ``words``."""
    assert running.stderr is not None
    lines = []
    while not lines or words not in lines[-1]:
        lines.append(running.stderr.readline())
        assert lines[-1], lines
    return lines


def test_sigusr1_shows_stacks_and_state_at_any_level_and_ends_nothing() -> None:
    with process(LEADER) as running:
        line(running)
        for _ in range(2):
            running.send_signal(signal.SIGUSR1)
            text = "".join(logged(running, "rank 0: runner: 3 messages wait"))
            assert "rank 0: stacks of all threads" in text
            assert "in <module>" in text  # the main thread's
        assert running.poll() is None


@pytest.mark.parametrize("name", ["SIGQUIT", "SIGUSR2", "SIGALRM", "SIGPROF", "SIGRTMIN"])
def test_other_signals_end_a_leader_in_its_own_way(name: str) -> None:
    number = getattr(signal, name)
    with process(LEADER) as running:
        line(running)
        running.send_signal(number)
        logged(running, f"rank 0: stopped at once by {name}")
        assert running.wait(20) == 128 + number


@pytest.mark.parametrize("nohup", [False, True])
def test_a_hang_up_drains_unless_it_was_ignored(nohup: bool) -> None:
    with process(LEADER, nohup=nohup) as running:
        numbers = [signal.SIGTERM, signal.SIGINT] + [signal.SIGHUP] * (not nohup)
        assert line(running) == str([int(n) for n in numbers])


def test_signals_to_the_group_do_not_end_a_child_even_while_it_loads() -> None:
    with process(CHILD) as running:
        pid = int(line(running))
        try:
            assert running.stdin is not None
            group = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
            for number in (*group, signal.SIGUSR1):
                os.kill(pid, number)
            running.stdin.write("\n")
            running.stdin.flush()
            assert line(running) == "child"
            for number in group:
                os.kill(pid, number)
            logged(running, "rank 1: stacks of all threads")
            logged(running, "rank 1: starting")
        finally:
            os.kill(pid, signal.SIGKILL)


def test_a_child_ends_by_other_signals_as_any_process_does() -> None:
    with process(CHILD) as running:
        pid = int(line(running))
        assert running.stdin is not None
        running.stdin.write("\n")
        running.stdin.flush()
        assert line(running) == "child"
        os.kill(pid, signal.SIGUSR2)
        assert running.wait(20) == 0  # it waits for its child


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("args", [[], ["--check"]], ids=str)
def test_a_server_that_is_still_being_imported_can_be_stopped(name: str, args: list[str]) -> None:
    """The signal comes when torch is looked for."""
    source = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, module, *_):\n"
        f"        if module == 'torch': os.kill(os.getpid(), {int(getattr(signal, name))})\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from asyncllm.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source, *args], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == (128 + getattr(signal, name) if args else 0)
    assert done.stderr == f"asyncllm: stopped while starting, by {name}\n"


def test_what_would_crash_when_the_interpreter_is_torn_down_does_not_change_the_exit_code() -> None:
    source = (
        "import atexit, logging, os, sys\n"
        "from asyncllm.server import signals\n"
        "atexit.register(os.abort)\n"
        "sys.stdout.write('said')\n"
        "signals.end(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, b"said")
