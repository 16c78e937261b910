"""Servers of several processes that the user starts, all on this machine, beside a plain one.

    python bench/mkmodel.py llama31_8b /tmp/m8b
    python bench/cluster.py --model_dir /tmp/m8b tp=2 tp=2,nnodes=2      # on two GPUs
    python bench/cluster.py --model_dir DIR --options "--device cpu" tp=1 tp=2,dp=2,nnodes=2

Each topology is started in turn, as often as ``--rounds`` says, and every load of bench/serve.py
runs in it with the same requests; the table compares their medians with those of the first one. A
topology is ``name=number,...``: tp, dp, nnodes as the options of asyncllm; ``p=1,d=2`` a pd_master
with so many prefill and decode nodes, ``p=1,d=2@round_robin`` one that chooses among them so;
``servers=2`` plain ones whose requests come in turn. These
two have ``tp`` ranks each. Of p and d the table tells how long K/V take beyond the last step of a
prompt, in ms, until all has been taken. "Nodes" are processes on
the loopback interface; each sees its own GPUs only, as machines do. NCCL then goes through memory
of the host; with ``--visible all`` each sees the others' behind its own, and NCCL may use NVLink.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import selectors
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from bench import loads, serve
from bench.common import free_port
from bench.figures import Figures

USUAL = ("lat1", "burst256")
WHAT_IS_SERVED = 4  # words of all options: --model_dir and --host; a master computes nothing
TAIL = 2000  # characters of a log that are shown
VISIBLE = "CUDA_VISIBLE_DEVICES"
Shape = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Part:
    """One process that a user would start.

    Attributes:
        name: of its log.
        words: its options.
        environment: what it has beside that of this process.
        follows: it ends with the first one.
    """

    name: str
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The processes of a topology, in order of start, and where requests go.

    Attributes:
        url: of the server, or of several, with commas.
        joined: nodes that the pd_master there must know before it can serve.
        senders: addresses of those that send K/V to others.
    """

    parts: list[Part]
    url: str
    joined: int = 0
    senders: tuple[str, ...] = ()


def nodes(shape: Shape, common: Sequence[str], gpus: Sequence[str], visible: str) -> Plan:
    """A server of ``nnodes`` nodes, or a plain one.

    Args:
        common: options of all.
        gpus: what this machine has; none: it computes on the CPU.
        visible: "own": a node sees its own; "all": those of the others as well, behind them.
    """
    count, tp, dp = shape.get("nnodes", 1), shape.get("tp", 1), shape.get("dp", 1)
    port = free_port()
    words = [*common, "--tp", str(tp), "--dp", str(dp), "--nccl_port", str(free_port())]
    if count > 1:
        words += ["--nnodes", str(count), "--multinode_httpmanager_port", str(free_port())]
        words += ["--multinode_router_gloo_port", str(free_ports(tp))]
    parts = []
    for node in range(count):
        own = [*words, "--port", str(free_port() if node else port)]
        own += ["--node_rank", str(node)] if count > 1 else []
        mine = gpus[node * tp // count : (node + 1) * tp // count]
        parts.append(Part(f"node{node}", own, seeing(mine, gpus, visible), follows=node > 0))
    return Plan(parts, f"http://127.0.0.1:{port}")


def servers(shape: Shape, common: Sequence[str], gpus: Sequence[str], visible: str) -> Plan:
    """Plain servers side by side, with GPUs of their own."""
    count, tp = shape.get("servers", 1), shape.get("tp", 1)
    ports = [free_port() for _ in range(count)]
    parts = [
        Part(
            f"server{i}",
            [*common, "--tp", str(tp), "--nccl_port", str(free_port()), "--port", str(port)],
            seeing(gpus[i * tp : (i + 1) * tp], gpus, "own"),
        )
        for i, port in enumerate(ports)
    ]
    return Plan(parts, ",".join(f"http://127.0.0.1:{port}" for port in ports))


def separated(shape: Shape, common: Sequence[str], gpus: Sequence[str], visible: str) -> Plan:
    """A pd_master, prefill and decode nodes."""
    tp, port = shape.get("tp", 1), free_port()
    master = ["--pd_master_ip", "127.0.0.1", "--pd_master_port", str(port)]
    roles = ["prefill"] * shape.get("p", 1) + ["decode"] * shape.get("d", 1)
    parts, senders = [], []
    for i, role in enumerate(roles):
        words = [*common, "--run_mode", role, *master, "--tp", str(tp)]
        words += ["--port", str(own := free_port()), "--nccl_port", str(free_port())]
        senders += [f"http://127.0.0.1:{own}"] if role == "prefill" else []
        words += ["--pd_decode_rpyc_port", str(free_ports(tp))] if role == "decode" else []
        sees = seeing(gpus[i * tp : (i + 1) * tp], gpus, visible)
        parts.append(Part(f"{role}{i}", words, sees))
    words = [*common[:WHAT_IS_SERVED], "--run_mode", "pd_master", "--port", str(port)]
    words += ["--cluster_port", str(free_port())]
    master_part = Part("master", words, seeing([], gpus, "own"))
    url = f"http://127.0.0.1:{port}"
    return Plan([master_part, *parts], url, joined=len(roles), senders=tuple(senders))


def seeing(mine: Sequence[str], gpus: Sequence[str], visible: str) -> dict[str, str]:
    """What makes a process see its own GPUs, and with "all" those of others behind them."""
    more = [gpu for gpu in gpus if gpu not in mine] if visible == "all" else []
    return {VISIBLE: ",".join([*mine, *more])} if gpus else {}


# how a topology is started; a further kind of cluster is a row here
KINDS: Mapping[frozenset[str], Callable[[Shape, Sequence[str], Sequence[str], str], Plan]] = {
    frozenset({"tp", "dp", "nnodes"}): nodes,
    frozenset({"servers", "tp"}): servers,
    frozenset({"p", "d", "tp"}): separated,
}


def plan(text: str, common: Sequence[str], gpus: Sequence[str] = (), visible: str = "own") -> Plan:
    """The processes of a topology as it is written on the command line.

    Raises:
        BenchError: it is none.
    """
    names, _, strategy = text.partition("@")
    try:
        pairs = (word.split("=") for word in names.split(","))
        shape = {name: int(number) for name, number in pairs}
    except ValueError:
        raise serve.BenchError(f"{text!r} is not name=number,...") from None
    for known, start in KINDS.items():
        if known >= shape.keys() and min(shape.values()) > 0:
            found = start(shape, common, gpus, visible)
            if strategy and not found.joined:
                raise serve.BenchError(f"{text!r} has no nodes to choose among: it needs p and d")
            if strategy:
                found.parts[0].words.extend(["--select_p_d_node_strategy", strategy])
            return found
    every = ", ".join(sorted(set().union(*KINDS)))
    raise serve.BenchError(f"{text!r} is no topology: the names are {every}, the numbers above 0")


def free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that are free now."""
    while True:
        first = free_port()
        with contextlib.suppress(OSError, OverflowError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                sock = stack.enter_context(socket.socket())
                sock.bind(("127.0.0.1", port))
            return first


@contextlib.contextmanager
def running(plan: Plan, logs: Path, timeout_s: float) -> Iterator[float]:
    """The processes, for the time of the block; gives the seconds until all were ready.

    Raises:
        BenchError: one ended before, or the time was over.
    """
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        started: list[tuple[Part, subprocess.Popen[bytes]]] = []
        stack.callback(stop, started)
        for part in plan.parts:
            log = stack.enter_context((logs / part.name).open("wb"))
            paths = [str(serve.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {"PYTHONPATH": os.pathsep.join(paths), **part.environment}
            process = subprocess.Popen(
                [sys.executable, "-m", "asyncllm", *part.words],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=log,
            )
            started.append((part, process))
        wait_ready(started, logs, begin + timeout_s)
        if plan.joined:
            wait_joined(plan, started, logs, begin + timeout_s)
        yield time.perf_counter() - begin


def wait_ready(
    started: Sequence[tuple[Part, subprocess.Popen[bytes]]], logs: Path, deadline: float
) -> None:
    """Until each has said so."""
    with selectors.DefaultSelector() as selector:
        for part, process in started:
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ, part)
        while selector.get_map():
            events = selector.select(max(0.0, deadline - time.perf_counter()))
            if not events:
                late = ", ".join(key.data.name for key in selector.get_map().values())
                raise serve.BenchError(f"{late} did not become ready in time; logs: {logs}")
            for key, _ in events:
                if b"ready" not in os.read(key.fd, 1 << 16):  # its one line, or its end
                    raise ended(key.data, logs)
                selector.unregister(key.fileobj)


def ended(part: Part, logs: Path) -> serve.BenchError:
    """It was to serve."""
    tail = (logs / part.name).read_text(errors="replace")[-TAIL:]
    return serve.BenchError(f"{part.name} ended before it was ready:\n{tail}")


def wait_joined(
    plan: Plan, started: Sequence[tuple[Part, subprocess.Popen[bytes]]], logs: Path, deadline: float
) -> None:
    """Until the pd_master gives requests to all of its nodes."""
    while time.perf_counter() < deadline:
        for part, process in started:
            if process.poll() is not None:
                raise ended(part, logs)
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{plan.url}/pd_nodes") as reply:
            if sum(node["state"] == "serving" for node in json.load(reply)) == plan.joined:
                return
        time.sleep(0.1)
    raise serve.BenchError(f"not all of {plan.joined} nodes have come to {plan.url} in time")


def stop(started: Sequence[tuple[Part, subprocess.Popen[bytes]]]) -> None:
    """A signal to each that does not follow another one; who stays is killed."""
    deadline = time.perf_counter() + serve.STOP_S
    for part, process in started:
        if process.poll() is None and not part.follows:
            process.send_signal(signal.SIGTERM)
    for _, process in started:
        try:
            process.wait(max(0.1, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def measure(text: str, a: argparse.Namespace, seed: int, logs: Path) -> Figures:
    """Each load once in one topology.

    Raises:
        BenchError: it did not start, or some answers were not good.
    """
    common = ["--model_dir", a.model_dir, "--host", "127.0.0.1", *shlex.split(a.options)]
    found = plan(text, common, gpus(), a.visible)
    figures: Figures = {}
    with running(found, logs, a.start_timeout) as ready_s:
        for i, (name, options) in enumerate(a.loads.items()):
            before, words = tails(found), f"--vocab {a.vocab} {options}"
            try:
                # of its own, so that no load finds prompts of another one in the prefix cache
                figures[name] = loads.run(found.url, words, 10_000 * seed + 10 * i)
            except serve.BenchError as error:
                raise serve.BenchError(f"{text}, {name}: {error}") from None
            sent, tail_ms = (now - then for now, then in zip(tails(found), before, strict=True))
            figures[name]["kv_tail_ms"] = round(tail_ms / sent, 2) if sent else math.nan
    return {**figures, "start_s": round(ready_s, 1)}


def tails(plan: Plan) -> tuple[float, float]:
    """Requests whose K/V have been sent, and the milliseconds that took beyond their prefill."""
    found = [0.0, 0.0]
    for url in plan.senders:
        with urllib.request.urlopen(f"{url}/metrics") as reply:
            lines = dict(line.rpartition(" ")[::2] for line in reply.read().decode().splitlines())
        for i, name in enumerate(("kv_requests_sent", "kv_tail_ms")):
            found[i] += float(lines[f"asyncllm_{name}_total"])
    return found[0], found[1]


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else all that there are."""
    if (given := os.environ.get(VISIBLE)) is not None:
        return [name for name in given.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i, _ in enumerate(listed.stdout.splitlines())]


def median(rounds: Sequence[Figures], load: str, *names: str) -> float:
    def of(figures: Any) -> float:
        for name in (load, *names):
            figures = figures[name]
        return float(figures)

    return statistics.median(map(of, rounds))


def table(results: Mapping[str, Sequence[Figures]], loads: Sequence[str]) -> str:
    """Medians of the rounds; ratios to the first topology."""
    lines = [
        f"{'load':<12}{'topology':<24}{'tok/s':>10}{'ratio':>8}{'TTFT p50':>10}{'p99':>8}"
        f"{'TPOT p50':>10}{'p99':>7}{'/ p50':>7}{'K/V tail':>10}"
    ]
    for load in loads:
        first = median(next(iter(results.values())), load, "out_tok_s")
        for text, rounds in results.items():
            rate = median(rounds, load, "out_tok_s")
            (ttft, ttft99), (tpot, tpot99) = (
                [median(rounds, load, name, share) for share in ("p50", "p99")]
                for name in ("ttft_ms", "tpot_ms")
            )
            tail = median(rounds, load, "kv_tail_ms")
            ratio = rate / first if first else float("nan")
            lines.append(
                f"{load:<12}{text:<24}{rate:>10.1f}{ratio:>8.3f}{ttft:>10.1f}{ttft99:>8.1f}"
                f"{tpot:>10.2f}{tpot99:>7.2f}{tpot99 / tpot if tpot else math.nan:>7.3f}"
                f"{tail:>10.2f}"
            )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = p.add_argument
    add("topologies", nargs="+", metavar="TOPOLOGY", help="tp=2 or tp=4,dp=2,nnodes=2 and so on")
    add("--model_dir", required=True)
    add("--options", default="", help="further ones, of every process")
    add("--rounds", type=serve.positive, default=3, help="in turn: a b, b a, a b")
    add(
        "--load",
        action="append",
        metavar="NAME[=OPTIONS]",
        help=f"of {', '.join(loads.LOADS)}, or own",
    )
    add("--vocab", type=serve.positive, default=128000, help="prompt ids are in [1000, VOCAB)")
    add("--visible", choices=("own", "all"), default="own", help="GPUs that a node sees")
    add("--start_timeout", type=float, default=600.0, help="seconds until all are ready")
    add("--logs", type=Path, help="folder for the processes' logs")
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    return p


def bench(a: argparse.Namespace) -> dict[str, list[Figures]]:
    """All rounds of all topologies.

    Raises:
        BenchError: what the user must change.
    """
    a.loads = loads.chosen(a.load or USUAL, "--load")
    logs = a.logs or Path(tempfile.mkdtemp(prefix="asyncllm-bench-"))
    results: dict[str, list[Figures]] = {text: [] for text in a.topologies}
    for text in results:
        plan(text, ())  # refused before anything runs
    for number in range(a.rounds):
        order = [*results] if number % 2 == 0 else [*reversed(results)]
        for text in order:
            folder = logs / f"{number}-{text}"
            folder.mkdir(parents=True)
            results[text].append(measure(text, a, number, folder))
    if a.json:
        a.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    a = parser().parse_args(argv)
    try:
        results = bench(a)
    except (serve.BenchError, OSError) as error:
        sys.stderr.write(f"cluster.py: {error}\n")
        return 2
    print(table(results, [*a.loads]), flush=True)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    sys.exit(main())
