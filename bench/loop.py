"""What the event loop of rank 0 costs, in CPU time: streams, hops, scheduling, detokenizing.

    python bench/loop.py [--streams 256] [--tokens 200] [--step_ms 20]
    python bench/loop.py --only requests [--inp 1024] [--route /generate_stream] [--profile]

The frontend path is real but for the device: HTTP, tokenizer, detokenizer and frontend serve clients
in other processes, and a scheduler of our own hands out one token per stream and step. Then whole
requests, with the real scheduler, allocator and runner and a device that makes up its tokens: prompts
of 8 ids, of ``--inp`` ids and of about as many tokens of text, with 256 tokens each, two for each
stream; what a request costs is divided over its tokens. Only this process's CPU time counts, so that
other work on the machine matters little; the small parts are best of several rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.actors.allocator import Allocator
from asyncllm.actors.base import Actor
from asyncllm.actors.detokenizer import Detokenizer
from asyncllm.actors.frontend import Frontend, FrontendLimits
from asyncllm.actors.renderer import TemplateRenderer
from asyncllm.actors.runner import Runner
from asyncllm.actors.scheduler import Scheduler
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.tokenizer import Tokenizer
from asyncllm.api.common.answer import Vocab
from asyncllm.api.common.request import ServedModel
from asyncllm.codec import i32
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.core.scheduling import SchedulerCore
from asyncllm.core.slots import Ledger
from asyncllm.core.window_slots import WindowLedger
from asyncllm.core.windows import PerSpace, Window
from asyncllm.demo import ensure_demo_model
from asyncllm.environment import cache_dir
from asyncllm.messages import (
    Abort,
    EndpointGone,
    Finished,
    OpenTextStream,
    Started,
    StepDone,
    StepPlan,
    Submit,
    Tokens,
)
from asyncllm.records import Logprobs
from asyncllm.templates import TemplateSet
from asyncllm.text import ModelTokenizer, load_tokenizer

ROUNDS = 7
WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "it",
    "for",
    "on",
    "that",
    "with",
    "as",
    "was",
    "by",
    "at",
    "from",
    "they",
    "or",
    "one",
    "had",
    "word",
    "but",
    "not",
    "what",
    "all",
    "were",
    "we",
    "when",
    "your",
    "can",
    "said",
    "there",
    "use",
    "an",
    "each",
    "which",
    "she",
    "do",
    "how",
    "their",
    "if",
    "will",
    "up",
    "other",
    "about",
    "out",
    "many",
    "then",
    "them",
    "these",
    "so",
    "some",
    "her",
    "would",
    "make",
    "like",
    "him",
    "into",
    "time",
    "has",
    "look",
    "two",
    "more",
    "write",
    "go",
    "see",
    "number",
    "no",
    "way",
    "could",
    "people",
    "my",
    "than",
    "first",
    "water",
    "been",
    "call",
    "who",
    "oil",
    "its",
    "now",
    "find",
    "long",
    "down",
    "day",
    "did",
    "get",
    "come",
    "made",
    "may",
    "part",
]
TOKENS_A_WORD = 1.0
MAX_LEN = 8192
ROUTES = ("/v1/completions", "/generate_stream")


def row(what: str, value: float, unit: str) -> None:
    print(f"{what:<62} {value:9.2f} {unit}", flush=True)


def best(work: Callable[[], object], per: int, rounds: int = ROUNDS) -> float:
    """Microseconds of CPU per unit, the best of some rounds."""
    times = []
    for _ in range(rounds):
        begin = time.thread_time()
        work()
        times.append(time.thread_time() - begin)
    return min(times) / per * 1e6


def tokens_of(step: int, rids: array[int], ids: list[int]) -> Tokens:
    return Tokens(step, rids, i32(ids), bytes(len(ids)), None, ())


class Sampler:
    """Samples the loop's thread 500 times a second of its CPU time; prints where it was."""

    def __init__(self) -> None:
        self._lines: Counter[str] = Counter()
        self._all: Counter[str] = Counter()

    def start(self) -> None:
        signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, 0.002, 0.002)

    def _sample(self, _: int, frame: FrameType | None) -> None:
        seen = set()
        for depth in range(60):
            if frame is None:
                break
            code = frame.f_code
            place = f"{'/'.join(code.co_filename.split('/')[-3:])}:{code.co_qualname}"
            if not depth:
                self._lines[f"{place}:{frame.f_lineno}"] += 1
            seen.add(place)
            frame = frame.f_back
        self._all.update(seen)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        total = sum(self._lines.values())
        for title, counts in (("inside", self._lines), ("inside or below", self._all)):
            print(title)
            for place, num in counts.most_common(40):
                print(f"  {100 * num / total:5.1f} % {place}")


class Quiet(Actor[Any]):
    """Takes everything and does nothing."""

    def receive(self, batch: list[Any]) -> None:
        pass


# -- streams -------------------------------------------------------------------------------------


class Pacer(Actor[Any]):
    """A scheduler that gives every stream a token per step as soon as all streams are there."""

    def __init__(self, num_streams: int, num_tokens: int, step_s: float, num_ids: int) -> None:
        super().__init__("scheduler")
        self.num_streams, self.num_tokens, self.step_s = num_streams, num_tokens, step_s
        self.rids, self.num_ids = array("q"), num_ids
        self.cpu_s = self.kernel_s = self.wall_s = 0.0
        self.aborted = 0

    def started(self) -> None:
        self.detokenizer = self.system.ref("detokenizer")

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            if isinstance(msg, Submit):
                self.rids.append(msg.rid)
                if len(self.rids) == self.num_streams:
                    self.spawn(self.pace())
            self.aborted += isinstance(msg, Abort)

    async def pace(self) -> None:
        rng = random.Random(0)
        await asyncio.sleep(0.5)  # every header has been sent
        self.cpu_s, self.wall_s = time.process_time(), time.perf_counter()
        self.kernel_s = os.times().system
        due = self.system.loop.time()
        for step in range(self.num_tokens):
            ids = [rng.randrange(100, self.num_ids) for _ in self.rids]
            self.detokenizer.tell(tokens_of(step, self.rids, ids))
            due += self.step_s
            await asyncio.sleep(max(0.0, due - self.system.loop.time()))
        for rid in self.rids:
            end = Finished(rid, FinishReason.LENGTH, num_tokens=self.num_tokens)
            self.detokenizer.tell(end)


def frontend(
    args: argparse.Namespace, text: ModelTokenizer, sock: socket.socket
) -> tuple[Frontend, asyncio.Event]:
    """It, and what is set when it serves."""
    pieces, opened = text.pieces, asyncio.Event()
    made = Frontend(
        served=ServedModel(
            name="m", listed=("m",), accepted=frozenset({"m"}), model_name="m",
            max_len=MAX_LEN, vocab_size=len(pieces), created=0,
        ),
        vocab=Vocab(
            piece=lambda i: pieces[i], decode=text.decode, spell=text.spell, special=text.special
        ),
        sockets=[sock],
        limits=FrontendLimits(max_running=args.streams, max_waiting=1),
        on_open=opened.set,
    )  # fmt: skip
    return made, opened


async def streams(args: argparse.Namespace, text: ModelTokenizer) -> None:
    system = ActorSystem()
    sock = socket.create_server(("127.0.0.1", 0))
    front, opened = frontend(args, text, sock)
    pieces = text.pieces
    pacer = Pacer(args.streams, args.tokens, args.step_ms / 1e3, len(pieces))
    tokenizer = Tokenizer(
        text, TemplateRenderer(TemplateSet({}, {})), limit=MAX_LEN, vocab_size=len(pieces)
    )
    for actor in (pacer, Detokenizer(text), tokenizer, front, Quiet("watchdog")):
        system.add(actor)
    running = asyncio.create_task(system.run())
    system.ref("frontend").tell(Started())
    await opened.wait()
    clients = start_clients(args, sock.getsockname()[1])
    loop = asyncio.get_running_loop()
    told = await asyncio.gather(*(loop.run_in_executor(None, c.communicate) for c in clients))
    cpu, wall = time.process_time() - pacer.cpu_s, time.perf_counter() - pacer.wall_s
    kernel = os.times().system - pacer.kernel_s
    chunks = sum(json.loads(out) for out, _ in told)
    system.stop()
    await running
    total = args.streams * args.tokens
    assert not pacer.aborted
    row(
        f"streamed token, {args.streams} streams, steps of {args.step_ms:g} ms",
        cpu / total * 1e6,
        "us",
    )
    row("  of it in the kernel, most of it sending", kernel / total * 1e6, "us")
    row("  of it detokenizer", _busy(system, "detokenizer") / total * 1e6, "us")
    row("  chunks per token (merged when behind)", chunks / total, "")
    row("  share of one core", 100 * cpu / wall, "%")


def start_clients(
    args: argparse.Namespace, port: int, inp: str = "ids 8", turns: int = 1
) -> list[subprocess.Popen[bytes]]:
    """Clients with prompts of ``inp``, each stream ``turns`` times."""
    shares = [len(range(i, args.streams, args.clients)) for i in range(args.clients)]
    command = [sys.executable, __file__, "--client", str(port), "--tokens", str(args.tokens)]
    command += ["--prompts", inp, "--turns", str(turns), "--route", args.route]
    return [
        subprocess.Popen(
            [*command, "--streams", str(share), "--seed", str(i)], stdout=subprocess.PIPE
        )
        for i, share in enumerate(shares)
    ]


def _busy(system: ActorSystem, name: str) -> float:
    return next(a.busy_s for a in system.actors if a.name == name)


def prompt(kind: str, length: int, rng: random.Random) -> list[int] | str:
    """One of ``length`` ids, or of words of about as many tokens; none shares more than a few."""
    if kind == "ids":
        return [rng.randrange(1000, 40000) for _ in range(length)]
    words = [rng.choice(WORDS) for _ in range(int(length / TOKENS_A_WORD))]
    return " ".join(words)


async def client(args: argparse.Namespace) -> None:
    """Reads streams as raw bytes and counts the chunks with text; prints the count."""
    port, num_streams, num_tokens = args.client, args.streams, args.tokens
    rng, (kind, length) = random.Random(args.seed), args.prompts.split()
    prompts = [prompt(kind, int(length), rng) for _ in range(num_streams * args.turns)]

    async def one(i: int) -> int:
        return sum([await ask(prompts[i * args.turns + j]) for j in range(args.turns)])

    async def ask(text: list[int] | str) -> int:
        if native := args.route == "/generate_stream":
            options = {"max_new_tokens": num_tokens, "ignore_eos": True}
            body = json.dumps({"inputs": text, "parameters": options})
        else:
            body = json.dumps(
                {"model": "m", "prompt": text, "max_tokens": num_tokens, "stream": True,
                 "ignore_eos": True}
            )  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {args.route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        tail, count = b"", 0
        while not tail.endswith(b"\n\n\r\n0\r\n\r\n"):
            data = await reader.read(1 << 18)
            assert data, tail
            count += data.count(b"data:{" if native else b"data: {")
            tail = (tail + data)[-64:]
        writer.close()
        return count

    counts = await asyncio.gather(*map(one, range(num_streams)))
    print(sum(counts))


# -- whole requests ------------------------------------------------------------------------------


class Invented:
    """A device that makes up its tokens; implements the runner's ``Device`` and ``PendingStep``."""

    def __init__(self, step_s: float, num_ids: int) -> None:
        self._step_s, self._num_ids = step_s, num_ids
        self._rng, self._free_at = random.Random(0), 0.0
        self.cpu_s = 0.0  # of making them up
        self._scored = False  # some request has wanted log-probabilities

    def launch(self, plan: StepPlan) -> InventedStep:
        begin = time.thread_time()
        self._scored |= any(opened.params.logprobs >= 0 for opened in plan.opened)
        self._free_at = max(self._free_at, time.perf_counter()) + self._step_s
        ids = [self._rng.randrange(100, self._num_ids) if s else -1 for s in plan.samples]
        scores = None
        if self._scored:
            scores = Logprobs(0, array("f", [-self._rng.random() for _ in ids]))
        step = InventedStep(StepDone(plan.step, i32(ids), scores), self._free_at)
        self.cpu_s += time.thread_time() - begin
        return step

    def close(self) -> None:
        pass


class InventedStep:
    """It is over at ``end``."""

    gap_ms: float | None = None

    def __init__(self, done: StepDone, end: float) -> None:
        self._done, self._end = done, end

    def wait(self) -> StepDone:
        time.sleep(max(0.0, self._end - time.perf_counter()))
        return self._done


async def requests(
    args: argparse.Namespace, text: ModelTokenizer, inp: str, profile: bool
) -> float:
    """CPU microseconds per streamed token of whole requests, but the device's."""
    system = ActorSystem()
    sock = socket.create_server(("127.0.0.1", 0))
    front, opened = frontend(args, text, sock)
    tokenizer = Tokenizer(
        text, TemplateRenderer(TemplateSet({}, {})), limit=MAX_LEN, vocab_size=len(text.pieces)
    )
    num_slots = args.streams * 2 * 2048
    core = SchedulerCore(
        num_lanes=args.streams, num_slots=num_slots, batch_max_tokens=8192,
        chunked_prefill_size=4096, eos_ids=(2,),
    )  # fmt: skip
    scheduler = Scheduler(core, runners=[0], vocab_size=len(text.pieces), max_len=MAX_LEN)
    device = Invented(args.step_ms / 1e3, len(text.pieces))
    engine = (Allocator(num_slots, shared_prefixes=True), scheduler, Runner(device, reports=True))
    for actor in (*engine, Detokenizer(text), tokenizer, front, Quiet("watchdog")):
        system.add(actor)
    running = asyncio.create_task(system.run())
    system.ref("frontend").tell(Started())
    await opened.wait()
    turns = 2
    samples = Sampler() if profile else None
    gc.collect()
    gc.freeze()  # as the server does
    clients = start_clients(args, sock.getsockname()[1], inp, turns)
    cpu_s, kernel_s = time.process_time(), os.times().system
    if samples:
        samples.start()
    loop = asyncio.get_running_loop()
    await asyncio.gather(*(loop.run_in_executor(None, c.communicate) for c in clients))
    cpu_s, kernel_s = time.process_time() - cpu_s - device.cpu_s, os.times().system - kernel_s
    if samples:
        samples.stop()
    system.stop()
    await running
    total = args.streams * args.tokens * turns
    busy = ", ".join(
        f"{a.name} {1e6 * a.busy_s / total:.2f}"
        for a in system.actors
        if 1e6 * a.busy_s > total / 20
    )
    row(f"streamed token, prompts of {inp}, {args.tokens} tokens each", 1e6 * cpu_s / total, "us")
    print(f"  in the kernel {1e6 * kernel_s / total:.2f}; handlers: {busy}", flush=True)
    return 1e6 * cpu_s / total


# -- hops ------------------------------------------------------------------------------------------


class Echo(Actor[Any]):
    """Two of them play ``rounds`` of ``burst`` messages to and fro."""

    def __init__(self, name: str, other: str, burst: int, rounds: int) -> None:
        super().__init__(name)
        self.other, self.burst, self.left = other, burst, rounds
        self.msg = EndpointGone(0)

    def started(self) -> None:
        self.ref = self.system.ref(self.other)

    def receive(self, batch: list[Any]) -> None:
        self.left -= 1
        if not self.left:
            self.system.stop()
            return
        for msg in batch:
            self.ref.tell(msg)


def hops(burst: int, encode: bool) -> float:
    rounds = max(200, 20_000 // burst)

    async def play() -> None:
        system = ActorSystem(encode_local=encode)
        for name, other in (("a", "b"), ("b", "a")):
            system.add(Echo(name, other, burst, rounds))
        for _ in range(burst):
            system.ref("a").tell(EndpointGone(0))
        await system.run()

    return best(lambda: uvloop.run(play()), per=2 * rounds * burst)


# -- scheduling and text ---------------------------------------------------------------------------


def scheduling(num_rows: int, size: int | None = None) -> None:
    """Decode steps of a full batch: what happens between two launches.

    Args:
        size: of a window that layers have; None: none has one.
    """
    windows = {} if size is None else {"window": Window(size), "num_sliding": num_rows * 600}
    core = SchedulerCore(
        num_lanes=num_rows, num_slots=num_rows * 600, batch_max_tokens=16384,
        chunked_prefill_size=2048, eos_ids=(2,), **windows,
    )  # fmt: skip
    ledger = Ledger(num_rows * 600)
    if size is not None:
        ledger = WindowLedger(PerSpace(num_rows * 600, num_rows * 600), Window(size))
    params = SamplingParams(max_new_tokens=500, ignore_eos=True)
    for rid in range(num_rows):
        core.add(Submit(rid, array("i", [rid % 251 + j for j in range(16)]), params))
    spent = {"propose": 0.0, "reserve": 0.0, "plan": 0.0, "commit": 0.0}
    lows = dict.fromkeys(spent, float("inf"))
    clock = time.thread_time
    for step_idx in range(300):
        a = clock()
        proposal = core.propose()
        assert proposal is not None
        b = clock()
        opened = {lane: (ids, share) for lane, ids, share in proposal.opened}
        ledger.launched(proposal.launched)
        grant = ledger.reserve(proposal.lanes, proposal.counts, opened)
        c = clock()
        step = core.plan(grant)
        assert step is not None
        d = clock()
        core.commit(step, array("i", [7] * len(step.rows)))
        e = clock()
        if step_idx > 10:
            assert len(step.rows) == num_rows
            for name, took in zip(spent, (b - a, c - b, d - c, e - d), strict=True):
                lows[name] = min(lows[name], took)
                spent[name] += took
    seen = "" if size is None else f", window {size}"
    for name, low in lows.items():
        row(
            f"{name}, {num_rows} decode rows{seen} (best; mean {spent[name] / 289e-6:.0f})",
            low * 1e6,
            "us",
        )


def detokenizing(text: ModelTokenizer, num_rows: int) -> None:
    """One step's tokens to text and to the frontend's mailbox."""
    rng, num_steps = random.Random(0), 100
    rids = array("q", range(num_rows))
    steps = [
        tokens_of(i, rids, [rng.randrange(100, len(text.pieces)) for _ in rids])
        for i in range(num_steps)
    ]

    async def play() -> float:
        system = ActorSystem()
        actor = Detokenizer(text, budget_s=1.0)
        sink = Quiet("frontend")
        sink.capacity = 1 << 30
        for each in (actor, sink, Quiet("scheduler")):
            system.add(each)
            each.system = system
        actor.started()
        for rid in rids:
            actor.receive([OpenTextStream(rid, b"", (), True, False)])
        begin = time.thread_time()
        for msg in steps:
            actor.receive([msg])
        return (time.thread_time() - begin) / num_steps

    row(
        f"detokenize a step of {num_rows} rows",
        min(uvloop.run(play()) for _ in range(ROUNDS)) * 1e6,
        "us",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=0, help="per stream; 0: 200, of requests 256")
    parser.add_argument("--step_ms", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    parser.add_argument("--inp", type=int, default=1024, help="prompt tokens of whole requests")
    parser.add_argument("--route", default=ROUTES[0], choices=ROUTES, help="of requests")
    parser.add_argument("--only", choices=("requests",), help="leave out everything else")
    parser.add_argument("--kinds", nargs="+", default=["short", "ids", "text"], help="of requests")
    parser.add_argument("--profile", action="store_true", help="print where requests take time")
    for name, kind in (("client", int), ("seed", int), ("turns", int), ("prompts", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        uvloop.run(client(args))
        return
    text = load_tokenizer(str(ensure_demo_model(cache_dir())))
    args.tokens = args.tokens or (256 if args.only else 200)
    if args.only is None:
        parts(args, text)
    inputs = {"short": "ids 8", "ids": f"ids {args.inp}", "text": f"text {args.inp}"}
    for kind in args.kinds:
        uvloop.run(requests(args, text, inputs[kind], args.profile))


def parts(args: argparse.Namespace, text: ModelTokenizer) -> None:
    """Everything but whole requests."""
    row("hop, one message", hops(1, False), "us")
    row("hop, bursts of 64, per message", hops(64, False), "us")
    row("hop, one message through the codec", hops(1, True), "us")
    row("hop, bursts of 64 through the codec, per message", hops(64, True), "us")
    scheduling(args.streams)
    scheduling(args.streams, size=64)
    detokenizing(text, args.streams)
    uvloop.run(streams(args, text))


if __name__ == "__main__":
    main()
