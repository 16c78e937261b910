"""Runs one process of a server, from loading to exit code: children, signals, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import threading
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from socket import socket
from time import monotonic
from typing import NoReturn

import torch

from asyncllm.actors.channel import Channel
from asyncllm.actors.heartbeats import Heartbeats
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.transport import CurveKeys, TransportSettings
from asyncllm.actors.watchdog import EXIT_HUNG
from asyncllm.actors.watchdog_settings import WatchdogHooks, dump_stacks
from asyncllm.api.openapi.welcome import curl_line
from asyncllm.config import roles
from asyncllm.core.metrics import ProcessCounters, ServerMetrics, StatsSnapshot
from asyncllm.errors import FatalError, Mismatch, PeerLost, StartupError
from asyncllm.messages import Drain, GroupFailed, WorkerReplaced
from asyncllm.models.spec import ModelSpec
from asyncllm.server.assembly import place
from asyncllm.server.cluster import introduce
from asyncllm.server.compile_helper import CompileHelper
from asyncllm.server.culprit import Culprit
from asyncllm.server.early_ranks import EarlyRanks
from asyncllm.server.endpoint_assignment import EndpointAssignment
from asyncllm.server.launch import (
    EXIT_FAILED,
    Boot,
    Children,
    watch_parent,
)
from asyncllm.server.loading import Loaded, load_endpoint, num_threads, torch_device
from asyncllm.server.preflight import try_ways
from asyncllm.server.signals import SHOW, SignalWatcher, handle_draining
from asyncllm.server.status import JSON, TEXT, Page, StatusPages
from asyncllm.text import ModelTokenizer
from asyncllm.topology import HTTP, Endpoint, Topology

EXIT_STARTUP = 2
CHILD_S = 1.0  # for children to end by themselves, and to say why
CULPRIT_S = 1.5  # for the cause of a failed collective to be heard of
FAIL_S = 3.0  # from a failure to the end: final logs of all processes, and noticing the failed one
LEAVING_S = 2.0  # for the process group to shut down; then the process ends anyway
MINUTE_S = 60.0
MOST_REPLACED = 3  # HTTP workers per minute
SWITCH_INTERVAL_S = 0.0005  # a helper thread that needs the GIL must not hold the loop for 5 ms

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeResources:
    """State that only the process that the user started on a node has.

    Args:
        assignment: where it and its children listen, and its link to the other nodes.
        status: bound socket for /health and /metrics of a node that serves no requests.
        channel: to other servers of a cluster; None: it belongs to none.
        ahead: the helper that compiles this node's kernels; None: kernels compile at first use.
        early: the node's other ranks, as far as they have been started already.
    """

    assignment: EndpointAssignment | None = None
    status: socket | None = None
    channel: Channel | None = None
    ahead: CompileHelper | None = None
    early: EarlyRanks | None = None


class Server:
    """One process of the server, from load to exit."""

    def __init__(
        self,
        boot: Boot,
        spec: ModelSpec,
        text: ModelTokenizer | None,
        resources: NodeResources,
        watch: SignalWatcher,
    ) -> None:
        self._boot, self._spec, self._text = boot, spec, text
        self._watch, assignment = watch, resources.assignment
        self._wires = None if assignment is None else assignment.wires
        self._node_link = None if assignment is None else assignment.node_link
        self._status: StatusPages | None = None
        self._status_socket, self._channel = resources.status, resources.channel
        self._ahead, self._early = resources.ahead, resources.early
        self._system: ActorSystem
        self._children: Children | None = None
        self._leaving = threading.Lock()
        # actors run; HTTP is served; it drains; it fails
        self._acting = self._open = self._drains = self._failing = False
        self._code = 1  # exit code if the server fails
        self._culprit = Culprit(CULPRIT_S, self._fail)
        self._heard_of_it = threading.Event()  # another node has failed
        self._checked = False  # --check has finished its tests
        self._heartbeats: Heartbeats | None = None
        self._lost_groups: set[int] = set()  # that had processes on this node
        self._next_endpoint = len(boot.topology.endpoints)  # numbers are never reused
        self._replaced: deque[float] = deque()  # recent restarts of HTTP workers

    async def run(self) -> int:
        """Load, run the actors until they stop, and return the exit code."""
        boot = self._boot
        if boot.heads:
            self._lead()
        elif boot.me.replaceable:
            loop = asyncio.get_running_loop()
            orphaned = partial(self._fail_from_thread, loop, 1, "rank 0 has gone")
            watch_parent(boot.parent, orphaned)
        self._system = ActorSystem(boot.endpoint, self._wire(), topology=boot.topology)
        self._system.on_failure = self._failed
        try:
            await self._open_status()
            self._start_children(replaceable=False)
            if boot.config.check:
                return await self._check()
            if self._children:
                num = sum(endpoint.replaceable for endpoint in self._others_here())
                self._children.prepare_workers(num, boot, num_threads(boot))
            loaded = await self._load()
            self._boot = loaded.boot
            # they need the limits that follow from the K/V size
            self._start_children(replaceable=True)
            self._assemble(loaded)
            await self._system.run()
        except FatalError as error:
            why = await self._wait_for_first_failure() or str(error)
            self._tell_nodes(self._code, why)
            logger.critical("%s ends: %s", self._boot.name, error)
            self._abandon(self._code)
        except Mismatch:
            if self._children:
                await self._children.close(CHILD_S)  # the child finds and reports the same
            raise
        except StartupError as error:
            self._tell_nodes(EXIT_STARTUP, str(error))
            self._stop_children()
            raise
        finally:
            self._system.close()
            if self._status is not None:
                await self._status.close()
        # NCCL's ranks leave together: waiting for the others to end first would hang
        leave = loaded.ranks.close if loaded.ranks is not None else lambda: None
        leaving = threading.Thread(target=leave, daemon=True)
        leaving.start()
        if self._children:
            await self._children.close()
        leaving.join(LEAVING_S)
        return 0

    async def _check(self) -> int:
        """--check on several nodes: all test their connections to each other and end."""
        boot, loop = self._boot, asyncio.get_running_loop()
        table = await loop.run_in_executor(None, try_ways, boot, torch_device(boot))
        self._checked = True
        if self._children:
            await self._children.close()
            sys.stdout.write(f"{table}\n")
        return 0

    def _lead(self) -> None:
        """In the process that the user started: handle signals, start the other processes of the
        node and monitor other nodes."""
        handle_draining(asyncio.get_running_loop(), self._signalled)
        self._children = children = Children(self._child_died, self._early)
        self._watch.leave = self._abandon
        self._watch.forward = lambda: children.signal(SHOW)
        if self._node_link is not None:
            loop = asyncio.get_running_loop()

            def ends(code: int, why: str) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has already ended
                    loop.call_soon_threadsafe(self._node_lost, code, why)
                    if not self._heard_of_it.wait(FAIL_S):  # the loop hangs, or has just ended
                        self._abandon(code)

            self._node_link.watch(ends)

    async def _open_status(self) -> None:
        if (sock := self._status_socket) is not None:
            pages: dict[str, Page] = {"/health": self._health, "/metrics": self._exposition}
            there = "this node answers /health and /metrics; requests go to node 0"
            self._status = StatusPages(pages, self._boot.config, there)
            await self._status.open(sock)

    def _health(self) -> tuple[int, str, bytes]:
        if self._acting and not self._system.over:
            return 200, JSON, b'{"message":"Ok"}'
        return 503, JSON, b'{"message":"Error"}'

    def _exposition(self) -> tuple[int, str, bytes]:
        """Metrics of this process; node 0 has those of the server."""
        system, resolved = self._system, self._boot.resolved
        metrics = ServerMetrics(resolved.served_names[0], resolved.max_req_total_len)
        actors = [(a.name, a.depth, a.busy_s, a.take_longest()) for a in system.actors]
        counts = system.dead_letters, *system.counted(self._others())
        metrics.update(StatsSnapshot(), ProcessCounters(actors, *counts))
        return 200, TEXT, metrics.exposition()

    def _others(self) -> tuple[int, int]:
        """Foreign frames counted by this node's other processes and by the meeting of the nodes."""
        foreign = failed_handshakes = 0
        if self._heartbeats is not None:
            foreign, failed_handshakes = self._heartbeats.noted(
                self._next_endpoint, self._boot.endpoint
            )
        if self._node_link is not None:
            foreign += self._node_link.foreign_frames
            failed_handshakes += self._node_link.failed_handshakes
        return foreign, failed_handshakes

    def _wire(self) -> TransportSettings | None:
        boot = self._boot
        if not boot.me.address:
            return None
        peers = {e.id: e.address for e in boot.topology.peers(boot.endpoint) if e.address}
        return TransportSettings(boot.me.address, CurveKeys(*boot.keys), peers, boot.advertised)

    async def _load(self) -> Loaded:
        loop = asyncio.get_running_loop()
        loaded = self._boot, self._spec, self._text, self._ahead
        try:
            return await loop.run_in_executor(None, load_endpoint, *loaded)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise StartupError(
                f"out of memory while loading: {error} "
                "(--mem_fraction, --max_total_token_num, --tp)"
            ) from None
        except RuntimeError:
            await self._wait_for_first_failure()
            raise

    async def _wait_for_first_failure(self) -> str:
        """A collective also fails because another process did: gives what is known of that."""
        if self._children:
            await self._children.wait(CHILD_S)
        if self._node_link is not None:  # it may have been on another node
            await self._culprit.wait()
        self._stop_children()
        return self._culprit.why

    def _stop_children(self) -> None:
        if self._children:
            self._children.kill()

    def _start_children(self, *, replaceable: bool) -> None:
        for endpoint in self._others_here() if self._children else ():
            if endpoint.replaceable == replaceable:
                self._start_child(endpoint, self._system.topology)

    def _others_here(self) -> list[Endpoint]:
        """The other processes of the node."""
        me = self._boot.me
        return [endpoint for endpoint in self._boot.topology.on(me.node) if endpoint != me]

    def _start_child(self, endpoint: Endpoint, topology: Topology) -> None:
        assert self._children is not None
        assert self._wires is not None
        boot = replace(
            self._boot,
            endpoint=endpoint.id,
            topology=topology.at(endpoint.id, self._wires.address(endpoint.id)),
            parent=os.getpid(),
            listen_fd=self._boot.listen_fd if HTTP in endpoint.roles else -1,
            store_fd=-1,
        )
        self._children.start(boot, num_threads(boot))

    def _assemble(self, loaded: Loaded) -> None:
        """Create the actors, ready to run."""
        system, loop = self._system, asyncio.get_running_loop()
        hooks = WatchdogHooks(exit=partial(self._fail_from_thread, loop, reason="it hangs"))
        if self._children:
            hooks = replace(hooks, kill=self._children.kill_one)
        if self._boot.heartbeats_fd >= 0:
            self._heartbeats = beats = Heartbeats(self._boot.heartbeats_fd)
            hooks = replace(hooks, beat=beats.beat, last_beat=beats.last, note=beats.note)
        hooks = replace(hooks, others=self._others)
        if self._channel is not None:
            system.use_channel(self._channel, *introduce(self._channel, loaded.boot))
        for actor in place(loaded, hooks, self._opened, self._channel):
            system.add(actor)
        self._acting = True
        self._watch.state = system.state
        if self._boot.heads and not self._boot.coordinates:
            sys.stdout.write(
                f"asyncllm is ready: node {self._boot.me.node} belongs to node 0's server\n"
            )
            sys.stdout.flush()
        gc.collect()
        gc.freeze()  # a full collection over the start-up objects would stop the loop for 100 ms
        sys.setswitchinterval(SWITCH_INTERVAL_S)

    def _opened(self) -> None:
        self._open = True
        if self._boot.coordinates:
            self._say_ready()
            self._spare_nodes()

    def _spare_nodes(self) -> None:
        """Nodes that hold only expendable groups may fail."""
        if self._node_link is None:
            return
        topology, loop = self._boot.topology, asyncio.get_running_loop()
        nodes = [
            node
            for node in topology.nodes
            if all(topology.expendable(rank.group) for rank in topology.on(node))
        ]

        def gone(node: int, why: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has already ended
                loop.call_soon_threadsafe(self._node_gone, node, why)

        self._node_link.spare(nodes, gone)

    def _node_gone(self, node: int, why: str) -> None:
        if not self._system.over:  # otherwise all were told to end
            for group in sorted({rank.group for rank in self._boot.topology.on(node)}):
                self._system.ref("watchdog").tell(GroupFailed(group, why))

    def _say_ready(self) -> None:
        boot = self._boot
        names = boot.resolved.served_names
        host = boot.config.host
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        host = f"[{host}]" if ":" in host else host
        scheme = "https" if boot.config.ssl_certfile else "http"
        url = f"{scheme}://{host}:{boot.config.port}"
        if boot.config.run_mode in roles.NODES:
            what = f"{boot.config.run_mode} node {url}; requests go to its pd_master"
        else:
            line = curl_line(url, names[0], secured=bool(boot.config.api_key))
            what = f"{url} serves {names[0]}\n{line}"
        sys.stdout.write(f"asyncllm is ready: {what}\n")
        sys.stdout.flush()

    # -- the end --------------------------------------------------------------------------------

    def _signalled(self) -> None:
        if not self._acting:
            logger.info("stopped while starting")
            self._abandon(0)
        self._drains = True
        drain = Drain(self._boot.config.drain_timeout)
        self._system.ref("watchdog").tell(drain)

    def _node_lost(self, code: int, why: str) -> None:
        self._heard_of_it.set()
        if self._checked:
            return
        if self._acting and self._system.over and not self._failing:
            return  # all of them were told to end
        logger.critical("%s: stopping the server", why)
        self._culprit.found(code if code in (EXIT_STARTUP, EXIT_HUNG) else 1, why)

    def _tell_nodes(self, code: int, why: str) -> None:
        if self._node_link is not None:
            self._node_link.fail(code, why)

    def _child_died(self, boot: Boot, pid: int, code: int) -> None:
        """A rank is part of the model; an HTTP worker owns nothing and is replaced."""
        replaceable = boot.me.replaceable
        over = self._acting and self._system.over
        if over and (code == 0 or replaceable):
            return  # it was told to end
        if code == 0 and self._boot.config.check:
            return  # it has tested its connections
        what = f"{boot.name} (pid {pid}) ended with exit code {code}"
        if replaceable and self._open:
            self._replace(boot.me, what)
            return
        if self._lose(boot.me.group, what):
            return
        logger.critical("%s: stopping the server", what)
        if code == EXIT_HUNG:
            dump_stacks()  # a collective hangs everywhere; this may be the side that shows why
        if code == EXIT_FAILED and self._node_link is not None:
            self._culprit.suspect(what)
        else:
            self._culprit.found(code if code in (EXIT_STARTUP, EXIT_HUNG) else 1, what)

    def _lose(self, group: int, what: str) -> bool:
        """A rank here has died; False: the server cannot continue without its group."""
        topology = self._system.topology
        if group in self._lost_groups or group in topology.lost:
            return True
        others = self._acting and group != self._boot.me.group and topology.expendable(group)
        if not others or (self._boot.coordinates and not self._open):
            return False
        self._lost_groups.add(group)
        assert self._children is not None
        for rank in topology.group(group):
            self._children.kill_one(rank.id)
        if not self._boot.coordinates:
            logger.error("%s: group %d is lost", what, group)
        self._system.at_coordinator("watchdog").tell(GroupFailed(group, what))
        return True

    def _replace(self, dead: Endpoint, what: str) -> None:
        now, by = monotonic(), None
        while self._replaced and self._replaced[0] <= now - MINUTE_S:
            self._replaced.popleft()
        if self._drains:
            logger.error("%s", what)
        elif len(self._replaced) == MOST_REPLACED:
            logger.critical(
                "%s, the %dth HTTP worker within a minute: stopping the server",
                what,
                MOST_REPLACED + 1,
            )
            self._fail(1, what)
            return
        else:
            self._replaced.append(now)
            by = replace(dead, id=self._next_endpoint, address="")
            self._next_endpoint += 1
            topology = self._system.topology.replaced(dead.id, by)
            self._start_child(by, topology)
            logger.error("%s: %s replaces it", what, topology.name(by.id))
        self._system.ref("watchdog").tell(WorkerReplaced(dead.id, by))

    def _fail(self, code: int, reason: str) -> None:
        """End with ``code`` after notifying those who wait for answers. On the loop."""
        self._tell_nodes(code, reason)
        if not self._acting or (self._system.over and not self._failing):
            self._abandon(code)
        if self._code == 1:  # the first informative reason counts
            self._code = code
        self._system.fail(PeerLost(reason))

    def _fail_from_thread(
        self, loop: asyncio.AbstractEventLoop, code: int, reason: str
    ) -> NoReturn:
        """The same from another thread, even if the loop hangs."""
        with contextlib.suppress(RuntimeError):  # the loop has already ended
            loop.call_soon_threadsafe(self._fail, code, reason)
        threading.Event().wait(FAIL_S)
        self._abandon(code)

    def _failed(self) -> None:
        """The actor system has failed; its shutdown may hang as well."""
        self._failing = True
        timer = threading.Timer(FAIL_S, lambda: self._abandon(self._code))
        timer.daemon = True
        timer.start()

    def _abandon(self, code: int) -> NoReturn:
        """Exit at once: other threads may hang in a collective or on a device. Thread-safe."""
        self._leaving.acquire()  # never released: the first reason counts
        self._stop_children()
        if self._node_link is not None:
            self._node_link.fail(code or 1, f"{self._boot.name} has ended")
            self._node_link.close()
        if self._wires:
            self._wires.close()
        sys.stdout.flush()
        logging.shutdown()
        os._exit(code)
