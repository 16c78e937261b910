"""Kills, stops and restarts of masters, nodes and the config_server at random, under load.

    python bench/mkmodel.py llama31_8b /tmp/m8b            # or any other model
    python bench/chaos.py --model_dir DIR --seconds 1800 --options "--device cpu"

A config_server, ``--masters``, ``--prefill`` and ``--decode`` nodes on the loopback interface. Clients
stream greedy completions through any master and leave some of them early. Each request must end once:
with its answer, which is the same every time, with an error that has a name, or with a broken
connection if its master was hit. At the end everybody runs, and no node may hold a slot. Exit code 1
and the reasons if that is not so; the logs stay in --logs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

ANSWER_S = 60.0  # no request takes longer
READY_S = 180.0
SETTLE_S = 30.0
HITS = ("kill", "stop", "end")  # SIGKILL, SIGSTOP for a while, SIGTERM
SAFE_PORTS = 20000, 32000  # below those that the kernel gives to connections


@dataclass(slots=True)
class Process:
    """One that a user would start; started again whenever it has ended.

    Attributes:
        hit_at: times at which something was done to it, and when it was well again.
    """

    name: str
    words: list[str]
    port: int
    log: Path
    running: subprocess.Popen[bytes] | None = None
    hit_at: list[tuple[float, float]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as out:
            words = [sys.executable, "-m", "asyncllm", *self.words, "--port", str(self.port)]
            self.running = subprocess.Popen(words, stdout=out, stderr=out)

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
        self.every_s = a.every
        ports = iter(self.random.sample(range(*SAFE_PORTS, 2), 64))  # each has the next one too
        model = ["--model_dir", a.model_dir, *shlex.split(a.options)]
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
        self.waiting: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Start, do harm, and look at the end."""
        for process in self.all:
            process.start()
        async with aiohttp.ClientSession() as session:
            await self._all_ready(session)
            clients = [asyncio.create_task(self._client(session, i)) for i in range(self.clients)]
            begin = time.monotonic()
            while time.monotonic() < begin + self.seconds:
                await asyncio.sleep(self.random.uniform(0.2, 2 * self.every_s))
                await self._harm(session)
            await self._all_ready(session)
            self.over = True
            await asyncio.gather(*clients)
            await self._no_slot_is_held(session)

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
        victim.send(signal.SIGKILL if what == "kill" else signal.SIGTERM)
        assert victim.running is not None
        try:
            await asyncio.wait_for(asyncio.to_thread(victim.running.wait), READY_S)
        except TimeoutError:
            self.faults.append(f"{victim.name} does not end")
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
                    raise SystemExit(f"{process.name} is not ready; its log is {process.log}")
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
        rng = random.Random(number)
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
            if how in ("no end", "broken", "cut off"):
                if master.hit_since(begin - 1.0):
                    how += ", its master was hit"
                else:
                    self.faults.append(f"a request to {master.name}: {how}")
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
            self.faults.append(f"another answer to prompt {which} from {master.name}")
        return "answered"

    async def _no_slot_is_held(self, session: aiohttp.ClientSession) -> None:
        deadline, held = time.monotonic() + SETTLE_S, {"": 1.0}
        while any(held.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
            held = {}
            for node in self.nodes:
                async with session.get(f"{node.url}/metrics") as reply:
                    for line in (await reply.text()).splitlines():
                        if line.startswith("asyncllm_kv_slots_used "):
                            held[node.name] = float(line.split()[1])
        if any(held.values()) or len(held) < len(self.nodes):
            self.faults.append(f"slots are held at the end: {held}")


def main() -> int:
    """0: all was as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--options", default="", help="of all masters and nodes")
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two hits, about")
    parser.add_argument("--clients", type=int, default=8)
    for name in ("masters", "prefill", "decode"):
        parser.add_argument(f"--{name}", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="default: a new folder")
    a = parser.parse_args()
    logs = a.logs or Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos = Chaos(a, logs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    try:
        asyncio.run(chaos.run())
    finally:
        for process in chaos.all:
            process.end()
    lines = {"hits": dict(chaos.hits), "requests": dict(chaos.seen), "faults": chaos.faults[:20]}
    sys.stdout.write(
        json.dumps({**lines, "num_faults": len(chaos.faults), "logs": str(logs)}) + "\n"
    )
    return 1 if chaos.faults else 0


if __name__ == "__main__":
    sys.exit(main())
