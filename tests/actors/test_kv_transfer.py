"""K/V from ranks of one server to ranks of another: all of it, once, and nowhere else."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import replace

import pytest

from asyncllm.actors.kv_receiver import KvReceiver
from asyncllm.actors.kv_thread import TransferTimeouts
from asyncllm.actors.transport import CurveKeys
from asyncllm.messages import (
    CancelTransfer,
    ExportKv,
    ImportKv,
    KvArrived,
    KvComputed,
    StepFinished,
    TransferFailed,
)
from tests.actors.kv_rig import KEYS, NUM_SLOTS, WAIT_S, Rig, Size

SOURCES = array("i", [7, 3, 50, 22, 9, 1, 40, 41, 42, 13, 12])
TARGETS = array("i", [60, 1, 20, 4, 5, 17, 30, 31, 33, 2, 63])
WAYS = ["tcp", "p2p", "nccl"]  # the last one over gloo


@pytest.fixture
def rigs() -> Iterator[list[Rig]]:
    made: list[Rig] = []
    yield made
    for rig in made:
        rig.close()


def untouched(before: list[list[bytes]], rig: Rig, slots: array[int]) -> bool:
    """All slots but these are as they were."""
    after = [rank.slots() for rank in rig.receivers]
    others = set(range(NUM_SLOTS)) - set(slots)
    return all(a[i] == b[i] for a, b in zip(before, after, strict=True) for i in others)


@pytest.mark.parametrize("transport", WAYS)
@pytest.mark.parametrize("tps", [(1, 1), (2, 1), (1, 2), (2, 8)], ids=str)
def test_chunks_travel_while_later_ones_are_computed(
    tps: tuple[int, int], transport: str, rigs: list[Rig]
) -> None:
    rigs.append(rig := Rig(tps, ((transport,), (transport,))))
    before = [rank.slots() for rank in rig.receivers]
    rig.begin(5, 77, TARGETS, hit=3)
    rig.computed(5, 0, 3, SOURCES[:6])
    rig.until(lambda: rig.sent(5) == [[0]] * tps[0] and rig.threads[-1].counts.taken_pages > 0)
    assert not rig.arrived(77)
    rig.computed(5, 1, 9, SOURCES[6:])
    rig.until(lambda: rig.arrived(77) and rig.sent(5) == [[0, 1]] * tps[0])
    assert rig.matches(SOURCES, TARGETS)
    assert untouched(before, rig, TARGETS)
    assert not rig.lapsed(77)
    rig.turns(20)
    assert all(thread.pool.free == thread.pool.num for thread in rig.threads)
    assert [len(rank.told) for rank in rig.receivers] == [1] * tps[1]


@pytest.mark.parametrize("transport", WAYS)
def test_many_requests_share_few_pages(transport: str, rigs: list[Rig]) -> None:
    rigs.append(rig := Rig(names=((transport,), (transport,)), size=Size(pages=2)))
    for i in range(5):
        some = slice(11 * i, 11 * i + 11)
        rig.begin(i, 100 + i, array("i", range(NUM_SLOTS))[some])
    for i in range(5):
        some = slice(63 - 11 * i - 11, 63 - 11 * i)
        rig.computed(i, 0, 0, array("i", range(NUM_SLOTS))[some])
    rig.until(lambda: all(rig.arrived(100 + i) for i in range(5)))
    for i in range(5):
        sources = array("i", range(NUM_SLOTS))[63 - 11 * i - 11 : 63 - 11 * i]
        assert rig.matches(sources, array("i", range(11 * i, 11 * i + 11)))


def test_k_v_that_are_read_before_their_step_is_over_are_not_sent(rigs: list[Rig]) -> None:
    rigs.append(rig := Rig())
    rig.begin(5, 77, TARGETS)
    sender = rig.senders[0]
    sender.thread.put([KvComputed(rid=5, seq=0, step=9, start=0, slots=SOURCES), StepFinished(8)])
    rig.turns(50)
    assert rig.sent(5) == [[]]
    sender.thread.put([StepFinished(10)])
    rig.until(lambda: rig.arrived(77))


def test_what_is_not_wanted_is_answered_at_once(rigs: list[Rig]) -> None:
    rigs.append(rig := Rig())
    rig.computed(4, 0, 0, SOURCES)  # nobody has heard of it
    rig.begin(5, 77, TARGETS, hit=11)
    rig.computed(5, 0, 0, SOURCES)  # all before the hit
    rig.until(lambda: rig.sent(4) == [[0]] and rig.sent(5) == [[0]])
    assert not rig.arrived(77)


@pytest.mark.parametrize("transport", WAYS)
def test_a_sender_that_forgets_ends_the_import(transport: str, rigs: list[Rig]) -> None:
    rigs.append(rig := Rig(names=((transport,), (transport,))))
    before = [rank.slots() for rank in rig.receivers]
    rig.begin(5, 77, TARGETS)
    rig.computed(5, 0, 0, SOURCES[:4])
    rig.until(lambda: rig.sent(5) == [[0]])
    rig.senders[0].thread.put([CancelTransfer(5)])
    rig.computed(5, 1, 4, SOURCES[4:])
    rig.until(lambda: rig.lapsed(77) != [] and rig.sent(5) == [[0, 1]])
    assert rig.lapsed(77) == ["its request has ended there"]
    rig.turns(20)
    assert untouched(before, rig, TARGETS[:4])
    assert all(thread.pool.free == thread.pool.num for thread in rig.threads)


@pytest.mark.parametrize("transport", WAYS)
def test_a_receiver_that_forgets_takes_nothing_more(transport: str, rigs: list[Rig]) -> None:
    rigs.append(rig := Rig(names=((transport,), (transport,))))
    rig.begin(5, 77, TARGETS)
    rig.computed(5, 0, 0, SOURCES[:4])
    rig.until(lambda: rig.sent(5) == [[0]])
    rig.receivers[0].thread.put([CancelTransfer(77)])
    rig.until(lambda: rig.lapsed(77) == [""])
    before = [rank.slots() for rank in rig.receivers]
    rig.computed(5, 1, 4, SOURCES[4:])
    rig.until(lambda: rig.sent(5) == [[0, 1]])
    rig.turns(20)
    assert untouched(before, rig, array("i"))
    assert rig.receivers[0].told == [TransferFailed(77, 0)]
    assert all(thread.pool.free == thread.pool.num for thread in rig.threads)


def test_a_server_behind_the_same_address_is_another_one(rigs: list[Rig]) -> None:
    rigs.append(rig := Rig())
    rig.receivers[0].thread.put([ImportKv(77, 0, 11, TARGETS)])
    rig.senders[0].thread.put([ExportKv(5, rig.to(77, 0, 11, node="another"))])
    rig.computed(5, 0, 0, SOURCES)
    before = rig.receivers[0].slots()
    rig.until(lambda: rig.sent(5) == [[0]])
    assert rig.receivers[0].slots() == before
    assert rig.receivers[0].told == []  # it still waits for its own


def test_an_import_that_nobody_sends_lapses(rigs: list[Rig]) -> None:
    rigs.append(rig := Rig(times=TransferTimeouts(first_s=0.05, lapse_s=WAIT_S)))
    rig.receivers[0].thread.put([ImportKv(77, 0, 11, TARGETS)])
    rig.until(lambda: rig.lapsed(77) != [])
    assert rig.lapsed(77) == ["no sender has been heard of in 0.05 s"]


def test_each_of_the_keys_is_tried(rigs: list[Rig]) -> None:
    rigs.append(rig := Rig(keys=(CurveKeys.make(), KEYS)))
    rig.begin(5, 77, TARGETS)
    rig.computed(5, 0, 0, SOURCES)
    rig.until(lambda: rig.arrived(77))


def test_a_sender_may_be_quicker_than_the_word_of_the_scheduler(rigs: list[Rig]) -> None:
    rigs.append(rig := Rig())
    rig.senders[0].thread.put([ExportKv(5, rig.to(77, 0, 11))])
    rig.computed(5, 0, 0, SOURCES)
    rig.turns(50)
    assert rig.sent(5) == [[]]
    rig.receivers[0].thread.put([ImportKv(77, 0, 11, TARGETS)])
    rig.until(lambda: rig.arrived(77))
    assert rig.matches(SOURCES, TARGETS)


def test_a_request_that_nobody_comes_to_expect_is_given_up(rigs: list[Rig]) -> None:
    times = TransferTimeouts(first_s=WAIT_S, lapse_s=WAIT_S, early_s=0.02)
    rigs.append(rig := Rig(times=times))
    rig.senders[0].thread.put([ExportKv(5, rig.to(77, 0, 11))])
    rig.computed(5, 0, 0, SOURCES)
    rig.until(lambda: rig.sent(5) == [[0]])


def test_epochs_of_two_servers_may_be_equal(rigs: list[Rig]) -> None:
    """They are numbers of requests, which each server counts by itself."""
    rigs += [rig := Rig(), Rig()]
    other = rigs[1].receivers[0]
    assert isinstance(other.thread, KvReceiver)
    there = replace(rig.to(77, 0, 11), addresses=(f"tcp://127.0.0.1:{other.thread.port}",))
    threads = [*rig.threads, other.thread]
    rig.begin(5, 77, TARGETS)
    rig.senders[0].thread.put([ExportKv(6, there)])
    other.thread.put([ImportKv(77, 0, 11, TARGETS)])
    rig.computed(5, 0, 0, SOURCES)
    rig.until(lambda: rig.arrived(77), threads)
    rig.turns(20, threads)  # what is over there is not over here
    rig.computed(6, 0, 0, SOURCES)
    rig.until(lambda: KvArrived(77, 0) in other.told, threads)


def test_a_server_that_ends_waits_for_what_it_has_promised(rigs: list[Rig]) -> None:
    rigs.append(rig := Rig())
    rig.begin(5, 77, TARGETS)
    rig.computed(5, 0, 0, SOURCES)
    rig.until(lambda: rig.sent(5) == [[0]])
    if not rig.arrived(77):
        assert not rig.senders[0].thread.drained.is_set()
    rig.until(lambda: rig.arrived(77))
    rig.until(rig.senders[0].thread.drained.is_set)


@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_a_storm_of_aborts_costs_no_other_request(end: str, rigs: list[Rig]) -> None:
    """All is said to one connection in one turn, far more than ZeroMQ holds for it."""
    rigs.append(rig := Rig())
    sender, receiver = rig.senders[0].thread, rig.receivers[0].thread
    assert isinstance(receiver, KvReceiver)
    rig.begin(5, 77, TARGETS)
    storm = range(1000, 3000)
    for rid in storm:
        rig.begin(rid, rid, SOURCES[:1])
    rig.until(lambda: all(entry.links for entry in receiver.inbox.imports.values()))
    (sender if end == "sender" else receiver).put([CancelTransfer(rid) for rid in storm])
    rig.turns(3, [sender if end == "sender" else receiver])
    rig.computed(5, 0, 0, SOURCES)
    rig.until(lambda: rig.arrived(77) and all(map(rig.lapsed, storm)))
    assert rig.matches(SOURCES, TARGETS)
    assert receiver.counts.refused == sender.counts.refused == 0
    ended = {"sender": "its request has ended there", "receiver": ""}[end]
    assert {*map(tuple, map(rig.lapsed, storm))} == {(ended,)}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("transport", WAYS)
def test_random_lives(transport: str, seed: int, rigs: list[Rig]) -> None:
    """Requests begin, are computed, are forgotten at either end at any time. What arrives is right,
    all is answered once, and no slot changes but those of requests that are still wanted."""
    rng = random.Random(seed)
    rigs.append(rig := Rig((2, 2), ((transport,), (transport,)), size=Size(pages=3)))
    lives = [_Life(i, rng) for i in range(12)]
    for _ in range(150):
        life = rng.choice(lives)
        life.go_on(rig, rng)
        rig.turns(rng.randrange(3))
        for each in lives:
            each.look(rig)
    for life in lives:
        life.end(rig)
    rig.until(lambda: all(life.is_over(rig) for life in lives))
    rig.turns(20)
    for life in lives:
        life.check(rig)
    told = [msg for rank in [*rig.senders, *rig.receivers] for msg in rank.told]
    assert len(told) == len(set(told))
    assert all(thread.pool.free == thread.pool.num for thread in rig.threads)


class _Life:
    """A request with slots of its own on both sides."""

    def __init__(self, number: int, rng: random.Random) -> None:
        slots = list(range(5 * number, 5 * number + 5))
        rng.shuffle(slots)
        self.rid, self.epoch, self.slots = number, 100 + number, array("i", slots)
        self.at, self.seq, self.begun = 0, 0, False
        self.forgotten: list[list[bytes]] | None = None

    def go_on(self, rig: Rig, rng: random.Random) -> None:
        if not self.begun:
            self.begun = True
            rig.begin(self.rid, self.epoch, self.slots)
        elif rng.random() < 0.1 and self.forgotten is None:
            for rank in rng.choice([rig.senders, rig.receivers]):
                rank.thread.put([CancelTransfer(self.rid if rank in rig.senders else self.epoch)])
        else:
            self.compute(rig, rng.randrange(1, 4))

    def compute(self, rig: Rig, num: int) -> None:
        if some := self.slots[self.at : self.at + num]:
            rig.computed(self.rid, self.seq, self.at, some)
            self.at, self.seq = self.at + len(some), self.seq + 1

    def look(self, rig: Rig) -> None:
        """From the answers of all ranks on, its slots are somebody else's."""
        if self.forgotten is None and len(rig.lapsed(self.epoch)) == len(rig.receivers):
            self.forgotten = [[rank.slots()[i] for i in self.slots] for rank in rig.receivers]

    def end(self, rig: Rig) -> None:
        if not self.begun:
            self.begun = True
            rig.begin(self.rid, self.epoch, self.slots)
        self.compute(rig, 5)

    def is_over(self, rig: Rig) -> bool:
        answers = [
            msg
            for rank in rig.receivers
            for msg in rank.told
            if getattr(msg, "rid", -1) == self.epoch
        ]
        all_sent = rig.sent(self.rid) == [list(range(self.seq))] * len(rig.senders)
        return len(answers) == len(rig.receivers) and all_sent

    def check(self, rig: Rig) -> None:
        if self.forgotten is not None:
            assert [
                [rank.slots()[i] for i in self.slots] for rank in rig.receivers
            ] == self.forgotten
        elif rig.arrived(self.epoch):
            assert rig.matches(self.slots, self.slots)


@pytest.mark.parametrize("transport", WAYS)
def test_what_was_under_way_when_it_was_forgotten_does_not_come_in_place_of_another(
    transport: str, rigs: list[Rig]
) -> None:
    rigs.append(rig := Rig(names=((transport,), (transport,))))
    sender, receiver = rig.senders[0].thread, rig.receivers[0].thread
    rig.begin(5, 77, TARGETS[:4])
    rig.computed(5, 0, 0, SOURCES[:4])
    rig.until(lambda: sender.counts.sent_pages > 0, [receiver, sender])
    receiver.put([CancelTransfer(77)])
    rig.begin(6, 78, TARGETS[4:8])
    rig.computed(6, 0, 0, SOURCES[4:8])
    rig.until(lambda: rig.arrived(78))
    assert rig.matches(SOURCES[4:8], TARGETS[4:8])
    assert rig.lapsed(77) == [""]
