"""Kills, stops and restarts of masters, nodes and the config_server at random, under load.

    python bench/chaos.py --seconds 1800                   # a tiny random model, on the CPU
    python bench/chaos.py --seconds 1800 --model_dir DIR --options "--data_type bf16"

A config_server, ``--masters``, ``--prefill`` and ``--decode`` nodes on the loopback interface. Clients
stream greedy completions through any master and leave some of them early. Each request must end once:
with its answer, which is the same every time, with an error that has a name, or with a broken
connection if its master was hit. At the end everybody runs, and no node may hold a slot. One line
tells what was done and seen; exit code 1, with the reasons in it, if that is not so. The logs stay in
--logs. Runs with other seeds may go side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from bench import mkmodel

ANSWER_S = 60.0  # no request takes longer
READY_S = 180.0
SETTLE_S = 30.0
HITS = ("kill", "stop", "end")  # SIGKILL, SIGSTOP for a while, SIGTERM
SAFE_PORTS = 20000, 32000  # below those that the kernel gives to connections
TINY_OPTIONS = (
    "--device cpu --max_total_token_num 4000 --max_req_total_len 512 --running_max_req_size 16"
)


class Stuck(Exception):
    """A process does not come to serve, or says nothing any more."""


@dataclass(slots=True)
class Process:
    """One that a user would start; started again whenever it has ended.

    Attributes:
        hit_at: times at which something was done to it, and when it was well again.
        may_end: it has been told to.
    """

    name: str
    words: list[str]
    port: int
    log: Path
    running: subprocess.Popen[bytes] | None = None
    hit_at: list[tuple[float, float]] = field(default_factory=list)
    may_end: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as out:
            words = [sys.executable, "-m", "asyncllm", *self.words, "--port", str(self.port)]
            self.running = subprocess.Popen(words, stdout=out, stderr=out)
        self.may_end = False

    def ended(self) -> str:
        """How it has ended although nobody told it to; "": it has not."""
        if self.may_end or self.running is None or (code := self.running.poll()) is None:
            return ""
        last = self.log.read_text(errors="replace").splitlines()[-3:]
        return f"{self.name} has ended by itself with exit code {code}: {' | '.join(last)}"

    def send(self, number: int) -> None:
        assert self.running is not None
        self.running.send_signal(number)

    def hit_since(self, begin: float) -> bool:
        """Whether it was not well at some time after ``begin``."""
        return any(end >= begin for _, end in self.hit_at)

    def end(self) -> None:
        if self.running is not None and self.running.poll() is None:
            self.running.send_signal(signal.SIGCONT)
            self.running.kill()
            self.running.wait()


class Chaos:
    """The processes, what is done to them, and what clients see.

    Attributes:
        seen: how requests have ended.
        faults: what must not be.
    """

    def __init__(self, a: argparse.Namespace, logs: Path) -> None:
        self.random, self.seconds, self.clients = random.Random(a.seed), a.seconds, a.clients
        self.every_s, self.seed = a.every, a.seed
        sample = self.random.sample(range(*SAFE_PORTS, 2), 256)
        ports = (port for port in sample if free(port) and free(port + 1))
        model = ["--model_dir", a.model_dir, *shlex.split(a.options or "")]
        at = next(ports)
        there = ["--config_server_host", "127.0.0.1", "--config_server_port", str(at)]

        def make(name: str, words: list[str], port: int) -> Process:
            return Process(name, words, port, logs / name)

        self.config_server = make("config_server", ["--run_mode", "config_server"], at)
        self.masters = [
            make(f"master{i}", ["--run_mode", "pd_master", *model, *there], next(ports))
            for i in range(a.masters)
        ]
        self.nodes = [
            make(f"{role}{i}", ["--run_mode", role, *model, *there], next(ports))
            for role, count in (("prefill", a.prefill), ("decode", a.decode))
            for i in range(count)
        ]
        self.all = [self.config_server, *self.masters, *self.nodes]
        self.seen: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.faults: list[str] = []
        self.answers: dict[int, str] = {}
        self.over = False
        self.began = time.monotonic()
        self.waiting: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Start, do harm, and look at the end. Raises Stuck."""
        for process in self.all:
            process.start()
        async with aiohttp.ClientSession() as session:
            await self._all_ready(session)
            watch = asyncio.create_task(self._watch(session))
            clients = [asyncio.create_task(self._client(session, i)) for i in range(self.clients)]
            begin = time.monotonic()
            while time.monotonic() < begin + self.seconds:
                await asyncio.sleep(self.random.uniform(0.2, 2 * self.every_s))
                await self._harm(session)
            await self._all_ready(session)
            watch.cancel()
            self.over = True
            await asyncio.gather(*clients)
            await self._no_slot_is_held(session)

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        """Who ends by itself is a fault, and is started again."""
        while True:
            for process in self.all:
                if how := process.ended():
                    self.fault(how)
                    process.hit_at.append((time.monotonic(), float("inf")))
                    process.start()
                    self.waiting.append(asyncio.create_task(self._recover(session, process)))
            await asyncio.sleep(0.1)

    def fault(self, what: str) -> None:
        """Something that must not be."""
        self.faults.append(f"{time.monotonic() - self.began:.1f} s: {what}")

    async def _harm(self, session: aiohttp.ClientSession) -> None:
        victim, what = self.random.choice(self.all), self.random.choice(HITS)
        self.hits[f"{what} {victim.name.rstrip('0123456789')}"] += 1
        begin = time.monotonic()
        victim.hit_at.append((begin, float("inf")))
        if what == "stop":
            victim.send(signal.SIGSTOP)
            await asyncio.sleep(self.random.uniform(0.5, 8.0))
            victim.send(signal.SIGCONT)
            victim.hit_at[-1] = begin, time.monotonic() + 1.0
            return
        victim.may_end = True
        victim.send(signal.SIGKILL if what == "kill" else signal.SIGTERM)
        assert victim.running is not None
        try:
            await asyncio.wait_for(asyncio.to_thread(victim.running.wait), READY_S)
        except TimeoutError:
            self.fault(f"{victim.name} does not end")
            victim.end()
        await asyncio.sleep(self.random.uniform(0.0, 2.0))
        victim.start()
        self.waiting.append(asyncio.create_task(self._recover(session, victim)))

    async def _recover(self, session: aiohttp.ClientSession, victim: Process) -> None:
        """It is well again when it answers."""
        at = len(victim.hit_at) - 1
        while not await self._ready(session, victim, "/liveness"):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        victim.hit_at[at] = victim.hit_at[at][0], time.monotonic() + 1.0

    async def _all_ready(self, session: aiohttp.ClientSession) -> None:
        deadline = time.monotonic() + READY_S
        for process in self.all:
            while not await self._ready(session, process):
                if time.monotonic() > deadline:
                    raise Stuck(f"{process.name} is not ready; its log is {process.log}")
                await asyncio.sleep(0.1)

    async def _ready(
        self, session: aiohttp.ClientSession, process: Process, path: str = "/readiness"
    ) -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            timeout = aiohttp.ClientTimeout(total=5)
            async with session.get(f"{process.url}{path}", timeout=timeout) as reply:
                return reply.status == 200
        return False

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        """One request after another."""
        rng = random.Random(f"{self.seed}, {number}")
        while not self.over:
            which, leaves = rng.randrange(40), rng.random() < 0.2
            master = rng.choice(self.masters)
            begin = time.monotonic()
            try:
                how = await asyncio.wait_for(self._ask(session, master, which, leaves), ANSWER_S)
            except TimeoutError:
                how = "no end"
            except aiohttp.ClientError:
                how = "broken"
            except (ValueError, KeyError, IndexError) as error:
                how = "error without a name"
                self.fault(f"{master.name} answers what is no answer: {error!r}")
            if how in ("no end", "broken", "cut off"):
                if master.hit_since(begin - 1.0):
                    how += ", its master was hit"
                else:
                    self.fault(f"a request to {master.name}: {how}")
            self.seen[how] += 1
            if how.startswith(("error", "broken", "no end")):
                await asyncio.sleep(0.2)

    async def _ask(
        self, session: aiohttp.ClientSession, master: Process, which: int, leaves: bool
    ) -> str:
        """How a stream has ended."""
        prompt = [1 + (which * 7 + i) % 250 for i in range(5 + 9 * (which % 13))]
        body = {"prompt": prompt, "max_tokens": 8 + 6 * (which % 17), "temperature": 0,
                "ignore_eos": True, "stream": True}  # fmt: skip
        text, last = "", ""
        async with session.post(f"{master.url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                return f"error {reply.status} {(await reply.json())['error']['code']}"
            async for line in reply.content:
                if line.startswith(b"data: [DONE]"):
                    last = "done" if last != "done" else "done twice"
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return f"error in the stream: {event['error']['code']}"
                    text += event["choices"][0]["text"] if event["choices"] else ""
                    if leaves and len(text) > which:
                        return "left"
        if last != "done":
            return last or "cut off"
        if self.answers.setdefault(which, text) != text:
            self.fault(f"another answer to prompt {which} from {master.name}")
        return "answered"

    async def _no_slot_is_held(self, session: aiohttp.ClientSession) -> None:
        deadline, held = time.monotonic() + SETTLE_S, {"": 1.0}
        while any(held.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
            held = {}
            for node in self.nodes:
                try:
                    async with session.get(f"{node.url}/metrics") as reply:
                        lines = (await reply.text()).splitlines()
                except (aiohttp.ClientError, TimeoutError) as error:
                    raise Stuck(f"{node.name} has no metrics at the end: {error!r}") from None
                for line in lines:
                    if line.startswith("asyncllm_kv_slots_used "):
                        held[node.name] = float(line.split()[1])
        if any(held.values()) or len(held) < len(self.nodes):
            self.fault(f"slots are held at the end: {held}")


def free(port: int) -> bool:
    """Whether nobody listens there."""
    with contextlib.suppress(OSError), socket.socket() as sock:
        sock.bind(("127.0.0.1", port))
        return True
    return False


def main() -> int:
    """0: all was as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model_dir", help="default: a tiny one, with random weights")
    parser.add_argument(
        "--options", help=f"of all masters and nodes; of the tiny one {TINY_OPTIONS}"
    )
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two hits, about")
    parser.add_argument("--clients", type=int, default=8)
    for name in ("masters", "prefill", "decode"):
        parser.add_argument(f"--{name}", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="default: a new folder")
    a = parser.parse_args()
    logs = a.logs or Path(tempfile.mkdtemp(prefix="chaos-"))
    logs.mkdir(parents=True, exist_ok=True)
    if a.model_dir is None:
        a.model_dir, a.options = str(logs / "model"), a.options or TINY_OPTIONS
        mkmodel.write_model(mkmodel.SHAPES["tiny"], logs / "model")
    chaos = Chaos(a, logs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    try:
        asyncio.run(chaos.run())
    except Stuck as error:
        chaos.fault(str(error))
    finally:
        for process in chaos.all:
            process.end()
    lines = {
        "seed": a.seed,
        "seconds": a.seconds,
        "hits": dict(chaos.hits),
        "requests": dict(chaos.seen),
        "faults": chaos.faults[:20],
    }
    lines |= {"num_faults": len(chaos.faults), "logs": str(logs)}
    sys.stdout.write(json.dumps(lines) + "\n")
    return 1 if chaos.faults else 0


if __name__ == "__main__":
    sys.exit(main())
