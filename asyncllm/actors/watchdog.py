"""Watchdog: starts and drains the server, detects dead or hanging endpoints, gathers metrics.

Knows liveness, drain and metrics; knows neither requests nor what a step computes.
One runs on every endpoint. The coordinator's leads: it waits for all, drains, and answers scrapes.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import assert_never

from asyncllm.actors.base import Actor
from asyncllm.actors.membership import check_member
from asyncllm.actors.watchdog_settings import WatchdogConfig, WatchdogHooks
from asyncllm.core.metrics import (
    ProcessCounters,
    ServerMetrics,
    Stats,
    StatsSnapshot,
    describe_slots,
    gather,
)
from asyncllm.errors import Mismatch, PeerLost
from asyncllm.log import RateLimitedLog
from asyncllm.messages import (
    AllocatorStats,
    Cancel,
    DirectorStats,
    Drain,
    Drained,
    EndpointGone,
    GroupFailed,
    GroupRemoved,
    Halt,
    Hello,
    Probe,
    RequestServed,
    RunnerStats,
    SchedulerStats,
    Scrape,
    Scraped,
    ServerLost,
    Started,
    TransferStats,
    Welcome,
    WorkerOverrun,
    WorkerReplaced,
)
from asyncllm.topology import WORKERS

EXIT_HUNG = 70
LAST_RESORT_S = 5.0
ABORT_S = 2.0  # for the answers to requests that a drain aborted
PROBE_S = 1.0  # for the answers to a probe; those who miss it are reported with older numbers

Inbox = (
    Hello
    | Welcome
    | Cancel
    | WorkerReplaced
    | WorkerOverrun
    | GroupFailed
    | ServerLost
    | Drain
    | Drained
    | Halt
    | Scrape
    | RequestServed
    | SchedulerStats
    | AllocatorStats
    | RunnerStats
    | TransferStats
    | DirectorStats
)
REPORTER: dict[type[Stats], str] = {
    SchedulerStats: "scheduler",
    AllocatorStats: "allocator",
    RunnerStats: "runner",
    TransferStats: "kv_transfer",
    DirectorStats: "director",
}

log = logging.getLogger(__name__)


class Watchdog(Actor[Inbox]):
    """Start, liveness, drain and metrics of the server.

    The topology defines the endpoints, and which of their actors have work or metrics. ``Drain``
    sent to the coordinator's watchdog ends the server: it tells frontends and schedulers, and when
    they have drained, or the time is over and running requests have been aborted, every endpoint
    stops. A second ``Drain`` stops them at once.

    Raises:
        PeerLost: an endpoint that cannot be replaced has been silent for too long, or the server
            fails.
        Mismatch: an endpoint and the coordinator cannot belong to one server.
    """

    def __init__(self, config: WatchdogConfig, hooks: WatchdogHooks | None = None) -> None:
        super().__init__("watchdog")
        self._config, self._hooks = config, hooks or WatchdogHooks()
        self._leads = self._open = False
        self._absent: set[int] = set()  # not joined yet
        self._heard: dict[int, float] = {}  # from a peer's first heartbeat on
        self._removed: list[GroupRemoved] = []  # groups that the server continues without
        self._due = self._beat_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._lags: deque[float] = deque(maxlen=100)
        self._metrics = ServerMetrics(config.model_name, config.max_len, config.linears)
        # drain: who still has work, and when to stop waiting
        self._busy: set[tuple[str, int]] | None = None
        self._deadline, self._aborting = 0.0, False
        # scrapes: at most one probe is pending; later requests get the next one
        self._probe: _StatsCollection | None = None
        self._num_probes = 0
        self._reports: dict[tuple[str, int], Stats] = {}  # the last of each (actor, endpoint)
        self._silent_log = RateLimitedLog(log)
        self._scrapes: list[Scrape] = []
        self._log_wanted = False
        self._logged, self._logged_at, self._log_due = StatsSnapshot(), 0.0, 0.0
        # A thread, since a launch on a full queue hangs the loop and the loop's timers with it. It
        # also sends the heartbeat: the process may be alive while its loop is busy.
        self._watcher = threading.Thread(target=self._watch_forever, name="watch", daemon=True)
        self._ended = threading.Event()

    def started(self) -> None:
        me, topology = self.system.endpoint, self.system.topology
        self._leads = me == topology.coordinator.id
        if self._leads:
            # other leaders have metrics, and send to HTTP workers, too
            several = (*REPORTER, WorkerOverrun) if len(topology.groups) > 1 else ()
            # any node may get a signal or lose a group
            nodes = (Drain, GroupFailed) if len(topology.nodes) > 1 else ()
            self.remote = frozenset(
                {Hello, Cancel, Drained, Scrape, RequestServed, *several, *nodes}
            )
            self._absent = {e.id for e in topology.endpoints} - {me}
        else:
            self.remote = frozenset({Welcome, Halt, ServerLost})
        self.system.on_overrun = self._overrun
        now = self._hooks.clock()
        self._due = now + self._hooks.tick_s
        self._beat_at = self._logged_at = now
        self._log_due = now + self._config.log_every_s
        if self._leads:
            self._start_serving()
        else:
            hello = Hello(
                endpoint=me,
                contract=self._config.contract,
                node=topology[me].node,
                address=self.system.address,
            )
            self.system.at_coordinator("watchdog").tell(hello)
        self._arm()
        self._hooks.beat(me, now)
        if self._hooks.watch_s > 0:
            self._watcher.start()

    def receive(self, batch: list[Inbox]) -> None:
        for msg in batch:
            match msg:
                case Hello():
                    self._hello(msg)
                case Welcome(contract, topology):
                    me = self.system.topology[self.system.endpoint]
                    check_member(topology, me.id, me.node, contract, self._config.contract)
                    self.system.join(topology)
                case Cancel():
                    for endpoint in self.system.topology.placed("frontend"):
                        self.system.ref("frontend", endpoint).tell(msg)
                case WorkerReplaced():
                    self._replaced(msg)
                case WorkerOverrun(endpoint):
                    if endpoint in self._heard and self.system.topology[endpoint].replaceable:
                        self._hooks.kill(endpoint)
                case GroupFailed(group, why):
                    self._lose(group, why)
                case ServerLost(why):
                    raise PeerLost(why)
                case Drain(timeout_s):
                    self._drain(timeout_s)
                case Drained(who, endpoint):
                    self._drained(who, endpoint)
                case Halt():
                    self.system.stop()
                case Scrape():
                    self._scrapes.append(msg)
                case RequestServed():
                    self._served(msg)
                case (
                    SchedulerStats()
                    | AllocatorStats()
                    | RunnerStats()
                    | TransferStats()
                    | DirectorStats()
                ):
                    self._collect(msg)
                case _:
                    assert_never(msg)
        self._ask()

    async def failing(self) -> None:
        """Give the other HTTP processes a moment to end their streams with an error."""
        for endpoint in self._heard if self._leads else ():
            if endpoint in self.system.topology.placed("frontend"):
                self.system.ref("watchdog", endpoint).tell(ServerLost())

    def stopped(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._ended.set()
        self._hooks.guard(0.0)

    def tick(self) -> None:
        """Periodic checks: the loop's lateness, silent peers, due work.

        Raises:
            PeerLost: a peer is silent.
        """
        now = self._hooks.clock()
        late = max(0.0, now - self._due)
        self._due = now + self._hooks.tick_s
        self._lags.append(late)
        self._metrics.lag(self.system.endpoint, late)
        system = self.system
        self._hooks.note(system.endpoint, system.foreign_frames, system.failed_handshakes)
        self._watch_peers(now, late)
        if self._busy is not None and now >= self._deadline:
            self._drain_timed_out(now)
        if self._probe is not None and now >= self._probe.deadline:
            self._silence(self._probe)
            self._ask()
        if self._leads and now >= self._log_due:
            self._log_due = now + self._config.log_every_s
            self._log_wanted = True
            self._ask()

    # -- start and liveness ---------------------------------------------------------------------

    def _arm(self) -> None:
        self._timer = self.system.loop.call_later(self._hooks.tick_s, self._on_timer)

    def _on_timer(self) -> None:
        if not self.system.over:
            self._arm()
            self.tick()

    def _hello(self, msg: Hello) -> None:
        if msg.endpoint not in self._absent:
            self.system.reject(msg, f"nobody waits for endpoint {msg.endpoint}")
            return
        topology = self.system.topology.at(msg.endpoint, msg.address)
        try:
            self.system.join(topology)
        except ValueError as error:
            self.system.reject(msg, str(error))
            return
        try:
            ours = self._config.contract
            check_member(topology, msg.endpoint, msg.node, ours, msg.contract)
        except Mismatch:
            self._welcome(msg.endpoint)  # which will detect the same mismatch
            raise
        self._absent.discard(msg.endpoint)
        self._heard[msg.endpoint] = self._hooks.clock()
        if self._busy is not None:
            self.system.ref("watchdog", msg.endpoint).tell(Halt())
        elif self._open:  # it replaces another one
            log.info("%s serves", topology.name(msg.endpoint))
            self._welcome(*self._heard)
            for removed in self._removed:  # perhaps while it was starting
                self._tell_removed(removed, msg.endpoint)
            self.system.ref("frontend", msg.endpoint).tell(Started())
        else:
            self._start_serving()

    def _start_serving(self) -> None:
        """Called once all endpoints have joined."""
        if self._absent:
            return
        self._open = True
        self._welcome(*self._heard)
        for name in ("frontend", "agent"):
            for endpoint in self.system.topology.placed(name):
                self.system.ref(name, endpoint).tell(Started())

    def _welcome(self, *endpoints: int) -> None:
        welcome = Welcome(contract=self._config.contract, topology=self.system.topology)
        for endpoint in endpoints:
            self.system.ref("watchdog", endpoint).tell(welcome)

    def _replaced(self, msg: WorkerReplaced) -> None:
        """An HTTP worker is replaced: stop waiting for the old one; expect the new one."""
        topology = self.system.topology.replaced(msg.endpoint, msg.by)
        self.system.join(topology)
        self._heard.pop(msg.endpoint, None)
        self._absent.discard(msg.endpoint)
        for name in ("balancer", "scheduler", "director", "agent", "config_client"):
            for endpoint in topology.placed(name):
                self.system.ref(name, endpoint).tell(EndpointGone(msg.endpoint))
        if msg.by is not None:
            self._absent.add(msg.by.id)
        self._drained("frontend", msg.endpoint)

    def _lose(self, group: int, why: str) -> None:
        """Continue the server without a group, or end it.

        Raises:
            PeerLost: it cannot continue.
        """
        topology = self.system.topology
        if group in topology.lost:
            return
        if not (self._open and topology.expendable(group)):
            raise PeerLost(why)
        system, left = self.system, topology.without(group)
        living, every = len(left.groups), len(left.groups) + len(left.lost)
        log.error("group %d is lost: %s; %d of %d groups serve", group, why, living, every)
        leader = topology.leader(group).id
        end = ServerLost(f"its group is lost: {why}")
        for rank in topology.group(group):
            system.ref("watchdog", rank.id).tell(end)
            self._hooks.kill(rank.id)
            self._heard.pop(rank.id, None)
        system.join(left)
        self._welcome(*self._heard)
        self._removed.append(GroupRemoved(group, leader, why))
        system.ref("balancer").tell(self._removed[-1])
        for endpoint in left.placed("frontend"):
            self._tell_removed(self._removed[-1], endpoint)
        self._drained("scheduler", leader)

    def _tell_removed(self, removed: GroupRemoved, endpoint: int) -> None:
        for name in ("tokenizer", "detokenizer", "frontend"):
            self.system.ref(name, endpoint).tell(removed)

    def _watch_forever(self) -> None:
        while not self._ended.wait(min(self._hooks.watch_s, self._config.heartbeat_s)):
            self._hooks.beat(self.system.endpoint, self._hooks.clock())
            if self._config.step_timeout_s > 0:
                self.watch()

    def watch(self) -> None:
        """End the process if a step, or the loop, takes too long. Thread-safe."""
        now, limit = self._hooks.clock(), self._config.step_timeout_s
        since = self._config.busy_since()
        if since is not None and now - since > limit:
            what = f"a step has not ended for {now - since:.1f} s"
        elif now - self._due > limit:
            what = f"the event loop has not come round for {now - self._due:.1f} s"
        else:
            return
        name = self.system.topology.name(self.system.endpoint)
        log.critical("%s: %s (--step_timeout)", name, what)
        log.critical("in flight: %s", self._config.in_flight() or "nothing")
        self._hooks.dump()
        self._hooks.exit(EXIT_HUNG)

    def _watch_peers(self, now: float, late: float) -> None:
        watched = self.system.topology.watched(self.system.endpoint)
        for peer in watched & self._heard.keys() if self._leads else watched:
            if beat := self._hooks.last_beat(peer):
                self._heard[peer] = max(self._heard.get(peer, 0.0), beat)
        if late > self._config.heartbeat_s:  # the whole machine may have been stopped
            self._heard = {peer: heard + late for peer, heard in self._heard.items()}
        if now < self._beat_at:
            return
        self._beat_at = now + self._config.heartbeat_s
        if (limit := self._config.step_timeout_s) > 0:
            self._hooks.guard(limit + LAST_RESORT_S)
        for peer, heard in [*self._heard.items()]:
            if peer in watched and now - heard > self._config.dead_after_s:
                self._silent(peer, now - heard)

    def _silent(self, peer: int, seconds: float) -> None:
        topology = self.system.topology
        what = f"{topology.name(peer)} has been silent for {seconds:.1f} s (--dead_after)"
        group = topology[peer].group
        spared = topology.expendable(group) and group != topology[self.system.endpoint].group
        if not (topology[peer].replaceable or (spared and (self._open or not self._leads))):
            raise PeerLost(what)
        log.error("%s: it is killed", what)
        del self._heard[peer]
        self._hooks.kill(peer)

    def _overrun(self, worker: int) -> None:
        """It has missed something, so it must not go on; the coordinator's process started it."""
        self.system.at_coordinator("watchdog").tell(WorkerOverrun(worker))

    # -- the end --------------------------------------------------------------------------------

    def _drain(self, timeout_s: float) -> None:
        if not self._leads:
            self.system.at_coordinator("watchdog").tell(Drain(timeout_s))
        elif self._busy is not None:
            log.info("second signal: stopping at once")
            self._halt()
        else:
            log.info("draining for at most %g s", timeout_s)
            placed = self.system.topology.placed
            working = [(who, e) for who in WORKERS for e in placed(who)]
            self._busy = {(who, e) for who, e in working if e not in self._absent}
            self._deadline = self._hooks.clock() + timeout_s
            for who, endpoint in sorted(self._busy):
                self.system.ref(who, endpoint).tell(Drain(timeout_s))

    def _drained(self, who: str, endpoint: int) -> None:
        if self._busy is not None:
            self._busy.discard((who, endpoint))
            if not self._busy:
                self._halt()

    def _drain_timed_out(self, now: float) -> None:
        if self._aborting:
            self._halt()
        else:
            log.warning("drain timed out: aborting what still runs (--drain_timeout)")
            self._aborting, self._deadline = True, now + ABORT_S
            for name in ("scheduler", "director"):
                for endpoint in self.system.topology.placed(name):
                    self.system.ref(name, endpoint).tell(Drain(0.0))

    def _halt(self) -> None:
        for endpoint in self._heard:
            self.system.ref("watchdog", endpoint).tell(Halt())
        for endpoint in self._absent:  # still loading, cannot be told
            self._hooks.kill(endpoint)
        self.system.stop()

    # -- numbers --------------------------------------------------------------------------------

    def _served(self, msg: RequestServed) -> None:
        for answer in msg.answers:
            self._metrics.observe(answer)

    def _ask(self) -> None:
        """Send one probe for all pending scrapes; none while one is pending."""
        if self._probe is not None or not (self._scrapes or self._log_wanted):
            return
        self._num_probes += 1
        self._probe = probe = _StatsCollection(
            query=self._num_probes,
            scrapes=self._scrapes,
            log=self._log_wanted,
            deadline=self._hooks.clock() + PROBE_S,
            silent=set(self.system.topology.reporters()),
        )
        self._scrapes, self._log_wanted = [], False
        for name, endpoint in sorted(probe.silent):
            self.system.ref(name, endpoint).tell(Probe(probe.query))
        if not probe.silent:
            self._report(probe)

    def _collect(self, msg: Stats) -> None:
        if (probe := self._probe) is None or msg.query != probe.query:
            return
        reporter = REPORTER[type(msg)], msg.endpoint
        if reporter not in probe.silent:
            return
        probe.silent.discard(reporter)
        self._reports[reporter] = msg
        if not probe.silent:
            self._report(probe)

    def _silence(self, probe: _StatsCollection) -> None:
        """Timeout: answer with what has arrived, and older numbers for the rest."""
        names = ", ".join(f"{name}@{endpoint}" for name, endpoint in sorted(probe.silent))
        self._silent_log.warning("no numbers from %s within %g s", names, PROBE_S)
        self._report(probe)

    def _report(self, probe: _StatsCollection) -> None:
        self._probe = None
        topology = self.system.topology
        reports = {group: self._reports_of(group) for group in topology.groups}
        state = gather(reports, len(probe.silent), topology.lost)
        directors = [each for each in self._reports.values() if isinstance(each, DirectorStats)]
        if directors:
            state = replace(state, director=directors[0])
        self._answer(probe.scrapes, state)
        if probe.log:
            self._log(state)

    def _reports_of(self, group: int) -> list[Stats]:
        leader = self.system.topology.leader(group).id
        return [report for (_, endpoint), report in self._reports.items() if endpoint == leader]

    def _answer(self, scrapes: list[Scrape], state: StatsSnapshot) -> None:
        system = self.system
        read = any(scrape.asks == "frontend" for scrape in scrapes)
        actors = [
            (a.name, a.depth, a.busy_s, a.take_longest() if read else 0.0) for a in system.actors
        ]
        lag_ms = 1e3 * statistics.median(self._lags) if self._lags else 0.0
        counts = system.dead_letters, *system.counted(self._hooks.others())
        self._metrics.update(state, ProcessCounters(actors, *counts, lag_ms))
        text = self._metrics.exposition() if read else b""
        for scrape in scrapes:
            answer = Scraped(
                query=scrape.query,
                exposition=text if scrape.asks == "frontend" else b"",
                loads=state.loads,
                moved=state.moved,
            )
            system.ref(scrape.asks, scrape.endpoint).tell(answer)

    def _log(self, state: StatsSnapshot) -> None:
        """Log throughput since the last line, if there was any activity."""
        last, now = self._logged, self._hooks.clock()
        span = now - self._logged_at
        self._logged, self._logged_at = state, now
        requests, slots = state.scheduler, state.allocator
        prompt = requests.prompt_tokens - last.scheduler.prompt_tokens
        generated = requests.generated_tokens - last.scheduler.generated_tokens
        if not (requests.running or requests.waiting or prompt or generated) or span <= 0:
            return
        looked_up = max(1, slots.looked_up_tokens - last.allocator.looked_up_tokens)
        log.info(
            "prompt %.1f tok/s, generated %.1f tok/s, running %d, waiting %d, "
            "%s, prefix hit %.1f%%",
            prompt / span,
            generated / span,
            requests.running,
            requests.waiting,
            describe_slots(slots),
            100 * (slots.hit_tokens - last.allocator.hit_tokens) / looked_up,
        )


@dataclass(slots=True)
class _StatsCollection:
    """One probe of all actors that report metrics."""

    query: int
    scrapes: list[Scrape]
    log: bool
    deadline: float
    silent: set[tuple[str, int]]  # (actor, endpoint) of those who have not answered
