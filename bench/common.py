"""Clients of an OpenAI-compatible server: prompts, one measured request, load from processes.

Owns what is sent and when a token counts as received; knows nothing of which server answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice, pairwise
from typing import Any, TypeVar

import aiohttp

FIRST_ID = 1000  # prompts have no token below: special tokens of most vocabularies are there
READ_BYTES = 1 << 18
ERROR_CHARS = 200

Body = dict[str, Any]
T = TypeVar("T")


@dataclass(slots=True)
class Record:
    """What came of one request; times are ``perf_counter`` seconds, alike in all processes."""

    start: float
    prompt_len: int = 0
    asked: int = 0  # output tokens
    stamps: list[float] = field(default_factory=list)  # arrival of each chunk that has tokens
    usage: dict[str, Any] | None = None
    kind: str = ""  # of the failure: "http 503", "in stream", "timeout", "connection"; "": none
    error: str = ""
    done: bool = False  # the stream's end mark came
    end: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.kind and bool(self.stamps)

    @property
    def num_tokens(self) -> int:
        """Tokens received: by ``usage``, else one per chunk."""
        counted = (self.usage or {}).get("completion_tokens")
        return len(self.stamps) if counted is None else int(counted)

    @property
    def ttft_s(self) -> float:
        return self.stamps[0] - self.start

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first."""
        return (self.stamps[-1] - self.stamps[0]) / max(
            1, (self.num_tokens or len(self.stamps)) - 1
        )

    @property
    def gaps_s(self) -> list[float]:
        """Between successive chunks."""
        return [b - a for a, b in pairwise(self.stamps)]


class Events:
    """Cuts a body that comes in arbitrary pieces into the data of server-sent events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Data of the events that ``chunk`` completes; a line of several ``data:`` is not joined."""
        rest = self._rest + chunk
        if b"\r" in rest:  # JSON has none unescaped; one at the end waits for its line feed
            rest = rest.replace(b"\r\n", b"\n")
        *events, self._rest = rest.split(b"\n\n")
        return [
            line[5:].strip()
            for event in events
            for line in event.split(b"\n")
            if line.startswith(b"data:")
        ]


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of ``values`` lie below (no interpolation); NaN if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def random_prompts(
    lengths: Sequence[int], vocab: int, seed: int, shared: int, heads: int = 1
) -> list[list[int]]:
    """Token ids in [1000, vocab); the first ``shared`` are one of ``heads`` beginnings, drawn for
    each prompt."""
    rng = random.Random(seed)
    head = [rng.randrange(FIRST_ID, vocab) for _ in range(shared)]
    tails = [[rng.randrange(FIRST_ID, vocab) for _ in range(n - shared)] for n in lengths]
    others = [[rng.randrange(FIRST_ID, vocab) for _ in range(shared)] for _ in range(heads - 1)]
    return [rng.choice([head, *others]) + tail for tail in tails]


def poisson_arrivals(num: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which each of ``num`` requests is sent, ``rate`` a second."""
    rng, now, out = random.Random(seed), 0.0, []
    for _ in range(num):
        now += rng.expovariate(rate)
        out.append(now)
    return out


def completion_body(model: str, prompt: list[int], num_out: int, **more: Any) -> Body:
    """A streamed /v1/completions request for exactly ``num_out`` tokens."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_out,
        **more,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def complete(session: aiohttp.ClientSession, url: str, body: Body) -> Record:
    """Send one request and follow its stream to the end; failures are in the record."""
    record = Record(time.perf_counter(), len(body["prompt"]), body["max_tokens"])
    try:
        async with session.post(f"{url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                record.kind = f"http {reply.status}"
                record.error = f"{reply.status} {(await reply.text())[:ERROR_CHARS]}"
            else:
                events = Events()
                async for chunk in reply.content.iter_any():
                    now = time.perf_counter()
                    for data in events.feed(chunk):
                        _take(record, data, now)
    except TimeoutError as error:
        record.kind, record.error = "timeout", repr(error)[:ERROR_CHARS]
    except (aiohttp.ClientError, OSError) as error:
        record.kind, record.error = "connection", repr(error)[:ERROR_CHARS]
    except ValueError as error:
        record.kind, record.error = "not JSON", repr(error)[:ERROR_CHARS]
    record.end = time.perf_counter()
    return record


def _take(record: Record, data: bytes, now: float) -> None:
    """One event. Its JSON is parsed only where it has usage: the client must stay cheap."""
    if data == b"[DONE]":
        record.done = True
        return
    if b'"error"' in data[:20]:
        record.kind = "in stream"
        record.error = data[:ERROR_CHARS].decode("utf8", "replace")
        return
    if b'"usage": {' in data or b'"usage":{' in data:
        record.usage = json.loads(data).get("usage") or record.usage
    if b'"choices":[]' not in data and b'"choices": []' not in data:
        record.stamps.append(now)


@dataclass(frozen=True, slots=True)
class Load:
    """The share of the load that one client process makes.

    Attributes:
        urls: of the server that each body is sent to.
        arrivals: when each body is sent, seconds; None: ``conc`` at a time, back to back.
    """

    urls: list[str]
    bodies: list[Body]
    arrivals: list[float] | None
    conc: int
    timeout_s: float


async def run_load(load: Load) -> list[Record]:
    """Send everything from this process."""
    timeout = aiohttp.ClientTimeout(total=load.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    records: list[Record] = []
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, read_bufsize=READ_BYTES
    ) as session:
        if load.arrivals is None:
            queue = zip(load.urls, load.bodies, strict=True)
            workers = [_worker(session, queue, records) for _ in range(load.conc)]
            await asyncio.gather(*workers)
            return records
        begin = time.perf_counter()

        async def at(when: float, url: str, body: Body) -> None:
            await asyncio.sleep(max(0.0, when - (time.perf_counter() - begin)))
            records.append(await complete(session, url, body))

        await asyncio.gather(*map(at, load.arrivals, load.urls, load.bodies))
    return records


async def _worker(
    session: aiohttp.ClientSession, queue: Iterator[tuple[str, Body]], records: list[Record]
) -> None:
    for url, body in queue:
        records.append(await complete(session, url, body))


def in_turn(urls: str, num: int) -> list[str]:
    """Where each of ``num`` requests goes, for addresses with commas between them."""
    return list(islice(cycle(urls.split(",")), num))


def split_load(whole: Load, num_procs: int, *, exact: bool = True) -> list[Load]:
    """Requests dealt out in turn; at least one at a time in every process.

    Args:
        exact: in sum ``conc`` at a time, and no worker has two requests more than another, whose
            last one would run alone at the end; else every process does as many at a time,
            rounded down.
    """
    floor, rest = divmod(whole.conc, num_procs)
    by_worker = exact and whole.arrivals is None
    owners = [(i % whole.conc if by_worker else i) % num_procs for i in range(len(whole.bodies))]

    def dealt(items: list[T], to: int) -> list[T]:
        return [item for item, owner in zip(items, owners, strict=True) if owner == to]

    return [
        Load(
            dealt(whole.urls, i),
            dealt(whole.bodies, i),
            dealt(whole.arrivals, i) if whole.arrivals is not None else None,
            max(1, floor + (exact and i < rest)),
            whole.timeout_s,
        )
        for i in range(num_procs)
    ]


def run_processes(loads: Sequence[Load]) -> list[Record]:
    """Each load in a process of its own, begun together; the records in no order.

    Raises:
        RuntimeError: a client process died.
    """
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(loads))
    pipes = [context.Pipe(duplex=False) for _ in loads]
    processes = [
        context.Process(target=_client, args=(load, barrier.wait, pipe[1].send), daemon=True)
        for load, pipe in zip(loads, pipes, strict=True)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()  # so that a client that dies is the end of its pipe
    try:
        records = [record for receiver, _ in pipes for record in receiver.recv()]
    except EOFError:
        barrier.abort()
        raise RuntimeError("a client process died") from None
    for process in processes:
        process.join()
    return records


def _client(load: Load, wait: Callable[[], object], send: Callable[[list[Record]], object]) -> None:
    with contextlib.suppress(ImportError):  # a client's machine may do without
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    wait()
    send(asyncio.run(run_load(load)))
