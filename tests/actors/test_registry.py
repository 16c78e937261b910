"""A config_server: who is told of which masters, and whose ranks meet at which port."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from torch._C._distributed_c10d import TCPStore

from asyncllm.actors import peer_connector
from asyncllm.actors.base import Actor
from asyncllm.actors.channel import Channel
from asyncllm.actors.config_client import ConfigServerClient
from asyncllm.actors.peer_messages import PeerInfo, PeerJoined, PeerMessage
from asyncllm.actors.registry import Registry
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.transport import CurveKeys
from asyncllm.codec import Message
from asyncllm.core.metrics import ProcessCounters
from asyncllm.errors import StartupError
from asyncllm.messages import (
    AnnounceMaster,
    AskMasters,
    Cancel,
    FindRendezvous,
    LeaseDenied,
    LeasePort,
    MasterList,
    PortLeased,
)
from asyncllm.server.config_server import open_store
from asyncllm.server.lease import Lease
from tests.actors.test_transport import run

KEYS = CurveKeys.make()
DEAD_AFTER_S = 4.0
WAIT_S = 45.0
HTTP_PORT = 60088  # at which nobody is asked here


class Keeper(Actor[Message]):
    """Keeps what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.got: list[Message] = []

    def receive(self, batch: list[Message]) -> None:
        self.got += batch

    def last(self) -> MasterList | None:
        """The masters that it knows."""
        return next((m for m in reversed(self.got) if isinstance(m, MasterList)), None)

    def addresses(self) -> list[str] | None:
        known = self.last()
        return None if known is None else sorted(each.address for each in known.masters)

    def cancelled(self) -> list[str]:
        return [m.request_id for m in self.got if isinstance(m, Cancel)]


class Place:
    """One server."""

    def __init__(self, role: str, name: str) -> None:
        self.channel = Channel(PeerInfo(role=role, name=name), (KEYS,), DEAD_AFTER_S)
        self.system = ActorSystem()
        self.task: asyncio.Task[None] | None = None

    def begin(self, owner: str, owners: dict[str, str] | None = None) -> None:
        self.system.use_channel(self.channel, owner, owners)
        self.task = asyncio.ensure_future(self.system.run())

    async def end(self) -> None:
        if self.task is not None and not self.task.done():
            self.system.stop()
            await self.task


class ConfigServer(Place):
    def __init__(self, port: int = 0) -> None:
        super().__init__("config_server", "c")
        self.channel.listen("127.0.0.1", port)
        self.registry = Registry(self.channel, lambda host, port: open_store(host, host, port))
        self.system.add(self.registry)
        self.begin("registry")

    def objects(self, kind: str) -> list[dict[str, object]]:
        return list(json.loads(self.registry.objects())[kind])


class Guided(Place):
    """A master, or a node."""

    def __init__(self, role: str, name: str) -> None:
        super().__init__(role, name)
        announces = AnnounceMaster("10.0.0.1", 9001) if role == "pd_master" else None
        self.client = ConfigServerClient(self.channel, ("127.0.0.1", HTTP_PORT), announces)
        self.owner, self.front = Keeper("owner"), Keeper("frontend")
        self.watchdog, self.agent = Keeper("watchdog"), Keeper("agent")
        for actor in (self.client, self.owner, self.front, self.watchdog, self.agent):
            self.system.add(actor)
        self.system.ref("config_client").tell(AskMasters(0))
        self.begin("owner", {"config_server": "config_client"})


@asynccontextmanager
async def all_of(*places: Place) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for place in places:
            await place.end()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # it is about sockets: there is no event
            await asyncio.sleep(0.01)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the config_server found at a port, as if its HTTP port had told; at 0: not yet."""
    ports = [0]

    async def find_channel(host: str, port: int, what: str) -> int:
        assert (host, port) == ("127.0.0.1", HTTP_PORT)
        while not ports[-1]:  # noqa: ASYNC110  # several loops
            await asyncio.sleep(0.01)
        return ports[-1]

    monkeypatch.setattr(peer_connector, "find_channel", find_channel)
    return ports.append


def test_masters_and_nodes_are_told_who_comes_and_goes(found: Callable[[int], None]) -> None:
    async def go() -> None:
        server = ConfigServer()
        found(server.channel.port)
        one, node = Guided("pd_master", "m:1"), Guided("decode", "d:1")
        async with all_of(server, one, node):
            await until(lambda: node.agent.addresses() == ["m:1"])
            two = Guided("pd_master", "m:2")
            await until(lambda: node.agent.addresses() == ["m:1", "m:2"])
            for place in (one, two, node):
                await until(lambda: place.front.addresses() == ["m:1", "m:2"])  # noqa: B023
            told = {each["address"]: each for each in server.objects("pd_masters")}
            assert told["m:1"]["id"] == one.channel.info.incarnation
            assert (told["m:2"]["channel_host"], told["m:2"]["channel_port"]) == ("10.0.0.1", 9001)
            assert [each["address"] for each in server.objects("nodes")] == ["d:1"]
            await two.end()
            await until(lambda: node.agent.addresses() == one.front.addresses() == ["m:1"])

    run(go())


def test_what_a_config_server_knew_comes_back_after_its_restart(
    found: Callable[[int], None],
) -> None:
    async def go() -> None:
        server = ConfigServer()
        found(server.channel.port)
        one, two = Guided("pd_master", "m:1"), Guided("pd_master", "m:2")
        node = Guided("prefill", "p:1")
        async with all_of(one, two, node):
            await until(lambda: node.agent.addresses() == ["m:1", "m:2"])
            await until(lambda: one.front.addresses() == ["m:1", "m:2"])
            found(0)
            await server.end()
            await until(lambda: (known := one.front.last()) and known.away)
            assert one.front.addresses() == ["m:1", "m:2"]  # as it was
            again = ConfigServer()
            found(again.channel.port)  # at another port, if need be
            async with all_of(again):
                told = len(node.agent.got)
                await until(lambda: len(again.objects("pd_masters")) == 2)
                await until(lambda: node.agent.addresses() == ["m:1", "m:2"])
                assert len(node.agent.got) > told
                await until(lambda: not (known := one.front.last()) or not known.away)

    run(go())


def test_who_was_told_a_port_at_which_nobody_is_asks_again(
    found: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_connector, "JOIN_S", 0.5)

    async def go() -> None:
        found(unused_port())  # of a config_server that has gone
        server, one, port = ConfigServer(), Guided("pd_master", "m:1"), unused_port()
        lease = a_lease("normal a:1", LeasePort(port=port, host="127.0.0.1"))
        async with all_of(server, one):
            asked = asyncio.get_running_loop().run_in_executor(None, lease.take, WAIT_S)
            await asyncio.sleep(0.3)
            found(server.channel.port)
            await until(lambda: one.front.addresses() == ["m:1"])
            assert await asked == ""
            await asyncio.to_thread(lease.close)

    run(go())


def test_an_abort_reaches_all_other_masters_and_no_node(found: Callable[[int], None]) -> None:
    async def go() -> None:
        server = ConfigServer()
        found(server.channel.port)
        one, two = Guided("pd_master", "m:1"), Guided("pd_master", "m:2")
        node = Guided("decode", "d:1")
        async with all_of(server, one, two, node):
            await until(lambda: len(server.objects("pd_masters")) == 2)
            await until(lambda: node.agent.addresses() == ["m:1", "m:2"])
            one.system.ref("config_client").tell(Cancel("mine"))
            await until(lambda: two.watchdog.cancelled() == ["mine"])
            two.system.ref("config_client").tell(Cancel(""))
            await until(lambda: one.watchdog.cancelled() == [""])
            assert node.watchdog.got == []

    run(go())


def test_a_master_that_has_started_anew_takes_the_place_of_what_it_was(
    found: Callable[[int], None],
) -> None:
    async def go() -> None:
        server = ConfigServer()
        found(server.channel.port)
        before = Guided("pd_master", "m:1")
        async with all_of(server, before):
            await until(lambda: server.objects("pd_masters"))
            after = Guided("pd_master", "m:1")
            async with all_of(after):
                ids = [after.channel.info.incarnation]
                await until(lambda: [o["id"] for o in server.objects("pd_masters")] == ids)
                before.system.stop()

    run(go())


def test_who_is_there_and_who_has_gone_are_counted(found: Callable[[int], None]) -> None:
    def value(series: str) -> float:
        process = ProcessCounters([("registry", 3, 0.5, 0.25)], dead_letters=4, failed_handshakes=2)
        lines = server.registry.registered(process).exposition().decode().splitlines()
        (line,) = (line for line in lines if line.startswith(f"asyncllm_{series} "))
        return float(line.rpartition(" ")[2])

    def members(role: str) -> tuple[float, float]:
        there, gone = (f'{n}{{role="{role}"}}' for n in ("members", "members_left_total"))
        return value(there), value(gone)

    server: ConfigServer

    async def go() -> None:
        nonlocal server
        server, port = ConfigServer(), unused_port()
        found(server.channel.port)
        assert members("pd_master") == members("decode") == (0, 0)
        one, node = Guided("pd_master", "m:1"), Guided("decode", "d:1")
        lease, other = (
            a_lease(f"normal {name}:1", LeasePort(port=port, host="127.0.0.1")) for name in "ab"
        )
        async with all_of(server, node):
            async with all_of(one):
                await until(lambda: members("pd_master") == members("decode") == (1, 0))
            await until(lambda: members("pd_master") == (0, 1))
            await asyncio.to_thread(lease.take, WAIT_S)
            with pytest.raises(StartupError):
                await asyncio.to_thread(other.take, WAIT_S)
            assert (value("nccl_ports"), value("nccl_ports_denied_total")) == (1, 1)
            assert members("group")[0] >= 1
            assert (value("dead_letters_total"), value("strangers_total")) == (4, 2)
            assert value('mailbox_depth{actor="registry"}') == 3
            for each in (lease, other):
                await asyncio.to_thread(each.close)

    run(go())


def test_who_may_not_register_is_told_so(found: Callable[[int], None]) -> None:
    async def go() -> None:
        server = ConfigServer()
        found(server.channel.port)
        wrong = Guided("config_server", "x:1")
        async with all_of(server):
            assert wrong.task is not None
            with pytest.raises(
                StartupError, match="does not take this server: a config_server tak"
            ):
                await wrong.task

    run(go())


# -- where ranks meet ------------------------------------------------------------------------------


def a_lease(name: str, asks: LeasePort | FindRendezvous) -> Lease:
    channel = Channel(PeerInfo(role="group", name=name), (KEYS,), DEAD_AFTER_S)
    return Lease(channel, ("127.0.0.1", HTTP_PORT), asks)


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_a_port_is_one_servers_until_it_goes(found: Callable[[int], None]) -> None:
    async def go() -> None:
        server, port = ConfigServer(), unused_port()
        found(server.channel.port)
        loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor()
        claim = LeasePort(port=port, host="127.0.0.1", meets="10.0.0.1")
        first, second = a_lease("normal a:1", claim), a_lease("normal b:1", claim)
        async with all_of(server):
            sought = a_lease("normal a:2", FindRendezvous(port))
            where = loop.run_in_executor(pool, sought.take, WAIT_S)  # before anybody is there
            assert await loop.run_in_executor(pool, first.take, WAIT_S) == ""
            assert await where == "10.0.0.1"
            store = await loop.run_in_executor(None, meet_at, port)
            store.set("k", "v")
            with pytest.raises(StartupError, match=rf"port {port}.*ranks of normal a:1 meet there"):
                await loop.run_in_executor(pool, second.take, WAIT_S)
            assert store.get("k") == b"v"  # nobody else has been touched
            assert [each["owner"] for each in server.objects("groups")] == ["normal a:1"]
            for lease in (first, second, sought):
                await loop.run_in_executor(pool, lease.close)
            await until(lambda: not server.objects("groups"))
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5)
            third = a_lease("normal c:1", claim)
            assert await loop.run_in_executor(pool, third.take, WAIT_S) == ""
            await loop.run_in_executor(pool, third.close)

    run(go())


def meet_at(port: int) -> TCPStore:
    return TCPStore("127.0.0.1", port, world_size=2, is_master=False)


def test_ranks_that_have_met_keep_their_port_through_a_restart(
    found: Callable[[int], None],
) -> None:
    async def go() -> None:
        server, port = ConfigServer(), unused_port()
        found(server.channel.port)
        loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor()
        claim = LeasePort(port=port, host="127.0.0.1")
        lease, other = a_lease("normal a:1", claim), a_lease("normal b:1", claim)
        await loop.run_in_executor(pool, lease.take, WAIT_S)
        found(0)
        await server.end()
        again = ConfigServer()
        found(again.channel.port)
        async with all_of(again):
            await until(lambda: again.objects("groups"))
            with pytest.raises(StartupError, match="normal a:1"):
                await loop.run_in_executor(pool, other.take, WAIT_S)
            # nothing listens there any more: they need it no longer
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5)
            for each in (lease, other):
                await loop.run_in_executor(pool, each.close)

    run(go())


def test_a_server_that_connects_again_before_it_is_missed_keeps_its_port() -> None:
    """A config_server that was stopped hears of the new connection first."""

    async def go() -> None:
        server, port = ConfigServer(), unused_port()
        info = PeerInfo(role="group", name="normal a:1")
        places = [Place("group", "normal a:1") for _ in range(3)]
        tenants = [Keeper("tenant") for _ in places]
        for place, tenant, told in zip(
            places, tenants, (info, info, replace(info, incarnation="another")), strict=True
        ):
            place.channel.info = told
            tenant.foreign = frozenset({PortLeased, LeaseDenied})
            place.system.add(tenant)
            place.begin("tenant")
        first, again, other = places
        async with all_of(server, *places):

            async def claims(place: Place, *, again: bool) -> Message:
                place.channel.dial("127.0.0.1", server.channel.port)
                tenant = tenants[places.index(place)]
                await until(lambda: tenant.got)
                (joined,) = tenant.got
                assert isinstance(joined, PeerJoined)
                claim = LeasePort(port=port, host="127.0.0.1", again=again)
                place.system.ref("registry", joined.peer).tell(claim)
                await until(lambda: len(tenant.got) == 2)
                answer = tenant.got[1]
                assert isinstance(answer, PeerMessage)
                return answer.msg

            assert await claims(first, again=False) == PortLeased(port)
            store = await asyncio.to_thread(meet_at, port)
            assert await claims(again, again=True) == PortLeased(port)
            await first.end()
            await until(lambda: len(server.channel.peers) == 1)
            await until(lambda: len(server.registry._infos) == 1)
            assert [each["owner"] for each in server.objects("groups")] == ["normal a:1"]
            store.set("k", "v")  # its ranks may still be meeting
            await again.end()
            await until(lambda: not server.objects("groups"))
            assert await claims(other, again=False) == PortLeased(port)

    run(go())


def test_a_port_that_cannot_be_used_is_named(found: Callable[[int], None]) -> None:
    async def go() -> None:
        server = ConfigServer()
        found(server.channel.port)
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = int(taken.getsockname()[1])
            lease = a_lease("normal a:1", LeasePort(port=port, host="127.0.0.1"))
            async with all_of(server):
                with pytest.raises(
                    StartupError, match=rf"127.0.0.1:{port}: Address already in use"
                ):
                    await loop.run_in_executor(None, lease.take, WAIT_S)
                await loop.run_in_executor(None, lease.close)

    run(go())


def test_nobody_waits_for_ever_for_a_config_server() -> None:
    lease = a_lease("normal a:1", LeasePort(port=28765, host="127.0.0.1"))
    with pytest.raises(StartupError, match=rf"127.0.0.1:{HTTP_PORT}: no config_server has answ"):
        lease.take(0.1)
    lease.close()


def test_a_store_listens_on_one_address_only() -> None:
    port = unused_port()
    store = open_store("0.0.0.0", "127.0.0.1", port)  # of a config_server that listens everywhere
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    del store
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    with pytest.raises(StartupError, match=r"203.0.113.9.*--nccl_host"):
        open_store("203.0.113.9", "127.0.0.1", port)
