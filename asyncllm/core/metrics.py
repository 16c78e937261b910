"""The server's metrics as Prometheus text.

Knows names, buckets and plain values; knows neither who measured them nor how they are fetched.
Besides our own names (``asyncllm_``) it exports those of LightLLM's metrics that dashboards use and
that are meaningful here (``lightllm_``, with the label ``model_name``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from asyncllm.messages import (
    AllocatorStats,
    DirectorStats,
    RunnerStats,
    SchedulerStats,
    TransferStats,
)
from asyncllm.records import AnsweredRequest, GroupLoad, TransferTotals

REFUSED = "refused"  # a finish reason: the request was rejected
LAG_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
FIRST_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
TOTAL_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LENGTH_BUCKETS = tuple(2**k for k in range(21))
LIGHTLLM_BUCKETS = tuple(0.0015 * 1.5**k for k in range(35))


Stats = SchedulerStats | AllocatorStats | RunnerStats | TransferStats | DirectorStats
S = TypeVar("S", SchedulerStats, AllocatorStats, RunnerStats, TransferStats, DirectorStats)


@dataclass(frozen=True, slots=True)
class StatsSnapshot:
    """State of schedulers, allocators and runners, in total and per group; or of a director."""

    scheduler: SchedulerStats = field(default_factory=SchedulerStats)
    allocator: AllocatorStats = field(default_factory=AllocatorStats)
    runner: RunnerStats = field(default_factory=RunnerStats)
    transfer: TransferStats = field(default_factory=TransferStats)
    director: DirectorStats = field(default_factory=DirectorStats)
    silent_reporters: int = 0
    groups: Mapping[int, StatsSnapshot] = field(default_factory=dict)
    lost_groups: Collection[int] = ()

    @property
    def load(self) -> GroupLoad:
        """The totals."""
        slots = self.allocator
        return GroupLoad(
            used=slots.used,
            expected=self.scheduler.expected_slots,
            total=slots.total,
            sliding_used=slots.sliding_used,
            sliding_total=slots.sliding_total,
            cached=slots.cached,
            running=self.scheduler.running,
            waiting=self.scheduler.waiting,
        )

    @property
    def moved(self) -> TransferTotals:
        """The K/V transfer counters that masters get."""
        of = self.transfer
        return TransferTotals(
            sent_bytes=of.sent_bytes,
            tokens=of.taken_tokens,
            transfers=of.transfers,
            ms=of.transfer_ms,
            lapses=of.lapsed,
            waiting=of.waiting,
        )

    @property
    def loads(self) -> tuple[GroupLoad, ...]:
        """Per group (a lost one counts as full); on a master, of all its decode nodes together."""
        if nodes := self.director.total:
            used = self.director.used
            return (GroupLoad(used=used, expected=used, total=nodes),)
        lost = dict.fromkeys(self.lost_groups, GroupLoad(used=1, expected=1, total=1))
        loads = lost | {group: state.load for group, state in self.groups.items()}
        return tuple(loads[group] for group in sorted(loads))


def gather(
    reports: Mapping[int, Collection[Stats]], silent: int, lost: Collection[int] = ()
) -> StatsSnapshot:
    """Combine all groups: counts are summed, times are the slowest group's.

    Args:
        reports: of each group's leader.
        silent: number of groups whose report is outdated or missing.
        lost: groups that the server continues without.
    """
    groups = {
        group: StatsSnapshot(
            _merged(SchedulerStats, some), _merged(AllocatorStats, some), _merged(RunnerStats, some)
        )
        for group, some in reports.items()
    }
    every = [report for some in reports.values() for report in some]
    return StatsSnapshot(
        _merged(SchedulerStats, every),
        _merged(AllocatorStats, every),
        _merged(RunnerStats, every),
        _merged(TransferStats, every),
        silent_reporters=silent,
        groups=groups,
        lost_groups=lost,
    )


def _merged(kind: type[S], reports: Collection[Stats]) -> S:
    """Counts are ints, times are floats."""
    mine = [report for report in reports if isinstance(report, kind)]
    merged = kind()
    for name in (f.name for f in fields(kind) if f.name not in ("query", "endpoint")):
        values = [getattr(report, name) for report in mine]
        most = isinstance(getattr(merged, name), float)
        setattr(merged, name, max(values, default=0.0) if most else sum(values))
    return merged


def describe_slots(slots: AllocatorStats) -> str:
    """The usage of KV slots, for the log."""
    text = f"KV {_shares(slots.used, slots.cached, slots.total)}"
    if slots.sliding_total:
        sliding = _shares(slots.sliding_used, slots.sliding_cached, slots.sliding_total)
        text += f", of layers with a window {sliding}"
    return text


def _shares(used: int, cached: int, total: int) -> str:
    total = max(1, total)
    return f"used {100 * used / total:.1f}%, cached {100 * cached / total:.1f}%"


@dataclass(frozen=True, slots=True)
class ProcessCounters:
    """Counters of one process; ``actors``: (name, waiting, busy seconds, longest callback)."""

    actors: Sequence[tuple[str, int, float, float]] = ()
    dead_letters: int = 0
    foreign_frames: int = 0  # of all processes of its node
    failed_handshakes: int = 0
    lag_ms: float = 0.0  # median lateness of its loop


# field of State -> (name without prefix, help, is a counter)
_STATE = {
    "allocator.used": ("kv_slots_used", "KV slots held by requests", False),
    "allocator.cached": ("kv_slots_cached", "KV slots used only by the prefix cache", False),
    "allocator.total": ("kv_slots_total", "KV slots in total", False),
    "allocator.sliding_used": (
        "kv_sliding_slots_used",
        "KV slots held by requests in layers with a window, if these have their own",
        False,
    ),
    "allocator.sliding_cached": (
        "kv_sliding_slots_cached",
        "KV slots in layers with a window used only by the prefix cache",
        False,
    ),
    "allocator.sliding_total": (
        "kv_sliding_slots_total",
        "Sliding-window KV slots in total",
        False,
    ),
    "scheduler.running": ("requests_running", "Requests in the batch", False),
    "scheduler.waiting": ("requests_waiting", "Requests queued for the batch", False),
    "scheduler.inflight_steps": ("inflight_steps", "Steps launched and not committed", False),
    "runner.step_ms": ("step_ms", "Time of a step, milliseconds, median of the last ones", False),
    "runner.launch_ms": ("launch_ms", "Host time of a launch, milliseconds, median", False),
    "runner.gap_ms": ("gpu_gap_ms", "Device idle between two launched steps, ms, median", False),
    "scheduler.steps": ("steps", "Steps launched", True),
    "scheduler.preemptions": (
        "preemptions",
        "Requests preempted because the KV cache was full",
        True,
    ),
    "scheduler.prompt_tokens": (
        "prompt_tokens_computed",
        "Prompt tokens computed: without prefix hits, with recomputation after preemption",
        True,
    ),
    "scheduler.generated_tokens": ("generated_tokens", "Tokens sampled", True),
    "scheduler.drafted_tokens": ("draft_tokens", "Draft tokens tried (--speculative)", True),
    "scheduler.accepted_tokens": ("accepted_draft_tokens", "Draft tokens accepted", True),
    "scheduler.importing": (
        "requests_importing",
        "Requests with slots that wait for K/V or a token from another server",
        False,
    ),
    "scheduler.imports": ("kv_imports", "Requests with K/V from another server", True),
    "scheduler.imported_tokens": ("kv_imported_tokens", "Tokens whose K/V have arrived", True),
    "scheduler.lapses": ("kv_lapses", "Requests whose K/V failed to arrive", True),
    "scheduler.exports": ("kv_exports", "Requests with K/V sent elsewhere", True),
    "scheduler.exported_tokens": ("kv_exported_tokens", "Tokens whose K/V have been sent", True),
    "allocator.hit_tokens": (
        "prefix_hit_tokens",
        "Prompt tokens taken from the prefix cache",
        True,
    ),
    "allocator.looked_up_tokens": ("prefix_lookup_tokens", "Prompt tokens looked up", True),
    "allocator.evicted_tokens": ("evicted_tokens", "Tokens evicted from the prefix cache", True),
    "allocator.evicted_sliding": (
        "evicted_sliding_tokens",
        "Prefix cache tokens that lost only their KV in layers with a window",
        True,
    ),
    "runner.jit_after_warmup": ("jit_after_warmup", "Kernels compiled while serving", True),
    "runner.kv_reads_saved": (
        "kv_reads_saved",
        "Tokens whose K/V a layer did not reread, thanks to shared prefixes in decode steps",
        True,
    ),
    "transfer.sent_bytes": ("kv_sent_bytes", "Bytes of K/V that first ranks have sent", True),
    "transfer.taken_bytes": ("kv_taken_bytes", "Bytes of K/V that first ranks have received", True),
    "transfer.sent_pages": ("kv_sent_pages", "Pages of K/V sent", True),
    "transfer.taken_pages": ("kv_taken_pages", "Pages of K/V received", True),
    "transfer.transfers": ("kv_transfers", "Requests whose K/V a first rank has received", True),
    "transfer.taken_tokens": ("kv_transferred_tokens", "Tokens of these requests", True),
    "transfer.transfer_ms": (
        "kv_transfer_ms",
        "Total milliseconds of these transfers, from the sender's first frame to the last byte",
        True,
    ),
    "transfer.sent": ("kv_requests_sent", "Requests whose K/V a first rank has sent", True),
    "transfer.tail_ms": (
        "kv_tail_ms",
        "Total milliseconds from the end of prefill of these until all K/V had been received",
        True,
    ),
    "transfer.lapsed": ("kv_transfer_lapses", "Transfers that failed at this end", True),
    "transfer.waiting": (
        "kv_pages_waiting",
        "Pages ready to be sent that wait for a free page",
        False,
    ),
    "transfer.refused": ("kv_peers_refused", "Connections closed because of invalid data", True),
    "director.requests": ("pd_requests", "Requests in progress on a pd_master", False),
    "director.prefill_nodes": ("pd_prefill_nodes", "Prefill nodes that accept requests", False),
    "director.decode_nodes": ("pd_decode_nodes", "Decode nodes that accept requests", False),
    "director.used": ("pd_kv_slots_used", "KV slots of decode nodes, held by requests", False),
    "director.total": ("pd_kv_slots_total", "KV slots of decode nodes", False),
    "director.attempts": ("pd_attempts", "Attempts to serve a request on nodes", True),
    "director.retries": ("pd_retries", "Attempts after the first one of a request", True),
    "director.failed": ("pd_failed", "Requests that failed for lack of nodes", True),
    "director.lost_nodes": ("pd_lost_nodes", "Nodes whose connection was lost", True),
    "director.handovers": ("pd_handovers", "Requests that a decode node has continued", True),
    "director.reserve_ms": (
        "pd_reserve_ms",
        "Total milliseconds until decode nodes had allocated slots, over all attempts",
        True,
    ),
    "director.handover_ms": (
        "pd_handover_ms",
        "Total milliseconds from the prefill node's token to the next one, over all handovers",
        True,
    ),
    "director.kv_sent_bytes": ("pd_kv_sent_bytes", "Bytes of K/V that nodes have sent", True),
    "director.kv_tokens": ("pd_kv_tokens", "Tokens whose K/V decode nodes have received", True),
    "director.kv_transfers": ("pd_kv_transfers", "Requests whose K/V have all arrived", True),
    "director.kv_ms": ("pd_kv_transfer_ms", "Total milliseconds of these transfers", True),
    "director.kv_lapses": ("pd_kv_lapses", "Transfers of K/V that have failed", True),
    "director.kv_waiting": ("pd_kv_waiting", "Portions of K/V waiting for a page", False),
    "silent_reporters": (
        "silent_reporters",
        "Actors with outdated numbers here, since they did not answer within a second",
        False,
    ),
}
_UNNAMED = {"query", "endpoint", "expected_slots"}  # expected_slots is for /token_load only
assert set(_STATE) - {"silent_reporters"} == {
    f"{of.name}.{count.name}"
    for of in fields(StatsSnapshot)[:5]
    for count in fields(getattr(StatsSnapshot(), of.name))
    if count.name not in _UNNAMED
}

# reported per group too, if there are several
_OF_GROUP = (
    "allocator.used",
    "allocator.cached",
    "allocator.total",
    "allocator.sliding_used",
    "allocator.sliding_cached",
    "allocator.sliding_total",
    "scheduler.running",
    "scheduler.waiting",
    "scheduler.steps",
    "scheduler.generated_tokens",
    "allocator.hit_tokens",
)

# name without prefix -> field of State
_LIGHTLLM = {
    "queue_size": "scheduler.waiting",
    "batch_current_size": "scheduler.running",
    "num_running_reqs": "scheduler.running",
}


class ServerMetrics:
    """Every series of one server, in its own registry.

    Args:
        model_name: label of the ``lightllm_`` series.
        max_len: maximum tokens of a request; spaces the buckets of ``lightllm_`` lengths.
        linears: (kind of weights, number of linear layers).
    """

    def __init__(
        self, model_name: str, max_len: int = 16384, linears: Sequence[tuple[str, int]] = ()
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._held = _StatsCollector(model_name, linears)
        self._registry.register(self._held)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"asyncllm_{name}", text, registry=self._registry, buckets=buckets)

        of = "of an accepted request"
        self._first = histogram(
            "time_to_first_token_seconds",
            f"From the arrival {of} to its first token",
            FIRST_BUCKETS,
        )
        self._per_token = histogram(
            "time_per_output_token_seconds", f"Each token {of} after its first", TOKEN_BUCKETS
        )
        self._duration = histogram(
            "request_duration_seconds", f"From the arrival {of} to its end", TOTAL_BUCKETS
        )
        self._prompt_len = histogram("request_prompt_tokens", f"Prompt tokens {of}", LENGTH_BUCKETS)
        self._num_tokens = histogram("request_generated_tokens", f"New tokens {of}", LENGTH_BUCKETS)
        self._prompt_tokens = Counter(
            "asyncllm_prompt_tokens",
            "Prompt tokens of accepted requests, including cached ones, counted at their end",
            registry=self._registry,
        )
        self._lag = Histogram(
            "asyncllm_loop_lag_seconds",
            "Lateness of a 100 ms timer",
            ["endpoint"],
            registry=self._registry,
            buckets=LAG_BUCKETS,
        )
        self._http = Counter(
            "asyncllm_http_requests",
            "HTTP answers; status 499: the client disconnected; route other: unknown path",
            ["route", "status"],
            registry=self._registry,
        )
        self._finished = Counter(
            "asyncllm_request_finished",
            "Accepted requests that have ended",
            ["reason"],
            registry=self._registry,
        )
        self._lightllm = _LightLlm(self._registry, model_name, max_len)

    def observe(self, answered: AnsweredRequest) -> None:
        """Count one answered HTTP request."""
        self._http.labels(answered.route, str(answered.status)).inc()
        if not answered.reason:
            return
        self._lightllm.observe(answered)
        if answered.reason == REFUSED:
            return
        self._finished.labels(answered.reason).inc()
        self._prompt_tokens.inc(answered.prompt_len)
        self._duration.observe(answered.total_s)
        self._prompt_len.observe(answered.prompt_len)
        self._num_tokens.observe(answered.num_tokens)
        if answered.ttft_s >= 0:
            self._first.observe(answered.ttft_s)
        if answered.tpot_s >= 0:
            self._per_token.observe(answered.tpot_s)

    def lag(self, endpoint: int, late_s: float) -> None:
        """Count one lateness of the loop's timer."""
        self._lag.labels(str(endpoint)).observe(late_s)

    def update(self, state: StatsSnapshot, process: ProcessCounters) -> None:
        """Replace the actors' last reported state."""
        self._held.state, self._held.process = state, process

    def exposition(self) -> bytes:
        """Prometheus text format, version 0.0.4."""
        return generate_latest(self._registry)


class _StatsCollector(Collector):
    """Series whose values are counted elsewhere, and only read here."""

    def __init__(self, model_name: str, linears: Sequence[tuple[str, int]]) -> None:
        self._model_name, self._linears = model_name, linears
        self.state, self.process = StatsSnapshot(), ProcessCounters()

    def collect(self) -> Iterator[Metric]:
        for path, (name, text, is_counter) in _STATE.items():
            family = CounterMetricFamily if is_counter else GaugeMetricFamily
            yield family(f"asyncllm_{name}", text, value=attrgetter(path)(self.state))
        lost = self.state.lost_groups
        groups = self.state.groups if len(self.state.groups) > 1 or lost else {}
        if groups:
            alive = GaugeMetricFamily(
                "asyncllm_group_up", "1: the group serves; 0: it is lost", labels=["group"]
            )
            for group in sorted({*groups, *lost}):
                alive.add_metric([str(group)], float(group not in lost))
            yield alive
        for path in _OF_GROUP if groups else ():
            name, text, is_counter = _STATE[path]
            family = CounterMetricFamily if is_counter else GaugeMetricFamily
            series = family(f"asyncllm_group_{name}", f"{text}, per group", labels=["group"])
            for group, state in groups.items():
                series.add_metric([str(group)], attrgetter(path)(state))
            yield series
        for name, path in _LIGHTLLM.items():
            text = f"The same as asyncllm_{_STATE[path][0]}"
            gauge = GaugeMetricFamily(f"lightllm_{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], attrgetter(path)(self.state))
            yield gauge
        layers = GaugeMetricFamily(
            "asyncllm_linear_layers", "Linear layers by kind of weights", labels=["kind"]
        )
        for kind, num in self._linears:
            layers.add_metric([kind], num)
        yield layers
        yield from _of_process(self.process)


def _of_process(process: ProcessCounters) -> Iterator[Metric]:
    """Series of one process."""
    depth = GaugeMetricFamily("asyncllm_mailbox_depth", "Messages waiting", labels=["actor"])
    busy = CounterMetricFamily("asyncllm_handler_seconds", "Time inside receive", labels=["actor"])
    longest = GaugeMetricFamily(
        "asyncllm_callback_cpu_seconds_max",
        "CPU time of the longest callback since the last scrape; frontend: HTTP handlers too",
        labels=["actor"],
    )
    for actor, waiting, busy_s, longest_s in process.actors:
        depth.add_metric([actor], waiting)
        busy.add_metric([actor], busy_s)
        longest.add_metric([actor], longest_s)
    yield depth
    yield busy
    yield longest
    yield GaugeMetricFamily(
        "asyncllm_loop_lag_ms",
        "Lateness of a 100 ms timer, milliseconds, median of 10 s",
        value=process.lag_ms,
    )
    yield CounterMetricFamily(
        "asyncllm_dead_letters", "Messages to nobody", value=process.dead_letters
    )
    yield CounterMetricFamily(
        "asyncllm_foreign_frames",
        "Foreign frames received by all processes of this node",
        value=process.foreign_frames,
    )
    yield CounterMetricFamily(
        "asyncllm_strangers",
        "Connections to internal ports that failed authentication",
        value=process.failed_handshakes,
    )


@dataclass(frozen=True, slots=True)
class RegistryMetrics(Collector):
    """Series of a config_server.

    Args:
        present, gone: number of connected servers, and of those that left since the start, by role.
        ports: number of rendezvous ports in use.
        denied: refused requests for a port that another server held or that could not be used.
        process: the only process.
    """

    present: Mapping[str, int]
    gone: Mapping[str, int]
    ports: int
    denied: int
    process: ProcessCounters

    def collect(self) -> Iterator[Metric]:
        members = GaugeMetricFamily(
            "asyncllm_members", "Servers that are connected", labels=["role"]
        )
        left = CounterMetricFamily(
            "asyncllm_members_left", "Servers that have disconnected", labels=["role"]
        )
        for family, counts in ((members, self.present), (left, self.gone)):
            for role, count in sorted(counts.items()):
                family.add_metric([role], count)
            yield family
        yield GaugeMetricFamily(
            "asyncllm_nccl_ports", "Rendezvous ports leased to servers", value=self.ports
        )
        yield CounterMetricFamily(
            "asyncllm_nccl_ports_denied",
            "Refused requests for a rendezvous port (taken by another server, or unusable)",
            value=self.denied,
        )
        yield from _of_process(self.process)

    def exposition(self) -> bytes:
        """Prometheus text format, version 0.0.4."""
        return generate_latest(self)


class _LightLlm:
    """LightLLM's series about requests."""

    def __init__(self, registry: CollectorRegistry, model_name: str, max_len: int) -> None:
        lengths = [max_len / 100 * k for k in range(1, 102)]

        def counter(name: str, text: str) -> Counter:
            made = Counter(f"lightllm_{name}", text, ["model_name"], registry=registry)
            return made.labels(model_name)

        def histogram(name: str, same: str, buckets: Sequence[float]) -> Histogram:
            text = f"The same as asyncllm_{same}"
            made = Histogram(
                f"lightllm_{name}", text, ["model_name"], registry=registry, buckets=buckets
            )
            return made.labels(model_name)

        self._count = counter("request_count", "Generation requests, including refused ones")
        self._success = counter("request_success", "Generation requests answered completely")
        self._failure = counter("request_failure", "Those refused, failed or abandoned")
        self._prompt_tokens = counter("prompt_tokens", "The same as asyncllm_prompt_tokens")
        self._generation_tokens = counter(
            "generation_tokens", "Generated tokens of accepted requests"
        )
        self._duration = histogram("request_duration", "request_duration_seconds", LIGHTLLM_BUCKETS)
        self._first = histogram(
            "request_first_token_duration", "time_to_first_token_seconds", LIGHTLLM_BUCKETS
        )
        self._per_token = histogram(
            "request_mean_time_per_token_duration",
            "time_per_output_token_seconds",
            LIGHTLLM_BUCKETS,
        )
        self._input_length = histogram("request_input_length", "request_prompt_tokens", lengths)
        self._generated = histogram("request_generated_tokens", "request_generated_tokens", lengths)

    def observe(self, answered: AnsweredRequest) -> None:
        self._count.inc()
        failed = answered.status >= 400 or answered.reason in {"abort", "error", REFUSED}
        (self._failure if failed else self._success).inc()
        if answered.reason == REFUSED:
            return
        self._prompt_tokens.inc(answered.prompt_len)
        self._generation_tokens.inc(answered.num_tokens)
        self._duration.observe(answered.total_s)
        self._input_length.observe(answered.prompt_len)
        self._generated.observe(answered.num_tokens)
        if answered.ttft_s >= 0:
            self._first.observe(answered.ttft_s)
        if answered.tpot_s >= 0:
            self._per_token.observe(answered.tpot_s)
