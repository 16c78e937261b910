"""Director and agent: what one tells the other, and whom a master lets in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from asyncllm.actors import peer_connector
from asyncllm.actors.agent import Agent
from asyncllm.actors.base import Actor
from asyncllm.actors.channel import Channel
from asyncllm.actors.director import Director
from asyncllm.actors.peer_messages import PeerInfo, PeerJoined, PeerLeft, PeerMessage, PeerRefused
from asyncllm.actors.system import ActorSystem
from asyncllm.codec import i32, i64
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.errors import StartupError
from asyncllm.messages import (
    FRONTEND_SHIFT,
    Abort,
    AskNodes,
    AskServing,
    BeginDecode,
    CompileGrammar,
    DecodeRequest,
    DecodeReserved,
    Drain,
    Drained,
    Finished,
    GrammarReady,
    ImportPlaced,
    KvListening,
    NodesAnswer,
    NodeState,
    PrefillRequest,
    Scrape,
    Scraped,
    Serving,
    Started,
    StopHit,
    Submit,
    Tokens,
)
from asyncllm.records import Failure, GroupLoad, KvDestination, KvWireFormat, TransferTotals
from asyncllm.topology import Topology

WIRE = KvWireFormat(format="", dtype="fp32", num_layers=1, num_heads=1, head_bytes=4)
PARAMS = SamplingParams(max_new_tokens=4)
P, D = 1 << 23, (1 << 23) + 1  # peers


class FakeChannel:
    """What director and agent ask of a channel."""

    def __init__(self, info: PeerInfo) -> None:
        self.info = info
        self.admit: Callable[[PeerInfo], str | None] = lambda _: None
        self.peers: dict[int, PeerInfo] = {}
        self.dropped: list[tuple[int, str]] = []
        self.dialled: list[str] = []
        self.forgotten: list[str] = []

    def drop(self, peer: int, why: str) -> None:
        self.dropped.append((peer, why))
        self.peers.pop(peer, None)

    def dial(self, host: str, port: int) -> str:
        self.dialled.append(f"{host}:{port}")
        return self.dialled[-1]

    def forget(self, where: str) -> None:
        self.forgotten.append(where)


class Office:
    """An actor; ``told``: (endpoint, name, message) of all that it says to others."""

    def __init__(self, actor: Callable[[Channel], Actor[Any]], info: PeerInfo, topology: Topology):
        self.told: list[tuple[int, str, Any]] = []
        self.channel = FakeChannel(info)
        self.system = ActorSystem(topology=topology)
        self.actor = actor(self.channel)  # type: ignore[arg-type]
        deliver = self.system.deliver

        def divert(endpoint: int, name: str, msg: Any) -> None:
            if endpoint or name != self.actor.name:
                self.told.append((endpoint, name, msg))
            else:
                deliver(endpoint, name, msg)

        self.system.deliver = divert  # type: ignore[method-assign]
        self.ref = self.system.add(self.actor)

    async def tell(self, *msgs: Any) -> list[tuple[int, str, Any]]:
        """What came of these messages."""
        self.told.clear()
        for msg in msgs:
            if isinstance(msg, PeerJoined):
                self.channel.peers[msg.peer] = msg.info
            self.ref.tell(msg)
        for _ in range(6):
            await asyncio.sleep(0)
        return self.told.copy()


def run(script: Callable[[], Coroutine[Any, Any, None]]) -> None:
    uvloop.run(script())


async def while_running(office: Office, script: Coroutine[Any, Any, None]) -> None:
    running = asyncio.ensure_future(office.system.run())
    async with asyncio.timeout(20):
        await script
    office.system.stop()
    await running


# -- director ------------------------------------------------------------------------------------------


def info(role: str, name: str, **facts: str) -> PeerInfo:
    return PeerInfo(role=role, name=name, facts=tuple(facts.items()))


def master(**options: Any) -> Office:
    def make(channel: Channel) -> Director:
        return Director(channel, "cache_aware", vocab_size=100, **options)

    return Office(make, info("pd_master", "m"), Topology.of_master(http=2))


def state(**more: Any) -> NodeState:
    return NodeState(**{"used": 0, "cached": 0, "total": 100, "running": 0, "waiting": 0, **more})


JOINED = (
    PeerJoined(P, info("prefill", "p:1"), ""),
    PeerJoined(D, info("decode", "d:1"), ""),
    PeerMessage(P, state()),
    PeerMessage(D, state()),
)


def test_a_request_goes_to_its_nodes_and_its_tokens_to_its_process() -> None:
    async def script() -> None:
        office = master()

        async def go() -> None:
            await office.tell(*JOINED)
            rid = (1 << FRONTEND_SHIFT) + 5
            ((peer, name, decode),) = await office.tell(Submit(rid, i32([1, 2]), PARAMS))
            assert (peer, name, type(decode)) == (D, "agent", DecodeRequest)
            to = KvDestination(
                node="d", epoch=9, hit=0, length=2, addresses=("tcp://d:1",), wire=WIRE
            )
            ((peer, _, prefill),) = await office.tell(
                PeerMessage(D, DecodeReserved(decode.ticket, to))
            )
            assert (peer, type(prefill), prefill.to) == (P, PrefillRequest, to)
            tokens = Tokens(1, i64([decode.ticket]), i32([7]), b"\0", None, ())
            moved = Finished(decode.ticket, FinishReason.MOVED, cached_len=1)
            told = await office.tell(PeerMessage(P, tokens), PeerMessage(P, moved))
            assert (D, "agent", BeginDecode(decode.ticket, 7)) in told
            ((where, to_whom, out),) = [each for each in told if isinstance(each[2], Tokens)]
            assert (where, to_whom, list(out.rids)) == (1, "detokenizer", [rid])
            end = Finished(decode.ticket, FinishReason.STOP)
            told = await office.tell(PeerMessage(D, tokens), PeerMessage(D, end))
            ended = Finished(rid, FinishReason.STOP, cached_len=1, num_tokens=2)
            assert (1, "detokenizer", ended) in told

        await while_running(office, go())

    run(script)


def test_whoever_asks_is_told_what_is_missing_now_and_when_it_changes() -> None:
    async def script() -> None:
        office = master()

        async def go() -> None:
            ((_, _, first),) = await office.tell(AskServing(1))
            assert first == Serving("there is no prefill and no decode node")
            told = await office.tell(*JOINED)
            assert (1, "frontend", Serving("")) in told
            told = await office.tell(PeerLeft(D, JOINED[1].info, "cut"))
            assert told == [(1, "frontend", Serving("there is no decode node"))]

        await while_running(office, go())

    run(script)


def test_numbers_of_nodes_are_waited_for_and_kept() -> None:
    async def script() -> None:
        office = master(counts=(1, 2))

        async def go() -> None:
            await office.tell(*JOINED)
            assert office.actor.lacks == "there are 1 of 2 decode nodes (--pd_master_mode)"  # type: ignore[attr-defined]
            assert office.channel.admit(info("decode", "d:2")) is None
            refused = office.channel.admit(info("prefill", "p:2"))
            assert refused == "there are 1 prefill nodes already (--pd_master_mode)"
            office.channel.peers[9] = info("decode", "d:2")  # of which the actor is yet to be told
            refused = office.channel.admit(info("decode", "d:3"))
            assert refused == "there are 2 decode nodes already (--pd_master_mode)"
            # its former connection is not known to have ended
            assert office.channel.dropped == []
            assert office.channel.admit(JOINED[0].info) is None
            assert office.channel.dropped == [(P, "replaced by a new connection of its own")]

        await while_running(office, go())

    run(script)


def test_nodes_must_fit_each_other_and_have_a_role() -> None:
    async def script() -> None:
        office = master()

        async def go() -> None:
            await office.tell(PeerJoined(P, info("prefill", "p:1", model="a"), ""))
            admit = office.channel.admit
            assert admit(info("decode", "d:1", model="a")) is None
            assert admit(info("decode", "d:1", model="b")) == (
                "model of decode d:1 is b, that of prefill p:1 a"
            )
            assert "no prefill or decode node" in (admit(info("pd_master", "x")) or "")
            await office.tell(PeerJoined(D, info("decode", "d:1", model="a"), ""))
            assert admit(info("decode", "d:1", model="b")) is not None
            assert office.channel.dropped == [], "who is refused takes nobody's place"
            assert admit(info("prefill", "p:1", model="a")) is None
            assert office.channel.dropped == [(P, "replaced by another process with its address")]

        await while_running(office, go())

    run(script)


def test_the_table_of_nodes_tells_what_they_say_and_what_they_have_moved_stays_counted() -> None:
    async def script() -> None:
        office = master()

        async def go() -> None:
            moved = TransferTotals(sent_bytes=10, waiting=3)
            await office.tell(*JOINED[:3])
            await office.tell(PeerMessage(P, state(used=50, cached=20, draining=True, moved=moved)))
            ((_, _, told),) = await office.tell(AskNodes(4, 0))
            assert isinstance(told, NodesAnswer)
            rows = {row["role"]: row for row in json.loads(told.body)}
            assert rows["decode"]["state"] == "joining"
            row = rows["prefill"]
            assert (row["address"], row["state"], row["load"]) == ("p:1", "draining", 0.5)
            assert (row["used_tokens"], row["cached_tokens"]) == (50, 20)
            director = office.actor
            assert isinstance(director, Director)
            assert (director._stats(1).kv_sent_bytes, director._stats(1).kv_waiting) == (10, 3)
            await office.tell(PeerLeft(P, JOINED[0].info, "cut"))
            assert (director._stats(1).kv_sent_bytes, director._stats(1).kv_waiting) == (10, 0)

        await while_running(office, go())

    run(script)


@pytest.mark.parametrize(
    "why",
    ["its connection is closed", "it has been silent for 4.0 s (--dead_after)",
     "it does not read: 65,536 frames wait"],
)  # fmt: skip
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_whatever_a_node_has_left_for_its_requests_go_elsewhere_and_those_of_others_go_on(
    role: str, why: str
) -> None:
    async def script() -> None:
        office, spare = master(), P + 5

        async def go() -> None:
            await office.tell(*JOINED)
            ((_, _, decode),) = await office.tell(Submit(5, i32([1, 2]), PARAMS))
            to = KvDestination(node="d", epoch=1, hit=0, length=2, addresses=("x",), wire=WIRE)
            await office.tell(PeerMessage(D, DecodeReserved(decode.ticket, to)))
            await office.tell(PeerJoined(spare, info(role, "s:1"), ""), PeerMessage(spare, state()))
            told = await office.tell(PeerLeft(P if role == "prefill" else D, info(role, "x"), why))
            then_p, then_d = (spare, D) if role == "prefill" else (P, spare)
            ((where, again),) = [(w, m) for w, _, m in told if isinstance(m, DecodeRequest)]
            assert (where, list(again.outputs)) == (then_d, [])
            kept = D if role == "prefill" else P
            assert (kept, "agent", Abort(decode.ticket)) in told
            ((where, _, prefill),) = await office.tell(
                PeerMessage(then_d, DecodeReserved(again.ticket, to))
            )
            assert (where, type(prefill)) == (then_p, PrefillRequest)

        await while_running(office, go())

    run(script)


def test_a_master_that_drains_ends_what_it_has_and_takes_no_more() -> None:
    async def script() -> None:
        office = master()

        async def go() -> None:
            await office.tell(*JOINED)
            await office.tell(Submit(5, i32([1, 2]), PARAMS))
            assert await office.tell(Drain(5.0)) == []
            ((_, _, refused),) = await office.tell(Submit(6, i32([1]), PARAMS))
            assert refused.failure.status == 503
            told = await office.tell(Drain(0.0))
            assert (0, "watchdog", Drained("director", 0)) in told
            assert [m.rid for _, n, m in told if n == "detokenizer"] == [5]

        await while_running(office, go())

    run(script)


def test_tokens_beyond_the_vocabulary_are_impossible() -> None:
    async def script() -> None:
        director = master().actor
        for token, fine in ((99, True), (100, False)):
            msg = PeerMessage(P, Tokens(1, i64([1]), i32([token]), b"\0", None, ()))
            assert director.possible(msg) is fine  # type: ignore[arg-type]

    run(script)


# -- agent ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the HTTP port of a master says: each once, the last one for ever."""
    told = [9]

    async def find_channel(host: str, port: int, what: str) -> int:
        return told.pop(0) if len(told) > 1 else told[0]

    monkeypatch.setattr(peer_connector, "find_channel", find_channel)
    return told


def node(role: str = "decode") -> Office:
    def make(channel: Channel) -> Agent:
        return Agent(channel, [("m", 8000)], vocab_size=100, max_len=50)

    return Office(make, info(role, "n"), Topology.on_one_node().as_node())


MASTER = PeerJoined(P, info("pd_master", "m"), "m:9")
DECODE = DecodeRequest(ticket=3, prompt=i32([1, 2]), outputs=i32([]), params=PARAMS)


def test_what_a_master_asks_is_a_request_of_the_node_and_comes_back_under_its_ticket() -> None:
    async def script() -> None:
        office = node()

        async def go() -> None:
            await office.tell(MASTER, KvListening(0, "tcp://n:1", WIRE))
            ((_, name, submit),) = await office.tell(PeerMessage(P, DECODE))
            assert (name, submit.imports, submit.exports) == ("scheduler", True, None)
            rid = submit.rid
            ((peer, name, reserved),) = await office.tell(ImportPlaced(rid, 0, 1, 2))
            assert (peer, name, reserved.ticket) == (P, "director", 3)
            to = reserved.to
            assert (to.epoch, to.hit, to.length, to.addresses) == (rid, 1, 2, ("tcp://n:1",))
            assert to.node == office.channel.info.incarnation
            told = await office.tell(
                PeerMessage(P, BeginDecode(3, 8)), PeerMessage(P, StopHit(3, 2))
            )
            assert told == [
                (0, "scheduler", BeginDecode(rid, 8)),
                (0, "scheduler", StopHit(rid, 2)),
            ]
            tokens = Tokens(1, i64([rid, 99]), i32([7, 9]), b"\0\0", None, ())
            ((_, _, passed),) = await office.tell(tokens)
            assert (list(passed.rids), list(passed.tokens)) == ([3], [7])
            told = await office.tell(Finished(rid, FinishReason.STOP, num_tokens=2))
            assert told == [(P, "director", Finished(3, FinishReason.STOP, num_tokens=2))]
            assert await office.tell(PeerMessage(P, Abort(3))) == []

        await while_running(office, go())

    run(script)


def test_a_moved_request_is_kept_until_its_master_lets_go() -> None:
    async def script() -> None:
        office = node("prefill")

        async def go() -> None:
            await office.tell(MASTER)
            to = KvDestination(node="d", epoch=1, hit=0, length=2, addresses=("x",), wire=WIRE)
            msg = PrefillRequest(
                ticket=4, prompt=i32([1, 2]), outputs=i32([]), params=PARAMS, to=to
            )
            ((_, _, submit),) = await office.tell(PeerMessage(P, msg))
            assert (submit.imports, submit.exports) == (False, to)
            await office.tell(Finished(submit.rid, FinishReason.MOVED))
            assert not [m for _, _, m in await office.tell(Drain(9.0)) if isinstance(m, Drained)]
            told = await office.tell(PeerMessage(P, Abort(4)))
            assert (0, "scheduler", Abort(submit.rid)) in told
            assert (0, "watchdog", Drained("agent", 0)) in told

        await while_running(office, go())

    run(script)


@pytest.mark.parametrize("failure", [None, Failure("no such form")])
def test_a_grammar_is_compiled_first(failure: Failure | None) -> None:
    async def script() -> None:
        office = node()
        params = SamplingParams(max_new_tokens=4, grammar=("regex", "a"))

        async def go() -> None:
            await office.tell(MASTER)
            msg = DecodeRequest(ticket=3, prompt=i32([1]), outputs=i32([]), params=params)
            ((_, name, asked),) = await office.tell(PeerMessage(P, msg))
            assert (name, type(asked)) == ("grammar", CompileGrammar)
            ((where, _, then),) = await office.tell(GrammarReady(asked.job, failure))
            if failure is None:
                assert isinstance(then, Submit)
            else:
                assert (where, then) == (P, Finished(3, FinishReason.ERROR, failure))

        await while_running(office, go())

    run(script)


def test_requests_of_a_lost_master_end_and_it_is_looked_for_again() -> None:
    async def script() -> None:
        office = node()

        async def go() -> None:
            await office.tell(MASTER, AskServing(0))
            ((_, _, submit),) = await office.tell(PeerMessage(P, DECODE))
            told = await office.tell(PeerLeft(P, MASTER.info, "cut"))
            assert (0, "scheduler", Abort(submit.rid)) in told
            assert (0, "frontend", Serving("no pd_master is connected")) in told
            assert await office.tell(PeerMessage(P, DECODE)) == []

        await while_running(office, go())

    run(script)


def test_a_ticket_that_is_there_already_ends_the_connection() -> None:
    async def script() -> None:
        office = node()

        async def go() -> None:
            await office.tell(MASTER, PeerMessage(P, DECODE), PeerMessage(P, DECODE))
            assert office.channel.dropped == [(P, "ticket 3 is there already")]

        await while_running(office, go())

    run(script)


def test_a_node_that_drains_takes_nothing_and_says_so() -> None:
    async def script() -> None:
        office = node()

        async def go() -> None:
            await office.tell(MASTER)
            told = await office.tell(Drain(5.0))
            assert [type(msg) for _, _, msg in told] == [Scrape, Drained]
            load = GroupLoad(used=1, total=10, cached=2, running=3, waiting=4)
            told = await office.tell(Scraped(0, b"", (load, load), TransferTotals(sent_bytes=5)))
            wanted = NodeState(2, 4, 20, 6, 8, True, TransferTotals(sent_bytes=5))
            assert told == [(P, "director", wanted)]
            ((_, _, end),) = await office.tell(PeerMessage(P, DECODE))
            assert (end.rid, end.failure.code) == (3, "shutting_down")

        await while_running(office, go())

    run(script)


def test_a_master_that_does_not_take_this_node_ends_it_unless_it_has_been_let_in() -> None:
    async def script() -> None:
        office = node()
        running = asyncio.ensure_future(office.system.run())
        why = "model here is a, that of pd_master m b"
        await office.tell(KvListening(0, "tcp://n:1", WIRE), Started())
        await office.tell(PeerRefused("m:9", why))
        with pytest.raises(StartupError, match=why):
            await asyncio.wait_for(running, 20)
        office = node()

        async def go() -> None:
            await office.tell(Started(), KvListening(0, "tcp://n:1", WIRE))
            await office.tell(MASTER, PeerRefused("m:9", "another model"))

        await while_running(office, go())

    run(script)


@pytest.mark.parametrize(
    ("role", "waits"),
    [("prefill", [Started()]),
     ("decode", [Started(), KvListening(0, "x", WIRE)]),
     ("decode", [KvListening(0, "x", WIRE), Started()])],
)  # fmt: skip
def test_a_node_looks_for_masters_when_all_its_processes_are_there(
    role: str, waits: list[object]
) -> None:
    """Before that a request would find ranks that cannot be told of it."""

    async def script() -> None:
        office = node(role)

        async def go() -> None:
            for msg in waits:
                assert office.channel.dialled == []
                await office.tell(msg)
            assert office.channel.dialled == ["m:9"]

        await while_running(office, go())

    run(script)


def test_a_master_that_does_not_come_is_asked_again_where_its_channel_is(
    monkeypatch: pytest.MonkeyPatch, ports: list[int]
) -> None:
    monkeypatch.setattr(peer_connector, "JOIN_S", 0.01)
    ports[:] = [7, 7, 9]

    async def script() -> None:
        office = node("prefill")

        async def go() -> None:
            channel = office.channel
            await office.tell(Started())
            while channel.dialled[-1:] != ["m:9"]:  # noqa: ASYNC110  # it is told by nobody
                await asyncio.sleep(0.001)
            assert channel.forgotten[:2] == channel.dialled[:2] == ["m:7", "m:7"]
            await office.tell(MASTER, AskServing(0))
            ports[:] = [11]
            before = len(channel.dialled)
            await asyncio.sleep(0.05)
            assert len(channel.dialled) == before  # it is there
            told = await office.tell(PeerLeft(P, MASTER.info, "cut"))
            assert (0, "frontend", Serving("no pd_master is connected")) in told
            while channel.dialled[-1] != "m:11":  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert channel.forgotten[-1] in ("m:9", "m:11")

        await while_running(office, go())

    run(script)


def test_requests_beyond_the_limits_are_impossible() -> None:
    async def script() -> None:
        agent = node().actor
        long = DecodeRequest(ticket=1, prompt=i32([1] * 50), outputs=i32([]), params=PARAMS)
        strange = DecodeRequest(ticket=1, prompt=i32([100]), outputs=i32([]), params=PARAMS)
        for msg, fine in ((DECODE, True), (long, False), (strange, False)):
            assert agent.possible(PeerMessage(P, msg)) is fine  # type: ignore[arg-type]

    run(script)
