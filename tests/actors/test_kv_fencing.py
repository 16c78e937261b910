"""A peer that was stopped in the middle of a transfer, and goes on when its slots are another's."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import monotonic

import pytest

from asyncllm.actors.kv_receiver import KvReceiver
from asyncllm.actors.kv_thread import TransferThread, TransferTimeouts
from asyncllm.core.kv_clock import PauseAwareClock
from asyncllm.messages import ExportKv, ImportKv
from tests.actors.kv_rig import KEYS, NUM_SLOTS, WAIT_S, Rig, Size

WAYS = ["tcp", "p2p", "nccl"]
ALL = array("i", range(NUM_SLOTS))
# one page has everything: more than sockets and their queues hold
SIZE = Size(dim=1 << 14, tokens=NUM_SLOTS, pages=2)


class Child:
    """A rank in another process, see ``kv_child``."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.actors.kv_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._read = b""
        keys, size = (KEYS.public, KEYS.secret), (SIZE.dim, SIZE.tokens, SIZE.pages)
        self.tell({"keys": keys, "size": size})

    def tell(self, what: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, begin: str, meanwhile: Callable[[], object] = lambda: None) -> str:
        """The rest of the next line that begins so."""
        assert self.process.stdout is not None
        fd, end = self.process.stdout.fileno(), monotonic() + WAIT_S
        while monotonic() < end:
            line, found, rest = self._read.partition(b"\n")
            if found:
                self._read = rest
                assert not line.startswith(b"failed"), line
                if line.startswith(begin.encode()):
                    return line.decode()[len(begin) :].strip()
                continue
            meanwhile()
            if select.select([fd], [], [], 0.01)[0]:
                more = os.read(fd, 1 << 16)
                assert more, "it has ended"
                self._read += more
        raise AssertionError(f"it has not said {begin!r}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Time:
    """Passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def lapse(self, thread: TransferThread) -> None:
        for _ in range(20):
            self.now += 0.4
            thread.turn(0)


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    made = Child()
    yield made
    made.end()


@pytest.fixture
def scene(child: Child, request: pytest.FixtureRequest) -> Iterator[tuple[Child, Rig, Time]]:
    """The one that will be stopped, those who go on, and the time that is theirs."""
    role, transport = request.param
    child.tell(["be", role, transport])
    rig = Rig(
        names=((transport,), (transport,)),
        size=SIZE,
        times=TransferTimeouts(lapse_s=4.0, first_s=1e9),
    )
    time = Time()
    for thread in rig.threads:
        thread.clock = PauseAwareClock(0.5, time)
    yield child, rig, time
    child.go_on()
    rig.close()


def come(thread: TransferThread) -> None:
    """Wait until something has come that a turn would read, or a little."""
    thread.poller.poll(50)


def stopped_when(child: Child, thread: TransferThread, reached: Callable[[], bool]) -> None:
    """Turn after turn, while the other side stands still; it stays so when that is reached."""
    end, pause = monotonic() + WAIT_S, threading.Event()
    while True:
        assert monotonic() < end
        come(thread)
        pause.wait(0.01)  # for the other side to get anywhere
        child.stop()
        thread.turn(0)
        if reached():
            return
        child.go_on()


def fetches(rig: Rig) -> bool:
    """Whether the receiver reads the sender's pages."""
    receiver = rig.receivers[0].thread
    assert isinstance(receiver, KvReceiver)
    return receiver._transports.names == ("p2p",)


@pytest.mark.parametrize(
    "scene", [("sender", transport) for transport in WAYS], indirect=True, ids=WAYS
)
def test_slots_given_to_others_are_out_of_reach_of_a_stopped_sender(
    scene: tuple[Child, Rig, Time],
) -> None:
    child, rig, time = scene
    receiver = rig.receivers[0]
    assert isinstance(receiver.thread, KvReceiver)
    senders = receiver.thread.senders
    receiver.thread.put([ImportKv(77, 0, NUM_SLOTS, ALL)])
    receiver.thread.turn(0)
    child.tell(["export", 5, 77, receiver.thread.port])
    if fetches(rig):  # nothing is asked for: it is stopped before it has said what is where
        stopped_when(child, receiver.thread, lambda: bool(senders))
    else:  # it has been asked for the page, and is stopped when that has begun to come
        stopped_when(child, receiver.thread, lambda: receiver.thread.pool.free < SIZE.pages)
        child.go_on()
        come(receiver.thread)
        child.stop()
        receiver.thread.turn(0)
    time.lapse(receiver.thread)
    assert len(rig.lapsed(77)) == 1
    assert not rig.arrived(77)
    # the same slots for another request, which comes from somebody else
    rig.begin(6, 78, ALL)
    rig.computed(6, 0, 0, ALL)
    rig.until(lambda: rig.arrived(78))
    assert rig.matches(ALL, ALL)
    child.go_on()
    child.hear("told KvSent 5", lambda: rig.turns(1))
    rig.turns(50)
    assert rig.matches(ALL, ALL)
    assert not rig.arrived(77)


@pytest.mark.parametrize(
    "scene", [("receiver", transport) for transport in WAYS], indirect=True, ids=WAYS
)
def test_a_stopped_receiver_does_not_take_what_its_sender_has_for_others(
    scene: tuple[Child, Rig, Time],
) -> None:
    child, rig, time = scene
    port = int(child.hear("port"))
    child.tell("slots")
    before = child.hear("slots")
    child.tell(["import", 77])
    sender = rig.senders[0].thread
    to = rig.to(77, 0, NUM_SLOTS)
    sender.put([ExportKv(5, replace(to, addresses=(f"tcp://127.0.0.1:{port}",)))])
    rig.computed(5, 0, 0, ALL)
    sender.turn(0)
    stopped_when(child, sender, lambda: sender.counts.sent_pages > 0)
    time.lapse(sender)
    assert rig.sent(5) == [[0]]
    announced = hashlib.sha256(b"".join(rig.senders[0].slots())).hexdigest()
    # the same slots, and the same page if it is free, for another request
    for x in (x for layer in rig.senders[0].kv for x in layer):
        x.add_(1)
    rig.begin(6, 78, ALL)
    rig.computed(6, 0, 0, ALL)
    rig.until(lambda: rig.arrived(78))
    child.go_on()
    said = child.hear("told", lambda: rig.turns(1))
    child.tell("slots")
    # a communicator may have had the page on its way; it is not free before that is over. It may
    # have been written when its sender's end is heard of: slots are free after "TransferFailed",
    # not before. What was fetched too late is in them then, and nobody reads them
    after = {"TransferFailed 77": (before, announced), "KvArrived 77": (announced,)}
    found = child.hear("slots")
    assert found in after[said] or (said, fetches(rig)) == ("TransferFailed 77", True)
