"""K/V from one process to another: GB/s of each way, beside what a plain copy reaches.

    python bench/kv_transfer.py                        # on the CPU: tcp, p2p, nccl (over gloo)
    python bench/kv_transfer.py --device cuda          # from GPU 0 to GPU 1, or to another process

Two ranks of a model of ``--layers``, ``--kv_heads`` and ``--head_dim`` in bf16, one in this process,
one in a child. ``--tokens`` are sent as chunks of ``--chunk`` whose steps are all over; the time is
from the first word to the taker's ``Arrived``, the best of ``--runs`` after one to warm up. A way
whose bytes did not all come right has no number.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import threading
from array import array
from dataclasses import replace
from pathlib import Path
from time import perf_counter

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import torch

from asyncllm.actors.kv_loop import Mover, Share
from asyncllm.actors.kv_sender import Sender
from asyncllm.actors.kv_taker import Door, Taker
from asyncllm.actors.transport import Keys
from asyncllm.codec import Message
from asyncllm.core.windows import PerSpace
from asyncllm.engine.kv_pages import KvBytes, as_bytes
from asyncllm.engine.kv_pair import gloo_pair, nccl_pair
from asyncllm.engine.kv_ways import NCCL, P2P, TCP, make_ways
from asyncllm.messages import Arrived, Computed, Export, Forget, Import, Lapsed, StepOver
from asyncllm.models.attention import KvPairs
from asyncllm.models.spec import AttentionSpec
from asyncllm.records import Destination, KvWire
from asyncllm.server import signals
from bench.serve import BenchError

NODE = "bench"
WAIT_S = 120.0
Told = dict[str, threading.Event]


class Side:
    """One rank, its K/V, and what moves them."""

    def __init__(self, args: argparse.Namespace, way: str, keys: Keys, *, sends: bool) -> None:
        index = 0 if sends or torch.cuda.device_count() < 2 else 1
        cuda = args.device == "cuda"
        self.device = torch.device("cuda", index) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        spec = AttentionSpec(
            kind="gqa", num_q_heads=args.kv_heads, num_kv_heads=args.kv_heads,
            head_dim=args.head_dim, v_dim=args.head_dim, scale=1.0, rope=None,
        )  # fmt: skip
        layout = KvPairs([spec] * args.layers, torch.bfloat16)
        self.kv = layout.allocate(PerSpace(args.tokens, 0), self.device)
        for x in (as_bytes(x) for layer in self.kv if sends for x in layer):
            x.random_(256)
        kv = KvBytes(self.kv, layout)
        self.nbytes = args.tokens * kv.slot_bytes
        heads = (tuple(range(args.kv_heads)),)
        self.wire = KvWire(
            format="", dtype="bf16", num_layers=args.layers, num_heads=args.kv_heads,
            head_bytes=4 * args.head_dim,
        )  # fmt: skip
        share = Share("bench", 0, self.wire, kv, lambda tp: (heads,) * args.layers)
        mode = P2P if way == P2P else TCP
        size = args.page_size * kv.slot_bytes
        pages, ways = make_ways(mode, args.pages, size, self.device)
        ways = replace(ways, names=(way,), backend=nccl_pair if cuda else gloo_pair)
        self.mover: Mover
        self.port = 0
        if sends:
            self.mover = Sender(share, pages, ways, keys=[keys])
        else:
            door = Door(keys, "127.0.0.1", 0)
            self.mover, self.port = Taker(share, pages, ways, node=NODE, door=door), door.port

    def digest(self) -> str:
        """Of all K/V."""
        total = hashlib.sha256()
        for x in (x for layer in self.kv for x in layer):
            total.update(as_bytes(x).cpu().numpy().data)
        return total.hexdigest()


def take(args: argparse.Namespace) -> None:
    """The child: told lines of JSON, it answers in lines."""
    way, public, secret = json.loads(sys.stdin.readline())
    side = Side(args, way, Keys(public, secret), sends=False)

    def say(batch: list[Message]) -> None:
        for msg in batch:
            if isinstance(msg, Arrived | Lapsed):
                answer(f"{type(msg).__name__} {msg.rid}")

    def answer(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    side.mover.start(say, lambda error: answer(f"failed {error!r}"))
    answer(f"port {side.port}")
    slots = array("i", range(args.tokens))
    for line in sys.stdin:
        if line.strip() == "digest":
            answer(side.digest())
        else:
            side.mover.put([Import(int(line), 0, args.tokens, slots)])
            answer("waits")


def measure(args: argparse.Namespace, way: str) -> float:
    """GB/s of one way. Raises BenchError: not all bytes came right."""
    keys = Keys.make()
    command = [sys.executable, __file__, "--child", *sys.argv[1:]]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    side: Side | None = None
    watch = threading.Timer(WAIT_S, child.kill)
    watch.start()
    try:
        child.stdin.write(json.dumps([way, keys.public, keys.secret]) + "\n")
        child.stdin.flush()
        side = Side(args, way, keys, sends=True)
        side.mover.start(lambda batch: None, lambda error: child.kill())
        address = f"tcp://127.0.0.1:{child.stdout.readline().split()[1]}"
        best = 0.0
        for epoch in range(1, args.runs + 2):
            child.stdin.write(f"{epoch}\n")
            child.stdin.flush()
            child.stdout.readline()
            to = Destination(
                node=NODE, epoch=epoch, hit=0, length=args.tokens, addresses=(address,),
                wire=side.wire,
            )  # fmt: skip
            begin = perf_counter()
            side.mover.put([Export(epoch, to), *chunks(args, epoch), StepOver(1)])
            if (said := child.stdout.readline().split()) != ["Arrived", str(epoch)]:
                raise BenchError(f"{way}: {said}")
            took = perf_counter() - begin
            side.mover.put([Forget(epoch)])
            best = max(best, side.nbytes / took / 1e9) if epoch > 1 else best
        child.stdin.write("digest\n")
        child.stdin.flush()
        if child.stdout.readline().strip() != side.digest():
            raise BenchError(f"{way}: other bytes have come than were sent")
        return best
    finally:
        watch.cancel()
        child.kill()
        child.communicate()
        if side is not None:
            side.mover.close()


def chunks(args: argparse.Namespace, rid: int) -> list[Computed]:
    """The whole prompt."""
    slots = array("i", range(args.tokens))
    return [
        Computed(rid=rid, seq=i, step=1, start=start, slots=slots[start : start + args.chunk])
        for i, start in enumerate(range(0, args.tokens, args.chunk))
    ]


def copies(args: argparse.Namespace, nbytes: int = 1 << 28) -> dict[str, float]:
    """GB/s of plain copies of the same machine."""
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


def _rate(copy: object, nbytes: int) -> float:
    assert callable(copy)
    copy()
    best = 0.0
    for _ in range(5):
        begin = perf_counter()
        copy()
        best = max(best, nbytes / (perf_counter() - begin) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 16), ("kv_heads", 8), ("head_dim", 128), ("tokens", 4096), ("chunk", 1024),
        ("pages", 16), ("page_size", 256), ("runs", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ways", nargs="+", default=[TCP, P2P, NCCL])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        take(args)
        return
    for name, rate in copies(args).items():
        sys.stdout.write(f"{name:>16} {rate:7.2f} GB/s\n")
    for way in args.ways:
        sys.stdout.write(f"{way:>16} {measure(args, way):7.2f} GB/s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
    signals.end(0)  # NCCL does not outlive the interpreter's end
