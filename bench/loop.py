"""What the event loop of rank 0 costs, in CPU time: streams, hops, scheduling, detokenizing.

    python bench/loop.py [--streams 256] [--tokens 200] [--step_ms 20]

The frontend path is real but for the device: HTTP, tokenizer, detokenizer and frontend serve clients
in other processes, and a scheduler of our own hands out one token per stream and step. Only this
process's CPU time counts, so that other work on the machine matters little; the small parts are
best of several rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.actors.base import Actor
from asyncllm.actors.detokenizer import Detokenizer
from asyncllm.actors.frontend import Frontend, Limits
from asyncllm.actors.renderer import Renderer
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.tokenizer import Tokenizer
from asyncllm.api.common.answer import Vocab
from asyncllm.api.common.request import ServedModel
from asyncllm.codec import i32
from asyncllm.core.request import Reason, SamplingParams
from asyncllm.core.scheduling import Core
from asyncllm.core.slots import Ledger
from asyncllm.core.window_slots import WindowLedger
from asyncllm.core.windows import PerSpace, Window
from asyncllm.demo import ensure_demo_model
from asyncllm.environment import cache_dir
from asyncllm.messages import Abort, Finished, Gone, OpenTextStream, Started, Submit, Tokens
from asyncllm.templates import Chats
from asyncllm.text import Text, load_tokenizer

ROUNDS = 7
MAX_LEN = 8192


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
            end = Finished(rid, Reason.LENGTH, num_tokens=self.num_tokens)
            self.detokenizer.tell(end)


async def streams(args: argparse.Namespace, text: Text) -> None:
    system = ActorSystem()
    sock = socket.create_server(("127.0.0.1", 0))
    pieces, opened = text.pieces, asyncio.Event()
    front = Frontend(
        served=ServedModel(
            name="m", listed=("m",), accepted=frozenset({"m"}), model_name="m",
            max_len=MAX_LEN, vocab_size=len(pieces), created=0,
        ),
        vocab=Vocab(
            piece=lambda i: pieces[i], decode=text.decode, spell=text.spell, special=text.special
        ),
        sockets=[sock],
        limits=Limits(max_running=args.streams, max_waiting=1),
        on_open=opened.set,
    )  # fmt: skip
    pacer = Pacer(args.streams, args.tokens, args.step_ms / 1e3, len(pieces))
    tokenizer = Tokenizer(text, Renderer(Chats({}, {})), limit=MAX_LEN, vocab_size=len(pieces))
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


def start_clients(args: argparse.Namespace, port: int) -> list[subprocess.Popen[bytes]]:
    shares = [len(range(i, args.streams, args.clients)) for i in range(args.clients)]
    command = [sys.executable, __file__, "--client", str(port), "--tokens", str(args.tokens)]
    return [
        subprocess.Popen([*command, "--streams", str(share)], stdout=subprocess.PIPE)
        for share in shares
    ]


def _busy(system: ActorSystem, name: str) -> float:
    return next(a.busy_s for a in system.actors if a.name == name)


async def client(port: int, num_streams: int, num_tokens: int) -> None:
    """Reads streams as raw bytes and counts the chunks with text; prints the count."""

    async def one(i: int) -> int:
        body = json.dumps(
            {"model": "m", "prompt": [300 + i] * 8, "max_tokens": num_tokens, "stream": True,
             "ignore_eos": True}
        )  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        tail, count = b"", 0
        while not tail.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
            data = await reader.read(1 << 18)
            assert data, tail
            count += data.count(b"data: {")
            tail = (tail + data)[-64:]
        writer.close()
        return count

    counts = await asyncio.gather(*map(one, range(num_streams)))
    print(sum(counts))


# -- hops ------------------------------------------------------------------------------------------


class Echo(Actor[Any]):
    """Two of them play ``rounds`` of ``burst`` messages to and fro."""

    def __init__(self, name: str, other: str, burst: int, rounds: int) -> None:
        super().__init__(name)
        self.other, self.burst, self.left = other, burst, rounds
        self.msg = Gone(0)

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
            system.ref("a").tell(Gone(0))
        await system.run()

    return best(lambda: uvloop.run(play()), per=2 * rounds * burst)


# -- scheduling and text ---------------------------------------------------------------------------


def scheduling(num_rows: int, size: int | None = None) -> None:
    """Decode steps of a full batch: what happens between two launches.

    Args:
        size: of a window that layers have; None: none has one.
    """
    windows = {} if size is None else {"window": Window(size), "num_sliding": num_rows * 600}
    core = Core(
        num_lanes=num_rows, num_slots=num_rows * 600, batch_max_tokens=16384,
        chunked_prefill_size=2048, eos_ids=(2,), **windows,
    )  # fmt: skip
    ledger = Ledger(num_rows * 600)
    if size is not None:
        ledger = WindowLedger(PerSpace(num_rows * 600, num_rows * 600), Window(size))
    params = SamplingParams(max_new_tokens=500, ignore_eos=True)
    for rid in range(num_rows):
        core.add(rid, array("i", [rid % 251 + j for j in range(16)]), params)
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


def detokenizing(text: Text, num_rows: int) -> None:
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
    parser.add_argument("--tokens", type=int, default=200, help="per stream")
    parser.add_argument("--step_ms", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    parser.add_argument("--client", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        uvloop.run(client(args.client, args.streams, args.tokens))
        return
    text = load_tokenizer(str(ensure_demo_model(cache_dir())))
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
