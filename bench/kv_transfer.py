"""K/V from one process to another: GB/s of each way, beside what a plain copy reaches.

    python bench/kv_transfer.py --device cuda          # from GPU 0 to GPU 1, or to another process
    python bench/kv_transfer.py                        # on the CPU: tcp, p2p, nccl (over gloo)

Two ranks of a model of ``--layers``, ``--kv_heads`` and ``--head_dim`` in bf16 (Llama-3.1-8B's on a
GPU), one in this process, one in a child. Prompts of ``--tokens`` are sent as chunks of ``--chunk``
whose steps are all over; the time is from the first word to the receiver's ``KvArrived``, the best and
the median of ``--runs`` (of fewer where they take long) after one to warm up. The share is of what one copy of a gigabyte
between the same two devices reaches in this run. A way whose bytes did not all come right has no
number. The last columns are the CPU time of each process, in ms per gigabyte, and what the device
needs to fill a page with slots, and to empty it into them. ``--profile`` writes to stderr what the
time of the two transfer threads went to (``poll`` is idleness).
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from torch import Tensor

from asyncllm.actors.kv_listener import KvListener
from asyncllm.actors.kv_receiver import KvReceiver
from asyncllm.actors.kv_sender import KvSender
from asyncllm.actors.kv_thread import KvShard, TransferThread
from asyncllm.actors.transport import CurveKeys
from asyncllm.codec import Message
from asyncllm.core.windows import PerSpace
from asyncllm.engine.kv_pages import KvBytes, QueuedCopy, as_bytes, warm_up
from asyncllm.engine.kv_pair import gloo_pair, nccl_pair
from asyncllm.engine.kv_transports import NCCL, P2P, TCP, make_ways
from asyncllm.messages import (
    CancelTransfer,
    ExportKv,
    ImportKv,
    KvArrived,
    KvComputed,
    StepFinished,
    TransferFailed,
)
from asyncllm.models.attention import KvPairs
from asyncllm.models.spec import AttentionSpec
from asyncllm.records import KvDestination, KvWireFormat
from asyncllm.server import signals
from bench.serve import BenchError

NODE = "bench"
WAIT_S = 240.0
PAGE_RUNS = 10
PROFILE_LINES = 14
LONG_S = 2.0  # no size is repeated beyond that
SIZES = {"cpu": (16, 1024, 4096), "cuda": (32, 1024, 8192, 32768)}  # layers; tokens


class Side:
    """One rank and its K/V."""

    def __init__(self, args: argparse.Namespace, *, sends: bool) -> None:
        index = 0 if sends or torch.cuda.device_count() < 2 else 1
        self.cuda = args.device == "cuda"
        self.device = torch.device("cuda", index) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        spec = AttentionSpec(
            kind="gqa", num_q_heads=args.kv_heads, num_kv_heads=args.kv_heads,
            head_dim=args.head_dim, v_dim=args.head_dim, scale=1.0, rope=None,
        )  # fmt: skip
        layout = KvPairs([spec] * args.layers, torch.bfloat16)
        tokens = max(args.tokens)
        kv = layout.allocate(PerSpace(tokens, 0), self.device)
        self.tensors = [as_bytes(x) for layer in kv for x in layer]
        for x in self.tensors if sends else ():
            x.random_(256)
        heads = (tuple(range(args.kv_heads)),)
        self.wire = KvWireFormat(
            format="", dtype="bf16", num_layers=args.layers, num_heads=args.kv_heads,
            head_bytes=4 * args.head_dim,
        )  # fmt: skip
        self.kv, self.tokens = KvBytes(kv, layout), tokens
        held = (heads,) * args.layers
        self.share = KvShard("bench", 0, self.wire, self.kv, lambda tp: held)

    def thread(
        self, transport: str, pages: tuple[int, int], keys: CurveKeys, *, sends: bool
    ) -> TransferThread:
        """What moves them by one way, through so many pages of so many tokens."""
        num, size = pages
        mode = P2P if transport == P2P else TCP
        made, transports = make_ways(mode, num, size * self.kv.slot_bytes, self.device)
        transports = replace(
            transports, names=(transport,), backend=nccl_pair if self.cuda else gloo_pair
        )
        warm_up(made, self.kv, self.tokens - 1)
        if sends:
            return KvSender(self.share, made, transports, keys=[keys])
        listener = KvListener(keys, "127.0.0.1", 0)
        return KvReceiver(self.share, made, transports, node=NODE, listener=listener)

    def digest(self) -> list[int]:
        """Of each tensor; other bytes, or the same ones elsewhere, have another one."""
        return [_digest(x.view(torch.int32).view(-1)) for x in self.tensors]

    def clear(self) -> None:
        """Nothing that has come before is taken for what comes next."""
        for x in self.tensors:
            x.zero_()


def _digest(x: Tensor) -> int:
    weights = torch.arange(len(x), device=x.device) * 2_654_435_761 % 2_147_483_647
    return int((weights * x).sum())


def profile(thread: TransferThread) -> None:
    """Have a thread that has not begun say at its end what its time went to."""
    run, name = thread._run, type(thread).__name__

    def profiled() -> None:
        found = cProfile.Profile()
        found.runcall(run)
        sys.stderr.write(f"-- {name}\n")
        pstats.Stats(found, stream=sys.stderr).sort_stats("tottime").print_stats(PROFILE_LINES)
        sys.stderr.flush()

    thread._thread = threading.Thread(target=profiled, name="kv", daemon=True)


def answer(line: str) -> None:
    """To the parent."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def say(batch: list[Message]) -> None:
    for msg in batch:
        if isinstance(msg, KvArrived | TransferFailed):
            answer(f"{type(msg).__name__} {msg.rid} {process_time()}")


def take(args: argparse.Namespace) -> None:
    """The child: told lines of JSON, it answers in lines."""
    side, thread = Side(args, sends=False), None
    for line in sys.stdin:
        match json.loads(line):
            case [transport, pages, public, secret]:
                if thread is not None:
                    thread.close()
                side.clear()
                thread = side.thread(
                    transport, tuple(pages), CurveKeys(public, secret), sends=False
                )
                assert isinstance(thread, KvReceiver)
                if args.profile:
                    profile(thread)
                thread.start(say, lambda error: answer(f"failed {error!r}"))
                answer(f"port {thread.port}")
            case [epoch, tokens] if thread is not None:
                thread.put([ImportKv(epoch, 0, tokens, array("i", range(tokens)))])
                answer(f"waits {process_time()}")
            case "digest" if thread is not None:
                answer(json.dumps(side.digest()))
                thread.close()
                thread = None


class Child:
    """The other process."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--child", *sys.argv[1:]]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, what: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def hear(self, word: str) -> str:
        """The rest of its next line. Raises BenchError: it begins otherwise."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line.startswith(word):
            raise BenchError(line or "the other process has ended")
        return line[len(word) :].strip()


@contextmanager
def other_process() -> Iterator[Child]:
    child = Child()
    watch = threading.Timer(WAIT_S, child.process.kill)
    watch.start()
    try:
        yield child
    finally:
        watch.cancel()
        child.process.kill()
        child.process.communicate()


@dataclass(frozen=True)
class Result:
    """Seconds: of each run, of a run's CPU at both ends, of filling and emptying a page."""

    tokens: int
    took: list[float]
    cpu: float
    cpu_there: float
    fill: float
    empty: float


def page_times(side: Side, thread: TransferThread) -> tuple[float, float]:
    """Seconds to fill a page, and to empty it; its slots hold the same bytes afterwards."""
    strips, pages = side.kv.whole(), thread.pages
    slots = array("i", range(min(pages.size // strips.width, side.tokens)))

    def rate(copy: Callable[[], QueuedCopy]) -> float:
        copy().wait()
        begin = perf_counter()
        copied = [copy() for _ in range(PAGE_RUNS)]
        copied[-1].wait()
        return (perf_counter() - begin) / PAGE_RUNS

    return (
        rate(lambda: pages.fill(0, strips, slots, host=False)),
        rate(lambda: pages.empty(0, strips, slots, host=False)),
    )


def measure(
    args: argparse.Namespace, transport: str, pages: tuple[int, int], side: Side, child: Child
) -> Iterator[Result]:
    """Of one way, for each number of tokens.

    Raises:
        BenchError: not all bytes came right.
    """
    keys = CurveKeys.make()
    child.tell([transport, pages, keys.public, keys.secret])
    thread = side.thread(transport, pages, keys, sends=True)
    fill_s, empty_s = page_times(side, thread)
    if args.profile:
        profile(thread)
    thread.start(lambda batch: None, lambda error: child.process.kill())
    address = f"tcp://127.0.0.1:{child.hear('port')}"
    epoch, pause = 0, threading.Event()
    try:
        for tokens in args.tokens:
            took, cpu, cpu_there = [], 0.0, 0.0
            while len(took) < args.runs + 1 and sum(took[1:]) < LONG_S:
                epoch += 1
                child.tell([epoch, tokens])
                there = float(child.hear("waits"))
                pause.wait(0.01)  # whatever the run before has left to do
                here, begin = process_time(), perf_counter()
                to = KvDestination(
                    node=NODE, epoch=epoch, hit=0, length=tokens, addresses=(address,),
                    wire=side.wire,
                )  # fmt: skip
                thread.put([ExportKv(epoch, to), *chunks(args, epoch, tokens), StepFinished(1)])
                ended = child.hear(f"KvArrived {epoch}")
                took.append(perf_counter() - begin)
                cpu, cpu_there = cpu + process_time() - here, cpu_there + float(ended) - there
                thread.put([CancelTransfer(epoch)])
            yield Result(tokens, took[1:], cpu / len(took), cpu_there / len(took), fill_s, empty_s)
        child.tell("digest")
        if json.loads(child.hear("")) != side.digest():
            raise BenchError(f"{transport}: other bytes have come than were sent")
    finally:
        thread.close()


def chunks(args: argparse.Namespace, rid: int, tokens: int) -> list[KvComputed]:
    """The whole prompt."""
    slots = array("i", range(tokens))
    return [
        KvComputed(rid=rid, seq=i, step=1, start=start, slots=slots[start : start + args.chunk])
        for i, start in enumerate(range(0, tokens, args.chunk))
    ]


def copies(args: argparse.Namespace) -> dict[str, float]:
    """GB/s of plain copies of the same machine; the last one is between the two ranks."""
    nbytes = 1 << (30 if args.device == "cuda" else 28)
    host = [torch.ones(nbytes, dtype=torch.uint8) for _ in range(2)]
    found = {"memcpy": _rate(lambda: host[1].copy_(host[0]), nbytes)}
    if args.device != "cuda":
        return found
    there = torch.device("cuda", 1 if torch.cuda.device_count() > 1 else 0)
    pinned = host[0].pin_memory()
    ours, theirs = (torch.zeros(nbytes, dtype=torch.uint8, device=d) for d in ("cuda:0", there))
    wait = torch.cuda.synchronize
    found["GPU 0 -> pinned"] = _rate(lambda: (pinned.copy_(ours), wait(0)), nbytes)
    found[f"GPU 0 -> GPU {there.index}"] = _rate(lambda: (theirs.copy_(ours), wait(0)), nbytes)
    return found


def _rate(copy: Callable[[], object], nbytes: int) -> float:
    copy()
    best = 0.0
    for _ in range(5):
        begin = perf_counter()
        copy()
        best = max(best, nbytes / (perf_counter() - begin) / 1e9)
    return best


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    for name, default in (("kv_heads", 8), ("head_dim", 128), ("chunk", 8192), ("runs", 5)):
        add(f"--{name}", type=int, default=default)
    add("--layers", type=int)
    add("--tokens", type=int, nargs="+")
    add("--pages", nargs="+", default=["8x2048"], help="how many, of how many tokens")
    add("--ways", nargs="+", default=[P2P, NCCL, TCP])
    add("--profile", action="store_true")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    layers, *tokens = SIZES[args.device]
    args.layers, args.tokens = args.layers or layers, args.tokens or tokens
    return args


def main() -> int:
    args = parsed()
    if args.child:
        take(args)
        return 0
    failed, out = 0, sys.stdout
    with other_process() as child:
        link = 0.0
        for name, link in copies(args).items():
            out.write(f"{name:>16} {link:7.2f} GB/s\n")
        side = Side(args, sends=True)
        heads = (
            "way", "pages", "tokens", "ms", "median", "GB/s", "of link", "CPU", "there", "fill",
            "empty",
        )  # fmt: skip
        out.write("".join(f"{head:>9}" for head in heads) + "\n")
        for transport in args.ways:
            for pages in args.pages:
                num, size = map(int, pages.split("x"))
                try:
                    for r in measure(args, transport, (num, size), side, child):
                        best, middle = min(r.took), statistics.median(r.took)
                        gb = r.tokens * side.kv.slot_bytes / 1e9
                        out.write(
                            f"{transport:>9}{pages:>9}{r.tokens:>9}{1e3 * best:>9.2f}{1e3 * middle:>9.2f}"
                            f"{gb / best:>9.1f}{gb / best / link:>9.1%}{1e3 * r.cpu / gb:>9.2f}"
                            f"{1e3 * r.cpu_there / gb:>9.2f}{1e3 * r.fill:>9.3f}"
                            f"{1e3 * r.empty:>9.3f}\n"
                        )
                        out.flush()
                except BenchError as error:
                    out.write(f"{transport:>9}{pages:>9} failed: {error}\n")
                    failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    signals.end(main())  # NCCL does not outlive the interpreter's end
