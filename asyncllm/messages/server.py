"""Messages about the server itself: start, drain, failures and metrics."""

from __future__ import annotations

from dataclasses import field
from math import isfinite

from asyncllm.codec import Message, message
from asyncllm.messages.checks import are_counts
from asyncllm.records import AnsweredRequest, GroupLoad, TransferTotals
from asyncllm.topology import Contract, Endpoint, Topology


@message(36, urgent=True)
class Hello(Message):
    """every other watchdog -> coordinator: loading is done; introduces itself."""

    endpoint: int
    contract: Contract
    node: int
    address: str  # where its ZMQ socket is bound


@message(32, urgent=True)
class Drain(Message):
    """coordinator -> every frontend and the scheduler: no new requests; running ones may finish."""

    timeout_s: float


@message(33)
class Drained(Message):
    """scheduler or a frontend -> coordinator: no requests are left here."""

    who: str  # "scheduler" or "frontend"
    endpoint: int


@message(34, urgent=True)
class Halt(Message):
    """coordinator -> every watchdog: stop this endpoint now."""


@message(35, urgent=True)
class Started(Message):
    """coordinator -> every frontend, and the agent: all are there and warmed up; start serving."""


@message(37, urgent=True)
class ServerLost(Message):
    """coordinator -> another watchdog: the server fails, or continues without the receiver's group;
    end running requests with an error."""

    why: str = "the server has failed"


@message(48, urgent=True)
class GroupFailed(Message):
    """the process that starts the others of a node -> coordinator: a group has failed."""

    group: int
    why: str


@message(49, urgent=True)
class GroupRemoved(Message):
    """coordinator -> balancer, and every tokenizer, detokenizer and frontend: the server continues
    without a group. Later messages of its leader are ignored."""

    group: int
    endpoint: int  # of its leader
    why: str


@message(47, urgent=True)
class Welcome(Message):
    """coordinator -> every other one: all are there, or one of them does not match."""

    contract: Contract
    topology: Topology


@message(38, urgent=True)
class EndpointGone(Message):
    """coordinator -> whoever keeps something for an endpoint: its process has ended.

    Its requests have ended with it.
    """

    endpoint: int


@message(39, urgent=True)
class WorkerReplaced(Message):
    """the process -> coordinator: an HTTP worker has ended; another one starts in its place."""

    endpoint: int
    by: Endpoint | None  # None: none, the server is ending


@message(53, urgent=True)
class WorkerOverrun(Message):
    """any watchdog -> coordinator: an HTTP worker does not read what is sent to it; kill it."""

    endpoint: int


@message(40, urgent=True)
class Scrape(Message):
    """frontend or agent -> coordinator: report the state of the whole server."""

    query: int
    endpoint: int
    asks: str = "frontend"  # an agent only wants the loads


@message(41, urgent=True)
class Scraped(Message):
    """coordinator -> whoever sent ``Scrape``."""

    query: int
    exposition: bytes  # Prometheus text
    loads: tuple[GroupLoad, ...]  # of each group
    moved: TransferTotals = field(default_factory=TransferTotals)


@message(42, urgent=True)
class Probe(Message):
    """coordinator -> ``Topology.reporters``: report your counters."""

    query: int


@message(43)
class SchedulerStats(Message):
    """scheduler -> coordinator: its counters."""

    query: int = 0
    endpoint: int = 0
    running: int = 0
    waiting: int = 0
    inflight_steps: int = 0
    steps: int = 0  # since the start, like those below
    preemptions: int = 0
    prompt_tokens: int = 0  # computed: without prefix hits, again after a preemption
    generated_tokens: int = 0
    expected_slots: int = 0  # currently held and promised
    # K/V transfers between servers: requests that have slots and wait for K/V; since the start,
    # requests and tokens whose K/V arrived, failed to arrive, and were sent
    importing: int = 0
    imports: int = 0
    imported_tokens: int = 0
    lapses: int = 0
    exports: int = 0
    exported_tokens: int = 0
    drafted_tokens: int = 0  # draft tokens tried, since the start
    accepted_tokens: int = 0  # draft tokens accepted


@message(44)
class AllocatorStats(Message):
    """allocator -> coordinator: its counters."""

    query: int = 0
    endpoint: int = 0
    used: int = 0  # slots held by requests
    cached: int = 0
    total: int = 0
    hit_tokens: int = 0  # since the start, like those below
    looked_up_tokens: int = 0
    evicted_tokens: int = 0
    # of the slot space of layers with a window, if there is one
    sliding_used: int = 0
    sliding_cached: int = 0
    sliding_total: int = 0
    evicted_sliding: int = 0


@message(45)
class RequestServed(Message):
    """frontend -> coordinator: HTTP requests have been answered."""

    answers: tuple[AnsweredRequest, ...]

    def valid(self) -> bool:
        return all(
            100 <= a.status <= 599
            and are_counts(a.prompt_len, a.num_tokens)
            and all(map(isfinite, (a.ttft_s, a.tpot_s, a.total_s)))
            for a in self.answers
        )


@message(46)
class RunnerStats(Message):
    """runner -> coordinator: medians over the last steps, and counters."""

    query: int = 0
    endpoint: int = 0
    step_ms: float = 0.0
    launch_ms: float = 0.0
    gap_ms: float = 0.0  # device idle between two steps that were both launched; 0: not measured
    jit_after_warmup: int = 0
    kv_reads_saved: int = 0  # tokens, in each layer that sees all of them
