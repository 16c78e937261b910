"""What comes from a peer that has the keys and is none of ours ends its connection, nothing else."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import zmq
from torch import Tensor

from asyncllm.actors import kv_thread
from asyncllm.actors.kv_receiver import MOST_RANKS, KvReceiver
from asyncllm.actors.kv_sender import KvSender
from asyncllm.actors.kv_thread import FRAME_LIMIT, PIECE, TransferTimeouts
from asyncllm.actors.transport import CurveKeys, known_to, protected
from asyncllm.codec import Message, decode, encode
from asyncllm.engine.kv_pages import CpuPages
from asyncllm.messages import CancelTransfer, ExportKv, ImportKv
from asyncllm.messages.transfer import (
    EpochClosed,
    EpochOpened,
    PageAnnounced,
    PageBytes,
    PageFilled,
    PageReceived,
    PullPage,
    SenderAdmitted,
    SenderHello,
    StoreValue,
    TransferHeartbeat,
    TransferRefused,
)
from asyncllm.records import KvDestination, KvWireFormat
from tests.actors.kv_rig import KEYS, NODE, NUM_SLOTS, WAIT_S, Rig, Size
from tests.raw import Sockets

SLOTS = array("i", range(20, 31))
MORE = array("i", range(40, 51))


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


@pytest.fixture
def ctx() -> Iterator[Sockets]:
    with Sockets() as made:
        yield made


class Caught:
    """Somebody who has connected to a receiver, and says whatever the test wants."""

    def __init__(self, rig: Rig, ctx: Sockets) -> None:
        self.rig, self.sock = rig, ctx.socket(zmq.DEALER)
        known_to(self.sock, KEYS)
        receiver = rig.receivers[0].thread
        assert isinstance(receiver, KvReceiver)
        self.sock.connect(f"tcp://127.0.0.1:{receiver.port}")

    def say(self, *msgs: Message | bytes | list[bytes]) -> None:
        for msg in msgs:
            frames = [encode(msg)] if isinstance(msg, Message) else msg
            self.sock.send_multipart(frames if isinstance(frames, list) else [frames])

    def hear(self) -> list[Message]:
        """All that has been answered."""
        found = []
        while self.sock.poll(0):
            found.append(decode(self.sock.recv()))
        return found

    def until(self, kind: type[Message]) -> Message:
        """The next answer of this kind."""
        got: list[Message] = []
        self.rig.until(lambda: got.extend(self.hear()) or any(type(m) is kind for m in got))
        return next(m for m in got if type(m) is kind)


def caller(rig: Rig, **changes: object) -> SenderHello:
    wire = rig.senders[0].share.wire
    made = SenderHello(node=NODE, name="x", wire=wire, rank=0, transports=("tcp",), machine="m")
    return replace(made, **changes)  # type: ignore[arg-type]


def expects(rig: Rig, epoch: int = 77) -> None:
    rig.receivers[0].thread.put([ImportKv(epoch, 0, len(SLOTS), SLOTS)])


READY = PageAnnounced(number=1, epoch=77, first=0, count=4)
BAD: dict[str, list[Message | bytes | list[bytes]]] = {
    "noise": [b"\xc1" * 100],
    "nothing": [b""],
    "a message of another kind": [CancelTransfer(77)],
    "before it has said who it is": [READY],
    "positions beyond the end": ["hi", PageAnnounced(number=1, epoch=77, first=8, count=4)],
    "no positions": ["hi", PageAnnounced(number=1, epoch=77, first=8, count=0)],
    "more than a page": ["hi", PageAnnounced(number=1, epoch=77, first=0, count=5)],
    "a number twice": ["hi", READY, READY],
    "bytes that were not asked for": ["hi", READY, "pulled", [encode(PageBytes(1, 4)), b"x"]],
    "too many bytes": ["hi", READY, "pulled", [encode(PageBytes(1, 0)), b"x" * 9999]],
    "bytes without a frame": ["hi", READY, "pulled", PageBytes(1, 0)],
    "two frames of what has one": ["hi", [encode(READY), b"x"]],
    "what a receiver says": ["hi", PullPage(1)],
    "a communicator's words without one": ["hi", StoreValue("k", b"v")],
    "who it is, twice": ["hi", "hi"],
}  # type: ignore[dict-item]


@pytest.mark.parametrize("words", BAD.values(), ids=BAD)
def test_what_no_sender_can_have_meant_ends_its_connection(
    words: list[Message | bytes | list[bytes]], rig: Rig, ctx: Sockets
) -> None:
    expects(rig)
    before = rig.receivers[0].slots()
    caught = Caught(rig, ctx)
    for word in words:
        if word == "hi":
            caught.say(caller(rig), EpochOpened(77))
        elif word == "pulled":
            caught.until(PullPage)
        else:
            caught.say(word)
    caught.until(TransferRefused)
    rig.begin(6, 78, MORE)
    rig.computed(6, 0, 0, SLOTS)
    rig.until(lambda: rig.arrived(78))
    assert rig.matches(SLOTS, MORE)
    caught.say(caller(rig), READY, b"noise")  # it is not heard any more
    rig.turns(20)
    after = rig.receivers[0].slots()
    assert all(after[i] == before[i] for i in set(range(NUM_SLOTS)) - set(MORE))
    assert rig.receivers[0].thread.counts.refused == 1
    assert rig.receivers[0].thread.pool.free == rig.receivers[0].thread.pool.num


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"node": "another"}, "not here any more"),
        ({"wire": KvWireFormat(format="f", dtype="bf16", num_layers=2, num_heads=4, head_bytes=32)},
         "format is  here and f there"),
        ({"wire": KvWireFormat(format="", dtype="bf16", num_layers=3, num_heads=4, head_bytes=32)},
         "num_layers is 2 here and 3 there"),
        ({"wire": KvWireFormat(format="", dtype="bf16", num_layers=2, num_heads=4, head_bytes=32,
                         tp=MOST_RANKS + 1)}, "1025 ranks"),
        ({"transports": ("nccl", "p2p")}, "one has nccl, p2p, the other tcp"),
    ],
)  # fmt: skip
def test_who_does_not_fit_is_told_why(
    changes: dict[str, object], why: str, rig: Rig, ctx: Sockets
) -> None:
    caught = Caught(rig, ctx)
    caught.say(caller(rig, **changes))
    refused = caught.until(TransferRefused)
    assert isinstance(refused, TransferRefused)
    assert why in refused.why


def test_memory_that_is_not_what_it_is_said_to_be_is_not_read(ctx: Sockets) -> None:
    rig = Rig(names=(("p2p",), ("p2p", "tcp")))
    machine = rig.senders[0].thread._transports.machine  # type: ignore[attr-defined]
    try:
        for memory in (
            "cpu:1:0:1:1:1",
            "cpu:0:0:0:0:0",
            "/etc/passwd",
            "cuda:AAAA",
            "",
            "cpu:" + "9" * 99,
        ):
            caught = Caught(rig, ctx)
            caught.say(caller(rig, transports=("p2p", "tcp"), machine=machine, memory=memory))
            assert caught.until(SenderAdmitted) == SenderAdmitted("tcp", 4), memory
    finally:
        rig.close()


def test_a_frame_of_any_size_costs_no_memory(rig: Rig, ctx: Sockets) -> None:
    caught = Caught(rig, ctx)
    caught.say(bytes(FRAME_LIMIT + 1))  # ZeroMQ hangs up before it takes it
    rig.begin(6, 78, MORE)
    rig.computed(6, 0, 0, SLOTS)
    rig.until(lambda: rig.arrived(78))
    assert rig.receivers[0].thread.counts.refused == 0
    assert PIECE < FRAME_LIMIT


@pytest.mark.parametrize("seed", range(4))
def test_random_words_of_a_sender_harm_nobody_else(seed: int, rig: Rig, ctx: Sockets) -> None:
    rng = random.Random(seed)
    before = rig.receivers[0].slots()
    for _ in range(12):
        expects(rig, 77)
        caught = Caught(rig, ctx)
        caught.say(caller(rig), EpochOpened(77))
        for _ in range(30):
            caught.say(some_words(rng))
        rig.turns(3)
        rig.receivers[0].thread.put([CancelTransfer(77)])
        rig.turns(1)
    rig.begin(6, 78, MORE)
    rig.computed(6, 0, 0, SLOTS)
    rig.until(lambda: rig.arrived(78))
    after = rig.receivers[0].slots()
    kept = set(range(NUM_SLOTS)) - set(MORE) - set(SLOTS)
    assert all(after[i] == before[i] for i in kept)
    rig.turns(20)
    assert rig.receivers[0].thread.pool.free == rig.receivers[0].thread.pool.num


def some_words(rng: random.Random) -> Message | list[bytes] | bytes:
    number, first = rng.randrange(4), rng.randrange(12)
    msg = rng.choice(
        [
            PageAnnounced(number=number, epoch=rng.choice([77, 77, 78, 5]), first=first, count=rng.randrange(6)),
            PageFilled(number, rng.randrange(9), rng.choice([128, 512, 1 << 40])),
            EpochClosed(rng.choice([77, 5]), "x"),
            EpochOpened(rng.choice([77, 5])),
            TransferHeartbeat(),
            PageReceived(number),
        ]
    )  # fmt: skip
    kind = rng.random()
    if kind < 0.2:
        return [
            encode(PageBytes(number, rng.choice([0, 0, 7]))),
            rng.randbytes(rng.randrange(2000)),
        ]
    raw = bytearray(encode(msg))
    if kind < 0.25:
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


# -- and the other way: receivers that are none of ours -----------------------------------------------

ANSWERS: dict[str, list[Message | bytes]] = {
    "noise": [b"\xc1\x00"],
    "a way that was not offered": [SenderAdmitted("nccl", 4)],
    "pulled before it was admitted": [PullPage(1)],
    "pulled twice": [SenderAdmitted("tcp", 4), PullPage(1), PullPage(1)],
    "what a sender says": [SenderAdmitted("tcp", 4), READY],
    "refused": [TransferRefused("no")],
}


@pytest.mark.parametrize("words", ANSWERS.values(), ids=ANSWERS)
def test_what_no_receiver_can_have_meant_ends_what_goes_there(
    words: list[Message | bytes], rig: Rig, ctx: Sockets
) -> None:
    listener = ctx.socket(zmq.ROUTER)
    failed_handshakes = protected(listener, KEYS)
    port = listener.bind_to_random_port("tcp://127.0.0.1")
    there = replace(rig.to(99, 0, 11), addresses=(f"tcp://127.0.0.1:{port}",))
    rig.senders[0].thread.put([ExportKv(5, there)])
    rig.computed(5, 0, 0, SLOTS)
    got: list[list[bytes]] = []
    rig.until(lambda: bool(listener.poll(0)) and (got.append(listener.recv_multipart()) or True))
    ident, raw = got[0]
    assert isinstance(decode(raw), SenderHello)
    for word in words:
        listener.send_multipart([ident, encode(word) if isinstance(word, Message) else word])
    rig.until(lambda: rig.sent(5) == [[0]])
    rig.begin(6, 78, MORE)
    rig.computed(6, 0, 0, SLOTS)
    rig.until(lambda: rig.arrived(78))
    assert rig.matches(SLOTS, MORE)
    rig.turns(5)
    assert rig.senders[0].thread.pool.free == rig.senders[0].thread.pool.num
    failed_handshakes.close()


@pytest.mark.parametrize("limit", ["time", "number"])
def test_a_receiver_that_reads_nothing_is_given_up_and_holds_up_nobody(
    limit: str, ctx: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it is there all the time; what it is to be told waits, for a while, up to a limit."""
    rig = Rig(times=TransferTimeouts(lapse_s=0.5 if limit == "time" else WAIT_S, first_s=WAIT_S))
    if limit == "number":
        monkeypatch.setattr(kv_thread, "MOST_WAITING", 8)
    deaf = ctx.socket(zmq.ROUTER)
    failed_handshakes = protected(deaf, KEYS)
    port = deaf.bind_to_random_port("tcp://127.0.0.1")
    sender = rig.senders[0].thread
    assert isinstance(sender, KvSender)
    try:
        address = f"tcp://127.0.0.1:{port}"
        there = [replace(rig.to(99 + i, 0, 11), addresses=(address,)) for i in range(10)]
        sender.put([ExportKv(5, there[0])])
        got: list[list[bytes]] = []
        rig.until(lambda: bool(deaf.poll(0)) and (got.append(deaf.recv_multipart()) or True))
        deaf.send_multipart([got[0][0], encode(SenderAdmitted("tcp", 4))])
        (line,) = sender._receivers.values()
        rig.until(lambda: line.transport == "tcp")

        def full(frame: bytes, flags: int) -> None:
            raise zmq.Again

        assert line.sock is not None
        monkeypatch.setattr(line.sock, "send", full)
        sender.put([ExportKv(100 + i, to) for i, to in enumerate(there[1:])])
        rig.computed(5, 0, 0, SLOTS)
        rig.begin(6, 78, MORE)
        rig.computed(6, 0, 0, SLOTS)

        def given_up() -> bool:
            deaf.send_multipart([got[0][0], encode(TransferHeartbeat())])
            return rig.sent(5) == [[0]]

        rig.until(given_up)
        assert line not in sender._receivers.values()
        rig.until(lambda: rig.arrived(78))
        assert rig.matches(SLOTS, MORE)
    finally:
        failed_handshakes.close()
        rig.close()


def test_strangers_are_not_heard(rig: Rig, ctx: Sockets) -> None:
    stranger = ctx.socket(zmq.DEALER)
    known_to(stranger, CurveKeys.make())
    receiver = rig.receivers[0].thread
    assert isinstance(receiver, KvReceiver)
    stranger.connect(f"tcp://127.0.0.1:{receiver.port}")
    stranger.send(encode(caller(rig)), zmq.NOBLOCK)
    rig.begin(6, 78, MORE)
    rig.computed(6, 0, 0, SLOTS)
    rig.until(lambda: rig.arrived(78))
    assert not stranger.poll(100)
    rig.until(lambda: receiver.counts.failed_handshakes > 0)


def test_a_receiver_that_does_not_read_keeps_no_pages_of_others(ctx: Sockets) -> None:
    """It has asked for all there is, and stands still; others go on with what is left."""
    size = Size(dim=1 << 12, tokens=8, pages=4)
    rig = Rig(size=size)
    still = ctx.socket(zmq.ROUTER)
    failed_handshakes = protected(still, KEYS)
    port = still.bind_to_random_port("tcp://127.0.0.1")
    still.setsockopt(zmq.RCVHWM, 4)
    wire = rig.senders[0].share.wire
    there = KvDestination(
        node=NODE, epoch=99, hit=0, length=64, addresses=(f"tcp://127.0.0.1:{port}",), wire=wire
    )
    try:
        rig.senders[0].thread.put([ExportKv(5, there)])
        rig.computed(5, 0, 0, array("i", range(NUM_SLOTS)))
        got: list[bytes] = []
        rig.until(lambda: bool(still.poll(0)) and (got.extend(still.recv_multipart()) or True))
        for word in (SenderAdmitted("tcp", 8), *(PullPage(i) for i in range(1, 9))):
            still.send_multipart([got[0], encode(word)])
        rig.turns(50)
        rig.begin(6, 78, MORE)
        rig.computed(6, 0, 0, SLOTS)
        rig.until(lambda: rig.arrived(78))
        assert rig.matches(SLOTS, MORE)
    finally:
        failed_handshakes.close()
        rig.close()


def test_what_nobody_asked_for_leaves_a_page_for_those_who_have(ctx: Sockets) -> None:
    """A receiver that fetches nothing holds pages; another one waits with a page for its own."""
    transports = ("p2p", "tcp"), ("tcp",)
    rig = Rig(names=transports, size=Size(tokens=8, pages=2))
    still = ctx.socket(zmq.ROUTER)
    failed_handshakes = protected(still, KEYS)
    port = still.bind_to_random_port("tcp://127.0.0.1")
    try:
        there = replace(rig.to(99, 0, 64), addresses=(f"tcp://127.0.0.1:{port}",))
        sender = rig.senders[0].thread
        sender.put([ExportKv(5, there)])
        rig.computed(5, 0, 0, array("i", range(NUM_SLOTS)))
        rig.until(lambda: bool(still.poll(0)))
        still.send_multipart([still.recv_multipart()[0], encode(SenderAdmitted("p2p", 8))])
        rig.until(lambda: sender.counts.sent_pages > 0)
        rig.turns(20)
        assert sender.pool.free == 1
        rig.begin(6, 78, MORE)
        rig.computed(6, 0, 0, SLOTS)
        rig.until(lambda: rig.arrived(78))
        assert rig.matches(SLOTS, MORE)
    finally:
        failed_handshakes.close()
        rig.close()


def test_a_page_that_was_something_elses_by_the_time_it_was_read_is_no_ones_k_and_v() -> None:
    """Its sender has given it away after it had said what is in it."""
    size = Size(pages=4)
    rig = Rig(names=(("p2p",), ("p2p",)), size=size)
    sender, receiver = rig.senders[0].thread, rig.receivers[0].thread
    try:
        rig.begin(5, 77, SLOTS[:4])
        rig.computed(5, 0, 0, SLOTS[:4])
        rig.until(lambda: sender.counts.sent_pages > 0, [receiver, sender])
        (page,) = set(range(sender.pages.num)) - set(sender.pool._free)
        assert isinstance(sender.pages, CpuPages)
        sender.pages._stamps[page].add_(1)
        rig.until(lambda: bool(rig.lapsed(77)))
        assert rig.lapsed(77) == ["its sender has used the page for something else"]
        rig.begin(6, 78, MORE)
        rig.computed(6, 0, 0, SLOTS)
        rig.until(lambda: rig.arrived(78))
        assert rig.matches(SLOTS, MORE)
        rig.until(lambda: (sender.pool.free, receiver.pool.free) == (size.pages, size.pages))
    finally:
        rig.close()


class Receives:
    """A communicator that only notes into what it is to receive."""

    ready, closed, failed = True, True, ""

    def __init__(self) -> None:
        self.into: list[Tensor] = []

    def to_tell(self) -> Sequence[tuple[str, bytes]]:
        return ()

    def receive(self, number: int, page: Tensor) -> None:
        self.into.append(page)

    def done(self, now: float) -> Sequence[int]:
        return ()

    def close(self) -> None:
        pass


def test_what_a_communicator_still_sends_of_ended_requests_takes_no_memory(ctx: Sockets) -> None:
    rig, pair = Rig(names=(("nccl",), ("nccl",))), Receives()
    receiver = rig.receivers[0].thread
    assert isinstance(receiver, KvReceiver)
    receiver._transports.backend = lambda *_: pair  # type: ignore[assignment]
    try:
        for_nobody = Caught(rig, ctx)
        for_nobody.say(caller(rig, transports=("nccl",)))
        for_nobody.until(SenderAdmitted)
        for_nobody.say(*(PageFilled(number, 0, 100 + number) for number in range(1, 9)))
        rig.until(lambda: len(pair.into) == 8)
        assert [len(page) for page in pair.into] == [*range(101, 109)]
        assert len({page.data_ptr() for page in pair.into}) == 1
        for_nobody.say(PageFilled(9, 0, receiver.pages.size + 1))
        for_nobody.until(TransferRefused)
    finally:
        rig.close()


def test_a_connection_sends_nothing_of_a_request_that_comes_on_another(
    rig: Rig, ctx: Sockets
) -> None:
    """The same rank of another server: it would hold a page that no end of the request frees."""
    first, other = Caught(rig, ctx), Caught(rig, ctx)
    expects(rig)
    first.say(caller(rig), EpochOpened(77))
    first.until(SenderAdmitted)
    other.say(caller(rig))
    other.until(SenderAdmitted)
    other.say(READY)
    other.until(PageReceived)
    other.say(EpochOpened(77))
    assert other.until(EpochClosed) == EpochClosed(77, "it is not expected there")
    first.say(READY)
    first.until(PullPage)
    rig.receivers[0].thread.put([ImportKv(78, 0, len(SLOTS), MORE)])
    other.say(EpochOpened(78), replace(READY, number=2, epoch=78))  # its other requests go on
    other.until(PullPage)


def test_a_transfer_without_progress_lapses_and_costs_no_other(ctx: Sockets) -> None:
    """Its sender is there, says so, and sends nothing of what it has announced."""
    rig = Rig(times=TransferTimeouts(lapse_s=1.0, first_s=WAIT_S))
    idle = Caught(rig, ctx)
    try:
        expects(rig)
        idle.say(caller(rig), EpochOpened(77), READY)
        idle.until(PullPage)
        rig.begin(6, 78, MORE)
        rig.computed(6, 0, 0, SLOTS)

        def lapsed() -> bool:
            idle.say(TransferHeartbeat())
            return bool(rig.lapsed(77))

        rig.until(lapsed)
        assert rig.lapsed(77) == ["4 tokens have not come in 1 s"]
        assert (rig.arrived(78), rig.lapsed(78)) == (True, [])
        over = idle.until(EpochClosed)
        assert over == EpochClosed(77, "4 tokens have not come in 1 s")
        assert rig.receivers[0].thread.counts.refused == 0  # it may send others
        assert rig.receivers[0].thread.pool.free == rig.receivers[0].thread.pool.num
    finally:
        rig.close()


def test_a_sender_that_reads_nothing_is_refused_and_holds_up_nobody(
    ctx: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is to be told waits here for a while, and for no more than that."""
    rig = Rig(times=TransferTimeouts(lapse_s=1.0, first_s=WAIT_S))
    receiver = rig.receivers[0].thread
    assert isinstance(receiver, KvReceiver)
    deaf = Caught(rig, ctx)
    try:
        deaf.say(caller(rig))
        deaf.until(SenderAdmitted)
        (ident,) = receiver.senders
        send = receiver.listener.send_multipart

        def full(frames: list[bytes], flags: int) -> object:
            if frames[0] == ident:
                raise zmq.Again
            return send(frames, flags)

        monkeypatch.setattr(receiver.listener, "send_multipart", full)
        expects(rig)
        deaf.say(EpochOpened(77), READY)
        rig.begin(6, 78, MORE)
        rig.computed(6, 0, 0, SLOTS)

        def alive() -> bool:
            deaf.say(TransferHeartbeat())
            return bool(rig.lapsed(77))

        rig.until(alive)
        assert rig.arrived(78)
        assert rig.matches(SLOTS, MORE)
        assert rig.lapsed(77) == ["its sender has read nothing for 1 s"]
        assert receiver.senders[ident].over
        assert receiver.pool.free == receiver.pool.num
    finally:
        rig.close()


def test_stamps_of_pages_go_on_beyond_32_bits() -> None:
    """A sender that runs for months has filled more pages."""
    filled = PageFilled(number=1 << 32, page=3, nbytes=128, stamp=1 << 32)
    assert decode(encode(filled)) == filled


def test_all_that_is_overdue_is_found_in_one_look(rig: Rig, ctx: Sockets) -> None:
    """However many requests' K/V are to come: the thread holds the GIL while it looks."""

    class Counted(dict[Any, Any]):
        looks = 0

        def values(self) -> Any:
            Counted.looks += 1
            return super().values()

    epochs = range(77, 97)
    receiver = rig.receivers[0].thread
    assert isinstance(receiver, KvReceiver)
    caught = Caught(rig, ctx)
    caught.say(caller(rig))
    for epoch in epochs:
        expects(rig, epoch)
        caught.say(EpochOpened(epoch), replace(READY, number=epoch, epoch=epoch))
    rig.until(lambda: any(len(each.portions) == 20 for each in receiver.senders.values()))
    (sender,) = receiver.senders.values()
    sender.portions = Counted(sender.portions)
    receiver.tick()
    assert Counted.looks == 1
    assert len(receiver.inbox.imports) == 20
    receiver.clock.now += WAIT_S + 1  # what has been pulled does not come
    sender.heard = receiver.clock.now
    receiver.tick()
    assert len(receiver.inbox.imports) == 17, "one peer has three of four pages"
